"""A whole layer by the CPU kernel, its products included: what eager code calls, without gradients and with them.

A forward pass is one call of the kernel a direction. A backward pass is another, with the gradients of the weights, and
a product of oneDNN for the input. Code that is compiled or traced takes the operators of `kernels.ops` instead.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..common.fast_path import stored
from ..common.transforms import gradients_of
from .build import library
from .fused import BackwardArgs, ForwardArgs, address, fitting, long, team, threads_for, work
from .inference import Prepared
from .packing import KEPT, TRAINED, pack

Parameters = Sequence[tuple[Tensor, ...]]
Results = tuple[Tensor, Tensor, Tensor]

_ONEDNN = torch.backends.mkldnn.is_available()


def layer(  # noqa: PLR0913 - a layer's inputs
    x: Tensor,
    parameters: Parameters,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None = None,
    *,
    batch_first: bool,
    storage: str = "fp32",
) -> Results:
    """One layer; keeps what a backward pass needs where one can follow. Packs each direction's own parameters.

    Args:
        x: (batch, steps, features) if `batch_first`, else (steps, batch, features); float32 on a CPU, not empty.
        parameters: of each direction weight_ih (4H, features), weight_hh (4H, H), and both biases (4H,), if any; in
            any memory order.
        h0: (directions, batch, H), or None for zeros.
        c0: the same.
        lengths: (batch,) int32, or None for all steps.
        resets: (directions, steps, batch) bool: see `kernels.common.recurrence.Forward`; or None.
        batch_first: order of x and of the output.
        storage: key of `kernels.cpu.packing.KEPT`: how the weights are kept. With `TRAINED` tensors may be of other
            types too, and are rounded to bfloat16 where they are multiplied, in both passes.

    Returns:
        Output (as x, with directions * H features), h_n and c_n (directions, batch, H); float32, with `TRAINED`
        bfloat16.

    Raises:
        RuntimeError: where gradients are needed and the weights are kept in another type than float32; when
            parameters do not fit x or each other, which torch's modules let happen.
    """
    if storage == TRAINED:
        x, h0, c0 = (v if v is None else v.to(torch.float32) for v in (x, h0, c0))  # type: ignore[assignment]
    flat = list(itertools.chain(*parameters))
    needed = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, h0, c0, *flat))
    if not needed:
        prepared = Prepared([parameters], x.size(2), storage=storage)
        h0, c0, lengths, resets = (v if v is None else v.contiguous() for v in (h0, c0, lengths, resets))
        found = cast(
            "Results", prepared.run(x.contiguous(), h0, c0, lengths, resets, batch_first=batch_first, fresh=True)
        )
        return _rounded(found) if storage == TRAINED else found
    if storage not in {"fp32", TRAINED}:
        msg = (
            f"weights kept in {storage} have no gradients: call under torch.no_grad() or torch.inference_mode(), "
            "or use weight_storage='fp32'"
        )
        raise RuntimeError(msg)
    return cast("Results", _Layer.apply(x, h0, c0, lengths, resets, batch_first, storage, len(parameters), *flat))


def _rounded(results: Results) -> Results:
    """Results as autocast has them."""
    output, h_n, c_n = (value.to(torch.bfloat16) for value in results)
    return output, h_n, c_n


def _forward(  # noqa: PLR0913, PLR0917 - a layer's inputs
    x: Tensor,
    parameters: Parameters,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    storage: str = "fp32",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, h_n, c_n; gates (directions, as x, 4H) and cells (directions, as x, H)."""
    native = library()
    x = x.contiguous()
    first, second, features = x.shape
    batch, steps = (first, second) if batch_first else (second, first)
    hidden, directions = parameters[0][1].size(1), len(parameters)

    strides = functools.partial(_strides, batch, steps, batch_first)
    output = x.new_empty(first, second, directions * hidden)
    h_n, c_n = x.new_empty(directions, batch, hidden), x.new_empty(directions, batch, hidden)
    # The projection is overwritten by the gates that come of it, where these are kept.
    gates = x.new_empty(directions, first, second, 4 * hidden)
    cells = x.new_empty(directions, first, second, hidden)
    scratch = x.new_empty(2, batch, hidden)
    threads, by_rows = team(work(batch, steps, hidden, features), batch, hidden)
    h0, c0, lengths, resets = (None if v is None else v.contiguous() for v in (h0, c0, lengths, resets))
    for d, own in enumerate(parameters):
        weight_ih, weight_hh, *biases = fitting(own, features, hidden)
        packed_ih, packed = (
            pack(weight, "forward", storage, whole=long(batch, steps, threads)) for weight in (weight_ih, weight_hh)
        )
        bias_ih, bias_hh = (address(bias) for bias in biases) if biases else (None, None)
        native.lstm_forward(ctypes.byref(ForwardArgs(
            batch, steps, hidden, d, threads, by_rows, address(gates, d), *strides(4 * hidden), steps,
            x.data_ptr(), *strides(features), features, packed_ih.values.data_ptr(), bias_ih, bias_hh,
            packed.values.data_ptr(), None, None, address(h0, d), address(c0, d), address(lengths),
            output.data_ptr() + 4 * d * hidden, *strides(directions * hidden), address(h_n, d), address(c_n, d),
            address(gates, d), *strides(4 * hidden), address(cells, d), *strides(hidden), scratch.data_ptr(),
            address(resets, d),
        )), KEPT[storage][0])  # fmt: skip
    return output, h_n, c_n, gates, cells


