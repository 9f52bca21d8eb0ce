"""The page of runs side by side, and what it shares with that of a history: its runs, its charts, its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import units
from bench.analysis import comparability as comparable
from bench.analysis.compare import CasePair, CaseVerdict, CompareOptions, Comparison, compare
from bench.analysis.history import MeasuredBy, Records, figure, grouped
from bench.analysis.run_summary import DOUBT, ReportedRun, doubts, load_run, percentile
from bench.errors import writing
from bench.plan.identity import CaseKey
from bench.records import durable
from bench.records.schema import Record, Status
from bench.report import page_script, words
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
        UsageError: a folder holds no run, or has no case in common with the first, or the page cannot be written.
    """
    members = members_of([load_run(path) for path in paths])
    base, others = members[0], members[1:]
    comparisons = [compare(base.run, other.run, CompareOptions(force=True)) for other in others]
    notes = [note for other, found in zip(others, comparisons, strict=True) if (note := _note(base, other, found))]
    charts = tuple(
        chart
        for title, records in grouped([member.run for member in members])
        if (chart := series_chart(title, records, members)) is not None
    )
    kinds = (Kind("speedup", "Speedup, run by run", SIDE_CAPTION, charts),) if charts else ()
    tables = [
        side_table(title, records, members, comparisons)
        for title, records in grouped([member.run for member in members])
    ]
    title = " and ".join(member.name for member in members)
    return write_page(out, title, "Runs side by side", members, notes, kinds, tables)


def series_chart(
    title: str,
    cases: Records,
    members: Sequence[Member],
    breaks: tuple[float, ...] = (),
    by: MeasuredBy = MeasuredBy.SPEEDUP,
) -> CurveChart | None:
    """Figures of every variant over the runs."""
    curves = []
    for key, records in cases.items():
        points = []
        for place, record in enumerate(records, start=1):
            found = figure(record, by)
            if record is None or found is None:
                continue
            value = (found.value, found.low, found.high)
            text = units.ratio_interval(*value) if by is MeasuredBy.SPEEDUP else units.seconds(found.value)
            hovered = (key[-1], f"{members[place - 1].name}: {text}", *doubts(record))
            points.append(Point(place, *value, bool(doubts(record)), hovered))
        if points:
            curves.append(Curve(key[-1], tuple(p.x for p in points), tuple(p.y for p in points), tuple(points)))
    if not curves:
        return None
    step = -(-len(members) // MOST_NAMES)
    short = [m.name if len(m.name) <= NAME_LENGTH else f"{m.name[:NAME_LENGTH]}..." for m in members]
    ticks = tuple((float(n), name) for n, name in enumerate(short, start=1) if (n - 1) % step == 0)
    x = Axis("run", "linear", 0.6, len(members) + 0.4, ticks)
    ys = [y for curve in curves for p in curve.points for y in (p.y, p.lo, p.hi) if y is not None]
    y = (
        value_axis("speedup, reference = 1", ys, "x", "ratio")
        if by is MeasuredBy.SPEEDUP
        else value_axis("p50", ys, "s", "log")
    )
    return CurveChart(title, title, x, y, tuple(curves), breaks=breaks)


def side_table(title: str, cases: Records, members: Sequence[Member], comparisons: Sequence[Comparison]) -> Table:
    """The cases of a group: speedup and median of each run, and what changed against the first."""
    pairs = [{pair.key: pair for pair in found.pairs} for found in comparisons]
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
    order = record.speedup if figure(record, MeasuredBy.SPEEDUP) else None
    text, value = percentile(record, "p50")
    return [Cell(speedup and mark + speedup, order, why), Cell(text and mark + text, value, why)]


def _change(pairs: dict[Any, CasePair], key: CaseKey) -> Cell:
    """The verdict of the comparison, with its figure."""
    pair = pairs.get(key) or pairs.get(key.at_any_threads)
    if pair is None:
        return Cell("")
    if pair.change is None:
        return Cell("only here" if pair.verdict is CaseVerdict.ONLY_NEW else str(pair.verdict), title=pair.note)
    figure = units.ratio_interval(pair.change.value, pair.change.low, pair.change.high, digits=2)
    holds = pair.holds or pair.verdict not in {CaseVerdict.FASTER, CaseVerdict.SLOWER}
    verdict = str(pair.verdict) if holds else f"perhaps {pair.verdict}"
    return Cell(f"{verdict} {figure}", pair.change.value, pair.note)


def members_of(runs: Sequence[ReportedRun]) -> list[Member]:
    """The runs with names that differ: the folder's, and where two are alike, their number."""
    names: list[str] = []
    for number, run in enumerate(runs, start=1):
        name = run.path.resolve().name
        names.append(f"{name} ({number})" if name in names else name)
    return [Member(run, name, words.machine(run), recorded(run)) for run, name in zip(runs, names, strict=True)]


def _note(base: Member, other: Member, found: Comparison) -> str:
    """Say why two runs are not comparable, and in what else they differ."""
    if found.differences:
        what = "; ".join(difference.told(base.name, other.name) for difference in found.differences)
        return f"{other.name} is not comparable with {base.name}: {what}. Its changes are not only changes of the code."
    told = [*found.warnings, *found.plugins]
    return f"{other.name}: {'; '.join(told)}." if told else ""


def write_page(
    out: Path, title: str, heading: str, members: Sequence[Member], notes: Sequence[str], kinds: tuple[Kind, ...],
    tables: Sequence[Table],
) -> Path:  # fmt: skip
    """Write a page about several runs.

    Raises:
        UsageError: it cannot be written.
    """
    figures, described = embedded(kinds)
    html = templates().get_template("runs.html.j2").render(
        title=title,
        heading=heading,
        members=members,
        notes=notes,
        kinds=kinds,
        figures=figures,
        tables=tables,
        plotly=page_script.script(),
        packed=page_script.packed(page_script.as_json(described)),
    )  # fmt: skip
    with writing(out):
        durable.replace(out, utf8(html))
    return out
