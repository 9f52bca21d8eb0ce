"""Rounds: the variants of a group take turns until the answer stands or the time is spent.

Whatever drifts on the machine meets all of them alike, and each follows each of the others equally often. Ratios are
formed inside a round, never across. Rounds are judged in stretches long enough for the system's counters to tell
whether other processes were at work (`bench.machine.interference`).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.machine import interference
from bench.machine.interference import Reading
from bench.plan.cases import LEAST_ROUNDS
from bench.records.block import Block, Turn
from bench.records.rounds import Round

#: Share of the budget that may be spent waiting for others to end their work.
PATIENCE = 0.25


class Player(Protocol):
    """A variant that takes turns, as the parent sees it."""

    @property
    def seat(self) -> int:
        """Number of the process in which it takes them."""

    def turn(self) -> Turn:
        """Take a turn while all others stand still."""


#: Returns the variants that continue after a stretch, from the rounds of the seating so far; none ends it.
Chooser = Callable[[Sequence[Round]], Collection[str]]


class Cores(Protocol):
    """The distance of two cores (`bench.machine.core_distance`)."""

    def look(self) -> float | None:
        """Time a word now, nanoseconds; None where it cannot be timed."""

    def far(self, took_ns: float | None) -> str:
        """Say in words that it took longer than usual; empty where it did not."""


def orders(names: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """Yield the order of each round, without end: over a cycle, each name follows each other one equally often.

    A cycle is a Williams design (Williams 1949): as many rounds as there are names, twice as many where their number is
    odd, in which every ordered pair of names is adjacent once (twice). Names and rounds of a cycle are in random order.
    """
    generator = random.Random(seed)  # noqa: S311 - an order, not a secret
    count = len(names)
    zigzag = [step // 2 if step % 2 == 0 else count - (step + 1) // 2 for step in range(count)]
    while True:
        drawn = generator.sample(list(names), count)
        cycle = [[drawn[(place + shift) % count] for place in zigzag] for shift in range(count)]
        if count % 2:
            cycle += [row[::-1] for row in cycle]
        yield from map(tuple, generator.sample(cycle, len(cycle)))


def rounds(
    players: Mapping[str, Player],
    device: str,
    budget_s: float,
    seed: int,
    chosen: Chooser | None = None,
    cores: Cores | None = None,
) -> Iterator[Round]:
    """Yield rounds until no variant needs more or the budget is spent.

    After a stretch in which others were at work a quiet moment is waited for, at most `PATIENCE` of the budget in all.
    Nothing is waited for where only the cores were far apart: that may last for minutes.

    Args:
        players: who takes turns, by variant.
        device: `cpu` or `cuda`.
        budget_s: wall seconds, waiting for quiet moments included.
        seed: of the order.
        chosen: asked after each stretch; without it all go on to the end of the budget.
        cores: asked between rounds; without it their distance is not looked at.
    """
    names = list(players)
    order = orders(names, seed)
    account = _Account()
    taken: list[Round] = []
    start = time.perf_counter()
    patience_s, waited_s = PATIENCE * budget_s, 0.0
    while True:
        stretch = list(_stretch(players, order, device, account, start + budget_s, cores))
        for position, (found, _) in enumerate(stretch):
            taken.append(dataclasses.replace(found, number=len(taken), waited_s=0.0 if position else waited_s))
            yield taken[-1]
        spent = time.perf_counter() - start
        if spent >= budget_s and len(taken) >= LEAST_ROUNDS:
            return
        if chosen is not None and (going := [name for name in players if name in chosen(taken)]) != names:
            if not going:
                return
            names, seed = going, seed + 1
            order = orders(names, seed)
        # A group too slow for its budget still gives two rounds, and its wide interval is marked.
        if len(taken) >= 2 and spent >= 2 * budget_s:  # noqa: PLR2004
            return
        waited_s = 0.0
        if stretch[-1][1]:
            waited_s = interference.wait_until_quiet(min(patience_s, budget_s - spent))
            patience_s -= waited_s


class _Account:
    """CPU time that the seats have used, added up from what their turns report."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._last: dict[int, float] = {}

    def add(self, seat: int, turn: Turn) -> None:
        """Count a turn, and what its seat used since the one before."""
        self.spent_s += turn.cpu_to_s - self._last.get(seat, turn.cpu_from_s)
        self._last[seat] = turn.cpu_to_s


@dataclass(frozen=True)
class _Pass:
    """A round that is not judged yet."""

    blocks: dict[str, Block]
    delays_s: tuple[float | None, ...]
    switches: tuple[int | None, ...]
    late_s: float
    started: Reading
    ended: Reading
    word_ns: float | None


def _stretch(
    players: Mapping[str, Player],
    order: Iterator[tuple[str, ...]],
    device: str,
    account: _Account,
    end: float,
    cores: Cores | None,
) -> Iterator[tuple[Round, bool]]:
    """Rounds that are judged together: for at least `STRETCH_S`, unless the clock passes `end` before.

    With each comes whether anything but the distance of the cores disturbed it.

    They are yielded when all have run, so that their receiver takes no core from one of them.
    """
    before = interference.read(account.spent_s)
    after = before
    taken: list[_Pass] = []
    word_ns = None if cores is None else cores.look()
    while not taken or (after.wall_s - before.wall_s < interference.STRETCH_S and after.wall_s < end):
        started = after
        turns: dict[str, Turn] = {}
        for name in next(order):
            turns[name] = players[name].turn()
            account.add(players[name].seat, turns[name])
        after = interference.read(account.spent_s)
        blocks = {name: turn.block for name, turn in turns.items()}
        delays_s = tuple(turn.delay_s for turn in turns.values())
        before_ns, word_ns = word_ns, None if cores is None else cores.look()
        given_up = tuple(turn.switches for turn in turns.values())
        late_s = max(turn.late_s for turn in turns.values())
        taken.append(_Pass(blocks, delays_s, given_up, late_s, started, after, _longer(before_ns, word_ns)))
    beside = interference.judge(before, after, device)
    for found in taken:
        timed_s = sum(block.timed_s for block in found.blocks.values())
        switches = _total(found.switches)
        far = "" if cores is None else cores.far(found.word_ns)
        alone = interference.of_round(
            beside, _total(found.delays_s), None if switches is None else int(switches), timed_s, far, found.late_s
        )
        wall_s = found.ended.wall_s - found.started.wall_s
        taken_round = Round(0, found.blocks, wall_s, beside=alone, order=tuple(found.blocks), word_ns=found.word_ns)
        yield taken_round, alone.why != far


def _longer(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _total(values: Sequence[float | None]) -> float | None:
    """Sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
