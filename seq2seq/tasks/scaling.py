"""A series as a model reads it: differences to the season before, normalised, and the way back to its own unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seq2seq.data.series import TimeSeries, calendar
from seq2seq.data.windows import TRAIN_SHARE, Series
from seq2seq.tasks import scoring

#: Least deviation, relative to the values, that is taken for more than rounding.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Scaled:
    """A series as a model reads it.

    Attributes:
        raw: the series in its own unit.
        series: its differences over `lag` steps (its values, for lag 0), normalised. Step i is step i + lag of `raw`.
        lag: steps of the season whose value was taken off; 0 for none.
        error: of the seasonal naive forecast in the training part, which MASE divides by; None where there is none.
        unscored: why there is none, in words.
    """

    raw: TimeSeries
    series: Series
    lag: int
    error: float | None
    unscored: str = ""

    def in_unit(self, paths: Tensor, first: Tensor) -> Tensor:
        """Paths (samples, windows, horizon) of the normalised series as values in the unit of the raw one.

        Args:
            paths: from a model.
            first: (windows,) int64, step of `raw` that each path starts at.
        """
        steps = paths.double() * self.series.deviation + self.series.mean
        if not self.lag:
            return steps
        found: list[Tensor] = []
        for step in range(paths.size(-1)):
            # Beyond one season the values to add to are forecasts themselves.
            before = self.raw.values[first + step - self.lag] if step < self.lag else found[step - self.lag]
            found.append(steps[..., step] + before)
        return torch.stack(found, -1)


def scale(
    raw: TimeSeries, season: int, lag: int, cycles: Sequence[str], given: dict[str, float] | None = None
) -> Scaled:
    """A series as a model reads it, its scaling taken only from its training part unless one is given.

    Args:
        raw: the series.
        season: steps of the season that the naive forecast repeats.
        lag: steps that differences reach back; 0 for the values themselves.
        cycles: calendar features, names out of `CYCLES`.
        given: `mean` and `deviation` of another training.

    Returns:
        A series whose steps never vary has the deviation 0: in its own unit, whatever a model says of it is its mean.
        Any other number would make a forecast in kW another than that in MW.
    """
    steps = raw.values[lag:] - raw.values[: len(raw.values) - lag] if lag else raw.values
    train = steps[: int(len(steps) * TRAIN_SHARE)]
    mean, deviation = float(train.mean()), float(train.std())
    # A straight line differs by the same in every season: there is nothing to scale.
    if deviation <= _NOTHING * float(raw.values.abs().max()):
        deviation = 0.0
    if given is not None:
        mean, deviation = given["mean"], given["deviation"]
    circles = calendar(raw.timestamps()[lag:], cycles)
    series = Series((steps - mean) / (deviation or 1.0), circles, mean, deviation)
    try:
        return Scaled(raw, series, lag, scoring.seasonal_error(raw.values[: lag + series.train_hours], season))
    except ValueError as problem:
        return Scaled(raw, series, lag, None, str(problem))
