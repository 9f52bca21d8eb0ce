"""Layers of a `kernels.LSTM` in plain eager code: one autograd node a layer, its products included.

torch's dispatcher and autograd take some microseconds for each operator that they see, and an operator written in
Python tens of them, as much as a short sequence takes on a GPU. So where nothing else wants to see the operators
(compiler, tracer, mode, transform, subclass of Tensor), a layer is one `torch.autograd.Function` here: projection and
recurrence forward; recurrence and the products of the weights' gradients backward. Autocast is done by hand.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import dispatch, ops
from .common.fast_path import DEVICES, unwatched
from .common.recurrence import Backward, Forward, LayerOptions, state_dtype
from .common.transforms import gradients_of
from .operands import rows, time_first
from .weight_gradient import direction_gradient

Results = tuple[Tensor, Tensor, Tensor]


class Kept(NamedTuple):
    """Memory that a layer's forward pass fills for its gradients, given by the caller.

    Attributes:
        gates, cells: as in `Forward`.
        x: the input in the products' type; None where the input itself has it.
        weight_ih, weight_hh: (directions * 4H, features), and (4H, H) or (2, 4H, H), in that type; None where the
            parameters themselves serve.
    """

    gates: Tensor
    cells: Tensor
    x: Tensor | None = None
    weight_ih: Tensor | None = None
    weight_hh: Tensor | None = None


def layer(
    x: Tensor,
    parameters: Sequence[tuple[Tensor, ...]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    options: LayerOptions,
    *,
    gradients: bool,
) -> Results:
    """Run one layer; keep what a backward pass needs if one can follow.

    Args:
        x: (batch, steps, features) if batch first, else (steps, batch, features).
        parameters: of each direction weight_ih (4H, features), weight_hh (4H, H), and both biases (4H,), if any.
        h0: (directions, batch, H), or None for zeros.
        c0: the same.
        lengths: (batch,) int32 on the same device, or None for all steps.
        options: what runs.
        gradients: whether any of these needs a gradient.

    Returns:
        Output (as x, with directions * H features), h_n and c_n (directions, batch, H), all in `options.dtype`.

    Raises:
        RuntimeError: when parameters do not fit x or each other, which torch's modules let happen.
    """
    flat = parameters[0] if len(parameters) == 1 else tuple(itertools.chain(*parameters))
    if gradients:
        found: Results = _DirectLayer.apply(x, h0, c0, lengths, options, *flat)
        return found
    with without_autocast(x.device.type):
        output, h_n, c_n, *_ = layer_forward(x, flat, h0, c0, lengths, options, save=False)
    return output, h_n, c_n.to(options.dtype)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off, for code that casts by itself; a null context if autocast is off already."""
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[object] = ops._without_autocast(device)  # noqa: SLF001 - this package's
    return guard


def infer_into(
    x: Tensor,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    h0: Tensor | None,
    c0: Tensor | None,
    options: LayerOptions,
    results: Results,
) -> None:
    """All layers without gradients, written into memory of the caller's.

    Args:
        x: input of the first layer, as for `layer`.
        parameters: of each layer as for `layer`.
        h0: (layers * directions, batch, H), or None for zeros.
        c0: the same.
        options: what runs.
        results: output, h_n and c_n (layers * directions, batch, H), contiguous, written.
    """
    output, h_n, c_n = results
    directions = options.directions
    with torch.no_grad(), without_autocast(x.device.type):
        for number, own in enumerate(parameters):
            place = slice(number * directions, (number + 1) * directions)
            flat = tuple(itertools.chain(*own))
            first, last = (None if v is None else v[place] for v in (h0, c0))
            into = output if number == len(parameters) - 1 else None
            x, _, cell, *_ = layer_forward(x, flat, first, last, None, options, save=False, into=into, h_n=h_n[place])
            c_n[place].copy_(cell)


