"""Training over ranks as a plot: efficiency over the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from bench import units
from bench.records.ranks import RanksRecord
from bench.records.schema import Status
from bench.report.charts import value_axis
from bench.report.descriptions import Axis, Curve, CurveChart, Kind, Point

#: Distance of two curves at one number of ranks.
SHIFT = 0.03
CAPTION = (
    "Efficiency against one rank in the same rounds, with 95 % intervals. Strong scaling: the ranks share one batch; "
    "weak scaling: each has one of its own. At 1 no time is lost to the others."
)


def kinds(records: Sequence[RanksRecord]) -> tuple[Kind, ...]:
    """Efficiency over ranks, a chart for each size of buckets and number of micro-batches; none with a single rank."""
    ok = [record for record in records if record.status is Status.OK and record.efficiency is not None]
    worlds = sorted({record.ranks for record in ok})
    if len(worlds) < 2:  # noqa: PLR2004 - a curve has two points
        return ()
    ways = sorted({(record.bucket_mb or 0.0, record.accumulate) for record in ok})
    charts = [_chart([found for found in ok if (found.bucket_mb, found.accumulate) == way], worlds) for way in ways]
    return (Kind("ranks", "Efficiency over ranks", CAPTION, tuple(charts)),)


def _chart(records: Sequence[RanksRecord], worlds: Sequence[int]) -> CurveChart:
    """The curves of one size of buckets and number of micro-batches."""
    both = len({record.scaling for record in records}) > 1
    curves: dict[str, list[Point]] = {}
    for record in sorted(records, key=lambda found: found.ranks):
        figures = (record.efficiency, record.efficiency_lo, record.efficiency_hi)
        hover = (record.scaling, f"{record.ranks} ranks: {units.ratio_interval(*figures, digits=2)}")
        # Beside each other, so that both intervals are seen.
        x = record.ranks + SHIFT * (both and record.scaling == "weak")
        point = Point(x, record.efficiency or 0.0, record.efficiency_lo, record.efficiency_hi, hover=hover)
        curves.setdefault(record.scaling, []).append(point)
    drawn = tuple(
        Curve(name, tuple(p.x for p in points), tuple(p.y for p in points), tuple(points))
        for name, points in curves.items()
    )
    x_axis = Axis("ranks", "linear", 0.8 * worlds[0], worlds[-1] + 0.2, tuple((float(w), str(w)) for w in worlds))
    highs = [max(p.y, p.hi or 0.0) for points in curves.values() for p in points]
    y_axis = value_axis("efficiency", [*highs, 1.0], "", "linear")
    title = f"{records[0].workload}, {records[0].variant}, buckets of {records[0].bucket_mb:g} MB"
    title += f", {records[0].accumulate} micro-batches" * (records[0].accumulate > 1)
    return CurveChart(title, records[0].workload, x_axis, y_axis, drawn, guides=((1.0, "ideal"),))
