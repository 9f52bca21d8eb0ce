"""The parent: takes a plan (`bench.plan`) through cold workers and group workers to records. It never imports torch.

Each case first runs alone in a fresh process (cold start, memory, evidence); what survives that is then measured
together with its group in several seatings, one after the other, each of which gates before and after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.analysis.roofline import Ceilings, Judge
from bench.console import Console
from bench.machine import energy, environment
from bench.machine.core_distance import CoreDistance
from bench.plan import own_model
from bench.plan.cases import Group
from bench.plan.identity import CaseKey
from bench.records.folder import RunFolder
from bench.records.schema import Record, Status
from bench.run import devices, more, quality, resume, second_instrument
from bench.run.cold import ColdCase, ColdRuns, before_cold
from bench.run.forks import ForkServer, cold_runs, fork_servers
from bench.run.group import Measurement, failed, figured, placed
from bench.run.planning import Described, Plan
from bench.run.resume import Begun
from bench.run.worker_process import Settings, Worker, scratch_folder
from bench.timing.stopwatch import Stopwatch
from kernels.host.cores import usable_cores

#: Share of the time for rounds that is kept for groups whose answer does not stand after the first pass.
KEPT_SHARE = 0.3


@dataclass
class Runner:
    """Runs a plan into a folder.

    Attributes:
        plan: what to run.
        folder: where it is written.
        settings: of the workers.
        console: what the user sees.
        options: of the command line, as a resumed run needs them.
        begun: the run that is resumed; None for a new one.
        recorded: cases of it that are recorded and stay so.
        deadline_s: time of `time.perf_counter` that nothing that is begun may be expected to pass; but for the first,
            so that a run always gets on.
        unfinished: whether something was left for `--resume` because of it.
        seed: of the gates' inputs and the rounds' order; a new one for each part of a run unless given.
    """

    plan: Plan
    folder: RunFolder
    settings: Settings
    console: Console
    seed: int = field(default_factory=resume.new_seed)
    options: dict[str, Any] = field(default_factory=dict)
    begun: Begun | None = None
    recorded: frozenset[CaseKey] = frozenset()
    deadline_s: float = math.inf
    unfinished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._begun_any = False
        self._first_seed = self.seed
        self.watch = Stopwatch()
        self._budget_s = self.plan.suite.budget_s
        self._spent_before_s = self.begun.spent_s if self.begun else 0.0
        self._groups_left = self.plan.runnable_groups
        # A single group takes further seatings itself.
        self._keeps_time = self._groups_left > 1
        self._forks: list[ForkServer] = []
        self._cold_forks: dict[tuple[str, ...], list[ForkServer]] = {}
        self._looking = threading.Lock()
        self._colds: ColdRuns | None = None
        # A resumed run knows the ceilings that its first part measured; the best of all counts.
        before = self.begun.facts.get("ceilings") or {} if self.begun else {}
        #: The counter of energy of each device before the groups.
        self.idle: dict[str, energy.Idle] = {}
        self.distance = CoreDistance()
        self.judge = Judge(
            functools.partial(devices.ceilings, self), {device: Ceilings.of(found) for device, found in before.items()}
        )

    def run(self, command: str, more_s: float = 0.0) -> list[Record]:
        """Run all groups; the folder is complete and readable whenever this ends, by error or Ctrl-C too.

        Args:
            command: the command line, for environment.json.
            more_s: seconds of further rounds for groups of a run that has ended.

        Returns:
            The records, in the order in which they were written.

        Raises:
            OSError: when something cannot be written; what was recorded before is safe.
        """
        facts, part, load = self._facts(command)
        start = time.perf_counter()
        records: list[Record] = []

        def end() -> None:
            facts["ceilings"] = self.judge.as_json()
            load["after"] = environment.load()
            part["duration_s"] = round(time.perf_counter() - start, 1)
            part["own_time_s"] = self.watch.found()
            self.folder.write_json("environment.json", facts)
            self.folder.write_table()

        if self.begun is None:
            planned = [dataclasses.asdict(described.case) for described in self.plan.cases]
            content = {"suite": dataclasses.asdict(self.plan.suite), "cases": planned}
            content |= {"own_model": self.plan.own_model} if self.plan.own_model else {}
            self.folder.write_json("plan.json", content)
        self.folder.write_json("environment.json", facts)
        try:
            with scratch_folder() as scratch, self.forking(), self.distance:
                part["cold_runs"] = self._cold_runs
                for device in self._devices_ahead(more_s):
                    self.judge.look(device)
                    self.idle[device] = energy.idle(device)
                facts["ceilings"] = self.judge.as_json()
                devices.note_idle(self.idle, facts, part)
                self.folder.write_json("environment.json", facts)
                for group, cases in self._groups_in_time():
                    for ended in self._group(group, cases, scratch):
                        records += self.folder.append(*ended)
                        for record in records[-len(ended) :]:
                            self.console.record(record)
                self._decide(more_s)
                for kind, stage in (("second instrument", self._second_instrument), ("quality", self._quality)):
                    if not self.unfinished:
                        with self.watch.on(kind):
                            stage(scratch)
        except BaseException:
            # Report what ended the run, not what could not be derived then.
            with contextlib.suppress(OSError):
                end()
            raise
        end()
        return records

    def _decide(self, more_s: float) -> None:
        """Give groups whose answer does not stand the time asked for, or what the run kept for them.

        A time limit that would be passed leaves it out: the answers are there, with their doubt.
        """
        seconds = self._further_s(more_s)
        if seconds <= 0 or self.unfinished or (not more_s and time.perf_counter() + seconds > self.deadline_s):
            return
        more.measure(self, self.open_groups(), seconds)

    def _further_s(self, more_s: float) -> float:
        """Seconds of rounds for undecided groups: what was asked for, or what no part of the run has spent yet."""
        return more_s or (self._budget_s - self._spent_before_s if self._keeps_time else 0.0)

    def _devices_ahead(self, more_s: float) -> list[str]:
        """Devices of what is left to measure: cases that are not recorded, and groups that further rounds go to."""
        ahead = {found.case.device for found in self.plan.left(self.recorded)}
        if self._further_s(more_s) > 0:
            ahead |= {found.case.device for group in self.open_groups() for found in group.cases}
        return sorted(ahead)

    def open_groups(self) -> list[more.Open]:
        """Groups without a clear answer, judged by what is recorded."""
        return more.undecided(self.plan.groups, self.folder, self.plan.suite.interval)

    @contextlib.contextmanager
    def forking(self) -> Iterator[None]:
        """Have seats and cold runs started by fork, each seating of a group from a parent of its own: processes differ.

        Not where a GPU is used: what asks for one leaves a process that cannot be forked.
        """
        only_cpu = all(found.case.device == "cpu" for found in self.plan.cases)
        left = self.plan.left() if only_cpu else []
        # Better once than in each seat.
        modules = tuple(dict.fromkeys(name for found in left for name in found.imports))
        seats = [modules] * self.plan.suite.processes if left else []
        # What a cold run finds imported shortens its first call.
        kinds = sorted({before_cold(found.imports) for found in self.plan.left(self.recorded) if left})
        apart = [kind for kind in kinds if kind != modules]
        with contextlib.ExitStack() as stack:
            with self.watch.on("starts"):
                servers = stack.enter_context(fork_servers(self.settings, self.log, [*seats, *apart]))
            self._forks, others = servers[: len(seats)], servers[len(seats) :]
            self._cold_forks = {kind: [server] for kind, server in zip(apart, others, strict=False)}
            self._cold_forks.setdefault(modules, self._forks)
            self._cold_runs = cold_runs(servers, gpu=not only_cpu)
            yield

    def seat(self, settings: Settings, seating: int, cache: Path) -> Worker:
        """Start the process of a seat: by fork, or as a fresh one where there is nothing left to fork from.

        Args:
            settings: of the process.
            seating: number of its seating.
            cache: folder for whatever compilers cache.
        """
        living = self._living(self._forks)
        return Worker(settings, self.log, cache, living[seating % len(living)] if living else None)

    def cold(self, described: Described, log: Path, cache: Path) -> Worker:
        """Start the process of a cold run: by fork where the child's memory can be as a fresh process's, else afresh.

        Args:
            described: the case.
            log: file that takes what the process prints.
            cache: empty folder for whatever compilers cache.
        """
        servers = self._living(self._cold_forks.get(before_cold(described.imports), []))
        living = [server for server in servers if server.gives_own_pages]
        settings = self.settings.with_environment(described.environment)
        return Worker(settings, log, cache, living[0] if living else None)

    def _living(self, servers: list[ForkServer]) -> list[ForkServer]:
        """Return the servers that are still alive; report and remove those that have died."""
        # Cold runs start in several threads.
        with self._looking:
            dead = [server for server in servers if not server.alive]
            for server in dead:
                # Its number is free for another process from now on.
                server.__exit__()
                servers.remove(server)
            living = list(servers)
        if dead:
            self.console.say(
                f"{len(dead)} of the processes that workers are forked from died; see workers.log", "yellow"
            )
        return living

    def _groups_in_time(self) -> Iterator[tuple[Group, tuple[Described, ...]]]:
        """The groups one by one, until the next one is not expected to end before the deadline."""
        expected_s = took_s = 0.0
        for group, cases in self.plan.groups:
            own_s = self.plan.group_expected_s(cases, self.recorded)
            # The guess is rough: where the groups so far took longer, this one will too.
            pace = max(1.0, took_s / expected_s) if expected_s else 1.0
            start_s = time.perf_counter()
            if own_s and not self._in_time(own_s * pace):
                return
            yield group, cases
            if own_s:
                expected_s, took_s = expected_s + own_s, took_s + time.perf_counter() - start_s

    def _in_time(self, expected_s: float) -> bool:
        """Return whether what takes so long may be begun; what may not be is left for later."""
        self.unfinished = self._begun_any and time.perf_counter() + expected_s > self.deadline_s
        self._begun_any = True
        return not self.unfinished

    def _facts(self, command: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The content of environment.json, and in it the section of this part of the run and that of its load."""
        load = {"before": environment.load()}
        if self.begun is not None:
            facts = self.begun.facts
            part = {"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "command": command, "seed": self.seed}
            part |= {"git": environment.git(), "recorded_before": len(self.recorded), "load": load}
            facts.setdefault("resumes", []).append(part)
            return facts, part, load
        facts = environment.describe(self.plan.torch_facts, self.settings.variables())
        executed = {found.case.executed for found in self.plan.cases}
        facts["needs"] = {v["name"]: v["needs"] for v in self.plan.catalogue["variants"] if v["name"] in executed}
        if self.plan.own_model:
            facts[own_model.SHARES] = own_model.shares(self.plan.own_model)
        facts["run"] = {
            "suite": self.plan.suite.name,
            "command": command,
            "budget_s": self.plan.suite.budget_s,
            "interval": self.plan.suite.interval,
            "processes": self.plan.suite.processes,
            "case_limit_s": self.plan.suite.case_limit_s,
            "seed": self.seed,
            "arguments": self.options,
            "plugins": resume.plugin_digests(self.settings.plugins) | self.plan.own_files,
        }
        facts["load"] = load
        return facts, facts["run"], load

    def _second_instrument(self, scratch: Path) -> None:
        """Time the quick cases that ended ok again, with pytest-benchmark, and report the outcome."""
        ok = {(record["group"], record["variant"]) for record in self.folder.records() if record["status"] == Status.OK}
        cases = [case for case in self.plan.second_cases if (case.group, case.variant) in ok]
        if not cases:
            return
        if not second_instrument.done(self.folder.path) and not self._in_time(second_instrument.expected_s(len(cases))):
            return
        self.console.status(f"second instrument: {len(cases)} cases with pytest-benchmark")
        limit_s = self.plan.suite.case_limit_s
        for line in second_instrument.run(cases, self.folder.path, self.settings, scratch / "shared", limit_s):
            self.console.say(line)

    def _quality(self, scratch: Path) -> None:
        """Train the suite's tasks until they are good enough; a time limit that would be passed leaves it for later."""
        parts = self.plan.quality
        if not parts or quality.done(self.folder.path) or not self._in_time(quality.expected_s(parts)):
            return
        device = self.plan.cases[0].case.device
        for record in quality.run(
            parts, self.folder.path, self.settings, device, self.next_seed(),
            self.plan.suite.case_limit_s, scratch / "shared", self.console.status,
        ):  # fmt: skip
            self.console.say(quality.line(record))

    def _group(self, group: Group, cases: tuple[Described, ...], scratch: Path) -> Iterator[tuple[Record, ...]]:
        """Records of a group: those that do not run one by one, then the measured ones together."""
        waiting: dict[str, tuple[Described, dict[str, Any]]] = {}
        left = [found for found in cases if found.case.key not in self.recorded]
        for described in left:
            if described.unavailable:
                self.console.advance(described.case, "unavailable")
                yield (described.record(status=Status.UNAVAILABLE, reason=described.unavailable),)
        for described, fields, failure in self._cold([found for found in left if not found.unavailable], scratch):
            if failure is None:
                waiting[described.case.variant] = (described, fields)
            else:
                yield (described.record(**(fields | failure)),)
        if not waiting:
            return
        measured = Measurement(self, group, scratch, [d for d, _ in waiting.values()], self._budget_of_group_s())
        before_s = self.watch.found()["timed rounds"] + self.watch.found()["waiting"]
        measured.run()
        self._budget_s -= self.watch.found()["timed rounds"] + self.watch.found()["waiting"] - before_s
        found = (figured(self, d, fields | {"repro": self._repro(d)}, measured) for d, fields in waiting.values())
        records = placed(found, measured.samples, self.plan.suite.interval)
        # Samples first: a record says that its case is done, and then its samples must be there.
        self.folder.append_seatings([d.case for d, _ in waiting.values()], records, measured.samples)
        yield records

    def _repro(self, described: Described) -> str:
        """The command that measures a case again, with the reference to compare it with."""
        case = described.case
        words = own_model.run_words(self.settings.own_model, described.case.executed)
        words += ["--workload", case.workload, "--variant", case.variant, "--mode", case.mode]
        words += ["--device", case.device, "--threads", str(case.threads), "--seed", str(self._first_seed)]
        if self.settings.wait_policy != "default":
            words += ["--omp-wait", self.settings.wait_policy]
        for plugin in self.settings.plugins:
            words += ["--plugin", str(plugin)]
        return shlex.join(["python", "-m", "bench", "run", *words, "--no-second-instrument"])

    def _budget_of_group_s(self) -> float:
        """Seconds of timed rounds that the next group gets: its share of what the groups before it left over."""
        kept_s = KEPT_SHARE * self.plan.suite.budget_s if self._keeps_time else 0.0
        share_s = (self._budget_s - kept_s) / max(1, self._groups_left)
        self._groups_left -= 1
        return share_s

    def _cold(
        self, cases: list[Described], scratch: Path
    ) -> Iterator[tuple[Described, dict[str, Any], dict[str, Any] | None]]:
        """Each case, the fields that its cold run finds, and the fields of its failure or None."""
        if self._colds is None:
            self._colds = ColdRuns(scratch, self.plan.suite.case_limit_s, usable_cores())
            self._colds.keep(scratch / "shared", self.plan.kernel)
        asked = []
        for found in cases:
            start = functools.partial(self.cold, found)
            began = functools.partial(self.console.advance, found.case, "cold start, memory, evidence")
            asked.append(ColdCase(found.case, start, scratch / "shared", self.log, found.builds, began))
        described = {found.case: found for found in cases}
        with self.watch.on("cold runs"):
            for case, fields, error in self._colds.run(asked):
                yield described[case], fields, None if error is None else failed(error.status, error.reason)

    @property
    def log(self) -> Path:
        """Log of what workers printed."""
        return self.folder.path / "workers.log"

    def next_seed(self) -> int:
        """Seed of the next seating, or of whatever else draws at random; the one after it is free too."""
        self.seed = (self.seed + 2) % resume.SEEDS
        return self.seed
