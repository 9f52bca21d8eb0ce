"""Answers of most model families to what is asked of a config's less usual properties.

A family's config is a frozen dataclass that inherits from `FamilyDefaults`, and overrides the answers that differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Self

from seq2seq.layers.likelihoods import LIKELIHOODS


class FamilyDefaults(Protocol):
    """Properties of a config that few families answer otherwise."""

    @property
    def likelihood(self) -> str:
        """Key of `seq2seq.layers.likelihoods.LIKELIHOODS`: the distribution that outputs are parameters of; or ""."""
        return ""

    @property
    def dropout(self) -> float:
        """Probability of dropping a value between layers, in training."""
        return 0.0

    @property
    def source_vocabulary(self) -> int:
        """Tokens of the source; 0 for real-valued sources."""
        return 0

    @property
    def target_vocabulary(self) -> int:
        """Tokens fed to the decoder; 0 for real-valued targets, and where nothing is fed."""
        return 0

    @property
    def target_size(self) -> int:
        """Features of a step that the decoder is fed; for tokens the size of their embedding."""
        sizes: Any = self
        return int(sizes.input_size)

    @property
    def head_size(self) -> int:
        """Values of an output step: `output_size`, or its parameters where the outputs are distributions."""
        sizes: Any = self
        return int(sizes.output_size) * LIKELIHOODS[self.likelihood]

    @property
    def dense_parameters(self) -> int:
        """Values of the weights that every call reads, besides those of the LSTMs; no embeddings."""
        return 0

    def dense_products(self, extent: Any, *, backward: bool) -> int:
        """Least FLOPs of the matrix products besides those of the LSTMs, forward or of the backward pass."""
        del extent, backward
        return 0

    @property
    def loss_name(self) -> str:
        """Name of a loss of its own, for the axis of its curve; empty where the loss follows from the outputs."""
        return ""

    @property
    def unaligned(self) -> bool:
        """Return whether it learns labels without their places, as by CTC."""
        return False

    @property
    def blank(self) -> int:
        """The label that stands for none, where it learns labels without their places."""
        return 0

    @property
    def begin(self) -> int | None:
        """Token that decoding begins with; None for that of all families of this project."""
        return None

    @property
    def positions(self) -> int | None:
        """Most steps that it has positions for; None when any number will do."""
        return None

    @property
    def shared_embedding(self) -> str:
        """Parts that share one matrix of embeddings: both `sides`, or the `head` too; empty for none."""
        return ""

    @property
    def resets(self) -> bool:
        """Return whether sequences begin anew in the middle of its steps."""
        return False

    @property
    def scriptable(self) -> bool:
        """Return whether TorchScript compiles its model."""
        return True

    @property
    def kinked(self) -> bool:
        """Return whether its loss has gradients that jump, as ReLUs make them."""
        return False

    @property
    def uncounted(self) -> str | None:
        """Reason why its parameters and work are not known; None when they are."""
        return None

    def as_measured(self) -> Self:
        """Return the config with dropout off: its random stream differs between implementations."""
        sizes: Any = self
        measured: Self = dataclasses.replace(sizes, dropout=0.0) if sizes.dropout else self
        return measured
