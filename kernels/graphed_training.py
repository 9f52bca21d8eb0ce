"""All layers of a short sequence on a GPU with gradients: one autograd node, one CUDA graph forward and one backward.

A training step of a short sequence takes a GPU less time than Python takes to launch it, and most of what is launched
is small: casts, sums, products, fills. A graph is found by the addresses of all it reads and writes, as without
gradients (`graphed_layers`). So what a pass leaves behind lies in memory that is allocated for each call, and only what
ends with the pass lies in the graph's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common.fast_path import unwatched
from .common.recurrence import LayerOptions
from .common.transforms import gradients_of
from .direct_layers import (
    Kept,
    forms,
    layer_forward,
    layer_gradients,
    memory_to_keep,
    refuse_other_forms,
    without_autocast,
)
from .gpu.product_settings import product_settings

Results = tuple[Tensor, Tensor, Tensor]

#: Bytes of a layer's gates up to which a graph is tried. Beyond, a GPU takes longer for the steps than Python for the
#: launches, and the graph's memory would be large: it holds the gates' input and their gradients.
MOST_BYTES = 32 << 20


class TrainedCall(NamedTuple):
    """A call of all layers, as an earlier one settled.

    Attributes:
        name: what stands for the parameters' addresses in a key.
        form: all that decides what is launched beside the options and the tensors' addresses.
        options: what runs.
        layers: how many.
        dtype: of the parameters.
        run: does what its first argument launches, by a graph where there is one (`graph_cache.Graphs.run`).
    """

    name: Hashable
    form: tuple[Hashable, ...]
    options: LayerOptions
    layers: int
    dtype: torch.dtype
    run: Callable[[Callable[[], None], tuple[Hashable, ...], Sequence[Tensor | None], Sequence[Tensor | None]], None]

    def key(self, which: str) -> tuple[Hashable, ...]:
        """Return all that decides what a pass, `forward` or `backward`, launches, beside its tensors."""
        return which, self.name, self.options, self.form


def brief(x: Tensor, options: LayerOptions) -> bool:
    """Return whether a call is short enough for its launches to count."""
    values = x.size(0) * x.size(1) * options.directions * 4 * options.hidden
    return values * options.dtype.itemsize <= MOST_BYTES


def train(x: Tensor, h0: Tensor | None, c0: Tensor | None, call: TrainedCall, parameters: Sequence[Tensor]) -> Results:
    """All layers, keeping what their gradients need.

    Args:
        x: (batch, steps, features) if batch first, else (steps, batch, features).
        h0: (layers * directions, batch, H), or None for zeros.
        c0: the same.
        call: what runs.
        parameters: of all layers and directions, in `direct_layers.layer`'s order.

    Returns:
        Output (as x, with directions * H features), h_n and c_n (layers * directions, batch, H).
    """
    found: Results = _TrainedLayers.apply(x, h0, c0, call, *parameters)
    return found


class _TrainedLayers(torch.autograd.Function):
    """`train` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, call: TrainedCall, *parameters: Tensor
    ) -> Results:
        options = call.options
        first, second, _ = x.shape
        batch, dtype, device = first if options.batch_first else second, options.dtype, x.device
        states = call.layers * options.directions
        h_n = torch.empty(states, batch, options.hidden, dtype=dtype, device=device)
        c_n = torch.empty(states, batch, options.hidden, dtype=dtype, device=device)
        own = list(_each(parameters, call.layers))
        outputs, kept, inner = [], [], x
        for number, flat in enumerate(own):
            cast = number == 0 and x.dtype != dtype
            kept.append(memory_to_keep(inner, flat, options, cast=cast))
            inner = torch.empty(first, second, options.directions * options.hidden, dtype=dtype, device=device)
            outputs.append(inner)

        def launch() -> None:
            _forward(x, h0, c0, own, options, outputs, kept, h_n, c_n)

        memory = list(itertools.chain(outputs, *kept))
        call.run(launch, call.key("forward"), (x, h0, c0), (h_n, c_n, *memory))
        saved: list[Tensor | None] = [h0, c0]
        inner = x
        for flat, output, one in zip(own, outputs, kept, strict=True):
            read = inner if one.x is None else one.x
            weights = flat[:2] if one.weight_ih is None else one[3:]
            saved += (output, one.gates, one.cells, read, *weights)
            inner = output
        ctx.save_for_backward(*saved)
        ctx.forms = forms(saved)
        ctx.call, ctx.each = call, len(parameters) // states
        ctx.set_materialize_grads(False)
        return outputs[-1], h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        refuse_other_forms(ctx.forms, forms(saved))
        grad_x, grad_h0, grad_c0, *rest = gradients_of(
            _gradients, grads, *saved, ctx.call, ctx.each, ctx.needs_input_grad
        )
        return grad_x, grad_h0, grad_c0, None, *rest


