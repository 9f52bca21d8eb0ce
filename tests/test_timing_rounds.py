"""Rounds, on a clock that only advances when a turn says so: every decision can be told by hand."""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import interference
from bench.machine.interference import Interference, Reading
from bench.plan.cases import LEAST_ROUNDS
from bench.records.block import Block, Turn
from bench.timing import rounds as sampling
from bench.timing.rounds import PATIENCE, orders, rounds


class Clock:
    """Time that stands still unless `spend` moves it; takes the place of the real one in `bench.timing.rounds`.

    Attributes:
        now: seconds.
        disturbed: whether each stretch was, one after the other; the rest is not.
        waits: patience of each wait for a quiet moment.
        read: CPU seconds of the seats that each reading of the counters was told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.disturbed: list[bool] = []
        self.waits: list[float] = []
        self.read: list[float] = []
        monkeypatch.setattr(sampling, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(interference, "read", self._read)
        monkeypatch.setattr(interference, "judge", self._judge)
        monkeypatch.setattr(interference, "wait_until_quiet", self._wait)
        # Each round is judged alone, unless a test says otherwise.
        monkeypatch.setattr(interference, "STRETCH_S", 0.0)

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def _read(self, seats_s: float) -> Reading:
        self.read.append(seats_s)
        return Reading(self.now, 0.0, 0.0, 0.0)

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


class Seated:
    """A player whose turn is one untimed call and one timed one, each as long as `seconds` gives.

    Args:
        clock: that the calls move.
        seconds: gives the time of the next call.
        seat: number of its process.
        facts: gives more values of its next turn.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: Callable[[], float],
        seat: int = 0,
        facts: Callable[[], dict[str, object]] = dict,
    ) -> None:
        self.clock, self.seconds, self.seat, self.facts = clock, seconds, seat, facts

    def turn(self) -> Turn:
        """Take one."""
        untimed, timed = self.seconds(), self.seconds()
        start_s = self.clock.now
        self.clock.spend(untimed + timed)
        given = {"cpu_from_s": 0.0, "cpu_to_s": 0.0} | self.facts()
        return Turn(Block((timed,)), untimed, start_s, untimed + timed, **given)


def lasting(clock: Clock, *seconds: float) -> Seated:
    """A player whose calls take these times in turn, for ever."""
    times = itertools.cycle(seconds)
    return Seated(clock, lambda: next(times))


def sampled(players, budget_s, seed=0, chosen=None):
    """All rounds of a seating."""
    return list(rounds(players, "cpu", budget_s, seed, chosen))


NAMES = st.integers(1, 12).map(lambda count: [f"v{number}" for number in range(count)])


def cycle_of(names: list[str], seed: int, start: int = 0) -> list[tuple[str, ...]]:
    """The rounds of a cycle of the order."""
    length = len(names) * (2 if len(names) % 2 else 1)
    return list(itertools.islice(orders(names, seed), start * length, (start + 1) * length))


@given(names=NAMES, seed=st.integers(0, 2**32), start=st.integers(0, 3))
def test_every_name_follows_every_other_equally_often_over_a_cycle(names, seed, start):
    """Each ordered pair is adjacent once, or twice where the number of names is odd."""
    cycle = cycle_of(names, seed, start)
    pairs = Counter(pair for order in cycle for pair in itertools.pairwise(order))
    times = 2 if len(names) % 2 else 1
    assert pairs == dict.fromkeys(itertools.permutations(names, 2), times)


@given(names=NAMES, seed=st.integers(0, 2**32))
def test_every_name_has_every_place_equally_often_over_a_cycle(names, seed):
    """Once a round, and first, last and in between as often as any other."""
    cycle = cycle_of(names, seed)
    assert all(sorted(order) == sorted(names) for order in cycle)
    times = 2 if len(names) % 2 else 1
    assert Counter((place, name) for order in cycle for place, name in enumerate(order)) == dict.fromkeys(
        itertools.product(range(len(names)), names), times
    )


@given(names=NAMES, seed=st.integers(0, 2**32))
def test_the_orders_are_the_seed_s(names, seed):
    """The same again from the same seed, whatever was drawn meanwhile."""
    first, second = orders(names, seed), orders(names, seed)
    taken = [(next(first), next(orders(names, seed + 1)), next(second)) for _ in range(30)]
    assert all(one == other for one, _, other in taken)


