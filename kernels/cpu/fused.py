"""The fused CPU kernel behind the contract of `kernels.common.recurrence`: float32, any sizes, packed weights kept.

One thread team walks through the whole sequence. `kernels/cpu/lstm.cpp` has the kernel, `packing.py` the weights.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time

import torch
from torch import Tensor

from ..common.recurrence import Backward, Forward, Problem
from .build import BuildError, library
from .packing import KEPT, STORAGE, TRAINED, pack

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
        ("scratch", _pointer), ("resets", _pointer),
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
        ("resets", _pointer),
    )  # fmt: skip


#: x, its strides and features, packed input weights and biases: the projection has been done.
_NO_INPUT = (None, 0, 0, -1, None, None, None)


def refuses(problem: Problem, *, backward: bool = False) -> str | None:
    """Reason why the kernel cannot serve a problem here, or None."""
    del backward
    if problem.device != "cpu":
        return f"the fused CPU kernel runs on CPU tensors, these are on {problem.device}"
    cast = problem.autocast and problem.dtype == torch.bfloat16
    if problem.dtype != torch.float32 and not cast:
        return f"the fused CPU kernel computes in float32, these are {str(problem.dtype).removeprefix('torch.')}"
    try:
        hindrance = storage_hindrance(TRAINED)
    except BuildError as error:
        return str(error)
    return f"for autocast to bfloat16 {hindrance}" if cast and hindrance else None


def instructions(storage: str = "fp32") -> str:
    """Instructions that multiply weights kept as a key of `kernels.cpu.packing.KEPT`, as built for this machine."""
    return str(library().instructions(KEPT[storage][0]).decode())


def storage_hindrance(storage: str) -> str | None:
    """Reason why weights cannot be kept as a key of `kernels.cpu.packing.KEPT` on this machine, or None.

    Raises:
        BuildError: where the kernel cannot be built.
    """
    return str(library().hindrance(KEPT[storage][0]).decode()) or None


def forward(args: Forward, storage: str = "fp32") -> None:
    """Run a forward recurrence on CPU tensors, its weights kept as a key of `kernels.cpu.packing.STORAGE`."""
    native = library()
    steps, batch, directions, _ = args.gates_input.shape
    hidden = args.weight_hh.size(2)
    scratch = args.h_n.new_empty(2, batch, hidden)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    for d in range(directions):
        packed = pack(args.weight_hh[d], "forward", storage, whole=long(batch, steps, threads, storage))
        native.lstm_forward(ctypes.byref(ForwardArgs(
            batch, steps, hidden, d, threads, by_rows,
            *strided(args.gates_input[:, :, d]), steps, *_NO_INPUT,
            packed.values.data_ptr(), None, address(packed.scale),
            address(args.h0, d), address(args.c0, d), address(args.lengths),
            *strided(args.output[:, :, d]), address(args.h_n, d), address(args.c_n, d),
            *strided(None if args.gates is None else args.gates[:, :, d]),
            *strided(None if args.cells is None else args.cells[:, :, d]),
            scratch.data_ptr(), address(args.resets, d),
        )), STORAGE[storage][0])  # fmt: skip


def backward(args: Backward) -> None:
    """Run a backward recurrence on CPU tensors."""
    native = library()
    steps, batch, directions, _ = args.gates.shape
    hidden = args.weight_hh.size(2)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    for d in range(directions):
        packed = pack(args.weight_hh[d], "backward", whole=long(batch, steps, threads))
        native.lstm_backward(ctypes.byref(BackwardArgs(
            batch, steps, hidden, d, threads, by_rows, packed.values.data_ptr(),
            address(args.c0, d), address(args.lengths),
            *strided(args.gates[:, :, d]), *strided(args.cells[:, :, d]), *strided(args.grad_output[:, :, d]),
            address(args.grad_h_n, d), address(args.grad_c_n, d), *strided(args.grad_gates[:, :, d]),
            address(args.grad_h0, d), address(args.grad_c0, d), resets=address(args.resets, d),
        )), STORAGE["fp32"][0])  # fmt: skip


def strided(value: Tensor | None) -> tuple[int | None, int, int]:
    """Address, and strides of steps and rows."""
    return (None, 0, 0) if value is None else (value.data_ptr(), value.stride(0), value.stride(1))


def address(value: Tensor | None, direction: int = 0) -> int | None:
    """Address of a direction's part of a contiguous tensor."""
    return None if value is None else value.data_ptr() + direction * value.stride(0) * value.element_size()


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


def long(batch: int, steps: int, threads: int, storage: str = "fp32") -> bool:
    """Return whether a call multiplies enough rows for one thread's look at all weights to be a twentieth of it."""
    return batch * steps >= (32 if storage == "fp32" else 2048) * threads


#: Work below which a second thread costs more than it brings, in multiplications.
WORTH_A_THREAD = 1 << 18
#: The same of one step, after which the threads that share out hidden units meet: at a place in the machine where they
#: are far from each other a meeting takes half a microsecond, as long as this many multiplications and more.
WORTH_A_MEETING = 1 << 15


def threads_for(work: int) -> int:
    """Threads for a number of multiplications: at most torch's, and at most the cores that they can run on."""
    threads = min(torch.get_num_threads(), work // WORTH_A_THREAD)
    return min(threads, cores()) if threads > 1 else 1


def cores() -> int:
    """Cores in the affinity mask: more threads than that would wait for each other's cores.

    The system is asked at most four times a second, since asking takes half a microsecond.
    """
    return _cores(threading.get_ident(), time.monotonic_ns() >> 28)


@functools.lru_cache(maxsize=64)
def _cores(thread: int, period: int) -> int:
    del thread, period
    return int(library().cores())


def work(batch: int, steps: int, hidden: int, features: int = 0) -> int:
    """Multiplications of a direction of a layer; `features` where its input is projected too."""
    return batch * steps * hidden * (hidden + features + 16) * 4


def team(work: int, batch: int, hidden: int) -> tuple[int, bool]:
    """Threads, and whether they share out rows (nobody waits) or hidden units (all meet once a step)."""
    threads = threads_for(work)
    if batch >= 8 * threads or threads == 1:
        return threads, True
    threads = min(threads, -(-hidden // library().lanes()), 4 * batch * hidden * hidden // WORTH_A_MEETING)
    return (threads, False) if threads > 1 else (1, True)
