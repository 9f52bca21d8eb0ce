"""One variant served in a process of its own, and LoadGen's tests of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.machine import interference
from bench.plan.cases import Case
from bench.records.schema import Status
from bench.run.worker_process import ROOT, Event, Worker, WorkerError
from bench.serve.generator import EXIT_LOST
from bench.serve.loadgen_logs import SUMMARY, LoadGenResult, read_logs
from bench.serve.search import LoadVerdict

#: Cores that the generator may keep busy before what it makes is not the load that was asked for.
MOST_CORES = 0.5
#: LoadGen says nothing of a percentile that so few queries are beyond: 6.62 / (1 - percentile) queries are needed for
#: 99 % confidence (662 for p99), of which some may be late.
NEEDED = 6.62
SLACK = 1.2
#: Seconds that a test may take beyond what LoadGen gives it: its start, its logs, and queries that wait.
BEYOND_S, TIMES_LONGER = 30.0, 4.0
#: Columns of a test that its record has too, and others.
SHARED = ("lateness_p99_s", "generator_cores", "batch_mean", "waste")
MEASURED = ("service_share", "energy_j", "energy_queries", "energy_s", "why")
#: LoadGen's names of what a test does not satisfy that was too short, and of the bound.
TOO_SHORT, PERFORMANCE = ("Min duration", "Min queries"), "Performance constraints"


@dataclass(frozen=True)
class Bound:
    """A bound on latency: percentile, as 99, and seconds."""

    percentile: float
    seconds: float

    @property
    def least_queries(self) -> int:
        """Queries that a test needs to say something of the percentile."""
        return round(SLACK * NEEDED / (1 - self.percentile / 100))


@dataclass(frozen=True)
class Batching:
    """Limits of the queue: most queries in a batch (or rows), longest wait for company, who may share one.

    `kind` is a name of `arguments.BATCHING`. By step, no query waits for others, and any lengths share rows.
    """

    largest: int
    wait_s: float | None
    lengths: str
    kind: str = "queue"


@dataclass(frozen=True)
class LoadTest:
    """A LoadGen test of a variant.

    Attributes:
        phase: what it was for.
        target_qps: load that was asked for; None where the scenario has none.
        result: what LoadGen found.
        verdict, reason: ours, which counts the generator's own faults too.
        lateness_p99_s, generator_cores: of the generator.
        batch_mean, waste, service_share: of the queue.
        energy_j, energy_queries, energy_s: as `bench.timing.query_energy` counted them; None without a counter.
        why: what disturbed it.
        queries: how many there were.
        bound: in whose percentile it is told.
    """

    phase: str
    target_qps: float | None
    result: LoadGenResult
    verdict: LoadVerdict
    reason: str
    lateness_p99_s: float
    generator_cores: float
    batch_mean: float
    waste: float
    service_share: float
    why: str
    queries: int
    bound: Bound
    energy_j: float | None = None
    energy_queries: int | None = None
    energy_s: float | None = None

    @property
    def latencies(self) -> dict[str, float | None]:
        """Percentiles that rows and records have: LoadGen's own of the bound, and ours of the others."""
        ours = {f"latency_p{percentile}_s": self.result.percentile(percentile) for percentile in (50, 90, 99)}
        return ours | {"latency_bound_s": self.result.by_loadgen(self.bound.percentile)}

    def row(self, workload: str, variant: str) -> dict[str, Any]:
        """Return the row of the test in serving-tests.csv.gz."""
        first = {"workload": workload, "variant": variant, "phase": self.phase, "target_qps": self.target_qps}
        found = {"qps": self.result.qps, "queries": self.queries, "verdict": self.verdict.value, "reason": self.reason}
        return first | found | self.latencies | {name: getattr(self, name) for name in (*SHARED, *MEASURED)}

    def fields(self) -> dict[str, Any]:
        """Fields of a record that takes its latencies from this test."""
        found = {"latency_ours_s": self.result.percentile(self.bound.percentile), "queries": self.queries}
        shared = {name: getattr(self, name) for name in SHARED}
        return self.latencies | found | {"loadgen": self.result.verdict} | shared


