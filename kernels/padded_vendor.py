"""torch's own LSTM in the form in which cuDNN is fastest: one layer and direction a call, sizes rounded up with zeros.

cuDNN takes its persistent algorithm only for a single layer and direction in float16, with hidden and input size
multiples of 128, at most 1024 units, and a batch that is a multiple of 8 and at most 128 (`get_algo` in ATen's
native/cudnn/RNN.cpp). A unit whose weights are all zero has the cell input tanh(0) = 0, so its c and h stay 0 and it
changes nothing; added rows of the batch are cut off again. So the results are exact, and experts do the same before
they call cuDNN slow.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .torch_lstm import State

#: Multiples, and most units and rows, of the persistent algorithm.
UNITS, ROWS, MOST_UNITS, MOST_ROWS = 128, 8, 1024, 128
#: LSTM, in cuDNN's own numbering.
_MODE = 2
#: Types that cuDNN's LSTM takes. torch's `flatten_parameters` leaves bfloat16 out, and cuDNN then copies the weights
#: at every call.
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def padded_sizes(features: int, hidden: int, batch: int) -> tuple[int, int, int]:
    """Padded features and units, and the rows of a call; a larger batch is split.

    The persistent algorithm never takes more than 1024 units: they are rounded up to a multiple of 8, for the tensor
    cores, and the batch is not split.
    """
    units = _up(hidden, UNITS)
    if units > MOST_UNITS:
        return _up(features, ROWS), _up(hidden, ROWS), _up(batch, ROWS)
    parts = max(1, -(-batch // MOST_ROWS))
    return _up(features, UNITS), units, _up(-(-batch // parts), ROWS)


def changes(features: int, hidden: int, batch: int, *, layers: int = 1, directions: int = 1) -> bool:
    """Return whether the calls differ at all from torch's own."""
    return layers * directions > 1 or padded_sizes(features, hidden, batch) != (features, hidden, batch)


#: Padded weights by layer and direction, each with the keys that show whether they are still valid.
Kept = dict[int, Any]


def run(
    lstm: nn.RNNBase, x: Tensor, hx: State | None, *, batch_first: bool | None = None, kept: Kept | None = None
) -> tuple[Tensor, State]:
    """Run all layers and directions.

    Args:
        lstm: holds the parameters and options; without projections.
        x: three dimensions as `lstm.batch_first` says, all sequences of all steps; at least one sequence.
        hx: h and c, three dimensions each; zeros when None.
        batch_first: order of x, where it is not `lstm.batch_first`.
        kept: of the caller's, to keep padded weights in until torch counts a change of a parameter. What is written
            through `.data` is not counted and would go unseen, so by default they are padded at every call.

    Returns:
        Output, laid out as x, and the final h and c.
    """
    row_dim = 0 if (lstm.batch_first if batch_first is None else batch_first) else 1
    batch, hidden, directions = x.size(row_dim), lstm.hidden_size, 2 if lstm.bidirectional else 1
    if hx is None:
        zeros = x.new_zeros(lstm.num_layers * directions, batch, hidden)
        hx = (zeros, zeros)
    final: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in range(lstm.num_layers):
        if layer and lstm.dropout:
            x = functional.dropout(x, lstm.dropout, lstm.training)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = _weights(lstm, index, x.size(2), padded_sizes(x.size(2), hidden, batch)[:2], kept)
            state = (hx[0][index : index + 1], hx[1][index : index + 1])
            turned = x.flip(1 - row_dim) if direction else x
            output, *ends = _rows(lstm, turned, state, weights, row_dim)
            outputs.append(output.flip(1 - row_dim) if direction else output)
            for state_ends, end in zip(final, ends, strict=True):
                state_ends.append(end)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    return x, (torch.cat(final[0]), torch.cat(final[1]))


def flatten(lstm: nn.RNNBase) -> None:
    """Lay each layer's and direction's own weights out in one chunk, as cuDNN wants them per call."""
    first = next(iter(lstm.parameters()), None)
    if first is None or not _cudnn(first):
        return
    with torch.no_grad():
        for parameters in lstm.all_weights:
            weights: list[Any] = list(parameters)
            torch._cudnn_rnn_flatten_weight(  # noqa: SLF001 - what nn.LSTM itself calls
                weights, len(weights), weights[0].size(1), _MODE, lstm.hidden_size, 0, 1, lstm.batch_first, False
            )


