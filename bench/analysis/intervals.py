"""Figures and their doubt: percentiles of calls and ratios of times, with 95 % intervals that hold the truth.

All intervals come from one bootstrap, over processes (seatings: full sets of worker processes) and then over the rounds
inside each. Three things that a plain one would overlook are in it, and `python -m bench.analysis.derive_intervals`
shows what each is worth:

- **Rounds go together.** Calls of one round share its luck, and a round resembles the one before. So rounds are
  resampled whole, and only as many of them as say something new: the effective sample size of their indicators, as
  Markov chain Monte Carlo counts it (Vehtari et al. 2021, with Geyer's initial monotone sequence). A steady drift
  within a process is separated from chance and taken out first, since the rounds cover it evenly.
- **Processes differ, and there are few.** Two or three cannot be resampled to any purpose, so the part of their spread
  that the rounds do not explain is drawn from a t distribution instead.
- **High percentiles have few calls above them.** What is resampled is the share of calls below the percentile, and the
  interval is read off the ordered calls (Woodruff 1952). Of independent calls that is the order-statistic interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bench.records.rounds import Floats

CONFIDENCE = 0.95
RESAMPLES = 1000
#: A process's drift counts as one beyond this many standard errors.
DRIFT_ERRORS = 3.0
#: Least rounds of a process in which a drift is looked for.
DRIFT_ROUNDS = 6
#: Quantile of the spread that rounds alone would give to processes: what lies beyond it is laid to the processes.
#: Lower, and intervals grow where processes are alike; higher, and they miss where these differ as much as rounds let
#: them.
ALIKE = 0.5
#: A drift that is taken out makes rounds say more than as many without; not more than this many times.
MOST_GAIN = 5.0
#: Ends of an interval are at most so far from its value, in logarithms: further, and they would be 0 or infinite.
FURTHEST = 300.0


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width as a share of the value."""
        return (self.high - self.low) / 2 / self.value if self.value else float("inf")

    def widened(self, factor: float) -> Interval:
        """Return the figure (above 0) with interval ends `factor` times as far away, in logarithms."""
        return _around(self.value, factor * math.log(self.low / self.value), factor * math.log(self.high / self.value))


def percentile(processes: Sequence[Sequence[Floats]], share: float, seed: int = 0) -> Interval | None:
    """A percentile of all calls with its interval, or None when the calls cannot bound it.

    Even independent calls bound a percentile on both sides only from `(1 - confidence) / 2 >= max(share, 1 - share) **
    n` on: 6 calls for the median, 36 for the 90th, 72 for the 95th and 368 for the 99th percentile. Calls that go
    together need more: None too when too many resamples have no call beyond the percentile.

    Args:
        processes: of each the rounds, of each the calls: seconds, above 0; no round is empty.
        share: between 0 and 1, as 0.99.
        seed: of the resampling.
    """
    flat = [_Process.of(rounds) for rounds in processes if len(rounds)]
    if sum(len(p.logs) for p in flat) < least_calls(share):
        return None
    value = float(np.quantile(np.concatenate([calls for rounds in processes for calls in rounds]), share))
    low, high = _ends(*_resampled(flat, share, _Own(np.random.default_rng(seed))))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return _around(value, low, high)


def least_calls(share: float) -> int:
    """Independent calls that bound a percentile on both sides by their order statistics."""
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(max(share, 1 - share)))


def ratio_interval(ratios: Sequence[Floats], seed: int = 0) -> Interval:
    """Median of paired ratios over all rounds, with a bootstrap interval over processes, then rounds.

    A single process says nothing about how processes differ: its interval is about this process's rounds only, and
    misses the ratio of processes at large as often as they differ.

    Args:
        ratios: one array per process, each the rounds' ratios in their order, above 0; none empty, and at least two
            rounds in all. Below 6 in all the interval reaches from the least to the largest and holds less than 95 %.
        seed: of the resampling, so that a report can be made again to the digit.
    """
    flat = [_Process.of_singles(values) for values in ratios]
    low, high = _resampled(flat, 0.5, _Own(np.random.default_rng(seed)), bounded=False)
    return _around(float(np.median(np.concatenate(list(ratios)))), *_ends(low, high))


