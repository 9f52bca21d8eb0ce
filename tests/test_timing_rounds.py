"""Warm-up and rounds, on a clock that only advances when a call says so: every decision can be told by hand."""

from __future__ import annotations

import contextlib
import itertools
import math
import types
from collections import Counter

import numpy as np
import pytest

from bench.machine import interference
from bench.machine.interference import Interference, Reading
from bench.plan.cases import LEAST_ROUNDS
from bench.records.block import Block
from bench.timing import rounds as sampling
from bench.timing.rounds import (
    BLOCK_S,
    MOST_CALLS,
    PATIENCE,
    STOP_ROUNDS,
    WARM_LEAST_S,
    WARM_MOST_S,
    Plan,
    Subject,
    rounds,
    warm_up,
)


class Clock:
    """Time that stands still unless `spend` moves it; takes the place of the real one in `bench.timing.rounds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.disturbed: list[bool] = []
        monkeypatch.setattr(sampling, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(sampling, "time_once", self._once)
        monkeypatch.setattr(sampling, "time_block", self._block)
        self.waits: list[float] = []
        monkeypatch.setattr(interference, "read", lambda: Reading(self.now, 0.0, 0.0, 0.0))
        monkeypatch.setattr(interference, "judge", self._judge)
        monkeypatch.setattr(interference, "wait_until_quiet", self._wait)
        # Each round is judged alone, unless a test says otherwise.
        monkeypatch.setattr(interference, "STRETCH_S", 0.0)

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def _once(self, call, device):
        assert device == "cpu"
        before = self.now
        call()
        return self.now - before

    def _block(self, call, calls, device):
        call()
        return Block(tuple(self._once(call, device) for _ in range(calls)))

    def _judge(self, *_):
        return Interference(why="planted" if self.disturbed and self.disturbed.pop(0) else "")

    def _wait(self, patience_s):
        self.waits.append(patience_s)
        waited_s = min(0.1, patience_s)
        self.spend(waited_s)
        return waited_s


@pytest.fixture
def clock(monkeypatch):
    """The clock of the test."""
    return Clock(monkeypatch)


def lasting(clock: Clock, *seconds: float) -> Subject:
    """A subject whose calls take these times in turn, for ever."""
    times = itertools.cycle(seconds)
    return Subject(lambda: clock.spend(next(times)))


def sampled(subjects, plan, mark=str):
    """All rounds of a sampling."""
    return list(rounds(subjects, dict.fromkeys(subjects, 1), "cpu", plan, mark))


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


def test_warm_up_lasts_until_a_call_is_steady(clock):
    """A call that gets faster for its first second is called until it is; blocks are filled by its final time."""
    start = clock.now
    ending = start + 1.0
    subject = Subject(lambda: clock.spend(0.001 + 0.05 * max(0.0, ending - clock.now)))
    assert warm_up(subject, "cpu") == pytest.approx(BLOCK_S / 0.001, abs=2)
    assert clock.now > ending


def test_warm_up_of_a_call_that_is_never_steady_ends(clock):
    """A call that grows with every call is warm when the most time has passed, within a batch."""
    growth = itertools.count()
    start = clock.now
    subject = Subject(lambda: clock.spend(0.001 * 1.01 ** next(growth)))
    warm_up(subject, "cpu")
    assert WARM_MOST_S < clock.now - start < 2 * WARM_MOST_S


def test_warm_up_runs_inside_the_subject_s_context(clock):
    """Settings such as the vendor library hold in every call, and no longer."""
    open_now, seen = [], []

    @contextlib.contextmanager
    def context():
        open_now.append(True)
        yield
        open_now.pop()

    def call() -> None:
        seen.append(bool(open_now))
        clock.spend(0.01)

    warm_up(Subject(call, context), "cpu")
    assert all(seen)
    assert not open_now


def test_every_variant_appears_once_a_round_in_random_order(clock):
    """Rounds are complete, and no variant always comes first."""
    subjects = {name: lasting(clock, 0.001) for name in "abc"}
    found = sampled(subjects, Plan(0.599, 0.0, "none", seed=1))
    assert all(sorted(found.blocks) == ["a", "b", "c"] for found in found)
    assert [r.number for r in found] == list(range(len(found)))
    firsts = Counter(next(iter(r.blocks)) for r in found)
    # 100 rounds: a third each, give or take far more than chance would.
    assert len(found) == 100
    assert all(15 <= firsts[name] <= 55 for name in "abc")


def test_the_order_is_the_seed_s(clock):
    """Equal seeds give equal orders, others others."""
    subjects = {name: lasting(clock, 0.001) for name in "abcd"}
    orders = [[tuple(r.blocks) for r in sampled(subjects, Plan(0.1, 0.0, "none", seed=seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_block_has_the_calls_that_warm_up_asked_for(clock):
    """Each variant its own number, and a block's value is the mean of its calls."""
    subjects = {"a": lasting(clock, 0.001), "b": lasting(clock, 0.002)}
    found = next(rounds(subjects, {"a": 4, "b": 2}, "cpu", Plan(1, 0.0, "a", 0)))
    assert {name: len(block.calls_s) for name, block in found.blocks.items()} == {"a": 4, "b": 2}
    assert found.blocks["b"].per_call_s == pytest.approx(0.002)


