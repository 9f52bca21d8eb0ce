"""More rounds: groups that are nearest to an answer come first, and a run keeps time for them."""

from __future__ import annotations

import functools
import math
import time
import types
from pathlib import Path

import pytest

from bench.analysis.racing import Standing
from bench.plan.cases import Group
from bench.records.rounds import Samples
from bench.run import more
from bench.run.cold import CompiledKernel
from bench.run.runner import KEPT_SHARE, Runner

STANDING = Standing("a", frozenset(), frozenset(), frozenset({"b"}), frozenset(), frozenset(), {})


def opened(name: str, needed_s: float) -> more.Open:
    """A group that needs some time to be decided."""
    return more.Open(Group(name, ()), (), Samples(), STANDING, needed_s)


@pytest.fixture
def given(monkeypatch) -> list[tuple[str, float]]:
    """Groups that were measured on, in order, with the seconds that each was given."""
    found: list[tuple[str, float]] = []

    def measurement(_runner, group, _scratch, _cases, budget_s, _samples):
        return types.SimpleNamespace(more=lambda: found.append((group.name, budget_s)))

    monkeypatch.setattr(more, "Measurement", measurement)
    monkeypatch.setattr(more, "_write", lambda *_: None)
    return found


def host(**fields: object) -> types.SimpleNamespace:
    """What `more.measure` uses of a run."""
    plan = types.SimpleNamespace(kernel=CompiledKernel())
    return types.SimpleNamespace(plan=plan, console=types.SimpleNamespace(say=lambda _: None), **fields)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (100.0, [("c", 12.0), ("a", 30.0), ("b", 58.0)]),
        (45.0, [("c", 12.0), ("a", 30.0)]),
        (25.0, [("c", 12.0), ("a", 13.0)]),
        # Less than is worth the gates is still what was asked for.
        (4.0, [("c", 4.0)]),
    ],
)
def test_what_needs_least_comes_first(given, seconds, expected):
    """As many groups as can be are decided; what is left is not spent where it is too little to help."""
    more.measure(host(), [opened("a", 30.0), opened("b", 240.0), opened("c", 12.0)], seconds)
    assert given == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, [("a", 15.0)]),
        ({"_keeps_time": False}, []),
        ({"_budget_s": 0.0}, []),
        ({"_spent_before_s": 15.0}, []),
        ({"_spent_before_s": 5.0}, [("a", 10.0)]),
        ({"unfinished": True}, []),
        ({"deadline_s": 0.0}, []),
    ],
    ids=["plain", "alone", "spent", "spent before", "partly spent before", "unfinished", "late"],
)
def test_a_run_gives_what_it_kept_to_what_is_undecided(given, case, expected):
    """Not past a time limit, nor in a run that it has ended already; such a run is not unfinished by that."""
    fields = {"_keeps_time": True, "_budget_s": 15.0, "_spent_before_s": 0.0} | case
    fields = {"unfinished": False, "deadline_s": math.inf} | fields
    run = host(**fields, open_groups=lambda: [opened("a", 30.0)])
    run._further_s = functools.partial(Runner._further_s, run)
    if run.deadline_s == 0.0:
        run.deadline_s = time.perf_counter()
    Runner._decide(run, 0.0)
    assert given == expected
    assert run.unfinished == case.get("unfinished", False)


def test_a_group_s_share_leaves_what_is_kept():
    """The first pass gets the rest, and what a group leaves over goes to the next ones and to what is kept."""
    suite = types.SimpleNamespace(budget_s=100.0)
    run = types.SimpleNamespace(
        plan=types.SimpleNamespace(suite=suite), _budget_s=100.0, _groups_left=2, _keeps_time=True
    )
    assert Runner._budget_of_group_s(run) == pytest.approx((1 - KEPT_SHARE) * 50)
    run._budget_s -= 10.0
    assert Runner._budget_of_group_s(run) == pytest.approx(100 - 10 - KEPT_SHARE * 100)


@pytest.mark.parametrize(
    ("needed_s", "said"),
    [(47.0, "about 47s"), (3600.0, "at least 60min")],
)
def test_an_open_group_says_what_its_time_is_for(needed_s, said):
    """All rivals and intervals; `bench recommend` may need less, to decide between two. An estimate has an end."""
    assert (
        opened("g", needed_s).told()
        == f"g: a cannot be told apart from b; to settle the whole group takes {said} of further rounds"
    )


def test_measuring_on_refuses_a_run_that_has_not_ended(tmp_path: Path):
    """With the number of cases and the folder."""
    more.check_finished(0, tmp_path)
    with pytest.raises(more.UsageError, match=r"2 cases of .* are not recorded yet"):
        more.check_finished(2, tmp_path)
