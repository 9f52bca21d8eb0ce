"""Who else used the machine during a round: CPU time of other processes, and time stolen by the hypervisor.

A round in which others took more than a tenth of one core is disturbed. It is repeated while there is time; what
could not be repeated is kept and marked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

#: Share of one core that others may take before a round counts as disturbed.
SHARE = 0.10
#: The system counts CPU time in ticks of 10 ms, so less than this cannot be told from nothing.
LEAST_S = 0.025


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, seconds: wall clock, CPU time of all processes, of this one, and stolen time."""

    wall_s: float
    busy_s: float
    own_s: float
    stolen_s: float


def read() -> Reading:
    """Read the counters now."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    stolen = getattr(times, "steal", 0.0)
    # `guest` time is counted in `user` already.
    counted = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return Reading(time.perf_counter(), counted - idle - stolen, time.process_time(), stolen)


def others_s(before: Reading, after: Reading) -> float:
    """CPU seconds that were not ours between two readings, stolen time included; at least 0."""
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, others) + max(0.0, after.stolen_s - before.stolen_s)


def disturbed(before: Reading, after: Reading) -> bool:
    """Whether others took enough CPU time between two readings to doubt what was timed."""
    return others_s(before, after) > max(LEAST_S, SHARE * (after.wall_s - before.wall_s))
