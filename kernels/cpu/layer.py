"""A whole layer by the CPU kernel with its gradients, products included.

A forward pass is one call of the kernel a direction. A backward pass is another, with the gradients of the weights. The
gradient of the input is part of it in bf16, else a product of oneDNN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.recurrence import LayerOptions
from ..common.transforms import gradients_of
from .build import library
from .native_arguments import BACKWARD, FORWARD, address, fitting, hidden_of
from .packing import KEPT, TRAINED, pack
from .teams import long, team, threads_for, work

Results = tuple[Tensor, Tensor, Tensor]

_ONEDNN = torch.backends.mkldnn.is_available()
#: Numbers of a matrix up to which a call packs it anew: that takes 4 us, and to find it packed takes as long.
PACKED_IN_CALL = 1 << 14


def rounded(results: Results) -> Results:
    """Results as autocast has them."""
    output, h_n, c_n = (value.to(torch.bfloat16) for value in results)
    return output, h_n, c_n


def _packed(weight: Tensor, order: str, storage: str, *, whole: bool) -> tuple[int, int, Tensor]:
    """Addresses of packed weights and of weights that the call is to pack, one of them 0, and what holds that memory.

    Args:
        weight: contiguous.
        order: as for `packing.pack`, and so below.
        storage: key of `KEPT`.
        whole: look at all values.
    """
    if weight.numel() <= PACKED_IN_CALL:
        return 0, weight.data_ptr(), weight
    values = pack(weight, order, storage, whole=whole).values
    return values.data_ptr(), 0, values


def _copied(mask: Tensor | None) -> bytes | None:
    """Copy the memory of a contiguous mask, for a backward pass: callers fill theirs anew for the next batch.

    Not as a tensor that autograd keeps: `clone` takes ten times as long, and hooks of saved tensors could change it.
    """
    return None if mask is None else ctypes.string_at(mask.data_ptr(), mask.nbytes)


def _bytes_at(memory: bytes | None) -> int:
    """Address of bytes, 0 for None."""
    return ctypes.cast(ctypes.c_char_p(memory), ctypes.c_void_p).value or 0 if memory else 0


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
    """`kernels.cpu.fused.run` with its gradients, as an autograd node; `flat` has each direction's parameters.

    What a forward pass keeps of a direction lies in one row of memory: as x has them gates (4H) of all steps, and after
    them cells (H); in bf16 a record in an order of its own.
    """

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
        number = KEPT[options.storage][0]
        native = library(kept=number)
        first, second, features = x.shape
        batch, steps = (first, second) if options.batch_first else (second, first)
        by_step, by_row = (1, steps) if options.batch_first else (batch, 1)
        hidden, directions = hidden_of(flat[1]), options.directions
        each = len(flat) // directions
        width = directions * hidden

        in_floats, rows = options.storage != TRAINED, first * second
        kind, item = (torch.bfloat16, 2) if native.results_rounded(number) else (torch.float32, 4)
        output = x.new_empty(first, second, width, dtype=kind)
        h_n, c_n = (x.new_empty(directions, batch, hidden, dtype=kind) for _ in range(2))
        numbers = native.numbers_kept(batch, steps, hidden, number)
        record = x.new_empty(directions, numbers)
        threads, by_rows = team(work(batch, steps, hidden, features), batch, hidden)
        whole = long(batch, steps, threads)
        given = x.contiguous()
        h, c, ends, anew = (None if v is None else v.contiguous() for v in (h0, c0, lengths, resets))
        for d in range(directions):
            weight_ih, weight_hh, *biases = fitting(flat[d * each : (d + 1) * each], features, hidden)
            packed_ih, own_ih, _holds_ih = _packed(weight_ih, "forward", options.storage, whole=whole)
            packed, own, _holds = _packed(weight_hh, "forward", options.storage, whole=whole)
            bias_ih, bias_hh = (bias.data_ptr() for bias in biases) if biases else (0, 0)
            # The projection is overwritten by the gates that come of it.
            gates = record.data_ptr() + 4 * d * numbers
            gates_step, gates_row = 4 * hidden * by_step, 4 * hidden * by_row
            native.lstm_forward(FORWARD(
                batch, steps, hidden, d, threads, by_rows, gates, gates_step, gates_row, steps,
                given.data_ptr(), features * by_step, features * by_row, features, packed_ih, bias_ih, bias_hh,
                packed, 0, 0, address(h, d) or 0, address(c, d) or 0, address(ends) or 0,
                output.data_ptr() + item * d * hidden, width * by_step, width * by_row,
                h_n.data_ptr() + item * d * batch * hidden, c_n.data_ptr() + item * d * batch * hidden,
                gates, gates_step, gates_row,
                gates + 16 * rows * hidden if in_floats else 0, hidden * by_step, hidden * by_row,
                0, address(anew, d) or 0, own_ih, own,
            ), number)  # fmt: skip
        saved = x, h0, c0, output, record, *flat
        ctx.save_for_backward(*saved)
        ctx.forms = [value if value is None else (value.shape, value.dtype) for value in saved]
        ctx.options, ctx.masks = options, (_copied(ends), _copied(anew))
        ctx.set_materialize_grads(False)
        return (output, h_n, c_n) if in_floats or kind is torch.bfloat16 else rounded((output, h_n, c_n))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of x, h0, c0 and the parameters."""
        saved = as_saved(ctx)
        found = gradients_of(_gradients, grads, *saved[:5], *ctx.masks, ctx.options, ctx.needs_input_grad, *saved[5:])
        return *found[:3], None, None, None, *found[3:]


