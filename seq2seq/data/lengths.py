"""Length distributions of corpora, as published: they decide how much of a batch is padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lengths:
    """A length distribution by its quantiles: length at probability 0, 0.5, 0.9, 0.99 and 1, linear between them."""

    corpus: str
    quantiles: tuple[float, float, float, float, float]

    def at(self, probability: Tensor, longest: int) -> Tensor:
        """Lengths at the given probabilities, scaled so that the distribution's longest is `longest`; int64, >= 1."""
        places = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0])
        values = torch.tensor(self.quantiles) * (longest / self.quantiles[-1])
        right = torch.searchsorted(places, probability, right=True).clamp(1, len(places) - 1)
        left = right - 1
        weight = (probability - places[left]) / (places[right] - places[left])
        return torch.lerp(values.log()[left], values.log()[right], weight).exp().round().long().clamp(1, longest)


# p50 to maximum as published for the corpora; the shortest is chosen so that the mean comes out as published.
WMT_ENGLISH = Lengths("WMT English words", (8, 21, 38, 48, 50))
WMT_GERMAN = Lengths("WMT German words", (7, 20, 36, 47, 50))
LIBRISPEECH_FRAMES = Lengths("LibriSpeech dev-clean frames", (150, 592, 1333, 2376, 3264))
LIBRISPEECH_CHARACTERS = Lengths("LibriSpeech dev-clean characters", (18, 89, 204, 367, 516))
