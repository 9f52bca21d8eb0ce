"""The expected time of a run: it knows what is compiled, the device, and how long a call of an own model takes."""

from __future__ import annotations

import dataclasses

import pytest

from bench.plan.cases import Case, Group, Suite
from bench.run.expected import (
    AUDITED_CALLS,
    BUILD_S,
    COLD_CALLS,
    COLD_S,
    GATED_CALLS,
    GPU_COLD_S,
    GPU_READY_S,
    GPU_START_S,
    READY_S,
    SEAT_S,
    TRUTH_CALLS,
    group_time,
)
from bench.run.planning import Described, Plan

CASE = Case("seed@batch=2,length=3", "cpu-fused", "inference", "cpu", 1)
OWN = Case("own:lm", "reference", "training", "cpu", 1)


def described(count: int, *, alone: int = 0, converts_s: float = 0.0, mode: str = "training") -> list[Described]:
    """Cases of one group, of which some have processes of their own."""
    case = dataclasses.replace(OWN, mode=mode)
    return [
        Described(case, {"precision": "fp32"}, None, alone=number < alone, converts_s=converts_s)
        for number in range(count)
    ]


def test_the_expected_time_knows_of_the_compilation():
    """A run compiles the kernel once, however many of its cases need it."""
    suite = Suite("made", "", ())
    others = tuple(dataclasses.replace(CASE, threads=number) for number in (1, 2))

    def expected_s(*, builds: bool) -> float:
        cases = tuple(Described(case, {}, None, builds=builds) for case in others)
        return Plan(suite, ((Group("made", others), cases),), {}, {}).expected_s()

    assert expected_s(builds=True) == pytest.approx(expected_s(builds=False) + BUILD_S)


def test_the_expected_time_of_a_group_knows_its_device():
    """A process on a GPU makes a context and loads libraries first: cold runs and seats take longer there."""
    suite = Suite("made", "", (), processes=2)

    def group_s(device: str) -> float:
        described = (Described(dataclasses.replace(CASE, device=device), {}, None),)
        return Plan(suite, ((Group("made", ()), described),), {}, {}).group_expected_s(described)

    more_s = GPU_COLD_S - COLD_S + 2 * (GPU_START_S + GPU_READY_S - SEAT_S - READY_S)
    assert group_s("cuda") == pytest.approx(group_s("cpu") + more_s)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_long_call_is_counted_as_often_as_a_run_makes_it(mode):
    """Cold runs, gates and warm-ups of each variant grow with it, and rounds where the budget is too short for them."""
    cases = described(4, mode=mode)
    short, long = (group_time(cases, call_s, 10.0, seatings=3) for call_s in (0.0, 2.0))
    assert long.cold_s == pytest.approx(short.cold_s + 4 * COLD_CALLS * 2.0)
    assert long.ready_s - short.ready_s > 4 * 2.0 * (AUDITED_CALLS[mode] + 2 * GATED_CALLS[mode])
    assert short.rounds_s == pytest.approx(10.0, rel=0.05)
    # Two rounds a seating, in which each variant makes a call before its block and one in it.
    assert long.rounds_s == pytest.approx(3 * 2 * 4 * 2 * 2.0, rel=0.05)


def test_a_process_of_its_own_computes_the_truth_anew():
    together, apart = (group_time(described(4, alone=alone), 1.0, 10.0, seatings=2) for alone in (0, 3))
    assert apart.ready_s > together.ready_s + 3 * TRUTH_CALLS * 2
    assert apart.cold_s == together.cold_s


def test_a_model_that_is_converted_is_converted_again_for_other_weights():
    plain, converted = (group_time(described(1, converts_s=s), 0.0, 10.0, seatings=2) for s in (0.0, 3.0))
    assert converted.total_s > plain.total_s + 5 * 3.0


def test_a_plan_knows_the_calls_of_the_own_model_by_mode():
    """What the look found of a workload and mode counts for its groups alone."""
    entry = {"workload": "own:lm", "call_s": {"inference": 0.5, "training": 2.0}, "checked": {}}
    cases = described(2)
    plan = Plan(Suite("made", "", ()), ((Group("made", ()), tuple(cases)),), {}, {"own_model": {"sets": [entry]}})
    expected = group_time(cases, 2.0, plan.group_budget_s, plan.suite.processes).total_s
    assert plan.group_expected_s(cases) == pytest.approx(expected)
    elsewhere = [dataclasses.replace(c, case=dataclasses.replace(c.case, workload="seed")) for c in cases]
    assert plan.group_expected_s(elsewhere) < expected / 2
