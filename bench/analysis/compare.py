"""Two runs compared with each other: cases paired by identity, each with a change, its interval and a verdict.

Two runs are made at different times, and a shared machine may be half as fast an hour later. So a case is by default
compared by its speedup, the time relative to the reference of the same rounds: what drifts cancels. The reference then
is the yardstick, shown and never judged. `by="time"` compares the times themselves.

Every figure is made from the raw samples of both runs. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from bench.analysis import comparability as comparable
from bench.analysis.comparability import Difference
from bench.analysis.intervals import CONFIDENCE, Interval, independent_ratio_interval
from bench.errors import UsageError
from bench.plan.cases import REFERENCE
from bench.plan.identity import CaseKey
from bench.records.raw_csv import SAMPLES
from bench.records.reader import RecordedRun, planned_cases, read_run
from bench.records.rounds import Floats
from bench.records.schema import Record, Status

BY = ("speedup", "time")
MARGIN = 0.02

#: Workload, mode, device, threads, variant; no threads where runs of different counts are compared by force.
#: BASE and NEW.
Runs = tuple[RecordedRun, RecordedRun]


class CaseVerdict(enum.StrEnum):
    """Verdict on a case."""

    BROKEN = "broken"
    SLOWER = "slower"
    FASTER = "faster"
    UNCLEAR = "unclear"
    SAME = "same"
    YARDSTICK = "yardstick"
    FIXED = "fixed"
    ONLY_BASE = "only in BASE"
    ONLY_NEW = "only in NEW"
    NEITHER = "ok in neither"


class Finding(enum.IntEnum):
    """Result of `--fail-on`, from good to bad; FINE also where it was not asked for."""

    FINE = 0
    UNCLEAR = 1
    REGRESSION = 2


#: Verdicts that come from an interval.
JUDGED = (CaseVerdict.FASTER, CaseVerdict.SLOWER, CaseVerdict.SAME, CaseVerdict.UNCLEAR)


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
        by: of `BY`.
        margin: how far from 1 a change is still the same, as a share.
        threshold: how much longer a case may take before it is a regression, as a share; None for any.
        force: compare what is not comparable.
    """

    by: str = "speedup"
    margin: float = MARGIN
    threshold: float | None = None
    force: bool = False


@dataclass(frozen=True)
class CasePair:
    """One case in both runs.

    Attributes:
        by: what was compared: of `BY`, or empty where nothing was.
        base_value, new_value: medians over rounds: speedups, or seconds.
        change: above 1 is faster; with its 95 % interval.
        holds: whether the change still excludes 1 when all comparisons of the two runs are allowed for.
        note: why there is no verdict, or not the one asked for.
        unfinished: whether NEW was to measure the case and has no record of it.
    """

    key: CaseKey
    base: Record | None
    new: Record | None
    verdict: CaseVerdict
    by: str = ""
    base_value: float | None = None
    new_value: float | None = None
    change: Interval | None = None
    holds: bool = False
    note: str = ""
    unfinished: bool = False

    def regressed(self, threshold: float) -> bool:
        """Return whether the case broke, or is slower by more than the threshold and certainly so."""
        if self.verdict is CaseVerdict.BROKEN:
            return True
        slower = self.verdict is CaseVerdict.SLOWER and self.holds and self.change is not None
        return slower and self.change is not None and 1 / self.change.value - 1 > threshold

    def unclear(self, threshold: float) -> bool:
        """Return whether a slowdown by more than the threshold is neither found nor excluded.

        Found is what `regressed` says. Excluded it is by an interval that ends before the threshold, or that lies
        within the margin, which is the user's own word for the same.
        """
        if self.verdict not in JUDGED or self.change is None:
            return self.unfinished
        could_be = self.verdict is not CaseVerdict.SAME and 1 / self.change.low - 1 > threshold
        return could_be and not self.regressed(threshold)


