"""The layers of a `kernels.LSTM` one after the other, once it is settled what runs.

Per layer: one product projects the input of all steps, and the operator of `kernels.ops` walks over time. On a CPU in
plain eager code one call of the kernel does both; without gradients it does all layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from typing import cast as cast_type

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops, padded_vendor
from . import torch_lstm as vendor
from .common.fast_path import autocast_dtype, unwatched
from .common.recurrence import resets_of, state_dtype
from .cpu.inference import Prepared
from .cpu.layer import layer as cpu_layer
from .cpu.packing import TRAINED
from .direct_layers import LayerOptions
from .direct_layers import layer as direct_layer
from .lstm_arguments import check_call, check_step, checked_resets, storage_refused
from .torch_lstm import State, permuted, valid_mask

#: A `kernels.LSTM`, which uses this module.
LayeredLSTM = Any


def run(
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    lengths: Tensor | None,
    implementation: str,
    resets: Tensor | None = None,
    *,
    batch_first: bool,
) -> tuple[Tensor, State]:
    """Run all layers through the operator, or by the CPU kernel directly where nothing intercepts operators.

    Args:
        lstm: holds parameters and options.
        x: (batch, steps, features) if `batch_first`, else steps come first.
        hx: h and c, each (num_layers * directions, batch, hidden_size); zeros when None.
        lengths: (batch,) integers; all steps when None.
        implementation: a name of `kernels.dispatch` but `vendor`.
        resets: bool, the first two dimensions of x: true where a step begins a new sequence; nowhere when None.
        batch_first: order of the first two dimensions.
    """
    dtype = computed_dtype(x)
    tf32 = lstm.tf32(x.device, dtype)
    parameters = [lstm._parameters_of(layer) for layer in range(lstm.num_layers)]  # noqa: SLF001 - it is the module's own part
    directions = 2 if lstm.bidirectional else 1
    lengths, resets = _masks(x, lengths, resets, directions, batch_first)
    given = [value for value in (x, *(hx or ()), lengths, resets) if value is not None]
    tensors = [*given, *itertools.chain.from_iterable(itertools.chain.from_iterable(parameters))]
    # Chosen for bfloat16, it was found to serve this call; what is new since then are the masks.
    cast = implementation == dispatch.CPU and dtype == torch.bfloat16 and unwatched(given, autocast=True)
    plain = cast or (implementation == dispatch.CPU and unwatched(tensors))
    if lengths is not None and torch.is_grad_enabled() and not plain:
        # The weights' gradient multiplies the padding by zero, which gives NaN where the padding is NaN.
        x = torch.where(valid_mask(lengths, x, batch_first), x, 0.0)
    dropped = bool(lstm.dropout) and lstm.training and lstm.num_layers > 1
    if plain and not dropped and not (torch.is_grad_enabled() and any(value.requires_grad for value in tensors)):
        return _infer(lstm, x, hx, lengths, resets, parameters, batch_first, cast)
    past_dispatcher = implementation != dispatch.CPU and lstm.weight_storage == "fp32" and resets is None
    if past_dispatcher and unwatched(tensors, autocast=True):
        options = LayerOptions(lstm.hidden_size, directions, batch_first, implementation, dtype, tf32)
        return _direct(lstm, x, hx, lengths, parameters, options, tensors)
    hidden, cell = [], []
    for number, own_parameters in enumerate(parameters):
        if number and lstm.dropout:
            x = functional.dropout(x, lstm.dropout, lstm.training)
        h0 = c0 = None
        if hx is not None:
            own = slice(number * directions, (number + 1) * directions)
            h0, c0 = hx[0][own], hx[1][own].to(state_dtype(dtype))
        if plain:
            storage = TRAINED if cast else lstm.weight_storage
            x, h_n, c_n = cpu_layer(
                x, own_parameters, h0, c0, lengths, resets, batch_first=batch_first, storage=storage
            )
        elif lstm.weight_storage != "fp32":
            raise RuntimeError(storage_refused(lstm.weight_storage))
        else:
            weight_ih, weight_hh, bias = _stacked(own_parameters)
            x, h_n, c_n = ops.recurrence(
                functional.linear(x, weight_ih, bias).unflatten(-1, (directions, 4 * lstm.hidden_size)),
                weight_hh,
                h0,
                c0,
                lengths,
                batch_first=batch_first,
                implementation=implementation,
                tf32=tf32,
                resets=resets,
            )
        hidden.append(h_n)
        cell.append(c_n.to(h_n.dtype))
    if len(hidden) == 1:
        return x, (hidden[0], cell[0])
    return x, (torch.cat(hidden), torch.cat(cell))


def run_packed(lstm: LayeredLSTM, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
    """Run a packed batch as a padded one with lengths, and pack the result: no kernel reads packed memory itself.

    The batch stays in its sorted order inside. Data lies steps first, each step's sequences together, which is
    the padded order with the padding left out: one index list serves both ways.
    """
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    batch, steps = int(batch_sizes[0]), len(batch_sizes)
    hx = permuted(hx, sorted_indices)
    check_call(lstm, data, hx, batch, batch_sizes)
    full = int(batch_sizes[-1]) == batch
    name = lstm._choose(data, hx, batch, steps, masked=not full)  # noqa: SLF001
    if name == "vendor":
        output, state = vendor.run(lstm, data, hx, batch_sizes)
    elif name == dispatch.PADDED:
        padded, state = padded_vendor.run(lstm, data.unflatten(0, (steps, batch)), hx, batch_first=False)
        output = padded.flatten(0, 1)
    elif full:
        padded, state = run(lstm, data.unflatten(0, (steps, batch)), hx, None, name, batch_first=False)
        output = padded.flatten(0, 1)
    else:
        valid = torch.arange(batch, device=batch_sizes.device) < batch_sizes[:, None]  # (steps, batch)
        index = valid.flatten().nonzero().squeeze(1).to(data.device)
        x = data.new_zeros(steps * batch, data.size(1)).index_copy(0, index, data).unflatten(0, (steps, batch))
        padded, state = run(lstm, x, hx, valid.sum(0), name, batch_first=False)
        output = padded.flatten(0, 1).index_select(0, index)
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), permuted(state, unsorted_indices)


def step_through_forward(lstm: LayeredLSTM, x: Tensor, hidden: Tensor, cell: Tensor, resets: Tensor | None) -> Tensor:
    """Run `step` of a `kernels.LSTM` by its `forward`, where the CPU kernel cannot do it in place."""
    check_step(lstm, x, hidden, cell)
    resets = checked_resets(resets, x.shape[:1])
    h0, c0 = hidden, cell
    if resets is not None:
        # For one step this is all of a reset, so it serves whatever runs.
        rows = resets.to(x.device, non_blocking=True)[:, None]
        h0, c0 = hidden.masked_fill(rows, 0.0), cell.masked_fill(rows, 0.0)
    time = 1 if lstm.batch_first else 0
    output, (h_n, c_n) = lstm.forward(x.unsqueeze(time), (h0, c0))
    hidden.copy_(h_n)
    cell.copy_(c_n)
    found: Tensor = output.squeeze(time)
    return found


def _masks(
    x: Tensor, lengths: Tensor | None, resets: Tensor | None, directions: int, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Lengths and resets as kernels take them."""
    # From pageable memory the copy reads its source before the call returns, so none can change it.
    if lengths is not None:
        lengths = lengths.to(torch.int32).to(x.device, non_blocking=True)
    if resets is not None:
        resets = resets.to(x.device, non_blocking=True).reshape(x.shape[:2])
        resets = resets_of(resets.t() if batch_first else resets, lengths, directions)
    return lengths, resets


