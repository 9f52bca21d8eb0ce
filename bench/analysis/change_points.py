"""Change points: where the figures of a case moved for good, over runs in the order of their time.

The levels that cost least are found exactly by ruptures (kernel change point detection with a linear kernel, which is
the squared distance from a level's mean; Arlot et al. 2019). Distances are logarithms in units of the series' own
noise. A level lasts at least two runs: one run that stands out is a disturbance until another says the same. Each
change is then tested against what the runs of its two levels differ by anyway, so that a short series, whose noise is
hardly known, gets no more false changes than a long one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from bench.analysis.intervals import Interval
from bench.records.rounds import Floats

#: Runs that a level lasts at least.
LEAST = 2
#: Penalty of a level, times the logarithm of the number of runs.
PENALTY = 5.0
#: A run that differs from both its neighbours by this many times the noise stands out alone.
ALONE = 4.0
#: Largest chance that a change which is not there is kept, all places where it could be allowed for (Bonferroni).
CHANCE = 0.01
#: Largest share of series without a change that are given one, as a test counts it.
FALSE_ALARMS = 0.04
#: Noise of a series whose figures are all the same.
NO_NOISE = 1e-12
#: Standard errors on either side of a 95 % interval's middle.
ERRORS = 1.96


@dataclass(frozen=True)
class Change:
    """A change for good.

    Attributes:
        place: number of the first run at the new level.
        factor: new level over old one, with a 95 % interval.
        chance: probability that noise alone gives such a change at one of the places of the series.
    """

    place: int
    factor: Interval
    chance: float


def changes(figures: Sequence[Interval]) -> tuple[Change, ...]:
    """Change points of a series, each figure above 0 with its interval."""
    if len(figures) < 2 * LEAST:
        return ()
    logs = np.log([figure.value for figure in figures])
    own = _own_noise(figures)
    noise = _noise(logs, own)
    logs = _calmed(logs, noise)
    starts = _levels(logs / noise)
    while found := _steps(logs, starts, own):
        weakest = max(found, key=lambda change: change.chance)
        if weakest.chance <= CHANCE:
            break
        starts.remove(weakest.place)
    return found


def _own_noise(figures: Sequence[Interval]) -> float:
    """Standard error of a figure by its own interval; 0 if there is none."""
    own = [math.log(f.high / f.low) / 2 / ERRORS for f in figures if 0 < f.low < f.high]
    return float(np.median(own)) if own else 0.0


def _noise(logs: Floats, own: float) -> float:
    """Standard deviation of a figure from run to run: by the steps between neighbours, at least that of a figure."""
    # The median of steps is not moved by a few that are changes.
    between = float(np.median(np.abs(np.diff(logs)))) * 1.4826 / math.sqrt(2)
    return max(between, own, NO_NOISE)


def _calmed(logs: Floats, noise: float) -> Floats:
    """The series with every run that stands out alone moved to the nearer of its neighbours."""
    middles = np.array([np.median(logs[max(0, n - 1) : n + 2]) for n in range(len(logs))])
    middles[[0, -1]] = logs[1], logs[-2]
    return np.where(np.abs(logs - middles) > ALONE * noise, middles, logs)


def _levels(values: Floats) -> list[int]:
    """Starts of the levels that cost least."""
    import ruptures  # noqa: PLC0415 - slow to import, and only a history needs it

    search = ruptures.KernelCPD(kernel="linear", min_size=LEAST).fit(values)
    ends = cast("list[int]", search.predict(pen=PENALTY * math.log(len(values))))
    return [0, *ends[:-1]]


def _steps(logs: Floats, starts: Sequence[int], own: float) -> tuple[Change, ...]:
    """The change at each start but the first, by Student's t on the spread within all levels."""
    from scipy import stats  # noqa: PLC0415 - slow to import

    levels = [logs[start:end] for start, end in zip(starts, [*starts[1:], len(logs)], strict=True)]
    freedom = len(logs) - len(levels)
    within = math.sqrt(sum(float(((level - level.mean()) ** 2).sum()) for level in levels) / freedom)
    noise, places = max(within, own, NO_NOISE), len(logs) - 2 * LEAST + 1
    found = []
    for start, old, new in zip(starts[1:], levels, levels[1:], strict=False):
        step, error = float(new.mean() - old.mean()), noise * math.sqrt(1 / len(old) + 1 / len(new))
        reach = error * float(stats.t.ppf(0.975, freedom))
        chance = min(1.0, places * 2 * float(stats.t.sf(abs(step) / error, freedom)))
        factor = Interval(*(math.exp(x) for x in (step, step - reach, step + reach)))
        found.append(Change(start, factor, chance))
    return tuple(found)
