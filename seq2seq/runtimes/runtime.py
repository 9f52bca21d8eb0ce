"""Base of every runtime: it is converted from a model for the shapes of its first inputs, then called.

A converted model holds a copy of the weights. So code that overwrites the model's weights must call `reload`, which
converts again at once: not later, where a timed call would pay for it, and never not at all, where results would be
those of old weights.
"""

from __future__ import annotations

import abc
import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from seq2seq.models.base import Model

#: Arguments of `Seq2Seq.run`, and what it returns.
ARGUMENTS = ("source", "target", "source_lengths", "target_lengths")
RESULTS = ("outputs", "hidden", "cell")

Inputs = tuple[Tensor | None, ...]
Results = tuple[Tensor, ...]
#: Shape and type of each argument; None for one that is not given.
Signature = tuple[tuple[torch.Size, torch.dtype] | None, ...]


@dataclass(frozen=True)
class Ran:
    """Report of a runtime about one call.

    Attributes:
        operators: how many of each operator ran, heaviest first if it reports that; empty where torch's profiler sees
            them.
        precisions: types of the products and LSTMs, most frequent first.
        threads: that it computes with.
        words: the same for people.
    """

    operators: Mapping[str, int]
    precisions: tuple[str, ...]
    threads: int
    words: str


class Runtime(abc.ABC):
    """A model of ours as another runtime executes it, inference only.

    Args:
        model: holds the weights, in fp32 on the CPU, and stays the one to load others into.
        options: the runtime's own, as the variant gives them.
    """

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        self.model, self.options = model, options
        self.signature: Signature | None = None
        self.digest = b""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the inputs: those of `Seq2Seq.run`, or those that a model of another kind has."""
        found: tuple[str, ...] = getattr(self.model, "arguments", ARGUMENTS)
        return found

    def __call__(self, *given: Tensor | None) -> Results:
        """Return outputs, h and c in new memory, as `Seq2Seq.run`. The first call converts the model for its shapes.

        Raises:
            ValueError, or the runtime's own error: for inputs of other shapes than those of the first call.
        """
        inputs = given + (None,) * (len(self.arguments) - len(given))
        if not self.digest:
            self.signature = tuple(None if value is None else (value.shape, value.dtype) for value in inputs)
            self._take_weights()
        return self.run(inputs)

    def reload(self) -> None:
        """Take over the model's weights, which were overwritten; before the first call there is nothing to do."""
        if self.digest and self.digest != digest_of(self.model.state_dict()):
            self._take_weights()

    def _take_weights(self) -> None:
        # Without a digest the next call converts again: a conversion that failed leaves no old weights in use.
        self.digest, digest = b"", digest_of(self.model.state_dict())
        # Converting reads and copies tensors that may be of the inference mode around a call, where tracing cannot be.
        with torch.inference_mode(mode=False), torch.no_grad():
            self.convert(digest)
        self.digest = digest

    def example(self) -> Inputs:
        """Inputs of the shapes that it was converted for: zeros, and lengths that fill all steps."""
        if self.signature is None:
            msg = "nothing was converted yet, so there are no shapes: call the runtime once before"
            raise RuntimeError(msg)
        if hasattr(self.model, "example"):
            own: Inputs = cast("Any", self.model).example()
            return own
        values = [None if given is None else torch.zeros(given[0], dtype=given[1]) for given in self.signature]
        for lengths, steps in ((2, 0), (3, 0 if values[1] is None else 1)):
            if (value := values[lengths]) is not None and (padded := values[steps]) is not None:
                value.fill_(padded.size(1))
        return tuple(values)

    @abc.abstractmethod
    def convert(self, digest: bytes) -> None:
        """Build what runs from the model's weights, for inputs of `signature`, in place of what was built before.

        Args:
            digest: of the weights.
        """

    @abc.abstractmethod
    def run(self, inputs: Inputs) -> Results:
        """One call of what was built."""

    @abc.abstractmethod
    def ran(self) -> Ran:
        """Description of what the runtime runs, once it was called."""


def digest_of(weights: Mapping[str, Any]) -> bytes:
    """Digest of a state_dict: equal only for equal weights."""
    found = hashlib.blake2b()
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            # What a module keeps besides tensors.
            found.update(name.encode() + pickle.dumps(value))
            continue
        found.update(f"{name}{tuple(value.shape)}".encode())
        # As bytes, since NumPy has no bfloat16.
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def count(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
