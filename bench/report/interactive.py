"""The figures of the page as Plotly descriptions: plain dictionaries of data and layout.

Bars are placed by logarithm on a linear axis with the chart's own ticks, because
Plotly draws a bar on a logarithmic axis from its lower edge, and a speedup's bar has to start at 1.
"""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.report.charts import part_names
from bench.report.descriptions import (
    Axis,
    Bar,
    BarChart,
    Chart,
    Column,
    Curve,
    CurveChart,
    Part,
    Point,
    Roof,
    RooflineChart,
    Scale,
)
from bench.report.style import Look, look

GREY, PAPER = "#8a8f98", "rgba(0,0,0,0)"
SYMBOLS = {"to the first result": "circle", "results": "circle", "gradients": "diamond"}
OPACITY = {"peak": 1.0, "steady": 0.55, "CUDA": 0.3}
ROW_HEIGHT, CURVE_HEIGHT, ROOFLINE_HEIGHT = 38, 330, 560  # CSS pixels
HOVER_WIDTH = 60  # characters
STEPS = 4000  # of an axis: a quarter of a pixel on a wide screen; figures cannot be enlarged


def figure(chart: Chart) -> dict[str, Any]:
    """`chart` as Plotly's `data` and `layout`; colours that depend on light or dark are left to the page."""
    if isinstance(chart, RooflineChart):
        return roofline_figure(chart)
    return bar_figure(chart) if isinstance(chart, BarChart) else curve_figure(chart)


def bar_figure(chart: BarChart) -> dict[str, Any]:
    """Rows with the name and, below it, the figure: on a narrow screen there is no room at the right."""
    names = part_names([chart])
    make = dot_trace if chart.dots else bar_trace
    layout = base_layout(chart, 70 + ROW_HEIGHT * len(chart.bars))
    layout["yaxis"] |= {
        "range": [len(chart.bars) - 0.45, -0.55],
        "tickvals": list(range(len(chart.bars))),
        "ticktext": [row_name(bar) for bar in chart.bars],
        "showgrid": False,
    }
    layout["xaxis"] |= axis_layout(placed(chart.axis))
    layout["barmode"] = "overlay"
    layout["shapes"] = [reference_line("x", 0.0)] if chart.axis.scale == "ratio" else []
    for level, name in chart.guides:
        layout["shapes"].append(reference_line("x", place(level, chart.axis)))
        layout["annotations"] = [
            {"x": place(level, chart.axis), "y": 1, "yref": "paper", "yanchor": "bottom", "text": html.escape(name)}
            | {"showarrow": False, "font": {"size": 10, "color": GREY}}
        ]
        layout["margin"]["t"] = 20
    return {"data": [make(chart, name, names) for name in names], "layout": layout}


@dataclass(frozen=True)
class Entry:
    """An entry of a figure's legend, which shows and hides what has its key.

    Attributes:
        key: as the traces' `meta`.
        colour: of the variant; grey for a part that all variants have.
        shape: `line`, `dot` or `bar`.
        opacity: of a bar's part.
    """

    key: str
    colour: str
    shape: str
    opacity: float = 1.0


def legend(chart: Chart) -> tuple[Entry, ...]:
    """The entries of a figure; none if there is only one kind of mark."""
    if isinstance(chart, BarChart):
        names = part_names([chart])
        shape = "dot" if chart.dots else "bar"
        return tuple(Entry(n, GREY, shape, OPACITY.get(n, 1.0)) for n in names) if len(names) > 1 else ()
    if isinstance(chart, RooflineChart):
        return tuple(Entry(name, look(name).colour, "dot") for name, _ in chart.marks)
    return tuple(Entry(c.variant, GREY if c.helper else look(c.variant).colour, "line") for c in chart.curves)


def note(chart: Chart) -> str:
    """Text below a figure: the names of the numbered workloads of a roofline, and where its ridges are."""
    if not isinstance(chart, RooflineChart):
        return ""
    names = "; ".join(f"{number} {column.name}" for number, column in enumerate(chart.columns, start=1))
    return f"{names}. {chart.beyond}" if chart.beyond else names


