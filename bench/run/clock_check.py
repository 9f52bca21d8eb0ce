"""Check that the turns of a seat can be true, by a clock that no variant can reach: the parent's.

A variant shares its process with what times it, and may slow the process's clock. The parent knows when it asked for
each turn and when the answer was there. Two right clocks differ by the same amount in all turns, however long requests
and answers take on a busy machine. How long these take is judged too, since a turn may be told shorter than it was; on
a busy machine the threads that pass them on wait for a core; the kernel counts that wait, so it is not held against the
worker. The samples are trusted only while they make up the time in which they were taken.

A variant can have its own thread wait: by a process of its own on the same core. So the wait of the worker counts for
no more than that of the parent, and a turn whose answer was late is marked as disturbed, whatever explains it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from bench.machine import interference
from bench.records.block import Turn

#: Seconds, and share of the turns, by which the two clocks may come apart from the first turn to the last.
APART_S, APART_SHARE = 0.002, 0.01
#: Seconds, and share of the time waited for it, that a usual turn's request and answer may take on their way, not
#: counting the time that those who pass them on wait for a core.
WAY_S, WAY_SHARE = 0.01, 0.1
#: The same for the quickest of at least this many turns: even on a busy machine, one of them hardly has to wait.
QUICKEST_S, QUICKEST_TURNS = 0.004, 6
#: Shares of the time in which calls were timed that the samples must make up, at least and at most.
LEAST_SHARE, MOST_SHARE = 0.75, 1.05
#: A pause of the machine, seconds: turns so short that it decides are not judged by it.
PAUSE_S = 0.05


@dataclass(frozen=True)
class Queued:
    """Seconds that threads which pass on requests and answers were ready but had no core; None if not known.

    Attributes:
        parent_s: of the two threads of the parent.
        worker_s: of the first thread of the worker.
    """

    parent_s: float | None = None
    worker_s: float | None = None

    def since(self, before: Queued) -> Queued:
        """Return what was added after an earlier reading."""
        return Queued(
            interference.since(before.parent_s, self.parent_s), interference.since(before.worker_s, self.worker_s)
        )

    def excuse_s(self, turn: Turn) -> float:
        """Return how much longer than a turn its request and answer may take for it.

        What the turn waited itself is in its own time. The worker reports that, and may report too little.
        """
        if self.parent_s is None:
            return 0.0
        if self.worker_s is None or turn.queued_s is None:
            return self.parent_s
        return self.parent_s + min(self.parent_s, max(0.0, self.worker_s - max(0.0, turn.queued_s)))


@dataclass
class Watch:
    """The turns of one seat, and the parent's clock when it asked for each and when it had the answer."""

    _turns: list[tuple[Turn, float, float]] = field(default_factory=list)
    #: Of each turn the part that its own time does not account for, and what waiting for a core accounts for.
    _ways_s: list[float] = field(default_factory=list)
    _excuses_s: list[float] = field(default_factory=list)

    def add(self, turn: Turn, asked_s: float, answered_s: float, queued: Queued) -> float:
        """Count a turn, and return by how many seconds its answer was late; 0 where it took no longer than is usual.

        Args:
            turn: as the seat reported it.
            asked_s: parent's clock before the request.
            answered_s: parent's clock after the answer.
            queued: of that time, what threads spent ready without a core (`bench.run.worker_process.Worker.queued`).
        """
        waited_s = answered_s - asked_s
        way_s = waited_s - turn.wall_s
        self._turns.append((turn, asked_s, answered_s))
        self._ways_s.append(way_s)
        self._excuses_s.append(queued.excuse_s(turn))
        return way_s if way_s > WAY_S + WAY_SHARE * waited_s else 0.0

    def doubt(self) -> str:
        """Return the reason why the turns cannot be true; nothing when they can."""
        if not self._turns:
            return ""
        told_s = sum(turn.wall_s for turn, *_ in self._turns)
        waited_s = sum(answered_s - asked_s for _, asked_s, answered_s in self._turns)
        # Parent's clock less the seat's: no less than at any start, no more than at any end.
        least_s = max(asked_s - turn.start_s for turn, asked_s, _ in self._turns)
        most_s = min(answered_s - turn.start_s - turn.wall_s for turn, _, answered_s in self._turns)
        usual_s = statistics.median(answered_s - asked_s for _, asked_s, answered_s in self._turns)
        way_s = statistics.median(
            way_s - excuse_s for way_s, excuse_s in zip(self._ways_s, self._excuses_s, strict=True)
        )
        # Less what a usual turn waited: one that waited long excuses itself alone.
        quickest_s = min(self._ways_s) - statistics.median(self._excuses_s)
        kept = len(self._ways_s) >= QUICKEST_TURNS and quickest_s > QUICKEST_S + WAY_SHARE * usual_s
        # Of a few turns the usual one may be one that met a pause of the machine.
        longest_s = WAY_S + WAY_SHARE * usual_s + PAUSE_S / len(self._turns)
        if least_s - most_s > APART_S + APART_SHARE * told_s or way_s > longest_s or kept:
            return (
                f"the worker's clock is wrong: it counted {told_s:.2f} s for turns that took {waited_s:.2f} s by the "
                "clock of the parent"
            )
        timed_s = sum(turn.wall_s - turn.warm_s for turn, *_ in self._turns)
        found_s = sum(turn.accounted_s for turn, *_ in self._turns)
        if not LEAST_SHARE * timed_s - PAUSE_S <= found_s <= MOST_SHARE * timed_s + PAUSE_S:
            return (
                f"the samples cannot be true: they add up to {found_s:.2f} s of {timed_s:.2f} s in which calls were "
                "timed"
            )
        return ""
