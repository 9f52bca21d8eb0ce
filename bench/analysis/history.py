"""The history of a folder of runs: the figures of each case in the order of time, and where they changed for good.

Runs of another machine, or with other settings of the threads, are left out by name. Other versions, drivers and
commits stay in: they are what a change is explained by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bench import units
from bench.analysis import change_points
from bench.analysis import comparability as comparable
from bench.analysis.causes import Between, Guess, between, guesses
from bench.analysis.change_points import Change
from bench.analysis.intervals import Interval
from bench.analysis.run_summary import ReportedRun, doubts, groups, load_run
from bench.errors import UsageError
from bench.plan.cases import REFERENCE
from bench.plan.identity import CaseKey, GroupKey
from bench.records.schema import Record, Status

Records = dict[CaseKey, list[Record | None]]


class MeasuredBy(StrEnum):
    """Quantity that a series is made of."""

    SPEEDUP = "speedup"
    TIME = "time"


@dataclass(frozen=True)
class Explained:
    """A change of a series for good.

    Attributes:
        change: its place among all runs, and its factor; above 1 is faster.
        before, after: the last run with a figure before it, and the first one after it.
        between: what differs between the two.
        guesses: possible causes, the likeliest first.
    """

    change: Change
    before: ReportedRun
    after: ReportedRun
    between: Between
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class CaseSeries:
    """The figures of one case.

    Attributes:
        key: of the case.
        title: of its group.
        figures: one per run; None where a run has none.
        records: likewise.
        changes: where it changed for good.
    """

    key: CaseKey
    title: str
    figures: tuple[Interval | None, ...]
    records: tuple[Record | None, ...]
    changes: tuple[Explained, ...] = ()


@dataclass(frozen=True)
class History:
    """Runs in the order of their time, the series of their cases, and which runs were left out with the reason."""

    by: MeasuredBy
    runs: tuple[ReportedRun, ...]
    series: tuple[CaseSeries, ...]
    left_out: tuple[str, ...]

    @property
    def changed(self) -> list[tuple[CaseSeries, Explained]]:
        """All changes, the latest first."""
        found = [(series, change) for series in self.series for change in series.changes]
        return sorted(found, key=lambda pair: -pair[1].change.place)


def read_history(folder: Path, by: MeasuredBy = MeasuredBy.SPEEDUP) -> History:
    """Read all runs in a folder.

    Raises:
        UsageError: the folder holds fewer than two comparable runs, or a file that is not as a run writes it.
    """
    if not folder.is_dir():
        msg = f"{folder} is not a folder; expected one with run folders in it"
        raise UsageError(msg)
    found = [load_run(path.parent) for path in sorted(folder.glob("*/records.jsonl")) if path.stat().st_size]
    ordered = sorted(found, key=lambda run: max((r.recorded_at for r in run.records), default=""))
    left_out, kept = [], []
    for run in ordered:
        latest = ordered[-1]
        if differing := comparable.hardware(latest.environment, run.environment):
            told = [difference.told(latest.path.name, run.path.name) for difference in differing]
            left_out.append(f"{run.path.name} is left out: {'; '.join(told)}.")
        else:
            kept.append(run)
    if len(kept) < 2:  # noqa: PLR2004 - a history needs two
        msg = (
            f"{folder} holds {len(kept)} comparable run{'s' * (len(kept) != 1)}; expected at least 2 run folders in it"
        )
        raise UsageError(msg)
    plain = [
        CaseSeries(key, title, tuple(figure(r, by) for r in records), tuple(records))
        for title, cases in grouped(kept)
        for key, records in cases.items()
    ]
    return History(by, tuple(kept), explained(plain, kept, by), tuple(left_out))


def grouped(runs: Sequence[ReportedRun]) -> list[tuple[str, Records]]:
    """Title of every group, and of each of its cases the records, one per run; None where a run has none."""
    every = [record for run in runs for record in run.records]
    titles = {g.key: g.title for g in groups(every)}
    found: dict[GroupKey, Records] = {}
    for place, run in enumerate(runs):
        for record in run.records:
            cases = found.setdefault(record.key.group, {})
            cases.setdefault(record.key, [None] * len(runs))[place] = record
    return [(titles[key], cases) for key, cases in found.items()]


def figure(record: Record | None, by: MeasuredBy) -> Interval | None:
    """The figure of a record with its interval; None where it has none, or one that estimates nothing.

    The reference has no speedup: it is the measure of all others.
    """
    if record is None or record.status is not Status.OK:
        return None
    if by is MeasuredBy.TIME:
        value, lo, hi = record.latency_p50_s, record.latency_p50_lo_s, record.latency_p50_hi_s
    elif record.variant == REFERENCE:
        return None
    else:
        value, lo, hi = record.speedup, record.speedup_lo, record.speedup_hi
    if value is None or not units.estimated(lo, hi):
        return None
    return Interval(value, value if lo is None else lo, value if hi is None else hi)


def explained(plain: Sequence[CaseSeries], runs: Sequence[ReportedRun], by: MeasuredBy) -> tuple[CaseSeries, ...]:
    """The series with their changes, each with what differs there and a guess at the cause."""
    found = [_changes(series, by) for series in plain]
    made = []
    for series, changes in zip(plain, found, strict=True):
        explanations = []
        for change, before in changes:
            others = [
                any(other.place == change.place and _same_way(other, change) for other, _ in theirs)
                for rest, theirs in zip(plain, found, strict=True)
                if rest is not series and rest.figures[change.place] is not None and _earlier(rest, change.place)
            ]
            differing = between(runs[before].environment, runs[change.place].environment)
            doubtful = _doubtful(series.records[place] for place in (before, change.place))
            why = guesses(differing, change, series.key.variant, (sum(others), len(others)), doubtful=doubtful)
            explanations.append(Explained(change, runs[before], runs[change.place], differing, why))
        made.append(CaseSeries(series.key, series.title, series.figures, series.records, tuple(explanations)))
    return tuple(made)


def _changes(series: CaseSeries, by: MeasuredBy) -> list[tuple[Change, int]]:
    """Changes of a series by the number of the run, each with the number of the run before that has a figure."""
    known = [(place, figure) for place, figure in enumerate(series.figures) if figure is not None]
    found = []
    for change in change_points.changes([figure for _, figure in known]):
        factor = change.factor
        if by is MeasuredBy.TIME:
            factor = Interval(1 / factor.value, 1 / factor.high, 1 / factor.low)
        found.append((Change(known[change.place][0], factor, change.chance), known[change.place - 1][0]))
    return found


def _same_way(one: Change, other: Change) -> bool:
    return (one.factor.value > 1) == (other.factor.value > 1)


def _earlier(series: CaseSeries, place: int) -> bool:
    return any(figure is not None for figure in series.figures[:place])


def _doubtful(records: Iterable[Record | None]) -> bool:
    return any(record is not None and bool(doubts(record)) for record in records)