def bar_trace(chart: BarChart, name: str, names: list[str]) -> dict[str, Any]:
    """One part of every row, hatched where doubtful, with its interval."""
    found = [(row, bar, part) for row, bar in enumerate(chart.bars) for part in bar.parts if part.name == name]
    start = {"ratio": 0.0, "log": place(chart.axis.lo, chart.axis), "linear": 0.0}[chart.axis.scale]
    thickness = 0.62 / len(names)
    offset = -0.31 + names.index(name) * thickness
    ends = [place(part.value, chart.axis) for _, _, part in found]
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "meta": name,
        "y": [row for row, _, _ in found],
        "x": [rounded(end - start, chart.axis) for end in ends],
        "base": [start] * len(found),
        "width": thickness,
        "offset": offset,
        "opacity": OPACITY.get(name, 1.0),
        "hoverinfo": "text",
        "hovertext": [hover_text(bar.hover) for _, bar, _ in found],
        "marker": {
            "color": [look(bar.variant).colour for _, bar, _ in found],
            "pattern": {
                "shape": ["/" if bar.doubtful else "" for _, bar, _ in found],
                "fgcolor": "rgba(255,255,255,0.8)",
                "size": 7,
                "solidity": 0.3,
            },
        },
    }
    if any(part.hi is not None for _, _, part in found):
        trace["error_x"] = error_bars([part for _, _, part in found], chart.axis)
    return trace


def dot_trace(chart: BarChart, name: str, _names: list[str]) -> dict[str, Any]:
    """One part of every row as points."""
    found = [(row, bar, part) for row, bar in enumerate(chart.bars) for part in bar.parts if part.name == name]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "meta": name,
        "x": [place(part.value, chart.axis) for _, _, part in found],
        "y": [row for row, _, _ in found],
        "hoverinfo": "text",
        "hovertext": [hover_text(bar.hover) for _, bar, _ in found],
        "marker": {"symbol": SYMBOLS[name], "size": 11, "color": [look(bar.variant).colour for _, bar, _ in found]},
    }


def curve_figure(chart: CurveChart) -> dict[str, Any]:
    """Every curve as a line and its marked points, hollow where doubtful; the legend switches both."""
    layout = base_layout(chart, CURVE_HEIGHT)
    layout["xaxis"] |= axis_layout(placed(chart.x)) | {"title": {"text": chart.x.title, "standoff": 6}}
    layout["yaxis"] |= axis_layout(placed(chart.y)) | {"title": {"text": chart.y.title, "standoff": 6}}
    layout["shapes"] = [shade(*span) for span in chart.shaded]
    layout["shapes"] += [reference_line("x", place, dash="dot", width=0.8) for place in chart.breaks]
    layout["shapes"] += [reference_line("y", level, dash="dot", width=0.7) for level, _ in chart.guides]
    layout["annotations"] = [guide_name(level, name) for level, name in chart.guides]
    layout["margin"]["r"] = 34 if chart.guides else 12
    if chart.y.scale == "ratio":
        layout["shapes"].append(reference_line("y", 0.0))
    data = [trace for curve in chart.curves for trace in curve_traces(chart, curve)]
    return {"data": data, "layout": layout}


def guide_name(level: float, name: str) -> dict[str, Any]:
    """The name of a guide at the right; p90 and p99 are moved off p95."""
    shift = {"p90": -4, "p99": 4}.get(name, 0)
    where = {"x": 1, "xref": "paper", "xanchor": "left", "y": level, "yanchor": "middle", "yshift": shift}
    return where | {"text": name, "showarrow": False, "font": {"size": 9, "color": GREY}}


def curve_traces(chart: CurveChart, curve: Curve) -> Iterable[dict[str, Any]]:
    """The line, and the points with their hover text."""
    style = look(curve.variant)
    shared = {"type": "scatter", "name": html.escape(curve.variant), "meta": curve.variant}
    yield shared | {
        "mode": "lines",
        "x": [place(x, chart.x) for x in curve.xs],
        # Without a number the line breaks.
        "y": [None if math.isnan(y) else place(y, chart.y) for y in curve.ys],
        "line": {"color": GREY, "dash": "dot", "width": 2}
        if curve.helper
        else {"color": style.colour, "dash": style.dash[1], "width": 2 if curve.points else 1.2},
        "hoverinfo": "skip",
    }
    if not curve.points:
        return
    trace = shared | {
        "mode": "markers",
        "x": [place(point.x, chart.x) for point in curve.points],
        "y": [place(point.y, chart.y) for point in curve.points],
        "hoverinfo": "text",
        "hovertext": [hover_text(point.hover) for point in curve.points],
        "marker": point_markers(style, curve.points),
    }
    if any(point.hi is not None for point in curve.points):
        trace["error_y"] = error_bars([Part("", p.y, p.lo, p.hi) for p in curve.points], chart.y) | {
            "color": style.colour
        }
    yield trace


