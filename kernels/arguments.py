"""Arguments of `kernels.LSTM` as they are checked before anything runs, and brought into one form."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.packing import STORAGE
from kernels.dispatch import CPU, IMPLEMENTATIONS
from kernels.vendor import State

PRECISIONS = ("ieee", "tf32")


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


def checked_lengths(lengths: Tensor | None, batch: int, steps: int) -> Tensor | None:
    """The lengths, or None where they are known to fill all steps, which spares the masks."""
    if lengths is None:
        return None
    if lengths.dtype not in {torch.int64, torch.int32}:
        msg = f"lengths are of {lengths.dtype}, expected int64"
        raise TypeError(msg)
    if lengths.dim() != 1 or lengths.size(0) != batch:
        msg = f"lengths have shape {tuple(lengths.shape)}, expected one for each sequence, ({batch},)"
        raise ValueError(msg)
    # A compiler has no values to read, and from a GPU reading would wait for everything before.
    if torch.compiler.is_compiling() or lengths.device.type != "cpu" or type(lengths) is not Tensor or not batch:
        return lengths
    least, most = (int(value) for value in lengths.aminmax())
    if least < 0 or most > steps:
        msg = f"lengths lie between {least} and {most}, expected 0 to the {steps} steps of the input"
        raise ValueError(msg)
    return None if least == steps else lengths
