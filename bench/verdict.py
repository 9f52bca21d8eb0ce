"""What an interval allows to be said of a change: faster, slower, the same, or unclear."""

from __future__ import annotations

import enum

from bench.statistics import Interval

#: A change smaller than this is not told from none: two builds of the same code differ by as much.
MARGIN = 0.01


class Verdict(enum.StrEnum):
    """What may be said."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNCLEAR = "unclear"


def verdict(change: Interval, margin: float = MARGIN) -> Verdict:
    """What may be said of a ratio whose 1 means no change, and more means faster.

    Args:
        change: the ratio and its interval.
        margin: share below which a change is none.
    """
    if change.low >= 1 - margin and change.high <= 1 + margin:
        return Verdict.SAME
    if change.high < 1 and change.value < 1 - margin:
        return Verdict.SLOWER
    if change.low > 1 and change.value > 1 + margin:
        return Verdict.FASTER
    return Verdict.UNCLEAR
