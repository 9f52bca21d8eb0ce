"""Units of a sweep: one group of a suite each, as a suite of its own that a node can expand to the same cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import UsageError
from bench.plan.cases import Case, Selection, Suite, Sweep
from bench.run.planning import Described, Plan


@dataclass(frozen=True)
class SweepUnit:
    """A group, which one node measures as a whole.

    Attributes:
        number: its place in the suite, from 1.
        suite: what is measured, with the group's share of the suite's budget.
        cases: of the group; `threads` is that of the plan, and each kind of host has its own.
        expected_s: a rough guess of how long a node takes, seconds.
    """

    number: int
    suite: Suite
    cases: tuple[Described, ...]
    expected_s: float

    @property
    def name(self) -> str:
        """`seed/inference/cpu`: the group without its threads, which differ between kinds of hosts."""
        return unit_name(self.cases[0].case)

    def cases_with(self, threads: int) -> tuple[Described, ...]:
        """The cases as a host with this many threads measures them."""
        return tuple(
            dataclasses.replace(found, case=dataclasses.replace(found.case, threads=threads)) for found in self.cases
        )


def unit_name(case: Case) -> str:
    """Name of the unit that a case belongs to."""
    return f"{case.workload}/{case.mode}/{case.device}"


def units_of(plan: Plan, limit_s: float) -> tuple[SweepUnit, ...]:
    """Divide a plan into units; each gets the same share of the suite's budget.

    Args:
        plan: of the suite, as the command line narrowed it down.
        limit_s: time that a unit may take.

    Raises:
        UsageError: a unit is expected to take longer.
    """
    share_s = plan.suite.budget_s / len(plan.groups)
    found = tuple(_unit(number, cases, plan, share_s) for number, (_, cases) in enumerate(plan.groups, start=1))
    longest = max(found, key=lambda unit: unit.expected_s)
    if longest.expected_s > limit_s:
        msg = (
            f"{longest.name} is expected to take {longest.expected_s:.0f} s, and --unit-limit is {limit_s:.0f} s; "
            f"lower --budget (now {plan.suite.budget_s:.0f} s for {len(found)} groups), or raise --unit-limit"
        )
        raise UsageError(msg)
    return found


def _unit(number: int, cases: Sequence[Described], plan: Plan, share_s: float) -> SweepUnit:
    suite = dataclasses.replace(
        plan.suite,
        select=_selections([found.case for found in cases]),
        budget_s=share_s,
        device=cases[0].case.device,
        second_instrument=False,
        quality=(),
    )
    group = next(group for group, found in plan.groups if found is cases)
    # What cannot run where the plan is made may run on a node, and then takes its time.
    available = tuple(dataclasses.replace(found, unavailable=None) for found in cases)
    alone = Plan(suite, ((group, available),), plan.torch_facts, plan.catalogue, kernel=plan.kernel)
    return SweepUnit(number, suite, tuple(cases), alone.expected_s())


def _selections(cases: Sequence[Case]) -> tuple[Selection, ...]:
    """Parts of a suite that expand to these cases of one group, those of a sweep with its axis."""
    found = []
    for axis in dict.fromkeys((case.sweep_axis, case.sweep_value) for case in cases):
        name, value = axis
        of_axis = [case for case in cases if (case.sweep_axis, case.sweep_value) == axis]
        workload, sweeps = of_axis[0].workload, tuple[Sweep, ...]()
        if name and value is not None:
            # As `bench.plan.cases` joins it: the first override after an @, others after a comma.
            workload, sweeps = workload.removesuffix(f"{name}={value}")[:-1], (Sweep(name, (value,)),)
        variants = tuple(case.variant for case in of_axis)
        found.append(Selection((workload,), variants, (of_axis[0].mode,), sweeps, (of_axis[0].device,)))
    return tuple(found)


def same_cases(planned: Sequence[Case], found: Sequence[Case]) -> str:
    """Say how the cases that a node expands to differ from those that were planned; empty if they do not."""
    lacking = [case.variant for case in planned if case not in found]
    added = [case.variant for case in found if case not in planned]
    parts = [("lacks", lacking), ("adds", added)]
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names)


def request_of(unit: SweepUnit, options: dict[str, Any], limit_s: float, command: str) -> dict[str, Any]:
    """Request that a node measure a unit, as plain values.

    Args:
        unit: what.
        options: of the command line: `threads`, `omp_wait`, `plugin`, `seed`.
        limit_s: seconds that it may take.
        command: the command line, for environment.json.
    """
    return {
        "unit": unit.name, "suite": dataclasses.asdict(unit.suite), "threads": options.get("threads"),
        "omp_wait": options.get("omp_wait") or "default", "plugins": options.get("plugin") or [],
        "seed": options.get("seed"), "limit_s": limit_s, "command": command,
        "cases": [dataclasses.asdict(found.case) for found in unit.cases],
    }  # fmt: skip
