"""The plots of a run as PNG and SVG files, drawn by Matplotlib.

One file a kind of figure with one panel per group; above `MAX_PANELS` panels, one file per workload. The
figures are made without pyplot, so a caller's backend, style and open figures stay as they are.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.records import durable
from bench.report.charts import part_names
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
    RooflineChart,
    Scale,
)
from bench.report.style import Look, look
from kernels.host.cores import usable_cores

MAX_PANELS = 8
#: Sheets that a process of its own must have to draw, as it takes 2 s to start, and most such processes.
LEAST_SHEETS, MOST_PROCESSES = 12, 8
PANEL_WIDTH, ROW_HEIGHT, CURVE_HEIGHT, ROOFLINE_HEIGHT = 6.4, 0.27, 3.6, 6.2  # inches
DPI = 130
INK, GREY, PALE = "#22262b", "#8a8f98", "#e3e6ea"
#: Kinds whose files of an earlier report are removed where the run has none of them any more.
NAMES = (
    "speedup", "latency", "throughput", "memory", "cold-start", "break-even", "trade-off", "scaling", "quality",
    "parity-errors", "rounds", "own-time",
)  # fmt: skip
DOUBT_NAME = "doubtful: machine disturbed, or interval too wide"
#: Said below a roofline: points that are beside their place would be read as other intensities.
BESIDE = "The variants of a workload stand side by side around its dotted line."
#: Matplotlib's marker of each part of a cold start, and the opacity of each bar of memory.
DOTS = {"to the first result": "o", "results": "o", "gradients": "D"}
OPACITY = {"peak": 1.0, "steady": 0.5, "CUDA": 0.25}

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 1.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Names and user text may hold a dollar sign, which is not a formula.
    "text.parse_math": False,
    # The same run gives the same bytes.
    "svg.hashsalt": "seq2seq-bench",
}


def write_plots(kinds: Iterable[Kind], folder: Path) -> dict[str, tuple[Path, ...]]:
    """Write PNG and SVG of every kind into `folder`, and return the paths by the kind's name.

    Plots that an earlier report of the run left there are removed when the new ones are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(replace(kind, charts=charts), folder / stem) for kind in kinds for stem, charts in sheets(kind)]
    written: dict[str, tuple[Path, ...]] = {}
    for (kind, _), paths in zip(drawn, _saved(drawn), strict=True):
        written[kind.name] = written.get(kind.name, ()) + paths
    kept = {path for paths in written.values() for path in paths}
    for name in NAMES:
        for old in [*folder.glob(f"{name}.*"), *folder.glob(f"{name}-*.*")]:
            if old.suffix in {".png", ".svg"} and old not in kept:
                old.unlink()
    return written


