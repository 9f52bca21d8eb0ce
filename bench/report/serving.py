"""Serving on the page and as plots: latency against load for all variants, with the bound."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import units
from bench.records import serving
from bench.records.schema import Status
from bench.records.serving import ServingRecord, ServingTest
from bench.report.charts import value_axis
from bench.report.descriptions import Curve, CurveChart, Kind, Point
from bench.report.style import look
from bench.report.tables import Cell, Row, Table

#: Loads whose ratio is at most this are drawn as one place of a line.
NEAR = 1.12

CAPTION = (
    "Latency of single queries against the load, by MLPerf LoadGen: Poisson arrivals, latency from the scheduled time. "
    "Below the dotted line the bound holds. A curve goes through medians of tests at about the same load. A hollow "
    "point is a test that something else on the machine disturbed. Invalid tests are left out."
)


def kinds(folder: Path) -> tuple[Kind, ...]:
    """Latency against load, a chart per workload; none where nothing was served under a bound."""
    records = [record for record in serving.read(folder) if record.scenario == "server"]
    tests = serving.read_tests(folder)
    charts = []
    for workload in dict.fromkeys(record.workload for record in records):
        of_workload = [record for record in records if record.workload == workload]
        curves = [
            curve
            for record in of_workload
            if record.status is Status.OK and (curve := _curve(record, tests)) is not None
        ]
        if curves:
            charts.append(_chart(workload, of_workload[0], curves))
    return (Kind("serving", "Latency against load", CAPTION, tuple(charts), wide=True),) if charts else ()


def _curve(record: ServingRecord, tests: Sequence[ServingTest]) -> Curve | None:
    points = [
        Point(test.target_qps, test.latency_bound_s, doubtful=bool(test.why), hover=_hover(record, test))
        for test in tests
        if (test.workload, test.variant) == (record.workload, record.variant) and test.searched and test.counts
    ]
    points.sort(key=lambda point: point.x)
    if not points:
        return None
    xs, ys = _line(points)
    return Curve(record.variant, xs, ys, tuple(points))


def _line(points: Sequence[Point]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A line through sorted points: medians of those whose loads are about the same."""
    bins: list[list[Point]] = []
    for point in points:
        if bins and point.x <= NEAR * bins[-1][0].x:
            bins[-1].append(point)
        else:
            bins.append([point])
    xs, ys = ([statistics.median(getattr(p, axis) for p in found) for found in bins] for axis in ("x", "y"))
    return tuple(xs), tuple(ys)


def _hover(record: ServingRecord, test: ServingTest) -> tuple[str, ...]:
    told = f"{test.target_qps:.4g} queries/s: p{record.percentile:g} "
    told += f"{units.seconds(test.latency_bound_s)}, {test.verdict}"
    return (record.variant, told, f"{test.phase}, {test.batch_mean:.1f} queries a batch", test.why)


def _chart(workload: str, record: ServingRecord, curves: list[Curve]) -> CurveChart:
    bound_s = record.bound_s or 0.0
    # Single tests lie far from the medians that a curve goes through; all must be in the picture.
    points = [point for curve in curves for point in curve.points]
    x = value_axis("queries per second", [point.x for point in points], "", "log")
    y = value_axis(f"p{record.percentile:g} latency", [bound_s, *(point.y for point in points)], "s", "log")
    guides = ((bound_s, f"bound {units.seconds(bound_s)}"),)
    threads = f"{record.threads} thread{'s' * (record.threads != 1)}"
    mode = ", decode" if record.mode == "decode" else ""
    return CurveChart(f"{workload}{mode}, {threads}", workload, x, y, tuple(curves), guides=guides)


def table(folder: Path) -> Table | None:
    """One row per variant, the one that sustains the highest load first; None where nothing was served."""
    records = serving.read(folder)
    if not records:
        return None
    columns = ("workload", "variant", "queries/s", "latency, LoadGen", "latency, ours", "p50", "lone query p50",
               "offline/s", "batch", "padding", "energy/query", "generator delay p99", "LoadGen")  # fmt: skip
    rows = []
    for record in sorted(records, key=lambda found: (found.workload, -(found.qps or 0.0))):
        why = f"{record.status.value}: {record.reason}" if record.reason else record.status.value
        load = why if record.qps is None else serving.load_text(record)
        if doubt := serving.beyond_offline(record):
            load = f"{load} ({doubt})"
        rows.append(Row((
            Cell(record.workload), Cell(record.variant, colour=look(record.variant).colour), Cell(load, record.qps),
            Cell(units.seconds(record.latency_bound_s), record.latency_bound_s),
            Cell(units.seconds(record.latency_ours_s), record.latency_ours_s),
            Cell(units.seconds(record.latency_p50_s), record.latency_p50_s),
            Cell(units.seconds(record.single_p50_s), record.single_p50_s),
            Cell(units.count(record.offline_qps), record.offline_qps),
            Cell("" if record.batch_mean is None else f"{record.batch_mean:.1f}", record.batch_mean),
            Cell(units.share(record.waste), record.waste),
            Cell(units.joules(record.energy_per_query_j), record.energy_per_query_j),
            Cell(units.seconds(record.lateness_p99_s), record.lateness_p99_s), Cell(record.loadgen),
        )))  # fmt: skip
    return Table("Serving", columns, tuple(rows), filtered=True)