def as_saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what a forward pass saved, in the forms that it noted as `ctx.forms`.

    Raises:
        RuntimeError: where a hook of saved tensors returned what native code would read past the end of.
    """
    # Asked for once: whoever recomputes or fetches them (checkpointing, offloading) does it at each asking.
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    for value, form in zip(saved, ctx.forms, strict=True):
        if value is not None and ((value.shape, value.dtype) != form or not value.is_cpu):
            msg = (
                f"a hook of saved tensors was given {tuple(form[0])} of {form[1]} on cpu and returned "
                f"{tuple(value.shape)} of {value.dtype} on {value.device}"
            )
            raise RuntimeError(msg)
    return saved


def readable(gradient: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """Return a gradient in memory that holds its values, in the type and order in which the kernel reads them."""
    elsewhere = gradient.is_neg() or gradient._is_zerotensor()  # noqa: SLF001 - torch has no public name for it
    return (gradient.clone() if elsewhere else gradient).to(kind).contiguous()


def _gradients(  # noqa: PLR0913, PLR0917 - all that a layer read and wrote
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    output: Tensor,
    record: Tensor,
    lengths: bytes | None,
    resets: bytes | None,
    options: LayerOptions,
    needed: Sequence[bool],
    *flat: Tensor,
) -> Any:
    """Gradients of x, h0, c0 and of each direction's parameters; None where there is nothing, or it is not needed.

    `lengths` and `resets` are the memory of what the forward pass was given.
    """
    number, dtype = KEPT[options.storage]
    native = library(kept=number)
    first, second, features = x.shape
    batch, steps = (first, second) if options.batch_first else (second, first)
    by_step, by_row = (1, steps) if options.batch_first else (batch, 1)
    hidden, directions = flat[1].size(1), options.directions
    each = len(flat) // directions
    width, rows = directions * hidden, first * second

    in_floats, item = options.storage != TRAINED, output.element_size()
    grad_output = torch.zeros_like(output) if grad_output is None else readable(grad_output, output.dtype)
    grad_h_n, grad_c_n = (None if grad is None else readable(grad) for grad in (grad_h_n, grad_c_n))
    x, h0, c0 = (None if v is None else v.contiguous() for v in (x, h0, c0))  # type: ignore[assignment]
    ends, anew = _bytes_at(lengths), _bytes_at(resets)
    output, record = output.contiguous(), record.contiguous()
    by_tiles = native.backward_by_tiles(number)
    grad_gates = None if by_tiles else x.new_empty(directions, rows, 4 * hidden, dtype=dtype)
    grad_h0, grad_c0 = (None if h0 is None and c0 is None else x.new_empty(directions, batch, hidden) for _ in range(2))
    threads, by_rows = team(work(batch, steps, hidden), batch, hidden)
    whole, weight_threads = long(batch, steps, threads), threads_for(work(batch, steps, hidden, features))
    grad_x = None if in_floats or not needed[0] else torch.empty_like(x)
    by_call = grad_x
    grads: list[Tensor | None] = []
    for d in range(directions):
        weight_ih, weight_hh = flat[d * each], flat[d * each + 1]
        wanted = needed[6 + d * each : 6 + (d + 1) * each]
        grad_ih = x.new_empty(4 * hidden, features) if wanted[0] else None
        grad_hh = x.new_empty(4 * hidden, hidden) if wanted[1] else None
        # One sum serves both biases, and each has memory of its own: a caller may change one gradient in place.
        biases = [x.new_empty(4 * hidden) if any(wanted[2:]) else None for _ in range(2 if each == 4 else 0)]  # noqa: PLR2004 - with biases
        bias, other = biases or (None, None)
        packed, own, _holds = _packed(weight_hh.contiguous(), "backward", options.storage, whole=whole)
        packed_ih = own_ih = 0
        if by_call is not None:
            packed_ih, own_ih, _holds_ih = _packed(weight_ih.contiguous(), "backward", options.storage, whole=whole)
        gates = record.data_ptr() + record.stride(0) * 4 * d
        native.lstm_backward(BACKWARD(
            batch, steps, hidden, d, threads, by_rows, packed, address(c0, d) or 0, ends,
            gates, 4 * hidden * by_step, 4 * hidden * by_row,
            gates + 16 * rows * hidden if in_floats else 0, hidden * by_step, hidden * by_row,
            grad_output.data_ptr() + item * d * hidden, width * by_step, width * by_row,
            address(grad_h_n, d) or 0, address(grad_c_n, d) or 0,
            address(grad_gates, d) or 0, 4 * hidden * by_step, 4 * hidden * by_row,
            address(grad_h0, d) or 0, address(grad_c0, d) or 0,
            x.data_ptr(), features * by_step, features * by_row, features,
            output.data_ptr() + item * d * hidden, width * by_step, width * by_row,
            address(h0, d) or 0, address(grad_ih) or 0, address(grad_hh) or 0, address(bias) or 0, weight_threads,
            anew and anew + d * steps * batch, packed_ih, address(by_call) or 0, d > 0, own_ih, own,
            address(other) or 0,
        ), number)  # fmt: skip
        if grad_gates is not None and in_floats and needed[0]:
            share = _product(grad_gates[d], weight_ih)
            grad_x = share if grad_x is None else grad_x.add_(share)
        grads += [grad_ih, grad_hh, *biases]
    return (
        None if grad_x is None else grad_x.view(x.shape),
        None if h0 is None else grad_h0,
        None if c0 is None else grad_c0,
        *grads,
    )