def _saved(drawn: Sequence[tuple[Kind, Path]]) -> Iterable[tuple[Path, Path]]:
    """Draw and write each sheet, on all cores where there are many: a pair of files takes 0.3 s."""
    processes = min(usable_cores(), len(drawn) // LEAST_SHEETS, MOST_PROCESSES)
    if processes < 2:  # noqa: PLR2004 - this one can do it
        return [_sheet(each) for each in drawn]
    # Not forked: this process may have threads, and one that holds a lock then would hold it in the child for ever.
    spawned = multiprocessing.get_context("spawn")
    # Ctrl-C is for this process alone: what it interrupts ends them.
    with ProcessPoolExecutor(processes, spawned, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(pool.map(_sheet, drawn, chunksize=4))


def _sheet(drawn: tuple[Kind, Path]) -> tuple[Path, Path]:
    kind, stem = drawn
    with mpl.rc_context(cast("Any", RC)):
        return save(draw(kind, kind.charts), stem)


def sheets(kind: Kind) -> Iterator[tuple[str, tuple[Chart, ...]]]:
    """The files of `kind`: stem and charts of each, at most `MAX_PANELS` charts."""
    if len(kind.charts) <= MAX_PANELS:
        yield kind.name, kind.charts
        return
    used: set[str] = set()
    for workload in dict.fromkeys(chart.workload for chart in kind.charts):
        charts = tuple(chart for chart in kind.charts if chart.workload == workload)
        for start in range(0, len(charts), MAX_PANELS):
            # The end of a checkpoint's path says most, and a file's name has at most 255 characters.
            stem = base = f"{kind.name}-{re.sub(r'[^A-Za-z0-9._-]+', '-', workload)[-100:].lstrip('-')}"
            number = 2
            while stem.lower() in used:
                stem, number = f"{base}-{number}", number + 1
            used.add(stem.lower())
            yield stem, charts[start : start + MAX_PANELS]


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `figure` as PNG and as SVG, without a date in either."""
    png, svg = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg"))
    for path, options in ((png, {"format": "png", "dpi": DPI}), (svg, {"format": "svg", "metadata": {"Date": None}})):
        drawn = io.BytesIO()
        figure.savefig(drawn, **options)
        durable.replace(path, drawn.getvalue())
    return png, svg


def draw(kind: Kind, charts: tuple[Chart, ...]) -> Figure:
    """All `charts` in one figure, two a row, with one legend."""
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    heights = [max(height(chart) for chart in charts[row * columns :][:columns]) for row in range(rows)]
    handles = legend(charts)
    legend_rows = math.ceil(len(handles) / (3 * columns))
    size = (PANEL_WIDTH * columns, sum(heights) + 0.5 + 0.22 * legend_rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(kind.heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for axes, chart in zip(panels, charts, strict=False):
        axes.set_title(chart.title, loc="left")
        if isinstance(chart, BarChart):
            draw_bars(axes, chart)
        elif isinstance(chart, RooflineChart):
            draw_roofline(axes, chart)
        else:
            draw_curves(axes, chart)
    for axes in panels[len(charts) :]:
        axes.set_visible(False)
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=3 * columns, frameon=False, fontsize=8)
    return figure


def height(chart: Chart) -> float:
    """Inches that a panel needs, title and axis included."""
    if isinstance(chart, RooflineChart):
        return ROOFLINE_HEIGHT
    if isinstance(chart, CurveChart):
        return CURVE_HEIGHT
    return 0.95 + ROW_HEIGHT * max(len(chart.bars), 2) * (1.4 if parts_a_row(chart) > 1 and not chart.dots else 1)


def parts_a_row(chart: BarChart) -> int:
    """Number of bars in the fullest row."""
    return max(len(bar.parts) for bar in chart.bars)


def legend(charts: tuple[Chart, ...]) -> list[Any]:
    """The entries that these charts need: curves by variant, parts by shape, the mark where it occurs."""
    curves = [c for chart in charts if isinstance(chart, CurveChart) for c in chart.curves if not c.helper]
    bars = [bar for chart in charts if isinstance(chart, BarChart) for bar in chart.bars]
    dots = any(isinstance(chart, BarChart) and chart.dots for chart in charts)
    handles: list[Any] = [curve_handle(name) for name in dict.fromkeys(curve.variant for curve in curves)]
    marks = [mark for chart in charts if isinstance(chart, RooflineChart) for mark in chart.marks]
    handles += [curve_handle(name, line=False) for name in dict.fromkeys(variant for variant, _ in marks)]
    names = part_names(charts)
    if dots and len(names) > 1:
        handles += [Line2D([], [], color=GREY, marker=DOTS[name], ls="", label=name) for name in names]
    elif len(names) > 1:
        handles += [Patch(facecolor=GREY, alpha=OPACITY[name], label=name) for name in names]
    if any(bar.doubtful for bar in bars):
        handles.append(Patch(facecolor=GREY, edgecolor="white", hatch="////", label=f"~ {DOUBT_NAME}"))
    if any(point.doubtful for _, points in [*((c.variant, c.points) for c in curves), *marks] for point in points):
        handles.append(Line2D([], [], color=GREY, marker="o", mfc="white", ls="", label=f"hollow: {DOUBT_NAME}"))
    return handles


def curve_handle(variant: str, *, line: bool = True) -> Line2D:
    """A variant's entry in the legend of curves, or of points without lines."""
    style = look(variant)
    dash = style.dash[0] if line else ""
    return Line2D([], [], color=style.colour, marker=style.marker[0], ls=dash, ms=5, label=variant)


def draw_bars(axes: Axes, chart: BarChart) -> None:
    """One row per variant, its name at the left and its figure at the right, where neither meets a bar."""
    count = len(chart.bars)
    set_axis(axes, chart.axis, "x")
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), [bar.variant for bar in chart.bars])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    if chart.axis.scale == "ratio":
        axes.axvline(1.0, color=INK, lw=1, zorder=3)
    for level, guide in chart.guides:
        axes.axvline(level, color=INK, lw=1, zorder=1.5)
        axes.annotate(
            guide, (level, 1), (2, 2), xycoords=axes.get_xaxis_transform(), textcoords="offset points", fontsize=7
        )
    for row, (bar, name) in enumerate(zip(chart.bars, axes.get_yticklabels(), strict=True)):
        ran = bool(bar.parts)
        name.set_color(INK if ran else GREY)
        axes.text(
            1.02, row, bar.label, transform=axes.get_yaxis_transform(), va="center", fontsize=8,
            color=INK if ran else GREY, style="normal" if ran else "italic",
        )  # fmt: skip
        if chart.dots:
            draw_dots(axes, row, bar)
        else:
            draw_parts(axes, row, bar, chart)


