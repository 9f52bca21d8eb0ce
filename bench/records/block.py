"""Timed blocks and turns: what a seat times, and what it reports to the parent."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Block:
    """One timed block of calls of one variant.

    Attributes:
        calls_s: wall time of each single call, seconds.
        queued_calls: calls in the queued block; 0 on a CPU.
        queued_wall_s: wall time of the queued block, seconds.
        queued_device_s: time between the events around it, seconds.
        energy_j: energy that the counter of the device counted from its start to its end, joules; None without one.
    """

    calls_s: tuple[float, ...]
    queued_calls: int = 0
    queued_wall_s: float = 0.0
    queued_device_s: float | None = None
    energy_j: float | None = None

    @property
    def calls(self) -> int:
        """Number of its calls, queued ones included."""
        return len(self.calls_s) + self.queued_calls

    @property
    def timed_s(self) -> float:
        """Wall time of all its calls, seconds."""
        return sum(self.calls_s) + self.queued_wall_s

    @property
    def per_call_s(self) -> float:
        """Mean time of a call; of the queued block where there is one."""
        if self.queued_calls:
            return self.queued_wall_s / self.queued_calls
        return sum(self.calls_s) / len(self.calls_s)

    @property
    def typical_s(self) -> float:
        """Median time of a call, which ratios and throughput are made of.

        One interrupted call of a block does not move it: ten runs of a variant against itself were off by 1.4 % at
        most this way, by 2.8 % with the mean.
        """
        return self.per_call_s if self.queued_calls else statistics.median(self.calls_s)


@dataclass(frozen=True)
class Turn:
    """A variant's turn in a round: untimed calls, then a timed block, and what its process used meanwhile.

    Attributes:
        block: what was timed.
        warm_s: wall time of the untimed calls before it, seconds.
        start_s: moment at which it began, on the seat's clock.
        wall_s: wall time of the whole turn by the seat's clock, seconds.
        cpu_from_s, cpu_to_s: CPU time of the process at the start of the turn and at its end, seconds.
        delay_s: time of the block in which the thread that waited longest was ready but had no core, seconds; None
            if the system does not report it.
        switches: times in the block that the process had to give up a core; None in the same case.
        queued_s: time of the turn in which the thread that makes the calls was ready but had no core, seconds; None if
            the system does not report it.
        late_s: time by which the parent waited longer for the turn than it says, seconds; 0 where that is usual. The
            parent's own finding (`bench.run.clock_check`), which no worker reports.
    """

    block: Block
    warm_s: float
    start_s: float
    wall_s: float
    cpu_from_s: float
    cpu_to_s: float
    delay_s: float | None = None
    switches: int | None = None
    queued_s: float | None = None
    late_s: float = 0.0

    @property
    def accounted_s(self) -> float:
        """Seconds that its timed calls took by their own account."""
        return self.block.timed_s

    def fields(self) -> dict[str, Any]:
        """Plain values, as an event carries them."""
        found = dataclasses.asdict(self)
        del found["late_s"]
        if self.block.energy_j is None:
            # A parent of an earlier revision asks for no energy, and knows no such value.
            del found["block"]["energy_j"]
        return found

    @classmethod
    def of(cls, event: dict[str, Any]) -> Turn:
        """Make one from an event."""
        block = event["block"]
        # A worker of an earlier revision does not say how long it waited.
        event = {"queued_s": None} | event | {"late_s": 0.0}
        values = {field.name: event[field.name] for field in dataclasses.fields(cls)}
        return cls(**(values | {"block": Block(**(block | {"calls_s": tuple(block["calls_s"])}))}))
