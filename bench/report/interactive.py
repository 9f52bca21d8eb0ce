"""The figures of the page as Plotly descriptions: plain dictionaries of data and layout.

Only Plotly's script is taken from the package, and it is put into the page once, so that the page works
without a network. Bars are placed by logarithm on a linear axis with the chart's own ticks, because
Plotly draws a bar on a logarithmic axis from its lower edge, and a speedup's bar has to start at 1.
"""

from __future__ import annotations

import html
import importlib
import json
import math
from collections.abc import Iterable
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
)
from bench.report.style import Look, look

GREY, PAPER = "#8a8f98", "rgba(0,0,0,0)"
SYMBOLS = {"build": "square", "compiling": "diamond", "rest of first call": "circle"}
OPACITY = {"peak": 1.0, "steady": 0.55, "CUDA": 0.3}
ROW_HEIGHT, CURVE_HEIGHT, ROOFLINE_HEIGHT = 38, 330, 560  # CSS pixels
#: Height that a character of a slanted name needs, pixels.
NAME_RISE = 4
HOVER_WIDTH = 60  # characters


def script() -> str | None:
    """Plotly's JavaScript, or None where the package is not installed."""
    try:
        importlib.import_module("plotly")
        offline = importlib.import_module("plotly.offline")
    except ImportError:
        return None
    return str(offline.get_plotlyjs())


def figure(chart: Chart) -> dict[str, Any]:
    """`chart` as Plotly's `data` and `layout`; colours that depend on light or dark are left to the page."""
    if isinstance(chart, RooflineChart):
        return roofline_figure(chart)
    return bar_figure(chart) if isinstance(chart, BarChart) else curve_figure(chart)


def as_json(described: dict[str, Any]) -> str:
    """JSON that may stand inside a script element, whatever the names in it."""
    text = json.dumps(described, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def bar_figure(chart: BarChart) -> dict[str, Any]:
    """Rows with the name and, below it, the figure: on a narrow screen there is no room at the right."""
    names = part_names([chart])
    many = len(names) > 1
    make = dot_trace if chart.dots else bar_trace
    layout = base_layout(chart, 70 + ROW_HEIGHT * len(chart.bars) + (30 if many else 0))
    layout["yaxis"] |= {
        "range": [len(chart.bars) - 0.45, -0.55],
        "tickvals": list(range(len(chart.bars))),
        "ticktext": [row_name(bar) for bar in chart.bars],
        "showgrid": False,
    }
    layout["xaxis"] |= axis_layout(placed(chart.axis))
    layout |= {"barmode": "overlay", "showlegend": many}
    if many:
        layout["margin"]["b"] = 70
        layout["legend"] |= {"yref": "container", "y": 0, "yanchor": "bottom"}
    if chart.axis.scale == "ratio":
        layout["shapes"] = [reference_line("x", 0.0)]
    data = [make(chart, name, names) for name in names]
    return {"data": [*data, *(legend_entry(trace) for trace in data if many)], "layout": layout}


def legend_entry(trace: dict[str, Any]) -> dict[str, Any]:
    """An empty grey trace for the legend, where `trace` itself would show its first variant's colour."""
    trace |= {"showlegend": False, "legendgroup": trace["name"]}
    marker = {"color": GREY} | ({"symbol": trace["marker"]["symbol"]} if "symbol" in trace["marker"] else {})
    shared = {key: trace[key] for key in ("type", "name", "legendgroup", "mode", "opacity") if key in trace}
    return shared | {"x": [None], "y": [None], "marker": marker}


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
        "y": [row for row, _, _ in found],
        "x": [end - start for end in ends],
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
        "x": [place(part.value, chart.axis) for _, _, part in found],
        "y": [row for row, _, _ in found],
        "hoverinfo": "text",
        "hovertext": [hover_text(bar.hover) for _, bar, _ in found],
        "marker": {"symbol": SYMBOLS[name], "size": 11, "color": [look(bar.variant).colour for _, bar, _ in found]},
    }


