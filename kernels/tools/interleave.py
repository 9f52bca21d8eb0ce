"""Timing of candidates against each other: in turns, in random order, many short blocks, medians.

A GPU's clock and a neighbour's load drift over seconds; candidates that take turns see the same drift.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

#: Length of a block, and most calls in one: enough that an event's own half microsecond does not count.
BLOCK_S = 4e-3
MOST_CALLS = 200
#: Calls before anything counts: a kernel may launch plainly twice and capture a graph at the third.
WARM_CALLS = 4
#: Rounds after which a candidate is dropped, and the multiple of its group's fastest time from which it is.
TRIAL_ROUNDS = 3
HOPELESS = 1.5


@dataclass(frozen=True)
class Call:
    """Candidate to be timed.

    Attributes:
        run: the timed call.
        prepare: runs before each timed call, untimed; None where calls can follow each other.
        group: candidates of one group compete, and the hopeless among them are dropped early.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    group: str = ""


class Clock(Protocol):
    """Measures calls."""

    def time(self, call: Call, count: int) -> float:
        """Seconds a call, over a number of calls."""


class EventClock:
    """CUDA events around a block of calls: what the GPU took, waiting for the host included.

    Where calls need preparation there is a pair of events a call, and only what is between counts.
    """

    def time(self, call: Call, count: int) -> float:
        """Seconds a call, over a number of calls, once the GPU has done all of them."""
        if call.prepare is None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call.run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / count
        pairs = []
        for _ in range(count):
            call.prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call.run()
            end.record()
            pairs.append((start, end))
        pairs[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1e3 / count


class WallClock:
    """The host's clock, for calls that have ended when they return, as on a CPU."""

    def time(self, call: Call, count: int) -> float:
        """Seconds a call, over a number of calls."""
        total = 0.0
        for _ in range(count):
            if call.prepare is not None:
                call.prepare()
            began = time.perf_counter()
            call.run()
            total += time.perf_counter() - began
        return total / count


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int,
    seed: int = 0,
    block_s: float = BLOCK_S,
    told: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Time calls in turns.

    Args:
        calls: by name.
        clock: measures a block of one call.
        rounds: blocks of each call; a hopeless one has fewer.
        seed: of the order within rounds.
        block_s: about how long a block takes.
        told: takes the name of each call before its warm-up and before each of its blocks, outside of what is timed.

    Returns:
        Seconds a call by name, one value per round.
    """
    generator = random.Random(seed)  # noqa: S311 - an order
    counts = {}
    for name, call in calls.items():
        # The first calls compile, allocate and capture a graph; the last shows how long one takes.
        told(name)
        for _ in range(WARM_CALLS):
            clock.time(call, 1)
        counts[name] = max(1, min(MOST_CALLS, int(block_s / max(clock.time(call, 1), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        if number == TRIAL_ROUNDS:
            names = _hopeful(calls, times)
        for name in generator.sample(names, len(names)):
            told(name)
            times[name].append(clock.time(calls[name], counts[name]))
    return times


def _hopeful(calls: Mapping[str, Call], times: Mapping[str, list[float]]) -> list[str]:
    best: dict[str, float] = {}
    for name, call in calls.items():
        best[call.group] = min(best.get(call.group, float("inf")), statistics.median(times[name]))
    return [name for name, call in calls.items() if statistics.median(times[name]) <= HOPELESS * best[call.group]]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
