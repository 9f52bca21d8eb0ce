"""The layers of a `kernels.LSTM`, once it is settled which kernel runs.

Plain eager code calls the kernels directly: all layers at once without gradients, else a layer at a time. A compiler,
or whoever else intercepts operators, sees one operator of `kernels.ops` a layer.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops, padded_vendor
from . import torch_lstm as vendor
from .common.fast_path import autocast_dtype, unwatched
from .common.recurrence import LayerOptions, Problem, resets_of, state_dtype
from .cpu import fused
from .cpu.packing import TRAINED
from .direct_layers import layer as direct_layer
from .lstm_arguments import check_call, check_step, checked_resets, storage_refused
from .torch_lstm import State, permuted, valid_mask

#: Attributes of a module with what earlier calls settled, without and with gradients: without autocast, and under it.
KEPT_FOR_INFERENCE = ("_kept", "_kept_cast")
KEPT_FOR_TRAINING = ("_kept_training", "_kept_training_cast")
#: A `kernels.LSTM`, which uses this module.
LayeredLSTM = Any


class Way(enum.Enum):
    """Way from a module's layers to the chosen kernel.

    AT_ONCE: all layers as an earlier call settled: in one call of the CPU kernel; on a GPU as one CUDA graph without
        gradients, and one after the other with them.
    BY_LAYER: a layer at a time, past torch's dispatcher.
    OPERATORS: a layer at a time by the operators of `kernels.ops`, which compilers, modes and transforms can see.
    """

    AT_ONCE = enum.auto()
    BY_LAYER = enum.auto()
    OPERATORS = enum.auto()


def run(  # noqa: C901 - one decision after the other
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    lengths: Tensor | None,
    implementation: str,
    resets: Tensor | None = None,
    *,
    batch_first: bool,
) -> tuple[Tensor, State]:
    """Run all layers in the shortest way that hides no operator from a compiler, mode or transform.

    Args:
        lstm: holds parameters and options.
        x: (batch, steps, features) if `batch_first`, else steps come first.
        hx: h and c, each (num_layers * directions, batch, hidden_size); zeros when None.
        lengths: (batch,) integers; all steps when None.
        implementation: a name of `kernels.dispatch` but `vendor`.
        resets: bool, the first two dimensions of x: true where a step begins a new sequence; nowhere when None.
        batch_first: order of the first two dimensions.
    """
    options = _options(lstm, x.device, x.dtype, implementation, batch_first)
    directions = options.directions
    parameters = [lstm._parameters_of(layer) for layer in range(lstm.num_layers)]  # noqa: SLF001 - it is the module's own part
    if lengths is not None or resets is not None:
        lengths, resets = _masks(x, lengths, resets, directions, batch_first)
    given = [value for value in (x, *(hx or ()), lengths, resets) if value is not None]
    tensors = [*given, *itertools.chain.from_iterable(itertools.chain.from_iterable(parameters))]
    gradients = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    way = _way(
        options,
        tensors,
        masked=lengths is not None,
        resets=resets is not None,
        dropped=bool(lstm.dropout) and lstm.training and lstm.num_layers > 1,
        gradients=gradients,
        # What is not a leaf, such as a parametrized weight, has a history that must not be kept beyond the call.
        lasting=not gradients or all(value.is_leaf for layer in parameters for own in layer for value in own),
    )
    on_cpu = implementation == dispatch.CPU and way is not Way.OPERATORS
    if torch.is_grad_enabled() and not on_cpu:
        # Callers fill the memory of theirs for the next batch, maybe before the backward pass.
        lengths, resets = (mask if mask is None else mask.clone() for mask in (lengths, resets))
        if lengths is not None:
            # The weights' gradient multiplies the padding by zero, which gives NaN where the padding is NaN.
            x = torch.where(valid_mask(lengths, x, batch_first), x, 0.0)
    if way is Way.AT_ONCE and on_cpu:
        return _infer(lstm, x, hx, lengths, resets, parameters, options)
    if way is Way.AT_ONCE:
        return _graphed(lstm, x, hx, parameters, options)
    _keep_for_training(lstm, parameters, options, plain=on_cpu and gradients and lengths is None and resets is None)
    hidden, cell = [], []
    for number, own in enumerate(parameters):
        if number and lstm.dropout:
            x = functional.dropout(x, lstm.dropout, lstm.training)
        place = slice(number * directions, (number + 1) * directions)
        h0, c0 = (None, None) if hx is None else (hx[0][place], hx[1][place])
        if way is Way.OPERATORS:
            x, h_n, c_n = _by_operator(x, own, h0, c0, lengths, resets, options)
        elif on_cpu:
            x, h_n, c_n = fused.run(x, own, h0, c0, lengths, resets, options, gradients=gradients)
        else:
            x, h_n, c_n = direct_layer(x, own, h0, c0, lengths, options, gradients=gradients)
        hidden.append(h_n)
        cell.append(c_n)
    if len(hidden) == 1:
        return x, (hidden[0], cell[0])
    return x, (torch.cat(hidden), torch.cat(cell))


def _options(
    lstm: LayeredLSTM, device: torch.device, dtype: torch.dtype, implementation: str, batch_first: bool
) -> LayerOptions:
    """Return what all layers of a call share, for an input of a device and type."""
    dtype, directions = computed_dtype(device, dtype), 2 if lstm.bidirectional else 1
    # The CPU kernel was chosen for bfloat16 where it rounds as autocast does (`casts_itself`).
    storage = TRAINED if implementation == dispatch.CPU and dtype == torch.bfloat16 else lstm.weight_storage
    return LayerOptions(
        lstm.hidden_size, directions, batch_first, implementation, dtype, lstm.tf32(device, dtype), storage
    )


def _way(
    options: LayerOptions,
    tensors: Sequence[Tensor],
    *,
    masked: bool,
    resets: bool,
    dropped: bool,
    gradients: bool,
    lasting: bool,
) -> Way:
    """Choose the shortest way on which no compiler, mode or transform misses an operator.

    Args:
        options: of the call, with what runs.
        tensors: input, state, masks and parameters.
        masked: whether there are lengths.
        resets: whether rows begin anew in the middle of the steps.
        dropped: whether there is dropout between layers.
        gradients: whether gradients will be needed.
        lasting: whether the parameters may be kept beyond the call.
    """
    on_cpu = options.implementation == dispatch.CPU
    served = on_cpu or (not resets and options.storage == "fp32")
    if not (served and unwatched(tensors, autocast=not on_cpu or options.storage == TRAINED)):
        return Way.OPERATORS
    if on_cpu:
        at_once = not gradients
    else:
        at_once = options.implementation in dispatch.MODULES and not masked and tensors[0].numel() > 0 and lasting
    return Way.AT_ONCE if at_once and not dropped else Way.BY_LAYER


def _by_operator(
    x: Tensor,
    parameters: Sequence[tuple[Tensor, ...]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    options: LayerOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n of one layer by the operator of `kernels.ops`; arguments as for `fused.run`."""
    if options.storage not in {"fp32", TRAINED}:
        raise RuntimeError(storage_refused(options.storage))
    weight_ih, weight_hh, bias = _stacked(parameters)
    gates_input = functional.linear(x, weight_ih, bias).unflatten(-1, (options.directions, 4 * options.hidden))
    c0 = None if c0 is None else c0.to(state_dtype(options.dtype))
    output, h_n, c_n = ops.recurrence(gates_input, weight_hh, h0, c0, lengths, resets, options)
    return output, h_n, c_n.to(h_n.dtype)


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