def _cudnn(value: Tensor) -> bool:
    cudnn: Any = torch.backends.cudnn
    return value.is_cuda and value.dtype in _TYPES and bool(cudnn.enabled) and bool(cudnn.is_available())


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows(
    lstm: nn.RNNBase, x: Tensor, state: State, weights: list[Tensor], row_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer and direction, in calls of at most the rows that cuDNN takes: output, h and c (1, batch, H)."""
    batch, hidden = x.size(row_dim), state[0].size(2)
    units, features = weights[1].size(1), weights[0].size(1)
    rows = padded_sizes(x.size(2), hidden, batch)[2]
    results = []
    function: Any = torch._VF.lstm  # noqa: SLF001 - what nn.LSTM itself calls
    for start in range(0, batch, rows):
        count = min(rows, batch - start)
        missing = _up(count, ROWS) - count
        added = (0, 0, 0, missing) if row_dim else (0, 0, 0, 0, 0, missing)
        part = _widened(x.narrow(row_dim, start, count), features - x.size(2), added)
        states = [
            _widened(value.narrow(1, start, count), units - hidden, (0, 0, 0, missing)).contiguous() for value in state
        ]
        output, h, c = function(part, states, weights, lstm.bias, 1, 0.0, lstm.training, False, row_dim == 0)
        results.append((output.narrow(row_dim, 0, count)[..., :hidden], h[:, :count, :hidden], c[:, :count, :hidden]))
    if len(results) == 1:
        return results[0]
    outputs, hiddens, cells = zip(*results, strict=True)
    return torch.cat(outputs, row_dim), torch.cat(hiddens, 1), torch.cat(cells, 1)


def _widened(value: Tensor, columns: int, added: tuple[int, ...]) -> Tensor:
    """Pad with columns of zeros, and by `added` in the other dimensions; the tensor itself if nothing is added."""
    pads = (0, columns, *added[2:])
    return functional.pad(value, pads) if any(pads) else value


def _weights(lstm: nn.RNNBase, index: int, size: int, sizes: tuple[int, int], kept: Kept | None) -> list[Tensor]:
    """weight_ih (4 * units, features), weight_hh (4 * units, units) and the biases of a layer and direction."""
    features, units = sizes
    directions = 2 if lstm.bidirectional else 1
    name = f"l{index // directions}{'_reverse' if index % directions else ''}"
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if lstm.bias else ("weight_ih", "weight_hh")
    own: list[Tensor] = [getattr(lstm, f"{kind}_{name}") for kind in kinds]
    hidden = lstm.hidden_size
    if (features, units) == (size, hidden) and (not _cudnn(own[0]) or _adjacent(own)):
        return own
    needed = torch.is_grad_enabled() and any(value.requires_grad for value in own)
    # Tensors of inference mode have no count of their changes.
    if kept is None or needed or any(value.is_inference() for value in own):
        return _padded(own, features, units)
    marks = [(value.data_ptr(), value._version, value.dtype) for value in own]  # noqa: SLF001 - torch has no public name
    found = kept.get(index)
    if found is None or found[:2] != (sizes, marks) or any(map(operator.is_not, found[2], own)):
        with torch.inference_mode(False), torch.no_grad():
            found = kept[index] = (sizes, marks, own, _padded(own, features, units))
    weights: list[Tensor] = found[3]
    return weights


def _adjacent(weights: list[Tensor]) -> bool:
    """Return whether each begins where the one before ends; cuDNN would copy them at every call elsewhere."""
    return all(one.data_ptr() + one.nbytes == other.data_ptr() for one, other in itertools.pairwise(weights))


def _padded(own: list[Tensor], features: int, units: int) -> list[Tensor]:
    """The weights with zeros, parts of one chunk in cuDNN's order: matrices, then biases."""
    hidden = own[1].size(1)
    blocks = []
    for number, value in enumerate(own):
        # A gate's rows stay together: (4, H, columns) or (4, H).
        gates = value.unflatten(0, (4, hidden))
        columns = (0, (features, units)[number] - value.size(1)) if value.dim() == 2 else ()  # noqa: PLR2004
        blocks.append(functional.pad(gates, (*columns, 0, units - hidden)))
    chunk = torch.cat([block.flatten() for block in blocks])
    parts = chunk.split([block.numel() for block in blocks])
    return [part.view(4 * units, *block.shape[2:]) for part, block in zip(parts, blocks, strict=True)]