def _infer(  # noqa: PLR0913, PLR0917 - a call's inputs
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    batch_first: bool,
    cast: bool,
) -> tuple[Tensor, State]:
    """All layers without gradients by the CPU kernel, prepared for this call and later ones unless they are."""
    h0, c0 = hx or (None, None)
    if cast:
        x, h0, c0 = (v if v is None else v.to(torch.float32) for v in (x, h0, c0))  # type: ignore[assignment]
    x, h0, c0, lengths = (v if v is None else v.contiguous() for v in (x, h0, c0, lengths))  # type: ignore[assignment]
    # Apart from what calls without autocast take past all of this.
    slot, storage = ("_kept_cast", "bf16") if cast else ("_kept", lstm.weight_storage)
    kept = lstm.__dict__.get(slot)
    found = None
    if kept is not None and lstm._stands(kept):  # noqa: SLF001
        found = kept[0].run(x, h0, c0, lengths, resets, batch_first=batch_first)
    if found is None:
        prepared = Prepared(parameters, x.size(2), storage=storage)
        lstm.__dict__[slot] = (prepared, lstm.choices) if prepared.lasting else None
        found = prepared.run(x, h0, c0, lengths, resets, batch_first=batch_first, fresh=True)
    output, h_n, c_n = cast_type("tuple[Tensor, Tensor, Tensor]", found)
    if cast:
        output, h_n, c_n = (value.to(torch.bfloat16) for value in (output, h_n, c_n))
    return output, (h_n, c_n)


