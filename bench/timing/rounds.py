"""Rounds: calibration of the calls per sample, warm-up until steady, and interleaving until the answer is narrow.

The variants of a group take turns, in a new random order each round, so that whatever drifts on the machine meets
all of them alike. Ratios are formed inside a round, never across. Rounds are judged in stretches long enough for the
system's counters to tell whether somebody else was at work (`bench.machine.interference`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from bench.machine import interference
from bench.machine.interference import Interference, Reading
from bench.plan.cases import LEAST_ROUNDS
from bench.records.block import Block
from bench.timing import turn_mark as mark
from bench.timing.clock import now_s, time_block, time_once


@dataclass(frozen=True)
class Subject:
    """A call to be timed.

    Attributes:
        call: one call of it.
        context: settings that hold while it is called, entered once a block so that they cost no call anything.
    """

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


#: Wall time that a block should at least take: long against the clock's and the scheduler's grain.
BLOCK_S = 0.010
MOST_CALLS = 200
#: Warm-up ends when the medians of its two latest batches of calls agree within this share.
STEADY_SHARE = 0.03
WARM_LEAST_S, WARM_MOST_S = 0.1, 1.0
#: Rounds below which a narrow interval may be luck.
STOP_ROUNDS = 30
#: Share of the budget that may be spent waiting for others to end their work.
PATIENCE = 0.25
HEARTBEAT_S = 1.0


@dataclass(frozen=True)
class Round:
    """One pass over the variants.

    Attributes:
        number: from 0.
        blocks: what was timed, by variant, in the order in which they ran.
        wall_s: how long it took, untimed calls included.
        beside: what else happened meanwhile.
        waited_s: how long a quiet moment was waited for before it.
    """

    number: int
    blocks: dict[str, Block]
    wall_s: float
    beside: Interference = field(default_factory=Interference)
    waited_s: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Return whether something else used the machine meanwhile."""
        return bool(self.beside.why)


@dataclass(frozen=True)
class Plan:
    """Limits on how long a process samples.

    Attributes:
        budget_s: wall seconds for its rounds, waiting for quiet moments included.
        interval: half-width of the ratios' interval at which it may stop early, as a share.
        reference: variant that the ratios are formed with.
        seed: of the random order.
    """

    budget_s: float
    interval: float
    reference: str
    seed: int


def warm_up(subject: Subject, device: str) -> int:
    """Call until steady, and say how many calls a block needs to last `BLOCK_S`.

    Steady: the medians of two batches in a row agree within `STEADY_SHARE`. A variant that never gets there is warm
    after `WARM_MOST_S` all the same; its own interval will show it.
    """
    with subject.context():
        start = time.perf_counter()
        first = time_once(subject.call, device)
        size = max(2, min(20, math.ceil(WARM_LEAST_S / 4 / max(first, 1e-9))))
        before = math.inf
        while True:
            median = float(np.median([time_once(subject.call, device) for _ in range(size)]))
            spent = time.perf_counter() - start
            if spent > WARM_MOST_S or (abs(median - before) <= STEADY_SHARE * median and spent > WARM_LEAST_S):
                break
            before = median
    return max(1, min(MOST_CALLS, math.ceil(BLOCK_S / max(median, 1e-9))))


def rounds(
    subjects: Mapping[str, Subject],
    per_block: Mapping[str, int],
    device: str,
    plan: Plan,
    mark: Callable[[str], object] = str,
) -> Iterator[Round]:
    """Yield rounds until the ratios to the reference are narrow enough or the budget is spent.

    A disturbed round is yielded, marked, but does not count as one of the rounds that may end the sampling; so it is
    repeated while there is time. After a disturbed stretch a quiet moment is waited for, at most `PATIENCE` of the
    budget in all.

    Args:
        subjects: what to time, by variant.
        per_block: calls in a block, by variant.
        device: `cpu` or `cuda`.
        plan: when to stop.
        mark: told the variant before each of its blocks, so that a crash can be laid at the right door.
    """
    generator = random.Random(plan.seed)  # noqa: S311 - an order, not a secret
    clean: dict[str, list[float]] = {name: [] for name in subjects}
    start = time.perf_counter()
    patience_s, waited_s = PATIENCE * plan.budget_s, 0.0
    number = 0
    while True:
        stretch = list(_stretch(subjects, per_block, device, generator, mark, start + plan.budget_s))
        for position, found in enumerate(stretch):
            yield dataclasses.replace(found, number=number, waited_s=0.0 if position else waited_s)
            number += 1
            if not found.disturbed:
                for name, block in found.blocks.items():
                    clean[name].append(block.typical_s)
        spent = time.perf_counter() - start
        if number >= LEAST_ROUNDS and (spent >= plan.budget_s or _narrow(clean, plan)):
            return
        # A group too slow for its budget still gives two rounds, and its wide interval is marked.
        if number >= 2 and spent >= 2 * plan.budget_s:  # noqa: PLR2004
            return
        waited_s = 0.0
        if stretch[-1].disturbed:
            waited_s = interference.wait_until_quiet(min(patience_s, plan.budget_s - spent))
            patience_s -= waited_s


