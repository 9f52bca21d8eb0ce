"""Check that the turns of a seat can be true, by a clock that no variant can reach: the parent's.

A variant shares its process with what times it, and may slow the process's clock. The parent knows how long it waited
for each turn. It trusts the process's clock only while both tell about the same, and the samples only while they make
up the turns: all that stands between them is the reading of a few counters.
"""

from __future__ import annotations

from bench.records.block import Turn

#: Share by which the two clocks may differ, and seconds that a turn's request and answer may take on their way.
CLOCK_SHARE, WAY_S = 0.1, 0.005
#: Share of the turns that calls must make up, the untimed ones among them.
LEAST_SHARE = 0.6
#: Turns so short that a pause of the machine decides are not judged by it, seconds.
PAUSE_S = 0.05
#: More than all of it they cannot be.
MOST_SHARE = 1.05


class Watch:
    """The turns of one seat, added up."""

    def __init__(self) -> None:
        self._turns = 0
        self._waited_s = self._told_s = self._accounted_s = 0.0

    def add(self, turn: Turn, waited_s: float) -> None:
        """Count a turn.

        Args:
            turn: as the seat tells of it.
            waited_s: how long the parent waited for it, seconds.
        """
        self._turns += 1
        self._waited_s += waited_s
        self._told_s += turn.wall_s
        self._accounted_s += turn.accounted_s

    def doubt(self) -> str:
        """Return the reason why the turns cannot be true; nothing when they can."""
        told_s, waited_s = self._told_s, self._waited_s
        if abs(told_s - waited_s) > PAUSE_S + WAY_S * self._turns + CLOCK_SHARE * waited_s:
            return (
                f"the worker's clock is wrong: it counted {told_s:.1f} s for turns that took {waited_s:.1f} s by the "
                "clock of the parent"
            )
        if not LEAST_SHARE * told_s - PAUSE_S <= self._accounted_s <= MOST_SHARE * told_s + PAUSE_S:
            return (
                f"the samples cannot be true: they add up to {self._accounted_s:.1f} s of {told_s:.1f} s that the "
                "turns took"
            )
        return ""
