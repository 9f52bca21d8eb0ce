"""Check that the samples of a process can be true, by a clock that no variant can reach: the parent's.

A variant shares its process with what times it, and may slow the process's clock. The parent knows how long the rounds
took. It trusts the process's clock only while both tell about the same, and the samples only while they make up the
rounds: all that stands between them is an untimed call a block and the reading of a few counters.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.records.block import Block

#: Share by which the two clocks may differ. They start and stop apart by the time that an event takes to travel.
CLOCK_SHARE, CLOCK_S = 0.1, 0.25
#: Share of the rounds that samples and untimed calls must make up.
LEAST_SHARE = 0.6
#: Rounds so short that a pause of the machine decides are not judged by it, seconds.
PAUSE_S = 0.05
#: More than all of it they cannot be, but for the untimed calls, whose time is a guess.
MOST_SHARE = 1.5


def accounted_s(blocks: Iterable[Block]) -> float:
    """Seconds that blocks took by their own account: their samples, and a call for the untimed one of each."""
    return sum(
        sum(block.calls_s) + block.queued_wall_s + (block.typical_s if len(block.calls_s) > 1 else 0.0)
        for block in blocks
    )


def doubt(blocks: Iterable[Block], elapsed_s: float, rounds_s: float, wall_s: float) -> str:
    """Reason why the samples of a process cannot be true; nothing when they can.

    Args:
        blocks: all blocks of all rounds.
        elapsed_s: how long the rounds took from the first to the last by the process's clock.
        rounds_s: the same without what lies between two rounds.
        wall_s: how long they took by the parent's clock.
    """
    if abs(elapsed_s - wall_s) > CLOCK_S + CLOCK_SHARE * wall_s:
        return (
            f"the worker's clock is wrong: it counted {elapsed_s:.1f} s for rounds that took {wall_s:.1f} s by the "
            "clock of the parent"
        )
    found_s = accounted_s(blocks)
    if not LEAST_SHARE * rounds_s - PAUSE_S <= found_s <= MOST_SHARE * rounds_s + PAUSE_S:
        return f"the samples cannot be true: they add up to {found_s:.1f} s of {rounds_s:.1f} s that the rounds took"
    return ""
