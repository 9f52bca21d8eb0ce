"""All variants of a workload served: first a wide search of each, then repeats in turns, each in a fresh process."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.analysis.repeats import spread
from bench.console import Console
from bench.errors import UsageError
from bench.machine.energy import Idle
from bench.records import serving
from bench.records.schema import Status
from bench.records.serving import ServingRecord
from bench.run.forks import ForkServer, fork_servers
from bench.run.group import nearest
from bench.run.planning import Described
from bench.run.worker_process import Event, Settings, Worker, WorkerError, scratch_folder
from bench.serve.energy_figures import energy_figures
from bench.serve.load_test import Batching, Bound, LoadTest, ServedVariant
from bench.serve.search import Bracket, LoadVerdict, SearchSteps, highest

#: Tests that a variant is expected to take in a wide search and in one of a repeat. Before the first are one of single
#: queries and one Offline, before the others one Offline each.
WIDE_TESTS, NARROW_TESTS = 4, 3
LEAST_TEST_S, LONGEST_TEST_S = 0.25, 120.0
#: SearchSteps and resolution of the wide search and of the repeats.
WIDE, WIDE_END = 1.6, 1.2
NARROW, NARROW_END = 1.12, serving.RESOLUTION
#: Where the wide search begins, and where it is allowed to end, as shares of the Offline rate. It is allowed to end
#: above that rate, so that an error in one of the two shows.
BEGIN, LEAST, MOST = 0.5, 0.01, 2.0
#: Factor by which queries in Offline and SingleStream are expected to be faster than the first calls.
FASTER = 4.0
BUILD_LIMIT_S = 180.0
#: Processes that workers are forked from, at most.
PARENTS = 5


@dataclass(frozen=True)
class Asked:
    """Request of the command line: scenario, bound, queue, seconds of load per variant, repeats."""

    scenario: str
    bound: Bound
    batching: Batching
    seconds: float
    repeats: int

    @property
    def test_s(self) -> float:
        """Least length of a test, seconds."""
        searches = 2 + WIDE_TESTS + (1 + NARROW_TESTS) * self.repeats
        return max(LEAST_TEST_S, self.seconds / (searches if self.scenario == "server" else self.repeats))

    def search_s(self, resolution: float) -> float:
        """Least length of a test in a search, seconds: long enough for an overload to break the bound.

        If queries come `resolution` times as fast as they can be answered, the last query of a test of `s` seconds
        waits `(resolution - 1) * s` for those before it, and a percentile waits its share of that. In a shorter test
        such a load would hold, and would be mistaken for one that can be sustained.

        Args:
            resolution: of the search.
        """
        return max(self.test_s, self.bound.seconds / ((resolution - 1) * self.bound.percentile / 100))

    @property
    def load_s(self) -> float:
        """Seconds of load that a variant is expected to take."""
        if self.scenario != "server":
            return self.repeats * self.test_s
        searches_s = WIDE_TESTS * self.search_s(WIDE_END) + self.repeats * NARROW_TESTS * self.search_s(NARROW_END)
        return (2 + self.repeats) * self.test_s + searches_s


@dataclass
class Contender:
    """A variant being served.

    Attributes:
        described: the case.
        batching: what its queue may do.
        tests: all of them.
        searches: of each repeat its end, and the test that held highest.
        gates: the gate's events of all its processes.
        offlines: queries per second when all are there at once, of each process.
        fields: of its record that are known otherwise.
        start_qps, most_qps: load that the repeats begin with, and one that nothing can bear.
    """

    described: Described
    batching: Batching
    tests: list[LoadTest] = field(default_factory=list)
    searches: list[tuple[Bracket, LoadTest | None]] = field(default_factory=list)
    gates: list[Event] = field(default_factory=list)
    offlines: list[float] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    start_qps: float = 0.0
    most_qps: float = 0.0

    @property
    def name(self) -> str:
        """Name of the variant."""
        return self.described.case.variant

    @property
    def lost(self) -> bool:
        """Return whether it dropped out."""
        return "status" in self.fields or "reason" in self.fields


class Serving:
    """One workload's variants under load.

    Args:
        asked: for what.
        settings: of the workers.
        folder: the run's.
        console: told what goes on.
        seed: of gates, orders and arrivals.
        idle: the counter of energy before anything was served.
    """

    def __init__(self, asked: Asked, settings: Settings, folder: Path, console: Console, seed: int, idle: Idle) -> None:
        self.asked, self.settings, self.folder, self.console, self.idle = asked, settings, folder, console, idle
        self._forks: list[ForkServer] = []
        self._random = random.Random(seed)  # noqa: S311 - orders and arrivals

    def run(self, cases: Sequence[tuple[Described, Batching]]) -> list[ServingRecord]:
        """Serve all variants; a failure of one affects only its own record."""
        try:
            # Children of one parent share its address layout, so the repeats have parents of their own. What asks for a
            # GPU leaves a process that cannot be forked (`bench.run.forks`).
            only_cpu = all(described.case.device == "cpu" for described, _ in cases)
            parents = [()] * (min(PARENTS, self.asked.repeats) if only_cpu else 0)
            with fork_servers(self.settings, self.folder / "workers.log", parents) as forks:
                self._forks = forks
                return self._run(cases)
        except WorkerError as error:
            msg = f"no worker can be started: {error.reason}"
            raise UsageError(msg) from error

    def _run(self, cases: Sequence[tuple[Described, Batching]]) -> list[ServingRecord]:
        candidates = [Contender(described, batching) for described, batching in cases]
        for candidate in candidates:
            if candidate.described.unavailable:
                candidate.fields |= {"status": Status.UNAVAILABLE, "reason": candidate.described.unavailable}
        if self.asked.scenario == "server":
            for candidate in candidates:
                self._in_process(candidate, "single stream, offline, wide search", self._first)
        for number in range(1, self.asked.repeats + 1):
            order = [candidate for candidate in candidates if not candidate.lost]
            self._random.shuffle(order)
            for candidate in order:
                self._in_process(candidate, f"repeat {number} of {self.asked.repeats}", self._repeat)
        return [self._recorded(candidate) for candidate in candidates]

    def _in_process(self, candidate: Contender, what: str, step: Any) -> None:
        """Take a step with a variant in a fresh process; a failure affects only this variant."""
        if candidate.lost:
            return
        self.console.status(f"{candidate.name}: {what}")
        case = candidate.described.case
        settings = self.settings.with_environment(candidate.described.environment)
        forks = self._forks[len(candidate.searches) % len(self._forks)] if self._forks else None
        try:
            with scratch_folder() as scratch:
                worker = Worker(settings, self.folder / "workers.log", scratch / "cache", forks)
                kept = self.folder / "loadgen"
                energy = self.idle.available
                with ServedVariant(worker, case, candidate.batching, scratch, kept, BUILD_LIMIT_S, energy) as served:
                    self._guarded(candidate, served, step)
        except WorkerError as error:
            candidate.fields |= {"status": error.status, "reason": error.reason}

    def _guarded(self, candidate: Contender, served: ServedVariant, step: Any) -> None:
        """Gate, take a step, gate again."""
        refused = served.begin(self._seed())
        if not refused and not served.unavailable:
            step(candidate, served)
            refused = served.end(self._seed())
        if served.unavailable:
            candidate.fields |= {"status": Status.UNAVAILABLE, "reason": served.unavailable}
        elif refused:
            candidate.fields |= {"status": Status.PARITY_FAILED, "reason": refused}
        candidate.gates += served.gates

    def _first(self, candidate: Contender, served: ServedVariant) -> None:
        """One query alone, all at once, and a wide search."""
        single = self._single(candidate, served, "single-stream")
        if single.verdict is LoadVerdict.HELD:
            candidate.fields |= {"single_p50_s": single.result.percentile(50)}
            candidate.fields |= {"single_p99_s": single.result.percentile(99)}
        candidate.most_qps = candidate.batching.largest * single.result.qps
        alone_s = single.result.percentile(self.asked.bound.percentile)
        if single.verdict is LoadVerdict.HELD and alone_s > self.asked.bound.seconds:
            candidate.fields["reason"] = (
                f"the bound does not hold even for one query after the other: p{self.asked.bound.percentile:g} was "
                f"{1e3 * alone_s:.3g} ms"
            )
            return
        most = self._offline(candidate, served, "offline").result.qps
        candidate.most_qps = MOST * most
        steps = SearchSteps(BEGIN * most, WIDE, WIDE_END, LEAST * most, MOST * most)
        found = self._search(candidate, served, "search", steps)[0]
        candidate.start_qps = found.held or 0.0
        if found.held is None:
            last = candidate.tests[-1]
            candidate.fields["reason"] = self._none_held(last)

    def _none_held(self, last: LoadTest) -> str:
        bound = self.asked.bound
        if last.verdict is LoadVerdict.INVALID:
            return f"no valid test even at {last.target_qps:.3g} queries per second: {last.reason}"
        told_ms = 1e3 * (last.result.by_loadgen(bound.percentile) or last.result.percentile(bound.percentile))
        return (
            f"the bound does not hold even at {last.target_qps:.3g} queries per second: p{bound.percentile:g} was "
            f"{told_ms:.3g} ms"
        )

    def _repeat(self, candidate: Contender, served: ServedVariant) -> None:
        number = len(candidate.searches) + 1
        phase = f"repeat {number}"
        if self.asked.scenario == "server":
            self._offline(candidate, served, "offline")
            most = candidate.most_qps
            steps = SearchSteps(candidate.start_qps, NARROW, NARROW_END, LEAST / MOST * most, most)
            candidate.searches.append(self._search(candidate, served, phase, steps))
            return
        if self.asked.scenario == "offline":
            if not candidate.most_qps:
                alone = self._single(candidate, served, "single-stream")
                candidate.most_qps = candidate.batching.largest * alone.result.qps
            test = self._offline(candidate, served, phase)
        else:
            test = self._single(candidate, served, phase)
        held = test.verdict is LoadVerdict.HELD
        candidate.searches.append((Bracket(test.result.qps if held else None, None), test if held else None))

    def _search(
        self, candidate: Contender, served: ServedVariant, phase: str, steps: SearchSteps
    ) -> tuple[Bracket, LoadTest | None]:
        """Search for the highest load that holds; returns its end, and the test that held highest."""
        tests: dict[float, LoadTest] = {}
        least_s = self.asked.search_s(steps.resolution)

        def at(load: float) -> LoadVerdict:
            tests[load] = self._test(candidate, served, phase, "server", load, least_s)
            return tests[load].verdict

        found = highest(at, steps)
        return found, None if found.held is None else tests[found.held]

    def _single(self, candidate: Contender, served: ServedVariant, phase: str) -> LoadTest:
        """Measure one query after the other; repeat with more time if calls were slower than the first ones."""
        test = self._test(candidate, served, phase, "single-stream", FASTER / served.single_s)
        if test.verdict is LoadVerdict.INVALID:
            test = self._test(candidate, served, phase, "single-stream", FASTER / 2 * test.result.qps)
        return test

    def _offline(self, candidate: Contender, served: ServedVariant, phase: str) -> LoadTest:
        """Measure all queries at once; repeat with more queries if they were done too soon."""
        # A batch takes at least as long as one of its queries alone.
        expected = min(candidate.batching.largest / served.largest_s, candidate.most_qps)
        test = self._test(candidate, served, phase, "offline", expected)
        if test.verdict is LoadVerdict.INVALID:
            test = self._test(candidate, served, phase, "offline", 1.5 * max(expected, test.result.qps))
        if test.verdict is LoadVerdict.HELD:
            candidate.offlines.append(test.result.qps)
        return test

    def _test(
        self,
        candidate: Contender,
        served: ServedVariant,
        phase: str,
        scenario: str,
        qps: float,
        least_s: float | None = None,
    ) -> LoadTest:
        bound, test_s = self.asked.bound, self.asked.test_s if least_s is None else least_s
        # A percentile needs its queries, however slowly they come.
        needed_s = 0.0 if scenario == "offline" else bound.least_queries / qps * (FASTER if scenario != "server" else 1)
        most_s = max(2 * test_s, min(LONGEST_TEST_S, 3 * needed_s)) + 1.0
        began = time.perf_counter()
        test = served.test(phase, scenario, qps, test_s, most_s, bound, self._random.randrange(1 << 31))
        candidate.tests.append(test)
        case = candidate.described.case
        serving.append_tests(self.folder, [test.row(case.workload, case.variant)])
        load = "" if test.target_qps is None else f" at {test.target_qps:.4g} queries/s"
        self.console.say(
            f"{candidate.name} {phase}{load}: {test.verdict}, p{bound.percentile:g} "
            f"{1e3 * test.result.percentile(bound.percentile):.3g} ms, {time.perf_counter() - began:.1f} s", "dim",
        )  # fmt: skip
        return test

    def _recorded(self, candidate: Contender) -> ServingRecord:
        """Write the record of a variant."""
        case, asked = candidate.described.case, self.asked
        fields: dict[str, Any] = {
            "workload": case.workload, "variant": case.variant, "mode": case.mode, "device": case.device,
            "threads": case.threads, "precision": candidate.described.facts.get("precision", ""),
            "scenario": asked.scenario, "percentile": asked.bound.percentile,
            "bound_s": asked.bound.seconds or None, "largest_batch": candidate.batching.largest,
            "longest_wait_s": candidate.batching.wait_s, "lengths": candidate.batching.lengths,
            "batching": candidate.batching.kind,
        }  # fmt: skip
        if candidate.tests:
            disturbed = sum(bool(test.why) for test in candidate.tests) / len(candidate.tests)
            fields["disturbed_share"] = disturbed
        fields |= nearest(candidate.gates, ("parity", "batched"))
        if "status" not in candidate.fields:
            fields |= self._figures(candidate)
        record = ServingRecord(**(fields | candidate.fields))
        if record.status is not Status.OK:
            # A refused variant gets no figures.
            record = dataclasses.replace(record, single_p50_s=None, single_p99_s=None)
        return serving.append(self.folder, record)

    def _figures(self, candidate: Contender) -> dict[str, Any]:
        """Return the findings of the repeats."""
        return self._offline_figures(candidate) | self._load_figures(candidate)

    def _offline_figures(self, candidate: Contender) -> dict[str, Any]:
        """Queries a second when all are there at once, next to the load of a search."""
        if self.asked.scenario != "server" or not candidate.offlines:
            return {}
        fields = {"offline_qps": statistics.median(candidate.offlines)}
        if (found := spread(candidate.offlines)) is not None:
            fields |= {"offline_qps_lo": found.low, "offline_qps_hi": found.high}
        return fields

    def _load_figures(self, candidate: Contender) -> dict[str, Any]:
        """The load, and the latencies of the test at it."""
        good = [
            (bracket, test)
            for bracket, test in candidate.searches
            if test is not None and (self.asked.scenario != "server" or bracket.limit is LoadVerdict.BROKEN)
        ]
        if not good:
            return {"reason": "" if not candidate.searches else self._why_none(candidate)}
        energy = energy_figures([test for _, test in good if test is not None], self.idle)
        held = [bracket.held or 0.0 for bracket, _ in good]
        above = [bracket.above for bracket, _ in good if bracket.above is not None]
        found = spread(held, above if self.asked.scenario == "server" else None)
        middle = statistics.median_low(held)
        test = next(test for bracket, test in good if bracket.held == middle and test is not None)
        fields = {"qps": middle, "repeats": len(good)} | test.fields() | energy
        if found is not None:
            fields |= {"qps_lo": min(middle, found.low), "qps_hi": max(middle, found.high)}
        return fields

    def _why_none(self, candidate: Contender) -> str:
        bracket = candidate.searches[-1][0]
        if bracket.above is None and bracket.held is not None:
            return f"the bound held at all loads, up to {bracket.held:.4g} queries per second"
        invalid = [test for test in candidate.tests if test.verdict is LoadVerdict.INVALID]
        return f"no valid end of the search: {(invalid or candidate.tests)[-1].reason}"

    def _seed(self) -> int:
        return self._random.randrange(1 << 30)
