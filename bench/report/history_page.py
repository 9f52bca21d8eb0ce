"""The page of a history: every case over the runs of a folder, where it changed for good, and what may have done it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.analysis import history_tables
from bench.analysis.history import CaseSeries, Explained, History, MeasuredBy
from bench.report.descriptions import Kind
from bench.report.runs_page import Member, members_of, series_chart, write_page
from bench.report.style import look
from bench.report.tables import Cell, Row, Table

CAPTIONS = {
    MeasuredBy.SPEEDUP: "Speedup over the reference of the same run",
    MeasuredBy.TIME: "Median time of a call",
}
CAPTION = (
    "{figure}, with 95 % intervals, in the order of the runs. A dotted line is where a variant changed for good; a "
    "change lasts at least two runs."
)
COLUMNS = (
    "group",
    "variant",
    "first run",
    "change",
    "last run before",
    "what else changed",
    "possible causes, likeliest first",
)


def write_history(history: History, out: Path, title: str) -> Path:
    """Write the page of a history.

    Raises:
        UsageError: the page cannot be written.
    """
    members = members_of(history.runs)
    grouped: dict[str, list[CaseSeries]] = {}
    for series in history.series:
        grouped.setdefault(series.title, []).append(series)
    charts = []
    for group, cases in grouped.items():
        breaks = tuple(sorted({change.change.place + 0.5 for series in cases for change in series.changes}))
        records = {series.key: list(series.records) for series in cases}
        chart = series_chart(group, records, members, breaks, history.by)
        if chart is not None:
            charts.append(chart)
    rows = [_row(series, change, history, members) for series, change in history.changed]
    tables = [Table("Change points", COLUMNS, tuple(rows), filtered=True)] if rows else []
    caption = CAPTION.format(figure=CAPTIONS[history.by])
    kinds = (Kind("history", "History", caption, tuple(charts), wide=True),) if charts else ()
    notes = [history_tables.lead(history) + ".", *history_tables.notes(history)]
    return write_page(out, title, "History", members, notes, kinds, tables)


def _row(series: CaseSeries, change: Explained, history: History, members: Sequence[Member]) -> Row:
    after, before = (members[history.runs.index(run)] for run in (change.after, change.before))
    return Row((
        Cell(series.title),
        Cell(series.key.variant, colour=look(series.key.variant).colour),
        Cell(f"{after.name} ({after.source})"),
        Cell(history_tables.word(change), change.change.factor.value),
        Cell(f"{before.name} ({before.source})"),
        Cell(history_tables.differs(change)),
        Cell("; ".join(f"{number}. {guess}" for number, guess in enumerate(change.guesses, start=1))),
    ))  # fmt: skip
