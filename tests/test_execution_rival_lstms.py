"""Rivals' LSTMs against torch.nn.LSTM, with stand-ins that take and give what their documentation says."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seq2seq.execution import rival_lstms
from seq2seq.execution.requirements import needs_rival
from seq2seq.execution.rival_lstms import FlashRNNLSTM, TorchRLLSTM
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.registry import find_workload

RIVALS = ("torchrl", "flashrnn", "flashrnn-bf16")


def walk(gates: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over gates (batch, steps, 4H): output, h and c."""
    outputs = []
    for step in gates.unbind(1):
        i, f, g, o = (step + h @ weight.t()).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1), h, c


def torchrl(x: Tensor, hidden: Tensor, cell: Tensor, *rest: Tensor, input_precision: str) -> tuple[Tensor, ...]:
    """Steps' h and c, then the last; hidden and cell are given for each step, and is_init says where they count."""
    w_ih, w_hh, b_ih, b_hh, is_init = rest
    assert input_precision == "tf32"
    assert hidden.shape == cell.shape == (*x.shape[:2], w_hh.size(1))
    assert (is_init.shape, is_init.dtype, bool(is_init.any())) == (x.shape[:2], torch.bool, False)
    output, h, c = walk(x @ w_ih.t() + b_ih + b_hh, hidden[:, 0], cell[:, 0], w_hh)
    return output, torch.zeros_like(output), h, c


def flashrnn(Wx: Tensor, R: Tensor, b: Tensor, *, states: Tensor, function: str, backend: str, dtype: str) -> Any:  # noqa: N803
    """States (2, batch, steps, heads, units) of all steps and of the last, for one head."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", str(Wx.dtype).removeprefix("torch."))
    batch, steps, gates, heads, units = Wx.shape
    assert (gates, heads, R.shape, b.shape) == (4, 1, (4, 1, units, units), (4, 1, units))
    assert states.shape == (2, batch, 1, 1, units)
    assert {value.dtype for value in (R, b, states)} == {Wx.dtype}
    output, h, c = walk(
        (Wx + b).reshape(batch, steps, 4 * units), states[0, :, 0, 0], states[1, :, 0, 0], R.reshape(4 * units, units)
    )
    every = torch.stack([output, torch.zeros_like(output)]).unsqueeze(3)
    return every, torch.stack([h, c]).view(2, batch, 1, 1, units)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("rival", "stand_in"), [(TorchRLLSTM, torchrl), (FlashRNNLSTM, flashrnn)])
def test_equals_nn_lstm(rival, stand_in, stateful, monkeypatch):
    """Two layers: output, final state and every gradient, in float64."""
    monkeypatch.setattr(rival_lstms, f"{stand_in.__name__}_function", lambda: stand_in)
    theirs, ours = nn.LSTM(3, 4, 2, batch_first=True).double(), rival(3, 4, 2, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    found = []
    for lstm in (theirs, ours):
        generator = torch.Generator().manual_seed(1)
        shapes = (5, 6, 3), (2, 5, 4), (2, 5, 4)
        x, h, c = (torch.randn(*one, generator=generator, dtype=torch.float64).requires_grad_() for one in shapes)
        output, state = lstm(x, (h, c) if stateful else None)
        results = (output, *state)
        mixed = sum((value * torch.linspace(-1, 2, value.numel()).view(value.shape)).sum() for value in results)
        leaves = [*lstm.parameters(), x, *((h, c) if stateful else ())]
        found.append([*results, *torch.autograd.grad(mixed, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rival", [TorchRLLSTM, FlashRNNLSTM])
@pytest.mark.parametrize("name", ["bidirectional", "batch_first", "bias", "proj_size"])
def test_what_a_rival_has_not_is_refused(rival, name):
    """Other arguments of torch.nn.LSTM are no quiet other result."""
    options = {"batch_first": True} | {name: {"proj_size": 2, "bidirectional": True}.get(name, False)}
    with pytest.raises(ValueError, match="takes batch_first=True, one direction, biases and proj_size=0"):
        rival(3, 4, **options)


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU that torch claims to see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", RIVALS)
def test_a_missing_package_is_the_reason(name, monkeypatch):
    """Not installed, or not loading: one line that says which, and what to install."""
    package = name.partition("-")[0]
    seed, error = find_workload("scaling"), ModuleNotFoundError("planted", name=package)

    def fails(_: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)
    assert VARIANTS[name].why_not("cuda", "inference", seed) == (
        f"needs {package}, which is not installed: pip install {package}"
    )

    error = OSError("undefined symbol:\n  planted")
    assert VARIANTS[name].why_not("cuda", "inference", seed) == (
        f"needs {package}, which does not load here (undefined symbol: planted): pip install {package}"
    )


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        ("translation-iwslt", "torchrl's LSTM runs only forward, and the encoder reads both ways"),
        ("translation-small", "torchrl's LSTM takes no lengths, and this workload's sequences differ in length"),
        ("seed", None),
    ],
)
def test_what_a_rival_cannot_serve_is_the_reason(workload, reason):
    """Two directions and lengths, whatever the package."""
    assert needs_rival("torchrl", lambda: None)("cuda", "training", find_workload(workload)) == reason


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["cudnn-fp16", "cudnn-bf16"])
def test_stored_weights_are_for_inference(name):
    """In training autocast would hand cuDNN float16 whatever the variant's name says."""
    seed = find_workload("seed")
    assert VARIANTS[name].why_not("cuda", "inference", seed) is None
    assert "amp-fp16" in VARIANTS[name].why_not("cuda", "training", seed)
