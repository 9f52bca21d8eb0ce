"""Measure the cases of both sides: alone in a fresh process first, then in turns, in several seatings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.ab.names import SIDES, on
from bench.ab.sides import Side
from bench.ab.verdicts import NOT_TIMED
from bench.analysis.energy import energy_figures
from bench.analysis.figures import figures
from bench.console import Console
from bench.machine.core_distance import CoreDistance
from bench.machine.energy import Idle
from bench.plan.cases import Case
from bench.records.folder import RunFolder
from bench.records.rounds import Round, Samples
from bench.records.schema import Record, Status
from bench.run.cold import ColdCase, ColdRuns
from bench.run.group import failed, worst
from bench.run.planning import Described, Plan
from bench.run.seating import Seating, places
from bench.run.worker_process import Event, Home, Settings, Worker, WorkerError
from bench.timing import rounds as sampling
from kernels.host.cores import usable_cores

#: Seconds that a case may take to build, compile and pass the gate.
LIMIT_S = 240.0


@dataclass(frozen=True)
class Setting:
    """Settings of a measurement.

    Attributes:
        sides: BASE and NEW.
        workers: settings of all workers but their home.
        folder: of the run.
        scratch: for what compilers cache.
        console: what the user sees.
        seatings: full sets of fresh processes that a group gets.
        seed: of the gates' inputs and the rounds' order.
        idle: the counter of energy before anything was measured.
        block_s: least length of a timed block, seconds; each side's own when None.
        distance: of the cores, measured next to the rounds.
        colds: runs the cases of all groups cold.
    """

    sides: tuple[Side, ...]
    workers: Settings
    folder: RunFolder
    scratch: Path
    console: Console
    seatings: int
    seed: int
    idle: Idle
    block_s: float | None = None
    distance: CoreDistance = field(default_factory=CoreDistance)
    colds: ColdRuns = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "colds", ColdRuns(self.scratch, LIMIT_S, usable_cores()))

    def home(self, case: Case) -> Home:
        """Interpreter and checkout of a case, by the side in its name."""
        return {side.name: side.home for side in self.sides}[case.variant.partition("#")[2]]

    @property
    def turns(self) -> dict[str, Any]:
        """Fields of the request that prepares variants; a revision ignores a field that it does not know."""
        found: dict[str, Any] = {"energy": self.idle.available}
        return found if self.block_s is None else found | {"block_s": self.block_s}

    def worker(self, settings: Settings) -> Worker:
        """A worker of a home."""
        return Worker(settings, self.log, self.cache(settings.home))

    def cache(self, home: Home) -> Path:
        """Folder for compiler caches, one for each home: two revisions must not share kernels."""
        return self.scratch / f"cache-{[side.home for side in self.sides].index(home)}"

    @property
    def log(self) -> Path:
        """Log of what workers printed."""
        return self.folder.path / "workers.log"

    def keep(self, plans: Sequence[Plan]) -> None:
        """Keep the kernels that planning compiled on each side."""
        for side, plan in zip(self.sides, plans, strict=True):
            self.colds.keep(self.cache(side.home), plan.kernel)


@dataclass
class Contest:
    """The cases of one group on both sides.

    Attributes:
        setting: of the measurement.
        cases: what is left of them.
        budget_s: seconds of rounds.
    """

    setting: Setting
    cases: list[Described]
    budget_s: float
    samples: Samples = field(default_factory=Samples)
    gates: dict[str, list[Event]] = field(default_factory=dict)
    cold: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> tuple[Record, ...]:
        """Measure and record; raw values are written before the records that need them."""
        planned = list(self.cases)
        for described in planned:
            if described.unavailable:
                self._drop(described.case.variant, failed(Status.UNAVAILABLE, described.unavailable))
        self._run_cold()
        number = 0
        while self.cases and number < self.setting.seatings:
            self.setting.console.status(f"{self.cases[0].case.group}: seating {number + 1} of {self.setting.seatings}")
            number += self._seating(number)
        records = tuple(self._record(described) for described in planned)
        self.setting.folder.append_seatings([found.case for found in planned], records, self.samples)
        return self.setting.folder.append(*records)

    def _drop(self, variant: str, failure: dict[str, Any]) -> None:
        """Remove a variant from both sides, since one side alone allows no comparison."""
        self.failures[variant] = failure
        name, _, side = variant.partition("#")
        (other,) = {on(name, one) for one in SIDES if one != side}
        without = f"{NOT_TIMED}{variant} ended as {failure['status']}"
        self.failures.setdefault(other, failed(Status.UNAVAILABLE, without))
        self.cases = [found for found in self.cases if found.case.variant not in {variant, other}]
        for one in (variant, other):
            self.samples.forget(one)

    def _run_cold(self) -> None:
        """Run each case alone in a fresh process with an empty cache: what ran, its memory, its first call."""
        asked = []
        for found in self.cases:
            settings = dataclasses.replace(self.setting.workers, home=self.setting.home(found.case))
            settings = settings.with_environment(found.environment)
            start = functools.partial(Worker, settings)
            began = functools.partial(self.setting.console.advance, found.case, "cold start, memory, evidence")
            kept, log = self.setting.cache(settings.home), self.setting.log
            asked.append(ColdCase(found.case, start, kept, log, found.builds, began))
        for case, fields, error in self.setting.colds.run(asked):
            self.cold[case.variant] = fields
            if error is not None:
                self._drop(case.variant, failed(error.status, error.reason))

    def _seating(self, number: int) -> bool:
        """Measure one seating; return whether it ended well."""
        setting = self.setting
        # The first process gets other memory than the second, so they change places.
        order = setting.sides if number % 2 == 0 else setting.sides[::-1]
        seats = [
            dataclasses.replace(place, home=side.home)
            for side in order
            for place in places(found for found in self.cases if found.case.variant.endswith(f"#{side.name}"))
        ]
        seed = setting.seed + 2 * number
        rounds: list[Round] = []
        try:
            with Seating(seats, setting.worker, setting.workers, LIMIT_S, self._told, turns=setting.turns) as seating:
                seating.sit(seed, audit=not self.samples.processes)
                left = {found.case.variant for found in self.cases}
                players = {name: player for name, player in seating.players.items() if name in left}
                if players:
                    case, share_s = self.cases[0].case, self.budget_s / setting.seatings
                    cores = setting.distance.beside(case.device, case.threads)
                    rounds += sampling.rounds(players, case.device, share_s, seed, cores=cores)
                seating.stand(seed + 1)
                for variant, doubt in seating.doubts().items():
                    self._drop(variant, failed(Status.PARITY_FAILED, doubt))
        except WorkerError as error:
            at_fault = {found.case.variant for found in self.cases}
            # If no side is to blame, both are: a worker that always dies would otherwise be started forever.
            for variant in {error.variant} if error.variant in at_fault else at_fault:
                self._drop(variant, failed(error.status, error.reason))
            return False
        self.samples.processes.append(rounds)
        for variant in self.failures:
            self.samples.forget(variant)
        return True

    def _told(self, event: Event) -> None:
        if event["event"] != "gate":
            return
        self.gates.setdefault(event["variant"], []).append(event)
        if not event["passed"]:
            reason = f"{event['reason']} (gate {event['when']} the rounds)"
            self._drop(event["variant"], failed(Status.PARITY_FAILED, reason))

    def _record(self, described: Described) -> Record:
        variant = described.case.variant
        fields = self.cold.get(variant, {}) | worst(self.gates.get(variant, []))
        if variant in self.failures:
            return described.record(**(fields | self.failures[variant]))
        timing = figures(described.case, self.samples, "", 1.0, described.facts)
        if not timing:
            return described.record(**(fields | failed(Status.ERROR, "no round of it was completed")))
        timing |= energy_figures(described.case, self.samples, self.setting.idle, described.facts)
        return described.record(**(fields | timing))
