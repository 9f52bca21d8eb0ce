"""All layers of a short sequence on a GPU with gradients: one autograd node, one CUDA graph forward and one backward.

A training step of a short sequence takes a GPU less time than Python takes to launch it, and most of what is launched
is small: casts, sums, products, fills. A graph is found by the addresses of all it reads and writes, as without
gradients (`graphed_layers`). So what a pass leaves behind lies in memory that is allocated for each call, and only what
ends with the pass lies in the graph's own. What no caller sees of it is one block of bytes, for all layers together:
its parts become tensors where something is launched, which a replay does not need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common.fast_path import unwatched
from .common.recurrence import LayerOptions, state_dtype
from .common.transforms import batched, gradients_of
from .direct_layers import Kept, layer_forward, layer_gradients, refuse_other_forms, without_autocast
from .gpu.graph_cache import Graphs, Named
from .gpu.product_settings import product_settings

Results = tuple[Tensor, Tensor, Tensor]

#: Bytes of a layer's gates up to which a graph is tried. Beyond, a GPU takes longer for the steps than Python for the
#: launches, and the graph's memory would be large: it holds the gates' input and their gradients.
MOST_BYTES = 32 << 20
#: Bytes at whose multiples each part of a block begins, as in what torch allocates on a GPU.
ALIGNMENT = 512
#: Bytes at whose multiples memory that torch allocates begins on any device.
LEAST_ALIGNMENT = 64


class BlockPart(NamedTuple):
    """A tensor in a block of bytes: where it begins, and its form."""

    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, block: Tensor) -> Tensor:
        """The tensor."""
        return block[self.at : self.at + math.prod(self.shape) * self.dtype.itemsize].view(self.dtype).view(self.shape)


class LayerParts(NamedTuple):
    """Parts of the block that a layer's forward pass fills; None where something else serves.

    Attributes:
        gates, cells, x, weight_ih, weight_hh: as in `direct_layers.Kept`.
        output: of every layer but the last, whose output is the caller's.
    """

    gates: BlockPart
    cells: BlockPart
    x: BlockPart | None
    weight_ih: BlockPart | None
    weight_hh: BlockPart | None
    output: BlockPart | None

    def kept(self, block: Tensor) -> Kept:
        """The tensors, but for the output."""
        return Kept(*(None if part is None else part.of(block) for part in self[:5]))  # type: ignore[arg-type]


class TrainedCall:
    """A training call of all layers, settled before its first pass: later calls only allocate and look up.

    Args:
        name: what stands for the parameters' addresses in a key.
        form: all that decides what is launched besides the options and the tensors' addresses; the forms of x, h0 and
            c0 with their strides among it.
        options: what runs.
        layers: of each layer its parameters, in `direct_layers.layer`'s order.
        given: x, h0 and c0 of such a call.
        graphs: where graphs are kept.
        saw: called after each pass with what `Graphs.run` returned.
    """

    def __init__(
        self,
        name: Hashable,
        form: tuple[Hashable, ...],
        options: LayerOptions,
        layers: Sequence[Sequence[Tensor]],
        given: tuple[Tensor, Tensor | None, Tensor | None],
        graphs: Graphs,
        saw: Callable[[int], None],
    ) -> None:
        x, h0, _ = given
        dtype, directions, hidden, device = options.dtype, options.directions, options.hidden, x.device
        first, second, features = x.shape
        steps, batch = (second, first) if options.batch_first else (first, second)
        self.options, self.layers, self.each = options, len(layers), len(layers[0]) // directions
        self.forward_key = Named(("forward", name, options, form))
        self._graphs, self._saw = graphs, saw
        self._identity = name, options, form
        self._backward: dict[tuple[bool, ...], tuple[Named, list[Callable[[], Tensor] | None]]] = {}
        self.parts, end = [], 0
        for number, flat in enumerate(layers):
            own, end = _parts(
                (first, second, features if number == 0 else directions * hidden),
                (steps, batch),
                options,
                end,
                cast_x=number == 0 and x.dtype != dtype,
                cast_weights=directions > 1 or flat[0].dtype != dtype,
                last=number == len(layers) - 1,
            )
            self.parts.append(own)
        state = len(layers) * directions, batch, hidden
        #: Make the output, h_n, c_n and the block. Sizes are counted out: as a tuple they take torch longer.
        self.results = [
            functools.partial(torch.empty, first, second, directions * hidden, dtype=dtype, device=device),
            functools.partial(torch.empty, *state, dtype=dtype, device=device),
            functools.partial(torch.empty, *state, dtype=dtype, device=device),
            functools.partial(torch.empty, end, dtype=torch.uint8, device=device),
        ]
        states = (0,) if h0 is None else state
        self._gradients = [tuple(x.shape), states, states, *(tuple(value.shape) for flat in layers for value in flat)]
        self._made = functools.partial(torch.empty, dtype=layers[0][0].dtype, device=device)
        #: Whether the block has the weights and the input as they were multiplied.
        self.has_weights, self.has_x = self.parts[0].weight_ih is not None, self.parts[0].x is not None
        #: Forms of what a pass saves, strides included, once there was one.
        self.saved: list[tuple[Any, ...] | None] | None = None

    def to_save(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        output: Tensor,
        block: Tensor,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Tensors for the backward pass: h0, c0, x, output, block, and both weights of each layer, if they serve."""
        weights: Sequence[Tensor] = ()
        if not self.has_weights:
            each = self.each
            weights = parameters[:2] if self.layers == 1 else [v for i, v in enumerate(parameters) if i % each < 2]  # noqa: PLR2004
        return h0, c0, None if self.has_x else x, output, block, *weights

    def run(
        self,
        launch: Callable[[], None],
        key: Hashable,
        tensors: Sequence[Tensor | None],
        known: Sequence[Tensor | None],
    ) -> None:
        """Do what `launch` does, by a graph where there is one (`Graphs.run`)."""
        self._saw(self._graphs.run(launch, key, tensors, known))

    def backward(self, needed: tuple[bool, ...]) -> tuple[Named, list[Callable[[], Tensor] | None]]:
        """Return the key of a backward pass and what makes memory for its gradients, None where not needed.

        Args:
            needed: of x, h0, c0, nothing, and each parameter, whether its gradient is.
        """
        found = self._backward.get(needed)
        if found is None:
            make: list[Callable[[], Tensor] | None] = [
                functools.partial(self._made, *shape) if one else None
                for shape, one in zip(self._gradients, (*needed[:3], *needed[4:]), strict=True)
            ]
            found = self._backward[needed] = Named(("backward", *self._identity, needed)), make
        return found


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
    alive = torch._C._functorch.unwrap_if_dead  # noqa: SLF001
    if h0 is not None and c0 is not None:
        h0, c0 = alive(h0), alive(c0)
    found: Results = _apply(alive(x), h0, c0, call, *parameters)
    return found


