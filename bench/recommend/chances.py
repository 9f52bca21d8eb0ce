"""Chances: how probable it is that a variant is the best of its group, from the raw rounds.

The rounds of a group are resampled for all its variants at once, as `bench.analysis.intervals` resamples them for an
interval: processes differ, rounds go together, and what a round did to one variant it mostly did to the others as
well. The probability is the share of resamples in which a variant wins. Two intervals that overlap say nothing of
this kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.analysis.intervals import CONFIDENCE, Interval, joint_resamples, percentile
from bench.recommend.question import EQUIVALENT, SURE, Objective
from bench.records.rounds import Floats, Samples


@dataclass(frozen=True)
class Chances:
    """Resampled costs of the variants of a group; a cost is what is to be small.

    Attributes:
        costs: of each variant, as measured.
        drawn: of each, (variants, resamples), in the same order.
    """

    costs: dict[str, float]
    drawn: Floats

    @property
    def best(self) -> str:
        """The variant with the least cost."""
        return min(self.costs, key=lambda name: self.costs[name])

    def of_best(self, variant: str, margin: float = 0.0) -> float:
        """Probability that a variant is the best of all, or not worse than the best by more than a margin."""
        own = self.drawn[self._place(variant)]
        return float(np.mean(own <= self.drawn.min(axis=0) * (1 + margin)))

    def within(self, variant: str, limit: float) -> float:
        """Probability that the cost of a variant is at most a limit."""
        return float(np.mean(self.drawn[self._place(variant)] <= limit))

    def excess(self, variant: str, other: str) -> Interval:
        """Cost of a variant over that of another, with the interval of the resamples."""
        quotient = self.drawn[self._place(variant)] / self.drawn[self._place(other)]
        low, high = np.quantile(quotient, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        value = self.costs[variant] / self.costs[other]
        return Interval(value, min(value, float(low)), max(value, float(high)))

    def alike(self) -> tuple[str, ...]:
        """Variants that cannot be told apart from the best, the best first.

        One that is certainly worse than the best by more than `EQUIVALENT` is left out. One that is certainly worse by
        less is as good for every purpose.
        """
        ordered = sorted(self.costs, key=lambda name: self.costs[name])
        first = self._place(ordered[0])

        def surely_worse(name: str) -> bool:
            beyond = self.drawn[self._place(name)] > self.drawn[first] * (1 + EQUIVALENT)
            return float(np.mean(beyond)) >= SURE

        return (ordered[0], *(name for name in ordered[1:] if not surely_worse(name)))

    def with_starts(self, starts_s: dict[str, float], calls: float) -> Chances:
        """Return the chances with the time of a start spread over the calls that it serves."""
        more = np.array([starts_s[name] / calls for name in self.costs])
        costs = {name: cost + extra for (name, cost), extra in zip(self.costs.items(), more, strict=True)}
        return Chances(costs, self.drawn + more[:, None])

    def only(self, names: Sequence[str]) -> Chances:
        """Return the chances of some of the variants."""
        return Chances({name: self.costs[name] for name in names}, self.drawn[[self._place(name) for name in names]])

    def _place(self, variant: str) -> int:
        return list(self.costs).index(variant)


def chances(samples: Samples, variants: Sequence[str], objective: Objective) -> Chances:
    """Costs of a call, seconds, of those variants that have enough calls for the objective.

    Median and throughput are paired: each variant's time relative to the quickest one's in the same round, so that
    what slowed a whole round down cancels. A 99th percentile has no pairs; there the rounds that were drawn are shared.

    Args:
        samples: of the group.
        variants: those that ended ok.
        objective: one of the timed ones.
    """
    if objective is Objective.P99:
        calls = {name: samples.calls(name) for name in variants}
        known = {name: found for name in variants if (found := percentile(calls[name], 0.99)) is not None}
        if not known:
            return Chances({}, np.empty((0, 0)))
        moved = joint_resamples([calls[name] for name in known], 0.99)
        stretches = [samples.stretch(name) for name in known]
        return _drawn({name: found.value for name, found in known.items()}, moved, stretches)
    if not variants:
        return Chances({}, np.empty((0, 0)))
    pace = Pace(samples, objective)
    costs = {name: pace.median_s(name) for name in variants}
    quickest = min(costs, key=lambda name: costs[name])
    paired = {name: pace.relative(name, quickest) for name in variants if name != quickest}
    others = {name: found for name, found in paired.items() if any(map(len, found))}
    medians = {quickest: costs[quickest]}
    # A median of pairs, not a quotient of medians: only in a pair did both variants meet the same disturbances.
    medians |= {name: costs[quickest] * float(np.median(np.concatenate(pairs))) for name, pairs in others.items()}
    # One time carries the doubt of the whole group's level, which no comparison inside the group depends on.
    figures = [[list(process[:, None]) for process in pairs] for pairs in others.values()]
    moved = joint_resamples(figures, 0.5) if figures else np.empty((0, 1000))
    stretches = [1.0, *(samples.stretch(name, quickest) for name in others)]
    return _drawn(medians, np.vstack([np.zeros((1, moved.shape[1])), moved]), stretches)


@dataclass(frozen=True)
class Pace:
    """Times of a call, round by round: of the timed calls, or of a queued block if throughput is asked for."""

    samples: Samples
    objective: Objective

    def median_s(self, variant: str) -> float:
        """Median over all kept rounds, seconds."""
        kept = self.samples.kept_of(variant)
        return float(np.median([self._seconds(found.blocks[variant]) for rounds in kept for found in rounds]))

    def relative(self, variant: str, other: str) -> list[Floats]:
        """Quotients of the two in the kept rounds that have both, one array per process."""
        kept = self.samples.kept(variant, other)
        pairs = [[(r.blocks[variant], r.blocks[other]) for r in rounds] for rounds in kept]
        return [np.array([self._seconds(a) / self._seconds(b) for a, b in of_process]) for of_process in pairs]

    def _seconds(self, block: object) -> float:
        calls_s = getattr(block, "calls_s", ())
        if self.objective is Objective.P50 and calls_s:
            return float(np.median(calls_s))
        return float(getattr(block, "typical_s"))  # noqa: B009


def _drawn(costs: dict[str, float], moved: Floats, stretches: Sequence[float]) -> Chances:
    """Costs with their resampled logarithms, which disturbed rounds stretch as they stretch every interval."""
    logs, factors = np.array([math.log(cost) for cost in costs.values()]), np.array(stretches)
    return Chances(costs, np.exp(logs[:, None] + np.clip(moved * factors[:, None], -50, 50)))