@dataclass(frozen=True)
class Mean:
    """Geometric mean of a variant's changes over its groups; above 1 is faster."""

    variant: str
    by: str
    change: Interval
    cases: int


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a run with its base.

    Attributes:
        differences: in what should agree; empty unless forced.
        warnings: differences that may matter.
        plugins: differences between the plugins, where the change that is looked for may be.
    """

    base: RecordedRun
    new: RecordedRun
    options: CompareOptions
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    plugins: tuple[str, ...]
    pairs: tuple[CasePair, ...]

    @property
    def judged(self) -> tuple[CasePair, ...]:
        """The pairs with a verdict from an interval."""
        return tuple(pair for pair in self.pairs if pair.verdict in JUDGED)

    @property
    def regressions(self) -> tuple[CasePair, ...]:
        """Cases that `--fail-on` fails on; empty without a threshold."""
        threshold = self.options.threshold
        return () if threshold is None else tuple(pair for pair in self.pairs if pair.regressed(threshold))

    @property
    def unclear(self) -> tuple[CasePair, ...]:
        """Cases of which `--fail-on` cannot tell whether they regressed; empty without a threshold."""
        threshold = self.options.threshold
        return () if threshold is None else tuple(pair for pair in self.pairs if pair.unclear(threshold))

    @property
    def outcome(self) -> Finding:
        """The answer to `--fail-on`; a regression that was found decides, and without any judged case it is open."""
        if self.regressions:
            return Finding.REGRESSION
        asked = self.options.threshold is not None
        return Finding.UNCLEAR if asked and (self.unclear or not self.judged) else Finding.FINE

    @property
    def moved(self) -> tuple[CasePair, ...]:
        """Yardsticks whose own time certainly moved by more than the threshold (without one, the margin)."""
        allowed = self.options.margin if self.options.threshold is None else self.options.threshold
        reach = math.log1p(allowed)
        found = [(p, p.change) for p in self.pairs if p.verdict is CaseVerdict.YARDSTICK and p.change]
        sure = [(p, change) for p, change in found if not change.low <= 1 <= change.high]
        return tuple(pair for pair, change in sure if abs(math.log(change.value)) > reach)

    @property
    def means(self) -> tuple[Mean, ...]:
        """One geometric mean a variant, of what was compared as asked; the reference's is of its times."""
        found: dict[tuple[str, str], list[Interval]] = {}
        for pair in self.pairs:
            yardstick = pair.verdict is CaseVerdict.YARDSTICK
            if pair.change is not None and (yardstick or pair.by == self.options.by):
                found.setdefault((pair.key.variant, pair.by), []).append(pair.change)
        return tuple(Mean(*key, geometric_mean(changes), len(changes)) for key, changes in found.items())


def load(path: Path) -> RecordedRun:
    """Read a run folder that has what a comparison needs.

    Raises:
        UsageError: see `bench.records.reader.read_run`; or a case is ok and there are no raw samples at all.
    """
    run = read_run(path)
    if not run.samples and any(record.status is Status.OK for record in run.records):
        msg = f"{path / SAMPLES.name} is missing or empty; expected the raw samples that `bench run` writes"
        raise UsageError(msg)
    return run


