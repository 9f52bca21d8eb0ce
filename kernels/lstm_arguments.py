"""Arguments of `kernels.LSTM` as they are checked before anything runs, and brought into one form."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cpu.packing import STORAGE
from .dispatch import CPU, IMPLEMENTATIONS
from .torch_lstm import State

PRECISIONS = ("ieee", "tf32")
INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
#: Lengths as a caller may give them: a tensor, a NumPy array, or a sequence of Python's integers.
Lengths = Tensor | Sequence[int]


def check_options(
    implementation: str, fp32_precision: str | None, proj_size: int, weight_storage: str = "fp32"
) -> None:
    """Raise ValueError for options that no `LSTM` can have."""
    if implementation not in IMPLEMENTATIONS:
        msg = f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(msg)
    if fp32_precision is not None and fp32_precision not in PRECISIONS:
        msg = f"fp32_precision is {fp32_precision!r}, expected None or one of {', '.join(PRECISIONS)}"
        raise ValueError(msg)
    if weight_storage not in STORAGE:
        msg = f"weight_storage is {weight_storage!r}, expected one of {', '.join(STORAGE)}"
        raise ValueError(msg)
    if weight_storage != "fp32" and implementation != CPU:
        msg = f"weight_storage {weight_storage!r} needs implementation={CPU!r}, not {implementation!r}"
        raise ValueError(msg)
    if proj_size and implementation not in {"auto", "vendor"}:
        msg = (
            f"proj_size is {proj_size}, and {implementation!r} has no projections; use implementation='vendor' "
            "(torch's own LSTM) or proj_size=0"
        )
        raise ValueError(msg)


def batched_state(hx: State, batched: bool) -> State:
    """The state with a batch dimension; raises what torch.nn.LSTM raises where the dimensions do not fit."""
    hidden, cell = hx
    expected = 3 if batched else 2
    if hidden.dim() != expected or cell.dim() != expected:
        msg = (
            f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {expected}-D but got "
            f"({hidden.dim()}-D, {cell.dim()}-D) tensors"
        )
        raise RuntimeError(msg)
    return (hidden, cell) if batched else (hidden.unsqueeze(1), cell.unsqueeze(1))


def checked_lengths(lengths: Lengths | None, batch: int, steps: int) -> Tensor | None:
    """The lengths as a tensor of int64 or int32, or None where they are known to fill all steps, which spares masks.

    Raises:
        TypeError: for what holds no integers.
        ValueError: for another number of them than sequences, and for one below 0 or above `steps`.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = _tensor_of(lengths)
    if lengths.dtype not in INTEGERS:
        msg = f"lengths are of {lengths.dtype}, expected integers, one for each sequence"
        raise TypeError(msg)
    if lengths.dtype not in {torch.int64, torch.int32}:
        lengths = lengths.to(torch.int64)
    if lengths.dim() != 1 or lengths.size(0) != batch:
        msg = f"lengths have shape {tuple(lengths.shape)}, expected one for each sequence, ({batch},)"
        raise ValueError(msg)
    # A compiler has no values to read, and from a GPU reading would wait for everything before.
    if torch.compiler.is_compiling() or lengths.device.type != "cpu" or not batch or not _plain(lengths):
        return lengths
    least, most = (int(value) for value in lengths.aminmax())
    if least < 0 or most > steps:
        msg = f"lengths lie between {least} and {most}, expected 0 to the {steps} steps of the input"
        raise ValueError(msg)
    return None if least == steps else lengths


def _plain(lengths: Tensor) -> bool:
    """Return whether a tensor has values to read: no subclass, whose values may be nowhere, and none under vmap."""
    return type(lengths) in {Tensor, nn.Parameter} and not torch._C._functorch.is_functorch_wrapped_tensor(lengths)  # noqa: SLF001


def _tensor_of(lengths: Sequence[int]) -> Tensor:
    """Return lengths that are not a tensor as one; floating-point numbers stay such, and are refused for it.

    In memory of its own: the backward pass reads them too, and no counter would notice that an array has changed.
    """
    # A view of an array may run backward or in another byte order, which torch does not take.
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    try:
        # A list of nothing has no type of its own, and torch's default is a floating-point one.
        return torch.tensor(values, dtype=None if len(values) else torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"lengths are {reprlib.repr(lengths)}, expected integers, one for each sequence"
        raise TypeError(msg) from error
