"""A group being measured, seating after seating, until the answer stands or the budget is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.analysis import racing
from bench.analysis.energy import energy_figures
from bench.analysis.figures import figures
from bench.analysis.intervals import Interval
from bench.analysis.roofline import Judge
from bench.console import Console
from bench.machine.core_distance import CoreDistance
from bench.machine.energy import Idle
from bench.plan.cases import REFERENCE, Group
from bench.records.rounds import Round, Samples, spoilt
from bench.records.schema import Record, Status
from bench.run.planning import Described, Plan
from bench.run.seating import STARTS, Place, Seating, places
from bench.run.worker_process import Event, Settings, Worker, WorkerError
from bench.timing import rounds as sampling
from bench.timing.stopwatch import Stopwatch

#: Most seatings of a group whose interval stays wide while time is left.
MOST_SEATINGS = 10
#: Most seatings of a group that are given up as disturbed and replaced, fewer than the suite asks for: each costs a
#: start, which no budget counts.
MOST_REPLACED = 3
#: Quantities that a gate reports, and what it reports of each.
KINDS, WHAT = ("parity", "grad"), ("error", "limit")


class Host(Protocol):
    """The run that a group is measured for, as `bench.run.runner` has it."""

    plan: Plan
    settings: Settings
    console: Console
    judge: Judge
    watch: Stopwatch
    idle: dict[str, Idle]
    distance: CoreDistance

    def next_seed(self) -> int:
        """Seed of the next seating; the one after it is free too."""

    def seat(self, settings: Settings, seating: int, cache: Path) -> Worker:
        """Start the process of a seat."""


@dataclass
class Measurement:
    """A group being measured, seating after seating.

    Attributes:
        cases: what is measured, with what is known of it.
        budget_s: seconds of timed rounds.
        samples: rounds of the seatings that ended well.
        gates: the gate's events of each variant.
        failures: fields of the records of variants that dropped out.
        remarks: failures in further seatings, by variant, whose figures stand without them.
    """

    runner: Host
    group: Group
    scratch: Path
    cases: list[Described]
    budget_s: float
    samples: Samples = field(default_factory=Samples)
    gates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    _audited: bool = field(default=False, init=False)
    _problems: int = field(default=0, init=False)
    _truth: str = field(default="", init=False)

    def run(self) -> None:
        """Take seatings until there are enough and the answer stands, or the budget is spent."""
        with self._keeping_truth():
            self._run()

    def _run(self) -> None:
        asked = self.runner.plan.suite.processes
        left_s = self.budget_s
        slice_s = left_s / asked
        number = 0
        while self.cases:
            # One that was spoilt does not count: another takes its place, and what it left of its time.
            seatings = min(MOST_SEATINGS, asked + min(self._most_replaced, self._spoilt()))
            further = number >= seatings
            if further and (left_s < slice_s / 2 or number >= MOST_SEATINGS or not self._rest()):
                return
            budget_s = min(slice_s, left_s) if further else left_s / (seatings - number)
            self.runner.console.status(f"{self.group.name}: seating {number + 1}, {len(self.cases)} variants")
            spent_s, ended = self._seating(number, budget_s)
            left_s -= spent_s
            number += ended

    def more(self) -> None:
        """Take further seatings, each as long as one of the run's, until the answer stands or the budget is spent."""
        with self._keeping_truth():
            self._more()

    def _more(self) -> None:
        plan = self.runner.plan
        number, left_s = len(self.samples.processes), self.budget_s
        lacking = max((self.samples.lacking(found.case.variant) for found in self.cases), default=0)
        seatings = max(lacking, 1, round(left_s * plan.suite.processes / plan.group_budget_s))
        seatings = min(seatings, max(lacking, plan.suite.processes))
        last = number + seatings
        while number < last and left_s > self.budget_s / 4 and self._rest():
            self.runner.console.status(f"{self.group.name}: seating {number + 1}, {len(self.cases)} variants")
            spent_s, ended = self._seating(number, left_s / (last - number))
            left_s -= spent_s
            number += ended

    @contextlib.contextmanager
    def _keeping_truth(self) -> Iterator[None]:
        """Draw the problems of the gate, for before and after the rounds; all processes share their truth.

        It may be large, so it goes with the group.
        """
        self._problems = self.runner.next_seed()
        with tempfile.TemporaryDirectory(prefix="truth-", dir=self.scratch) as self._truth:
            yield

    def _rest(self) -> bool:
        """Take variants that need no more rounds out of further seatings; returns whether any variant is left."""
        needing = self._needing()
        self.cases = [found for found in self.cases if found.case.variant in needing]
        return bool(self.cases)

    def places(self) -> list[Place]:
        """Return the processes of the group, with the cases that each of them holds."""
        return places(self.cases)

    def _seating(self, number: int, budget_s: float) -> tuple[float, bool]:
        """One seating, of a number; returns the seconds that its rounds took, and whether it ended well."""
        runner = self.runner
        begun = time.perf_counter()
        rounds: list[Round] = []
        limit_s = runner.plan.suite.case_limit_s
        try:
            start_seat = functools.partial(runner.seat, seating=number, cache=self.scratch / "shared")
            with (
                runner.watch.on("starts"),
                Seating(
                    self.places(), start_seat, runner.settings, limit_s, self._told, turns=self._turns()
                ) as seating,
            ):
                # The audit looks for what a variant's code does, which is the same in further processes of this run.
                seating.sit(self._problems, audit=not self._audited)
                start = time.perf_counter()
                if seating.players:
                    case, order = self.cases[0].case, runner.next_seed()
                    replaceable = self._spoilt() < self._most_replaced
                    race = racing.Race(seating.players, self._needing, replaceable=replaceable)
                    cores = runner.distance.beside(case.device, case.threads)
                    with runner.watch.on("timed rounds"):
                        rounds += sampling.rounds(seating.players, case.device, budget_s, order, race, cores)
                    runner.watch.move(sum(found.waited_s for found in rounds), "timed rounds", "waiting")
                spent_s = time.perf_counter() - start
                with runner.watch.on("gates"):
                    seating.stand(self._problems + 1)
                for variant, doubt in seating.doubts().items():
                    self._drop(variant, failed(Status.PARITY_FAILED, doubt))
                # To end the processes is not what was told last, a warm-up.
                runner.watch.switch("starts")
        except WorkerError as error:
            names = {found.case.variant for found in self.cases}
            # Where no variant is to blame, all are: a worker that always dies at its start would otherwise be started
            # for ever.
            for variant in names & {error.variant} or names:
                self._lost(variant, number, error)
            return time.perf_counter() - begun, False
        self.samples.processes.append(rounds)
        self._judge_again()
        self._audited = True
        return spent_s, True

    @property
    def _most_replaced(self) -> int:
        return min(MOST_REPLACED, self.runner.plan.suite.processes - 1)

    def _spoilt(self) -> int:
        """Number of seatings that something else than the distance of the cores spoilt: that may last all day."""
        return sum(map(spoilt, self.samples.processes))

    def _judge_again(self) -> None:
        """Mark rounds whose cores were far apart, as is known since they have been nearer."""
        for taken in self.samples.processes:
            for place, found in enumerate(taken):
                if not found.disturbed and (why := self.runner.distance.far(found.word_ns)):
                    taken[place] = dataclasses.replace(found, beside=dataclasses.replace(found.beside, why=why))

    def _turns(self) -> dict[str, Any]:
        """Fields of the request that makes variants ready for their turns."""
        energy = self.runner.idle[self.cases[0].case.device].available
        return {"block_s": self.runner.plan.suite.block_s, "energy": energy, "truth": self._truth}

    def _told(self, event: Event) -> None:
        if event["event"] == "gate":
            self._gate(event)
        elif event["event"] == "stage":
            self.runner.watch.switch(event["name"] if event["name"] in {"warm-up", STARTS} else "gates")

    def _gate(self, event: dict[str, Any]) -> None:
        variant = event["variant"]
        self.gates.setdefault(variant, []).append(event)
        if not event["passed"]:
            reason = f"{event['reason']} (gate {event['when']} the rounds)"
            self._drop(variant, failed(Status.PARITY_FAILED, reason))

    def _lost(self, variant: str, number: int, error: WorkerError) -> None:
        """Take a variant out whose process failed in a seating; if the first pass is complete, its figures stand."""
        if number < self.runner.plan.suite.processes:
            self._drop(variant, failed(error.status, error.reason))
            return
        self.remarks[variant] = f"{error.status} in seating {number + 1}, whose rounds are not counted: {error.reason}"
        self.cases = [found for found in self.cases if found.case.variant != variant]

    def _drop(self, variant: str, failure: dict[str, Any]) -> None:
        self.failures[variant] = failure
        self.cases = [found for found in self.cases if found.case.variant != variant]

    def _needing(self, rounds: Sequence[Round] = ()) -> frozenset[str]:
        """Variants that need more rounds, those of an unfinished seating included in the judgement."""
        samples = Samples([*self.samples.processes, *([list(rounds)] if rounds else [])])
        names = [found.case.variant for found in self.cases]
        found = racing.standing(samples, names, REFERENCE, self.runner.plan.suite.interval, racing.CARE)
        return racing.players(found, names, REFERENCE)


