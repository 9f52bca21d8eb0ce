"""The artefact of an own model builds the user's model the recommended way, in a fresh process, moved or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_model_kit import PLAIN, ROOT, own, written
from run_folders import make_run

from bench.__main__ import main
from bench.plan.cases import Case
from bench.plan.own_model import VARIABLE
from bench.recommend import apply
from bench.recommend.apply import ProofError, Recipe, prove
from bench.worker.artefact_recipe import NoRecipeError
from bench.worker.own_artefact_recipe import own_text, placed
from seq2seq.execution.variants import VARIANTS

MIX = "return [(torch.randn(2, 7, 5), 3), ((torch.randn(1, 3, 5),), 1)]"


def text_of(path: str, variant: str, out: Path, mode: str = "inference", name: str = "own:mine", **fields) -> str:
    """The artefact of a file's model."""
    return own_text(own(path, **fields), name, variant, mode, "cpu", 1, out)


def spec_of(path: str) -> dict:
    """What a run's command line says of a file's model."""
    named = {"inputs": "", "trace": "", "loss": "", "metric": "", "variants": {}, "folder": str(Path(path).parent)}
    return {"model": f"{path}:build", **named}


def ran(path: Path) -> subprocess.CompletedProcess:
    """The artefact as a program, in a process of its own."""
    # A compiler is found by the path, and it may have to compile the kernel.
    environment = {name: os.environ[name] for name in ("PATH", "SEQ2SEQ_KERNEL_CACHE") if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd="/", env=environment, check=False
    )


@pytest.mark.parametrize(
    "variant", ["reference", "aten", "cpu-fused", "compile", "amp-bf16", "cpu-fused-amp", "openvino"]
)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_way_is_python_or_a_reason(variant, mode, tmp_path):
    """The text compiles and is small; where there is none, one line says why."""
    path = written(tmp_path, PLAIN)
    if VARIANTS[variant].autocast and mode == "training":
        with pytest.raises(NoRecipeError, match="autocast"):
            text_of(path, variant, tmp_path / "best.py", mode)
        return
    found = text_of(path, variant, tmp_path / "best.py", mode)
    compile(found, "best.py", "exec")
    assert len(found.splitlines()) < 110
    assert ("eval()" in found) == (mode == "inference")


def test_an_artefact_runs_in_a_fresh_process_and_moves_with_its_folder(tmp_path):
    """It builds the user's model from the user's file beside it, wherever both are."""
    (tmp_path / "a").mkdir()
    path = written(tmp_path / "a", PLAIN + "\n    # not the loss\n")
    (tmp_path / "a" / "best.py").write_text(text_of(path, "cpu-fused", tmp_path / "a" / "best.py"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = ran(tmp_path / "b" / "best.py")
    assert found.stdout == "one call returned a tuple\n", found.stderr
    (tmp_path / "b" / "mine.py").unlink()
    assert "mine.py is not there; put it back" in ran(tmp_path / "b" / "best.py").stderr


def test_the_call_of_a_mix_is_that_of_its_set(tmp_path):
    """The set that was measured is picked out of those that the user's function returns."""
    path = written(tmp_path, PLAIN.replace("return torch.randn(2, 7, 5)", MIX))
    names = list(own(path).names)
    assert "given = inputs()[1][-2]\n" in text_of(path, "reference", tmp_path / "best.py", name=names[1])


@pytest.mark.parametrize(
    ("path", "out", "root", "expected"),
    [
        ("/home/me/lm/net.py", "/home/me/lm/best.py", "", "net.py"),
        ("/home/me/lm/net.py", "/home/me/best.py", "", "lm/net.py"),
        ("/home/me/lm/net.py", "/home/me/out/best.py", "/home/me", "../lm/net.py"),
        ("/home/me/lm/net.py", "/srv/best.py", "/home/me", "/home/me/lm/net.py"),
    ],
)
def test_paths_are_relative_where_both_are_moved_together(path, out, root, expected):
    """Beside, below, or in the folder in which the run was begun; a full path otherwise."""
    assert placed(path, Path(out), root)[0] == expected


def test_a_variant_with_an_environment_asks_for_it(tmp_path):
    """Its variables are read when libraries load, so a process without them is refused."""
    found = text_of(written(tmp_path, PLAIN), "passive-onednn", tmp_path / "best.py")
    assert 'ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}' in found
    (tmp_path / "best.py").write_text(found)
    assert "start the process with OMP_WAIT_POLICY=PASSIVE" in ran(tmp_path / "best.py").stderr


def test_an_added_variant_is_called_where_it_is(tmp_path, monkeypatch):
    """The user's own function makes it, from the user's own file."""
    path = written(tmp_path, PLAIN + "\ndef mine(model):\n    return model\n")
    monkeypatch.setitem(VARIANTS, "extra", VARIANTS["reference"].__class__("extra", "mine", make=lambda model: model))
    found = text_of(path, "extra", tmp_path / "best.py", variants={"extra": f"{path}:mine"})
    assert "return user('mine.py').mine(model)" in found


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_an_artefact_is_proven_against_the_users_model(tmp_path, monkeypatch):
    """The right one passes the gate and the clock; one that is wrong by a percent does not, and leaves nothing."""
    monkeypatch.setattr(apply, "BUDGETS_S", (1.0, 4.0))
    path = written(tmp_path, PLAIN)
    found = text_of(path, "reference", tmp_path / "best.py")
    case = Case("own:mine", "reference", "inference", "cpu", 1)
    wrong = found.replace("return model\n", "return lambda *x: [(1.01 * y, s) for y, s in [model(*x)]][0]\n")
    assert wrong != found
    with pytest.raises(ProofError, match="its results are wrong"):
        prove(Recipe(wrong), case, tmp_path / "best.py", spec_of(path))
    proof = prove(Recipe(found), case, tmp_path / "best.py", spec_of(path))
    assert 0 <= proof.error < proof.limit
    assert {file.name for file in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_a_model_that_is_gone_is_named(tmp_path, capsys):
    """A run outlives the files that it measured; the line says which."""
    facts = {
        "threads": {"workers": {VARIABLE: json.dumps(spec_of(str(tmp_path / "gone.py")))}},
        "needs": {"onednn": []},
    }
    folder = make_run(tmp_path / "run", facts, workloads=("own:gone",), figured=True)
    assert main(["recommend", str(folder), "--variant", "onednn", "--apply", str(tmp_path / "best.py")]) == 2
    assert "gone.py, which" in capsys.readouterr().err


def test_the_share_of_the_lstms_is_in_the_answer(tmp_path, capsys):
    """The terminal, JSON and the page say what a faster LSTM can bring at most."""
    facts = {"lstm_share": {"own:mine": {"inference": 0.75}}, "needs": {"onednn": []}}
    folder = make_run(tmp_path / "run", facts, workloads=("own:mine",), figured=True)
    main(["recommend", str(folder)])
    assert "Your LSTMs take 75% of a call: faster LSTMs alone make it at most 4.0x." in " ".join(
        capsys.readouterr().out.split()
    )
    main(["recommend", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["answers"][0]["lstm_share"] == 0.75
