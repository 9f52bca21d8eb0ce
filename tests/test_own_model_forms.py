"""Forms of inputs, outputs and state of own models that the tool must take as they are."""

from __future__ import annotations

import pytest
import torch
from own_model_kit import PLAIN, verdict, workload, written

from seq2seq.execution.variants import VARIANTS
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
