"""Saved files as models: programs run as they are, what cannot run them says why, and nothing is unpickled unasked."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from own_model_kit import PLAIN, verdict, workload, written
from torch import nn

from bench.plan.own_model import lines
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model.catalogue import workload_of
from seq2seq.own_model.errors import OwnModelError
from seq2seq.own_model.inspection import looked_at
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.saved import Form, saved_form
from seq2seq.own_model.source import Spec
from seq2seq.runtimes import onnxruntime

RUNS = {
    Form.EXPORTED: {"reference", "aten", "compile", "amp-bf16", "onnxruntime", "openvino"},
    Form.SCRIPTED: {"reference", "aten", "amp-bf16", "onnxruntime", "openvino"},
    Form.ONNX: {"onnxruntime", "openvino"},
}
FILES = {Form.EXPORTED: "model.pt2", Form.SCRIPTED: "model.pt", Form.ONNX: "model.onnx"}


class Net(nn.Module):
    """An LSTM each way and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of each step."""
        return self.head(self.lstm(x)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One model saved in every way, and inputs for it."""
    torch.manual_seed(0)
    path, model, example = tmp_path_factory.mktemp("saved"), Net().eval(), torch.randn(2, 7, 5)
    with warnings.catch_warnings():
        # Exporters warn of what they deprecate and do not guarantee.
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (example,)), path / "model.pt2")
        torch.jit.save(torch.jit.script(model), path / "model.pt")
        torch.onnx.export(model, (example,), path / "model.onnx", dynamo=False, opset_version=17, input_names=["x"])
    torch.save(model.state_dict(), path / "weights.pt")
    (path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    written(path, "import torch\n\ndef example_inputs():\n    return torch.randn(2, 7, 5)\n", "inputs")
    return path


def problem(folder: Path, form: Form):
    """The workload of a file; inputs are its own, where it has them."""
    inputs = "" if form is not Form.SCRIPTED else f"{folder / 'inputs.py'}:example_inputs"
    own = OwnModel(Spec(str(folder / FILES[form]), inputs, folder=str(folder)))
    return workload_of(own, next(iter(own.names)))


@pytest.mark.parametrize("form", RUNS)
def test_a_program_runs_as_it_is_and_others_say_why_not(folder, form):
    """Each variant is one that runs, or has a reason in one line; a program is not trained."""
    found = problem(folder, form)
    assert found.own.form is form
    assert found.modes == ("inference",)
    names = {"reference", "aten", "cpu-fused", "compile", "amp-bf16", "torchscript", "onnxruntime", "openvino"}
    reasons = {name: found.refuses(VARIANTS[name], "inference") for name in (*names, "int8-dynamic", "cpu-fused-int8")}
    assert {name for name, reason in reasons.items() if reason is None} == RUNS[form]
    assert all("\n" not in reason for reason in reasons.values() if reason)
    assert "torch does not run" in reasons["cpu-fused"] if form is Form.ONNX else "operators" in reasons["cpu-fused"]


@pytest.mark.parametrize(("form", "variant"), [(form, "onnxruntime") for form in RUNS] + [(Form.EXPORTED, "aten")])
def test_a_right_program_passes_the_gate_in_float64(folder, form, variant):
    """Truth is the program itself in float64, on moved weights, in another runtime too."""
    found = problem(folder, form)
    assert found.narrow == ""
    assert verdict(found, variant).passed


@pytest.mark.parametrize("form", [Form.EXPORTED, Form.ONNX])
def test_a_wrong_program_is_caught(folder, form, monkeypatch):
    """Planted: ONNX Runtime gets weights that are a hundredth larger than the program's."""
    found = problem(folder, form)

    monkeypatch.setattr(onnxruntime.OnnxRuntime, "run", _larger(onnxruntime.OnnxRuntime.run))
    assert not verdict(found, "onnxruntime").passed


def _larger(run):
    return lambda self, inputs: tuple(1.01 * value for value in run(self, inputs))


def test_the_lstm_nodes_of_an_onnx_file_are_described(folder):
    """Sizes are those of the weights; what depends on the inputs is not known."""
    found = problem(folder, Form.ONNX)
    (lstm,) = found.own.operators[found.name]
    assert (lstm["input_size"], lstm["hidden_size"], lstm["bidirectional"], lstm["batch"]) == (5, 8, True, None)


@pytest.mark.parametrize("form", [Form.EXPORTED, Form.SCRIPTED])
def test_the_lstm_operators_of_a_program_are_found(folder, form):
    """Sizes and share of the time come from torch's profiler, since there are no modules."""
    found = problem(folder, form)
    (lstm,) = found.own.operators[found.name]
    sizes = {
        name: lstm[name] for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "batch", "steps")
    }
    assert sizes == dict(zip(sizes, (5, 8, 1, True, 2, 7), strict=True))
    assert 0.1 < looked_at(found)["inference"].share < 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weights.pt", "a dict of 10 entries, as a state_dict is"),
        ("plain.pt", "a plain pickle is not loaded"),
        ("model.pt", "holds no example inputs"),
    ],
)
def test_other_files_are_refused_in_one_line(folder, name, said):
    """The line says what the file holds, and what to give."""
    with pytest.raises(OwnModelError, match=said) as caught:
        OwnModel(Spec(str(folder / name)))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_run_to_find_out_what_it_is(tmp_path):
    """The form of a file is read without its code; only a whole module is unpickled, later, and that is said."""
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save(_Evil(str(trace)), path)
    assert saved_form(str(path)) is Form.PICKLE
    assert not trace.exists()
    said = lines({"model": "m", "saved": Form.PICKLE, "parameters": 1, "sets": [], "cells": []})
    assert "loading it ran the code that it names" in said[1]


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_training_a_program_is_refused(folder):
    """A loss has no use for what has one mode."""
    with pytest.raises(OwnModelError, match="is not trained"):
        OwnModel(Spec(str(folder / "model.pt2"), loss="x.py:loss"))