def test_the_mark_is_told_each_variant_before_its_block(clock):
    """Whoever crashes was named last."""
    told = []
    subjects = {name: Subject(lambda name=name: (told.append(name), clock.spend(0.001))) for name in "ab"}
    found = sampled(subjects, Plan(0.03, 0.0, "none", 3), mark=lambda name: told.append(f"mark {name}"))
    expected = [word for r in found for name in r.blocks for word in (f"mark {name}", name, name)]
    assert told == expected


def test_rounds_stop_when_the_budget_is_spent(clock):
    """The first round that ends after the budget is the last."""
    # A round takes 2 calls of 0.1 s; ratios of 1 and 2 in turn are never narrow.
    subjects = {"reference": lasting(clock, 0.05), "a": lasting(clock, 0.05, 0.05, 0.1, 0.1)}
    start = clock.now
    found = sampled(subjects, Plan(10.0, 0.01, "reference", 0))
    assert 10.0 <= clock.now - start <= 10.0 + 0.3
    assert len(found) > STOP_ROUNDS


def test_rounds_stop_early_when_every_ratio_is_narrow(clock):
    """Ratios that never change are narrow at the first count that may say so, long before the budget is spent."""
    subjects = {"reference": lasting(clock, 0.002), "a": lasting(clock, 0.001)}
    found = sampled(subjects, Plan(1000.0, 0.01, "reference", 0))
    assert len(found) == STOP_ROUNDS


def test_one_wide_ratio_keeps_the_others_going(clock):
    """All variants take turns until the last one is narrow."""
    subjects = {
        "reference": lasting(clock, 0.002),
        "narrow": lasting(clock, 0.001),
        "wide": lasting(clock, 0.001, 0.001, 0.004, 0.004),
    }
    start = clock.now
    sampled(subjects, Plan(1.0, 0.01, "reference", 0))
    assert clock.now - start >= 1.0


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_narrowness_is_measured_against_what_was_asked(clock, spread):
    """If sampling stopped early, the ratios' order statistics are as narrow as asked, and were not much before."""
    generator = np.random.default_rng(0)
    subjects = {
        "reference": lasting(clock, 0.001),
        "a": Subject(lambda: clock.spend(0.001 * math.exp(generator.normal(0, spread)))),
    }
    found = sampled(subjects, Plan(100.0, 0.02, "reference", 0))
    ratios = [r.blocks["reference"].typical_s / r.blocks["a"].typical_s for r in found]
    # The median's standard error in the normal approximation, 1.25 sigma / sqrt(n), over 1.96 of them.
    needed = (1.96 * 1.25 * spread / 0.02) ** 2
    assert max(STOP_ROUNDS, needed / 4) <= len(found) <= max(STOP_ROUNDS, needed * 4)
    assert np.median(ratios) == pytest.approx(1.0, abs=0.05)


