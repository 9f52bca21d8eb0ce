"""Inputs of an own model: one set, or a mix of sets with weights, from a function or a trace of shapes.

A set is what the user's function returned: a tensor, a tuple of arguments, a dict of keyword arguments, or an object
with `args` or `kwargs`, whose other tensors (targets) travel along for the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seq2seq.own_model import leaves
from seq2seq.own_model.errors import OwnModelError, told
from seq2seq.own_model.source import seeded as seeded_generators
from seq2seq.own_model.source import takes

PATH = "inputs"
#: Key of a trace's line that is not an argument: how often such a call was served.
COUNT = "count"
#: Dimensions from which whole numbers are taken for tokens, which may be shuffled; fewer are lengths or labels.
_TOKENS = 2


@dataclass(frozen=True)
class Given:
    """One set of inputs; what `seq2seq.data.batch.Batch` is for workloads.

    Attributes:
        value: as the user's function returned it.
        held: paths of the tensors whose content is never changed: lengths, masks, and what the model cannot take
            otherwise.
        stays: paths of the tensors that stay on the CPU, whatever the device.
    """

    value: Any
    held: frozenset[str] = frozenset()
    stays: frozenset[str] = frozenset()

    @functools.cached_property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the call."""
        if isinstance(self.value, PackedSequence):
            return (self.value,)
        if isinstance(self.value, (tuple, list)):
            return tuple(self.value)
        if isinstance(self.value, Mapping):
            return ()
        if leaves.is_arguments(self.value):
            return tuple(getattr(self.value, "args", ()))
        return (self.value,)

    @functools.cached_property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        if isinstance(self.value, Mapping):
            return dict(self.value)
        return dict(getattr(self.value, "kwargs", {})) if leaves.is_arguments(self.value) else {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the inputs by path."""
        return leaves.tensors(self.value, PATH)

    def real(self) -> dict[str, Tensor]:
        """The floating-point tensors that the model is called with, by path: those that may have gradients."""
        read = {id(value) for tree in (self.args, self.kwargs) for value in leaves.tensors(tree, "").values()}
        return {name: leaf for name, leaf in self.tensors().items() if leaf.is_floating_point() and id(leaf) in read}

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Given:
        """Return the inputs with other tensors; `change` gives the new one for a path and the old one."""

        def one(path: str, leaf: Any) -> Any:
            return change(path, leaf) if isinstance(leaf, Tensor) else leaf

        return dataclasses.replace(self, value=leaves.rebuilt(self.value, one, PATH))

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Given:
        """A copy on `device`, real values cast to `dtype`; what stays on the CPU stays there."""

        def move(path: str, leaf: Tensor) -> Tensor:
            place = "cpu" if path in self.stays or path.endswith(".batch_sizes") else device
            return leaf.to(place, dtype if leaf.is_floating_point() else None)

        return self.changed(move)

    def copy(self) -> Given:
        """Return a copy in memory of its own, of NumPy arrays too."""

        def one(_: str, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.detach().clone(memory_format=torch.contiguous_format)
            return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

        return dataclasses.replace(self, value=leaves.rebuilt(self.value, one, PATH))

    def overwrite(self, other: Given) -> None:
        """Take another's content, in place and past the version counters, as a write through NumPy does.

        Raises:
            OwnModelError: for other tensors or shapes.
        """
        new = other.tensors()
        for name, value in self.tensors().items():
            if name not in new or new[name].shape != value.shape:
                found = tuple(new[name].shape) if name in new else "missing"
                msg = f"{name} has shape {tuple(value.shape)} for one seed and is {found} for another; give the same "
                raise OwnModelError(msg + "shapes for every seed, or inputs without a parameter `seed`")
            value.data.copy_(new[name])

    def varied(self, generator: torch.Generator) -> Given:
        """Other inputs that are as hard to compute: tokens shuffled, real values scaled at random, the rest held."""

        def vary(path: str, leaf: Tensor) -> Tensor:
            if path in self.held:
                return leaf.clone()
            if leaf.is_floating_point():
                return leaf * (0.9 + 0.2 * torch.rand(leaf.shape, generator=generator)).to(leaf.dtype)
            return leaf.flatten()[torch.randperm(leaf.numel(), generator=generator)].view_as(leaf)

        return self.changed(vary)


def held(given: Given) -> frozenset[str]:
    """Paths of the tensors that mean something by their exact values: lengths, labels, masks, flags."""
    return frozenset(name for name, leaf in given.tensors().items() if not _free(name, leaf))


def _free(name: str, leaf: Tensor) -> bool:
    if leaf.dtype == torch.bool or leaf.numel() == 0 or name.endswith(".batch_sizes"):
        return False
    if bool(((leaf == 0) | (leaf == 1)).all()) and not bool((leaf == 0).all()):
        return False
    return leaf.is_floating_point() or leaf.dim() >= _TOKENS or name.endswith(".data")


@dataclass(frozen=True)
class InputSet:
    """One set of a mix.

    Attributes:
        name: in the workload's name; empty for the only one.
        weight: share of all calls that are such calls.
        make: gives the set for a seed, on a device.
        seeded: whether the user's function takes the seed; otherwise there is one content, which is varied.
        placed: whether it takes the device, and so decides what stays on the CPU.
        code: Python expression of the set, of the user's function as `inputs` and of `DEVICE`.
        names: keys of the dict that was taken for a mix, this set's among them; empty for any other form.
    """

    name: str
    weight: float
    make: Callable[[int, str], Any]
    seeded: bool
    placed: bool = False
    code: str = "inputs()"
    names: tuple[str, ...] = ()

    @property
    def doubt(self) -> str:
        """Say that the dict may have been meant as the argument of one call; empty where it cannot."""
        if not self.names:
            return ""
        keys = ", ".join(self.names)
        return (
            f"; the inputs are a dict whose keys ({keys}) are no parameters of forward, so each was taken for a set of "
            "inputs: for one argument that is a dict, return a tuple of it, (inputs,)"
        )


def staying(inputs: InputSet, device: str) -> frozenset[str]:
    """Paths of the tensors that the user's function leaves on the CPU when it is asked for a device.

    Args:
        inputs: the set.
        device: any but `cpu`.
    """
    if not inputs.placed:
        return frozenset()
    found = Given(inputs.make(0, device)).tensors()
    return frozenset(name for name, leaf in found.items() if leaf.device.type == "cpu")


def input_sets(function: Any, reference: str, trace: str, forward: Any) -> tuple[InputSet, ...]:
    """The sets that a function and a trace give.

    Args:
        function: the user's.
        reference: how the command line names it.
        trace: path of JSON lines; empty for none.
        forward: of the model, whose parameters tell keyword arguments from names of sets.

    Raises:
        OwnModelError: for anything else.
    """
    seeded, placed = takes(function, "seed"), takes(function, "device")

    def call(seed: int, device: str, **arguments: Any) -> Any:
        given: dict[str, Any] = {"seed": seed} if seeded else {}
        if placed:
            given["device"] = device
        with seeded_generators(seed), told(f"{reference}"):
            return function(**arguments, **given)

    def code(arguments: Mapping[str, Any]) -> str:
        given = [f"{name}={value!r}" for name, value in (dict(arguments) | ({"seed": 0} if seeded else {})).items()]
        return f"inputs({', '.join([*given, *(['device=DEVICE'] if placed else [])])})"

    if trace:
        return _traced(trace, call, code, seeded=seeded, placed=placed)
    found = call(0, "cpu")
    entries = list(_mix(found, reference, forward))
    if entries == [("", 1.0, None)]:
        return (InputSet("", 1.0, call, seeded, placed, code({})),)

    def pick(key: Any, weighted: bool) -> Callable[[int, str], Any]:
        def one(seed: int, device: str) -> Any:
            value = call(seed, device)[key]
            return (value[-2] if isinstance(key, int) else value[0]) if weighted else value

        return one

    def picked(key: Any, weighted: bool) -> str:
        last = "" if not weighted else "[-2]" if isinstance(key, int) else "[0]"
        return f"{code({})}[{key!r}]{last}"

    total = sum(weight for _, weight, _ in entries)
    keys = tuple(map(str, found)) if isinstance(found, Mapping) else ()
    names = _names([name or _shape(pick(key, True)(0, "cpu")) for name, _, (key, _) in entries])
    return tuple(
        InputSet(name, weight / total, pick(key, weighted), seeded, placed, picked(key, weighted), keys)
        for name, (_, weight, (key, weighted)) in zip(names, entries, strict=True)
    )


def _mix(found: Any, reference: str, forward: Any) -> Iterator[tuple[str, float, Any]]:
    """Name, weight and place of each set; one without a place where there is but one."""
    if isinstance(found, list):
        for place, entry in enumerate(found):
            *name, _, weight = entry if isinstance(entry, tuple) and len(entry) in {2, 3} else ("", None, None)
            if not _is_weight(weight):
                msg = f"{reference} returned a list, so a mix: entry {place} is no (inputs, weight) nor (name, inputs, "
                raise OwnModelError(msg + "weight) with a weight above 0; return a tuple for the arguments of one call")
            yield str(name[0]) if name else "", float(weight), (place, True)
        if not found:
            msg = f"{reference} returned an empty list, expected at least one (inputs, weight)"
            raise OwnModelError(msg)
    elif isinstance(found, Mapping) and not _keywords(found, forward, reference):
        for name, entry in found.items():
            weighted = isinstance(entry, tuple) and len(entry) == 2 and _is_weight(entry[1])  # noqa: PLR2004
            yield str(name), float(entry[1]) if weighted else 1.0, (name, weighted)
    else:
        yield "", 1.0, None


def _keywords(found: Mapping[Any, Any], forward: Any, reference: str) -> bool:
    """Return whether the keys of a dict are parameters of the model, and not names of sets."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    known = [key for key in found if key in parameters]
    if known and len(known) < len(found):
        other = next(key for key in found if key not in parameters)
        msg = f"{reference} returned a dict whose key {other!r} is not a parameter of forward; there are "
        raise OwnModelError(msg + ", ".join(parameters))
    return bool(known) or not found


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _names(wanted: list[str]) -> list[str]:
    """Make names fit for the name of a workload, each unique."""
    clean = ["".join(c if c.isalnum() or c in "=,.-+x" else "-" for c in name) or "set" for name in wanted]
    seen: dict[str, int] = {}
    for place, name in enumerate(clean):
        seen[name] = seen.get(name, 0) + 1
        clean[place] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return clean


def _shape(value: Any) -> str:
    """The shape of the first tensor, as `8x32`."""
    first = next(iter(Given(value).tensors().values()), None)
    return "set" if first is None else "x".join(map(str, first.shape))


def _traced(
    trace: str, call: Callable[..., Any], code: Callable[[Mapping[str, Any]], str], *, seeded: bool, placed: bool
) -> tuple[InputSet, ...]:
    """The sets of a trace: equal lines are one set, whose weight is its share of all counts."""
    counts: dict[str, float] = {}
    arguments: dict[str, dict[str, Any]] = {}
    try:
        lines = Path(trace).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        msg = f"the trace {trace} cannot be read: {why}; expected JSON lines in UTF-8"
        raise OwnModelError(msg) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            msg = f'{trace}:{number} is not JSON ({error}); expected a line as {{"batch": 8, "steps": 32, "count": 5}}'
            raise OwnModelError(msg) from error
        count = found.pop(COUNT, 1) if isinstance(found, dict) else None
        if not _is_weight(count):
            msg = f"{trace}:{number}: expected an object with the arguments of the inputs function and a count above 0"
            raise OwnModelError(msg)
        name = ",".join(f"{key}={value}" for key, value in found.items())
        counts[name] = counts.get(name, 0.0) + float(count or 0)
        arguments[name] = found
    if not counts:
        msg = f'the trace {trace} is empty; expected a line as {{"batch": 8, "steps": 32, "count": 5}}'
        raise OwnModelError(msg)
    total = sum(counts.values())
    return tuple(
        InputSet(name, counts[key] / total, functools.partial(call, **found), seeded, placed, code(found))
        for (key, found), name in zip(arguments.items(), _names(list(counts)), strict=True)
    )
