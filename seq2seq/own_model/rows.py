"""The sequences of a call apart: along which dimension they lie in each input and output of an own model.

The model itself decides: for each way to take one sequence out of the inputs that sizes allow, it is called with that
sequence alone, and its results must be the parts of the results of all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seq2seq.own_model import checks, leaves, lstms
from seq2seq.own_model.errors import OwnModelError
from seq2seq.own_model.inputs import PATH, Given
from seq2seq.own_model.workload import OwnWorkload

#: Relative difference of a sequence's results alone and among others that roundings explain; anything else that a
#: dimension may be by mistake differs by much more.
NEAR = 1e-3
#: Ways to take one sequence out that are tried.
MOST_WAYS = 64
#: Path of the second part of a PackedSequence, by which one is known.
_PACKED = ".batch_sizes"
#: Pattern that stands beside a tensor with infinite places; see `seq2seq.own_model.leaves.comparable`.
_INFINITE = " infinite"


@dataclass(frozen=True)
class Rows:
    """Dimensions along which the sequences of a batch lie.

    Attributes:
        inputs: by path; an input that is not named is the same for all sequences.
        outputs: by path, as the gate names them; an output that is not named is the same for all.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    def picked(self, given: Given, places: Sequence[int]) -> Given:
        """Some sequences of inputs, in an order."""
        chosen = torch.tensor(places)

        def pick(path: str, leaf: Any) -> Any:
            if path not in self.inputs:
                return leaf
            dim = self.inputs[path]
            return leaf.index_select(dim, chosen) if isinstance(leaf, Tensor) else leaf.take(chosen.numpy(), dim)

        return dataclasses.replace(given, value=leaves.rebuilt(given.value, pick, PATH))

    def joined(self, parts: Sequence[Given]) -> Given:
        """The sequences of several inputs, one after the other; what is the same for all is that of the first.

        Raises:
            OwnModelError: they have other shapes.
        """
        found = [_arrays(part) for part in parts]

        def join(path: str, leaf: Any) -> Any:
            if path not in self.inputs:
                return leaf
            put = torch.cat if isinstance(leaf, Tensor) else np.concatenate
            try:
                return put([each[path] for each in found], self.inputs[path])
            except (KeyError, RuntimeError, ValueError) as error:
                msg = f"{path} has another shape for another seed, so the sequences of two seeds share no batch; give "
                raise OwnModelError(msg + "the same shapes for every seed") from error

        return dataclasses.replace(parts[0], value=leaves.rebuilt(parts[0].value, join, PATH))

    def output(self, name: str, together: Tensor, place: int, alone: Tensor) -> Tensor:
        """One sequence's part of an output, without the padding that the others brought.

        Args:
            name: of the output.
            together: of all sequences.
            place: of the sequence.
            alone: the output of that sequence alone, whose shape the part has where it can.
        """
        dim = self.outputs.get(name)
        if dim is not None and place < together.size(dim):
            together = together.narrow(dim, place, 1)
        return _cut(together, alone)


def _cut(value: Tensor, like: Tensor) -> Tensor:
    if value.dim() == like.dim():
        for dim, size in enumerate(like.shape):
            value = value.narrow(dim, 0, min(size, value.size(dim)))
    return value


def rows_of(workload: OwnWorkload) -> Rows:
    """Find along which dimensions the sequences of a workload's inputs and outputs lie.

    Raises:
        OwnModelError: they cannot be taken apart, so no batch can be made of single ones.
    """
    given = workload.make_batch(0)
    name, count = type(workload.own.model).__name__, workload.batch
    arrays = _arrays(given)
    if packed := next((path for path in arrays if path.endswith(_PACKED)), None):
        msg = f"{packed.removesuffix(_PACKED)} is a PackedSequence, which cannot be split for a queue; give padded "
        raise OwnModelError(msg + "sequences with their lengths, and pack them in the model with enforce_sorted=False")
    if count < 2:  # noqa: PLR2004 - one sequence shows no dimension
        msg = f"the inputs hold one sequence, so nothing shows along which dimension {name} takes several; give inputs "
        raise OwnModelError(msg + "of a batch of two sequences or more")
    call = functools.partial(_outputs, workload)
    ways = list(itertools.islice(_ways(arrays, count), MOST_WAYS))
    if not ways:
        shapes = ", ".join(f"{path} {tuple(value.shape)}" for path, value in arrays.items())
        msg = (
            f"the first LSTM of {name} reads {count} sequences, and no input has a dimension of {count} ({shapes}), so "
        )
        raise OwnModelError(msg + "the inputs cannot be taken apart into sequences")
    with torch.inference_mode():
        together = call(given)
        why = ""
        for inputs in ways:
            found, reason = _tried(call, Rows(inputs, {}), given, together, count)
            if found is not None:
                return found
            # What the first, most likely way ran into says most.
            why = why or reason
    msg = f"{name} cannot be served: its inputs cannot be split into sequences that it answers one by one; {why}"
    raise OwnModelError(msg)


