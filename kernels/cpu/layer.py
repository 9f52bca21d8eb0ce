"""A whole layer by the CPU kernel with its gradients, products included.

A forward pass is one call of the kernel a direction. A backward pass is another, with the gradients of the weights. The
gradient of the input is part of it where tiles multiply, else a product of oneDNN.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.recurrence import LayerOptions
from ..common.transforms import gradients_of
from .build import library
from .native_arguments import BackwardArgs, ForwardArgs, address, fitting, hidden_of
from .packing import KEPT, TRAINED, pack
from .teams import long, team, threads_for, work

Results = tuple[Tensor, Tensor, Tensor]

_ONEDNN = torch.backends.mkldnn.is_available()


def rounded(results: Results) -> Results:
    """Results as autocast has them."""
    output, h_n, c_n = (value.to(torch.bfloat16) for value in results)
    return output, h_n, c_n


def _strides(batch: int, steps: int, batch_first: bool, width: int) -> tuple[int, int]:
    """Strides of steps and rows in contiguous memory with `width` numbers a row."""
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


class DifferentiableLayer(torch.autograd.Function):
    """`kernels.cpu.fused.run` with its gradients, as an autograd node; `flat` has each direction's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        options: LayerOptions,
        *flat: Tensor,
    ) -> Results:
        """Output, h_n and c_n: one call of the kernel a direction."""
        native = library()
        first, second, features = x.shape
        batch, steps = (first, second) if options.batch_first else (second, first)
        hidden, directions = hidden_of(flat[1]), options.directions
        each = len(flat) // directions

        strides = functools.partial(_strides, batch, steps, options.batch_first)
        output = x.new_empty(first, second, directions * hidden)
        h_n, c_n = x.new_empty(directions, batch, hidden), x.new_empty(directions, batch, hidden)
        # The projection is overwritten by the gates that come of it, where these are kept.
        if native.backward_by_tiles(KEPT[options.storage][0]):
            gates = x.new_empty(directions, native.numbers_kept_by_tiles(batch, steps, hidden))
            cells = None
        else:
            gates = x.new_empty(directions, first, second, 4 * hidden)
            cells = x.new_empty(directions, first, second, hidden)
        scratch = x.new_empty(2, batch, hidden)
        threads, by_rows = team(work(batch, steps, hidden, features), batch, hidden)
        rows = x.contiguous()
        h, c, ends, anew = (None if v is None else v.contiguous() for v in (h0, c0, lengths, resets))
        for d in range(directions):
            weight_ih, weight_hh, *biases = fitting(flat[d * each : (d + 1) * each], features, hidden)
            packed_ih, packed = (
                pack(weight, "forward", options.storage, whole=long(batch, steps, threads))
                for weight in (weight_ih, weight_hh)
            )
            bias_ih, bias_hh = (address(bias) for bias in biases) if biases else (None, None)
            native.lstm_forward(ctypes.byref(ForwardArgs(
                batch, steps, hidden, d, threads, by_rows, address(gates, d), *strides(4 * hidden), steps,
                rows.data_ptr(), *strides(features), features, packed_ih.values.data_ptr(), bias_ih, bias_hh,
                packed.values.data_ptr(), None, None, address(h, d), address(c, d), address(ends),
                output.data_ptr() + 4 * d * hidden, *strides(directions * hidden), address(h_n, d), address(c_n, d),
                address(gates, d), *strides(4 * hidden), address(cells, d), *strides(hidden), scratch.data_ptr(),
                address(anew, d),
            )), KEPT[options.storage][0])  # fmt: skip
        # Gates (directions, as x, 4H) and cells (directions, as x, H); by tiles both in the first, in another order.
        saved = x, h0, c0, lengths, resets, output, gates, cells, *flat
        ctx.save_for_backward(*saved)
        ctx.forms = [value if value is None else (value.shape, value.dtype) for value in saved]
        ctx.options = options
        ctx.set_materialize_grads(False)
        return rounded((output, h_n, c_n)) if options.storage == TRAINED else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of x, h0, c0 and the parameters."""
        # Asked for once: whoever recomputes or fetches them (checkpointing, offloading) does it at each asking.
        saved = ctx.saved_tensors
        for value, form in zip(saved, ctx.forms, strict=True):
            if value is not None and ((value.shape, value.dtype) != form or not value.is_cpu):
                msg = (
                    f"a hook of saved tensors was given {tuple(form[0])} of {form[1]} on cpu and returned "
                    f"{tuple(value.shape)} of {value.dtype} on {value.device}"
                )
                raise RuntimeError(msg)
        found = gradients_of(_gradients, grads, *saved[:8], ctx.options, ctx.needs_input_grad, *saved[8:])
        return *found[:3], None, None, None, *found[3:]


def _readable(gradient: Tensor) -> Tensor:
    """Return a gradient in memory that holds its values, in the order in which the kernel reads them."""
    elsewhere = gradient.is_neg() or gradient._is_zerotensor()  # noqa: SLF001 - torch has no public name for it
    return (gradient.clone() if elsewhere else gradient).to(torch.float32).contiguous()


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
    cells: Tensor | None,
    options: LayerOptions,
    needed: Sequence[bool],
    *flat: Tensor,
) -> Any:
    """Gradients of x, h0, c0 and of each direction's parameters; None where there is nothing, or it is not needed."""
    native = library()
    first, second, features = x.shape
    batch, steps = (first, second) if options.batch_first else (second, first)
    hidden, directions = flat[1].size(1), options.directions
    each = len(flat) // directions

    strides = functools.partial(_strides, batch, steps, options.batch_first)
    grad_output = torch.zeros_like(output) if grad_output is None else _readable(grad_output)
    grad_h_n, grad_c_n = (None if grad is None else _readable(grad) for grad in (grad_h_n, grad_c_n))
    x, h0, c0, lengths, resets = (None if v is None else v.contiguous() for v in (x, h0, c0, lengths, resets))  # type: ignore[assignment]
    output, gates, cells = (v if v is None else v.contiguous() for v in (output, gates, cells))  # type: ignore[assignment]
    number, dtype = KEPT[options.storage]
    by_tiles = bool(native.backward_by_tiles(number))
    grad_gates = None if by_tiles else torch.empty_like(gates, dtype=dtype)
    grad_h0, grad_c0 = x.new_empty(directions, batch, hidden), x.new_empty(directions, batch, hidden)
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    grad_x = torch.empty_like(x) if by_tiles and needed[0] else None
    grads: list[Tensor | None] = []
    for d in range(directions):
        weight_ih, weight_hh = flat[d * each], flat[d * each + 1]
        wanted = needed[6 + d * each : 6 + (d + 1) * each]
        grad_ih = x.new_empty(4 * hidden, features) if wanted[0] else None
        grad_hh = x.new_empty(4 * hidden, hidden) if wanted[1] else None
        bias = x.new_empty(4 * hidden) if any(wanted[2:]) else None
        order = functools.partial(pack, order="backward", storage=options.storage, whole=long(batch, steps, threads))
        packed = order(weight_hh.contiguous())
        packed_ih = None if grad_x is None or not by_tiles else order(weight_ih.contiguous())
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
            None if packed_ih is None else packed_ih.values.data_ptr(), address(grad_x if by_tiles else None), d > 0,
        )), number)  # fmt: skip
        if grad_gates is not None and needed[0]:
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