def point_markers(style: Look, points: Iterable[Point]) -> dict[str, Any]:
    """Marker of each point, hollow where doubtful."""
    hollow = [point.doubtful for point in points]
    return {
        "color": style.colour,
        "size": 9,
        "symbol": [style.marker[1] + ("-open" if is_hollow else "") for is_hollow in hollow],
        "line": {"width": 1.5 if any(hollow) else 0, "color": style.colour},
    }


def roofline_figure(chart: RooflineChart) -> dict[str, Any]:
    """The ceilings and their names, the workloads above, the cases of each variant as one switchable trace."""
    layout = base_layout(chart, ROOFLINE_HEIGHT)
    layout["xaxis"] |= axis_layout(placed(chart.x)) | {
        "title": {"text": chart.x.title, "standoff": 6},
        "showgrid": False,
    }
    layout["yaxis"] |= axis_layout(placed(chart.y)) | {"title": {"text": chart.y.title, "standoff": 6}}
    layout["margin"]["t"] = 30
    layout["annotations"] = [roof_name(roof, chart) for roof in chart.roofs]
    layout["annotations"] += [column_number(n, column, chart) for n, column in enumerate(chart.columns, start=1)]
    layout["shapes"] = [shape for column in chart.columns for shape in column_lines(column, chart)]
    roofs = [
        {
            "type": "scatter",
            "mode": "lines",
            "hoverinfo": "skip",
            "x": [place(x, chart.x) for x, _ in (roof.start, roof.end)],
            "y": [place(y, chart.y) for _, y in (roof.start, roof.end)],
            "line": {"color": GREY, "width": 2.2 if roof.level else 1.2},
        }
        for roof in chart.roofs
    ]
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": html.escape(variant),
            "meta": variant,
            "x": [place(point.x, chart.x) for point in points],
            "y": [place(point.y, chart.y) for point in points],
            "hoverinfo": "text",
            "hovertext": [hover_text(point.hover) for point in points],
            "marker": point_markers(look(variant), points),
        }
        for variant, points in chart.marks
    ]
    return {"data": [*roofs, *marks], "layout": layout}


def roof_name(roof: Roof, chart: RooflineChart) -> dict[str, Any]:
    """Over a level's right end, or beside a slope's lower end."""
    x, y = roof.end if roof.level else roof.start
    align = {"xanchor": "right", "yanchor": "bottom"} if roof.level else {"xanchor": "left", "yanchor": "top"}
    where = {"x": place(x, chart.x), "y": place(y, chart.y), "xshift": 0 if roof.level else 6, "showarrow": False}
    return where | align | {"text": html.escape(roof.name), "font": {"size": 10}}


def column_lines(column: Column, chart: RooflineChart) -> tuple[dict[str, Any], ...]:
    """A line through a workload's cases, and one from its upper end to the name, where that was moved."""
    line = reference_line("x", place(column.x, chart.x), dash="dot", width=0.7)
    return line, line | {"x1": place(column.label_x, chart.x), "y0": 1, "y1": 1.04}


def column_number(number: int, column: Column, chart: RooflineChart) -> dict[str, Any]:
    """A workload's number above the figure; a name has no room on a phone."""
    where = {"x": place(column.label_x, chart.x), "y": 1.03, "yref": "paper", "xanchor": "center", "yanchor": "bottom"}
    hovered = html.escape(column.name)
    return where | {"text": f"{number}", "hovertext": hovered, "showarrow": False, "font": {"size": 10}}


def base_layout(chart: Chart, height: int) -> dict[str, Any]:
    """Layout shared by all figures; the title is in the page, where it wraps."""
    axis: dict[str, Any] = {"zeroline": False, "automargin": True, "fixedrange": True}
    # Invisible ticks keep the labels off the bars.
    axis |= {"ticks": "outside", "ticklen": 5, "tickcolor": PAPER}
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {"size": 12},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        # The page has a legend of its own, which wraps, and can be used by keyboard.
        "showlegend": False,
        "xaxis": axis | {"title": {"text": chart.axis.title if isinstance(chart, BarChart) else "", "standoff": 6}},
        "yaxis": dict(axis),
    }


