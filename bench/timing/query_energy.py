"""The energy of a load test in the child: what the device's counter counts while queries are answered."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.machine.energy import EnergyCounter

#: A reading takes tens of microseconds, as long as a small call, so there is at most one in this time, seconds.
EVERY_S = 0.01


class QueryEnergy:
    """Energy from the first query of a test to the last reading, and the queries that were answered by then.

    Not to the end of the test: the generator writes its logs before it closes the connection, and nothing is served
    meanwhile.

    Args:
        counter: of the device; None reads nothing.
        clock: time now, seconds.
    """

    def __init__(self, counter: EnergyCounter | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._counter, self._clock = counter, clock
        self._first: tuple[int, ...] | None = None
        self._begun_s = self._read_s = self._joules = 0.0
        self._answered = self._counted = 0

    def begin(self) -> None:
        """Take note that work begins; the first time counts."""
        if self._counter is None or self._first is not None:
            return
        self._first = self._counter.read()
        self._begun_s = self._read_s = self._clock()

    def answered(self, queries: int) -> None:
        """Take note of queries that were answered just now."""
        self._answered += queries
        if self._counter is None or self._first is None or self._clock() - self._read_s < EVERY_S:
            return
        self._joules = self._counter.joules(self._first, self._counter.read())
        self._read_s, self._counted = self._clock(), self._answered

    def fields(self) -> dict[str, float | None]:
        """`energy_j`, `energy_queries` and `energy_s` of an event; None where nothing was counted."""
        if not self._counted:
            return {"energy_j": None, "energy_queries": None, "energy_s": None}
        spent_s = self._read_s - self._begun_s
        return {"energy_j": self._joules, "energy_queries": self._counted, "energy_s": spent_s}
