"""Measures interference: the use of the machine by anything else during a round.

Three instruments. The system's counters of CPU time say what other processes and the hypervisor took; they tick every
10 ms, so rounds are judged in stretches of at least `STRETCH_S`. The scheduler's account of our own threads says, to
the nanosecond and round by round, how long they were ready to run and had to wait. The time of a word between two
cores says whether the host moved them apart (`bench.machine.core_distance`). A round is disturbed when any of them
finds something. It is left out if enough others are left (`bench.records.rounds`). Otherwise it is kept and marked, and
it narrows no interval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.machine import gpu
from bench.machine.core_distance import FAR_WORDS
from bench.machine.facts import known

#: What a mark on figures may mean, in words.
DISTURBED = "something else used the machine or the host moved its cores apart"
#: What stands between two of the reasons of a round.
REASONS = "; "
#: Share of one core that others may take before a stretch of rounds counts as disturbed.
SHARE = 0.10
#: The system counts CPU time in ticks of 10 ms, so less than this cannot be distinguished from zero.
LEAST_S = 0.025
#: Wall time that the counters need before `SHARE` of it is more than `LEAST_S`.
STRETCH_S = LEAST_S / SHARE
#: Share of a round's timed blocks that one of our own threads may spend ready but without a core; a parallel region
#: waits for all.
DELAY_SHARE = 0.05
#: One look at whether the machine is quiet again, seconds.
LOOK_S = 0.1
_TASKS = Path("/proc/self/task")
_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
#: Bound here, before any variant can replace it.
_now_s = time.perf_counter


@dataclass(frozen=True)
class Reading:
    """Counters at one moment.

    Attributes:
        wall_s: wall clock.
        busy_s: CPU time of all processes, stolen time not among it; None if the system does not report it.
        own_s: CPU time of this process and of its workers.
        stolen_s: time that the hypervisor gave to others; 0 if the system does not report it.
    """

    wall_s: float
    busy_s: float | None
    own_s: float
    stolen_s: float


@dataclass(frozen=True)
class Interference:
    """Activity during a round.

    Attributes:
        why: what disturbed it, in words; empty when nothing did.
        others_share: cores that other processes kept busy during its stretch, on average; None if the system does
            not report it.
        stolen_share: cores that the hypervisor took, over the same time.
        delay_s: time in the round's timed blocks that the thread that waited longest was ready but had no core; None
            if the system does not report it.
        switches: times in them that we had to give up a core; None in the same case.
        load: the system's load average over a minute, where it has one.
        frequency_mhz: the processor's clock, if the system reports it.
        gpu_clock_mhz: clock of the GPU's multiprocessors; None without NVML or on a CPU.
        gpu_throttled: what held the GPU's clock back, in NVML's words.
        gpu_others: other processes that compute on the GPU.
    """

    why: str = ""
    others_share: float | None = 0.0
    stolen_share: float | None = 0.0
    delay_s: float | None = None
    switches: int | None = None
    load: float | None = None
    frequency_mhz: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_throttled: str = ""
    gpu_others: int = 0

    @property
    def far_alone(self) -> bool:
        """Return whether nothing disturbed it but that the cores were far apart."""
        return self.why.startswith(FAR_WORDS) and REASONS not in self.why


def read(seats_s: float = 0.0) -> Reading:
    """Read the counters now.

    Args:
        seats_s: CPU time that other processes of ours have used so far, seconds.
    """
    busy, stolen = known(_system_times) or (None, 0.0)
    return Reading(_now_s(), busy, time.process_time() + seats_s, stolen)


def _system_times() -> tuple[float, float]:
    """CPU seconds of all processes, and those that the hypervisor took."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    stolen = getattr(times, "steal", 0.0)
    # `guest` time is counted in `user` already.
    counted = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return counted - idle - stolen, stolen


def read_delays() -> dict[str, int] | None:
    """Nanoseconds that each of our threads was ready but had no core so far; None if the system does not report it.

    Source: second field of /proc/PID/task/TID/schedstat (Linux, Documentation/scheduler).
    """
    found = {}
    with contextlib.suppress(OSError):
        for task in os.listdir(_TASKS):  # noqa: PTH208 - read between rounds, where Path objects cost time
            # A thread may end between the listing and the reading.
            # Some systems have the file and nothing in it.
            with (
                contextlib.suppress(OSError, ValueError, IndexError),
                open(f"{_TASKS}/{task}/schedstat", "rb") as file,  # noqa: PTH123
            ):
                found[task] = int(file.read().split()[1])
    return found or None


def queued_s(tasks: Iterable[str]) -> float | None:
    """Seconds that threads were ready but had no core so far, all together; None if that of one cannot be read.

    Args:
        tasks: the threads: `PID/task/TID` of any process, or `thread-self`.
    """
    total_ns = 0
    for task in tasks:
        try:
            with open(f"/proc/{task}/schedstat", "rb") as file:  # noqa: PTH123 - read between turns, as above
                total_ns += int(file.read().split()[1])
        except (OSError, ValueError, IndexError):
            # Without one of them, a difference of two readings would be off by what that thread waited in all its life.
            return None
    return total_ns * 1e-9