def axis_layout(axis: Axis) -> dict[str, Any]:
    """Range and ticks, already in the axis' own positions."""
    return {
        "range": [axis.lo, axis.hi],
        "tickvals": [value for value, _ in axis.ticks],
        # A name of a run may be a tick, and Plotly reads a little HTML.
        "ticktext": [html.escape(label) for _, label in axis.ticks],
    }


def placed(axis: Axis) -> Axis:
    """`axis` with its range and ticks where `place` puts them."""
    room = 0.02 if axis.scale == "linear" and axis.hi == 1.0 else 0.0
    ticks = tuple((place(value, axis), label) for value, label in axis.ticks)
    return Axis(axis.title, axis.scale, place(axis.lo, axis) - room, place(axis.hi, axis) + room, ticks)


def place(value: float, axis: Axis) -> float:
    """The position of `value`: its decimal logarithm, but on a linear axis; rounded to what can be seen."""
    return rounded(position(value, axis.scale), axis)


def position(value: float, scale: Scale) -> float:
    """`place` in full."""
    return value if scale == "linear" else math.log10(max(value, 1e-12))


def rounded(where: float, axis: Axis) -> float:
    """A position, or a distance, without digits that are less than a `STEPS`th of its axis: they would fill a page."""
    return round(where, decimals(axis.scale, axis.lo, axis.hi))


@functools.lru_cache
def decimals(scale: Scale, lo: float, hi: float) -> int:
    """Decimals that positions on an axis have; negative where even the last digits before the point do not count."""
    width = abs(position(hi, scale) - position(lo, scale))
    return math.ceil(math.log10(STEPS / width)) if width else 0


def error_bars(parts: Iterable[Part], axis: Axis) -> dict[str, Any]:
    """Plotly's lengths from each value to the ends of its interval; 0 if there is none."""
    above, below = [], []
    for part in parts:
        middle = place(part.value, axis)
        high, low = (place(part.value if end is None else end, axis) for end in (part.hi, part.lo))
        above.append(rounded(max(high - middle, 0.0), axis))
        below.append(rounded(max(middle - low, 0.0), axis))
    shape = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 3, "color": GREY}
    return shape | {"array": above, "arrayminus": below}


def shade(start: float, end: float) -> dict[str, Any]:
    """A span of x over the whole height, behind the curves."""
    where = {"type": "rect", "x0": start, "x1": end, "y0": 0, "y1": 1, "yref": "paper"}
    return where | {"fillcolor": GREY, "opacity": 0.18, "line": {"width": 0}, "layer": "below"}


def reference_line(across: str, level: float, dash: str = "solid", width: float = 1.3) -> dict[str, Any]:
    """A line over the whole figure at `level` of the axis `across`."""
    other = "y" if across == "x" else "x"
    return {
        "type": "line",
        f"{across}0": level,
        f"{across}1": level,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": GREY, "width": width, "dash": dash},
    }


def row_name(bar: Bar) -> str:
    """The variant, and below it in small its figure or its status; grey when it did not run."""
    name, label = html.escape(bar.variant), html.escape(bar.label)
    small = f"<span style='font-size:10px'>{label}</span>"
    return f"{name}<br>{small}" if bar.parts else f"<span style='color:{GREY}'>{name}<br>{small}</span>"


def hover_text(lines: tuple[str, ...]) -> str:
    """Lines for Plotly, which reads a little HTML; long ones are broken, since its label does not wrap."""
    if not lines:
        return ""
    first, *rest = lines
    wrapped = [html.escape(part) for line in rest for part in wrap(line)]
    return "<br>".join([f"<b>{html.escape(first)}</b>", *wrapped])


def wrap(line: str) -> list[str]:
    """`line` in pieces of at most `HOVER_WIDTH` characters, broken between words."""
    pieces = [""]
    for word in line.split():
        if pieces[-1] and len(pieces[-1]) + len(word) >= HOVER_WIDTH:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]} {word}".strip()
    return pieces
