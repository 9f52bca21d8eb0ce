"""The parent's clock: honest samples are believed, those of a slowed clock or a forger are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.block import Block
from bench.run.clock_check import CLOCK_S, accounted_s, doubt


def blocks(call_s: float, calls: int, count: int) -> list[Block]:
    """As many blocks of equal calls."""
    return [Block((call_s,) * calls)] * count


def test_the_untimed_call_of_a_block_is_accounted_for():
    """Two timed calls stand for three; a block of one call has no other."""
    assert accounted_s(blocks(1.0, 2, 4)) == 12.0
    assert accounted_s(blocks(1.0, 1, 4)) == 4.0
    assert accounted_s([Block((1.0, 1.0), 2, 1.5, 1.5)]) == 3.5 + 0.75


@given(
    call_s=st.floats(1e-6, 2.0),
    calls=st.integers(1, 200),
    count=st.integers(4, 400),
    overhead=st.floats(0.0, 0.5),
    waiting_s=st.floats(0.0, 60.0),
    late_s=st.floats(0.0, CLOCK_S / 2),
)
def test_honest_samples_are_believed(call_s, calls, count, overhead, waiting_s, late_s):
    """Bookkeeping between blocks, waiting between rounds and events that travel slowly raise no doubt."""
    found = blocks(call_s, calls, count)
    rounds_s = (1 + overhead) * accounted_s(found)
    assert not doubt(found, rounds_s + waiting_s, rounds_s, rounds_s + waiting_s + late_s)


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.25, 2.0])
def test_a_clock_that_runs_at_another_speed_is_not_believed(speed):
    """All that the process tells is consistent, but the parent saw other times."""
    found = blocks(0.01 * speed, 10, 500)
    rounds_s = accounted_s(found)
    assert "the worker's clock is wrong" in doubt(found, rounds_s, rounds_s, rounds_s / speed)


@pytest.mark.parametrize("forged", [0.1, 0.5, 2.0])
def test_samples_that_do_not_make_up_the_rounds_are_not_believed(forged):
    """The clock is right, but what is written down of the blocks is not."""
    honest, told = blocks(0.01, 10, 500), blocks(0.01 * forged, 10, 500)
    rounds_s = 1.02 * accounted_s(honest)
    assert "the samples cannot be true" in doubt(told, rounds_s, rounds_s, rounds_s)
