"""The stopwatch: kinds add up to the run, whatever nests in what."""

from __future__ import annotations

import itertools

import pytest

from bench.timing.stopwatch import KINDS, Stopwatch, told

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


class Ticks:
    """A clock that goes on by a second each time it is read."""

    def __init__(self) -> None:
        self.read = itertools.count()

    def __call__(self) -> float:
        """Seconds."""
        return float(next(self.read))


@given(kinds=st.lists(st.sampled_from(KINDS), max_size=20))
def test_kinds_add_up_to_the_run(kinds):
    """Every second belongs to one kind."""
    clock = Ticks()
    watch = Stopwatch(clock)
    for kind in kinds:
        watch.switch(kind)
    assert sum(watch.found().values()) == len(kinds) + 1


def test_what_nests_counts_for_itself_alone():
    """Inside a kind another may run; afterwards the first goes on, also when something is raised."""
    watch = Stopwatch(Ticks())

    def work() -> None:
        with watch.on("starts"), watch.on("gates"):
            watch.switch("warm-up")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    found = watch.found()
    assert (found["starts"], found["gates"], found["warm-up"]) == (2.0, 1.0, 1.0)


def test_seconds_move_between_kinds():
    """What was waited inside rounds is no time of theirs."""
    watch = Stopwatch(Ticks())
    with watch.on("timed rounds"):
        pass
    watch.move(0.25, "timed rounds", "waiting")
    assert watch.found()["timed rounds"] == 0.75
    assert watch.found()["waiting"] == 0.25


def test_an_unknown_kind_is_refused():
    """No time is lost to a word that nobody tells."""
    with pytest.raises(KeyError):
        Stopwatch(Ticks()).switch("timed round")


def test_shares_are_told_largest_first():
    """In per cent, what rounds to nothing left out."""
    spent = dict.fromkeys(KINDS, 0.0) | {"timed rounds": 50.0, "gates": 30.0, "other": 20.0, "waiting": 0.1}
    assert told(spent) == "timed rounds 50 %, gates 30 %, other 20 %"
    assert told(dict.fromkeys(KINDS, 0.0)) == "nothing was measured"
