"""Time series and their calendars: frequencies, the cycles that a model may be given, and the built-in series.

Series are regular: one value per step, none missing. What a file or package leaves out is either an error or filled by
linear interpolation, and then counted in `TimeSeries.filled`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from seq2seq.data.errors import optional

DAY_S = 86_400
WEEK_S = 7 * DAY_S
YEAR_S = 365.25 * DAY_S
_MONTH_S = YEAR_S / 12
#: Of a second; Python's timestamps know nothing finer.
_MICROSECONDS = 1_000_000
#: Cycles that people and weather follow, and their length in seconds.
CYCLES = {"day": DAY_S, "week": WEEK_S, "year": YEAR_S}


@dataclass(frozen=True)
class Frequency:
    """The step of a regular series.

    Attributes:
        months: months of a step, for those of no fixed length (1, 3 or 12); otherwise 0.
        seconds: of a step, where `months` is 0; whole microseconds, and an `int` where it is whole.
    """

    months: int = 0
    seconds: float = 0

    @classmethod
    def infer(cls, timestamps: pd.DatetimeIndex) -> Frequency:
        """The most common step between neighbours; steps of a month, a quarter or a year count in months.

        Args:
            timestamps: two or more, rising.
        """
        gaps = pd.Series(np.diff(timestamps.to_numpy()) // np.timedelta64(1, "us"))
        step = int(gaps.mode().iloc[0])
        common = step / _MICROSECONDS if step % _MICROSECONDS else step // _MICROSECONDS
        starts = len(set(timestamps.day)) == 1 and len(set(timestamps.time)) == 1
        ends = bool(timestamps.is_month_end.all())
        if (starts or ends) and common >= 28 * DAY_S:
            months = max(1, round(common / _MONTH_S))
            return cls(months=months)
        return cls(seconds=common)

    @property
    def step_s(self) -> float:
        """Mean length of a step."""
        return self.months * _MONTH_S if self.months else self.seconds

    @property
    def _step(self) -> pd.Timedelta:
        """A step of fixed length; whole microseconds, whatever the seconds are as a float."""
        return pd.Timedelta(microseconds=round(self.seconds * _MICROSECONDS))

    @property
    def season(self) -> int:
        """Steps of the season that the naive forecast repeats: a day, a week, a year, or 1 where none is known."""
        if self.months:
            return max(1, 12 // self.months)
        for cycle in (pd.Timedelta(seconds=DAY_S), pd.Timedelta(seconds=WEEK_S)):
            if self._step < cycle and cycle % self._step == pd.Timedelta(0):
                return cycle // self._step
        return round(YEAR_S / self.seconds) if self.seconds < YEAR_S / 2 else 1

    @property
    def cycles(self) -> tuple[str, ...]:
        """Cycles of at least two steps."""
        return tuple(name for name, length in CYCLES.items() if 2 * self.step_s <= length)

    def places(self, timestamps: pd.DatetimeIndex) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Steps from the first timestamp, as floats: whole numbers where a timestamp is on the grid."""
        if not self.months:
            return np.asarray((timestamps - timestamps[0]) / self._step, dtype=np.float64)
        months = np.asarray(timestamps.year * 12 + timestamps.month, dtype=np.float64)
        return np.asarray((months - months[0]) / self.months)

    def following(self, start: pd.Timestamp, count: int) -> pd.DatetimeIndex:
        """`count` timestamps from `start` on, that one included."""
        if not self.months:
            return pd.date_range(start, periods=count, freq=self._step)
        last = start.is_month_end and start.day >= 28  # noqa: PLR2004 - the shortest month
        steps = [start + pd.DateOffset(months=self.months * step) for step in range(count)]
        return pd.DatetimeIndex([step + pd.offsets.MonthEnd(0) if last else step for step in steps])

    def __str__(self) -> str:
        for name, value in NAMES.items():
            if value == self:
                return name
        return f"every {self.months} months" if self.months else f"every {self.seconds} s"


#: Frequencies that have a name.
NAMES = {
    "hourly": Frequency(seconds=3600),
    "daily": Frequency(seconds=DAY_S),
    "weekly": Frequency(seconds=WEEK_S),
    "monthly": Frequency(months=1),
    "quarterly": Frequency(months=3),
    "yearly": Frequency(months=12),
}


