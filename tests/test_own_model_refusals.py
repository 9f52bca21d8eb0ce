"""An own model that cannot be measured is refused in one line that says which part of it, why, and what to do."""

# ruff: noqa: E501 - a row of the table is one line

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
from own_model_kit import EXAMPLES, PLAIN, own, verdict, workload, written
from torch import nn

from bench.errors import UsageError
from bench.plan import own_model as given
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model import catalogue
from seq2seq.own_model.catalogue import workload_of
from seq2seq.own_model.errors import OwnModelError, one_line
from seq2seq.own_model.source import Spec, builder

#: What is planted in the plain model, and what is said of it.
PLANTED = {
    "state kept in the module": (
        {"self.lstm(x, state)\n": "self.lstm(x, getattr(self, 'hidden', None))\n        self.hidden = state\n"},
        r"keeps state between calls: hidden\[0\] changes at each call, and output\[0\] depends on it; take the state as an",
    ),
    "a counter in a buffer": (
        {"super().__init__()\n": "super().__init__()\n        self.register_buffer('calls', torch.zeros(1))\n",
         "y, state =": "self.calls += 1\n        y, state ="},
        "keeps state between calls: calls changes at each call; take the state",
    ),
    "dropout left on": (
        {"return self.head(y)": "return nn.functional.dropout(self.head(y), 0.5, training=True)"},
        r"output\[0\] differs at each call in eval mode with the same inputs: aten\.\w+ at .*mine.py:\d+ draws random",
    ),
    "random numbers of torch": (
        {"self.head(y)": "self.head(y) + torch.rand(1)"},
        r"differs at each call .*: aten\.rand at .*mine.py:\d+ draws random numbers; switch it off outside of training",
    ),
    "random numbers of Python": (
        {"self.head(y)": "self.head(y) + __import__('random').random()"},
        "it draws random numbers from Python's generator; switch that off, or take them as an input",
    ),
    "an input changed in place": (
        {"y, state =": "x.mul_(2)\n        y, state ="},
        "the model changes its input inputs in place; work on a copy",
    ),
    "an input that is taken out": (
        {"forward(self, x, state=None)": "forward(self, batch, state=None)", "y, state =": "x = batch.pop('x')\n        y, state =",
         "return torch.randn(2, 7, 5)": "return ({'x': torch.randn(2, 7, 5)},)"},
        r"the model takes inputs\[0\].x out of its inputs in place; work on a copy",
    ),
    "an input that grows": (
        {"state=None)": "state=None, log=None)", "y, state =": "log.append(1)\n        y, state =",
         "return torch.randn(2, 7, 5)": "return {'x': torch.randn(2, 7, 5), 'log': []}"},
        r"the model adds inputs.log\[0\] to its inputs in place; work on a copy",
    ),
    "an array changed in place": (
        {"y, state =": "x *= 2\n        x = torch.from_numpy(x)\n        y, state =", "torch.randn(2, 7, 5)": "torch.randn(2, 7, 5).numpy()"},
        "the model changes its input inputs in place; work on a copy",
    ),
    "nothing computed": (
        {"return self.head(y), state": "return x"},
        "output is an input or a weight itself, and nothing else is returned",
    ),
    "an output that cannot be compared": (
        {"return self.head(y), state": "return self.head(y), self.lstm"},
        r"output\[1\] is a torch.nn.modules.rnn.LSTM, which cannot be compared; return tensors",
    ),
    "a coin of Python's in training": (
        {"y, state =": "if self.training and __import__('random').random() < 0.5: x = 2 * x\n        y, state ="},
        "differs at each call in training mode .*: it draws random numbers from Python's generator; .*; without --loss, inf",
    ),
    "a coin of NumPy's in training": (
        {"y, state =": "if self.training and __import__('numpy').random.rand() < 0.5: x = 2 * x\n        y, state ="},
        "it draws random numbers from NumPy's generator; switch that off, or take them as an input",
    ),
    "a coin of torch's in training": (
        {"y, state =": "if self.training and torch.rand(1) < 0.5: x = 2 * x\n        y, state ="},
        r"aten\.rand at .*mine.py:\d+ draws random numbers; switch it off outside of training",
    ),
    "a global counter": (
        {"import torch\n": "import torch\nCALLS = []\n", "y, state =": "CALLS.append(1)\n        x = x * len(CALLS)\n        y, state ="},
        "differs at each call .*: it depends on something outside of the model, such as a global variable",
    ),
    "an output of nothing": (
        {"return self.head(y), state": "return {'scores': None, 'ok': True}"},
        "returns neither tensors nor numbers, so nothing can be compared: output.scores is None, output.ok is True; return",
    ),
    "no sequences": (
        {"torch.randn(2, 7, 5)": "torch.randn(0, 7, 5)"},
        "the LSTM lstm reads 0 sequences of 7 steps, so nothing can be measured; give inputs that are not empty",
    ),
    "inputs of NaN": (
        {"torch.randn(2, 7, 5)": "torch.full((2, 7, 5), float('nan'))"},
        r"output\[0\] holds NaN with the inputs given; inputs holds NaN or infinite values itself, so nothing",
    ),
    "several losses": (
        {"return output[0].square().mean()": "return output[0].mean(), output[0].square().mean()"},
        r"mine.py:loss returned a tuple, expected one floating-point number as a tensor; return the sum of the losses; with",
    ),
    "a checkpoint with code in it": (
        {"return Model()": "import io; f = io.BytesIO(); torch.save(Model(), f); f.seek(0); return torch.load(f)"},
        r"UnpicklingError: Weights only load failed[^\x1b]*\(.*mine.py:\d+\); if you trust the file, load it with torch.load",
    ),
    "a file of a package": (
        {"import torch\n": "from .layers import Encoder\nimport torch\n"},
        r"ImportError: .*mine.py:2\); name a file of a package as a module, PACKAGE.MODULE:FUNCTION, with the",
    ),
    "a NaN": ({"self.head(y)": "self.head(y) / 0 * 0"}, r"output\[0\] holds NaN with the inputs given"),
    "no LSTM": ({"nn.LSTM(": "nn.GRU("}, r"Model holds no torch.nn.LSTM; it has GRU 'lstm', for which there are no variants"),
    "an LSTM that does not run": (
        {"y, state = self.lstm(x, state)": "y = x.repeat(1, 1, 2)[..., :8]"},
        "none of the LSTMs of Model runs with the inputs given: lstm",
    ),
    "build() that raises": ({"return Model()": "return Model(1)"}, r"mine.py:build raised TypeError: .*\(.*mine.py:\d+\)"),
    "build() that returns something else": ({"return Model()": "return {}"}, "returned a dict, expected a torch.nn.Module"),
    "weights from elsewhere": (
        {"return Model()": "m = Model(); m.head.bias.data.fill_(int.from_bytes(__import__('os').urandom(4), 'big')); return m"},
        "builds another model at each call, .*: head.bias differs; load the weights from a file, or draw them",
    ),
    "weights in half precision": ({"return Model()": "return Model().half()"}, "weight lstm.weight_ih_l0 is float16, expected float32"),
    "inputs that do not fit": ({"return torch.randn(2, 7, 5)": "return (1, 2, 3)"}, r"inputs do not fit Model.forward.*: too many"),
    "an unknown keyword": (
        {"return torch.randn(2, 7, 5)": "return {'x': torch.randn(2, 7, 5), 'stat': None}"},
        "key 'stat' is not a parameter of forward; there are x, state",
    ),
    "inputs that raise": ({"return torch.randn(2, 7, 5)": "raise KeyError('no data')"}, r"example_inputs raised KeyError: 'no data' \(.*mine.py"),
    "one argument that is a dict": (
        {"self.lstm(x, state)": "self.lstm(x['a'] + x['b'], state)",
         "return torch.randn(2, 7, 5)": "return {'a': torch.randn(2, 7, 5), 'b': torch.randn(2, 7, 5)}"},
        r"raised TypeError: .*; the inputs are a dict whose keys \(a, b\) are no parameters of forward, so .* return a tuple of it",
    ),
    "a weight without a size": (
        {"nn.Linear(8, 3)": "nn.LazyLinear(3)"},
        "the weight head.weight has no size yet; call the model once where it is built",
    ),
    "a mix without weights": ({"return torch.randn(2, 7, 5)": "return [torch.randn(2, 7, 5)]"}, r"entry 0 is no \(inputs, weight\)"),
    "a call that raises": ({"torch.randn(2, 7, 5)": "torch.randn(2, 7, 6)"}, r"calling the model of .* raised RuntimeError: .*\(.*mine.py:\d+\)"),
    "a process that ends": ({"return Model()": "raise SystemExit(3)"}, r"ended the process \(exit code 3\)"),
    "a file that is not Python": ({"class Model": "class class"}, r"raised SyntaxError.*mine.py:\d+"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_cannot_be_measured_is_refused_by_name(what, tmp_path):
    """One line, which names the place in the user's code where there is one."""
    changes, words = PLANTED[what]
    code = PLAIN
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    path = written(tmp_path, code)
    trained = "training" in what or "loss" in what
    with pytest.raises(OwnModelError) as error:
        workload(path, loss=f"{path}:loss" if trained else "")
    assert "\n" not in str(error.value)
    assert re.search(words, str(error.value)), str(error.value)


def test_the_plain_model_is_let_through(tmp_path):
    """What is planted is the reason for the refusals."""
    assert workload(written(tmp_path, PLAIN)).batch == 2


def test_a_draw_that_changes_nothing_is_let_through(tmp_path):
    """As of a layer that is dropped with probability 0."""
    assert (
        workload(written(tmp_path, PLAIN.replace("y, state =", "x = x + 0 * torch.rand(1)\n        y, state ="))).batch
        == 2
    )


def test_missing_values_in_inputs_are_no_change(tmp_path):
    """A NaN that the model replaces is the same NaN after the call."""
    code = PLAIN.replace("self.lstm(x, state)", "self.lstm(x.nan_to_num(), state)")
    code = code.replace("return torch.randn(2, 7, 5)", "x = torch.randn(2, 7, 5); x[0, 1] = float('nan'); return x")
    problem = workload(written(tmp_path, code))
    assert verdict(problem, "cpu-fused").passed


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("'good'", "mine.py:score returned a str, expected one finite number"),
        ("output[0]", r"mine.py:score returned a tensor of shape \(2, 7, 3\), expected one finite number"),
        ("float('nan')", "mine.py:score returned nan, expected one finite number"),
        ("inputs['targets']", r"mine.py:score raised \w+Error: .* \(.*mine.py:\d+\)"),
    ],
)
def test_a_metric_is_tried_before_anything_is_measured(score, words, tmp_path):
    path = written(tmp_path, f"{PLAIN}\ndef score(output, inputs):\n    return {score}\n")
    with pytest.raises(OwnModelError, match=words):
        workload(path, metric=f"{path}:score")