def independent_ratio_interval(base: Sequence[Floats], new: Sequence[Floats], seed: int = 0) -> Interval:
    """Ratio of the median times of two runs that shared no rounds, base over new: above 1 where new is faster.

    Both sides are resampled as in `ratio_interval`, each by itself. Whatever the machine did differently during the two
    runs as a whole is in the ratio and not in its interval.

    Args:
        base: one array per process of the earlier run, each the rounds' times in their order, seconds, above 0; none
            empty.
        new: the same of the later run; the number of processes and of rounds may differ.
        seed: of the resampling.
    """
    draws = _Own(np.random.default_rng(seed))
    sides = [[_Process.of_singles(values) for values in side] for side in (base, new)]
    (base_low, base_high), (new_low, new_high) = (_resampled(s, 0.5, draws, bounded=False) for s in sides)
    value = float(np.median(np.concatenate(list(base))) / np.median(np.concatenate(list(new))))
    return _around(value, *_ends(base_low - new_high, base_high - new_low))


def joint_resamples(figures: Sequence[Sequence[Sequence[Floats]]], share: float, seed: int = 0) -> Floats:
    """Resampled percentiles of several figures of the same rounds, as logarithms over each percentile itself.

    Each is resampled as its own interval is. All see the same rounds drawn, and the same processes: what disturbed a
    round, or is particular to a process, moves all figures together, so that a difference of two has its own doubt.

    Args:
        figures: of each the processes, of each the rounds, of each the values: above 0; no round or figure is empty.
            The processes of all figures are the same, in the same order; one that gives a figure nothing is empty.
        share: of the percentile, between 0 and 1.
        seed: of the resampling.

    Returns:
        (figures, `RESAMPLES`).
    """
    shared = _Shared.of(np.random.default_rng(seed), max(len(processes) for processes in figures))
    found = []
    for processes in figures:
        giving = [number for number, rounds in enumerate(processes) if len(rounds)]
        flat = [_Process.of(processes[number]) for number in giving]
        low, high = _resampled(flat, share, shared.only(giving), bounded=False)
        found.append((low + high) / 2)
    return np.array(found)


class _Own:
    """Random draws for a single figure."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def rounds(self, _process: int, count: int, drawn: int) -> NDArray[np.int64]:
        """Numbers of the rounds drawn for each resample, (RESAMPLES, drawn)."""
        return self._generator.integers(0, count, (RESAMPLES, drawn))

    def levels(self, off: Floats, spread: float) -> Floats:
        """Errors of the mean of levels that spread so far, as a few processes estimate it, (RESAMPLES,)."""
        return np.asarray(self._generator.standard_t(len(off) - 1, RESAMPLES) * spread)


@dataclass(frozen=True)
class _Shared:
    """Random draws that several figures of the same processes and rounds share.

    Attributes:
        seeds: of the rounds drawn, one per process.
        sides: normal, (RESAMPLES, processes).
        squares: of each number of degrees of freedom from 1 on a chi-square draw, (RESAMPLES, processes - 1).
    """

    seeds: NDArray[np.int64]
    sides: Floats
    squares: Floats

    @classmethod
    def of(cls, generator: np.random.Generator, processes: int) -> Self:
        """Draw for this many processes."""
        squares = np.square(generator.standard_normal((RESAMPLES, max(1, processes - 1))))
        sides = generator.standard_normal((RESAMPLES, processes))
        return cls(generator.integers(0, 2**32, processes), sides, np.cumsum(squares, axis=1))

    def only(self, processes: Sequence[int]) -> Self:
        """The draws of some of the processes, which are numbered anew."""
        return dataclasses.replace(self, seeds=self.seeds[processes], sides=self.sides[:, processes])

    def rounds(self, process: int, count: int, drawn: int) -> NDArray[np.int64]:
        """Draw as `_Own` does, but every figure gets the same draws of a process; one figure may need more of them."""
        drawn_at = np.random.default_rng(self.seeds[process]).random((drawn, RESAMPLES))
        return np.asarray((drawn_at.T * count).astype(np.int64))

    def levels(self, off: Floats, spread: float) -> Floats:
        """Draw from a t distribution as `_Own` does, in the direction in which this figure's processes differ."""
        apart, free = off - off.mean(), len(off) - 1
        sides = self.sides / np.sqrt(self.squares[:, free - 1 : free] / free)
        return np.asarray(spread * (sides @ (apart / np.linalg.norm(apart))))