def since(before: float | None, after: float | None) -> float | None:
    """Return the difference of two readings; None where one of them is unknown."""
    return None if before is None or after is None else after - before


def longest_delay_s(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> float | None:
    """Seconds that the thread that waited longest was ready but had no core between two `read_delays`."""
    if before is None or after is None:
        return None
    return max((ns - before.get(task, 0) for task, ns in after.items()), default=0) * 1e-9


def switches() -> int:
    """Times that this process had to give up a core so far."""
    import resource  # noqa: PLC0415 - not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def others_s(before: Reading, after: Reading) -> float:
    """CPU seconds of other processes between two readings; at least 0, and 0 if the system does not report it."""
    if before.busy_s is None or after.busy_s is None:
        return 0.0
    return max(0.0, (after.busy_s - before.busy_s) - (after.own_s - before.own_s))


def stolen_s(before: Reading, after: Reading) -> float:
    """CPU seconds that the hypervisor gave to others between two readings; at least 0."""
    return max(0.0, after.stolen_s - before.stolen_s)


def disturbed(before: Reading, after: Reading) -> bool:
    """Return whether others took enough CPU time between two readings to doubt what was timed."""
    taken_s = others_s(before, after) + stolen_s(before, after)
    return taken_s > max(LEAST_S, SHARE * (after.wall_s - before.wall_s))


def delayed(delay_s: float | None, timed_s: float) -> bool:
    """Return whether a thread of ours waited for a core for too large a share of what was timed; False if unknown."""
    return delay_s is not None and delay_s > DELAY_SHARE * timed_s


def judge(before: Reading, after: Reading, device: str = "cpu") -> Interference:
    """Activity between two readings that are at least `STRETCH_S` apart; nearer ones see less."""
    wall_s = max(after.wall_s - before.wall_s, 1e-9)
    told = before.busy_s is not None and after.busy_s is not None
    seen = gpu.read() if device == "cuda" else gpu.NOTHING
    reasons = []
    if disturbed(before, after):
        others, stolen = others_s(before, after) / wall_s, stolen_s(before, after) / wall_s
        reasons.append(f"others took {others:.2f} cores" + (f", the hypervisor {stolen:.2f}" if stolen else ""))
    if seen.slowed:
        reasons.append(f"the GPU was slowed ({seen.throttled})")
    if seen.others:
        reasons.append(f"{seen.others} other processes on the GPU")
    return Interference(
        why=REASONS.join(reasons),
        others_share=round(others_s(before, after) / wall_s, 4) if told else None,
        stolen_share=round(stolen_s(before, after) / wall_s, 4) if told else None,
        load=known(_load),
        frequency_mhz=known(_frequency_mhz),
        gpu_clock_mhz=seen.clock_mhz,
        gpu_throttled=seen.throttled,
        gpu_others=seen.others,
    )


def of_round(
    stretch: Interference,
    delay_s: float | None,
    switches: int | None,
    timed_s: float,
    far: str = "",
    late_s: float = 0.0,
) -> Interference:
    """Activity during one round of a stretch: the stretch's findings, and those of the round alone.

    Args:
        stretch: findings of the stretch.
        delay_s: wait of our own threads for a core in the timed blocks, seconds.
        switches: times in them that we had to give up a core.
        timed_s: length of the timed blocks, seconds.
        far: how the cores were further apart than usual, in words (`bench.machine.core_distance`).
        late_s: longest time by which a turn of it took longer than it says, seconds (`bench.records.block.Turn`).
    """
    late = f"the answer of a turn was {1e3 * late_s:.1f} ms late" if late_s else ""
    delayed_by = delay_s is not None and delayed(delay_s, timed_s)
    waited = f"a thread of ours waited {1e3 * (delay_s or 0.0):.1f} ms for a core" if delayed_by else ""
    why = REASONS.join(filter(None, (stretch.why, waited, late, far)))
    return dataclasses.replace(stretch, why=why, delay_s=delay_s, switches=switches)


def wait_until_quiet(patience_s: float, sleep: Callable[[float], object] = time.sleep) -> float:
    """Wait until a look of `LOOK_S` finds no other work, at most about `patience_s`; returns the seconds spent."""
    start = time.perf_counter()
    while time.perf_counter() - start + LOOK_S <= patience_s:
        before = read()
        sleep(LOOK_S)
        if not disturbed(before, read()):
            break
    return time.perf_counter() - start


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _frequency_mhz() -> float:
    """The first core's clock as the driver sees it; /proc/cpuinfo, which is slow to read, is not used."""
    return int(_FREQUENCY.read_text(encoding="ascii")) / 1000