def test_a_cache_that_is_filled_once_is_no_state(tmp_path):
    code = PLAIN.replace("y, state =", "self.seen = getattr(self, 'seen', x.sum())\n        y, state =")
    assert workload(written(tmp_path, code)).batch == 2


def test_an_input_passed_through_is_not_compared(tmp_path):
    """Where something else is computed, it is left out of the comparison and said."""
    problem = workload(written(tmp_path, PLAIN.replace("return self.head(y), state", "return self.head(y), state, x")))
    assert problem.aliased == {"output[2]"}


#: A file without the functions that are looked for, with names of each kind: a class, imports, an instance.
PARTS = """
import functools
from os.path import join
from torch import nn

class Model(nn.Module): ...

@functools.cache
def cached(): ...

def other(): ...

def _helper(): ...

model = Model()
"""


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{0}/mine.py:biuld", r"has no 'biuld'; did you mean 'build'\?"),
        ("{0}/mien.py:build", r"mien.py does not exist; did you mean .*/mine.py\?"),
        ("{0}/mine.py:network", r"has no 'network'; its functions: build, example_inputs, loss$"),
        ("{0}/parts.py", r"has no 'build'; its functions: cached, other; name one with --model FILE.py:FUNCTION$"),
        ("{0}/mine.txt:build", "no module|does not exist|not a Python file"),
        ("nowhere.at_all:build", "no module 'nowhere.at_all' can be imported from"),
        ("{0}/mine.pt2", "is not a file of torch.save, torch.jit.save or torch.export.save"),
        ("{0}/mine.onnx", "is not a valid ONNX model"),
        ("{0}/mine.ort", "is in ONNX Runtime's own format; give the .onnx file"),
        ("{0}/state.pt", "holds a dict of 2 entries, as a state_dict is: weights without the model"),
        ("{0}/none.pt", "none.pt does not exist"),
    ],
)
def test_a_model_that_is_not_there_or_is_none_is_one_line(reference, words, tmp_path):
    written(tmp_path, PLAIN)
    written(tmp_path, PARTS, "parts")
    for name in ("mine.pt2", "mine.onnx", "mine.ort"):
        (tmp_path / name).write_bytes(b"x")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(OwnModelError, match=words):
        builder(reference.format(tmp_path))()


