"""The layers that a Transformer is made of, each with all steps at once and, for the decoder, one step with a cache.

Products are nn.Linear, one for keys and values together, so that whatever quantises or exports nn.Linear serves them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class MultiHeadAttention(nn.Module):
    """Attention of several heads; keys and values are one tensor, (..., 2 * hidden_size), so that they are kept as one.

    Args:
        hidden_size: of what is read and given.
        heads: divide it.
        dropout: probability of dropping a value of what is given, in training. Weights are not dropped: torch's fast
            kernels would then draw other numbers than its plain ones.
    """

    __constants__ = ("heads",)

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.keys_values = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attend from x (batch, steps, hidden_size) to keys and values (batch, steps seen, 2 * hidden_size).

        Args:
            x: asks.
            keys_values: projected by `keys_values`.
            mask: broadcast to (batch, heads, steps, steps seen), True where one may look; None for everywhere.
            causal: whether no step looks at those after it.
        """
        keys, values = keys_values.chunk(2, -1)
        found = functional.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(keys), self._split(values), mask, 0.0, causal
        )
        given: Tensor = self.dropout(self.output(found.transpose(1, 2).flatten(2)))
        return given

    def _split(self, x: Tensor) -> Tensor:
        """(batch, steps, hidden_size) -> (batch, heads, steps, features of a head)."""
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two products with a GELU between them.

    Not the ReLU of Vaswani et al. 2017: its gradient is discontinuous, so rounding decides whether a unit has a
    gradient, and no bound on gradients separates a right implementation from a wrong one.
    """

    def __init__(self, hidden_size: int, units: int, dropout: float) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(hidden_size, units), nn.Linear(units, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        given: Tensor = self.dropout(self.narrow(self.dropout(functional.gelu(self.widen(x)))))
        return given


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, both pre-norm with a residual connection."""

    def __init__(self, hidden_size: int, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.norm_own, self.norm_forward = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.own = MultiHeadAttention(hidden_size, heads, dropout)
        self.feedforward = FeedForward(hidden_size, units, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, steps, hidden_size) to the same."""
        normed = self.norm_own(x)
        x = x + self.own(normed, self.own.keys_values(normed), mask, False)
        given: Tensor = x + self.feedforward(self.norm_forward(x))
        return given


class DecoderLayer(nn.Module):
    """Attention to the steps so far, attention to the source, feed-forward part."""

    def __init__(self, hidden_size: int, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.norm_own, self.norm_cross = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.norm_forward = nn.LayerNorm(hidden_size)
        self.own = MultiHeadAttention(hidden_size, heads, dropout)
        self.cross = MultiHeadAttention(hidden_size, heads, dropout)
        self.feedforward = FeedForward(hidden_size, units, dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """All steps at once: (batch, steps, hidden_size) to the same."""
        normed = self.norm_own(x)
        # Padding comes after all valid steps, so the causal mask hides it.
        x = x + self.own(normed, self.own.keys_values(normed), None, True)
        return self._rest(x, self.cross.keys_values(memory), mask)

    @torch.jit.export
    def step(self, x: Tensor, before: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step (batch, 1, hidden_size), with keys and values (steps, batch, 2 * hidden_size) of what it sees.

        Returns:
            What the layer gives for the step, and keys and values up to it.
        """
        normed = self.norm_own(x)
        seen = torch.cat([before, self.own.keys_values(normed).transpose(0, 1)])
        x = x + self.own(normed, seen.transpose(0, 1), None, False)
        return self._rest(x, source.transpose(0, 1), mask), seen

    def _rest(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.cross(self.norm_cross(x), source, mask, False)
        given: Tensor = x + self.feedforward(self.norm_forward(x))
        return given


def positions(start: int, steps: int, hidden_size: int, device: torch.device) -> Tensor:
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi, (steps, hidden_size) float32 (Vaswani et al. 2017)."""
    places = torch.arange(start, start + steps, dtype=torch.float64, device=device)[:, None]
    pairs = torch.arange((hidden_size + 1) // 2, dtype=torch.float64, device=device)
    angles = places * torch.exp(pairs * (-2 * math.log(10_000.0) / hidden_size))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :hidden_size].float()
