"""Descriptions of figures as plain data: charts and their parts, before anything is drawn.

The Matplotlib files and the Plotly figures of the page are both drawn from these descriptions, so they cannot disagree
about a value, a mark, a scale or an order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log", "ratio"]
Ticks = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Part:
    """One figure of a bar: its value, and the ends of its interval where it has one."""

    name: str
    value: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Bar:
    """One variant's row. Without parts it did not run, and `label` is its status."""

    variant: str
    label: str
    parts: tuple[Part, ...] = ()
    doubtful: bool = False
    hover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One axis with its round positions; a `ratio` axis is logarithmic and its bars start at 1."""

    title: str
    scale: Scale
    lo: float
    hi: float
    ticks: Ticks


@dataclass(frozen=True)
class BarChart:
    """Horizontal rows of one group.

    Attributes:
        title: of the chart.
        workload: that it is about, or another name that its file gets where there are many.
        axis: of the values.
        bars: the rows from the top.
        dots: draw parts as points, where bars on a logarithmic axis would mislead.
        guides: values with a line across all rows, and their names.
    """

    title: str
    workload: str
    axis: Axis
    bars: tuple[Bar, ...]
    dots: bool = False
    guides: Ticks = ()


@dataclass(frozen=True)
class Point:
    """A figure on a curve."""

    x: float
    y: float
    lo: float | None = None
    hi: float | None = None
    doubtful: bool = False
    hover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """One variant's line through `xs` and `ys`, and the points that are marked on it; a `helper` is of no variant.

    The line breaks where a `ys` is NaN.
    """

    variant: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    points: tuple[Point, ...]
    helper: bool = False


@dataclass(frozen=True)
class CurveChart:
    """The curves of one group or sweep.

    Attributes:
        title: of the chart.
        workload: that it is about.
        x, y: the axes.
        curves: from back to front.
        guides: levels of y with a name each.
        shaded: spans of x that something disturbed.
        breaks: places of x where something new begins.
    """

    title: str
    workload: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    guides: Ticks = ()
    shaded: tuple[tuple[float, float], ...] = ()
    breaks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Roof:
    """One ceiling, a straight line on logarithmic axes: level for products, rising for bandwidth."""

    name: str
    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def level(self) -> bool:
        """Return whether it is one of products."""
        return self.start[1] == self.end[1]


@dataclass(frozen=True)
class Column:
    """The cases of one workload, which stand above each other: `x` is theirs, `label_x` where the name has room."""

    name: str
    x: float
    label_x: float


@dataclass(frozen=True)
class RooflineChart:
    """Cases under the ceilings of their machine; `marks` are the points of each variant.

    `beyond` is a sentence on where the ridges are, if they lie outside the picture.
    """

    title: str
    workload: str
    x: Axis
    y: Axis
    roofs: tuple[Roof, ...]
    columns: tuple[Column, ...]
    marks: tuple[tuple[str, tuple[Point, ...]], ...]
    beyond: str = ""


Chart = BarChart | CurveChart | RooflineChart


@dataclass(frozen=True)
class Kind:
    """One kind of figure: the stem of its files, its heading, what to know to read it, its charts.

    A `wide` one gets more of the page's width.
    """

    name: str
    heading: str
    caption: str
    charts: tuple[Chart, ...]
    wide: bool = False