def test_a_saved_module_and_a_module_s_function_are_models(tmp_path, monkeypatch):
    """`torch.save(model)` holds all that is needed; `package.module:function` is looked for where the user is."""
    torch.save(nn.LSTM(3, 4), tmp_path / "saved.pt")
    assert isinstance(builder(str(tmp_path / "saved.pt"))(), nn.LSTM)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    written(tmp_path / "shop", PLAIN, "models")
    monkeypatch.setenv(given.VARIABLE, json.dumps({"model": "shop.models:build", "folder": str(tmp_path)}))
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert builder("shop.models:build")().lstm.hidden_size == 8
    assert Spec("shop.models:build").label == "models"
    assert Spec("/a/lm.py:make").label == "lm.make"


def test_inputs_that_are_not_there_are_asked_for(tmp_path):
    """The option that names them, for a trace too: its lines are arguments of such a function."""
    path = written(tmp_path, PLAIN.replace("def example_inputs", "def pictures"))
    (tmp_path / "trace.jsonl").write_text('{"batch": 2}', encoding="utf-8")
    for trace in "", str(tmp_path / "trace.jsonl"):
        with pytest.raises(
            OwnModelError, match=r"has no 'example_inputs'; .*; name one with --inputs FILE.py:FUNCTION$"
        ):
            own(path, trace=trace)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty; expected a line as"),
        ("{", r":1 is not JSON .*; expected a line as"),
        ("[1]", r":1: expected an object"),
        ('{"batch": 2, "count": 0}', r":1: expected an object with the arguments .* a count above 0"),
    ],
)
def test_a_broken_trace_names_its_line(line, words, tmp_path):
    (tmp_path / "trace.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(OwnModelError, match=words):
        own(EXAMPLES / "tagger.py", trace=str(tmp_path / "trace.jsonl"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "a.py:loss"}, "--loss is about a model of your own: name it with --model"),
        ({"add_variant": ["a=b.py:c"]}, "--add-variant is about a model of your own"),
        ({"model": "a.py:b", "inputs": ["a.py:b", "c.py:d"]}, "--inputs takes one function and one trace at most"),
        (
            {"model": "a.py:b", "inputs": ["/no/t.jsonl"]},
            "^--inputs /no/t.jsonl does not exist; expected a trace of JSON",
        ),
        ({"model": "a.py:b", "add_variant": ["a=b.py:c", "a=b.py:d"]}, "--add-variant a is given twice"),
    ],
)
def test_options_that_do_not_fit_each_other_are_one_line(options, words):
    with pytest.raises(UsageError, match=words):
        given.variable(options)


