"""Figures of a training over ranks: step times, efficiency, and the rank that is slower than the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.analysis.intervals import Interval
from bench.analysis.repeats import spread

#: Ratio of a rank's compute time to the others' from which on it is named, with its whole interval.
STRAGGLES = 1.1


@dataclass(frozen=True)
class Division:
    """One way to divide the work, as `bench.worker.ranks.RankSetting` has it."""

    world: int
    scaling: str
    bucket_mb: float
    accumulate: int = 1

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Division:
        """Return the division that an event of a rank belongs to."""
        return cls(event["world"], event["scaling"], event["bucket_mb"], event["accumulate"])


@dataclass(frozen=True)
class Straggler:
    """The slowest rank before the first collective: its compute time over the median of the others'."""

    rank: int
    ratio: Interval

    @property
    def named(self) -> bool:
        """Return whether it is certainly slower by more than a tenth."""
        return self.ratio.low > STRAGGLES


#: Of each division, by round and rank, medians over the steps of a turn: compute before the first collective, and all.
Turns = Mapping[Division, Mapping[int, Mapping[int, tuple[float, float]]]]


def turns(events: Sequence[dict[str, Any]]) -> Turns:
    """Sort the steps that ranks told of."""
    found: dict[Division, dict[int, dict[int, tuple[float, float]]]] = {}
    for event in events:
        if event["event"] == "steps":
            division = Division.of(event)
            medians = float(np.median(event["compute_s"])), float(np.median(event["total_s"]))
            found.setdefault(division, {}).setdefault(event["round"], {})[event["rank"]] = medians
    return found


def step_s(rounds: Mapping[int, Mapping[int, tuple[float, float]]]) -> dict[int, float]:
    """Seconds of a step by round: the slowest rank's, which all wait for."""
    return {number: max(total for _, total in ranks.values()) for number, ranks in rounds.items()}


def efficiency(found: Turns, division: Division) -> Interval | None:
    """Efficiency against one rank, each ratio formed inside a round; None without a measured single rank.

    Strong scaling: time of one rank / (ranks x time); weak scaling: time of one rank / time.
    """
    single = found.get(dataclasses.replace(division, world=1))
    if single is None:
        return None
    alone, shared = step_s(single), step_s(found[division])
    parts = division.world if division.scaling == "strong" else 1
    ratios = [alone[number] / (parts * shared[number]) for number in shared if number in alone]
    return spread(ratios)


def straggler(rounds: Mapping[int, Mapping[int, tuple[float, float]]]) -> Straggler | None:
    """The rank that computes longest before the first collective; None with one rank, or fewer than two rounds.

    The whole step says nothing of it: all ranks wait for the slowest in the collective, so all take the same time.
    """
    ranks = sorted({rank for by_rank in rounds.values() for rank in by_rank})
    if len(ranks) < 2:  # noqa: PLR2004 - no other rank to compare with
        return None
    found = []
    for rank in ranks:
        ratios = [
            by_rank[rank][0] / float(np.median([compute for other, (compute, _) in by_rank.items() if other != rank]))
            for by_rank in rounds.values()
            if rank in by_rank and len(by_rank) > 1
        ]
        if (ratio := spread(ratios)) is not None:
            found.append(Straggler(rank, ratio))
    return max(found, key=lambda one: one.ratio.value, default=None)