@dataclass
class ServedVariant:
    """A worker in which a variant is served; a context manager, inside which it lives.

    Args:
        worker: not started yet.
        case: the variant.
        batching: what its queue may do.
        scratch: folder for the socket and LoadGen's logs.
        kept: folder that keeps LoadGen's summaries.
        limit_s: longest silence of the worker while it builds, seconds.
        energy: whether the worker reads the counter of energy in tests.
        gates: the gate's events.
    """

    worker: Worker
    case: Case
    batching: Batching
    scratch: Path
    kept: Path
    limit_s: float
    energy: bool = False
    gates: list[Event] = field(default_factory=list)
    unavailable: str = ""
    single_s: float = 0.0
    largest_s: float = 0.0
    _samples: int = 0

    def __enter__(self) -> Self:
        """Start the process."""
        self.worker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.worker.__exit__()

    def begin(self, seed: int) -> str:
        """Build, gate and warm up; returns why the gate refuses the variant, or an empty text."""
        asked = self.batching
        request = {"largest": asked.largest, "wait_s": asked.wait_s, "lengths": asked.lengths, "batching": asked.kind}
        for event in self._ask("begin", self.limit_s, case=dataclasses.asdict(self.case), seed=seed, **request):
            if event["event"] == "refused":
                self.unavailable = event["reason"]
            if event["event"] == "ready":
                self.single_s, self.largest_s = event["single_s"], event["largest_s"]
                self._samples = event["samples"]
        return self._refused()

    def end(self, seed: int) -> str:
        """Gate once more; returns why it refuses the variant, or an empty text."""
        for _ in self._ask("end", self.limit_s, seed=seed):
            pass
        return self._refused()

    def test(
        self, phase: str, scenario: str, qps: float, duration_s: float, most_s: float, bound: Bound, seed: int
    ) -> LoadTest:
        """Run one LoadGen test.

        Args:
            phase: what it is for.
            scenario: of LoadGen.
            qps: load; in Offline the expected one, in SingleStream that of the expected latency.
            duration_s: least length, seconds.
            most_s: longest time in which queries are issued, seconds.
            bound: on latency.
            seed: of the schedule.

        Raises:
            WorkerError: the variant's process or the generator did not end the test.
        """
        folder = self.scratch / "loadgen"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = self.scratch / "socket"
        path.unlink(missing_ok=True)
        task = {
            "path": str(path), "folder": str(folder), "scenario": scenario, "qps": qps, "percentile": bound.percentile,
            "bound_s": bound.seconds, "duration_s": duration_s, "most_s": most_s, "seed": seed,
            "least": bound.least_queries if scenario != "offline" else 1, "samples": self._samples,
        }  # fmt: skip
        limit_s = TIMES_LONGER * most_s + BEYOND_S
        events = self._ask("load", limit_s, path=str(path), scenario=scenario, energy=self.energy)
        next(events)
        before = interference.read()
        try:
            ran = generate(task, limit_s)
        except WorkerError as error:
            if error.status is Status.CRASHED:
                # The worker's own end says more: a signal, or its last words.
                list(events)
            raise
        served = list(events)[-1]
        after = interference.read(ran["process_s"] + served["cpu_s"])
        # Python's own start is the generator's too, and no load: what it took is not counted as others'.
        try:
            result = read_logs(folder)
        except (OSError, ValueError) as error:
            raise WorkerError(Status.ERROR, f"LoadGen's logs cannot be read: {error}", "load") from error
        self.kept.mkdir(exist_ok=True)
        name = f"{self.case.variant.replace('/', '_').replace('#', '-')}-{phase.replace(' ', '-')}"
        number = next(n for n in itertools.count(1) if not (self.kept / f"{name}-{n}.txt").exists())
        shutil.copy(folder / SUMMARY, self.kept / f"{name}-{number}.txt")
        return judged(phase, None if scenario == "single-stream" else qps, result, served, ran, bound,
                      interference.judge(before, after, self.case.device).why)  # fmt: skip

    def _ask(self, action: str, limit_s: float, **fields: Any) -> Iterator[Event]:
        for event in self.worker.ask("serving", limit_s, action=action, **fields):
            if event["event"] == "gate":
                self.gates.append(event)
            elif event["event"] != "stage":
                yield event

    def _refused(self) -> str:
        if not self.gates:
            return ""
        last = self.gates[-1]
        return "" if last["passed"] else f"{last['reason']} (gate {last['when']} the load)"


