"""Pages about several runs: some of them side by side, and the history of a folder of runs with its change points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import units
from bench.analysis import comparability as comparable
from bench.analysis.compare import CasePair, CaseVerdict, CompareOptions, Comparison, compare
from bench.analysis.intervals import Interval
from bench.analysis.run_summary import DOUBT, ReportedRun, doubts, groups, load_run, percentile
from bench.errors import UsageError
from bench.plan.cases import REFERENCE
from bench.records import durable
from bench.records.reader import CaseKey, case_key
from bench.records.schema import Record, Status
from bench.report import history, interactive, words
from bench.report.charts import value_axis
from bench.report.descriptions import Axis, Curve, CurveChart, Kind, Point
from bench.report.page import embedded, recorded, templates
from bench.report.style import look
from bench.report.tables import Cell, Row, Table
from kernels.host.output import utf8

SIDE_CAPTION = (
    "Speedup over the reference of the same run, with 95 % intervals, run by run. A run without a point has no such "
    "case, or no estimate of it."
)
HISTORY_CAPTION = (
    "Speedup over the reference of the same run, with 95 % intervals, in the order of the runs. A dotted line is where "
    "a variant changed for good: a level lasts two runs at least."
)
#: Names of runs on an axis are shown up to this length, and at most this many of them.
NAME_LENGTH, MOST_NAMES = 18, 8


@dataclass(frozen=True)
class Member:
    """A run on a page of several.

    Attributes:
        run: itself.
        name: distinguishes it from the others.
        machine: what it was measured on.
        recorded: when.
    """

    run: ReportedRun
    name: str
    machine: str
    recorded: str

    @property
    def source(self) -> str:
        """Source that was measured: commit and plugins."""
        return comparable.source(self.run.environment)


def write_side_by_side(paths: Sequence[Path], out: Path) -> Path:
    """Write the page of two or more runs; the others are compared with the first.

    Raises:
        UsageError: a folder holds no run, or has no case in common with the first.
        OSError: the page cannot be written.
    """
    members = _members([load_run(path) for path in paths])
    base, others = members[0], members[1:]
    comparisons = [compare(base.run, other.run, CompareOptions(force=True)) for other in others]
    notes = [note for other, found in zip(others, comparisons, strict=True) if (note := _note(base, other, found))]
    charts = tuple(
        chart for title, records in _grouped(members) if (chart := series_chart(title, records, members)) is not None
    )
    kinds = (Kind("speedup", "Speedup, run by run", SIDE_CAPTION, charts),) if charts else ()
    tables = [side_table(title, records, members, comparisons) for title, records in _grouped(members)]
    title = " beside ".join(member.name for member in members)
    return _write(out, title, "Runs side by side", members, notes, kinds, tables)


def write_history(folder: Path, out: Path | None = None) -> Path:
    """Write the page of all runs in a folder, in the order of their time.

    Runs that are not comparable with the latest are left out, and named with the reason.

    Raises:
        UsageError: the folder holds fewer than two comparable runs.
        OSError: the page cannot be written.
    """
    if not folder.is_dir():
        msg = f"{folder} is not a folder; expected one with run folders in it"
        raise UsageError(msg)
    found = [load_run(path.parent) for path in sorted(folder.glob("*/records.jsonl")) if path.stat().st_size]
    ordered = sorted(found, key=lambda run: max((r.recorded_at for r in run.records), default=""))
    notes, kept = [], []
    for run in ordered:
        differing = comparable.differences(ordered[-1].environment, run.environment)
        if differing:
            notes.append(f"{run.path.name} is left out: {'; '.join(map(str, differing))}.")
        else:
            kept.append(run)
    if len(kept) < 2:  # noqa: PLR2004 - a history needs two
        msg = (
            f"{folder} holds {len(kept)} comparable run{'s' * (len(kept) != 1)}; expected at least 2 run folders in it"
        )
        raise UsageError(msg)
    members = _members(kept)
    rows, charts = [], []
    for title, records in _grouped(members):
        changed = _changes(records, members)
        rows += [_change_row(title, key, change, members) for key, found_ in changed.items() for change in found_]
        breaks = tuple(sorted({change.place + 0.5 for found_ in changed.values() for change in found_}))
        chart = series_chart(title, records, members, breaks)
        if chart is not None:
            charts.append(chart)
    names = ("group", "variant", "since", "change", "before that")
    tables = [Table("Change points", names, tuple(rows), filtered=True)] if rows else []
    if not rows:
        notes.insert(0, f"No case changed for good over these {len(members)} runs.")
    kinds = (Kind("history", "History", HISTORY_CAPTION, tuple(charts), wide=True),) if charts else ()
    return _write(out or folder / "history.html", str(folder.resolve().name), "History", members, notes, kinds, tables)


Records = dict[CaseKey, list[Record | None]]


def _grouped(members: Sequence[Member]) -> list[tuple[str, Records]]:
    """Title of every group, and of each of its cases the records, one a run; None where a run has none."""
    every = [record for member in members for record in member.run.records]
    titles = {_group_key(g.records[0]): g.title for g in groups(every)}
    found: dict[tuple[Any, ...], Records] = {}
    for place, member in enumerate(members):
        for record in member.run.records:
            cases = found.setdefault(_group_key(record), {})
            cases.setdefault(case_key(record), [None] * len(members))[place] = record
    return [(titles[key], cases) for key, cases in found.items()]


def _group_key(record: Record) -> tuple[Any, ...]:
    return case_key(record)[:-1]


def series_chart(
    title: str, cases: Records, members: Sequence[Member], breaks: tuple[float, ...] = ()
) -> CurveChart | None:
    """Speedups of every variant over the runs."""
    curves = []
    for key, records in cases.items():
        points = []
        for place, record in enumerate(records, start=1):
            if key[-1] == REFERENCE or record is None or not _estimated(record):
                continue
            text = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
            hovered = (key[-1], f"{members[place - 1].name}: {text}", *doubts(record))
            doubtful = bool(doubts(record))
            points.append(Point(place, record.speedup or 1.0, record.speedup_lo, record.speedup_hi, doubtful, hovered))
        if points:
            curves.append(Curve(key[-1], tuple(p.x for p in points), tuple(p.y for p in points), tuple(points)))
    if not curves:
        return None
    step = -(-len(members) // MOST_NAMES)
    short = [m.name if len(m.name) <= NAME_LENGTH else f"{m.name[:NAME_LENGTH]}..." for m in members]
    ticks = tuple((float(n), name) for n, name in enumerate(short, start=1) if (n - 1) % step == 0)
    x = Axis("run", "linear", 0.6, len(members) + 0.4, ticks)
    ys = [y for curve in curves for p in curve.points for y in (p.y, p.lo, p.hi) if y is not None]
    y = value_axis("speedup, reference = 1", ys, "x", "ratio")
    return CurveChart(title, title, x, y, tuple(curves), breaks=breaks)


def _estimated(record: Record) -> bool:
    ok = record.status is Status.OK and record.speedup is not None
    return ok and units.estimated(record.speedup_lo, record.speedup_hi)


def side_table(title: str, cases: Records, members: Sequence[Member], comparisons: Sequence[Comparison]) -> Table:
    """The cases of a group: speedup and median of each run, and what changed against the first."""
    pairs = [{pair.identity: pair for pair in found.pairs} for found in comparisons]
    columns = ["variant"]
    for place, member in enumerate(members):
        columns += [f"{member.name}: speedup", f"{member.name}: p50"]
        columns += [f"{member.name}: change"] if place else []
    rows = []
    for key, records in sorted(cases.items(), key=lambda item: _order(item[1])):
        if all(record is None or record.status is Status.UNAVAILABLE for record in records):
            continue
        cells = [Cell(key[-1], colour=look(key[-1]).colour)]
        for place, record in enumerate(records):
            cells += _figures(record)
            if place:
                cells.append(_change(pairs[place - 1], key) if record is not None else Cell(""))
        rows.append(Row(tuple(cells)))
    return Table(title, tuple(columns), tuple(rows), filtered=True)


def _order(records: Sequence[Record | None]) -> float:
    return -max((record.speedup or 0.0 for record in records if record is not None), default=0.0)


def _figures(record: Record | None) -> list[Cell]:
    if record is None:
        return [Cell("not in this run"), Cell("")]
    if record.status is not Status.OK:
        return [Cell(record.status.value, title=record.reason), Cell("")]
    why = "; ".join(doubts(record))
    mark = DOUBT if why else ""
    speedup = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
    order = record.speedup if _estimated(record) else None
    text, value = percentile(record, "p50")
    return [Cell(speedup and mark + speedup, order, why), Cell(text and mark + text, value, why)]


def _change(pairs: dict[Any, CasePair], key: CaseKey) -> Cell:
    """The verdict of the comparison, with its figure."""
    workload, mode, device, threads, variant = key
    pair = pairs.get((workload, mode, device, threads, variant)) or pairs.get((workload, mode, device, None, variant))
    if pair is None:
        return Cell("")
    if pair.change is None:
        return Cell("only here" if pair.verdict is CaseVerdict.ONLY_NEW else str(pair.verdict), title=pair.note)
    figure = units.ratio_interval(pair.change.value, pair.change.low, pair.change.high, digits=2)
    holds = pair.holds or pair.verdict not in {CaseVerdict.FASTER, CaseVerdict.SLOWER}
    verdict = str(pair.verdict) if holds else f"perhaps {pair.verdict}"
    return Cell(f"{verdict} {figure}", pair.change.value, pair.note)


def _changes(cases: Records, members: Sequence[Member]) -> dict[CaseKey, tuple[history.Change, ...]]:
    """Change points of every case, by the number of the run."""
    found = {}
    for key, records in cases.items():
        known = [(n, r) for n, r in enumerate(records) if key[-1] != REFERENCE and r is not None and _estimated(r)]
        figures = [Interval(r.speedup or 1.0, r.speedup_lo or 1.0, r.speedup_hi or 1.0) for _, r in known]
        moved = tuple(history.Change(known[c.place][0], c.factor) for c in history.changes(figures))
        if moved and len(members) > 1:
            found[key] = moved
    return found


def _change_row(title: str, key: CaseKey, change: history.Change, members: Sequence[Member]) -> Row:
    factor, member, before = change.factor, members[change.place], members[change.place - 1]
    word = "faster" if factor.value > 1 else "slower"
    figure = units.ratio_interval(factor.value, factor.low, factor.high, digits=2)
    return Row((
        Cell(title),
        Cell(key[-1], colour=look(key[-1]).colour),
        Cell(f"{member.name} ({member.source})"),
        Cell(f"{word}, {figure}", factor.value),
        Cell(f"{before.name} ({before.source})"),
    ))  # fmt: skip


def _members(runs: Sequence[ReportedRun]) -> list[Member]:
    """The runs with names that differ: the folder's, and where two are alike, their number."""
    names: list[str] = []
    for number, run in enumerate(runs, start=1):
        name = run.path.resolve().name
        names.append(f"{name} ({number})" if name in names else name)
    return [Member(run, name, words.machine(run), recorded(run)) for run, name in zip(runs, names, strict=True)]


def _note(base: Member, other: Member, found: Comparison) -> str:
    """Say why two runs are not comparable, and in what else they differ."""
    if found.differences:
        what = "; ".join(map(str, found.differences))
        return (
            f"{other.name} is not comparable with {base.name}: {what}. Its changes are not changes of the code alone."
        )
    told = [*found.warnings, *found.plugins]
    return f"{other.name}: {'; '.join(told)}." if told else ""


def _write(
    out: Path, title: str, heading: str, members: Sequence[Member], notes: Sequence[str], kinds: tuple[Kind, ...],
    tables: Sequence[Table],
) -> Path:  # fmt: skip
    figures, described = embedded(kinds)
    html = templates().get_template("runs.html.j2").render(
        title=title,
        heading=heading,
        members=members,
        notes=notes,
        kinds=kinds,
        figures=figures,
        tables=tables,
        plotly=interactive.packed(interactive.script()),
        packed=interactive.packed(interactive.as_json(described)),
    )  # fmt: skip
    durable.replace(out, utf8(html))
    return out
