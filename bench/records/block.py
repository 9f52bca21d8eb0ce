"""A timed block: what one sample is made of, shared by the worker that times it and the parent that reads it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """One timed block of calls of one variant.

    Attributes:
        calls_s: wall time of each single call, seconds.
        queued_calls: calls in the queued block; 0 on a CPU.
        queued_wall_s: wall time of the queued block, seconds.
        queued_device_s: time between the events around it, seconds.
    """

    calls_s: tuple[float, ...]
    queued_calls: int = 0
    queued_wall_s: float = 0.0
    queued_device_s: float | None = None

    @property
    def per_call_s(self) -> float:
        """Mean time of a call; of the queued block where there is one."""
        if self.queued_calls:
            return self.queued_wall_s / self.queued_calls
        return sum(self.calls_s) / len(self.calls_s)

    @property
    def typical_s(self) -> float:
        """Median time of a call, which ratios and throughput are made of.

        One interrupted call of a block does not move it: ten runs of a variant against itself were off by 1.4 % at
        most this way, by 2.8 % with the mean.
        """
        return self.per_call_s if self.queued_calls else statistics.median(self.calls_s)