def compare(base: RecordedRun, new: RecordedRun, options: CompareOptions) -> Comparison:
    """Compare a run with its base.

    Raises:
        UsageError: the runs have no case in common, or they are not comparable and `options.force` does not say to
            compare them anyway.
    """
    counts = comparable.threads(base.records), comparable.threads(new.records)
    # Forced, one thread is compared with two; otherwise threads are part of what a case is.
    across = options.force and len(counts[0]) == len(counts[1]) == 1
    sides = [
        {record.key.at_any_threads if across else record.key: record for record in run.records} for run in (base, new)
    ]
    shared = [(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
    found = _differences(base, new, shared)
    if found and not options.force:
        what = "; ".join(map(str, found))
        msg = (
            f"{base.path} and {new.path} are not comparable: {what}; --force compares them anyway and marks the result"
        )
        raise UsageError(msg)
    if not shared:
        msg = f"{base.path} and {new.path} have no case in common; expected runs of the same workloads and threads"
        raise UsageError(msg)
    pairs = [_pair(key, sides[0].get(key), sides[1].get(key), (base, new), options) for key in {**sides[0], **sides[1]}]
    environments = base.environment, new.environment
    warned, plugins = comparable.warnings(*environments), comparable.plugins(*environments)
    return Comparison(base, new, options, found, warned, plugins, allow_for_all(_unfinished(pairs, new)))


def verdict(change: Interval, margin: float) -> CaseVerdict:
    """`same` inside the margin, else `faster` or `slower` where the interval excludes 1, else `unclear`."""
    if 1 - margin <= change.low and change.high <= 1 + margin:
        return CaseVerdict.SAME
    if change.low > 1:
        return CaseVerdict.FASTER
    return CaseVerdict.SLOWER if change.high < 1 else CaseVerdict.UNCLEAR


def chance(change: Interval) -> float:
    """Probability of a change so far from 1 if nothing changed, between 0 and 1.

    Read off the 95 % interval: its reach towards 1 is taken for 1.96 standard errors of the logarithm.
    """
    distance = abs(math.log(change.value))
    near = change.low if change.value > 1 else change.high
    # An end that lies on the value itself says nothing on that side; then the whole width must.
    reach = abs(math.log(change.value / near)) or math.log(change.high / change.low) / 2
    if reach == 0:
        return 0.0 if distance else 1.0
    return float(2 * stats.norm.sf(distance / reach * stats.norm.ppf((1 + CONFIDENCE) / 2)))


def allow_for_all(pairs: Sequence[CasePair]) -> tuple[CasePair, ...]:
    """The pairs, marked where their change holds by Holm's procedure over all that were judged.

    Of 40 cases of identical code one is `slower` by its own 95 % interval. With Holm's steps the chance that any of
    them is marked is 5 % at most.
    """
    judged = [
        (chance(pair.change), place) for place, pair in enumerate(pairs) if pair.change and pair.verdict in JUDGED
    ]
    holding = set()
    for step, (probability, place) in enumerate(sorted(judged)):
        if probability > (1 - CONFIDENCE) / (len(judged) - step):
            break
        holding.add(place)
    return tuple(dataclasses.replace(pair, holds=place in holding) for place, pair in enumerate(pairs))


def geometric_mean(changes: Iterable[Interval]) -> Interval:
    """Geometric mean; its interval adds the parts' in quadrature, since every group has processes of its own."""
    logs = np.log([[change.value, change.low, change.high] for change in changes])
    value = logs[:, 0].mean()
    down, up = (np.sqrt(((logs[:, side] - logs[:, 0]) ** 2).sum()) / len(logs) for side in (1, 2))
    return Interval(*(float(np.exp(log)) for log in (value, value - down, value + up)))


def _differences(
    base: RecordedRun, new: RecordedRun, shared: Sequence[tuple[Record, Record]]
) -> tuple[Difference, ...]:
    """All that should agree and does not."""
    found = list(comparable.differences(base.environment, new.environment))
    counts = comparable.threads(base.records), comparable.threads(new.records)
    if counts[0] != counts[1]:
        found.append(Difference("threads", *(", ".join(map(str, side)) for side in counts)))
    for one, other in shared:
        found += comparable.problem_differences(one, other)
    return tuple(found)


def _pair(key: CaseKey, base: Record | None, new: Record | None, runs: Runs, options: CompareOptions) -> CasePair:
    if base is None or new is None:
        there = base or new
        note = "" if there is None or there.status is Status.OK else f"{there.status}: {there.reason}"
        return CasePair(key, base, new, CaseVerdict.ONLY_NEW if base is None else CaseVerdict.ONLY_BASE, note=note)
    fine = [record.status is Status.OK for record in (base, new)]
    if all(fine):
        return _measured(key, (base, new), runs, options)
    told = new if fine[0] or not fine[1] else base
    found = CaseVerdict.BROKEN if fine[0] else CaseVerdict.FIXED if fine[1] else CaseVerdict.NEITHER
    return CasePair(key, base, new, found, note=f"{'was ' * (told is base)}{told.status}: {told.reason}")


def _unfinished(pairs: Sequence[CasePair], new: RecordedRun) -> list[CasePair]:
    """The pairs, marked where NEW was begun for a case that is ok in BASE and ended before it was recorded."""
    planned = planned_cases(new.path)
    return [
        dataclasses.replace(pair, unfinished=True)
        if pair.new is None and pair.base and pair.base.status is Status.OK and pair.base.key in planned
        else pair
        for pair in pairs
    ]


def _measured(key: CaseKey, records: tuple[Record, Record], runs: Runs, options: CompareOptions) -> CasePair:
    """The pair of a case that is ok in both runs."""
    variant = key.variant
    groups = [run.group(record) for run, record in zip(runs, records, strict=True)]
    yardstick = options.by == "speedup" and variant == REFERENCE
    by, note, sides, of = "time", "", [group.times(variant) for group in groups], [variant]
    if options.by == "speedup" and not yardstick:
        ratios = [group.ratios(REFERENCE, variant) for group in groups]
        if all(ratios):
            by, sides, of = "speedup", ratios, [REFERENCE, variant]
        else:
            where = " and ".join(name for name, found in zip(("BASE", "NEW"), ratios, strict=True) if not found)
            note = f"by time: no reference in {where}"
    # Disturbed rounds that had to be used narrow no interval, in either run.
    stretch = max(group.stretch(*of, elsewhere=True) for group in groups)
    change = faster_by(sides[0], sides[1], by).widened(stretch)
    found = CaseVerdict.YARDSTICK if yardstick else verdict(change, options.margin)
    base_value, new_value = (float(np.median(np.concatenate(side))) for side in sides)
    return CasePair(key, *records, found, by, base_value, new_value, change, note=note)


def faster_by(base: Sequence[Floats], new: Sequence[Floats], by: str) -> Interval:
    """The change, above 1 for faster: a larger speedup or a smaller time."""
    return independent_ratio_interval(new, base) if by == "speedup" else independent_ratio_interval(base, new)
