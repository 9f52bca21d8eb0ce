"""Arguments of `kernels.LSTM` as they are checked before anything runs, and brought into one form."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .common.fast_path import autocast_dtype
from .common.recurrence import state_dtype
from .cpu.packing import STORAGE
from .dispatch import CPU, IMPLEMENTATIONS, VENDOR_HAS_NO_RESETS
from .torch_lstm import State

PRECISIONS = ("ieee", "tf32")
INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
NO_RESETS_WITH_PROJECTIONS = f"no kernel has projections (proj_size), and {VENDOR_HAS_NO_RESETS}; use proj_size=0"
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


def check_call(lstm: nn.RNNBase, x: Tensor, hx: State | None, batch: int, batch_sizes: Tensor | None = None) -> None:
    """Raise what torch.nn.LSTM raises for input and state that do not fit, or that lie on different devices."""
    if (
        x.dtype != lstm.weight_ih_l0.dtype
        or x.dim() != (3 if batch_sizes is None else 2)
        or x.size(-1) != lstm.input_size
    ):
        if not torch.compiler.is_compiling():
            lstm._update_flat_weights()  # noqa: SLF001 - what check_input of nn.RNNBase relies on
        lstm.check_input(x, batch_sizes)
    if hx is None:
        return
    states = lstm.num_layers * (2 if lstm.bidirectional else 1)
    expected = (states, batch, lstm.proj_size or lstm.hidden_size)
    lstm.check_hidden_size(hx[0], expected, "Expected hidden[0] size {}, got {}")
    lstm.check_hidden_size(hx[1], (states, batch, lstm.hidden_size), "Expected hidden[1] size {}, got {}")
    other = next((state.device for state in hx if state.device != x.device), None)
    if other is not None:
        msg = (
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{x.device} and hidden tensor at {other}"
        )
        raise RuntimeError(msg)
    if autocast_dtype(x.device) is not None:
        return
    for index, (state, dtypes) in enumerate(zip(hx, ({x.dtype}, {x.dtype, state_dtype(x.dtype)}), strict=True)):
        if state.dtype not in dtypes:
            msg = f"hx[{index}] is of {state.dtype}, expected {x.dtype} as the input; convert it"
            raise ValueError(msg)


def check_step(lstm: nn.RNNBase, x: Tensor, hidden: Tensor, cell: Tensor) -> None:
    """Raise for what `LSTM.step` cannot take: see there."""
    if lstm.bidirectional:
        msg = "step takes one direction: a bidirectional LSTM needs the later steps too"
        raise ValueError(msg)
    if x.dim() != 2:  # noqa: PLR2004
        msg = f"step takes one step of a batch, (batch, input_size), got {x.dim()}-D input"
        raise ValueError(msg)
    if hidden is cell or (not torch.compiler.is_compiling() and _overlap(hidden, cell)):
        msg = "h and c are the same memory, and step writes both; allocate them apart, as two calls of torch.zeros do"
        raise ValueError(msg)
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, hidden, cell, *lstm.parameters())):
        msg = "step has no gradients: call it under torch.no_grad() or torch.inference_mode(), or call forward"
        raise RuntimeError(msg)


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one shape start in the same place or, both contiguous, lie over each other."""
    apart = abs(first.data_ptr() - second.data_ptr())
    reach = first.nbytes if first.is_contiguous() and second.is_contiguous() else 1
    return first.data_ptr() != 0 and apart < reach


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
        msg = f"lengths are between {least} and {most}, expected 0 to {steps}, the steps of the input"
        raise ValueError(msg)
    return None if least == steps else lengths


def storage_refused(storage: str) -> str:
    """Reason why weights that are stored narrower cannot be used in a call."""
    return (
        f"weight_storage {storage!r} serves only eager inference, without autocast, tracing or "
        "torch.compile; use weight_storage='fp32' there"
    )


def refuse_export(weight_storage: str, *, masked: bool, resets: bool) -> None:
    """Raise RuntimeError for what a trace or an ONNX file cannot hold."""
    if weight_storage != "fp32":
        raise RuntimeError(storage_refused(weight_storage))
    if resets:
        msg = f"a trace or an ONNX file holds torch's own LSTM; {VENDOR_HAS_NO_RESETS}; use torch.export"
        raise RuntimeError(msg)
    if masked and torch.compiler.is_compiling():
        msg = "kernels.LSTM with lengths cannot be exported by torch.onnx.export(dynamo=True); pass dynamo=False"
        raise RuntimeError(msg)


def checked_resets(resets: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The mask of steps that begin a new sequence, if there is one.

    Raises:
        TypeError: for what is no tensor of bool.
        ValueError: for another shape.
    """
    if resets is None:
        return None
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        kind = f"a tensor of {resets.dtype}" if isinstance(resets, Tensor) else f"a {type(resets).__name__}"
        msg = f"resets are {kind}, expected a tensor of torch.bool that is true where a new sequence begins"
        raise TypeError(msg)
    if resets.shape != torch.Size(shape):
        msg = (
            f"resets have shape {tuple(resets.shape)}, expected {tuple(shape)}, the input's without features; for "
            "TorchRL's is_init, which has one dimension more: is_init.squeeze(-1)"
        )
        raise ValueError(msg)
    return resets


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
