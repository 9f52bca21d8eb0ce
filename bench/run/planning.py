"""Plan of a run: its groups, what is known about each case beforehand, and about how long it takes.

A worker is asked, since names and availability need torch; the answer is plain data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.plan.cases import Case, Filters, Group, Quality, Suite, elsewhere, expand
from bench.plan.identity import CaseKey
from bench.records.schema import Record, Status
from bench.run import quality, second_instrument
from bench.run.cold import CompiledKernel
from bench.run.expected import BUILD_S, CEILINGS_S, START_S, group_time
from bench.run.worker_process import Settings, Worker, WorkerError, scratch_folder

#: The worker that is asked may be silent for so long: a C++ compiler has two minutes.
PLAN_LIMIT_S = 180.0
#: From this many cases on that cannot run for one reason, the reason is said once, with their number.
MANY = 10


@dataclass(frozen=True)
class Described:
    """A case with what is known of it before it runs.

    Attributes:
        case: which.
        facts: of its row.
        unavailable: why it cannot run; None when it can.
        compiles: whether torch.compile has long to compile.
        builds: whether it needs the C++ kernel, which is compiled once a run.
        alone: whether it takes its turns in a process of its own.
        environment: variables that its process is started with.
        imports: modules that its processes import; a cold run before it begins to count only torch's compiler.
        converts_s: seconds that converting the model for its runtime took, as it was asked whether it can.
    """

    case: Case
    facts: dict[str, Any]
    unavailable: str | None
    compiles: bool = False
    builds: bool = False
    alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    converts_s: float = 0.0

    def record(self, **fields: Any) -> Record:
        """Return the record of the case with the given fields."""
        own: dict[str, Any] = {
            "workload": self.case.workload,
            "variant": self.case.variant,
            "mode": self.case.mode,
            "device": self.case.device,
            "threads": self.case.threads,
            "sweep_axis": self.case.sweep_axis,
            "sweep_value": self.case.sweep_value,
            "group": self.case.group,
        }
        return Record(**(own | self.facts | fields))


@dataclass(frozen=True)
class Plan:
    """Cases that will run, and how long they take.

    Attributes:
        suite: as the command line wants it, its patterns of names as they are.
        groups: with their described cases.
        torch_facts: what torch says of itself.
        catalogue: names of all workloads and variants there are, each with what it is.
        quality: what is trained after all groups, the variants by name.
        elsewhere: variants that the suite names and that do not exist on a device, by device.
        kernel: the C++ kernel, where finding out what can run has compiled it.
    """

    suite: Suite
    groups: tuple[tuple[Group, tuple[Described, ...]], ...]
    torch_facts: dict[str, Any]
    catalogue: dict[str, Any]
    quality: tuple[Quality, ...] = ()
    elsewhere: Mapping[str, list[str]] = field(default_factory=dict)
    kernel: CompiledKernel = field(default_factory=CompiledKernel)

    @property
    def own_model(self) -> dict[str, Any] | None:
        """Description of the user's own model; None without one."""
        found: dict[str, Any] | None = self.catalogue.get("own_model")
        return found

    @property
    def own_checked(self) -> dict[str, Any]:
        """Findings of the checks of the own model, by workload."""
        return _own_checked(self.catalogue)

    @property
    def own_files(self) -> dict[str, str]:
        """SHA-256 of the files of the user's own model, by path."""
        return dict(self.own_model["files"]) if self.own_model else {}

    @property
    def cases(self) -> tuple[Described, ...]:
        """All cases in order."""
        return tuple(case for _, cases in self.groups for case in cases)

    @property
    def refused_together(self) -> dict[str, int]:
        """Reasons that keep `MANY` cases or more from running, each with their number."""
        reasons = Counter(found.unavailable for found in self.cases if found.unavailable)
        return {reason: number for reason, number in reasons.items() if number >= MANY}

    @property
    def runnable_groups(self) -> int:
        """Groups with at least one case that may run."""
        return sum(any(not case.unavailable for case in cases) for _, cases in self.groups)

    @property
    def group_budget_s(self) -> float:
        """Seconds of timed rounds that each group gets."""
        return self.suite.budget_s / max(1, self.runnable_groups)

    @property
    def second_cases(self) -> tuple[Case, ...]:
        """Cases that are timed again with pytest-benchmark, after all groups."""
        if not self.suite.second_instrument:
            return ()
        runnable = (found for found in self.cases if not found.unavailable)
        return tuple(found.case for found in runnable if second_instrument.takes(found.case, compiles=found.compiles))

    def left(self, recorded: Collection[CaseKey] = ()) -> list[Described]:
        """Cases that can run and are not recorded."""
        return [c for c in self.cases if not c.unavailable and c.case.key not in recorded]

    def expected_s(self, recorded: Collection[CaseKey] = (), folder: Path | None = None) -> float:
        """A rough guess of how long the run takes, seconds.

        Args:
            recorded: cases that are left out.
            folder: of a run that is resumed, which may hold what comes after all groups already.
        """
        left = self.left(recorded)
        total = START_S + (START_S + CEILINGS_S) * bool(left)
        total += BUILD_S * any(found.builds for found in left) * (not self.kernel.seconds)
        total += sum(self.group_expected_s(cases, recorded) for _, cases in self.groups)
        if folder is None or not second_instrument.done(folder):
            total += second_instrument.expected_s(len(self.second_cases))
        return total + (quality.expected_s(self.quality) if folder is None or not quality.done(folder) else 0.0)

    def group_expected_s(self, cases: Collection[Described], recorded: Collection[CaseKey] = ()) -> float:
        """A rough guess of how long the cases of a group take, without those that are recorded, seconds."""
        runnable = [c for c in cases if not c.unavailable and c.case.key not in recorded]
        if not runnable:
            return 0.0
        case = runnable[0].case
        call_s = self._call_s.get((case.workload, case.mode), 0.0)
        return group_time(runnable, call_s, self.group_budget_s, self.suite.processes).total_s

    @property
    def _call_s(self) -> dict[tuple[str, str], float]:
        """Seconds of a call of the own model, by workload and mode."""
        sets = self.own_model["sets"] if self.own_model else ()
        return {(entry["workload"], mode): found for entry in sets for mode, found in entry["call_s"].items()}