def curve_figure(chart: CurveChart) -> dict[str, Any]:
    """Every curve as a line and its marked points, hollow where doubtful; the legend switches both."""
    legend_rows = math.ceil(len(chart.curves) / 3)
    layout = base_layout(chart, CURVE_HEIGHT + 22 * legend_rows)
    layout["xaxis"] |= axis_layout(placed(chart.x)) | {"title": {"text": chart.x.title, "standoff": 6}}
    layout["yaxis"] |= axis_layout(placed(chart.y)) | {"title": {"text": chart.y.title, "standoff": 6}}
    layout["showlegend"] = True
    layout["shapes"] = [reference_line("y", level, dash="dot", width=0.7) for level, _ in chart.guides]
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
    shared = {"type": "scatter", "name": html.escape(curve.variant), "legendgroup": curve.variant}
    yield shared | {
        "mode": "lines",
        "x": [place(x, chart.x) for x in curve.xs],
        "y": [place(y, chart.y) for y in curve.ys],
        "line": {"color": style.colour, "dash": style.dash[1], "width": 2},
        "hoverinfo": "skip",
    }
    if not curve.points:
        return
    trace = shared | {
        "mode": "markers",
        "showlegend": False,
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
    names_height = 40 + NAME_RISE * max(len(column.name) for column in chart.columns)
    layout = base_layout(chart, ROOFLINE_HEIGHT + names_height + 22 * math.ceil(len(chart.marks) / 3))
    layout["xaxis"] |= axis_layout(placed(chart.x)) | {
        "title": {"text": chart.x.title, "standoff": 6},
        "showgrid": False,
    }
    layout["yaxis"] |= axis_layout(placed(chart.y)) | {"title": {"text": chart.y.title, "standoff": 6}}
    layout["margin"] |= {"t": names_height, "r": 84}
    layout["showlegend"] = True
    layout["legend"]["y"] = -0.13
    layout["annotations"] = [roof_name(roof, chart) for roof in chart.roofs]
    layout["annotations"] += [column_name(column, chart) for column in chart.columns]
    layout["shapes"] = [shape for column in chart.columns for shape in column_lines(column, chart)]
    roofs = [
        {
            "type": "scatter",
            "mode": "lines",
            "showlegend": False,
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
            "legendgroup": variant,
            "showlegend": False,
            "x": [place(point.x, chart.x) for point in points],
            "y": [place(point.y, chart.y) for point in points],
            "hoverinfo": "text",
            "hovertext": [hover_text(point.hover) for point in points],
            "marker": point_markers(look(variant), points),
        }
        for variant, points in chart.marks
    ]
    # Entries of their own: Plotly would take a variant's first mark, which may be a hollow one.
    entries = [
        {key: mark[key] for key in ("type", "mode", "name", "legendgroup")}
        | {"x": [None], "y": [None], "marker": {"color": look(variant).colour, "symbol": look(variant).marker[1]}}
        for mark, (variant, _) in zip(marks, chart.marks, strict=True)
    ]
    return {"data": [*roofs, *marks, *entries], "layout": layout}


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


def column_name(column: Column, chart: RooflineChart) -> dict[str, Any]:
    """A workload's name, slanted above the figure."""
    where = {"x": place(column.label_x, chart.x), "y": 1.04, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return where | {"text": html.escape(column.name), "textangle": -40, "showarrow": False, "font": {"size": 10}}


def base_layout(chart: Chart, height: int) -> dict[str, Any]:
    """Layout shared by all figures; the title stands in the page, where it wraps."""
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
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "itemsizing": "constant"},
        "xaxis": axis | {"title": {"text": chart.axis.title if isinstance(chart, BarChart) else "", "standoff": 6}},
        "yaxis": dict(axis),
    }


def axis_layout(axis: Axis) -> dict[str, Any]:
    """Range and ticks, already in the axis' own positions."""
    return {
        "range": [axis.lo, axis.hi],
        "tickvals": [value for value, _ in axis.ticks],
        "ticktext": [label for _, label in axis.ticks],
    }


def placed(axis: Axis) -> Axis:
    """`axis` with its range and ticks where `place` puts them."""
    room = 0.02 if axis.scale == "linear" and axis.hi == 1.0 else 0.0
    ticks = tuple((place(value, axis), label) for value, label in axis.ticks)
    return Axis(axis.title, axis.scale, place(axis.lo, axis) - room, place(axis.hi, axis) + room, ticks)


def place(value: float, axis: Axis) -> float:
    """The position of `value`: its decimal logarithm, but on a linear axis."""
    return value if axis.scale == "linear" else math.log10(max(value, 1e-12))


def error_bars(parts: Iterable[Part], axis: Axis) -> dict[str, Any]:
    """Plotly's lengths from each value to the ends of its interval; 0 where there is none."""
    above, below = [], []
    for part in parts:
        middle = place(part.value, axis)
        above.append(max(place(part.value if part.hi is None else part.hi, axis) - middle, 0.0))
        below.append(max(middle - place(part.value if part.lo is None else part.lo, axis), 0.0))
    shape = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 3, "color": GREY}
    return shape | {"array": above, "arrayminus": below}


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