@dataclass(frozen=True)
class TimeSeries:
    """A regular series in its own unit.

    Attributes:
        name: for people.
        unit: of the values, for people.
        start: timestamp of the first value.
        frequency: of the values.
        values: (steps,) float64, none missing.
        filled: how many of them the source leaves out; they are interpolated.
        converted: whether its timestamps came with a time zone and were brought to UTC.
        title: of a plot; the name where it is empty.
        averaged: how many rows of the source repeat a timestamp; those of one timestamp are averaged.
    """

    name: str
    unit: str
    start: pd.Timestamp
    frequency: Frequency
    values: Tensor
    filled: int = 0
    converted: bool = False
    title: str = ""
    averaged: int = 0

    def timestamps(self, more: int = 0) -> pd.DatetimeIndex:
        """Times of its values and of `more` steps after them."""
        return self.frequency.following(self.start, len(self.values) + more)


def calendar(timestamps: pd.DatetimeIndex, cycles: Sequence[str]) -> Tensor:
    """Places of timestamps within cycles, as points on circles.

    Args:
        timestamps: any.
        cycles: names out of `CYCLES`.

    Returns:
        (steps, 2 * cycles) float64, sine and cosine of each cycle.
    """
    second = (timestamps - timestamps.normalize()) / pd.Timedelta(seconds=1)
    length = 365 + np.asarray(timestamps.is_leap_year)
    share = {
        "day": np.asarray(second) / DAY_S,
        "week": np.asarray(timestamps.day_of_week + second / DAY_S) / 7,
        "year": np.asarray(timestamps.day_of_year - 1 + second / DAY_S) / length,
    }
    circles = [function(2 * math.pi * share[name]) for name in cycles for function in (np.sin, np.cos)]
    return torch.from_numpy(np.stack(circles, 1)) if circles else torch.zeros(len(timestamps), 0, dtype=torch.float64)


def regular(
    name: str,
    unit: str,
    timestamps: pd.DatetimeIndex,
    values: Sequence[float] | np.ndarray[Any, Any],
    frequency: Frequency,
) -> TimeSeries:
    """A series on its grid, what is missing between its values interpolated linearly and counted.

    Args:
        name: for people.
        unit: of the values, for people.
        timestamps: rising, all on the grid of the frequency.
        values: one a timestamp; NaN is missing, but the first and the last may not be.
        frequency: of the grid.
    """
    places = np.rint(frequency.places(timestamps)).astype(np.int64)
    known = np.isfinite(np.asarray(values, dtype=np.float64))
    grid = np.arange(places[-1] + 1)
    filled = np.interp(grid, places[known], np.asarray(values, dtype=np.float64)[known])
    return TimeSeries(name, unit, timestamps[0], frequency, torch.from_numpy(filled), len(grid) - int(known.sum()))


def _temperatures(name: str, dataset: str) -> TimeSeries:
    """Hourly temperatures of 2010; the hour that the package leaves out when clocks go forward is interpolated."""
    frame = getattr(optional("vega_datasets", "the temperatures come with").local_data, dataset)()
    return regular(name, "°F", pd.DatetimeIndex(frame["date"]), frame["temp"].to_numpy(), NAMES["hourly"])


def _statsmodels(dataset: str) -> pd.DataFrame:
    # The data sets alone: all of statsmodels' models would take a second to import.
    packaged = optional("statsmodels.datasets", f"the series {dataset} comes with")
    frame: pd.DataFrame = getattr(packaged, dataset).load_pandas().data
    return frame


def _co2() -> TimeSeries:
    """Weekly CO2 above Mauna Loa, 1958 to 2001; 59 of the 2,284 weeks have no value and are interpolated."""
    frame = _statsmodels("co2")
    return regular("co2", "ppm", pd.DatetimeIndex(frame.index), frame["co2"].to_numpy(), NAMES["weekly"])


def _sunspots() -> TimeSeries:
    """Yearly sunspot numbers, 1700 to 2008, complete."""
    frame = _statsmodels("sunspots")
    # A unit of nanoseconds would not reach back to 1700.
    years = pd.DatetimeIndex(np.array([f"{int(year)}-01-01" for year in frame["YEAR"]], dtype="datetime64[s]"))
    return regular("sunspots", "sunspot number", years, frame["SUNACTIVITY"].to_numpy(), NAMES["yearly"])


#: Series that come with installed packages. Those of a name belong to one task.
BUILT_IN: dict[str, tuple[Callable[[], TimeSeries], ...]] = {
    "seattle": (functools.partial(_temperatures, "seattle", "seattle_temps"),),
    "san-francisco": (functools.partial(_temperatures, "san-francisco", "sf_temps"),),
    "co2": (_co2,),
    "sunspots": (_sunspots,),
}
BUILT_IN["temperatures"] = BUILT_IN["seattle"] + BUILT_IN["san-francisco"]


def built_in(name: str) -> list[TimeSeries]:
    """The series of a name.

    Raises:
        DataUnavailableError: when their package is not installed.
        KeyError: for a name that is not in `BUILT_IN`.
    """
    return [load() for load in BUILT_IN[name]]
