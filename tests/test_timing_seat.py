"""A seat from inside: warm-up and turns, on a clock that only advances when a call says so."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import interference
from bench.records.block import Block
from bench.timing import seat
from bench.timing.seat import (
    BLOCK_S,
    LEAD_S,
    MOST_CALLS,
    SHORT_S,
    WARM_LEAST_S,
    WARM_MOST_S,
    Ready,
    Subject,
    take_turn,
    warm_up,
)


class Clock:
    """Time that stands still unless `spend` moves it; takes the place of every clock in `bench.timing.seat`.

    Attributes:
        now: seconds.
        cpu_s: CPU time of the process.
        delays: what `interference.read_delays` gives, one after the other.
        switches: what `interference.switches` gives, likewise; what is an exception is raised.
        timed: calls that each block was asked for.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.cpu_s = 1000.0, 50.0
        self.delays: list[dict[str, int] | None] = []
        self.switches: list[int | Exception] = []
        self.timed: list[int] = []
        patch.setattr(seat, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr(seat, "now_s", lambda: self.now)
        patch.setattr(seat, "time_once", self._once)
        patch.setattr(seat, "time_block", self._block)
        patch.setattr(seat, "_cpu_s", lambda: self.cpu_s)
        patch.setattr(interference, "read_delays", lambda: self.delays.pop(0) if self.delays else None)
        patch.setattr(interference, "switches", self._switches)

    def spend(self, seconds: float, cpu: float = 1.0) -> None:
        """Let time pass, and so much CPU time with each second."""
        self.now += seconds
        self.cpu_s += cpu * seconds

    def _once(self, call, device):
        assert device == "cpu"
        before = self.now
        call()
        return self.now - before

    def _block(self, call, calls, device):
        self.timed.append(calls)
        return Block(tuple(self._once(call, device) for _ in range(calls)))

    def _switches(self) -> int:
        found = self.switches.pop(0) if self.switches else 0
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def clock(monkeypatch):
    """The clock of the test."""
    return Clock(monkeypatch)


def lasting(clock: Clock, *seconds: float) -> Subject:
    """A subject whose calls take these times in turn, for ever."""
    times = itertools.cycle(seconds)
    return Subject(lambda: clock.spend(next(times)))


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 0.00099, 0.003, 0.010, 0.5])
def test_warm_up_says_how_many_calls_fill_a_block(clock, seconds):
    """As many as last BLOCK_S, at least one, at most MOST_CALLS."""
    expected = max(1, min(MOST_CALLS, math.ceil(BLOCK_S / seconds)))
    # Sums of floats may fall on either side of a whole number.
    assert abs(warm_up(lasting(clock, seconds), "cpu") - expected) <= 1


def test_warm_up_of_a_steady_call_is_short(clock):
    """It ends as soon as it has lasted the least time and two batches agree."""
    start = clock.now
    warm_up(lasting(clock, 0.001), "cpu")
    assert WARM_LEAST_S < clock.now - start < 2 * WARM_LEAST_S


def test_warm_up_of_a_long_steady_call_is_three_calls(clock):
    """The first, and two that agree: all seats of a group wait for it."""
    start = clock.now
    warm_up(lasting(clock, 0.12), "cpu")
    assert clock.now - start == pytest.approx(3 * 0.12)


def test_warm_up_lasts_until_a_call_is_steady(clock):
    """A call that gets faster for its first second is called until it is; blocks are filled by its final time."""
    start = clock.now
    ending = start + 1.0
    subject = Subject(lambda: clock.spend(0.001 + 0.05 * max(0.0, ending - clock.now)))
    assert warm_up(subject, "cpu") == pytest.approx(BLOCK_S / 0.001, abs=2)
    assert clock.now > ending


def test_what_the_first_call_alone_pays_for_takes_no_time_from_warm_up(clock):
    """An import of three seconds in it, longer than warm-up may last, leaves the later calls to become steady."""
    times = itertools.chain([3.0], [0.004] * 10, itertools.repeat(0.001))
    assert warm_up(Subject(lambda: clock.spend(next(times))), "cpu") == pytest.approx(BLOCK_S / 0.001, abs=2)


