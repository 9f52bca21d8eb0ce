"""Truth that the processes of a group share: computed once, the same for all, and never half a file."""

from __future__ import annotations

import pytest
import torch

from bench.gate import kept
from bench.gate.kept import KeptQuantities
from bench.gate.parity import Gate
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

WORKLOAD = "seed@batch=2,length=3"


def quantities():
    """Of two kinds, as a training has them."""
    return {"outputs": torch.tensor([[1.0, float("nan")]]), "loss": torch.tensor(0.5, dtype=torch.float64)}


def test_the_first_who_asks_computes_and_all_others_read(tmp_path):
    """Bit by bit the same, with the same types; another seed or precision is another problem."""
    asked = []

    def compute():
        asked.append(1)
        return quantities()

    one, other = KeptQuantities(tmp_path / "truth"), KeptQuantities(tmp_path / "truth")
    first, second = one.get("3", "truth", compute), other.get(3, "truth", compute)
    assert len(asked) == 1
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.nan_to_num(9), second[name].nan_to_num(9))
    other.get("4", "truth", compute)
    other.get("3", "fp32", compute)
    assert len(asked) == 3


def test_what_is_too_large_is_computed_by_everyone(tmp_path, monkeypatch):
    """No file is written."""
    monkeypatch.setattr(kept, "MOST_BYTES", 15)
    KeptQuantities(tmp_path / "truth").get("3", "truth", quantities)
    assert not (tmp_path / "truth").exists()
    monkeypatch.setattr(kept, "MOST_BYTES", 16)
    KeptQuantities(tmp_path / "truth").get("3", "truth", quantities)
    assert [path.name for path in (tmp_path / "truth").iterdir()] == ["3-truth.pt"]


def test_a_process_that_dies_while_it_writes_leaves_nothing_to_read(tmp_path, monkeypatch):
    """The next one computes for itself."""

    def dies(_, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            KeptQuantities(tmp_path).get("3", "truth", quantities)
    assert KeptQuantities(tmp_path).get("3", "truth", quantities)["loss"] == 0.5


@pytest.mark.parametrize("mode", ["inference", "training", "decode"])
def test_a_gate_that_reads_truth_judges_as_the_one_that_computed_it(mode, tmp_path):
    """The same verdict to the digit, and a defect is refused as before."""
    workload = find_workload("translation-small-scaled@batch=2,length=3,hidden=8" if mode == "decode" else WORKLOAD)
    weights = initial_weights(workload.config, 1)
    right = execute(workload, VARIANTS["reference"], mode, "cpu", weights)
    verdicts = []
    for folder in (None, tmp_path, tmp_path):
        gate = Gate(workload, mode, "cpu")
        gate.kept = KeptQuantities(folder) if folder else None
        verdicts.append(gate.check(right, 7))
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert verdicts[0].passed
    assert list(tmp_path.glob("7-*.pt"))
    # What is kept of a problem is not what is kept of another.
    found = {path.name: torch.load(path) for path in tmp_path.glob("7-*.pt")}
    wrong = {name: {key: value + 1 for key, value in values.items()} for name, values in found.items()}
    for name, values in wrong.items():
        torch.save(values, tmp_path / name.replace("7-", "8-"))
    gate = Gate(workload, mode, "cpu")
    gate.kept = KeptQuantities(tmp_path)
    if mode != "decode":
        assert not gate.check(right, 8).passed