def layer_forward(  # noqa: PLR0913 - what a layer reads and writes
    x: Tensor,
    flat: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    options: LayerOptions,
    *,
    save: bool,
    into: Tensor | None = None,
    h_n: Tensor | None = None,
    kept: Kept | None = None,
) -> tuple[Any, ...]:
    """Output, h_n, c_n (in the state's type); gates, cells, if any; what was multiplied: x, weight_ih, weight_hh."""
    dtype, directions, hidden = options.dtype, options.directions, options.hidden
    x = x.to(dtype) if kept is None or kept.x is None else kept.x.copy_(x)
    weight_ih, weight_hh, bias = _stacked(flat, directions, dtype, kept)
    gates_input = functional.linear(x, weight_ih, bias)
    if gates_input.size(2) != directions * 4 * hidden or weight_hh.shape[-2:] != (4 * hidden, hidden):
        msg = (
            f"the weights are {tuple(weight_ih.shape)} and {tuple(weight_hh.shape)}, which do not fit "
            f"hidden_size {hidden} in {directions} direction{'s' if directions > 1 else ''}"
        )
        raise RuntimeError(msg)
    if weight_hh.device != x.device:
        msg = f"weight_hh is on {weight_hh.device} and the input on {x.device}; move the module as a whole"
        raise RuntimeError(msg)
    first, second, _ = x.shape
    steps, batch = (second, first) if options.batch_first else (first, second)
    wide, device = state_dtype(dtype), x.device
    output = torch.empty(first, second, directions * hidden, dtype=dtype, device=device) if into is None else into
    if h_n is None:
        h_n = torch.empty(directions, batch, hidden, dtype=dtype, device=device)
    c_n = torch.empty(directions, batch, hidden, dtype=wide, device=device)
    gates = cells = None
    if kept is not None:
        gates, cells = kept.gates, kept.cells
    elif save:
        gates = torch.empty(steps, batch, directions, 4 * hidden, dtype=dtype, device=device)
        cells = torch.empty(steps, batch, directions, hidden, dtype=wide, device=device)
    # Nothing to write, and no kernel takes an empty grid.
    if batch and hidden:
        own = weight_hh if directions > 1 else weight_hh.unsqueeze(0)
        dispatch.forward(
            Forward(
                gates_input=time_first(gates_input.view(first, second, directions, 4 * hidden), options.batch_first),
                weight_hh=own.contiguous(),
                h0=None if h0 is None else h0.to(dtype).contiguous(),
                c0=None if c0 is None else c0.to(wide).contiguous(),
                lengths=None if lengths is None else lengths.contiguous(),
                output=time_first(output.view(first, second, directions, hidden), options.batch_first),
                h_n=h_n,
                c_n=c_n,
                gates=gates,
                cells=cells,
                tf32=options.tf32,
            ),
            options.implementation,
        )
    return output, h_n, c_n, gates, cells, x, weight_ih, weight_hh


