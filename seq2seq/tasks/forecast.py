"""Forecasts: sampled paths of one series over one horizon, with all that is needed to plot and to judge them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import Tensor


@dataclass(frozen=True)
class Forecast:
    """A forecast of one series, in its unit.

    Attributes:
        series: its name.
        unit: of all values.
        timestamps: of history and horizon.
        history: (history,) what the model read.
        samples: (samples, horizon); one sample where the model has no likelihood.
        naive: (horizon,) the seasonal naive forecast.
        observed: (horizon,) what came; None for a forecast of the future.
        title: of its plot.
    """

    series: str
    unit: str
    timestamps: pd.DatetimeIndex
    history: Tensor
    samples: Tensor
    naive: Tensor
    observed: Tensor | None
    title: str = ""

    def quantile(self, level: float) -> Tensor:
        """A quantile of the samples, (horizon,)."""
        return self.samples.quantile(level, 0)

    def table(self) -> pd.DataFrame:
        """The horizon step by step: timestamp, quantiles, seasonal naive, and what was observed where it is known."""
        columns = {f"q{level:02.0f}": self.quantile(level / 100).numpy() for level in (5, 10, 50, 90, 95)}
        columns["seasonal_naive"] = self.naive.numpy()
        if self.observed is not None:
            columns["observed"] = self.observed.numpy()
        stamps = self.timestamps[len(self.history) :]
        return pd.DataFrame({"series": self.series, "timestamp": stamps, **columns})
