"""Windows of a series, and the batches of them that the forecasting workloads run: a year of Seattle's temperatures.

A window is a history that the encoder reads and a horizon that the decoder forecasts, fed with the value of the step
before (teacher forcing). Each step carries the normalised value and its place in cycles, as points on circles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.data.errors import optional

#: What a step of the workloads' windows holds: temperature, sine and cosine of the hour, and of the day of the year.
FEATURES = 5
#: Part of the series, from its start, that training windows may touch.
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class Series:
    """A normalised series and its calendar; its steps are called hours, whatever they are.

    Attributes:
        values: (hours,) float64, zero mean and unit deviation over the training part.
        calendar: (hours, features) float64, sine and cosine of each cycle.
        mean, deviation: of the training part, in the series' unit; values had the mean subtracted, and were divided by
            the deviation unless it is 0.
    """

    values: Tensor
    calendar: Tensor
    mean: float
    deviation: float

    @property
    def train_hours(self) -> int:
        """Hours from the start that belong to training; what comes after is validation."""
        return int(len(self.values) * TRAIN_SHARE)


@functools.cache
def seattle_temperatures() -> Series:
    """The 8,759 hourly temperatures of Seattle in 2010, in degrees Fahrenheit, from the vega_datasets package.

    Raises:
        DataUnavailableError: when vega_datasets is not installed.
    """
    frame = optional("vega_datasets", "the temperatures come with").local_data.seattle_temps()
    raw = torch.tensor(frame["temp"].to_numpy(), dtype=torch.float64)
    hour = torch.tensor(frame["date"].dt.hour.to_numpy(), dtype=torch.float64) * (2 * math.pi / 24)
    day = torch.tensor(frame["date"].dt.day_of_year.to_numpy(), dtype=torch.float64) * (2 * math.pi / 365)
    train = raw[: int(len(raw) * TRAIN_SHARE)]
    mean, deviation = float(train.mean()), float(train.std())
    calendar = torch.stack([hour.sin(), hour.cos(), day.sin(), day.cos()], dim=1)
    return Series((raw - mean) / deviation, calendar, mean, deviation)


def window_starts(series: Series, history: int, horizon: int, split: str) -> range:
    """Hours at which a window of a split may start; no training window touches an hour that validation forecasts.

    Args:
        series: the data.
        history: steps of the encoder.
        horizon: steps of the decoder.
        split: `train` or `validation`.

    Raises:
        ValueError: when the split is unknown or shorter than one window.
    """
    hours = len(series.values)
    if split == "train":
        starts = range(1, series.train_hours - history - horizon + 1)
    elif split == "validation":
        # Its history may reach back into training hours; what it forecasts may not.
        starts = range(max(1, series.train_hours - history), hours - history - horizon + 1)
    else:
        msg = f"split is {split!r}, expected 'train' or 'validation'"
        raise ValueError(msg)
    if not starts:
        msg = f"a window of {history} + {horizon} hours does not fit the {split} part of {hours} hours"
        raise ValueError(msg)
    return starts


def windows(series: Series, starts: Tensor, history: int, horizon: int) -> Batch:
    """The windows that start at the given hours, as one float32 batch.

    Args:
        series: the data.
        starts: (batch,) int64, from `window_starts`.
        history: steps of the encoder.
        horizon: steps of the decoder.
    """
    hours = starts[:, None] + torch.arange(history + horizon)  # (batch, history + horizon)
    steps = torch.cat([series.values[hours][..., None], series.calendar[hours]], dim=-1)
    # The decoder knows the calendar of the hour it forecasts, but only the temperature of the hour before.
    before = series.values[hours - 1][..., None]
    target = torch.cat([before, series.calendar[hours]], dim=-1)[:, history:]
    expected = series.values[hours][:, history:, None]
    return Batch(steps[:, :history].float(), target.float(), None, None, expected.float())


def temperature_batch(batch: int, history: int, horizon: int, seed: int, split: str = "train") -> Batch:
    """A batch of random windows of the Seattle series."""
    series = seattle_temperatures()
    starts = window_starts(series, history, horizon, split)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(starts), (batch,), generator=generator) + starts.start
    return windows(series, chosen, history, horizon)
