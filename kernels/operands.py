"""Checks the arguments of the operators in `kernels.ops`, and allocates their results.

Kernels trust shapes, types and strides, so every argument passes through here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common.recurrence import state_dtype

#: Output, h_n, c_n, gates and cells.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def outputs(gates_input: Tensor, weight_hh: Tensor, batch_first: bool, save: bool) -> Outputs:
    """Allocate output, h_n, c_n, gates and cells, not filled in."""
    first, second, directions, _ = gates_input.shape
    hidden = weight_hh.size(2)
    steps, batch = (second, first) if batch_first else (first, second)
    wide = state_dtype(gates_input.dtype)
    kept = (steps, batch, directions) if save else (0, 0, 0)
    return (
        gates_input.new_empty(first, second, directions * hidden),
        gates_input.new_empty(directions, batch, hidden),
        gates_input.new_empty(directions, batch, hidden, dtype=wide),
        gates_input.new_empty(*kept, 4 * hidden),
        gates_input.new_empty(*kept, hidden, dtype=wide),
    )


def empty_gradients(gates: Tensor, cells: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate gradients of gates_input, h0 and c0, not filled in."""
    steps, batch, directions, four_hidden = gates.shape
    first, second = (batch, steps) if batch_first else (steps, batch)
    return (
        gates.new_empty(first, second, directions, four_hidden),
        gates.new_empty(directions, batch, four_hidden // 4),
        cells.new_empty(directions, batch, four_hidden // 4),
    )


def check_forward(
    gates_input: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
) -> None:
    """Refuse wrong arguments: kernels trust shapes and types, and would reach into other memory."""
    steps, batch = gates_input.shape[:2] if not batch_first else gates_input.shape[1::-1]
    if weight_hh.dim() != 3:  # noqa: PLR2004
        msg = f"weight_hh is {tuple(weight_hh.shape)}, expected (directions, 4 * hidden_size, hidden_size)"
        raise ValueError(msg)
    directions, _, hidden = weight_hh.shape
    state = (directions, batch, hidden)
    dtype = gates_input.dtype
    _expect(
        gates_input.device,
        gates_input=(gates_input, (*gates_input.shape[:2], directions, 4 * hidden), dtype),
        weight_hh=(weight_hh, (directions, 4 * hidden, hidden), dtype),
        h0=(h0, state, dtype),
        c0=(c0, state, state_dtype(dtype)),
        lengths=(lengths, (batch,), torch.int32),
        resets=(resets, (directions, steps, batch), torch.bool),
    )
    if not steps:
        msg = f"gates_input is {tuple(gates_input.shape)}, expected at least one step"
        raise ValueError(msg)


def check_backward(
    grad_output: Tensor,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    batch_first: bool,
) -> None:
    """Refuse wrong arguments, as `check_forward`: hooks of saved tensors may return different ones."""
    steps, batch, directions, _ = gates.shape
    hidden, dtype, wide = weight_hh.size(2), gates.dtype, state_dtype(gates.dtype)
    state, outer = (directions, batch, hidden), (batch, steps) if batch_first else (steps, batch)
    _expect(
        gates.device,
        grad_output=(grad_output, (*outer, directions * hidden), dtype),
        grad_h_n=(grad_h_n, state, dtype),
        grad_c_n=(grad_c_n, state, wide),
        weight_hh=(weight_hh, (directions, 4 * hidden, hidden), dtype),
        c0=(c0, state, wide),
        lengths=(lengths, (batch,), torch.int32),
        resets=(resets, (directions, steps, batch), torch.bool),
        gates=(gates, (steps, batch, directions, 4 * hidden), dtype),
        cells=(cells, (steps, batch, directions, hidden), wide),
    )


def _expect(device: torch.device, **arguments: tuple[Tensor | None, tuple[int, ...], torch.dtype]) -> None:
    """Raise ValueError for an argument of another shape, type or device than expected."""
    for name, (value, shape, dtype) in arguments.items():
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != device):
            msg = (
                f"{name} is {tuple(value.shape)} of {value.dtype} on {value.device}, expected {shape} of {dtype} on "
                f"{device}"
            )
            raise ValueError(msg)


def time_first(value: Tensor, batch_first: bool) -> Tensor:
    """A view with steps first."""
    return value.transpose(0, 1) if batch_first else value


def read(value: Tensor, batch_first: bool) -> Tensor:
    """Operand as kernels read it: steps first, and a contiguous last dimension."""
    value = value if value.stride(-1) == 1 or value.size(-1) == 1 else value.contiguous()
    return value.transpose(0, 1) if batch_first else value


def rows(value: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, as kernels read it; a gradient may be expanded."""
    return value if value.stride(-1) == 1 or value.size(-1) == 1 else value.contiguous()