def figured(runner: Host, described: Described, fields: dict[str, Any], measured: Measurement) -> Record:
    """The record of a case whose group was measured.

    Args:
        runner: whose suite and ceilings count.
        described: the case.
        fields: what is known of it besides.
        measured: its group.
    """
    variant = described.case.variant
    fields = fields | worst([*_told_before(fields), *measured.gates.get(variant, [])])
    failure = measured.failures.get(variant)
    if failure is not None:
        return described.record(**(fields | failure))
    remarks = filter(None, (fields.get("reason"), measured.remarks.get(variant)))
    fields["reason"] = "; ".join(remarks)
    # A reference that failed later has no samples in the file, so no ratio could be computed again.
    yardstick = "" if REFERENCE in measured.failures else REFERENCE
    timing = figures(described.case, measured.samples, yardstick, runner.plan.suite.interval, described.facts)
    if not timing:
        return described.record(**(fields | failed(Status.ERROR, "no round of it was completed")))
    timing |= energy_figures(described.case, measured.samples, runner.idle[described.case.device], described.facts)
    fields |= runner.judge.judge(dataclasses.asdict(described.record(**(fields | timing))))
    if fields.get("status") is Status.IMPOSSIBLE:
        # Nothing may be compared with it either.
        measured.samples.forget(variant)
        return described.record(**fields)
    return described.record(**(fields | timing))