def test_the_orders_of_two_seeds_and_of_two_cycles_differ():
    """Nothing about the order is the same in each seating: no name is always first, and cycles are not repeated."""
    cycles = [tuple(cycle_of(list("abcdefgh"), seed, start)) for seed in range(10) for start in range(10)]
    assert len(set(cycles)) == 100
    firsts = Counter(cycle[0][0] for cycle in cycles)
    # An eighth each, give or take far more than chance would.
    assert all(2 <= firsts[name] <= 30 for name in "abcdefgh")


def test_every_variant_has_one_turn_a_round_in_the_seed_s_order(clock):
    """Rounds are complete and numbered, and blocks stand in the order in which they ran."""
    names = list("abc")
    players = {name: lasting(clock, 0.001) for name in names}
    found = sampled(players, 0.599, 7)
    assert len(found) == 100
    assert [tuple(r.blocks) for r in found] == list(itertools.islice(orders(names, 7), 100))
    assert [r.order for r in found] == [tuple(r.blocks) for r in found]
    assert [r.number for r in found] == list(range(100))


def test_turns_are_taken_in_the_order_that_is_told(clock):
    """What a round says of its order is what happened."""
    told = []

    def noted(name: str) -> Seated:
        return Seated(clock, lambda: 0.001, facts=lambda: told.append(name) or {})

    found = sampled({name: noted(name) for name in "abcd"}, 0.1, 3)
    assert told == [name for r in found for name in r.order]


def test_a_round_s_blocks_are_those_of_its_turns(clock):
    """As each seat timed them; the round lasts as long as all its turns, untimed calls included."""
    players = {"a": lasting(clock, 0.007, 0.001), "b": lasting(clock, 0.005, 0.002)}
    found = next(rounds(players, "cpu", 1, 0))
    assert found.blocks == {"a": Block((0.001,)), "b": Block((0.002,))}
    assert found.wall_s == pytest.approx(0.015)


def test_cpu_time_of_seats_counts_as_our_own(clock):
    """Each reading is told what all seats have used since their first turns, within turns and between them."""
    # Each turn of seat 0 uses 1 s, and 0.25 s pass before its next; of seat 1 it is 10 s and nothing.
    used = [itertools.count(100.0, 1.25), itertools.count(7.0, 10.0)]

    def facts(seat: int, length: float):
        start = next(used[seat])
        return {"cpu_from_s": start, "cpu_to_s": start + length}

    players = {
        "a": Seated(clock, lambda: 0.001, 0, lambda: facts(0, 1.0)),
        "b": Seated(clock, lambda: 0.001, 0, lambda: facts(0, 1.0)),
        "c": Seated(clock, lambda: 0.001, 1, lambda: facts(1, 10.0)),
    }
    found = sampled(players, 0.0299, 0)
    assert len(found) >= 5
    # A reading before and after each round, which is a stretch of its own here.
    after = [12.0 + 0.25 + (12.0 + 0.5) * number for number in range(len(found))]
    assert clock.read == pytest.approx([value for pair in zip([0.0, *after], after, strict=False) for value in pair])


def test_a_seat_that_used_nothing_adds_nothing(clock):
    """Its CPU time before the first turn, such as that of its build, is no part of the rounds."""
    players = {"a": Seated(clock, lambda: 0.001, 0, lambda: {"cpu_from_s": 90.0, "cpu_to_s": 90.0})}
    sampled(players, 0.02, 0)
    assert set(clock.read) == {0.0}


def test_waiting_of_a_round_is_that_of_all_its_turns(clock):
    """Longest waits and lost cores are summed over the turns, since one follows the other; the unknown adds nothing."""
    facts = [{"delay_s": 0.25, "switches": 3}, {"delay_s": 0.5, "switches": 4}, {"delay_s": None, "switches": None}]
    players = {
        name: Seated(clock, lambda: 1.0, seat, lambda values=values: values)
        for seat, (name, values) in enumerate(zip("abc", facts, strict=True))
    }
    for found in sampled(players, 30.0, 0):
        assert (found.beside.delay_s, found.beside.switches) == (0.75, 7)
        # Of the 6 s of a round, which is more than the share that disturbs.
        assert found.beside.why == "a thread of ours waited 750.0 ms for a core"


