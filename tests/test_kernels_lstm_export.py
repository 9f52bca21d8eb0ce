"""kernels.LSTM in torch.onnx.export and torch.jit.trace: recorded as torch's own LSTM, right at other sizes too."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import LSTM, replace_lstm

# The old exporter and tracing say that they are deprecated and that sizes become constants.
pytestmark = pytest.mark.filterwarnings("ignore")


class Tagger(nn.Module):
    """A model that somebody wrote around torch.nn.LSTM."""

    def __init__(self, *, bidirectional: bool, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(16 if bidirectional else 8, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tags of (batch, steps, 6)."""
        given = {} if lengths is None else {"lengths": lengths}
        return self.head(self.lstm(x, **given)[0])


def replaced(implementation: str, *, bidirectional: bool = True, layers: int = 1) -> Tagger:
    """The model with our LSTM in it."""
    torch.manual_seed(0)
    model = Tagger(bidirectional=bidirectional, layers=layers).eval()
    replace_lstm(model, implementation)
    return model


def exported(model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Any, list[str]]:
    """A session of ONNX Runtime for the model, and the kinds of its nodes."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    names = ["x", "lengths"][: len(arguments)]
    axes = {"x": {0: "batch", 1: "steps"}, "lengths": {0: "batch"}}
    file = io.BytesIO()
    torch.onnx.export(
        model, arguments, file, dynamo=False, input_names=names, dynamic_axes={name: axes[name] for name in names}
    )
    nodes = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    return runtime.InferenceSession(file.getvalue()), nodes


@pytest.mark.parametrize("implementation", ["auto", "cpu-fused", "loop", "vendor"])
@pytest.mark.parametrize(("bidirectional", "layers"), [(True, 1), (False, 2)])
def test_onnx_holds_lstm_nodes(implementation, bidirectional, layers):
    """Every layer is one LSTM node, and the file computes what the model does, at another batch and length too."""
    model = replaced(implementation, bidirectional=bidirectional, layers=layers)
    session, nodes = exported(model, (torch.randn(2, 5, 6),))
    assert nodes.count("LSTM") == layers
    for shape in ((2, 5, 6), (3, 9, 6)):
        x = torch.randn(shape)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_takes_lengths():
    """Lengths are an input of the file, and padding counts for nothing in it either."""
    model = replaced("auto")
    x, lengths = torch.randn(2, 5, 6), torch.tensor([5, 3])
    session, nodes = exported(model, (x, lengths))
    assert nodes.count("LSTM") == 1
    for given in (lengths, torch.tensor([2, 5])):
        (found,) = session.run(None, {"x": x.numpy(), "lengths": given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x, given).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_trace_is_torch_s_own_lstm(gradients):
    """torch.jit.trace records aten::lstm, which runs without this package, at other sizes, and has gradients."""
    lstm = LSTM(3, 4, implementation="auto")
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        traced = torch.jit.trace(lstm, (torch.randn(5, 2, 3),))
    assert "aten::lstm" in str(traced.inlined_graph)
    x = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(x), lstm(x))
    expected = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
    torch.testing.assert_close(torch.autograd.grad(traced(x)[0].sum(), list(traced.parameters())), expected)


def test_weights_in_fewer_bits_are_not_exported():
    """A file would hold the full weights, and compute something else than the module does."""
    lstm = LSTM(3, 4, implementation="cpu-fused", weight_storage="int8").eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="use weight_storage='fp32' there"):
        torch.jit.trace(lstm, (torch.randn(5, 2, 3),))
