"""Arguments of the functions of lstm.cpp: structures of numbers and addresses, and the addresses of tensors."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

_pointer = ctypes.c_void_p
_number = ctypes.c_int64


class ForwardArgs(ctypes.Structure):
    """`Forward` of lstm.cpp."""

    _fields_ = (
        *((name, _number) for name in ("batch", "steps", "hidden", "reverse", "threads", "by_rows")),
        ("gates_input", _pointer), ("gi_step", _number), ("gi_row", _number), ("gi_steps", _number),
        ("x", _pointer), ("x_step", _number), ("x_row", _number), ("features", _number),
        *((name, _pointer) for name in ("packed_ih", "bias_ih", "bias_hh", "packed", "scale_ih", "scale")),
        *((name, _pointer) for name in ("h0", "c0", "lengths")),
        ("output", _pointer), ("out_step", _number), ("out_row", _number),
        ("h_n", _pointer), ("c_n", _pointer),
        ("gates", _pointer), ("gates_step", _number), ("gates_row", _number),
        ("cells", _pointer), ("cells_step", _number), ("cells_row", _number),
        *((name, _pointer) for name in ("scratch", "resets", "weight_ih", "weight_hh")),
    )  # fmt: skip


class BackwardArgs(ctypes.Structure):
    """`Backward` of lstm.cpp."""

    _fields_ = (
        *((name, _number) for name in ("batch", "steps", "hidden", "reverse", "threads", "by_rows")),
        *((name, _pointer) for name in ("packed", "c0", "lengths")),
        ("gates", _pointer), ("gates_step", _number), ("gates_row", _number),
        ("cells", _pointer), ("cells_step", _number), ("cells_row", _number),
        ("grad_output", _pointer), ("go_step", _number), ("go_row", _number),
        *((name, _pointer) for name in ("grad_h_n", "grad_c_n")),
        ("grad_gates", _pointer), ("gg_step", _number), ("gg_row", _number),
        *((name, _pointer) for name in ("grad_h0", "grad_c0")),
        ("x", _pointer), ("x_step", _number), ("x_row", _number), ("features", _number),
        ("output", _pointer), ("out_step", _number), ("out_row", _number),
        *((name, _pointer) for name in ("h0", "grad_ih", "grad_hh", "grad_bias")), ("weight_threads", _number),
        ("resets", _pointer), ("packed_ih", _pointer), ("grad_x", _pointer), ("grad_x_more", _number),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "grad_bias_hh")),
    )  # fmt: skip


#: The same as bytes, of numbers and of addresses that are 0 where there is nothing: in a fifth of the time.
FORWARD = struct.Struct(f"{len(ForwardArgs._fields_)}q").pack
BACKWARD = struct.Struct(f"{len(BackwardArgs._fields_)}q").pack


def strided(value: Tensor | None) -> tuple[int | None, int, int]:
    """Address, and strides of steps and rows."""
    return (None, 0, 0) if value is None else (value.data_ptr(), value.stride(0), value.stride(1))


def address(value: Tensor | None, direction: int = 0) -> int | None:
    """Address of a direction's part of a contiguous tensor."""
    return None if value is None else value.data_ptr() + direction * value.stride(0) * value.element_size()


def hidden_of(weight_hh: Tensor) -> int:
    """Hidden size by a recurrent matrix.

    Raises:
        RuntimeError: where it is not a matrix, which torch's modules let happen.
    """
    if weight_hh.dim() != 2:  # noqa: PLR2004
        msg = f"weight_hh is {tuple(weight_hh.shape)}, expected (4 * hidden_size, hidden_size)"
        raise RuntimeError(msg)
    return weight_hh.size(1)


def fitting(own: tuple[Tensor, ...], features: int, hidden: int) -> list[Tensor]:
    """A direction's parameters as the kernel reads them: it would run past the end of what is smaller."""
    rows = 4 * hidden
    for value, shape in zip(own, ((rows, features), (rows, hidden), (rows,), (rows,)), strict=False):
        if value.shape != shape or value.dtype is not torch.float32 or not value.is_cpu:
            msg = (
                f"a parameter is {tuple(value.shape)} of {value.dtype} on {value.device}, expected {shape} of "
                f"torch.float32 on cpu for {features} features and {hidden} hidden units"
            )
            raise RuntimeError(msg)
    return [value if value.is_contiguous() else value.contiguous() for value in own]
