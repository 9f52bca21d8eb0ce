"""The roofline: the speed that each case reached, below the limits of its machine.

One chart a mode, with all workloads in it: the cases of a workload have nearly the same FLOPs per
byte, so they are in one column with one name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median_low
from typing import Any

from bench import units
from bench.analysis.roofline import Ceilings, Rates, Work
from bench.analysis.run_summary import ReportedRun, doubts
from bench.errors import UsageError
from bench.records.schema import Record, Status
from bench.report.charts import hover
from bench.report.descriptions import Axis, Column, Kind, Point, Roof, RooflineChart

CAPTION = (
    "FLOPs per second over FLOPs per byte, counted as the least that the model needs; both axes logarithmic. Level "
    "lines: the fastest matrix product of each precision. Rising lines: the fastest way to move bytes, by the size of "
    "what is moved. Measured at the start of the run at its number of threads; no case can be above its lines. The "
    "variants of a workload stand side by side around its dotted line, so that none hides another; those of a narrower "
    "type move fewer bytes and stand further right."
)
#: Two lines of bandwidth are drawn where they are so far apart.
APART = 1.5
#: Names stand at least this share of the axis apart, or as far as there is room for all of them.
NAME_ROOM = 0.045
#: Shares of the picture that the variants of a workload take side by side, and the most that two stand apart.
LEAST_ASIDE, MOST_ASIDE, MOST_STEP = 0.08, 0.12, 0.03
#: Room beside the outermost case or ridge, and the least right end over the left one, both as factors.
PAD, LEAST_WIDTH = 1.3, 8.0
#: A ridge this many times left or right of the outermost case is still in the picture.
NEAR = 4.0


@dataclass(frozen=True)
class Reached:
    """A case that can be drawn."""

    record: Record
    work: Work

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.work.flops / self.work.least_bytes

    @property
    def flops_per_s(self) -> float:
        """FLOPs per second."""
        return self.work.flops / self.work.call_s

    def point(self) -> Point:
        """Position in the plot."""
        record = self.record
        where = f"{record.workload}, {units.amount(self.flops_per_s, 'FLOP')}/s, {self.intensity:.3g} FLOP per byte"
        near = f"{units.share(record.ceiling_share)} of its ceiling, which is {record.bound}"
        text = (record.variant, where, near, *hover(record)[1:])
        return Point(self.intensity, self.flops_per_s, doubtful=bool(doubts(record)), hover=text)


def kinds(run: ReportedRun) -> tuple[Kind, ...]:
    """The roofline, where the run measured its ceilings and a case can be compared with them."""
    measured = ceilings(run.environment)
    panels: dict[tuple[str, str, int], list[Reached]] = {}
    for record in run.records:
        work = Work.of(asdict(record))
        if record.status is Status.OK and work and record.ceiling_share is not None and record.device in measured:
            panels.setdefault((record.mode, record.device, record.threads), []).append(Reached(record, work))
    several = [len({key[place] for key in panels}) > 1 for place in range(3)]
    charts = tuple(chart(title(key, several), cases, measured[key[1]]) for key, cases in panels.items())
    return (Kind("roofline", "Roofline", CAPTION, charts, wide=True),) if charts else ()


def ceilings(environment: Mapping[str, Any]) -> dict[str, Ceilings]:
    """The ceilings in environment.json by device; empty where a run measured none.

    Raises:
        UsageError: the section is not one of ours.
    """
    section = environment.get("ceilings") or {}
    try:
        return {str(device): Ceilings.of(data) for device, data in section.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"environment.json: the section ceilings is broken ({type(error).__name__}: {error}); "
            "remove it to make the report without the roofline"
        )
        raise UsageError(msg) from error


def title(key: tuple[str, str, int], several: list[bool]) -> str:
    """The mode, and device and threads where a run has several of them."""
    mode, device, threads = key
    more = [text for text, tell in zip((device, f"{threads} threads"), several[1:], strict=True) if tell]
    return ", ".join([mode, *more])


def chart(name: str, cases: list[Reached], found: Ceilings) -> RooflineChart:
    """All cases of one mode, device and number of threads."""
    rates = found.rates
    types = dict.fromkeys(kind for case in cases for kind in case.work.precisions)
    levels = {kind: rate for kind in types if (rate := rates.product(kind))}
    slopes = bandwidths(rates)
    lowest, top, slowest = min(levels.values()), max(levels.values()), slopes[0][1]
    (x_lo, x_hi), beyond = sides([case.intensity for case in cases], (lowest / slowest, top / slowest))
    reached = [case.flops_per_s for case in cases]
    highest = max(*reached, min(top, slopes[-1][1] * x_hi))
    y_lo, y_hi = min(reached) / 1.8, 2.2 * highest
    roofs = [*level_roofs(levels, slopes[-1][1], x_lo, x_hi), *slope_roofs(slopes, top, (x_lo, y_lo), x_hi)]
    marks: dict[str, list[Point]] = {}
    for case in cases:
        marks.setdefault(case.record.variant, []).append(case.point())
    named = columns(cases, x_lo, x_hi)
    places = sorted(math.log(column.x) / math.log(x_hi / x_lo) for column in named)
    gap = min((right - left for left, right in itertools.pairwise(places)), default=1.0)
    return RooflineChart(
        name,
        name,
        axis("FLOP per byte moved, at least", x_lo, x_hi),
        axis("FLOP/s reached", y_lo, y_hi),
        tuple(roofs),
        named,
        beside(marks, x_hi / x_lo, gap),
        beyond,
    )


def sides(places: list[float], ridges: tuple[float, float]) -> tuple[tuple[float, float], str]:
    """Left and right end of the picture, and in words on which side of the ridges the cases stand, if that is outside.

    The cases fill the picture. A ridge is in it where one of them stands near.

    Args:
        places: FLOPs per byte of the cases.
        ridges: FLOPs per byte from which on products decide, for the slowest and the fastest ones.
    """
    left, right = min(places), max(places)
    near = [ridge for ridge in ridges if left / NEAR <= ridge <= right * NEAR]
    lo, hi = min([left, *near]), max([right, *near])
    # Variants stand up to half of `MOST_ASIDE` beside the place of their workload.
    pad = PAD * (hi / lo) ** (0.6 * MOST_ASIDE)
    lo, hi = lo / pad, hi * pad
    wider = max(1.0, math.sqrt(LEAST_WIDTH * lo / hi))
    beyond = ""
    if ridges[1] < lo / wider:
        beyond = f"All cases are right of {ridges[1]:.3g} FLOP per byte: products limit them, not memory."
    elif ridges[0] > hi * wider:
        beyond = f"All cases are left of {ridges[0]:.3g} FLOP per byte: memory limits them."
    return (lo / wider, hi * wider), beyond


def beside(marks: Mapping[str, list[Point]], width: float, gap: float) -> tuple[tuple[str, tuple[Point, ...]], ...]:
    """The points of each variant, moved a little to the side: all variants of a workload have the same place.

    Args:
        marks: the points of each variant.
        width: right end of the picture over its left one.
        gap: least distance of two workloads, as a share of the picture.
    """
    middle = (len(marks) - 1) / 2
    room = min(MOST_ASIDE, max(LEAST_ASIDE, gap / 2))
    step = width ** min(MOST_STEP, room / max(2.0, 2 * middle))
    return tuple(
        (variant, tuple(replace(point, x=point.x * step ** (place - middle)) for point in points))
        for place, (variant, points) in enumerate(marks.items())
    )


def axis(title: str, lo: float, hi: float) -> Axis:
    """A logarithmic axis of plain counts."""
    label = units.tick_label("")
    return Axis(title, "log", lo, hi, tuple((tick, label(tick)) for tick in units.log_ticks(lo, hi)))


def bandwidths(rates: Rates) -> list[tuple[int, float]]:
    """Working sets and rates worth a line, from memory inwards."""
    kept: list[tuple[int, float]] = []
    for size in sorted(rates.bytes_per_s, reverse=True):
        rate = rates.bandwidth(size)
        if rate and (not kept or rate >= APART * kept[-1][1]):
            kept.append((size, rate))
    return kept


def level_roofs(levels: Mapping[str, float], bandwidth: float, lo: float, hi: float) -> Iterable[Roof]:
    """One line a rate, from the fastest memory's ridge on; precisions of the same rate share it."""
    shared: dict[float, list[str]] = {}
    for name, rate in levels.items():
        shared.setdefault(rate, []).append(name)
    for rate, names in shared.items():
        start = max(lo, rate / bandwidth)
        if start < hi:
            yield Roof(f"{', '.join(names)} products at {units.amount(rate, 'FLOP')}/s", (start, rate), (hi, rate))


