"""Wrong copies of the loop, each with one defect that a kernel's author makes: what the gate must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kernels.reference import LoopLSTM, State, lstm_cell


def _swapped_gates(gates_input: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> State:
    i, f, g, o = (gates_input + functional.linear(hidden, weight_hh, bias_hh)).chunk(4, dim=1)
    cell = torch.sigmoid(i) * cell + torch.sigmoid(f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _no_recurrent_bias(gates_input: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> State:
    return lstm_cell(gates_input, hidden, cell, weight_hh, torch.zeros_like(bias_hh))


def _tanh_for_sigmoid(gates_input: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> State:
    i, f, g, o = (gates_input + functional.linear(hidden, weight_hh, bias_hh)).chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.tanh(o) * torch.tanh(cell), cell


class GateOrder(LoopLSTM):
    """Takes the input gate for the forget gate."""

    cell = staticmethod(_swapped_gates)


class MissingRecurrentBias(LoopLSTM):
    """Forgets bias_hh."""

    cell = staticmethod(_no_recurrent_bias)


class TanhForSigmoid(LoopLSTM):
    """Puts the output gate through the wrong function."""

    cell = staticmethod(_tanh_for_sigmoid)


class OffByOneStep(LoopLSTM):
    """Reads the input of the step before."""

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super()._direction(x.roll(1, dims=1), h, c, index, inside)


class InitialCellDropped(LoopLSTM):
    """Starts from a zero cell state whatever it was given."""

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super()._direction(x, h, torch.zeros_like(c), index, inside)


class BatchTailUnwritten(LoopLSTM):
    """Leaves the last sequence's results at what the memory held, here zeros."""

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        written = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        written[-1] = 0
        output, h, c = super()._direction(x, h, c, index, inside)
        return output * written[:, None], h * written, c * written


#: By what is wrong with them.
DEFECTS: dict[str, Callable[..., LoopLSTM]] = {
    "gate order": GateOrder,
    "missing recurrent bias": MissingRecurrentBias,
    "off by one step": OffByOneStep,
    "initial cell dropped": InitialCellDropped,
    "batch tail unwritten": BatchTailUnwritten,
    "tanh for sigmoid": TanhForSigmoid,
}
