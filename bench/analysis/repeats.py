"""A figure over repeats that are alike: its median, and how far it may be from the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bench.analysis.intervals import Interval


def spread(values: Sequence[float], above: Sequence[float] | None = None) -> Interval | None:
    """Median of figures above 0 with a 95 % interval, Student's t on logarithms; None below two repeats.

    Args:
        values: a figure of each repeat.
        above: where a repeat only knows that the truth lies between two ends, the upper ones.
    """
    upper = values if above is None else above
    if len(values) < 2 or len(upper) < 2:  # noqa: PLR2004 - a spread needs two
        return None
    lows, highs = np.log(values), np.log(upper)
    reach = float(stats.t.ppf(0.975, len(values) - 1)) / math.sqrt(len(values))
    low = math.exp(lows.mean() - reach * lows.std(ddof=1))
    high = math.exp(highs.mean() + reach * highs.std(ddof=1))
    value = float(np.median(values))
    return Interval(value, min(value, low), max(value, high))
