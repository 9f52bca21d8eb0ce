"""Batch that a task hands to a model: source and expected output."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch, on one device.

    Attributes:
        source: (batch, source steps, features) floats or (batch, source steps) int64 tokens.
        target: what the decoder reads, same forms; None when it reads the source, as in the seed.
        source_lengths: (batch,) int64 on the CPU; None when every sequence fills all steps.
        target_lengths: the same for the target.
        expected: what the outputs are compared with, floats or tokens (see `seq2seq.models.base.loss_of`).
    """

    source: Tensor
    target: Tensor | None
    source_lengths: Tensor | None
    target_lengths: Tensor | None
    expected: Tensor

    @property
    def size(self) -> int:
        """Sequences in the batch."""
        return self.source.size(0)

    @property
    def decoded_lengths(self) -> Tensor | None:
        """Lengths of what the decoder reads, and so of the outputs: the source's where it reads that."""
        return self.source_lengths if self.target is None else self.target_lengths

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Batch:
        """A copy on `device`, what the model reads cast to `dtype` where it is real-valued; lengths stay on the CPU."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return Batch(
            source=move(self.source),
            target=None if self.target is None else move(self.target),
            source_lengths=self.source_lengths,
            target_lengths=self.target_lengths,
            # The loss is always taken in full precision, so what it compares with is not rounded.
            expected=self.expected.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the batch by name, lengths included; those that are None are left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def copy(self) -> Batch:
        """Return a copy in its own memory."""
        return dataclasses.replace(self, **{name: value.clone() for name, value in self.tensors().items()})

    def overwrite(self, other: Batch) -> None:
        """Take another batch's content, in place and past the version counters, as a write through NumPy does."""
        new = other.tensors()
        for name, value in self.tensors().items():
            value.data.copy_(new[name])

    def varied(self, generator: torch.Generator) -> Batch:
        """Return a new batch with the same lengths that takes as much work as this one.

        The steps are shuffled. Embeddings then read the same rows, so caches do not cause a difference. Since a short
        batch has few orders, the first token is also replaced by a random one, and real values are scaled at random.
        """

        def vary(value: Tensor) -> Tensor:
            steps = value.flatten(0, 1)
            shuffled = steps[torch.randperm(len(steps), generator=generator)]
            if value.is_floating_point():
                shuffled = shuffled * (0.9 + 0.2 * torch.rand(shuffled.shape, generator=generator))
            else:
                shuffled[0] = torch.randint(int(value.max()) + 1, (), generator=generator)
            return shuffled.view_as(value)

        return dataclasses.replace(
            self, source=vary(self.source), target=None if self.target is None else vary(self.target)
        )
