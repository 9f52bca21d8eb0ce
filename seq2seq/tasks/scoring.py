"""Scores of forecasts, scaled by what is had for nothing: MASE and CRPS, and the seasonal naive forecast."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def seasonal_error(values: Tensor, season: int) -> float:
    """Mean absolute error of the seasonal naive forecast within a series: what MASE divides by.

    Hyndman & Koehler 2006, "Another look at measures of forecast accuracy", with a season as in Hyndman &
    Athanasopoulos, "Forecasting: principles and practice" (3rd ed.), section 5.8.

    Args:
        values: (steps,) of the training part only.
        season: steps of a season.

    Raises:
        ValueError: when the series has no two seasons to compare, or repeats itself exactly.
    """
    if len(values) <= season:
        msg = f"{len(values)} training values are no more than one season of {season} steps, so no error can be taken"
        raise ValueError(msg)
    error = float((values[season:] - values[:-season]).abs().mean())
    if error == 0:
        msg = f"the training part repeats itself every {season} steps, so there is no error to scale with"
        raise ValueError(msg)
    return error


def mase(forecast: Tensor, observed: Tensor, scale: float) -> float:
    """Mean absolute scaled error (Hyndman & Koehler 2006): below 1 is better than the naive forecast in training.

    Args:
        forecast: of any shape.
        observed: of the same.
        scale: from `seasonal_error`.
    """
    return float((forecast - observed).abs().mean()) / scale


def crps_of_samples(samples: Tensor, observed: Tensor) -> Tensor:
    """Continuous ranked probability score of a sampled forecast, in the unit of the values; lower is better.

    Energy form, E|X - y| - E|X - X'| / 2 (Gneiting & Raftery 2007, equation 21), the second mean over pairs of
    different samples (the fair form of Ferro 2014), so that it does not depend on how many there are. For one sample,
    a point forecast, it is the absolute error.

    Args:
        samples: (samples, ...).
        observed: (...).

    Returns:
        (...), one score per value.
    """
    count = samples.size(0)
    distance: Tensor = (samples - observed).abs().mean(0)
    if count == 1:
        return distance
    # The sum over all pairs by ranks: sample i of the sorted is the larger one of i pairs, the smaller of the others.
    rank = 2.0 * torch.arange(count, dtype=samples.dtype, device=samples.device) - count + 1
    ordered = samples.sort(0).values
    spread: Tensor = torch.tensordot(rank, ordered, dims=([0], [0])) / (count * (count - 1))
    return distance - spread


def crps_of_gaussian(mean: Tensor, deviation: Tensor | float, observed: Tensor) -> Tensor:
    """CRPS of a Gaussian, in closed form (Gneiting et al. 2005, equation 5).

    Args:
        mean: (...).
        deviation: (...) or a number, positive.
        observed: (...).
    """
    z = (observed - mean) / deviation
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    score: Tensor = deviation * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return score


def seasonal_naive(history: Tensor, season: int, horizon: int) -> Tensor:
    """The last season again and again.

    Args:
        history: (..., steps) with at least `season` steps.
        season: steps of a season.
        horizon: steps to forecast.

    Returns:
        (..., horizon).
    """
    if history.size(-1) < season:
        msg = f"the history has {history.size(-1)} steps, but the seasonal naive forecast needs a season of {season}"
        raise ValueError(msg)
    return history[..., history.size(-1) - season :][..., torch.arange(horizon) % season]


def seasonal_naive_deviation(values: Tensor, season: int, horizon: int) -> Tensor:
    """Deviation of the seasonal naive forecast's prediction interval, one per step.

    Residuals' root mean square times the root of the seasons ahead (Hyndman & Athanasopoulos, "Forecasting: principles
    and practice" (3rd ed.), section 5.5).

    Args:
        values: (steps,) of the training part only.
        season: steps of a season.
        horizon: steps to forecast.

    Returns:
        (horizon,) in the unit of the values.
    """
    residuals = values[season:] - values[:-season]
    seasons_ahead = torch.arange(horizon, dtype=values.dtype).div(season, rounding_mode="floor") + 1
    return residuals.square().mean().sqrt() * seasons_ahead.sqrt()