def _outputs(workload: OwnWorkload, given: Given) -> tuple[dict[str, Tensor], int]:
    """The outputs of a call by path, and the sequences that its first LSTM read."""
    own = workload.own
    with lstms.watched(own.uses):
        found = checks.outputs_of(own.call(own.model, given.copy()))
        read = next(use.batch for use in own.uses if use.calls)
    return {name: value for name, value in found.items() if name not in workload.aliased}, read


def _arrays(given: Given) -> dict[str, Any]:
    """The tensors of inputs, and the NumPy arrays among them, by path."""
    found = leaves.flatten(given.value, PATH)
    return {path: leaf for path, leaf in found if isinstance(leaf, (Tensor, np.ndarray))}


def _ways(arrays: Mapping[str, Any], count: int) -> Iterator[dict[str, int]]:
    """Dimensions of all inputs that could be those of the sequences: any of the right size, or none last."""
    choices: list[list[tuple[str, int] | None]] = []
    for path, value in arrays.items():
        fitting = [(path, dim) for dim, size in enumerate(value.shape) if size == count]
        if fitting:
            choices.append([*fitting, None])
    for way in itertools.product(*choices):
        if found := dict(filter(None, way)):
            yield found


def _tried(
    call: Callable[[Given], tuple[dict[str, Tensor], int]],
    rows: Rows,
    given: Given,
    together: tuple[dict[str, Tensor], int],
    count: int,
) -> tuple[Rows | None, str]:
    """The rows with their outputs where one sequence alone gives its part of all, or why it does not."""
    results = together[0]
    outputs: dict[str, int] = {}
    try:
        singles = {}
        for place in (0, count - 1):
            singles[place], read = call(rows.picked(given, [place]))
            if read != 1:
                return None, f"a call with one sequence makes the first LSTM read {read}"
        turned, _ = call(rows.picked(given, list(range(count))[::-1]))
    except (OwnModelError, RuntimeError, IndexError) as error:
        return None, str(error)
    for name, value in results.items():
        if name.endswith(_INFINITE):
            continue
        dim = _dimension(name, value, singles, count)
        if dim is None and not all(_near(value, found.get(name)) for found in singles.values()):
            return None, (
                f"{name} (shape {tuple(value.shape)}) is not made of the results of single sequences: it depends on all"
            )
        if dim is not None:
            outputs |= {name: dim, f"{name}{_INFINITE}": dim}
            if name not in turned or not _near(turned[name].flip(dim), value):
                return None, f"{name} depends on the order of the sequences"
    return dataclasses.replace(rows, outputs=outputs), ""


def _dimension(name: str, value: Tensor, singles: Mapping[int, dict[str, Tensor]], count: int) -> int | None:
    """The dimension along which the results of single sequences lie in an output; None if there is none."""

    def fits(dim: int) -> bool:
        for place, found in singles.items():
            alone = found.get(name)
            if alone is None or alone.dim() != value.dim() or alone.size(dim) != 1:
                return False
            if not _near(_cut(value.narrow(dim, place, 1), alone), alone):
                return False
        return True

    return next((dim for dim in range(value.dim()) if value.size(dim) == count and fits(dim)), None)


def _near(value: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or value.shape != other.shape:
        return False
    difference = torch.linalg.vector_norm(value.double() - other.double())
    return bool(difference <= NEAR * torch.linalg.vector_norm(other.double()))
