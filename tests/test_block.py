"""Blocks and turns: what a seat says of a turn arrives at the parent as it was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.block import Block, Turn

SECONDS = st.floats(0.0, 1e6)
BLOCKS = st.builds(
    Block,
    st.lists(SECONDS, max_size=5).map(tuple),
    st.integers(0, 200),
    SECONDS,
    st.none() | SECONDS,
)


@given(
    st.builds(
        Turn,
        block=BLOCKS,
        warm_s=SECONDS,
        start_s=SECONDS,
        wall_s=SECONDS,
        cpu_from_s=SECONDS,
        cpu_to_s=SECONDS,
        delay_s=st.none() | SECONDS,
        switches=st.none() | st.integers(0),
        queued_s=st.none() | SECONDS,
    )
)
def test_a_turn_survives_its_way_to_the_parent(turn):
    """As the fields of an event, in JSON, beside whatever else an event holds."""
    event = json.loads(json.dumps({"event": "turn"} | turn.fields()))
    assert Turn.of(event) == turn


def test_only_the_parent_says_that_a_turn_was_late():
    """A worker that says so of itself is not heard, nor one that says the opposite."""
    turn = Turn(Block((1.0,)), 0.1, 7.0, 1.2, 0.0, 1.0, late_s=0.5)
    assert "late_s" not in turn.fields()
    assert Turn.of(turn.fields() | {"late_s": -1.0}).late_s == 0.0


def test_a_turn_without_one_of_its_values_is_no_turn():
    """An event that lacks something is an error at once, not a default; but an earlier worker says no wait."""
    fields = Turn(Block((1.0,)), 0.1, 7.0, 1.2, 0.0, 1.0, queued_s=0.5).fields()
    without = Turn.of({key: value for key, value in fields.items() if key != "queued_s"})
    assert without.queued_s is None
    for name in fields.keys() - {"queued_s"}:
        with pytest.raises(KeyError):
            Turn.of({key: value for key, value in fields.items() if key != name})


def test_a_turn_s_account_is_all_that_its_timed_calls_took():
    """Single ones and queued ones; untimed ones have a time of their own."""
    assert Turn(Block((1.0, 2.0)), 0.5, 7.0, 4.0, 0.0, 0.0).accounted_s == 3.0
    assert Turn(Block((1.0, 2.0), 2, 1.5, 1.5), 0.5, 7.0, 6.0, 0.0, 0.0).accounted_s == 4.5


def test_a_block_s_figures_are_those_of_its_calls():
    """A queued block speaks by what was queued, others by the median of their calls, which no single call moves."""
    single = Block((0.5, 0.5, 9.0))
    queued = Block((), 2, 3.0, 1.0)
    assert (single.typical_s, single.per_call_s) == (0.5, pytest.approx(10 / 3))
    assert (queued.typical_s, queued.per_call_s) == (1.5, 1.5)
