"""The form in which a model says that it is a chain of LSTMs which a sequence can go through a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class StreamedLSTM:
    """An LSTM that a sequence goes through a step at a time, with what stands around it.

    Attributes:
        lstm: of one direction, batch first.
        reads: `source` or `target`.
        embed: what it reads as its input: tokens (batch,) or values (batch, features) to (batch, input_size).
        head: its outputs (batch, hidden_size) as those of the model; None where none are.
        start: the state that it starts from, given the final h and c of the LSTM before it; None for that state itself.
    """

    lstm: nn.RNNBase
    reads: str
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None
    start: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