class _TrainedLayers(torch.autograd.Function):
    """`train` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, call: TrainedCall, *parameters: Tensor
    ) -> Results:
        output, h_n, c_n, block = [make() for make in call.results]

        def launch() -> None:
            _forward(x, h0, c0, parameters, call, output, h_n, c_n, block)

        call.run(launch, call.forward_key, (), (x, h0, c0, output, h_n, c_n, block))
        saved = call.to_save(x, h0, c0, output, block, parameters)
        ctx.save_for_backward(*saved)
        if call.saved is None:
            call.saved = exact_forms(saved)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # Read only once: checkpointing and offloading recompute or fetch them at each access.
        saved, call, needed = ctx.saved_tensors, ctx.call, ctx.needs_input_grad
        found = exact_forms(saved)
        strides: Hashable = None
        if found != call.saved:
            refuse_other_forms(*([v and (v[0], *v[2:]) for v in both] for both in (call.saved, found)))
            # Hooks moved what was saved to other strides.
            strides = tuple([v and v[1] for v in found])
        present = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled() or batched(present) or not unwatched([saved[3], *present], autocast=True):
            results: Sequence[Tensor | None] = gradients_of(_gradients, grads, *saved, call, needed, strides)
        else:
            results = _by_graph(grads, saved, call, needed, strides)
        return *results[:3], None, *results[3:]


#: Not `_TrainedLayers.apply`, which asks again whether there are transforms, and unwraps each argument in Python.
_apply = super(torch.autograd.Function, _TrainedLayers).apply


def _forward(  # noqa: PLR0913, PLR0917 - what all layers read and write
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor],
    call: TrainedCall,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    block: Tensor,
) -> None:
    options = call.options
    with torch.no_grad(), without_autocast(x.device.type):
        for number, (flat, parts) in enumerate(zip(_each(parameters, call.layers), call.parts, strict=True)):
            place = slice(number * options.directions, (number + 1) * options.directions)
            first, last = (None if v is None else v[place] for v in (h0, c0))
            into = output if parts.output is None else parts.output.of(block)
            x, _, cell, *_ = layer_forward(
                x, flat, first, last, None, options, save=True, into=into, h_n=h_n[place], kept=parts.kept(block)
            )
            c_n[place].copy_(cell)


def _gradients(grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *given: Any) -> Any:
    """Gradients of x, h0, c0 and of the parameters, None where not needed.

    Args:
        grad_output: gradient of the output, or None for zeros.
        grad_h_n: the same of h_n.
        grad_c_n: the same of c_n.
        given: what was saved, the call, what is needed, and strides of what was saved if they are not the usual ones.
    """
    *saved, call, needed, strides = given
    grads = grad_output, grad_h_n, grad_c_n
    if unwatched([saved[3], *(grad for grad in grads if grad is not None)], autocast=True):
        return tuple(_by_graph(grads, saved, call, needed, strides))
    return _layer_by_layer(grads, saved, call, needed)


def _by_graph(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    call: TrainedCall,
    needed: tuple[bool, ...],
    strides: Hashable,
) -> Sequence[Tensor | None]:
    """Compute what `_gradients` returns, by a graph where there is one; arguments as there."""
    key, makers = call.backward(needed)
    results = [None if make is None else make() for make in makers]

    def launch() -> None:
        found = _layer_by_layer(grads, saved, call, needed)
        for into, value in zip(results, found, strict=True):
            if into is not None and value is not None:
                into.copy_(value)

    call.run(launch, (key, product_settings(call.options.dtype), strides), grads, (*saved, *results))
    return results


def _parts(
    sizes: tuple[int, int, int],
    time: tuple[int, int],
    options: LayerOptions,
    begin: int,
    *,
    cast_x: bool,
    cast_weights: bool,
    last: bool,
) -> tuple[LayerParts, int]:
    """Parts of a block that a layer fills from a byte on, and the byte where they end.

    Args:
        sizes: of its input.
        time: steps and batch.
        options: what runs.
        begin: the byte.
        cast_x: whether its input is cast to the type of the products.
        cast_weights: whether its weights are cast or stacked.
        last: whether it is the last layer.
    """
    hidden, directions, dtype = options.hidden, options.directions, options.dtype

    def part(*shape: int, dtype: torch.dtype = dtype) -> BlockPart:
        nonlocal begin
        found = BlockPart(begin, shape, dtype)
        begin += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return found

    own = LayerParts(
        gates=part(*time, directions, 4 * hidden),
        cells=part(*time, directions, hidden, dtype=state_dtype(dtype)),
        x=part(*sizes) if cast_x else None,
        weight_ih=part(directions * 4 * hidden, sizes[2]) if cast_weights else None,
        weight_hh=part(*(() if directions == 1 else (directions,)), 4 * hidden, hidden) if cast_weights else None,
        output=None if last else part(*sizes[:2], directions * hidden),
    )
    return own, begin


def exact_forms(values: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """Shape, strides, type and device of each."""
    return [None if value is None else (value.shape, value.stride(), value.dtype, value.device) for value in values]


def _each(values: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Values in `count` parts of one length."""
    length = len(values) // count
    return (values[start : start + length] for start in range(0, len(values), length))


def _opened(saved: Sequence[Any], call: TrainedCall) -> list[tuple[Tensor, ...]]:
    """Of each layer output, gates, cells, input and both weights, as its forward pass left them."""
    _, _, x, output, block, *weights = saved
    # A hook may have moved it.
    if not block.is_contiguous() or block.data_ptr() % LEAST_ALIGNMENT:
        block = block.clone(memory_format=torch.contiguous_format)
    layers: list[tuple[Tensor, ...]] = []
    for number, parts in enumerate(call.parts):
        kept = parts.kept(block)
        read = kept.x if kept.x is not None else layers[-1][0] if layers else x
        own = weights[2 * number : 2 * number + 2] if kept.weight_ih is None else kept[3:]
        into = output if parts.output is None else parts.output.of(block)
        layers.append((into, kept.gates, kept.cells, read, *own))
    return layers


def _layer_by_layer(
    grads: Sequence[Tensor | None], saved: Sequence[Any], call: TrainedCall, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute what `_gradients` returns, in memory of its own and in the products' type."""
    options, each, layers = call.options, call.each, _opened(saved, call)
    h0, c0, directions = saved[0], saved[1], options.directions
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
