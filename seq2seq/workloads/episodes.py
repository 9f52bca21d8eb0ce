"""Workloads of reinforcement learning: unrolls in which episodes end and begin in the middle of the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seq2seq.data.batch import Batch
from seq2seq.workloads.workload import Workload


@dataclass(frozen=True)
class EpisodesWorkload(Workload):
    """A workload for models of `seq2seq.models.episodes`.

    Attributes:
        mean_episode: mean number of steps of an episode; each step begins one with the same probability.
    """

    mean_episode: int = 50

    def make_batch(self, seed: int) -> Batch:
        """Random floats, whose last feature is 1 where an episode begins and else 0."""
        made = super().make_batch(seed)
        generator = torch.Generator().manual_seed(seed)
        begins = torch.rand(made.source.shape[:2], generator=generator) < 1 / self.mean_episode
        made.source[:, :, -1] = begins.to(made.source.dtype)
        return made

    def refuses(self, variant: Any, mode: str) -> str | None:
        """Refuse exported programs: how many episodes a batch has depends on its values."""
        if variant.runtime is not None:
            return "how many episodes there are depends on values, which an exported program cannot follow"
        return super().refuses(variant, mode)
