"""The parent's clock: honest turns are believed, those of a slowed clock or a forger are not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.block import Block, Turn
from bench.run.clock_check import PAUSE_S, WAY_S, WAY_SHARE, Queued, Watch

CLOCK = "the worker's clock is wrong: it counted"
SAMPLES = "the samples cannot be true: they add up to"


def turn_of(call_s: float = 0.004, calls: int = 5, warm_s: float = 0.012, overhead: float = 0.0) -> Turn:
    """A turn of equal calls that begins at 0, with so much between them as a share of what they take."""
    wall_s = warm_s + (1 + overhead) * calls * call_s
    return Turn(Block((call_s,) * calls), warm_s, 0.0, wall_s, 0.0, 0.0, queued_s=0.0)


class Seats:
    """Turns one after the other, the seat's clock being apart from the parent's by `apart_s`.

    Attributes:
        now: parent's clock, seconds.
        speed: seconds that the seat's clock counts in one of the parent's.
    """

    def __init__(self, apart_s: float = 0.0, speed: float = 1.0) -> None:
        self.watch, self.now, self.speed, self.apart_s = Watch(), 1000.0, speed, apart_s

    def take(
        self, turn: Turn, to_s: float = 2e-4, back_s: float = 3e-4, queued_s: float = 0.0, worker_s: float | None = 0.0
    ) -> float:
        """A turn, whose request and answer take so long; its own times are as the seat's clock counts them.

        The parent waited for a core for `queued_s` of it, and the worker for `worker_s`.
        """
        asked_s = self.now
        begun_s = asked_s + to_s
        self.now = begun_s + turn.wall_s / self.speed + back_s
        told = dataclasses.replace(turn, start_s=self.apart_s + self.speed * begun_s)
        return self.watch.add(told, asked_s, self.now, Queued(queued_s, worker_s))


def doubt_of(turn: Turn, count: int = 25, speed: float = 1.0) -> str:
    """What is held against as many equal turns."""
    seats = Seats(speed=speed)
    for _ in range(count):
        seats.take(turn)
    return seats.watch.doubt()


def test_a_seat_that_never_had_a_turn_is_not_doubted():
    """Nothing was told, so nothing can be false."""
    assert Watch().doubt() == ""


@given(
    call_s=st.floats(1e-6, 2.0),
    calls=st.integers(1, 200),
    warm_s=st.floats(0.0, 0.02),
    overhead=st.floats(0.0, 0.3),
    apart_s=st.floats(-1e5, 1e5),
    ways_s=st.lists(st.tuples(st.floats(0.0, 0.005), st.floats(0.0, 0.005)), min_size=1, max_size=60),
)
def test_honest_turns_are_believed(call_s, calls, warm_s, overhead, apart_s, ways_s):
    """Bookkeeping within turns, clocks that began at other moments, and slow requests and answers raise no doubt."""
    seats = Seats(apart_s)
    for to_s, back_s in ways_s:
        seats.take(turn_of(call_s, calls, warm_s, overhead), to_s, back_s)
    assert seats.watch.doubt() == ""


def test_a_busy_machine_is_no_wrong_clock():
    """Ways as they were beside ten other processes on two cores: 12.8 ms on average, single ones of 37 ms."""
    ways_s = np.random.default_rng(0).gamma(4.0, 0.0064 / 4, (500, 2))
    seats = Seats()
    for to_s, back_s in ways_s:
        seats.take(turn_of(0.008, 5, 0.014), to_s, back_s)
    assert ways_s.sum(axis=1).mean() == pytest.approx(0.0128, rel=0.05)
    assert ways_s.sum(axis=1).max() > 0.025
    assert seats.watch.doubt() == ""


@given(st.lists(st.tuples(st.floats(0.02, 0.5), st.floats(0.5, 1.0)), min_size=1, max_size=40))
def test_waiting_for_a_core_is_no_wrong_clock(waits):
    """However long those threads wait that pass on requests and answers, and however few the turns."""
    seats = Seats()
    for wait_s, share in waits:
        seats.take(turn_of(), 0.4 * wait_s, 0.6 * wait_s, queued_s=share * wait_s, worker_s=(1 - share) * wait_s)
    assert seats.watch.doubt() == ""


@pytest.mark.parametrize("within_s", [-0.05, -3600.0, math.nan, None])
@pytest.mark.parametrize("parent_s", [0.0, 0.02])
def test_a_wait_that_no_turn_can_have_excuses_nothing(within_s, parent_s):
    """Less than none, not a number, or unknown: 0.80 s were told for 2.05 s, and the parent waited for little of it."""
    seats = Seats()
    for _ in range(25):
        seats.take(dataclasses.replace(turn_of(), queued_s=within_s), back_s=0.05, queued_s=parent_s)
    assert seats.watch.doubt().startswith(CLOCK)


@pytest.mark.parametrize("queued", [Queued(), Queued(None, 0.5), Queued(0.0, None)])
def test_waits_that_cannot_be_read_excuse_nothing(queued):
    """A difference with a reading that failed is no time."""
    assert queued.excuse_s(turn_of()) == 0.0
    assert queued.since(Queued()) == Queued()
    unknown = dataclasses.replace(turn_of(), queued_s=None)
    assert Queued(0.01, 0.02).excuse_s(unknown) == 0.01
    assert Queued(0.01, 0.02).excuse_s(turn_of()) == 0.02


@pytest.mark.parametrize("worker_s", [0.05, 0.5])
def test_a_worker_cannot_buy_an_excuse_with_processes_of_its_own(worker_s):
    """They keep its own thread off its core, as long as it likes; the parent does not wait for one meanwhile."""
    seats = Seats()
    for _ in range(25):
        seats.take(turn_of(), back_s=0.05, queued_s=0.002, worker_s=worker_s)
    assert seats.watch.doubt().startswith(CLOCK)


def test_a_worker_that_keeps_all_cores_from_the_parent_is_marked_in_every_turn():
    """The limit of the check: that wait is excused. But each answer was late, so each round counts as disturbed."""
    seats = Seats()
    late = [seats.take(turn_of(), back_s=0.05, queued_s=0.025, worker_s=0.2) for _ in range(25)]
    assert seats.watch.doubt() == ""
    assert late == pytest.approx([0.0502] * 25)


@pytest.mark.parametrize(("beyond", "marked"), [(0.9, False), (1.1, True)])
def test_a_turn_is_late_where_no_usual_way_takes_as_long(beyond, marked):
    """Whatever explains it: 10 ms and a tenth of the time waited are usual."""
    way_s = beyond * (WAY_S + WAY_SHARE * turn_of().wall_s) / (1 - beyond * WAY_SHARE)
    for queued_s in (0.0, way_s):
        late_s = Seats().take(turn_of(), 0.0, way_s, queued_s=queued_s)
        assert late_s == (pytest.approx(way_s) if marked else 0.0)


@pytest.mark.parametrize("waits_s", [(0.0,), (0.5,), (0.5,) * 12])
def test_a_few_turns_that_waited_excuse_only_themselves(waits_s):
    """Each of 25 turns was told 7.9 ms too short: 0.80 s for 1.00 s."""
    seats = Seats()
    for queued_s in (*waits_s, *[0.0] * (25 - len(waits_s))):
        seats.take(turn_of(), back_s=0.0079, queued_s=queued_s)
    assert seats.watch.doubt().startswith(CLOCK)


@pytest.mark.parametrize("queued_s", [0.0, 0.01])
@pytest.mark.parametrize("count", [6, 25])
def test_the_same_delay_without_a_wait_for_a_core_is_not_believed(count, queued_s):
    """What took 80 ms more than was told, of which the kernel saw at most 10 ms of waiting, was told too short."""
    seats = Seats()
    for _ in range(count):
        seats.take(turn_of(), back_s=0.08, queued_s=queued_s)
    assert seats.watch.doubt().startswith(CLOCK)


@pytest.mark.parametrize("within_s", [0.0, 0.2])
def test_a_wait_within_the_turn_excuses_no_turn_told_too_short(within_s):
    """Half of what each took is missing. The machine is busy, but the turns' own waits are in their own time."""
    honest = dataclasses.replace(turn_of(0.02), queued_s=within_s)
    told = dataclasses.replace(turn_of(0.01), queued_s=within_s)
    right, wrong = Seats(), Seats()
    for _ in range(25):
        right.take(honest, back_s=0.03, queued_s=0.015, worker_s=within_s + 0.015)
        wrong.take(told, back_s=honest.wall_s - told.wall_s + 0.03, queued_s=0.015, worker_s=within_s + 0.015)
    assert right.watch.doubt() == ""
    assert wrong.watch.doubt().startswith(CLOCK)