def _forward(  # noqa: PLR0913, PLR0917 - what all layers read and write
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Sequence[Tensor]],
    options: LayerOptions,
    outputs: Sequence[Tensor],
    kept: Sequence[Kept],
    h_n: Tensor,
    c_n: Tensor,
) -> None:
    with torch.no_grad(), without_autocast(x.device.type):
        for number, flat in enumerate(parameters):
            place = slice(number * options.directions, (number + 1) * options.directions)
            first, last = (None if v is None else v[place] for v in (h0, c0))
            x, _, cell, *_ = layer_forward(
                x, flat, first, last, None, options, save=True, into=outputs[number], h_n=h_n[place], kept=kept[number]
            )
            c_n[place].copy_(cell)


def _gradients(grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *given: Any) -> Any:
    """Gradients of x, h0, c0 and of the parameters, None where not needed.

    Args:
        grad_output: gradient of the output, or None for zeros.
        grad_h_n: the same of h_n.
        grad_c_n: the same of c_n.
        given: h0, c0, of each layer output, gates, cells, input and both weights; the call, parameters a direction,
            and what is needed.
    """
    h0, c0, *saved, call, each, needed = given
    layers = list(_each(saved, call.layers))
    grads = grad_output, grad_h_n, grad_c_n
    if not unwatched([layers[0][0], *(grad for grad in grads if grad is not None)], autocast=True):
        return _layer_by_layer(grads, h0, c0, layers, call.options, each, needed)
    results = _memory(h0, layers, call, each, needed)

    def launch() -> None:
        found = _layer_by_layer(grads, h0, c0, layers, call.options, each, needed)
        for into, value in zip(results, found, strict=True):
            if into is not None and value is not None:
                into.copy_(value)

    key = (*call.key("backward"), needed, product_settings(call.options.dtype))
    # What was saved has the forms that the forward pass gave it, but hooks may have moved it to other strides.
    strides = tuple([value.stride() for value in saved])
    call.run(launch, (*key, strides), (*grads, h0, c0), (*saved, *results))
    return results


def _memory(
    h0: Tensor | None, layers: Sequence[Sequence[Tensor]], call: TrainedCall, each: int, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Memory for the gradients that are needed, of the parameters' type: of x, h0, c0 and the parameters."""
    hidden, device = call.options.hidden, layers[0][0].device
    state = (0,) if h0 is None else h0.shape
    shapes: list[Sequence[int]] = [layers[0][3].shape, state, state]
    for own in layers:
        one: list[Sequence[int]] = [(4 * hidden, own[3].size(2)), (4 * hidden, hidden)]
        one += [(4 * hidden,)] * (each - 2)
        shapes += one * call.options.directions
    empty, wanted = torch.empty, (*needed[:3], *needed[4:])
    return tuple(
        [
            empty(shape, dtype=call.dtype, device=device) if one else None
            for shape, one in zip(shapes, wanted, strict=True)
        ]
    )


def _each(values: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Values in `count` parts of one length."""
    length = len(values) // count
    return (values[start : start + length] for start in range(0, len(values), length))


def _layer_by_layer(
    grads: Sequence[Tensor | None],
    h0: Tensor | None,
    c0: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    options: LayerOptions,
    each: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute what `_gradients` returns, in memory of its own and in the products' type."""
    directions = options.directions
    grad, *of_states = grads
    states: list[tuple[Tensor | None, ...]] = []
    parameters: list[Tensor | None] = []
    for number in range(len(layers) - 1, -1, -1):
        place = slice(number * directions, (number + 1) * directions)
        begin = 4 + number * directions * each
        wanted = (number > 0 or needed[0], *needed[1:3], False, False, *needed[begin : begin + directions * each])
        grad_h_n, grad_c_n, first, last = (None if v is None else v[place] for v in (*of_states, h0, c0))
        output, gates, cells, x, weight_ih, weight_hh = layers[number]
        grad, first, last, *ends = layer_gradients(
            grad, grad_h_n, grad_c_n, first, last, None, output, gates, cells, x, weight_ih, weight_hh, options, each,
            wanted,
        )  # fmt: skip
        states.insert(0, (first, last))
        parameters[:0] = ends
    grad_h0, grad_c0 = (
        None if values[0] is None else values[0] if len(values) == 1 else torch.cat(values)
        for values in zip(*states, strict=True)
    )
    return grad, grad_h0, grad_c0, *parameters
