"""The door to the CPU kernel, for float32 and autocast to bfloat16: what runs, and why it cannot.

Eager code calls `run`, whole layers with gradients or without, or keeps a `Prepared` or `PreparedTraining`; operators
call `forward` and `backward`, the recurrence alone, behind the contract of `kernels.common.recurrence`. No other module
of this room is called to run something. One thread team walks through the whole sequence (`lstm.cpp`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..common.recurrence import Backward, Forward, LayerOptions, Problem
from .build import BuildError, beside, cpu_flags, library, loaded
from .entry import hindrance as no_entry
from .inference import Prepared
from .layer import DifferentiableLayer
from .native_arguments import BackwardArgs, ForwardArgs, address, strided
from .packing import KEPT, STORAGE, TRAINED, pack
from .teams import long, team, work
from .training import PreparedTraining

__all__ = [
    "CONVERTED",
    "Prepared",
    "PreparedTraining",
    "backward",
    "compile_for",
    "converts",
    "forward",
    "instructions",
    "no_entry",
    "refuses",
    "run",
    "storage_for",
    "storage_hindrance",
]

Results = tuple[Tensor, Tensor, Tensor]
Recurrence = TypeVar("Recurrence", Forward, Backward)

#: Types that the operators convert: those of autocast.
CONVERTED = {torch.bfloat16, torch.float16}
#: x, its strides and features, packed input weights and biases: the projection has been done.
_NO_INPUT = (None, 0, 0, -1, None, None, None)


def compile_for(storage: str) -> None:
    """Compile all that a first call waits for at the same time, unless it lies compiled.

    Args:
        storage: how the call keeps weights, a key of `kernels.cpu.packing.KEPT`.

    Raises:
        BuildError: where the kernel's part for such weights cannot be built.
    """
    _compile_beside(storage)
    library(kept=KEPT[storage][0])


@functools.cache
def _compile_beside(storage: str) -> None:
    beside(functools.partial(library, kept=KEPT[storage][0]), no_entry)


def storage_for(problem: Problem) -> str:
    """Return how weights are kept for a problem: a key of `kernels.cpu.packing.KEPT`."""
    if not problem.autocast:
        return problem.storage
    return TRAINED if problem.saves else "bf16"


def refuses(problem: Problem, *, backward: bool = False) -> str | None:
    """Reason why the kernel cannot serve a problem here, or None."""
    del backward
    if problem.device != "cpu":
        return f"the fused CPU kernel runs on CPU tensors, these are on {problem.device}"
    cast = problem.autocast and problem.dtype == torch.bfloat16
    if problem.dtype != torch.float32 and not cast:
        return f"the fused CPU kernel computes in float32, these are {str(problem.dtype).removeprefix('torch.')}"
    storage = storage_for(problem)
    try:
        # Any part that is there says what this processor lacks, before one is compiled in vain. Where it is products of
        # bf16, it is the part in which the same call runs converted.
        if not (cast and loaded()):
            compile_for("fp32" if cast and "avx512_bf16" not in cpu_flags().split() else storage)
        if cast and (hindrance := storage_hindrance(TRAINED)):
            return f"for autocast to bfloat16 {hindrance}"
        compile_for(storage)
    except BuildError as error:
        return str(error)
    return None


def converts(problem: Problem) -> bool:
    """Return whether `forward` and `backward` serve a problem of a smaller type in float32, on converted operands."""
    converted = dataclasses.replace(problem, dtype=torch.float32)
    return problem.dtype in CONVERTED and not problem.autocast and refuses(converted) is None


def instructions(storage: str = "fp32", hidden: int = 0, rows: int = 0) -> str:
    """Instructions that multiply weights in a forward pass, as built for this machine.

    `avx512-sums` says that additions take the place of multiplications. It names what most products take: a row that
    these would make less precise, one or two rows that are left, as where sequences end early, and a last half block
    of units are multiplied by `avx512-fma` all the same, and so is everything in a backward pass. One sequence is named
    after its steps, though its input may have been projected by sums before them.

    Args:
        storage: how the weights are kept, a key of `kernels.cpu.packing.KEPT`.
        hidden: units of the layer.
        rows: of a thread. The whole batch tells the same: threads share out rows only where each gets eight or more.
    """
    return str(library().instructions(KEPT[storage][0], hidden, rows).decode())


def storage_hindrance(storage: str) -> str | None:
    """Reason why weights cannot be kept as a key of `kernels.cpu.packing.KEPT` on this machine, or None.

    Raises:
        BuildError: where the kernel cannot be built.
    """
    return str(library().hindrance(KEPT[storage][0]).decode()) or None


def run(  # noqa: PLR0913 - a layer's inputs
    x: Tensor,
    parameters: Sequence[tuple[Tensor, ...]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    options: LayerOptions,
    *,
    gradients: bool,
) -> Results:
    """One layer with its projection, in eager code; packs each direction's own parameters.

    Args:
        x: (batch, steps, features) if `batch_first`, else (steps, batch, features); float32 on a CPU, not empty. With
            `packing.TRAINED` x, h0 and c0 may be of other types too: factors are rounded to bfloat16, in both passes.
        parameters: of each direction weight_ih (4H, features), weight_hh (4H, H), and both biases (4H,), if any; in
            any memory order.
        h0: (directions, batch, H), or None for zeros.
        c0: the same.
        lengths: (batch,) int32, or None for all steps.
        resets: (directions, steps, batch) bool: see `kernels.common.recurrence.Forward`; or None.
        options: order of x and of the output, and how the weights are kept.
        gradients: whether a backward pass can follow, of this layer or of others.

    Returns:
        Output (as x, with directions * H features), h_n and c_n (directions, batch, H); float32, with
        `packing.TRAINED` bfloat16.

    Raises:
        RuntimeError: where gradients are needed and the weights are kept in another type than float32; when
            parameters do not fit x or each other, which torch's modules let happen.
    """
    if options.storage == TRAINED:
        x, h0, c0 = (v if v is None else v.to(torch.float32) for v in (x, h0, c0))  # type: ignore[assignment]
    flat = [value for own in parameters for value in own]
    # A frozen layer of a module that trains under autocast goes by the part that the others need, here as in later
    # calls (`PreparedTraining`): no other part is compiled, and all calls round alike.
    if gradients and (
        options.storage == TRAINED or any(value is not None and value.requires_grad for value in (x, h0, c0, *flat))
    ):
        if options.storage not in {"fp32", TRAINED}:
            msg = (
                f"weights kept in {options.storage} have no gradients: call under torch.no_grad() or "
                "torch.inference_mode(), or use weight_storage='fp32'"
            )
            raise RuntimeError(msg)
        return cast("Results", DifferentiableLayer.apply(x, h0, c0, lengths, resets, options, *flat))
    prepared = Prepared([parameters], x.size(2), storage=options.storage)
    h0, c0, lengths, resets = (v if v is None else v.contiguous() for v in (h0, c0, lengths, resets))
    found = prepared.run(x.contiguous(), h0, c0, lengths, resets, batch_first=options.batch_first, fresh=True)
    return cast("Results", found)


def forward(args: Forward, storage: str = "fp32", *, lasting: bool = True) -> None:
    """Run a forward recurrence on CPU tensors.

    Args:
        args: of a smaller type than float32 they are converted to it, and h is not rounded between steps.
        storage: how weights are kept, a key of `kernels.cpu.packing.STORAGE`.
        lasting: whether what is packed of the weights is kept; else they are packed in the call, which int8 cannot be.
    """
    if args.gates_input.dtype in CONVERTED:
        _in_float32(args, lambda converted: forward(converted, storage, lasting=False), ("output", "h_n", "gates"))
        return
    native = library(kept=STORAGE[storage][0])
    steps, batch, directions, _ = args.gates_input.shape
    hidden = args.weight_hh.size(2)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    for d in range(directions):
        weight = args.weight_hh[d]
        packed = pack(weight, "forward", storage, whole=long(batch, steps, threads, storage)) if lasting else None
        values, scale = (None, None) if packed is None else (packed.values.data_ptr(), address(packed.scale))
        native.lstm_forward(ctypes.byref(ForwardArgs(
            batch, steps, hidden, d, threads, by_rows,
            *strided(args.gates_input[:, :, d]), steps, *_NO_INPUT,
            values, None, scale, address(args.h0, d), address(args.c0, d), address(args.lengths),
            *strided(args.output[:, :, d]), address(args.h_n, d), address(args.c_n, d),
            *strided(None if args.gates is None else args.gates[:, :, d]),
            *strided(None if args.cells is None else args.cells[:, :, d]),
            None, address(args.resets, d), weight_hh=None if lasting else weight.data_ptr(),
        )), STORAGE[storage][0])  # fmt: skip


def backward(args: Backward, *, lasting: bool = True) -> None:
    """Run a backward recurrence on CPU tensors; arguments as for `forward`."""
    if args.gates.dtype in CONVERTED:
        _in_float32(args, lambda converted: backward(converted, lasting=False), ("grad_gates", "grad_h0"))
        return
    native = library(kept=STORAGE["fp32"][0])
    steps, batch, directions, _ = args.gates.shape
    hidden = args.weight_hh.size(2)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    for d in range(directions):
        weight = args.weight_hh[d]
        packed = pack(weight, "backward", whole=long(batch, steps, threads)).values.data_ptr() if lasting else None
        native.lstm_backward(ctypes.byref(BackwardArgs(
            batch, steps, hidden, d, threads, by_rows, packed, address(args.c0, d), address(args.lengths),
            *strided(args.gates[:, :, d]), *strided(args.cells[:, :, d]), *strided(args.grad_output[:, :, d]),
            address(args.grad_h_n, d), address(args.grad_c_n, d), *strided(args.grad_gates[:, :, d]),
            address(args.grad_h0, d), address(args.grad_c0, d), resets=address(args.resets, d),
            weight_hh=None if lasting else weight.data_ptr(),
        )), STORAGE["fp32"][0])  # fmt: skip


def _in_float32(args: Recurrence, run: Callable[[Recurrence], None], written: Sequence[str]) -> None:
    """Run on operands converted to float32; what is `written` is converted back, the cell state is float32 anyway."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    floats: dict[str, Any] = {
        name: torch.empty_like(value, dtype=torch.float32) if name in written else value.to(torch.float32)
        for name, value in given.items()
        if isinstance(value, Tensor) and value.dtype in CONVERTED
    }
    run(dataclasses.replace(args, **floats))
    for name in written:
        if given[name] is not None:
            given[name].copy_(floats[name])