@pytest.mark.parametrize("speed", [0.5, 0.8, 0.97, 1.03, 1.25, 2.0])
@pytest.mark.parametrize("calls", [5, 50])
@pytest.mark.parametrize("queued_s", [0.0, 1.0])
def test_a_clock_that_runs_at_another_speed_is_not_believed(speed, calls, queued_s):
    """All that the process tells is consistent, but the parent's clock went on otherwise; also on a busy machine."""
    seats = Seats(speed=speed)
    for _ in range(50):
        seats.take(turn_of(calls=calls), queued_s=queued_s)
    assert seats.watch.doubt().startswith(CLOCK)


def test_a_clock_that_stands_still_now_and_then_is_not_believed():
    """A tenth of each turn is left out, and the turns are else as they should be."""
    seats, turn = Seats(), turn_of()
    for _ in range(25):
        seats.take(turn)
        seats.apart_s -= 0.1 * turn.wall_s
    assert seats.watch.doubt().startswith(CLOCK)


def test_turns_told_shorter_than_they_were_waited_for_are_not_believed():
    """Each begins when it should; half of what each took is missing, which no way takes."""
    honest = turn_of()
    told = turn_of(0.5 * 0.004, warm_s=0.5 * 0.012)
    seats = Seats()
    for _ in range(25):
        seats.take(told, back_s=honest.wall_s - told.wall_s)
    assert seats.watch.doubt().startswith(CLOCK)