def sample(
    subjects: Mapping[str, Subject],
    per_block: Mapping[str, int],
    device: str,
    plan: Plan,
    mark_path: str,
    emit: Callable[..., None],
) -> None:
    """Run the rounds of one process and send them, each as an event `round`, when all are done.

    Sent earlier, they would be read while others are timed, and the reader would take a core from them; meanwhile an
    event `progress` a second says that the process lives.

    Args:
        subjects: what to time, by variant.
        per_block: calls in a block, by variant.
        device: `cpu` or `cuda`.
        plan: when to stop.
        mark_path: file that holds the name of the variant whose turn it is, should the process die.
        emit: sends an event.
    """
    kept = []
    start = now_s()
    told = time.perf_counter()
    with open(mark_path, "r+b", buffering=0) as file:  # noqa: PTH123 - unbuffered
        for found in rounds(subjects, per_block, device, plan, functools.partial(mark.write, file.fileno())):
            kept.append(found)
            if time.perf_counter() - told > HEARTBEAT_S:
                told = time.perf_counter()
                emit("progress", rounds=len(kept))
        # What goes wrong from here on is nobody's turn.
        mark.write(file.fileno(), "")
    # What the samples must add up to, and what the parent's own clock must agree with.
    emit("sampled", elapsed_s=now_s() - start, rounds_s=sum(found.wall_s for found in kept))
    for found in kept:
        blocks = {
            name: [b.calls_s, b.queued_calls, b.queued_wall_s, b.queued_device_s] for name, b in found.blocks.items()
        }
        beside = dataclasses.asdict(found.beside)
        emit("round", number=found.number, wall_s=found.wall_s, waited_s=found.waited_s, beside=beside, blocks=blocks)


def _stretch(
    subjects: Mapping[str, Subject],
    per_block: Mapping[str, int],
    device: str,
    generator: random.Random,
    mark: Callable[[str], object],
    end: float,
) -> Iterator[Round]:
    """Rounds that are judged together: for at least `STRETCH_S`, unless the clock passes `end` before.

    They are yielded when all have run, so that whoever takes them takes no core from one of them.
    """
    order = list(subjects)
    before = interference.read()
    after = before
    taken: list[tuple[dict[str, Block], Reading, Reading]] = []
    while not taken or (after.wall_s - before.wall_s < interference.STRETCH_S and after.wall_s < end):
        generator.shuffle(order)
        started, blocks = after, {}
        for name in order:
            mark(name)
            blocks[name] = _block(subjects[name], per_block[name], device)
        after = interference.read()
        taken.append((blocks, started, after))
    beside = interference.judge(before, after, device)
    for blocks, started, ended in taken:
        wall_s = ended.wall_s - started.wall_s
        delay_s, switches = ended.delay_since(started), ended.switches_since(started)
        yield Round(0, blocks, wall_s, interference.of_round(beside, delay_s, switches, wall_s))


def _block(subject: Subject, calls: int, device: str) -> Block:
    with subject.context():
        return time_block(subject.call, calls, device)


def _narrow(clean: Mapping[str, list[float]], plan: Plan) -> bool:
    """Return whether the interval of every variant's median ratio is narrow enough, from clean rounds alone."""
    count = len(next(iter(clean.values())))
    if count < STOP_ROUNDS or plan.reference not in clean:
        return False
    # Order statistics that bound the median with 95 %, in the normal approximation.
    reach = 0.98 * math.sqrt(count)
    low, high = math.floor(count / 2 - reach), min(count - 1, math.ceil(count / 2 + reach))
    reference = np.array(clean[plan.reference])
    for values in clean.values():
        ratios = np.sort(reference / np.array(values))
        if (ratios[high] - ratios[max(0, low)]) / 2 > plan.interval * float(np.median(ratios)):
            return False
    return True
