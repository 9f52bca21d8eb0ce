"""Change points: where the figures of a case moved for good, over runs in the order of their time.

The cost of a level is the squared distance of the logarithms from their mean, in units of their noise; the levels that
cost least, a penalty for each included, are found exactly (optimal partitioning, Jackson et al. 2005). A level lasts at
least two runs: one run that stands out is a disturbance until another says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.analysis.intervals import Interval
from bench.records.rounds import Floats

#: Runs that a level lasts at least.
LEAST = 2
#: Penalty of a level, times the logarithm of the number of runs.
PENALTY = 5.0
#: A run stands out alone if it differs from both its neighbours by this multiple of the noise.
ALONE = 4.0
#: Noise of a run's figure is at least this share: the machine differs a little from day to day.
LEAST_NOISE = 0.01
#: Standard errors on either side of a 95 % interval's middle.
ERRORS = 1.96


@dataclass(frozen=True)
class Change:
    """A change for good.

    Attributes:
        place: number of the first run at the new level.
        factor: new level over old one, with a 95 % interval.
    """

    place: int
    factor: Interval


def changes(figures: Sequence[Interval]) -> tuple[Change, ...]:
    """Change points of a series, each figure above 0 with its interval."""
    if len(figures) < 2 * LEAST:
        return ()
    logs = np.log([figure.value for figure in figures])
    noise = _noise(figures, logs)
    logs = _calmed(logs, noise)
    starts = _levels(logs / noise)
    found = []
    for before, start, end in zip(starts, starts[1:], [*starts[2:], len(logs)], strict=False):
        old, new = logs[before:start], logs[start:end]
        step, error = new.mean() - old.mean(), ERRORS * noise * math.sqrt(1 / len(old) + 1 / len(new))
        found.append(Change(start, Interval(*(math.exp(x) for x in (step, step - error, step + error)))))
    return tuple(found)


def _noise(figures: Sequence[Interval], logs: Floats) -> float:
    """Standard deviation of a figure from run to run: by the steps between neighbours, or by their own intervals."""
    steps = np.abs(np.diff(logs))
    # The median of steps is not moved by a few that are changes.
    between = float(np.median(steps)) * 1.4826 / math.sqrt(2)
    own = [math.log(f.high / f.low) / 2 / ERRORS for f in figures if 0 < f.low < f.high]
    return max(between, float(np.median(own)) if own else 0.0, LEAST_NOISE)


def _calmed(logs: Floats, noise: float) -> Floats:
    """The series with every run that stands out alone moved to the nearer of its neighbours."""
    middles = np.array([np.median(logs[max(0, n - 1) : n + 2]) for n in range(len(logs))])
    middles[[0, -1]] = logs[1], logs[-2]
    return np.where(np.abs(logs - middles) > ALONE * noise, middles, logs)


def _levels(values: Floats) -> list[int]:
    """Starts of the levels that cost least."""
    count = len(values)
    sums, squares = np.concatenate([[0.0], np.cumsum(values)]), np.concatenate([[0.0], np.cumsum(values**2)])
    penalty = PENALTY * math.log(count)
    best, origin = [-penalty] + [math.inf] * count, [0] * (count + 1)
    for end in range(LEAST, count + 1):
        for start in range(end - LEAST + 1):
            if math.isinf(best[start]) and start:
                continue
            total, width = sums[end] - sums[start], end - start
            cost = best[start] + (squares[end] - squares[start]) - total**2 / width + penalty
            if cost < best[end]:
                best[end], origin[end] = cost, start
    starts, end = [], count
    while end:
        end = origin[end]
        starts.append(end)
    return starts[::-1]