@pytest.mark.parametrize("forged", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("call_s", "calls", "warm_s"), [(0.004, 5, 0.012), (0.03, 1, 0.03), (0.5, 1, 0.5)])
def test_samples_that_do_not_make_up_their_time_are_not_believed(forged, call_s, calls, warm_s):
    """The clock is right, but what is written down of the calls is not, however long the untimed ones took."""
    turn = turn_of(call_s, calls, warm_s, overhead=0.02)
    forger = dataclasses.replace(turn, block=Block((forged * call_s,) * calls))
    assert doubt_of(turn) == ""
    assert doubt_of(forger).startswith(SAMPLES)


def test_the_queued_block_of_a_gpu_stands_for_what_it_took():
    """Throughput and latency are timed one after the other, and both make up the time."""
    turn = Turn(Block((0.01,) * 10, 10, 0.1, 0.1), 0.02, 0.0, 0.22, 0.0, 0.0)
    assert doubt_of(turn) == ""
    assert doubt_of(dataclasses.replace(turn, block=Block((0.01,) * 10))).startswith(SAMPLES)


def test_one_pause_of_the_machine_is_no_lie():
    """A few turns of milliseconds may meet a pause as long as themselves, between the calls and on the way."""
    seats, turn = Seats(), turn_of(0.002, 5, 0.01)
    for _ in range(3):
        seats.take(turn)
    seats.take(dataclasses.replace(turn, wall_s=turn.wall_s + 0.9 * PAUSE_S), 0.5, 0.5)
    assert seats.watch.doubt() == ""
    few = Seats()
    for _ in range(3):
        few.take(turn, back_s=0.025)
    assert few.watch.doubt() == ""