def slope_roofs(
    slopes: Iterable[tuple[int, float]], top: float, corner: tuple[float, float], hi: float
) -> Iterable[Roof]:
    """One line per working set, from the edge of the picture to the highest level; none for what lies outside it."""
    for size, rate in slopes:
        start, end = max(corner[0], corner[1] / rate), min(hi, top / rate)
        if start < end:
            name = f"{units.binary(size)} at {units.amount(rate, 'B')}/s"
            yield Roof(name, (start, start * rate), (end, end * rate))


def columns(cases: Iterable[Reached], lo: float, hi: float) -> tuple[Column, ...]:
    """Each workload where most of its cases stand, the names moved apart."""
    places: dict[str, list[float]] = {}
    for case in cases:
        places.setdefault(case.record.workload, []).append(math.log(case.intensity))
    middle = {name: (median_low(xs) - math.log(lo)) / math.log(hi / lo) for name, xs in places.items()}
    order = sorted(middle, key=lambda name: middle[name])
    apart = spread([middle[name] for name in order])
    return tuple(
        Column(name, lo * (hi / lo) ** middle[name], lo * (hi / lo) ** x) for name, x in zip(order, apart, strict=True)
    )


def spread(places: list[float]) -> list[float]:
    """Rising places between 0 and 1, moved as little as needed to be `NAME_ROOM` apart."""
    room = min(NAME_ROOM, 1 / max(1, len(places)))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + room) if moved else place)
    # What was pushed out at the right goes back, and pushes its neighbours back.
    limit = 1.0
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - room
    return moved