def test_a_reference_that_ends_in_a_colon_is_one_line():
    with pytest.raises(argparse.ArgumentTypeError, match=r"'lm.py:' names no function after the colon; expected FILE"):
        given.reference("lm.py:")


def test_a_file_of_any_name_is_no_module(tmp_path, monkeypatch):
    """A saved model may be called as its user likes; a name without a file is a module's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm.ts").touch()
    assert given.reference("lm.ts") == str(tmp_path / "lm.ts")
    assert given.reference("shop.models:build") == "shop.models:build"


def test_an_added_variant_may_not_take_a_name_of_the_suite(tmp_path, monkeypatch):
    path = written(tmp_path, PLAIN)
    monkeypatch.setenv(given.VARIABLE, json.dumps({"model": f"{path}:build", "variants": {"loop": f"{path}:build"}}))
    with pytest.raises(OwnModelError, match="--add-variant loop: the suite has a variant of that name"):
        catalogue.add_variants.__wrapped__()


def test_random_numbers_in_training_are_refused_where_a_loss_is_given(tmp_path):
    """Dropout of modules is set to 0 and said; a dropout that nobody can switch off is refused."""
    modules = PLAIN.replace("nn.Linear(8, 3)", "nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))")
    path = written(tmp_path, modules)
    assert workload(path, loss=f"{path}:loss").notes.startswith("dropout set to 0 (head.0 0.5)")
    inline = PLAIN.replace("self.head(y)", "self.head(nn.functional.dropout(y, 0.5, self.training))")
    path = written(tmp_path, inline, "inline")
    with pytest.raises(OwnModelError, match=r"differs at each call in training mode .* draws random numbers"):
        workload(path, loss=f"{path}:loss")
    assert workload(path).untrained.startswith("no loss: give --loss")


def test_a_refusal_is_one_line_at_the_command_line_and_leaves_nothing_behind(tmp_path):
    """Exit code 2, no run folder; the user's code runs in no process of ours but a worker."""
    code = PLAIN.replace("self.head(y)", "self.head(y) + torch.rand(1)")
    path = written(tmp_path, f"import os\nopen(os.environ['SEEN'], 'a').write(f'{{os.getppid()}} ')\n{code}")
    words = [sys.executable, "-m", "bench", "run", "--model", f"{path}:build", "--out", str(tmp_path / "run")]
    variables = {**__import__("os").environ, "SEEN": str(tmp_path / "seen")}
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, cwd=EXAMPLES.parent.parent
    )
    _, said = child.communicate(timeout=300)
    assert child.returncode == 2
    assert said.startswith("error: output[0] differs at each call")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    # The worker's parent is the command; the command's parent is this test.
    assert set((tmp_path / "seen").read_text().split()) == {str(child.pid)}