def draw_parts(axes: Axes, row: int, bar: Bar, chart: BarChart) -> None:
    """The bars of one row, hatched where doubtful, and their intervals."""
    start = {"ratio": 1.0, "log": chart.axis.lo, "linear": 0.0}[chart.axis.scale]
    thickness = 0.72 / parts_a_row(chart)
    for place, part in enumerate(bar.parts):
        middle = row + (place - (len(bar.parts) - 1) / 2) * thickness
        axes.barh(
            middle, part.value - start, thickness, left=start, color=look(bar.variant).colour,
            alpha=OPACITY.get(part.name, 1.0), edgecolor="white", linewidth=0,
            hatch="////" if bar.doubtful else None, zorder=2,
        )  # fmt: skip
        if chart.axis.scale == "ratio":
            axes.plot(part.value, middle, "o", color=INK, ms=3, zorder=4)
        if part.lo is not None and part.hi is not None:
            axes.errorbar(part.value, middle, xerr=spread(part), color=INK, lw=1, capsize=2, zorder=4)


def spread(part: Part) -> list[list[float]]:
    """Lengths below and above the value, as `errorbar` wants them; a bootstrap's end may pass the median."""
    lo, hi = (part.value if end is None else end for end in (part.lo, part.hi))
    return [[max(part.value - lo, 0.0)], [max(hi - part.value, 0.0)]]


def draw_dots(axes: Axes, row: int, bar: Bar) -> None:
    """The parts of one row as points on a line."""
    colour = look(bar.variant).colour
    values = [part.value for part in bar.parts]
    axes.plot([min(values), max(values)], [row, row], color=colour, lw=1.5, alpha=0.6, zorder=2)
    for part in bar.parts:
        axes.plot(part.value, row, DOTS[part.name], color=colour, ms=6, mec="white", mew=0.6, zorder=3)


