"""Charts of how a run went: errors against their limits, rounds in time, and where the run's own time went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from bench import units
from bench.analysis.run_summary import RankedGroup, ReportedRun
from bench.records.schema import Record
from bench.report.charts import value_axis
from bench.report.descriptions import Axis, Bar, BarChart, Curve, CurveChart, Kind, Part

PARITY_CAPTION = (
    "Largest errors of the gate as shares of their limits, on a logarithmic axis: results, and in training gradients. "
    "The line at 1 is the limit, which depends on the precision; cases to the right of it were refused."
)
ROUNDS_CAPTION = (
    "Time of a call in each round relative to the variant's median, in the order of the rounds. In shaded rounds "
    "something else used the machine or the host moved its cores apart. At a dotted line a new process begins."
)
OWN_TIME_CAPTION = "How the run spent its time, in seconds. Everything but the timed rounds is overhead."
#: Rounds that a chart shows at most; of more, every second or third is left out.
MOST_ROUNDS = 240
#: Factor around its median that a round's time is drawn within.
MOST_OFF = 8.0
#: Errors are drawn down to this share of their limit: an exact result has no place on the axis.
LEAST_SHARE = 1e-6


def kinds(run: ReportedRun) -> tuple[Kind, ...]:
    """The kinds of figures about the run itself that it has something to show for."""
    single = [group for group in run.groups if not group.sweep_axis]
    found = (
        Kind("parity-errors", "Errors against their limits", PARITY_CAPTION, _each(parity_chart(g) for g in single)),
        Kind("rounds", "Rounds in time", ROUNDS_CAPTION, _each(rounds_chart(g, run) for g in single), wide=True),
        Kind("own-time", "Where the run's time went", OWN_TIME_CAPTION, _each([own_time_chart(run)])),
    )
    return tuple(kind for kind in found if kind.charts)


def parity_chart(group: RankedGroup) -> BarChart | None:
    """Errors of every variant that the gate saw, as shares of their limits."""
    bars = []
    for record in group.records:
        parts = tuple(
            Part(name, max(error / limit, LEAST_SHARE))
            for name, error, limit in errors(record)
            if error is not None and limit
        )
        if parts:
            label = ", ".join(f"{units.error(e)} of {units.error(n)}" for _, e, n in errors(record) if e is not None)
            bars.append(Bar(record.variant, label, parts, hover=(record.variant, label, record.parity_worst)))
    if not bars:
        return None
    values = [part.value for bar in bars for part in bar.parts]
    axis = value_axis("error / limit", [*values, 1.3], "", "log")
    return BarChart(group.title, group.key.workload, axis, tuple(bars), dots=True, guides=((1.0, "limit"),))


def errors(record: Record) -> tuple[tuple[str, float | None, float | None], ...]:
    """Name, error and limit of both kinds."""
    return (
        ("results", record.parity_error, record.parity_limit),
        ("gradients", record.grad_error, record.grad_limit),
    )


def rounds_chart(group: RankedGroup, run: ReportedRun) -> CurveChart | None:
    """Every variant's time over the rounds, disturbed ones shaded."""
    records = [record for record in group.ok if run.group(record).times(record.variant)]
    if not records:
        return None
    processes = run.group(records[0]).processes
    rounds = [found for rounds in processes for found in rounds]
    shown = range(0, len(rounds), max(1, -(-len(rounds) // MOST_ROUNDS)))
    curves = []
    for record in records:
        times = {n: rounds[n].blocks[record.variant].typical_s for n in shown if record.variant in rounds[n].blocks}
        if not times:
            continue
        middle = float(np.median(list(times.values())))
        # A variant that rests has no time, and no line joins the rounds before with those after.
        ys = (min(MOST_OFF, max(1 / MOST_OFF, times[n] / middle)) if n in times else math.nan for n in shown)
        curves.append(Curve(record.variant, tuple(n + 1 for n in shown), tuple(float(f"{y:.4g}") for y in ys), ()))
    if not curves or len(shown) < 2:  # noqa: PLR2004
        return None
    ends = np.cumsum([len(found) for found in processes])[:-1]
    ticks = tuple((t, f"{t:g}") for t in units.linear_ticks(len(rounds) + 1.0))
    x = Axis("round", "linear", 0.0, len(rounds) + 1.0, ticks)
    y = value_axis("time / median", [y for curve in curves for y in curve.ys if not math.isnan(y)], "x", "ratio")
    shaded = spans(n + 1 for n, found in enumerate(rounds) if found.disturbed)
    breaks = tuple(float(end) + 0.5 for end in ends)
    return CurveChart(group.title, group.key.workload, x, y, tuple(curves), shaded=shaded, breaks=breaks)


def spans(numbers: Iterable[int]) -> tuple[tuple[float, float], ...]:
    """Runs of neighbouring numbers as spans half a step wider on either side."""
    found: list[tuple[float, float]] = []
    for number in numbers:
        if found and number - 0.5 <= found[-1][1]:
            found[-1] = (found[-1][0], number + 0.5)
        else:
            found.append((number - 0.5, number + 0.5))
    return tuple(found)


def own_time_chart(run: ReportedRun) -> BarChart | None:
    """Seconds of the run by kind, longest first; None where the run did not record them."""
    times: dict[str, float] = {}
    for part in (run.environment.get("run"), *(run.environment.get("resumes") or ())):
        found = part.get("own_time_s") if isinstance(part, Mapping) else None
        for name, seconds in found.items() if isinstance(found, Mapping) else ():
            if isinstance(seconds, int | float) and seconds > 0:
                times[str(name)] = times.get(str(name), 0.0) + seconds
    total = sum(times.values())
    bars = [
        Bar(name, f"{units.seconds(s)}, {units.share(s / total)}", (Part("seconds", s),))
        for name, s in sorted(times.items(), key=lambda item: -item[1])
    ]
    if not bars:
        return None
    axis = value_axis("time of the run", list(times.values()), "s", "linear")
    return BarChart(run.suite, "run", axis, tuple(bars))


def _each(charts: Iterable[BarChart | CurveChart | None]) -> tuple[BarChart | CurveChart, ...]:
    return tuple(chart for chart in charts if chart is not None)
