"""The charts of a run: from its groups to the descriptions that are drawn.

A chart is one group (or one sweep); a chart without a figure to show is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bench import units
from bench.analysis.run_summary import DOUBT, RankedGroup, ReportedRun, doubts, percentile, sweep_base
from bench.plan.identity import GroupKey
from bench.records.schema import Record, Status
from bench.report.descriptions import (
    Axis,
    Bar,
    BarChart,
    Chart,
    Curve,
    CurveChart,
    Kind,
    Part,
    Point,
    Scale,
)

MAX_POINTS = 500
TAIL_POINTS = 60
#: Beyond this ratio of largest to smallest, a linear bar of the smallest is no longer visible.
LINEAR_RANGE = 40
PERCENTILES = ((0.5, "p50"), (0.9, "p90"), (0.95, "p95"), (0.99, "p99"))


def kinds(run: ReportedRun) -> tuple[Kind, ...]:
    """The kinds of figures that `run` has something to show for.

    The points of a sweep are drawn as scaling curves alone: one bar chart a point would bury the rest.
    """
    single = [group for group in run.groups if not group.sweep_axis]
    found = (
        Kind("speedup", "Speedup over the reference", SPEEDUP_CAPTION, _each(single, speedup_chart)),
        Kind("latency", "Latency of single calls", LATENCY_CAPTION, _each(single, lambda g: latency_chart(g, run))),
        Kind("throughput", "Throughput", THROUGHPUT_CAPTION, _each(single, throughput_chart)),
        Kind("memory", "Memory", MEMORY_CAPTION, _each(single, memory_chart)),
        Kind("cold-start", "Cold start", COLD_START_CAPTION, _each(single, cold_start_chart)),
        Kind("break-even", "Cold start against calls", BREAK_EVEN_CAPTION, _each(single, break_even_chart)),
        Kind("trade-off", "Latency against throughput", TRADE_OFF_CAPTION, trade_off_charts(run.groups)),
        Kind("scaling", "Scaling", SCALING_CAPTION, scaling_charts(run.groups)),
    )
    return tuple(kind for kind in found if kind.charts)


SPEEDUP_CAPTION = (
    "Time of the reference divided by time of the variant, with 95 % intervals. The axis is logarithmic: twice as "
    "fast and half as fast are equally far from 1."
)
LATENCY_CAPTION = (
    "Share of single calls that took at most this long. Marked points are the 50th, 90th, 95th and 99th percentile, "
    "if there are enough calls to estimate them."
)
THROUGHPUT_CAPTION = "Time steps per second, source and target together, without padding."
MEMORY_CAPTION = (
    "Peak: resident memory above the baseline, from build to steady calls. Steady: additional memory that a warm call "
    "needs. CUDA: peak of the allocator."
)
COLD_START_CAPTION = (
    "Time to the first result in a fresh process: build, then the first call, which includes compiling. "
    "The axis is logarithmic; shortest first. Measured once each."
)
BREAK_EVEN_CAPTION = (
    "Time since the start of a process over the number of calls: build and first call, then median calls. For a given "
    "number of calls, choose the lowest curve; where two cross, the slower start has paid off."
)
TRADE_OFF_CAPTION = (
    "Every variant at every batch that was measured; further up and further left is better. The dotted line joins "
    "those that no other beats in both latency and throughput."
)
BREAK_EVEN_POINTS = 49
SCALING_CAPTION = "Median latency and speedup over what the sweep varies, both axes logarithmic."
#: Parts in the order in which they are drawn and named.
PARTS = ("speedup", "steps/s", "peak", "steady", "CUDA", "to the first result", "results", "gradients", "seconds")
#: Steady memory below this is left out where no variant of a group has more, bytes.
LITTLE_MEMORY = 1e6


def part_names(charts: Iterable[Chart]) -> list[str]:
    """Names of the parts that the bars of `charts` have."""
    bars = (bar for chart in charts if isinstance(chart, BarChart) for bar in chart.bars)
    found = {part.name for bar in bars for part in bar.parts}
    return [name for name in PARTS if name in found]


def speedup_chart(group: RankedGroup) -> BarChart | None:
    """Speedups with intervals; what did not run keeps its row."""
    bars = []
    for record in group.records:
        if record.status is Status.UNAVAILABLE:
            # What cannot exist here has its place under "What did not run", and would fill half of the chart.
            continue
        if record.status is not Status.OK:
            bars.append(Bar(record.variant, record.status.value, hover=(record.variant, record.reason)))
        elif record.speedup is None:
            bars.append(Bar(record.variant, "no reference", hover=(record.variant, "no reference to compare with")))
        elif not units.estimated(record.speedup_lo, record.speedup_hi):
            # Its interval would stretch the axis until nothing else can be seen.
            bars.append(Bar(record.variant, units.NO_ESTIMATE, hover=hover(record)))
        else:
            part = Part("speedup", record.speedup, record.speedup_lo, record.speedup_hi)
            label = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
            bars.append(_bar(record, label, (part,), timed=True))
    return _bar_chart(group, bars, "speedup, reference = 1", "x", "ratio")


def throughput_chart(group: RankedGroup) -> BarChart | None:
    """Steps per second."""
    bars = [
        _bar(record, f"{units.count(value)} steps/s", (Part("steps/s", value),), timed=True)
        for record in sorted(group.ok, key=lambda record: -(record.throughput_steps_per_s or 0.0))
        if (value := record.throughput_steps_per_s) is not None
    ]
    return _bar_chart(group, bars, "time steps per second", "", "linear")


def memory_chart(group: RankedGroup) -> BarChart | None:
    """Peak, steady and CUDA allocator memory."""
    bars = []
    steady = any((record.memory_steady_bytes or 0) >= LITTLE_MEMORY for record in group.ok)
    for record in sorted(group.ok, key=lambda record: record.memory_peak_bytes or 0):
        parts = _parts(
            ("peak", record.memory_peak_bytes),
            ("steady", record.memory_steady_bytes if steady else None),
            ("CUDA", record.memory_cuda_allocated_bytes),
        )
        label = " / ".join(units.megabytes(part.value) for part in parts)
        bars.append(_bar(record, label, parts, timed=False))
    names = " / ".join(name for name in PARTS if any(name == part.name for bar in bars for part in bar.parts))
    return _bar_chart(group, [bar for bar in bars if bar.parts], f"memory: {names}", "bytes", "linear")


def cold_start_chart(group: RankedGroup) -> BarChart | None:
    """Time to the first result, which a user waits for after starting the model."""
    bars = []
    for record in sorted(group.ok, key=lambda record: start_s(record) or 0.0):
        start = start_s(record)
        if not start:
            continue
        label = units.seconds(start)
        if record.compile_s and record.compile_s > start / 10:
            label += f", {units.seconds(record.compile_s)} of it compiling"
        bars.append(_bar(record, label, (Part("to the first result", start),), timed=False))
    return _bar_chart(group, bars, "build and first call", "s", "log", dots=True)


def start_s(record: Record) -> float | None:
    """Build and first call together, seconds; None where one of them is not known."""
    if record.build_s is None or record.first_call_s is None:
        return None
    return record.build_s + record.first_call_s


def break_even_chart(group: RankedGroup) -> CurveChart | None:
    """Time over the number of calls, start included: where two curves cross, the slower start has paid for itself."""
    known = [(r, start, r.latency_p50_s) for r in group.ok if (start := start_s(r)) and r.latency_p50_s]
    if len(known) < 2:  # noqa: PLR2004 - two cross
        return None
    last = max(1e4, 10 * max(start for _, start, _ in known) / min(call for _, _, call in known))
    xs = tuple(float(x) for x in np.geomspace(1, last, BREAK_EVEN_POINTS))
    curves = []
    for record, start, call_s in known:
        ys = tuple(start + (x - 1) * call_s for x in xs)
        text = f"{units.seconds(start)} to the first result, then {units.seconds(call_s)} a call"
        points = [Point(xs[k], ys[k], hover=(record.variant, text)) for k in (0, BREAK_EVEN_POINTS - 1)]
        curves.append(Curve(record.variant, xs, ys, tuple(points)))
    ends = [y for curve in curves for y in (curve.ys[0], curve.ys[-1])]
    x, y = value_axis("calls since the start", xs, "", "log"), value_axis("time since the start", ends, "s", "log")
    return CurveChart(group.title, group.key.workload, x, y, tuple(curves))


def trade_off_charts(groups: Iterable[RankedGroup]) -> tuple[CurveChart, ...]:
    """Latency against throughput of all variants at all batches of a model, with the front that nothing beats."""
    models: dict[GroupKey, list[RankedGroup]] = {}
    for group in groups:
        key = group.key._replace(workload=sweep_base(group.key.workload, "batch"))
        models.setdefault(key, []).append(group)
    return tuple(chart for key, members in models.items() if (chart := _trade_off(key, members)) is not None)


def _trade_off(key: GroupKey, members: Iterable[RankedGroup]) -> CurveChart | None:
    """One model. At one batch the two say the same, and there is no chart."""
    points: dict[str, list[Point]] = {}
    batches = set()
    for record in (record for group in members for record in group.ok):
        latency, rate = record.latency_p50_s, record.throughput_seq_per_s
        if latency is None or rate is None or percentile(record, "p50")[1] is None:
            continue
        batches.add(record.batch)
        said = f"batch {record.batch}: {units.seconds(latency)}, {units.count(rate)} sequences/s"
        hovered = (record.variant, said, *hover(record)[2:])
        points.setdefault(record.variant, []).append(Point(latency, rate, doubtful=bool(doubts(record)), hover=hovered))
    if len(batches) < 2:  # noqa: PLR2004
        return None
    every = [point for found in points.values() for point in found]
    front = pareto((point.x, point.y) for point in every)
    curves = [Curve("best trade-offs", tuple(x for x, _ in front), tuple(y for _, y in front), (), helper=True)]
    for variant, found in points.items():
        ordered = tuple(sorted(found, key=lambda point: point.x))
        curves.append(Curve(variant, tuple(p.x for p in ordered), tuple(p.y for p in ordered), ordered))
    x = value_axis("median time of a call", (point.x for point in every), "s", "log")
    y = value_axis("sequences per second", (point.y for point in every), "", "log")
    return CurveChart(f"{key[0]}, {key[1]}", key[0], x, y, tuple(curves))


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points with the least x for their y: none has a smaller x and a larger y; in the order of x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def latency_chart(group: RankedGroup, run: ReportedRun) -> CurveChart | None:
    """The empirical distribution of single calls, thinned but for its tails."""
    curves = []
    for record in group.ok:
        calls = np.sort(run.calls(record))
        if not calls.size:
            continue
        places = thinned(calls.size)
        share = (places + 1) / calls.size
        curves.append(
            Curve(
                record.variant,
                tuple(float(x) for x in calls[places]),
                tuple(float(y) for y in share),
                tuple(_percentiles(record)),
            )
        )
    if not curves:
        return None
    xs = [x for curve in curves for x in (*curve.xs, *(point.x for point in curve.points))]
    y_ticks = tuple((y, f"{y:.0%}") for y in (0.0, 0.25, 0.5, 0.75, 1.0))
    y = Axis("share of calls", "linear", 0.0, 1.0, y_ticks)
    return CurveChart(
        group.title, group.key.workload, value_axis("time of a call", xs, "s", "log"), y, tuple(curves), PERCENTILES
    )


def thinned(size: int) -> np.ndarray[Any, Any]:
    """At most `MAX_POINTS` places in a sorted array of `size`, every one of `TAIL_POINTS` at either end."""
    if size <= MAX_POINTS:
        return np.arange(size)
    middle = np.linspace(TAIL_POINTS, size - TAIL_POINTS - 1, MAX_POINTS - 2 * TAIL_POINTS).round().astype(int)
    return np.concatenate([np.arange(TAIL_POINTS), middle, np.arange(size - TAIL_POINTS, size)])


def scaling_charts(groups: Iterable[RankedGroup]) -> tuple[CurveChart, ...]:
    """Two charts a sweep: median latency, and speedup."""
    sweeps: dict[Any, list[RankedGroup]] = {}
    for group in groups:
        if group.sweep_axis:
            sweeps.setdefault(group.sweep_key, []).append(group)
    charts: list[CurveChart | None] = []
    for key, members in sweeps.items():
        makers = (_latency_point, _speedup_point)
        charts += [_scaling_chart(key[0], members[0].sweep_title, members, what) for what in makers]
    return tuple(chart for chart in charts if chart)


def _scaling_chart(
    workload: str, title: str, members: list[RankedGroup], figure: Callable[[Record], Point | None]
) -> CurveChart | None:
    through: dict[str, list[Point]] = {}
    for group in members:
        for record in group.ok:
            point = figure(record)
            if point is not None:
                through.setdefault(record.variant, []).append(point)
    if not through:
        return None
    curves = []
    for variant, points in through.items():
        ordered = tuple(sorted(points, key=lambda point: point.x))
        curves.append(Curve(variant, tuple(p.x for p in ordered), tuple(p.y for p in ordered), ordered))
    values = sorted({x for curve in curves for x in curve.xs})
    x = Axis(members[0].sweep_axis, "log", values[0] / 1.15, values[-1] * 1.15, tuple((v, f"{v:g}") for v in values))
    ys = [y for c in curves for p in c.points for y in (p.lo, p.y, p.hi) if y is not None]
    if figure is _speedup_point:
        return CurveChart(title, workload, x, value_axis("speedup, reference = 1", ys, "x", "ratio"), tuple(curves))
    return CurveChart(title, workload, x, value_axis("median time of a call", ys, "s", "log"), tuple(curves))


def _latency_point(record: Record) -> Point | None:
    if not record.sweep_value or record.latency_p50_s is None:
        return None
    lo, hi = record.latency_p50_lo_s, record.latency_p50_hi_s
    if not units.estimated(lo, hi):
        return None
    return Point(record.sweep_value, record.latency_p50_s, lo, hi, bool(doubts(record)), hover(record))


def _speedup_point(record: Record) -> Point | None:
    if not record.sweep_value or record.speedup is None:
        return None
    lo, hi = record.speedup_lo, record.speedup_hi
    if not units.estimated(lo, hi):
        return None
    return Point(record.sweep_value, record.speedup, lo, hi, bool(doubts(record)), hover(record))


def _percentiles(record: Record) -> Iterable[Point]:
    for share, name in PERCENTILES:
        value = getattr(record, f"latency_{name}_s")
        if value is None:
            continue
        lo, hi = (getattr(record, f"latency_{name}_{end}_s") for end in ("lo", "hi"))
        known = lo is not None and units.estimated(lo, hi)
        spread = f" [{units.seconds(lo)}, {units.seconds(hi)}]" if known else ""
        text = (record.variant, f"{name} {percentile(record, name)[0]}{spread}", *hover(record)[2:])
        yield Point(value, share, doubtful=bool(doubts(record)), hover=text)


def hover(record: Record) -> tuple[str, ...]:
    """The lines that the page shows over a figure of `record`: name, speedup, time, evidence, doubts."""
    lines = [record.variant]
    speedup = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
    median, _ = percentile(record, "p50")
    lines.append(", ".join(part for part in (speedup, median and f"p50 {median}") if part))
    return (*lines, *(f"{DOUBT} {doubt}" for doubt in doubts(record)), *filter(None, [record.evidence]))


def _bar(record: Record, label: str, parts: tuple[Part, ...], *, timed: bool) -> Bar:
    doubtful = timed and bool(doubts(record))
    text = f"{DOUBT}{label}" if doubtful else label
    figures = tuple(f"{part.name} {_figure(part)}" for part in parts) if not timed else ()
    return Bar(record.variant, text, parts, doubtful, (*hover(record), *figures))


def _figure(part: Part) -> str:
    is_memory = part.name in {"peak", "steady", "CUDA"}
    return units.megabytes(part.value) if is_memory else units.seconds(part.value)


def _parts(*named: tuple[str, float | None]) -> tuple[Part, ...]:
    return tuple(Part(name, value) for name, value in named if value is not None)


def _each(groups: Iterable[RankedGroup], make: Callable[[RankedGroup], Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for group in groups if (chart := make(group)) is not None)


def _bar_chart(
    group: RankedGroup, bars: list[Bar], title: str, unit: str, scale: Scale, *, dots: bool = False
) -> BarChart | None:
    values = [v for bar in bars for part in bar.parts for v in (part.lo, part.value, part.hi) if v is not None]
    if not values:
        return None
    leading = [bar.parts[0].value for bar in bars if bar.parts]
    # Memory stays linear: peak and steady of one variant are often further apart than two variants are.
    if scale == "linear" and unit != "bytes" and min(leading) > 0 and max(leading) / min(leading) > LINEAR_RANGE:
        scale = "log"
    return BarChart(group.title, group.key.workload, value_axis(title, values, unit, scale), tuple(bars), dots)


def value_axis(title: str, values: Iterable[float], unit: str, scale: Scale) -> Axis:
    """An axis around some values, with round ticks in a unit of `units.tick_label`."""
    label = units.tick_label(unit)
    values = [value for value in values if value > 0] or [1.0]
    if scale == "linear":
        hi = max(values) * 1.04
        return Axis(title, scale, 0.0, hi, tuple((t, label(t)) for t in units.linear_ticks(hi)))
    if scale == "ratio":
        # A little room on either side of 1 even where every variant is as fast as the reference.
        values += [0.92, 1.09]
    room = (max(values) / min(values)) ** 0.04 * 1.01
    lo, hi = min(values) / room, max(values) * room
    return Axis(title, scale, lo, hi, tuple((t, label(t)) for t in units.log_ticks(lo, hi)))