def test_without_a_reference_the_budget_decides(clock):
    """No ratio can be narrow where there is nothing to divide by."""
    start = clock.now
    sampled({"a": lasting(clock, 0.001)}, Plan(1.0, 0.5, "reference", 0))
    assert clock.now - start >= 1.0


def test_a_group_too_slow_for_its_budget_still_gives_two_rounds(clock):
    """Something is told even of what takes longer than all of the budget."""
    found = sampled({"reference": lasting(clock, 10.0)}, Plan(1.0, 0.01, "reference", 0))
    assert len(found) == 2


def test_a_group_a_little_too_slow_gives_what_a_median_needs(clock):
    """Up to twice the budget is spent for the least number of rounds."""
    # Six rounds of 2 x 0.1 s are 1.2 s.
    found = sampled({"reference": lasting(clock, 0.1)}, Plan(1.0, 0.0, "none", 0))
    assert len(found) == LEAST_ROUNDS


def test_disturbed_rounds_are_told_and_do_not_count_for_stopping(clock):
    """As many rounds are added as were disturbed."""
    subjects = {"reference": lasting(clock, 0.002), "a": lasting(clock, 0.001)}
    clock.disturbed = [True, False] * 5 + [True] * 3
    found = sampled(subjects, Plan(1000.0, 0.01, "reference", 0))
    assert [r.disturbed for r in found] == [True, False] * 5 + [True] * 3 + [False] * (STOP_ROUNDS - 5)


def test_a_machine_that_is_always_disturbed_ends_with_the_budget(clock):
    """Repeating disturbed rounds has an end."""
    clock.disturbed = [True] * 10_000
    start = clock.now
    found = sampled({"reference": lasting(clock, 0.001)}, Plan(1.0, 0.01, "reference", 0))
    assert all(r.disturbed for r in found)
    assert clock.now - start == pytest.approx(1.0, abs=0.01)


def test_rounds_are_judged_in_stretches(clock, monkeypatch):
    """Rounds too short to be judged alone share one judgement, and none is left out."""
    monkeypatch.setattr(interference, "STRETCH_S", 0.0095)
    clock.disturbed = [False, True, False]
    found = sampled({"a": lasting(clock, 0.001)}, Plan(0.058, 0.0, "none", 0))
    # A round is two calls of 1 ms, so five make a stretch.
    assert [r.disturbed for r in found] == [False] * 5 + [True] * 5 + [False] * (len(found) - 10)
    assert [r.number for r in found] == list(range(len(found)))


def test_a_quiet_moment_is_waited_for_after_a_disturbed_stretch(clock):
    """The next round says how long; undisturbed ones wait for nothing."""
    clock.disturbed = [False, True, False, False]
    found = sampled({"a": lasting(clock, 0.001)}, Plan(4.0, 0.0, "none", 0))
    assert [r.waited_s for r in found[:5]] == [0.0, 0.0, 0.1, 0.0, 0.0]


def test_waiting_is_bounded(clock):
    """However long the machine stays busy, waiting takes its share of the budget and no more."""
    clock.disturbed = [True] * 10_000
    found = sampled({"a": lasting(clock, 0.001)}, Plan(4.0, 0.0, "none", 0))
    assert sum(r.waited_s for r in found) == pytest.approx(PATIENCE * 4.0)
    assert all(patience_s <= PATIENCE * 4.0 for patience_s in clock.waits)


def test_a_stretch_s_times_reach_the_caller_before_the_next_stretch(clock):
    """Rounds are yielded as their stretch ends: what a later one does cannot take them back."""
    calls = itertools.count()
    subject = Subject(lambda: clock.spend(0.1) if next(calls) < 2 else 1 / 0)
    found = rounds({"a": subject}, {"a": 1}, "cpu", Plan(100, 0.0, "a", 0))
    assert next(found).number == 0
    with pytest.raises(ZeroDivisionError):
        next(found)
