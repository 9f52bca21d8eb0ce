"""A group being measured, process after process, until the intervals are narrow or the budget is spent."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.analysis.figures import speedup
from bench.console import Console
from bench.plan.cases import REFERENCE, Case, Group
from bench.records.rounds import Round, Samples
from bench.records.schema import Status
from bench.run import clock_check as plausible
from bench.run.planning import Plan
from bench.run.worker_process import Settings, Worker, WorkerError
from bench.timing import turn_mark as mark

#: A group gets at most so many processes when its interval stays wide and time is left.
MOST_PROCESSES = 6


class Host(Protocol):
    """The run that a group is measured for, as `bench.run.runner` has it."""

    plan: Plan
    settings: Settings
    console: Console

    @property
    def log(self) -> Path:
        """File that takes what workers print."""

    def next_request(self, cases: list[Case], budget_s: float, mark: Path) -> dict[str, Any]:
        """Arguments of a `measure` request."""


@dataclass
class Measurement:
    """A group being measured, process after process.

    Attributes:
        samples: rounds of the processes that ended well.
        gates: the gate's events of each variant.
        failures: fields of the records of variants that dropped out.
    """

    runner: Host
    group: Group
    scratch: Path
    cases: list[Case]
    samples: Samples = field(default_factory=Samples)
    gates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        """Start processes until there are enough and the intervals are narrow, or the budget is spent."""
        suite = self.runner.plan.suite
        left_s = self.runner.plan.group_budget_s
        slice_s = left_s / suite.processes
        number = 0
        while self.cases:
            if number >= suite.processes and (left_s < slice_s / 2 or number >= MOST_PROCESSES or self._narrow()):
                return
            budget_s = min(slice_s, left_s) if number >= suite.processes else slice_s
            self.runner.console.status(f"{self.group.name}: process {number + 1}, {len(self.cases)} variants")
            spent_s, ended = self._process(budget_s)
            left_s -= spent_s
            number += ended

    def _process(self, budget_s: float) -> tuple[float, bool]:
        """One worker process; returns the seconds its rounds took, and whether it ended well."""
        file = self.scratch / "mark"
        file.write_bytes(b"")
        rounds: list[Round] = []
        sampled: dict[str, Any] = {}
        worker_start = time.perf_counter()
        sampling_start = worker_start
        try:
            with Worker(self.runner.settings, self.runner.log, self.scratch / "shared") as worker:
                request = self.runner.next_request(self.cases, budget_s, file)
                for event in worker.ask("measure", self.runner.plan.suite.case_limit_s, **request):
                    if event["event"] == "gate":
                        self._gate(event)
                    elif event["event"] == "sampled":
                        sampled = event | {"wall_s": time.perf_counter() - sampling_start}
                    elif event["event"] == "round":
                        rounds.append(Round.of(event))
                    elif event["event"] == "stage" and event["name"] == "rounds":
                        sampling_start = time.perf_counter()
        except WorkerError as error:
            # In the rounds all variants take turns; the mark says whose turn it was.
            culprit = error.variant or mark.read(file.read_bytes())
            if culprit not in {case.variant for case in self.cases}:
                # Nobody to blame: without this, a worker that always dies at its start would be started for ever.
                for case in self.cases:
                    self.failures[case.variant] = failed(error.status, error.reason)
                self.cases = []
            else:
                self._drop(culprit, failed(error.status, error.reason))
            return time.perf_counter() - worker_start, False
        self._believe(rounds, sampled)
        self.samples.processes.append(rounds)
        # The gates and audits after the rounds are no rounds: the budget is for those alone.
        return sampled.get("wall_s", 0.0), True

    def _believe(self, rounds: list[Round], sampled: dict[str, Any]) -> None:
        """Drop all cases when the samples cannot be true: they share a clock, and nothing tells whose doing it was."""
        blocks = [block for found in rounds for block in found.blocks.values()]
        if not blocks:
            return
        doubt = plausible.doubt(blocks, sampled["elapsed_s"], sampled["rounds_s"], sampled["wall_s"])
        for case in self.cases if doubt else []:
            self._drop(case.variant, failed(Status.PARITY_FAILED, doubt))

    def _gate(self, event: dict[str, Any]) -> None:
        variant = event["variant"]
        self.gates.setdefault(variant, []).append(event)
        if not event["passed"]:
            reason = f"{event['reason']} (gate {event['when']} the rounds)"
            self._drop(variant, failed(Status.PARITY_FAILED, reason))

    def _drop(self, variant: str, failure: dict[str, Any]) -> None:
        self.failures[variant] = failure
        self.cases = [case for case in self.cases if case.variant != variant]

    def _narrow(self) -> bool:
        """Return whether every variant's interval is as narrow as the suite asks."""
        for case in self.cases:
            found = speedup(self.samples, REFERENCE, case.variant)
            if found is not None and found.half_width > self.runner.plan.suite.interval:
                return False
        return True


def failed(status: Status, reason: str) -> dict[str, Any]:
    """Fields of the record of a case that did not end well."""
    return {"status": status, "reason": reason}


def worst(gates: list[dict[str, Any]]) -> dict[str, Any]:
    """Parity fields over all gate runs of a case: of each kind the error that came nearest to its limit."""
    found: dict[str, Any] = {}
    for kind in ("parity", "grad"):
        error, limit = f"{kind}_error", f"{kind}_limit"
        measured = [event for event in gates if event[error] is not None]
        if measured:
            nearest = max(measured, key=lambda event: _rank(event[error] / event[limit]))
            found |= {error: nearest[error], limit: nearest[limit]}
    if gates:
        found["parity_worst"] = max(gates, key=lambda event: _rank(event["strain"]))["parity_worst"]
    return found


def _rank(strain: float) -> tuple[bool, float]:
    """Order of strains, in which what is no number is worst: it compares as False with everything."""
    return math.isnan(strain), strain
