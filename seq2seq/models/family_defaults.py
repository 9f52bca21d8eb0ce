"""Answers of most model families to what is asked of a config's less usual properties.

A family's config is a frozen dataclass that inherits from `FamilyDefaults`, and overrides the answers that differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Self


class FamilyDefaults(Protocol):
    """Properties of a config that few families answer otherwise."""

    @property
    def likelihood(self) -> str:
        """Key of `seq2seq.layers.likelihoods.LIKELIHOODS`: the distribution that outputs are parameters of; or ""."""
        return ""

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
        """The same sizes with dropout off: its random stream differs between implementations."""
        sizes: Any = self
        measured: Self = dataclasses.replace(sizes, dropout=0.0) if sizes.dropout else self
        return measured