def make_plan(suite: Suite, filters: Filters, settings: Settings, *, build: bool) -> Plan:
    """Expand a suite and ask a worker what is known of each case.

    Args:
        suite: what to expand.
        filters: what the command line narrows it down to.
        settings: of the worker.
        build: whether to compile what variants need, to find out whether that can be done.

    Raises:
        UsageError: for a name or override that does not exist, or a plugin that fails.
    """
    limit_s = max(PLAN_LIMIT_S, suite.case_limit_s)
    try:
        with scratch_folder() as folder, Worker(settings, folder / "catalogue.log", folder) as worker:
            *_, found = worker.ask("catalogue", limit_s)
            groups = expand(suite, found, filters)
            trained = quality.narrowed(suite.quality, found, filters)
            cases = [case for group in groups for case in group.cases]
            settings = dataclasses.replace(settings, own_checked=_own_checked(found))
            events = _descriptions(cases, worker, settings, folder, limit_s, build=build)
            # A worker of an earlier revision does not say it.
            kernel = CompiledKernel.found(folder, events[-1].get("built", {}) if events else {})
    except WorkerError as error:
        # The exception's own name does not help a user who mistyped a workload.
        raise UsageError(re.sub("^(UnknownWorkloadError|OwnModelError): ", "", error.reason)) from error
    described = iter([
        Described(
            case,
            event["facts"],
            event["reason"],
            event["compiles"],
            event["builds"],
            event["alone"],
            event["environment"],
            # A worker of an earlier revision does not say it; nothing is forked for it.
            tuple(event.get("imports", ())),
            event.get("converts_s", 0.0),
        )
        for case, event in zip(cases, events, strict=True)
    ])  # fmt: skip
    planned = tuple((group, tuple(next(described) for _ in group.cases)) for group in groups)
    return Plan(suite, planned, found["torch"], found, trained, elsewhere(suite, found, filters), kernel)


def _own_checked(catalogue: Mapping[str, Any]) -> dict[str, Any]:
    sets = (catalogue.get("own_model") or {}).get("sets", ())
    return {entry["workload"]: entry["checked"] for entry in sets}


def _descriptions(
    cases: Sequence[Case], worker: Worker, settings: Settings, folder: Path, limit_s: float, *, build: bool
) -> list[dict[str, Any]]:
    """Ask what is known of each case, of another worker where a check ends the one that was asked.

    A converter of another runtime may crash or hang on a user's model. That makes its case unavailable, not the run.

    Args:
        cases: all of a run.
        worker: the one that is asked first; it stays the caller's.
        settings: of further workers.
        folder: for logs and caches of all of them.
        limit_s: longest time without an event, seconds.
        build: whether to compile what variants need.
    """
    fields = [dataclasses.asdict(case) for case in cases]
    ended: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        while True:
            events: list[dict[str, Any]] = []
            try:
                for event in worker.ask("describe", limit_s, cases=fields, build=build, ended=ended):
                    if event["event"] == "described":
                        # One by one: what was described before an error counts.
                        events.append(event)  # noqa: PERF401
            except WorkerError as error:
                place = str(len(events))
                # What failed in words is an answer about the request as a whole.
                if error.status is Status.ERROR or not error.variant or place in ended:
                    raise
                ended[place] = error.reason
                worker = stack.enter_context(Worker(settings, folder / f"describe-{len(ended)}.log", folder))
            else:
                return events
