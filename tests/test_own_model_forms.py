"""Forms of inputs, outputs and state of own models that the tool must take as they are."""

from __future__ import annotations

import time

import pytest
import torch
from own_model_kit import PLAIN, own, verdict, workload, written
from torch import nn

from bench.plan.own_model import lines
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model import lstms
from seq2seq.own_model.errors import OwnModelError
from seq2seq.runtimes.runtime import digest_of


def test_plain_values_in_an_output_leave_the_truth_in_float64(tmp_path):
    """None, flags and names have no precision, so they cannot show that a model casts."""
    plain = "return {'scores': self.head(y), 'mask': None, 'ok': True, 'kind': 'x'}"
    code = PLAIN.replace("return self.head(y), state", plain)
    assert workload(written(tmp_path, code)).narrow == ""
    cast = code.replace("'scores': self.head(y)", "'scores': self.head(y).float()")
    assert "output.scores is still float32" in workload(written(tmp_path, cast, "casts")).narrow


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("self.head(y).argmax(-1).tolist()", "its output holds no tensor, and a converted model returns nothing else"),
        ("(self.head(y), y.mean().item())", r"output[1] is a number that Python computes from tensors at each call"),
        ("(self.head(y), 3)", None),
    ],
)
def test_what_only_python_computes_is_not_converted(output, words, tmp_path):
    """A converted model would repeat the numbers of its first call; a constant it may repeat."""
    problem = workload(written(tmp_path, PLAIN.replace("return self.head(y), state", f"return {output}")))
    reason = problem.refuses(VARIANTS["int8-dynamic"], "inference")
    assert words in reason if words else reason is None
    assert verdict(problem, "cpu-fused").passed


@pytest.mark.parametrize("variant", ["onnxruntime", "openvino"])
def test_an_input_that_is_not_read_does_not_keep_another_runtime_from_a_model(variant, tmp_path):
    """Exporters leave such an input out of the graph, so the others are bound by name."""
    code = PLAIN.replace("def forward(self, x, state=None)", "def forward(self, lengths, x, state=None)")
    code = code.replace("return torch.randn(2, 7, 5)", "return torch.tensor([7, 7]), torch.randn(2, 7, 5)")
    problem = workload(written(tmp_path, code))
    if reason := VARIANTS[variant].why_not("cpu", "inference", problem):
        assert "not installed" in reason
        return
    found = verdict(problem, variant)
    assert found.passed, found.describe()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_a_model_keeps_besides_float32_tensors_is_no_obstacle(mode, tmp_path):
    """Extra state that is no tensor, and buffers of types that NumPy does not have."""
    kept = "self.register_buffer('scale', torch.ones(3, dtype=torch.bfloat16))"
    extra = (
        "    def get_extra_state(self):\n        return {'version': 3}\n    def set_extra_state(self, state): pass\n"
    )
    code = PLAIN.replace("    def forward", f"        {kept}\n{extra}    def forward")
    path = written(tmp_path, code.replace("self.head(y), state", "self.head(y) * self.scale, state"))
    problem = workload(path, loss=f"{path}:loss")
    assert len(digest_of(problem.own.model.state_dict())) == 64
    for variant in ("reference", "cpu-fused"):
        found = verdict(problem, variant, mode)
        assert found.passed, found.describe()