def _infer(
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    options: LayerOptions,
) -> tuple[Tensor, State]:
    """All layers without gradients by the CPU kernel, prepared for this call and later ones unless they are."""
    h0, c0 = hx or (None, None)
    slot = KEPT_FOR_INFERENCE[options.storage == TRAINED]
    if options.storage == TRAINED:
        h0, c0 = (v if v is None or v.dtype == torch.bfloat16 else v.to(torch.float32) for v in (h0, c0))
    x, h0, c0, lengths = (v if v is None else v.contiguous() for v in (x, h0, c0, lengths))  # type: ignore[assignment]
    kept, found = lstm.__dict__.get(slot), None
    if isinstance(kept, fused.Prepared) and kept.stands(lstm._parameters):  # noqa: SLF001
        found = kept.run(x, h0, c0, lengths, resets, batch_first=options.batch_first)
    if found is None:
        names = lstm._flat_weights_names  # noqa: SLF001
        prepared = fused.Prepared(parameters, x.size(2), storage=options.storage, names=names, choices=lstm.choices)
        lstm.__dict__[slot] = prepared if prepared.lasting else None
        found = prepared.run(x, h0, c0, lengths, resets, batch_first=options.batch_first, fresh=True)
    output, h_n, c_n = cast("tuple[Tensor, Tensor, Tensor]", found)
    return output, (h_n, c_n)