def test_an_exporter_s_reason_is_the_cause_and_its_place():
    """TorchScript's first line is a signature, and ONNX's exporter ends in a request to its readers."""
    scripted = RuntimeError(
        "\nArguments for call are not valid.\nThe following variants are available:\n  \n  forward(Tensor input):\n"
        "  Expected a value of type 'Tensor' for argument 'input' but instead found type 'int'.\n  \n"
        'The original call is:\n  File "/home/me/lm.py", line 32\n        return self.lstm(1)\n   ~~~ <--- HERE\n'
    )
    what = "RuntimeError: Expected a value of type 'Tensor' for argument 'input' but instead found type 'int'."
    assert one_line(scripted) == f"{what} (/home/me/lm.py:32)"
    scripted = RuntimeError(
        '\nimport statements aren\'t supported:\n  File "/home/me/lm.py", line 9\n  import random\n'
    )
    assert one_line(scripted) == "RuntimeError: import statements aren't supported (/home/me/lm.py:9)"
    compiled = RuntimeError("Exception from src/core.cpp:105:\nCheck 'false' failed at src/a.cpp:1:\nno such port\n\n")
    assert one_line(compiled) == "RuntimeError: no such port"
    exported = ValueError(
        "Unsupported: LSTMs with projections. Please feel free to request support or submit [Caused by"
    )
    assert one_line(exported) == "ValueError: Unsupported: LSTMs with projections."


def test_torchscript_is_asked_once_for_all_sets_of_inputs(tmp_path, monkeypatch):
    """It compiles for no inputs, and a second attempt fails at what the first one left behind."""
    asked = []
    monkeypatch.setattr("seq2seq.own_model.workload.why_not", lambda *_: asked.append(1) or "no")
    code = PLAIN.replace("return torch.randn(2, 7, 5)", "return [(torch.randn(2, 7, 5), 3), (torch.randn(1, 3, 5), 1)]")
    found = own(written(tmp_path, code))
    for variant in ("torchscript", "onnxruntime"):
        reasons = [workload_of(found, name).refuses(VARIANTS[variant], "inference") for name in found.names]
        assert reasons == ["no", "no"]
    assert len(asked) == 1 + 2