def _direct(
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    lengths: Tensor | None,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    options: LayerOptions,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, State]:
    """All layers past torch's dispatcher; on a GPU without gradients, as one CUDA graph where memory comes back."""
    gradients = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    dropped = bool(lstm.dropout) and lstm.training and lstm.num_layers > 1
    on_gpu = options.implementation in dispatch.MODULES
    if on_gpu and not (gradients or dropped) and lengths is None and x.numel():
        return _graphed(lstm, x, hx, parameters, options)
    hidden, cell = [], []
    for number, own in enumerate(parameters):
        if number and lstm.dropout:
            x = functional.dropout(x, lstm.dropout, lstm.training)
        place = slice(number * options.directions, (number + 1) * options.directions)
        h0, c0 = (None, None) if hx is None else (hx[0][place], hx[1][place])
        x, h_n, c_n = direct_layer(x, own, h0, c0, lengths, options, gradients=gradients)
        hidden.append(h_n)
        cell.append(c_n)
    if len(hidden) == 1:
        return x, (hidden[0], cell[0])
    return x, (torch.cat(hidden), torch.cat(cell))


def _graphed(
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    options: LayerOptions,
) -> tuple[Tensor, State]:
    from .graphed_layers import GraphedLayers  # noqa: PLC0415 - of use on a GPU alone

    kept = lstm.__dict__.get("_kept")
    if kept is None or not isinstance(kept[0], GraphedLayers) or not lstm._stands(kept):  # noqa: SLF001
        kept = (GraphedLayers(parameters, lstm.hidden_size, lstm.tf32), ())
        lstm.__dict__["_kept"] = kept
    output, h_n, c_n = kept[0].run(x, hx, options, lstm.choices)
    return output, (h_n, c_n)


def replay(lstm: LayeredLSTM, kept: Any, x: Any, hx: Any) -> tuple[Tensor, State] | None:
    """The whole call by what an earlier one prepared; None where anything about it is not as simple as that."""
    if not lstm._stands((kept, ())):  # noqa: SLF001
        return None
    found = kept.at_once(x, hx, batch_first=lstm.batch_first)
    if found is None:
        return None
    (output, h_n, c_n), lstm.__dict__["choices"] = found
    return output, (h_n, c_n)


def torchs_own(
    lstm: LayeredLSTM, x: Tensor, hx: State | None, lengths: Tensor | None, name: str
) -> tuple[Tensor, State]:
    """Run torch's own LSTM by the name of `dispatch.VENDORS` that was chosen; arguments as for `run`."""
    found: tuple[Tensor, State]
    if name == dispatch.PADDED and x.size(0 if lstm.batch_first else 1):
        found = way(padded_vendor).run(lstm, x, hx)
    elif lengths is None:
        found = way().run(lstm, x, hx)
    else:
        found = way().run_padded(lstm, x, hx, lengths)
    return found


def way(module: Any = vendor) -> Any:
    """A module that runs torch's own LSTM: while something is traced, what Dynamo must leave alone of it."""
    if torch.compiler.is_compiling():
        from . import graph_breaks as untraceable  # noqa: PLC0415 - imports Dynamo, which takes as long as torch

        return untraceable.Padded if module is padded_vendor else untraceable
    return module


def _stacked(parameters: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both directions' weight_ih (directions * 4H, features), weight_hh (directions, 4H, H) and sums of biases."""
    biases = [_sum(own[2], own[3]) for own in parameters if len(own) > 2]  # noqa: PLR2004 - with biases
    if len(parameters) == 1:
        return parameters[0][0], parameters[0][1].unsqueeze(0), biases[0] if biases else None
    weights_ih, weights_hh = [own[0] for own in parameters], [own[1] for own in parameters]
    return torch.cat(weights_ih), torch.stack(weights_hh), torch.cat(biases) if biases else None


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two vectors, whose gradients are two tensors.

    Those of `first + second` are one tensor in one memory, so a caller that changes one in place changes both.
    """
    if not torch.is_grad_enabled():
        return first + second
    return torch.cat((first, second)).view(2, -1).sum(0)


def casts_itself(lstm: LayeredLSTM, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether the CPU kernel can round to autocast's bfloat16 itself: float32 weights in a plain eager call.

    Args:
        lstm: holds the options.
        x: its input.
        tensors: all that the call is on, the input too.
    """
    return (
        x.device.type == "cpu"
        and autocast_dtype(x.device) == torch.bfloat16
        and x.dtype in {torch.float32, torch.bfloat16}
        and lstm.weight_ih_l0.dtype == torch.float32
        and lstm.weight_storage == "fp32"
        and unwatched(tensors, autocast=True)
    )


def computed_dtype(x: Tensor) -> torch.dtype:
    """Type that products have: that of the input, or autocast's, which leaves float64 alone."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype


def matmul_precision() -> str:
    """Precision of torch's own products in float32: `none` or `ieee`, or `tf32`."""
    if torch.compiler.is_compiling():
        from .graph_breaks import matmul_precision  # noqa: PLC0415 - imports Dynamo

        return str(matmul_precision())
    return str(torch.backends.cuda.matmul.fp32_precision)