def test_a_turn_whose_answer_was_late_disturbs_its_round(clock):
    """However long the other turns of the round are: a time that was told too short may hide in it."""
    late = itertools.cycle([0.0, 0.03])
    players = {
        "a": Seated(clock, lambda: 1.0, 0, lambda: {"late_s": next(late)}),
        "b": Seated(clock, lambda: 1.0, 1),
    }
    found = sampled(players, 30.0, 0)
    assert len(found) >= 4
    assert [each.beside.why for each in found[:4]] == ["", "the answer of a turn was 30.0 ms late"] * 2
    assert [bool(each.disturbed) for each in found[:4]] == [False, True] * 2


def test_waiting_that_no_seat_tells_of_is_unknown(clock):
    """Unknown is neither zero nor a reason."""
    (found, *_) = sampled({"a": lasting(clock, 1.0)}, 1.0, 0)
    assert (found.beside.delay_s, found.beside.switches, found.disturbed) == (None, None, False)


def test_rounds_stop_when_the_budget_is_spent(clock):
    """The first round that ends after the budget is the last."""
    players = {"reference": lasting(clock, 0.05), "a": lasting(clock, 0.05, 0.05, 0.1, 0.1)}
    start = clock.now
    sampled(players, 10.0)
    assert 10.0 <= clock.now - start <= 10.0 + 0.3


def test_rounds_stop_when_nobody_needs_more(clock):
    """Who chooses sees all rounds so far; nobody chosen is the end."""
    seen = []

    def chosen(taken):
        seen.append(len(taken))
        return players if len(taken) < 20 else ()

    players = {"reference": lasting(clock, 0.002), "a": lasting(clock, 0.001)}
    assert len(sampled(players, 1000.0, 0, chosen)) == 20
    assert set(seen) == set(range(1, 21))
    assert len(sampled(players, 1000.0, 0, lambda _: ())) == 1


def test_those_who_are_chosen_go_on_alone(clock):
    """The others have no turn any more; the order of those who stay is balanced anew."""
    players = {name: lasting(clock, 0.001) for name in "abcd"}
    found = sampled(players, 0.5, 3, lambda taken: "abcd" if len(taken) < 8 else "ca")
    assert [set(round_.blocks) for round_ in found[:8]] == [set("abcd")] * 8
    assert {tuple(sorted(round_.blocks)) for round_ in found[8:]} == {("a", "c")}
    firsts = [round_.order[0] for round_ in found[8:]]
    assert abs(firsts.count("a") - firsts.count("c")) <= 1


def test_a_group_too_slow_for_its_budget_still_gives_two_rounds(clock):
    """Something is told even of what takes longer than all of the budget."""
    found = sampled({"reference": lasting(clock, 10.0)}, 1.0, 0)
    assert len(found) == 2


def test_a_group_a_little_too_slow_gives_what_a_median_needs(clock):
    """Up to twice the budget is spent for the least number of rounds."""
    # Six rounds of 2 x 0.1 s are 1.2 s.
    found = sampled({"reference": lasting(clock, 0.1)}, 1.0, 0)
    assert len(found) == LEAST_ROUNDS


def test_disturbed_rounds_are_told(clock):
    """Each is marked, and who chooses sees the mark."""
    players = {"reference": lasting(clock, 0.002), "a": lasting(clock, 0.001)}
    clock.disturbed = [True, False] * 5 + [True] * 3
    found = sampled(players, 1000.0, 0, lambda taken: players if sum(not r.disturbed for r in taken) < 30 else ())
    assert [r.disturbed for r in found] == [True, False] * 5 + [True] * 3 + [False] * 25


class Cores:
    """Cores whose words take given times, then 1 ns for ever; beyond 5 they are far apart."""

    def __init__(self, times_ns: Sequence[float | None], then_ns: float = 1.0) -> None:
        self._times_ns = itertools.chain(times_ns, itertools.repeat(then_ns))

    def look(self) -> float | None:
        """Give the next time."""
        return next(self._times_ns)

    def far(self, took_ns: float | None) -> str:
        """Say so beyond 5 ns."""
        return "far" if (took_ns or 0.0) > 5 else ""


