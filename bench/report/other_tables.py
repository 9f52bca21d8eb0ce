"""Tables that no record makes: the environment, the machine's ceilings, and what a figure draws."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bench import units
from bench.analysis.roofline import Ceilings
from bench.report.descriptions import BarChart, Chart, CurveChart, Kind
from bench.report.style import look
from bench.report.tables import Cell, Row, Table


def environment(sections: Mapping[str, Any]) -> tuple[Table, ...]:
    """One table a section, whatever the sections are."""
    return tuple(
        Table(str(name), ("name", "value"), rows)
        for name, section in sections.items()
        if (rows := tuple(Row((Cell(key), Cell(text))) for key, text in flat(section) if text))
    )


def flat(values: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of nested JSON as dotted names and texts."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, Sequence) and values and all(isinstance(value, Mapping) for value in values):
        for number, value in enumerate(values, start=1):
            yield from flat(value, f"{path}.{number}" if path else str(number))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        yield path, ", ".join(str(value) for value in values)
    else:
        yield path, said(path, values)


def said(path: str, value: Any) -> str:
    """A value of environment.json as people read it, by the unit that its name ends in."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    shown = {"bytes": units.megabytes, "s": units.seconds, "percent": "{:g} %".format, "mhz": "{:g} MHz".format}
    unit = path.rpartition("_")[2]
    if isinstance(value, int | float) and unit in shown:
        return shown[unit](value)
    found = re.fullmatch(r"(\d+)K", str(value))
    return units.binary(int(found[1]) * 1024) if found else str(value)


def ceilings(found: Mapping[str, Ceilings]) -> tuple[Table, ...]:
    """Limits of the machine, one table per device."""
    tables = []
    for device, ceiling in found.items():
        often = "once" if ceiling.measurements == 1 else f"{ceiling.measurements} times, the best of which counts"
        facts = [("threads", f"{ceiling.threads}"), ("measured", often)]
        facts += [(f"{name} products", units.amount(r, "FLOP") + "/s") for name, r in ceiling.rates.flops_per_s.items()]
        moved = sorted(ceiling.rates.bytes_per_s.items())
        facts += [(f"bytes moved within {units.binary(size)}", units.amount(rate, "B") + "/s") for size, rate in moved]
        facts += [
            (f"step of programs together: {name}", f"{units.seconds(step_s)}, {1 / step_s:,.0f} a second")
            for name, step_s in ceiling.step_s.items()
        ]
        rows = tuple(Row((Cell(name), Cell(text))) for name, text in facts)
        tables.append(Table(f"ceilings of {device}", ("name", "value"), rows))
    return tuple(tables)


def of_charts(drawn: Iterable[Kind], known: Collection[str]) -> dict[str, Table]:
    """A table of every kind of figure that has none of its own, from what is drawn."""
    found = {}
    for kind in drawn:
        rows = [row for chart in kind.charts for row in chart_rows(chart)]
        if kind.name not in known and rows:
            found[kind.name] = Table(kind.heading, ("chart", "variant", "figures"), tuple(rows), ("figures",))
    return found


def chart_rows(chart: Chart) -> Iterable[Row]:
    """The variants of a chart with what it says of each."""
    if isinstance(chart, BarChart):
        for bar in chart.bars:
            colour = look(bar.variant).colour
            yield Row((Cell(chart.title), Cell(bar.variant, colour=colour), Cell(bar.label)))
    elif isinstance(chart, CurveChart):
        for curve in chart.curves:
            colour = "" if curve.helper else look(curve.variant).colour
            told = [", ".join(filter(None, point.hover[1:])) for point in curve.points if len(point.hover) > 1]
            text = "; ".join(dict.fromkeys(told)) or f"{sum(not math.isnan(y) for y in curve.ys)} points"
            yield Row((Cell(chart.title), Cell(curve.variant, colour=colour), Cell(text)))