def _keep_for_training(
    lstm: LayeredLSTM, parameters: Sequence[Sequence[tuple[Tensor, ...]]], options: LayerOptions, *, plain: bool
) -> None:
    """Let later calls that are like a plain one with gradients go to the CPU kernel past all of this."""
    slot = KEPT_FOR_TRAINING[options.storage == TRAINED]
    kept = lstm.__dict__.get(slot)
    dropped = lstm.dropout and lstm.training and lstm.num_layers > 1
    if not plain or dropped or options.storage not in {"fp32", TRAINED}:
        return
    if kept and kept.stands(lstm._parameters):  # noqa: SLF001
        return
    flat = [value for layer in parameters for own in layer for value in own]
    now = lstm._parameters.values()  # noqa: SLF001
    own = len(now) == len(flat) and all(one is other for one, other in zip(now, flat, strict=True))
    # A parameter that was computed would hold what it was computed from.
    lasting = all(value.is_contiguous() and value.is_leaf for value in flat)
    if own and lasting and options.batch_first is lstm.batch_first:
        lstm.__dict__[slot] = fused.PreparedTraining(parameters, options, lstm.choices)


def _graphed(
    lstm: LayeredLSTM,
    x: Tensor,
    hx: State | None,
    parameters: Sequence[Sequence[tuple[Tensor, ...]]],
    options: LayerOptions,
) -> tuple[Tensor, State]:
    """All layers on a GPU, by what an earlier call settled where that still holds."""
    from .graphed_layers import GraphedLayers  # noqa: PLC0415 - only used on a GPU

    # Of a module that was moved by its parameters' `.data`; it would be asked in vain at every call.
    for slot in KEPT_FOR_TRAINING:
        lstm.__dict__.pop(slot, None)
    kept = lstm.__dict__.get("_kept")
    if not isinstance(kept, GraphedLayers) or not kept.stands(lstm._parameters):  # noqa: SLF001
        kept = GraphedLayers(parameters, lstm.hidden_size, lstm._flat_weights_names, lstm.tf32)  # noqa: SLF001
        lstm.__dict__["_kept"] = kept
    output, h_n, c_n = kept.run(x, hx, options, lstm.choices)
    return output, (h_n, c_n)


def torchs_own(
    lstm: LayeredLSTM, x: Tensor, hx: State | None, lengths: Tensor | None, name: str
) -> tuple[Tensor, State]:
    """Run torch's own LSTM by the name of `dispatch.VENDORS` that was chosen; arguments as for `run`."""
    found: tuple[Tensor, State]
    if name == dispatch.PADDED and x.size(0 if lstm.batch_first else 1):
        found = torch_runner(padded_vendor).run(lstm, x, hx)
    elif lengths is None:
        found = torch_runner().run(lstm, x, hx)
    else:
        found = torch_runner().run_padded(lstm, x, hx, lengths)
    return found


def torch_runner(module: Any = vendor) -> Any:
    """A module that runs torch's own LSTM: while something is traced, the part of it that Dynamo must not touch."""
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


def casts_itself(lstm: LayeredLSTM, x: Tensor, hx: State | None) -> bool:
    """Return whether the CPU kernel can round to bfloat16 itself: float32 weights in a plain eager call.

    For calls under autocast to bfloat16, which makes the result of a parametrization bfloat16 too.

    Args:
        lstm: holds the parameters and options.
        x: its input.
        hx: its state.
    """
    if x.device.type != "cpu" or x.dtype not in {torch.float32, torch.bfloat16} or lstm.weight_storage != "fp32":
        return False
    flat = [value for layer in range(lstm.num_layers) for own in lstm._parameters_of(layer) for value in own]  # noqa: SLF001
    return all(value.dtype == torch.float32 for value in flat) and unwatched([x, *(hx or ()), *flat], autocast=True)


def left_over(choice: dispatch.Choice, problem: Problem, weights: torch.dtype) -> str | None:
    """Reason why torch's own LSTM cannot serve a call on a CPU that was left to it or to the loop; None elsewhere.

    Under autocast torch calls oneDNN whether it has an LSTM of that type on this CPU or not. Packed and empty batches
    go past oneDNN.

    Args:
        choice: what was chosen.
        problem: the recurrence.
        weights: type of the module's weights.
    """
    if problem.device != "cpu" or problem.dtype not in fused.CONVERTED:
        return None
    if choice.implementation != "vendor":
        return choice.refused.get("vendor") if choice.implementation == "loop" else None
    native = weights == problem.dtype and autocast_dtype(torch.device("cpu")) is None
    if native or problem.masked or not problem.batch or not torch.backends.mkldnn.enabled:
        return None
    return vendor.onednn_refusal(problem.dtype, training=problem.saves)


def computed_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Type that products have: that of the input, or autocast's, which does not touch float64."""
    return dtype if dtype == torch.float64 else autocast_dtype(device) or dtype


def matmul_precision() -> str:
    """Precision of torch's own products in float32: `none` or `ieee`, or `tf32`."""
    if torch.compiler.is_compiling():
        from .graph_breaks import matmul_precision  # noqa: PLC0415 - imports Dynamo

        return str(matmul_precision())
    return str(torch.backends.cuda.matmul.fp32_precision)
