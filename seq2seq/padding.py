"""Sequences of different lengths in one padded batch: who reads them, where they are, where they end.

Shared by all families whose LSTMs are called one by one. Everything here compiles under TorchScript.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seq2seq.contract import check_lengths, check_steps


class Reader(nn.Module):
    """An LSTM over a padded batch, batch first: hands the lengths to one that takes them, and packs for any other.

    Args:
        lstm: `torch.nn.LSTM` or a drop-in, with `batch_first=True`.
    """

    # Read by TorchScript, which then compiles the branch taken alone.
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


def inside(lengths: Tensor, x: Tensor) -> Tensor:
    """Which steps of x (batch, steps, ...) lie inside their sequence: (batch, steps) bool, where x is."""
    return torch.arange(x.size(1), device=x.device) < lengths.to(x.device)[:, None]


def blank(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros past the lengths, where x (batch, steps, features) may hold what is no number."""
    return x if lengths is None else torch.where(inside(lengths, x)[..., None], x, torch.zeros_like(x))


def last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last valid step of x (batch, steps, ...): (batch, ...)."""
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.size(0), device=x.device), lengths.to(x.device) - 1]


def check_run(
    source: Tensor,
    target: Tensor,
    source_lengths: Tensor | None,
    target_lengths: Tensor | None,
    sizes: tuple[int, int],
    tokens: tuple[bool, bool],
) -> None:
    """Raise TypeError or ValueError for arguments of `run` that do not fit a model or each other.

    Args:
        source: as for `run`.
        target: as for `run`, present.
        source_lengths: as for `run`.
        target_lengths: as for `run`.
        sizes: features of a source step and of a target step.
        tokens: whether each is tokens instead.
    """
    check_steps("source", source, sizes[0], tokens[0])
    check_steps("target", target, sizes[1], tokens[1])
    if source.size(0) != target.size(0):
        raise ValueError(f"source has batch {source.size(0)} but target has {target.size(0)}; give both the same")
    check_lengths("source_lengths", source_lengths, source)
    check_lengths("target_lengths", target_lengths, target)
