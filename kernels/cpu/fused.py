"""The fused CPU kernel behind the contract of `kernels.recurrence`: float32, any sizes, packed weights kept.

One thread team walks through the whole sequence. `kernels/cpu/lstm.cpp` has the kernel, `packing.py` the weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.cpu.build import BuildError, library
from kernels.cpu.packing import STORAGE, pack
from kernels.recurrence import Backward, Forward, Problem

_pointer = ctypes.c_void_p
_number = ctypes.c_int64


class _ForwardArgs(ctypes.Structure):
    _fields_ = (
        *((name, _number) for name in ("batch", "steps", "hidden", "reverse", "threads", "by_rows")),
        ("gates_input", _pointer), ("gi_step", _number), ("gi_row", _number),
        ("x", _pointer), ("x_step", _number), ("x_row", _number), ("features", _number),
        *((name, _pointer) for name in ("packed_ih", "bias_ih", "bias_hh", "packed", "scale_ih", "scale")),
        *((name, _pointer) for name in ("h0", "c0", "lengths")),
        ("output", _pointer), ("out_step", _number), ("out_row", _number),
        ("h_n", _pointer), ("c_n", _pointer),
        ("gates", _pointer), ("gates_step", _number), ("gates_row", _number),
        ("cells", _pointer), ("cells_step", _number), ("cells_row", _number),
        ("scratch", _pointer),
    )  # fmt: skip


class _BackwardArgs(ctypes.Structure):
    _fields_ = (
        *((name, _number) for name in ("batch", "steps", "hidden", "reverse", "threads", "by_rows")),
        *((name, _pointer) for name in ("packed", "c0", "lengths")),
        ("gates", _pointer), ("gates_step", _number), ("gates_row", _number),
        ("cells", _pointer), ("cells_step", _number), ("cells_row", _number),
        ("grad_output", _pointer), ("go_step", _number), ("go_row", _number),
        *((name, _pointer) for name in ("grad_h_n", "grad_c_n")),
        ("grad_gates", _pointer), ("gg_step", _number), ("gg_row", _number),
        *((name, _pointer) for name in ("grad_h0", "grad_c0")),
    )  # fmt: skip


#: x, its strides and features, packed input weights and biases: the projection has been done.
_NO_INPUT = (None, 0, 0, 0, None, None, None)


def refuses(problem: Problem, *, backward: bool = False) -> str | None:
    """Why the kernel cannot serve a problem here, or None."""
    del backward
    if problem.device != "cpu":
        return f"the fused CPU kernel runs on CPU tensors, these are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"the fused CPU kernel computes in float32, these are {str(problem.dtype).removeprefix('torch.')}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def forward(args: Forward, storage: str = "fp32") -> None:
    """Run a forward recurrence on CPU tensors, its weights kept as a key of `kernels.cpu.packing.STORAGE`."""
    native = library()
    steps, batch, directions, _ = args.gates_input.shape
    hidden = args.weight_hh.size(2)
    if not steps * batch:
        return _nothing(args)
    scratch = args.h_n.new_empty(2, batch, hidden)
    threads, by_rows = _team(batch, steps, hidden)
    for d in range(directions):
        packed = pack(args.weight_hh[d], "forward", storage)
        native.lstm_forward(ctypes.byref(_ForwardArgs(
            batch, steps, hidden, d, threads, by_rows,
            *_strided(args.gates_input[:, :, d]), *_NO_INPUT,
            packed.values.data_ptr(), None, _at(packed.scale), _at(args.h0, d), _at(args.c0, d), _at(args.lengths),
            *_strided(args.output[:, :, d]), _at(args.h_n, d), _at(args.c_n, d),
            *_strided(None if args.gates is None else args.gates[:, :, d]),
            *_strided(None if args.cells is None else args.cells[:, :, d]),
            scratch.data_ptr(),
        )), STORAGE[storage][0])  # fmt: skip
    return None


def backward(args: Backward) -> None:
    """Run a backward recurrence on CPU tensors."""
    native = library()
    steps, batch, directions, _ = args.gates.shape
    hidden = args.weight_hh.size(2)
    threads, by_rows = _team(batch, steps, hidden)
    for d in range(directions):
        packed = pack(args.weight_hh[d], "backward")
        native.lstm_backward(ctypes.byref(_BackwardArgs(
            batch, steps, hidden, d, threads, by_rows, packed.values.data_ptr(), _at(args.c0, d), _at(args.lengths),
            *_strided(args.gates[:, :, d]), *_strided(args.cells[:, :, d]), *_strided(args.grad_output[:, :, d]),
            _at(args.grad_h_n, d), _at(args.grad_c_n, d), *_strided(args.grad_gates[:, :, d]),
            _at(args.grad_h0, d), _at(args.grad_c0, d),
        )))  # fmt: skip


def layer(
    x: Tensor,
    parameters: Sequence[tuple[Tensor, ...]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    *,
    batch_first: bool,
    storage: str = "fp32",
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer without gradients, its input projection included; packs each direction's own parameters.

    Args:
        x: (batch, steps, features) if `batch_first`, else (steps, batch, features); float32 on a CPU, not empty.
        parameters: of each direction weight_ih (4H, features), weight_hh (4H, H), and both biases (4H,), if any.
        h0: (directions, batch, H), or None for zeros.
        c0: the same.
        lengths: (batch,) int32, or None for all steps.
        batch_first: order of x and of the output.
        storage: key of `kernels.cpu.packing.STORAGE`: how the weights are kept.

    Returns:
        Output (as x, with directions * H features), h_n and c_n (directions, batch, H).
    """
    native = library()
    x = x.contiguous()
    first, second, features = x.shape
    batch, steps = (first, second) if batch_first else (second, first)
    x_step, x_row = (features, steps * features) if batch_first else (batch * features, features)
    hidden = parameters[0][1].size(1)
    output = x.new_empty(x.size(0), x.size(1), len(parameters) * hidden)
    h_n, c_n = x.new_empty(2, len(parameters), batch, hidden).unbind()
    scratch = x.new_empty(2, batch, hidden)
    out = output if batch_first else output.transpose(0, 1)
    threads, by_rows = _team(batch, steps, hidden, features)
    h0, c0 = (None if state is None else state.contiguous() for state in (h0, c0))
    gates = x.new_empty(batch, steps, 4 * hidden)
    for d, (weight_ih, weight_hh, *biases) in enumerate(parameters):
        packed_ih, packed = pack(weight_ih, "forward", storage), pack(weight_hh, "forward", storage)
        bias_ih, bias_hh = (_at(bias) for bias in biases) if biases else (None, None)
        native.lstm_forward(ctypes.byref(_ForwardArgs(
            batch, steps, hidden, d, threads, by_rows, gates.data_ptr(), 4 * hidden, 4 * hidden * steps,
            x.data_ptr(), x_step, x_row, features, packed_ih.values.data_ptr(), bias_ih, bias_hh,
            packed.values.data_ptr(), _at(packed_ih.scale), _at(packed.scale), _at(h0, d), _at(c0, d), _at(lengths),
            out.data_ptr() + 4 * d * hidden, out.stride(1), out.stride(0), _at(h_n, d), _at(c_n, d),
            None, 0, 0, None, 0, 0, scratch.data_ptr(),
        )), STORAGE[storage][0])  # fmt: skip
    return output, h_n, c_n


def _nothing(args: Forward) -> None:
    """No steps: the states are the ones given."""
    for final, first in ((args.h_n, args.h0), (args.c_n, args.c0)):
        final.zero_() if first is None else final.copy_(first)


def _strided(value: Tensor | None) -> tuple[int | None, int, int]:
    """Address, and strides of steps and rows."""
    return (None, 0, 0) if value is None else (value.data_ptr(), value.stride(0), value.stride(1))


def _at(value: Tensor | None, direction: int = 0) -> int | None:
    """Address of a direction's part of a contiguous tensor."""
    return None if value is None else value.data_ptr() + direction * value.stride(0) * value.element_size()


#: Work below which a second thread costs more than it brings, in multiplications.
WORTH_A_THREAD = 1 << 18


def _team(batch: int, steps: int, hidden: int, features: int = 0) -> tuple[int, bool]:
    """Threads, and whether they share out rows (nobody waits) or hidden units (all meet once a step)."""
    work = batch * steps * hidden * (hidden + features + 16) * 4
    threads = max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
    if batch >= 8 * threads or threads == 1:
        return threads, True
    return min(threads, -(-hidden // library().lanes())), False