@dataclass(frozen=True)
class _Process:
    """The values of a process: their logarithms round by round, and where each round starts."""

    logs: Floats
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rounds: Sequence[Floats]) -> _Process:
        sizes = [len(calls) for calls in rounds]
        return cls(np.log(np.concatenate(list(rounds))), np.cumsum([0, *sizes[:-1]]))

    @classmethod
    def of_singles(cls, values: Floats) -> _Process:
        return cls(np.log(values), np.arange(len(values)))

    def below(self, level: float) -> Floats:
        """Share of each round's calls below a level; calls on it count half."""
        marks = (self.logs < level) + 0.5 * (self.logs == level)
        return np.asarray(np.add.reduceat(marks, self.starts) / np.diff(self.starts, append=len(self.logs)))


def _around(value: float, low: float, high: float) -> Interval:
    """An interval from the logarithms of its ends over the value; it always holds its own value."""
    low, high = max(low, -FURTHEST), min(high, FURTHEST)
    return Interval(value, value * math.exp(min(0.0, low)), value * math.exp(max(0.0, high)))


def _ends(low: Floats, high: Floats) -> tuple[float, float]:
    """Lower end of the resamples' lower values, upper end of their upper ones."""
    outside = int((1 - CONFIDENCE) / 2 * len(low))
    return float(np.sort(low)[outside]), float(np.sort(high)[-1 - outside])


def _resampled(
    processes: Sequence[_Process], share: float, draws: _Own | _Shared, *, bounded: bool = True
) -> tuple[Floats, Floats]:
    """Resampled percentiles, as logarithms over the percentile itself.

    Args:
        processes: not empty.
        share: of the percentile.
        draws: of the resampling.
        bounded: say that a percentile beyond all values is infinite, rather than the outermost value.

    Returns:
        The values on both sides of each resampled percentile.
    """
    sizes = np.array([len(p.logs) for p in processes])
    own = np.array([np.quantile(p.logs, share) for p in processes])
    off = own - np.quantile(np.concatenate([p.logs for p in processes]), share)
    values, middle = _aligned(processes, own, share)
    marks = [p.below(level + middle) for p, level in zip(processes, own, strict=True)]
    shares = _resampled_shares(marks, draws)
    rank = len(values) * share
    errors = [_error(values, rank + len(values) * moved) for moved in shares]

    # The median: one process that changed half-way has an error that would explain all others' spread with its own.
    own_part, between = _between(off, float(np.median(np.square(errors))))
    values, middle = _aligned(processes, own - (1 - own_part) * off, share)
    rank = rank + len(values) * (sizes / sizes.sum()) @ shares
    low, high = (np.interp(rank + side, np.arange(len(values)), values - middle) for side in (-0.75, -0.25))
    if bounded:
        low[rank < 1 - 1e-9] = -math.inf
        high[rank > len(values) - 1 + 1e-9] = math.inf
    if between:
        moved = draws.levels(off, between * math.sqrt(np.square(sizes / sizes.sum()).sum()))
        low, high = low + moved, high + moved
    return low, high


def _aligned(processes: Sequence[_Process], levels: Floats, share: float) -> tuple[Floats, float]:
    """All values in order, each process moved down by its level, and their percentile."""
    values = np.sort(np.concatenate([p.logs - level for p, level in zip(processes, levels, strict=True)]))
    return values, float(np.quantile(values, share))