def test_warm_up_of_a_call_that_is_never_steady_ends(clock):
    """A call that gets faster with every call is warm when the most time has passed, within a batch."""
    number = itertools.count()
    start = clock.now
    subject = Subject(lambda: clock.spend(0.06 * 0.95 ** next(number)))
    warm_up(subject, "cpu")
    assert WARM_MOST_S < clock.now - start < 2 * WARM_MOST_S


def test_warm_up_on_a_busy_host_ends_where_a_call_gets_no_faster(clock):
    """Of calls that take 10 % more or less by chance, no two batches agree; they are as warm as calls that do."""
    drawn = random.Random(1)
    start = clock.now
    warm_up(Subject(lambda: clock.spend(0.02 * drawn.uniform(0.9, 1.1))), "cpu")
    assert WARM_LEAST_S < clock.now - start < 4 * WARM_LEAST_S


def test_one_slow_call_ends_no_warm_up(clock):
    """One that compiles at the third call is timed as it is afterwards, and its blocks hold as many of those calls."""
    times = itertools.chain([0.02, 0.02, 0.3], itertools.repeat(0.004))
    calls = warm_up(Subject(lambda: clock.spend(next(times))), "cpu")
    assert calls == pytest.approx(BLOCK_S / 0.004, abs=1)


def test_a_slower_call_in_between_ends_no_warm_up(clock):
    """Calls get faster for a second, and every third one meets something; they are called until they are fast."""
    made = itertools.count()
    start = clock.now

    def call() -> None:
        left = max(0.0, start + 0.9 - clock.now)
        clock.spend((0.015 + 0.05 * left) * (1.15 if next(made) % 3 == 0 else 1.0))

    warm_up(Subject(call), "cpu")
    assert clock.now > start + 0.8


@pytest.mark.parametrize("begin", [warm_up, lambda subject, device: take_turn(subject, 3, device)])
def test_calls_run_inside_the_subject_s_context(clock, begin):
    """Settings such as the vendor library hold in every call, timed or not, and no longer; they are made once."""
    entered, open_now, seen = [], [], []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        open_now.append(True)
        yield
        open_now.pop()

    def call() -> None:
        seen.append(bool(open_now))
        clock.spend(0.01)

    begin(Subject(call, context), "cpu")
    assert len(entered) == 1
    assert len(seen) > 1
    assert all(seen)
    assert not open_now


@given(call_s=st.floats(1e-5, 0.2), calls=st.integers(1, MOST_CALLS))
def test_a_turn_begins_with_untimed_calls_and_then_times_what_it_was_told(call_s, calls):
    """Untimed: as many as last LEAD_S, one at least, and one more of short ones; timed: what warm-up gave."""
    made = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        turn = take_turn(Subject(lambda: (next(made), clock.spend(call_s))), calls, "cpu")
    untimed = next(made) - calls
    assert (clock.timed, len(turn.block.calls_s)) == ([calls], calls)
    assert turn.warm_s == pytest.approx(untimed * call_s)
    assert untimed >= 1
    # The clock counts from 1000, so a sum of many calls is right to 1e-13 of that each.
    assert turn.warm_s > LEAD_S - 1e-9
    more = call_s if call_s <= SHORT_S else 0.0
    assert untimed == 1 or turn.warm_s - call_s - more < LEAD_S + 1e-9


def test_untimed_calls_on_a_gpu_are_waited_for_one_by_one(clock, monkeypatch):
    """A call that queues thirty times as much work as it takes itself fills no turn with untimed work."""
    queued = []

    def wait(device: str) -> None:
        assert device == "cuda"
        clock.spend(sum(queued))
        queued.clear()

    def block(call, calls, device):
        del call, calls
        wait(device)
        return Block((1.0,))

    monkeypatch.setattr(seat, "synchronize", wait)
    monkeypatch.setattr(seat, "time_block", block)
    turn = take_turn(Subject(lambda: (clock.spend(0.0001), queued.append(0.003))), 5, "cuda")
    assert turn.wall_s == pytest.approx(turn.warm_s)
    assert LEAD_S < turn.warm_s < LEAD_S + 2 * 0.0031


