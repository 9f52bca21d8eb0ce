"""End of decoding, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seq2seq.data.tokens import END, PAD


@dataclass(frozen=True)
class Limit:
    """Limit that ends a sequence that never ends itself.

    Attributes:
        steps: tokens that it may have at most.
        ratio: tokens that it may have at most for each step of its source, rounded up. With both, the less counts.
    """

    steps: int | None = None
    ratio: float | None = None

    def of(self, source: Tensor, lengths: Tensor | None) -> Tensor:
        """Most tokens of each sequence, at least one: (batch,) int64 on the CPU.

        Raises:
            ValueError: when neither is given, or one is not above zero.
        """
        if self.steps is None and self.ratio is None:
            msg = "decoding has no limit: give max_steps, or max_ratio as a multiple of the source's length"
            raise ValueError(msg)
        if (self.steps is not None and self.steps < 1) or (self.ratio is not None and not 0 < self.ratio < math.inf):
            msg = f"max_steps is {self.steps}, max_ratio {self.ratio}; expected at least 1 step, and a ratio above 0"
            raise ValueError(msg)
        limits = torch.full((source.size(0),), self.steps or torch.iinfo(torch.int64).max)
        if self.ratio is not None:
            valid = torch.full((source.size(0),), source.size(1)) if lengths is None else lengths
            limits = limits.minimum((valid.double() * self.ratio).ceil().long().clamp(min=1))
        return limits


@dataclass(frozen=True)
class Decoded:
    """Result of decoding, one row per sequence.

    Attributes:
        tokens: (batch, longest) int64; the end token is among them where it was reached, `PAD` stands behind it.
        lengths: (batch,) int64, tokens of each, the end token counted.
        scores: (batch,) float64, log-probability of each by the model, natural logarithm; no number where the model's
            outputs are none.
        parents: (steps, batch * beam), of a beam search that was asked for its trace: which hypothesis of the step
            before each hypothesis went on from; None otherwise.
        chosen: (steps, batch * beam), in the same way: the token that it continued with.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    parents: Tensor | None = None
    chosen: Tensor | None = None

    def lists(self, end: int | None = END) -> list[list[int]]:
        """The tokens of each sequence, without the end token."""
        found = []
        for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True):
            tokens = row[:length]
            found.append(tokens[:-1] if tokens and tokens[-1] == end else tokens)
        return found

    @classmethod
    def room(cls, bounds: Tensor, longest: int) -> Decoded:
        """Room for sequences of at most (batch,) `bounds` tokens; what is never written has NaN as its score."""
        scores = torch.full(bounds.shape, math.nan, dtype=torch.float64, device=bounds.device)
        return cls(bounds.new_full((bounds.size(0), longest), PAD), torch.zeros_like(bounds), scores)

    def write(self, sequences: Tensor, tokens: Tensor, length: int, scores: Tensor) -> None:
        """Enter what ended: of (ended,) sequences the (ended, longest) tokens, all of one length."""
        self.tokens[sequences] = tokens
        self.lengths[sequences] = length
        self.scores[sequences] = scores

    def trimmed(self) -> Decoded:
        """Without the columns that are not needed."""
        return Decoded(self.tokens[:, : int(self.lengths.max())], self.lengths, self.scores)


def is_end(tokens: Tensor, end: int | None) -> Tensor:
    """Mask of the places that hold the end token."""
    return torch.zeros_like(tokens, dtype=torch.bool) if end is None else tokens == end
