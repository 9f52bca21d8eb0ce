"""Time to quality: validation quality against seconds of training, a line per variant, and the figures as a table."""

from __future__ import annotations

from bench import units
from bench.analysis.run_summary import DOUBT, ReportedRun
from bench.errors import UsageError
from bench.records.quality import QualityRecord, read, read_rounds
from bench.records.schema import Status
from bench.report.descriptions import Axis, Curve, CurveChart, Kind, Point
from bench.report.style import look
from bench.report.tables import Cell, Row, Table

CAPTION = (
    "Quality on the validation data over seconds of training, evaluations left out; lower is better. All "
    "variants start from the same weights, see the same batches in the same order, and are judged by the same model in "
    "fp32. Hollow points: something else used the machine during that block. This is a single seed: how many steps "
    "another would take is not known."
)
#: Quality above this multiple of the baseline's is left out of the picture: a first evaluation would flatten the rest.
MOST = 1.6


def kinds(run: ReportedRun) -> tuple[Kind, ...]:
    """One chart per task; nothing where the run trained none."""
    charts = []
    rows = read_rounds(run.path)
    for task, records in by_task(run).items():
        target, baseline = records[0].target, records[0].baseline
        curves = []
        for record in records:
            elapsed, points = 0.0, []
            for row in rows:
                if row["task"] != task or row["variant"] != record.variant or record.status is not Status.OK:
                    continue
                elapsed += row["training_s"]
                text = (record.variant, f"step {row['step']:g}, {units.seconds(elapsed)}: {row['quality']:.3g}")
                points.append(Point(elapsed, row["quality"], doubtful=bool(row["why"]), hover=(*text, row["why"])))
            if points:
                xs, ys = tuple(p.x for p in points), tuple(p.y for p in points)
                curves.append(Curve(record.variant, xs, ys, tuple(points)))
        if not curves or target is None or baseline is None:
            continue
        right = 1.04 * max(curve.xs[-1] for curve in curves)
        top = min(1.04 * max(y for curve in curves for y in (*curve.ys, baseline)), MOST * baseline)
        seconds = units.tick_label("s")
        x = Axis("seconds of training", "linear", 0.0, right, tuple((t, seconds(t)) for t in units.linear_ticks(right)))
        y = Axis(records[0].metric, "linear", 0.0, top, tuple((t, f"{t:g}") for t in units.linear_ticks(top)))
        guides = ((target, "target"), (baseline, "naive"))
        charts.append(CurveChart(task, task, x, y, tuple(curves), guides))
    return (Kind("quality", "Time to quality", CAPTION, tuple(charts)),) if charts else ()


def table(run: ReportedRun) -> Table | None:
    """The figures of all tasks; nothing where the run trained none."""
    names = (
        "task", "variant", "time to target", "95 % interval", "speedup", "steps to target", "a step", "final",
        "best", "curve distance",
    )  # fmt: skip
    rows = []
    for task, records in by_task(run).items():
        for record in records:
            head = (Cell(task), Cell(record.variant, colour=look(record.variant).colour))
            if record.status is not Status.OK:
                rows.append(Row((*head, Cell(f"{record.status.value}: {record.reason}")), "off"))
                continue
            mark = DOUBT if record.disturbed_share else ""
            why = f"{units.share(record.disturbed_share)} of its blocks were disturbed" if mark else ""
            lo, hi = record.time_to_target_lo_s, record.time_to_target_hi_s
            reached = record.time_to_target_s is not None
            figures = (
                Cell(mark + units.seconds(record.time_to_target_s) if reached else "not reached",
                     record.time_to_target_s, why),
                Cell(f"[{units.seconds(lo)}, {units.seconds(hi)}]" if reached else "", lo),
                Cell(units.ratio(record.speedup), record.speedup),
                Cell("" if record.steps_to_target is None else str(record.steps_to_target), record.steps_to_target),
                Cell(units.seconds(record.step_s), record.step_s),
                *(Cell("" if q is None else f"{q:.3g}", q) for q in (record.final_quality, record.best_quality)),
                Cell(units.share(record.curve_distance), record.curve_distance),
            )  # fmt: skip
            rows.append(Row((*head, *figures)))
    if not rows:
        return None
    first = next(iter(by_task(run).values()))[0]
    title = "Time to quality"
    if first.target is not None and first.baseline is not None:
        title += f": {first.metric} {first.target:.3g}, where the seasonal naive forecast has {first.baseline:.3g}"
    return Table(title, names, tuple(rows))


def by_task(run: ReportedRun) -> dict[str, list[QualityRecord]]:
    """The records by task.

    Raises:
        UsageError: when quality.csv is of another release.
    """
    try:
        records = read(run.path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    found: dict[str, list[QualityRecord]] = {}
    for record in records:
        found.setdefault(record.task, []).append(record)
    return found