def _strides(batch: int, steps: int, batch_first: bool, width: int) -> tuple[int, int]:
    """Strides of steps and rows in contiguous memory of so many numbers a row."""
    return (width, steps * width) if batch_first else (batch * width, width)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, by oneDNN where torch has it.

    torch's own goes to MKL, which leaves AVX-512 alone on other makes than Intel's: 97 against 217 GFLOP/s on a core of
    an AMD EPYC. torch brings oneDNN with it, and Inductor calls it by the same operator.
    """
    if not _ONEDNN:
        return left @ right
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")  # noqa: SLF001 - as Inductor
    return found


class _Layer(torch.autograd.Function):
    """`layer` with its gradients."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - a layer's inputs
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        batch_first: bool,
        storage: str,
        directions: int,
        *flat: Tensor,
    ) -> Results:
        each = len(flat) // directions
        parameters = [flat[d * each : (d + 1) * each] for d in range(directions)]
        output, h_n, c_n, gates, cells = _forward(x, parameters, h0, c0, lengths, resets, batch_first, storage)
        saved = x, h0, c0, lengths, resets, output, gates, cells, *flat
        ctx.save_for_backward(*saved)
        ctx.forms = [value if value is None else (value.shape, value.dtype) for value in saved]
        ctx.batch_first, ctx.storage, ctx.directions = batch_first, storage, directions
        ctx.set_materialize_grads(False)
        return _rounded((output, h_n, c_n)) if storage == TRAINED else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # Asked for once: whoever recomputes or fetches them (checkpointing, offloading) does it at each asking.
        saved = ctx.saved_tensors
        for value, form in zip(saved, ctx.forms, strict=True):
            if value is not None and ((value.shape, value.dtype) != form or not value.is_cpu):
                msg = (
                    f"a hook of saved tensors was given {tuple(form[0])} of {form[1]} on cpu and returned "
                    f"{tuple(value.shape)} of {value.dtype} on {value.device}"
                )
                raise RuntimeError(msg)
        options = ctx.batch_first, ctx.storage, ctx.directions, ctx.needs_input_grad
        found = gradients_of(_gradients, grads, *saved[:8], *options, *saved[8:])
        return *found[:3], None, None, None, None, None, *found[3:]


def _readable(gradient: Tensor) -> Tensor:
    """Return a gradient in memory as the kernel reads it."""
    return (gradient if stored(gradient) else gradient.clone()).to(torch.float32).contiguous()


def _gradients(  # noqa: PLR0913, PLR0917 - all that a layer read and wrote
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_first: bool,
    storage: str,
    directions: int,
    needed: Sequence[bool],
    *flat: Tensor,
) -> Any:
    """Gradients of x, h0, c0 and of each direction's parameters; None where there is nothing, or it is not needed."""
    native = library()
    first, second, features = x.shape
    batch, steps = (first, second) if batch_first else (second, first)
    hidden, each = cells.size(3), len(flat) // directions

    strides = functools.partial(_strides, batch, steps, batch_first)
    grad_output = torch.zeros_like(output) if grad_output is None else _readable(grad_output)
    grad_h_n, grad_c_n = (None if grad is None else _readable(grad) for grad in (grad_h_n, grad_c_n))
    x, h0, c0, lengths, resets = (None if v is None else v.contiguous() for v in (x, h0, c0, lengths, resets))  # type: ignore[assignment]
    output, gates, cells = (value.contiguous() for value in (output, gates, cells))
    grad_gates = torch.empty_like(gates, dtype=KEPT[storage][1])
    grad_h0, grad_c0 = x.new_empty(directions, batch, hidden), x.new_empty(directions, batch, hidden)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    grad_x: Tensor | None = None
    grads: list[Tensor | None] = []
    for d in range(directions):
        weight_ih, weight_hh = flat[d * each], flat[d * each + 1]
        wanted = needed[8 + d * each : 8 + (d + 1) * each]
        grad_ih = x.new_empty(4 * hidden, features) if wanted[0] else None
        grad_hh = x.new_empty(4 * hidden, hidden) if wanted[1] else None
        bias = x.new_empty(4 * hidden) if any(wanted[2:]) else None
        packed = pack(weight_hh.contiguous(), "backward", storage, whole=long(batch, steps, threads))
        native.lstm_backward(ctypes.byref(BackwardArgs(
            batch, steps, hidden, d, threads, by_rows, packed.values.data_ptr(), address(c0, d), address(lengths),
            address(gates, d), *strides(4 * hidden), address(cells, d), *strides(hidden),
            grad_output.data_ptr() + 4 * d * hidden, *strides(directions * hidden),
            address(grad_h_n, d), address(grad_c_n, d), address(grad_gates, d), *strides(4 * hidden),
            address(grad_h0, d), address(grad_c0, d),
            x.data_ptr(), *strides(features), features,
            output.data_ptr() + 4 * d * hidden, *strides(directions * hidden),
            address(h0, d), address(grad_ih), address(grad_hh), address(bias),
            threads_for(work(batch, steps, hidden, features)), address(resets, d),
        )), KEPT[storage][0])  # fmt: skip
        if needed[0]:
            share = _product(grad_gates[d].view(-1, 4 * hidden), weight_ih.to(grad_gates.dtype)).to(x.dtype)
            grad_x = share if grad_x is None else grad_x.add_(share)
        # One sum serves both biases, and each has memory of its own: a caller may change one gradient in place.
        biases = [] if each == 2 else [bias, bias if bias is None else bias.clone()]  # noqa: PLR2004 - without biases
        grads += [grad_ih, grad_hh, *biases]
    return (
        None if grad_x is None else grad_x.view(x.shape),
        None if h0 is None else grad_h0,
        None if c0 is None else grad_c0,
        *grads,
    )