def _resampled_shares(marks: Sequence[Floats], draws: _Own | _Shared) -> list[Floats]:
    """Of each process the resampled share of its calls below the percentile, less the share itself.

    Args:
        marks: share of each round's calls below it, one array per process.
        draws: of the resampling.
    """
    news = _news(marks)
    found = []
    for process, shares in enumerate(marks):
        picks = draws.rounds(process, len(shares), max(1, round(len(shares) * news)))
        found.append(shares[picks].mean(axis=1) - shares.mean())
    return found


def _error(values: Floats, ranks: Floats) -> float:
    """Standard error of a percentile: half of what the middle 68 % of its resampled ranks span."""
    ends = np.interp(np.quantile(ranks, (0.16, 0.84)) - 0.5, np.arange(len(values)), values)
    return float(ends[1] - ends[0]) / 2


def _between(off: Floats, explained: float) -> tuple[float, float]:
    """Split the processes' distance from the middle into what is their own and how far they spread.

    Args:
        off: logarithm of each process's percentile over that of all.
        explained: variance that the rounds give to a process's percentile.

    Returns:
        The share of each distance that is the process's own, and the standard deviation of what is.
    """
    free = len(off) - 1
    spread = float(off.var(ddof=1)) if free else 0.0
    if spread == 0:
        return 0.0, 0.0
    # Slow to import, and most commands compute no interval.
    from scipy import stats  # noqa: PLC0415

    rest = max(0.0, spread - explained * stats.chi2.ppf(ALIKE, free) / free)
    return math.sqrt(rest / spread), math.sqrt(rest)


def _news(marks: Sequence[Floats]) -> float:
    """Effective number of rounds over their number: below 1 where rounds resemble those before.

    Above 1 if the marks follow a drift, because the rounds sample a drift evenly, which is better than at random.
    """
    length = float(np.mean([len(m) for m in marks]))
    centred = [m - m.mean() for m in marks]
    variance = sum(float(m @ m) for m in centred) / sum(len(m) for m in centred)
    if variance == 0:
        return 1.0
    fitted = 1.0
    if length >= DRIFT_ROUNDS:
        times = [np.arange(len(m)) - (len(m) - 1) / 2 for m in centred]
        weights = [max(float(t @ t), 1.0) for t in times]
        slopes = [float(t @ m) / weight for t, m, weight in zip(times, centred, weights, strict=True)]
        drifts = [slope * t for slope, t in zip(slopes, times, strict=True)]
        noise = _long_run_variance([m - d for m, d in zip(centred, drifts, strict=True)], 2)
        sure = [s * s * weight > DRIFT_ERRORS**2 * noise for s, weight in zip(slopes, weights, strict=True)]
        centred = [m - d if real else m for m, d, real in zip(centred, drifts, sure, strict=True)]
        fitted = 1 + float(np.mean(sure))
    return min(MOST_GAIN, variance / max(_long_run_variance(centred, fitted), 1e-300))


def _long_run_variance(residuals: Sequence[Floats], fitted: float) -> float:
    """Variance of the mean of a series times its length: that of its values and twice their autocovariances.

    Lags are added in pairs while a pair stands out of the noise, none larger than the one before (Geyer 1992).

    Args:
        residuals: one series per process, each around 0.
        fitted: parameters taken out of each, which bend every autocovariance down; they are straightened again.
    """
    count = sum(len(r) for r in residuals)
    length = count / len(residuals)

    def covariance(lag: int) -> float:
        return sum(float(r[lag:] @ r[:-lag]) for r in residuals if len(r) > lag) / count

    own = sum(float(r @ r) for r in residuals) / count
    total, last, latest = own, 0, math.inf
    for lag, following in pairwise(range(1, math.ceil(length / 2))):
        if lag % 2 == 0:
            continue
        pair = covariance(lag) + covariance(following)
        if pair <= own * math.sqrt(2 / count):
            break
        latest = min(latest, pair)
        total, last = total + 2 * latest, following
    return max(own, total / max(0.25, 1 - fitted * (2 * last + 1) / length))