def draw_curves(axes: Axes, chart: CurveChart) -> None:
    """The curves with their marked points, and the guides named at the right."""
    set_axis(axes, chart.x, "x")
    set_axis(axes, chart.y, "y")
    if chart.y.scale == "ratio":
        axes.axhline(1.0, color=INK, lw=1, zorder=1.5)
    for level, name in chart.guides:
        axes.axhline(level, color=GREY, lw=0.6, ls=(0, (1, 3)), zorder=1.5)
        # p95 and p99 are a few points of type apart: each is moved off the other.
        shift = {"p90": -3, "p99": 3}.get(name, 0)
        axes.annotate(
            name, (1.0, level), (4, shift), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            va="center", fontsize=7, color=GREY,
        )  # fmt: skip
    for start, end in chart.shaded:
        axes.axvspan(start, end, color=GREY, alpha=0.18, lw=0, zorder=0)
    for place in chart.breaks:
        axes.axvline(place, color=GREY, lw=0.7, ls=(0, (1, 2)), zorder=1)
    for curve in chart.curves:
        if curve.helper:
            axes.plot(curve.xs, curve.ys, color=GREY, ls=":", lw=1.6, zorder=1.8, label=curve.variant)
        else:
            draw_curve(axes, curve, look(curve.variant))


def draw_curve(axes: Axes, curve: Curve, style: Look) -> None:
    """One line, its intervals, and its points, hollow where doubtful."""
    axes.plot(curve.xs, curve.ys, color=style.colour, ls=style.dash[0], lw=1.6, zorder=2)
    for point in curve.points:
        if point.lo is not None and point.hi is not None:
            axes.plot([point.x, point.x], [point.lo, point.hi], color=style.colour, lw=1, zorder=2)
        draw_point(axes, point, style)


def draw_point(axes: Axes, point: Point, style: Look, size: float = 5.5) -> None:
    """One figure, hollow where doubtful."""
    axes.plot(
        point.x, point.y, style.marker[0], ms=size, zorder=3, mew=1.1,
        mec=style.colour if point.doubtful else "white", mfc="white" if point.doubtful else style.colour,
    )  # fmt: skip


def draw_roofline(axes: Axes, chart: RooflineChart) -> None:
    """The ceilings named along their lines, the workloads above, the cases below."""
    set_axis(axes, chart.x, "x")
    set_axis(axes, chart.y, "y")
    axes.set_xlabel("\n".join(filter(None, (chart.x.title, BESIDE, chart.beyond))), linespacing=1.3)
    axes.grid(visible=False, axis="x")
    for roof in chart.roofs:
        (x0, y0), (x1, y1) = roof.start, roof.end
        axes.plot(
            [x0, x1],
            [y0, y1],
            color=INK if roof.level else GREY,
            lw=1.4 if roof.level else 1,
            zorder=5 if roof.level else 2,
        )
        # A level's name stands over its right end, a slope's beside its lower end, where slopes are furthest apart.
        at, offset, align = ((x1, y1), (-2, 3), "right") if roof.level else ((x0, y0), (7, -2), "left")
        axes.annotate(
            roof.name, at, offset, textcoords="offset points", ha=align, va="bottom" if roof.level else "top",
            fontsize=7, color=INK, zorder=5.5, bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.8},
        )  # fmt: skip
    above = (chart.y.hi / chart.y.lo) ** 0.03
    for column in chart.columns:
        axes.plot(
            [column.x, column.x, column.label_x], [chart.y.lo, chart.y.hi / above, chart.y.hi],
            color=GREY, lw=0.5, ls=(0, (1, 2)), zorder=1.5,
        )  # fmt: skip
    names = axes.secondary_xaxis("top")
    names.set_xticks([c.label_x for c in chart.columns], [c.name for c in chart.columns], rotation=40, ha="left")
    names.set_xticks([], minor=True)
    names.tick_params(length=0, labelsize=7, pad=1)
    names.spines["top"].set_visible(False)
    for variant, points in chart.marks:
        for point in points:
            draw_point(axes, point, look(variant), size=7)


def set_axis(axes: Axes, axis: Axis, which: str) -> None:
    """Scale, range, title and ticks of one axis; no ticks but the chart's own."""
    scales: dict[Scale, str] = {"linear": "linear", "log": "log", "ratio": "log"}
    side = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}label": axis.title, f"{which}scale": scales[axis.scale], f"{which}lim": (axis.lo, axis.hi)})
    side.set_ticks([value for value, _ in axis.ticks], [label for _, label in axis.ticks])
    side.set_ticks([], minor=True)