def _stacked(
    flat: Sequence[Tensor], directions: int, dtype: torch.dtype, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight_ih (directions * 4H, features), weight_hh (4H, H) or (2, 4H, H), and the sum of the biases, if any."""
    if directions == 1:
        bias = (flat[2] + flat[3]).to(dtype) if len(flat) > 2 else None  # noqa: PLR2004 - with biases
        if kept is not None and kept.weight_ih is not None and kept.weight_hh is not None:
            return kept.weight_ih.copy_(flat[0]), kept.weight_hh.copy_(flat[1]), bias
        return flat[0].to(dtype), flat[1].to(dtype), bias
    each = len(flat) // 2
    one, other = flat[:each], flat[each:]
    bias = torch.cat((one[2] + one[3], other[2] + other[3])).to(dtype) if each > 2 else None  # noqa: PLR2004
    if kept is not None and kept.weight_ih is not None and kept.weight_hh is not None:
        for halves, values in ((kept.weight_ih.chunk(2), (one[0], other[0])), (kept.weight_hh, (one[1], other[1]))):
            for half, value in zip(halves, values, strict=True):
                half.copy_(value)
        return kept.weight_ih, kept.weight_hh, bias
    return torch.cat((one[0], other[0])).to(dtype), torch.stack((one[1], other[1])).to(dtype), bias


class _DirectLayer(torch.autograd.Function):
    """`layer` with its gradients.

    With `setup_context`, which torch.func wants, torch inspects the signature again in each call, which
    takes as long as everything else. Under torch.func's transforms, the operator's own Function runs instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        options: LayerOptions,
        *flat: Tensor,
    ) -> Results:
        with without_autocast(x.device.type):
            output, h_n, c_n, gates, cells, cast, weight_ih, weight_hh = layer_forward(
                x, flat, h0, c0, lengths, options, save=True
            )
            saved = (h0, c0, lengths, output, gates, cells, cast, weight_ih, weight_hh)
            ctx.save_for_backward(*saved)
            ctx.forms = forms(saved)
            ctx.options, ctx.each = options, len(flat) // options.directions
            ctx.set_materialize_grads(False)
            return output, h_n, c_n.to(options.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # Read only once: checkpointing and offloading recompute or fetch them at each access.
        saved = ctx.saved_tensors
        refuse_other_forms(ctx.forms, forms(saved))
        grad_x, grad_h0, grad_c0, *of_parameters = gradients_of(
            layer_gradients, grads, *saved, ctx.options, ctx.each, ctx.needs_input_grad
        )
        return grad_x, grad_h0, grad_c0, None, None, *of_parameters


def layer_gradients(  # noqa: PLR0913, PLR0917 - all that a layer read and wrote
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    options: LayerOptions,
    each: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, c0 and of each direction's parameters, None where not needed.

    Their type is that of the products; autograd casts each to the type of its tensor.
    """
    with without_autocast(output.device.type):
        directions = options.directions
        grad_gates, grad_h0, grad_c0 = _recurrence(
            grad_output, grad_h_n, grad_c_n, c0, lengths, output, gates, cells, weight_hh, options
        )
        # (rows, directions * 4H), rows as x has them.
        flat = grad_gates.view(-1, directions * 4 * options.hidden)
        grad_x = (flat @ weight_ih).view(x.shape) if needed[0] else None
        wanted = [needed[5 + d * each : 5 + (d + 1) * each] for d in range(directions)]
        inputs = flat.t() @ x.reshape(-1, x.size(2)) if any(own[0] for own in wanted) else None
        biases = flat.sum(0) if any(any(own[2:]) for own in wanted) else None
        grads: list[Tensor | None] = []
        for d, own in enumerate(wanted):
            place = slice(d * 4 * options.hidden, (d + 1) * 4 * options.hidden)
            grads.append(_part(inputs, place, directions) if own[0] else None)
            # The last to read this direction's part of the gates' gradients, as it may write to them.
            grads.append(direction_gradient(grad_gates, output, h0, lengths, options, d) if own[1] else None)
            # One sum serves both biases, and each has memory of its own: a caller may change one gradient in place.
            bias = _part(biases, place, directions)
            grads += [bias if index == 0 or bias is None else bias.clone() for index in range(each - 2)]
    return grad_x, grad_h0 if needed[1] else None, grad_c0 if needed[2] else None, *grads


def forms(values: Sequence[Tensor | None]) -> list[Any]:
    """Shape, type and device of each."""
    return [None if value is None else (value.shape, value.dtype, value.device) for value in values]


def refuse_other_forms(given: Sequence[Any], found: Sequence[Any]) -> None:
    """Raise where a hook of saved tensors gave back what kernels would read beyond its memory; both from `forms`."""
    if given == found:
        return
    kept, back = next(pair for pair in zip(given, found, strict=True) if pair[0] != pair[1])
    msg = (
        f"a hook of saved tensors was given {tuple(kept[0])} of {kept[1]} on {kept[2]} and returned "
        f"{tuple(back[0])} of {back[1]} on {back[2]}"
    )
    raise RuntimeError(msg)


def _part(value: Tensor | None, place: slice, directions: int) -> Tensor | None:
    """The rows of one direction."""
    return value if value is None or directions == 1 else value[place]


def _recurrence(  # noqa: PLR0913, PLR0917 - what the operator takes
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    weight_hh: Tensor,
    options: LayerOptions,
) -> Results:
    """Gradients of the gates' input (as x, directions, 4H), of h0 and of c0."""
    directions, hidden, batch_first = options.directions, options.hidden, options.batch_first
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_c_n = None if grad_c_n is None else grad_c_n.to(cells.dtype)
    c0 = None if c0 is None else c0.to(cells.dtype)
    own = weight_hh if directions > 1 else weight_hh.unsqueeze(0)
    given = [grad for grad in (grad_output, grad_h_n, grad_c_n) if grad is not None]
    if not unwatched(given):
        found: Results = ops.lstm_backward(
            grad_output, grad_h_n, grad_c_n, own, c0, lengths, gates, cells, batch_first, options.implementation,
            options.tf32,
        )  # fmt: skip
        return found
    grad_gates = gates.new_empty(*output.shape[:2], directions, 4 * hidden)
    grad_h0, grad_c0 = (
        gates.new_empty(directions, gates.size(1), hidden),
        cells.new_empty(directions, gates.size(1), hidden),
    )
    if grad_h0.numel():
        dispatch.backward(
            Backward(
                weight_hh=own.contiguous(),
                c0=None if c0 is None else c0.contiguous(),
                lengths=None if lengths is None else lengths.contiguous(),
                gates=rows(gates),
                cells=rows(cells),
                grad_output=time_first(rows(grad_output.view(*output.shape[:2], directions, hidden)), batch_first),
                grad_h_n=None if grad_h_n is None else grad_h_n.contiguous(),
                grad_c_n=None if grad_c_n is None else grad_c_n.contiguous(),
                grad_gates=time_first(grad_gates, batch_first),
                grad_h0=grad_h0,
                grad_c0=grad_c0,
                tf32=options.tf32,
            ),
            options.implementation,
        )
    return grad_gates, grad_h0, grad_c0
