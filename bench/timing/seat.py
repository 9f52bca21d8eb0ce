"""The inside of a seat: the calls that are ready in this process, and their turns.

The parent says whose turn it is (`bench.timing.rounds`). A turn begins with untimed calls, so that it finds caches,
clocks and threads as steady work has them, whichever variant had the turn before; then a block of calls is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from bench.machine import interference
from bench.machine.energy import EnergyCounter
from bench.machine.facts import known
from bench.records.block import Turn
from bench.timing.clock import now_s, synchronize, time_block, time_once


@dataclass(frozen=True)
class Subject:
    """A call to be timed.

    Attributes:
        call: one call of it.
        context: settings during its calls, entered once per turn so that they add nothing to a call.
    """

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


#: Wall time of the untimed calls of a turn, at least one call, and of its timed block: long compared with the
#: resolution of the clock and the scheduler, and with the cost of changing turns.
LEAD_S, BLOCK_S = 0.010, 0.020
MOST_CALLS = 200
#: A call that is shorter is made once more after the system was asked something.
SHORT_S = 0.001
#: Warm-up ends when the medians of its two latest batches of calls agree within this share, or so many in a row are not
#: faster than the fastest before by more than it.
STEADY_SHARE, MISSES = 0.03, 2
WARM_LEAST_S, WARM_MOST_S = 0.05, 1.0

#: The thread that makes the calls, as `interference.queued_s` names one.
OWN = ("thread-self",)
#: Bound here, before any variant can replace them.
_cpu_s = time.process_time


def warm_up(subject: Subject, device: str, block_s: float = BLOCK_S) -> int:
    """Call until steady, and return how many calls a block needs to last `block_s`.

    Steady: the medians of two batches in a row agree within `STEADY_SHARE`, or `MISSES` in a row are not faster than
    the fastest before by that much. Calls that warm up get faster, and on a busy host no two batches agree. A variant
    that gets faster and faster counts as warm after `WARM_MOST_S`; its interval will show it.
    """
    with subject.context():
        # The first call may import, compile or allocate what no later one does.
        subject.call()
        start = time.perf_counter()
        first = time_once(subject.call, device)
        # A long call is a batch of its own, and every one more costs as much as several rounds of a short one.
        size = max(1, min(20, math.ceil(WARM_LEAST_S / 4 / max(first, 1e-9))))
        before = fastest = first
        missed = 0
        while True:
            median = float(np.median([time_once(subject.call, device) for _ in range(size)]))
            spent = time.perf_counter() - start
            missed = 0 if median < (1 - STEADY_SHARE) * fastest else missed + 1
            steady = abs(median - before) <= STEADY_SHARE * median or missed >= MISSES
            before, fastest = median, min(median, fastest)
            if spent > WARM_MOST_S or (steady and spent > WARM_LEAST_S):
                break
    # A longer block may hold more calls in proportion.
    most = math.ceil(MOST_CALLS * max(1.0, block_s / BLOCK_S))
    return max(1, min(most, math.ceil(block_s / max(fastest, 1e-9))))


def take_turn(subject: Subject, calls: int, device: str, counter: EnergyCounter | None = None) -> Turn:
    """Call without timing for `LEAD_S`, once at least, then time a block of calls.

    Args:
        subject: what is called.
        calls: in the block.
        device: where it runs.
        counter: of energy, read at the start of the block and at its end; None reads nothing.
    """
    queued_s = interference.queued_s(OWN)
    cpu_from_s, start = _cpu_s(), now_s()
    with subject.context():
        made = 0
        while not made or now_s() - start < LEAD_S:
            subject.call()
            # What Python queues within `LEAD_S` may take a GPU many times as long.
            synchronize(device)
            made += 1
        # Threads that were stopped wait for cores as they wake up; by now they have found them.
        delays, switches = interference.read_delays(), known(interference.switches)
        # Reading takes 0.04 ms with 2 threads and 1.7 ms with 128, in which a team of threads may fall asleep.
        if now_s() - start < made * SHORT_S:
            subject.call()
        warm_s = now_s() - start
        if counter is None:
            block = time_block(subject.call, calls, device)
        else:
            # What was asked of a GPU before is not the block's. Threads spin for longer than a reading takes (0.02 ms).
            synchronize(device)
            before = counter.read()
            block = time_block(subject.call, calls, device)
            block = dataclasses.replace(block, energy_j=counter.joules(before, counter.read()))
    wall_s = now_s() - start
    after, switched = interference.read_delays(), known(interference.switches)
    return Turn(
        block=block,
        warm_s=warm_s,
        start_s=start,
        wall_s=wall_s,
        cpu_from_s=cpu_from_s,
        cpu_to_s=_cpu_s(),
        delay_s=interference.longest_delay_s(delays, after),
        switches=None if switches is None or switched is None else switched - switches,
        queued_s=interference.since(queued_s, interference.queued_s(OWN)),
    )


@dataclass(frozen=True)
class Ready:
    """A call that waits for its turns.

    Attributes:
        subject: the call.
        calls: in a block of it.
        device: where it runs.
        counter: of its energy; None reads nothing.
    """

    subject: Subject
    calls: int
    device: str
    counter: EnergyCounter | None = None

    def turn(self) -> Turn:
        """Take one."""
        return take_turn(self.subject, self.calls, self.device, self.counter)


#: Calls that are ready in this process, by the name that the parent uses.
READY: dict[str, Ready] = {}
