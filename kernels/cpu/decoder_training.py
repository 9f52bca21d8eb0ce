"""The decoder of `decoder.py` with its gradients: a forward pass that keeps what one native call goes back by."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.transforms import gradients_of
from . import build, decoder, teams
from .decoder import CALL, DecoderInputs, DecoderSizes, FedState, Memory, contiguous, run_keeping
from .layer import as_saved, readable

#: `FedBack` of fed_back.h, as bytes.
_BACK = struct.Struct("@18q").pack


class FedLayerBack(ctypes.Structure):
    """`FedLayerBack` of fed_back.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("weight_ih", "weight_hh", "grad_ih", "grad_hh", "grad_bias_ih", "grad_bias_hh")
    )


def run(  # noqa: PLR0913 - as `decoder.run`
    x: Tensor,
    state: FedState,
    layers: Sequence[tuple[Tensor, ...]],
    memory: Memory,
    combine: tuple[Tensor, Tensor | None],
    lengths: Tensor | None = None,
    dropped: Tensor | None = None,
    *,
    feeds_context: bool,
) -> tuple[Tensor, FedState]:
    """Run all steps as `decoder.run`, whose arguments and results these are, with gradients of them.

    Mask, scale, lengths and what is dropped have none. What x has past a length is not read. Lengths may be int64, too.
    They and the mask may be changed before the backward pass, which reads copies.

    Raises:
        BuildError, RuntimeError, MemoryError: as `decoder.run`.
        NotImplementedError: from a backward pass, where gradients of its gradients are asked for.
    """
    query = memory.query or (None, None)
    decoded, *after = DifferentiableDecoder.apply(
        x, state.hidden, state.cell, state.fed, memory.values, memory.keys, *query, memory.vector, *combine,
        memory.mask, lengths, dropped, (memory.scale, feeds_context, len(layers)),
        *(value for own in layers for value in own),
    )  # fmt: skip
    return decoded, FedState(*after)


class DifferentiableDecoder(torch.autograd.Function):
    """`decoder.run` as an autograd node; `flat` has each layer's parameters."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - all that a decoder reads
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        fed0: Tensor,
        values: Tensor,
        keys: Tensor,
        query: Tensor | None,
        query_bias: Tensor | None,
        vector: Tensor | None,
        combine: Tensor,
        combine_bias: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        dropped: Tensor | None,
        options: tuple[float, bool, int],
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return what is decoded, and h, c and what is fed after each row's last step."""
        scale, feeds_context, count = options
        each = len(flat) // count
        layers = [flat[number * each : (number + 1) * each] for number in range(count)]
        asks = None if query is None else (query, query_bias)
        # Callers use them again, and change them: a loop of torch's operators reads neither on its way back.
        mask = None if mask is None else mask.clone(memory_format=torch.contiguous_format)
        if lengths is not None:
            lengths = lengths.int() if lengths.dtype is torch.int64 else lengths.clone()
        given = DecoderInputs(
            x, FedState(h0, c0, fed0), layers, Memory(values, keys, mask, asks, vector, scale),
            (combine, combine_bias), lengths, dropped, feeds_context,
        )  # fmt: skip
        decoded, after, sizes, kept = run_keeping(given, keeps=True)
        matrices = [value for own in layers for value in own[:2]]
        saved = decoded, kept, values, keys, query, vector, combine, mask, lengths, dropped, *matrices
        ctx.save_for_backward(*saved)
        ctx.forms = [value if value is None else (value.shape, value.dtype) for value in saved]
        ctx.sizes, ctx.scale = sizes, scale
        ctx.set_materialize_grads(False)
        return decoded, after.hidden, after.cell, after.fed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of x, the state, memory, keys and the parameters."""
        needed = ctx.needs_input_grad
        return gradients_of(_gradients, grads, ctx.sizes, ctx.scale, needed[6:11], needed[15:], *as_saved(ctx))


def _gradients(  # noqa: PLR0913, PLR0917 - all that a decoder read and wrote
    grad_decoded: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_fed_n: Tensor | None,
    sizes: DecoderSizes,
    scale: float,
    beside: Sequence[bool],
    wanted: Sequence[bool],
    decoded: Tensor,
    kept: Tensor,
    values: Tensor,
    keys: Tensor,
    query: Tensor | None,
    vector: Tensor | None,
    combine: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    dropped: Tensor | None,
    *matrices: Tensor,
) -> Any:
    """Gradients of all that the forward pass was given; None where there is nothing, or of parameters not needed.

    Gradients of the results come first, None for zeros; `beside` says which of query, its bias, vector, combine and its
    bias need gradients, and `wanted` the same of each layer's parameters. What follows is what the forward pass
    decoded, kept and was given, `matrices` weight_ih and weight_hh of each layer.
    """
    native = build.available(decoder.library())
    hidden, held = sizes.hidden, list[Tensor]()

    def at(value: Tensor | None) -> int:
        return contiguous(value, held)

    def empty(*shape: int) -> Tensor:
        return kept.new_empty(shape)

    grad_decoded = torch.zeros_like(decoded) if grad_decoded is None else readable(grad_decoded)
    after = [None if grad is None else readable(grad) for grad in (grad_h_n, grad_c_n, grad_fed_n)]
    state = (sizes.layers, sizes.batch, hidden)
    inputs = [
        empty(sizes.batch, sizes.steps, sizes.inputs), empty(*state), empty(*state), empty(sizes.batch, sizes.fed_size),
        empty(*values.shape), empty(*keys.shape),
    ]  # fmt: skip
    shapes = ((sizes.key_size, hidden), (sizes.key_size,), (sizes.key_size,), tuple(combine.shape), (hidden,))
    others = [empty(*shape) if needs else None for shape, needs in zip(shapes, beside, strict=True)]
    each, found = len(wanted) // sizes.layers, list[Tensor | None]()
    layers = (FedLayerBack * sizes.layers)()
    for number in range(sizes.layers):
        weight_ih, weight_hh = matrices[2 * number : 2 * number + 2]
        own = wanted[number * each : (number + 1) * each]
        # One sum serves both biases, and each has memory of its own: a caller may change one gradient in place.
        biases = [empty(4 * hidden) if any(own[2:]) else None for _ in own[2:]]
        grads = [empty(*w.shape) if needs else None for w, needs in zip((weight_ih, weight_hh), own, strict=False)]
        found += [*grads, *biases]
        layers[number] = FedLayerBack(at(weight_ih), at(weight_hh), *map(at, (*grads, *biases)))
    call = CALL(
        *sizes, 0, 0, at(values), at(keys), at(mask), at(query), 0, at(vector), scale, at(combine), 0, at(lengths),
        at(dropped), 0, 0, 0, 0, 0, 0, at(decoded), at(kept),
    )  # fmt: skip
    status = native.decoder_back(_BACK(
        ctypes.cast(ctypes.c_char_p(call), ctypes.c_void_p).value or 0, ctypes.addressof(layers), at(grad_decoded),
        *map(at, after), *map(at, inputs), *map(at, others), teams.threads_for(sizes.work),
    ))  # fmt: skip
    build.checked(native, status, "decoder_failure")
    return *inputs, *others, None, None, None, None, *found