def test_a_module_with_code_has_no_form(tmp_path):
    """Whatever is not a saved file is loaded as code."""
    assert saved_form(f"{written(tmp_path, PLAIN)}:build") is None
    assert workload(written(tmp_path, PLAIN)).own.form is None


class RunsCode:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_program_with_code_in_its_inputs_is_not_loaded(folder, tmp_path):
    """torch.export.load would run it."""
    blob = io.BytesIO()
    torch.save(((RunsCode(tmp_path / "ran"),), {}), blob)
    with zipfile.ZipFile(folder / "model.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, blob.getvalue() if "sample_inputs" in entry.filename else old.read(entry))
    with pytest.raises(OwnModelError, match=r"sample_inputs.* is a pickle that runs code"):
        saved_form(str(tmp_path / "evil.pt2"))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_named(folder, tmp_path):
    """Its directory at the end is what zip looks at first."""
    whole = (folder / "model.pt").read_bytes()
    place = whole.rindex(b"PK\x01\x02")
    path = tmp_path / "a.pt"
    path.write_bytes(whole[:place] + b"XXXX" + whole[place + 4 :])
    with pytest.raises(OwnModelError, match=r"a\.pt is damaged .*save it again"):
        saved_form(str(path))


def test_a_saved_model_may_have_any_name(tmp_path):
    """Its form is that of its content."""
    torch.jit.save(torch.jit.script(nn.LSTM(3, 4)), tmp_path / "lm.ts")
    assert saved_form(str(tmp_path / "lm.ts")) is Form.SCRIPTED
    assert saved_form("shop.models:build") is None
    (tmp_path / "notes.txt").write_text("none", encoding="utf-8")
    with pytest.raises(OwnModelError, match=r"notes.txt is not a file of torch.save"):
        saved_form(str(tmp_path / "notes.txt"))