def test_untimed_calls_are_in_no_sample(clock):
    """What only the first calls of a turn pay for, such as cold caches, is told apart and timed nowhere."""
    times = itertools.chain([0.004, 0.004, 0.004], itertools.repeat(0.001))
    turn = take_turn(Subject(lambda: clock.spend(next(times))), 5, "cpu")
    assert turn.warm_s == pytest.approx(0.012)
    assert turn.block.calls_s == pytest.approx([0.001] * 5)
    assert (turn.start_s, turn.wall_s) == (1000.0, pytest.approx(0.017))
    assert turn.accounted_s == pytest.approx(0.005)


def test_a_context_that_takes_long_to_enter_leaves_no_turn_without_an_untimed_call(clock):
    """One call at least goes before those that are timed, whatever else used up the time."""
    made = []

    @contextlib.contextmanager
    def context():
        clock.spend(2 * LEAD_S)
        yield

    take_turn(Subject(lambda: (made.append(1), clock.spend(0.001)), context), 3, "cpu")
    assert len(made) == 4


def test_a_turn_tells_the_process_s_cpu_time(clock):
    """At its start and at its end, untimed calls included, also where several threads spend more than the wall has."""
    subject = Subject(lambda: clock.spend(0.006, cpu=2.0))
    first, second = (take_turn(subject, 2, "cpu") for _ in range(2))
    assert (first.cpu_from_s, first.cpu_to_s) == (50.0, pytest.approx(50.0 + 2 * 0.024))
    assert second.cpu_from_s == first.cpu_to_s


def test_a_turn_tells_how_long_its_threads_waited(clock):
    """The longest wait of one thread, and how often a core was given up, from the turn's start to its end."""
    clock.delays = [{"1": 1_000_000, "2": 7_000_000}, {"1": 4_000_000, "2": 8_000_000}]
    clock.switches = [10, 13]
    turn = take_turn(lasting(clock, 0.01), 1, "cpu")
    assert (turn.delay_s, turn.switches) == (pytest.approx(0.003), 3)


@pytest.mark.parametrize("told", [[None, {"1": 5}], [{"1": 5}, None], [None, None]])
@pytest.mark.parametrize("counted", [[3, OSError()], [OSError(), 3]])
def test_what_the_system_does_not_tell_of_a_turn_is_unknown(clock, told, counted):
    """Not zero, which would claim that nothing waited."""
    clock.delays, clock.switches = list(told), list(counted)
    turn = take_turn(lasting(clock, 0.01), 1, "cpu")
    assert (turn.delay_s, turn.switches) == (None, None)
    assert len(turn.block.calls_s) == 1


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_call_that_raises_ends_its_turn(monkeypatch, number):
    """Untimed, timed first, timed later: the error comes through, the context is left, the collector is on again."""
    monkeypatch.setattr(seat, "LEAD_S", 0.0)
    made, left = itertools.count(), []

    @contextlib.contextmanager
    def context():
        try:
            yield
        finally:
            left.append(True)

    def call() -> None:
        if next(made) == number:
            msg = "planted"
            raise MemoryError(msg)

    collecting = gc.isenabled()
    gc.enable()
    try:
        with pytest.raises(MemoryError, match="planted"):
            take_turn(Subject(call, context), 5, "cpu")
        assert gc.isenabled()
    finally:
        (gc.enable if collecting else gc.disable)()
    assert left == [True]
    assert next(made) == number + 1


def test_a_turn_s_own_account_is_nearly_all_of_it():
    """By the real clocks: between the calls of a turn there is little, so samples can be held against its length."""
    turns = [Ready(Subject(lambda: time.sleep(0.002)), 5, "cpu").turn() for _ in range(5)]
    for turn in turns:
        assert turn.warm_s + turn.accounted_s <= turn.wall_s
        assert min(turn.block.calls_s) >= 0.002
        assert turn.warm_s >= LEAD_S
        assert turn.cpu_to_s >= turn.cpu_from_s
    # Of the least disturbed one.
    assert max((turn.warm_s + turn.accounted_s) / turn.wall_s for turn in turns) > 0.9


@pytest.mark.parametrize("readings", [(7200.0, None), (None, 7200.0), (None, None)])
def test_a_wait_of_which_a_reading_failed_is_unknown(clock, monkeypatch, readings):
    """It is neither none nor what the thread has waited in all its life."""
    reading = iter(readings)
    monkeypatch.setattr(interference, "queued_s", lambda _: next(reading))
    assert take_turn(lasting(clock, 0.01), 1, "cpu").queued_s is None
