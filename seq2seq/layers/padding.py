"""Sequences of different lengths in one padded batch: who reads them, where they are, where they end.

Reader is for families whose LSTMs are called one by one. Everything here compiles under TorchScript.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Reader(nn.Module):
    """An LSTM over a padded batch, batch first: hands the lengths to one that takes them, and packs for any other.

    Args:
        lstm: `torch.nn.LSTM` or a drop-in, with `batch_first=True`.
    """

    # Read by TorchScript, which then compiles only the branch taken.
    __constants__ = ("padded",)

    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        self.lstm = lstm
        self.padded: bool = getattr(lstm, "takes_lengths", False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read all steps.

        Args:
            x: (batch, steps, features).
            state: h and c, each (layers * directions, batch, hidden size); zeros when absent.
            lengths: (batch,) int64 on the CPU, valid steps; all when absent.

        Returns:
            Outputs (batch, steps, directions * hidden size), zero past the lengths, and the final h and c.
        """
        if lengths is None:
            outputs, (hidden, cell) = self.lstm(x, state)
        elif self.padded:
            outputs, (hidden, cell) = self.lstm(x, state, lengths)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            packed_outputs, (hidden, cell) = self.lstm(packed, state)
            outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=x.size(1))
        return outputs, hidden, cell


def valid_mask(x: Tensor, lengths: Tensor) -> Tensor:
    """Mask of the steps of x (batch, steps, ...) that belong to a sequence: (batch, steps) bool, on the device of x."""
    return torch.arange(x.size(1), device=x.device) < lengths.to(x.device)[:, None]


def blank(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros past the lengths, where x (batch, steps, features) may hold what is not a number."""
    return x if lengths is None else torch.where(valid_mask(x, lengths)[..., None], x, torch.zeros_like(x))


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last valid step of x (batch, steps, ...): (batch, ...)."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.size(0), device=x.device), lengths.to(x.device) - 1]