def placed(records: Iterable[Record], samples: Samples, interval: float) -> tuple[Record, ...]:
    """Give the records of a group that ended ok their standing, and their ratio to the best.

    Args:
        records: of one group.
        samples: of the same.
        interval: half-width that the suite asks for, as a share.
    """
    found = tuple(records)
    names = [record.variant for record in found if record.status is Status.OK]
    standing = racing.standing(samples, names, REFERENCE, interval)
    if standing is None:
        return found
    places, against = racing.places(standing), standing.against | {standing.best: Interval(1.0, 1.0, 1.0)}
    return tuple(
        dataclasses.replace(
            record,
            standing=places[record.variant],
            vs_best=against[record.variant].value,
            vs_best_lo=against[record.variant].low,
            vs_best_hi=against[record.variant].high,
            certain=racing.certain(samples, standing) if record.variant == standing.best else None,
        )
        if record.variant in against
        else record
        for record in found
    )


def failed(status: Status, reason: str) -> dict[str, Any]:
    """Fields of the record of a case that did not end well."""
    return {"status": status, "reason": reason}


def worst(gates: list[dict[str, Any]]) -> dict[str, Any]:
    """Parity fields over all gate runs of a case: of each kind the error that came nearest to its limit."""
    found = nearest(gates, KINDS)
    if gates:
        found["parity_worst"] = max(gates, key=lambda event: _rank(event["strain"]))["parity_worst"]
    return found


def nearest(gates: Sequence[dict[str, Any]], kinds: Iterable[str]) -> dict[str, Any]:
    """Return of each kind the measured error, 0 included, that came nearest to its limit, and that limit."""
    found: dict[str, Any] = {}
    for kind in kinds:
        error, limit = f"{kind}_error", f"{kind}_limit"
        measured = [event for event in gates if event[error] is not None]
        if measured:
            event = max(measured, key=lambda event: _rank(event[error] / event[limit]))
            found |= {error: event[error], limit: event[limit]}
    return found


def _told_before(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The gates that a record already holds, as one event; none if it holds none."""
    if fields.get("parity_limit") is None:
        return []
    event: dict[str, Any] = {f"{kind}_{what}": fields.get(f"{kind}_{what}") for kind in KINDS for what in WHAT}
    strains = [event[f"{kind}_error"] / event[f"{kind}_limit"] for kind in KINDS if event[f"{kind}_limit"]]
    return [event | {"parity_worst": fields["parity_worst"], "strain": max(strains, key=_rank)}]


def _rank(strain: float) -> tuple[bool, float]:
    """Order of strains, in which what is not a number is worst: it compares as False with everything."""
    return math.isnan(strain), strain