def generate(task: dict[str, Any], limit_s: float) -> dict[str, float]:
    """Run the generator on a task.

    Raises:
        WorkerError: it did not end well, or not within the limit.
    """
    command = [sys.executable, "-m", "bench.serve.generator"]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, input=json.dumps(task), capture_output=True, text=True, cwd=ROOT, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        msg = f"a test did not end within {limit_s:.0f} s: queries were not answered"
        raise WorkerError(Status.TIMEOUT, msg, "load") from None
    if done.returncode == EXIT_LOST:
        raise WorkerError(Status.CRASHED, "the served variant went away during a test", "load")
    if done.returncode:
        said = " ".join(done.stderr.split()[-40:])
        raise WorkerError(Status.ERROR, f"the load generator ended with exit code {done.returncode}: {said}", "load")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(
    phase: str,
    target_qps: float | None,
    result: LoadGenResult,
    served: Event,
    ran: dict[str, float],
    bound: Bound,
    why: str,
) -> LoadTest:
    """Put a test together, with our verdict: LoadGen's, unless the generator itself was at fault."""
    cores = ran["cpu_s"] / max(ran["wall_s"], 1e-9)
    verdict, reason = verdict_of(result, cores, bound)
    batches = max(1, served["batches"])
    return LoadTest(
        phase=phase,
        target_qps=target_qps,
        result=result,
        verdict=verdict,
        reason=reason,
        lateness_p99_s=result.lateness(99),
        generator_cores=cores,
        batch_mean=served["together"] / batches,
        waste=served["waste"],
        service_share=served["busy_s"] / max(ran["wall_s"], 1e-9),
        why=why,
        queries=served["queries"],
        bound=bound,
        energy_j=served["energy_j"],
        energy_queries=served["energy_queries"],
        energy_s=served["energy_s"],
    )


def verdict_of(result: LoadGenResult, cores: float, bound: Bound) -> tuple[LoadVerdict, str]:
    """Judge a test: by LoadGen's verdict, unless the generator itself was at fault.

    A generator that is late makes latencies longer and never shorter, since they count from the scheduled time. So it
    spoils no test that held; one that broke is invalid where the bound would have held without the lateness.

    Args:
        result: what LoadGen found.
        cores: that the generator kept busy.
        bound: on latency.
    """
    if cores > MOST_CORES:
        return LoadVerdict.INVALID, f"the generator kept {cores:.2f} cores busy, expected at most {MOST_CORES}"
    if result.valid:
        return LoadVerdict.HELD, ""
    said = f"LoadGen: not satisfied: {', '.join(result.unsatisfied) or 'not told'}"
    if any(name.startswith(TOO_SHORT) for name in result.unsatisfied):
        return LoadVerdict.INVALID, said
    if PERFORMANCE in result.unsatisfied and result.without_lateness(bound.percentile) <= bound.seconds:
        late_ms = 1e3 * result.lateness(bound.percentile)
        return LoadVerdict.INVALID, f"the generator was late by {late_ms:.2f} ms, and without that the bound had held"
    return LoadVerdict.BROKEN, said