def test_inputs_drawn_by_numpy_are_the_same_in_each_process(tmp_path):
    """As those drawn by torch and by Python are: each process of a run asks for them anew."""
    drawn = "import numpy as np; return torch.from_numpy(np.random.randn(2, 7, 5).astype('float32'))"
    problem = workload(written(tmp_path, PLAIN.replace("return torch.randn(2, 7, 5)", drawn)))
    one, two = (problem.make_batch(0).tensors() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_torchscript_that_does_not_take_the_inputs_is_unavailable(tmp_path):
    """It compiles, with the parameter taken for a tensor, and would raise at each call."""
    code = PLAIN.replace("self.lstm(x, state)", "self.lstm(x, None)").replace("state=None", "")
    packed = "return nn.utils.rnn.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])"
    code = code.replace("return torch.randn(2, 7, 5)", packed).replace("self.head(y), state", "y")
    reason = workload(written(tmp_path, code)).refuses(VARIANTS["torchscript"], "inference")
    assert "torch.jit.script does not take this model: RuntimeError: forward() Expected a value of type" in reason


@pytest.mark.parametrize("option", ["loss", "metric"])
def test_a_file_without_a_function_means_that_of_the_option_s_name(option, tmp_path):
    """As --model means `build`; where there is none, the option that names one is said."""
    found = own(written(tmp_path, PLAIN), loss=written(tmp_path, PLAIN))
    assert found.loss.__name__ == "loss"
    code = "def score(output, inputs): ...\n"
    with pytest.raises(OwnModelError, match=f"has no '{option}'; .*score.*; name one with --{option} FILE.py:FUNCTION"):
        own(written(tmp_path, PLAIN), **{option: written(tmp_path, code, "other")})


@pytest.mark.parametrize(
    "forward",
    [
        "def forward(self, x, *, scale=2.0): return self.head(self.lstm(x)[0]) * scale",
        "forward = functools.partialmethod(lambda self, scale, x: self.head(self.lstm(x)[0]) * scale, 2.0)",
        "",
    ],
)
def test_a_forward_of_any_kind_is_compiled(forward, tmp_path):
    """With keyword-only defaults, a partial one, and one that is set on the object, as wrappers do."""
    code = PLAIN.partition("    def forward")[0] + f"    {forward}\n\ndef build():\n    model = Model()\n"
    if not forward:
        code += "    model.forward = lambda x: model.head(model.lstm(x)[0]) * 2.0\n"
    code += "    return model\n" + PLAIN.partition("    return Model()\n")[2]
    problem = workload(written(tmp_path, f"import functools\n{code}"))
    for variant in ("reference", "cpu-fused", "compile"):
        found = verdict(problem, variant)
        assert found.passed, found.describe()


def test_the_share_of_an_lstm_is_what_a_call_saves_without_it():
    """An LSTM alone decides its time; beside a pause it takes what the pause leaves. Its forward is its own again."""
    lstm = nn.LSTM(5, 8)
    x = torch.randn(7, 2, 5)
    pause_s = 0.002

    def paused():
        time.sleep(pause_s)
        y, _ = lstm(x)
        # What the model does to a result must not change the next one.
        return y.mul_(2)

    before = lstm(x)[0]
    with torch.inference_mode():
        alone, beside = (lstms.look(call, lstms.find(lstm)) for call in (lambda: lstm(x), paused))
    assert alone.share > 0.85
    assert beside.share < 0.5
    assert beside.call_s >= pause_s
    assert "forward" not in vars(lstm)
    assert torch.equal(lstm(x)[0], before)


def test_lstms_in_a_plain_list_are_named(tmp_path):
    """They are no part of the model, so no variant replaces them."""
    code = PLAIN.replace("super().__init__()", "super().__init__()\n        self.more = [nn.LSTM(5, 5), nn.LSTM(5, 5)]")
    found = own(written(tmp_path, code))
    assert lstms.unregistered(found.model) == ["more[0]", "more[1]"]
    assert lstms.unregistered(own(written(tmp_path, PLAIN, "plain")).model) == []


def test_many_lstms_that_are_alike_are_one_line(tmp_path):
    """The others keep a line each, and what is said of them is what would be said of each."""
    layers = "self.lstms = nn.ModuleList([nn.LSTM(5, 5, batch_first=True) for _ in range(9)])"
    code = PLAIN.replace("super().__init__()", f"super().__init__()\n        {layers}")
    code = code.replace("y, state =", "for lstm in self.lstms: x = lstm(x)[0]\n        y, state =")
    problem = workload(written(tmp_path, code))
    with lstms.watched(problem.own.uses):
        problem.own.call(problem.own.model, problem.make_batch(0))
    entry = {"input_set": "", "lstms": [use.facts() for use in problem.own.uses], "lstm_share": {}}
    entry["checked"] = problem.found()
    found = {"model": "m", "parameters": 1, "sets": [entry], "cells": [], "unregistered": ["more[0]"]}
    said = [line.strip() for line in lines(found)]
    assert "lstms.0 to lstms.8, 9 of them: LSTM 1 x 5, in 5; batch 2, steps 7" in said
    assert "lstm: LSTM 1 x 8, in 5; batch 2, steps 7" in said
    assert "no part of the model, so neither replaced nor trained: more[0]; use nn.ModuleList" in said