def test_rounds_beside_which_the_cores_are_far_apart_are_told(clock, monkeypatch):
    """A change during a round shows after it, and the one after next is clean again."""
    monkeypatch.setattr(interference, "STRETCH_S", 0.0095)
    found = list(rounds({"a": lasting(clock, 0.001)}, "cpu", 0.02, 0, cores=Cores([1.0, None, 9.0, 2.0])))
    assert [r.beside.why for r in found] == ["", "far", "far", *[""] * (len(found) - 3)]
    assert [r.disturbed for r in found[:4]] == [False, True, True, False]
    assert [r.word_ns for r in found[:4]] == [1.0, 9.0, 9.0, 2.0]


def test_nothing_is_waited_for_where_only_the_cores_are_far_apart(clock):
    """A look at the time that others used says nothing about it; where others are at work too, it does."""
    found = list(rounds({"a": lasting(clock, 0.001)}, "cpu", 0.1, 0, cores=Cores([], 9.0)))
    assert all(r.disturbed for r in found)
    assert clock.waits == []
    clock.disturbed = [True]
    list(rounds({"a": lasting(clock, 0.001)}, "cpu", 0.1, 0, cores=Cores([], 9.0)))
    assert len(clock.waits) == 1


def test_a_machine_that_is_always_disturbed_ends_with_the_budget(clock):
    """Repeating disturbed rounds has an end."""
    clock.disturbed = [True] * 10_000
    start = clock.now
    found = sampled({"reference": lasting(clock, 0.001)}, 1.0, 0)
    assert all(r.disturbed for r in found)
    assert clock.now - start == pytest.approx(1.0, abs=0.01)


def test_rounds_are_judged_in_stretches(clock, monkeypatch):
    """Rounds too short to be judged alone share one judgement, and none is left out."""
    monkeypatch.setattr(interference, "STRETCH_S", 0.0095)
    clock.disturbed = [False, True, False]
    found = sampled({"a": lasting(clock, 0.001)}, 0.058, 0)
    # A round is two calls of 1 ms, so five make a stretch.
    assert [r.disturbed for r in found] == [False] * 5 + [True] * 5 + [False] * (len(found) - 10)
    assert [r.number for r in found] == list(range(len(found)))


def test_a_quiet_moment_is_waited_for_after_a_disturbed_stretch(clock):
    """The next round says how long; undisturbed ones wait for nothing."""
    clock.disturbed = [False, True, False, False]
    found = sampled({"a": lasting(clock, 0.001)}, 4.0, 0)
    assert [r.waited_s for r in found[:5]] == [0.0, 0.0, 0.1, 0.0, 0.0]


def test_waiting_is_bounded(clock):
    """However long the machine stays busy, waiting takes its share of the budget and no more."""
    clock.disturbed = [True] * 10_000
    found = sampled({"a": lasting(clock, 0.001)}, 4.0, 0)
    assert sum(r.waited_s for r in found) == pytest.approx(PATIENCE * 4.0)
    assert all(patience_s <= PATIENCE * 4.0 for patience_s in clock.waits)


def test_a_stretch_s_times_reach_the_caller_before_the_next_stretch(clock):
    """Rounds are yielded as their stretch ends: what a later one does cannot take them back."""
    calls = itertools.count()
    player = Seated(clock, lambda: 0.1 if next(calls) < 2 else 1 / 0)
    found = rounds({"a": player}, "cpu", 100, 0)
    assert next(found).number == 0
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_stretch_has_run_before_its_first_round_is_taken(clock, monkeypatch):
    """Whoever takes rounds takes no core from a turn of the same stretch."""
    monkeypatch.setattr(interference, "STRETCH_S", 0.0095)
    seen = []
    player = Seated(clock, lambda: 0.001, facts=lambda: seen.append("turn") or {})
    seen.extend("taken" for _ in rounds({"a": player}, "cpu", 0.0299, 0))
    # A round is two calls of 1 ms, so five make a stretch.
    assert seen == [*["turn"] * 5, *["taken"] * 5] * 3
