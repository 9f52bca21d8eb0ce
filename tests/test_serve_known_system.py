"""Serving a system whose right answers are known: batches of a fixed size that take a fixed time.

It answers size / time queries per second when all are there at once, and bears no more than that under any bound.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from powercap import PlantedPower

from bench.console import Console
from bench.machine.energy import Idle, Rapl
from bench.plan.cases import Case
from bench.records import serving
from bench.records.serving import ServingRecord
from bench.serve import load_test, measure
from bench.serve.energy_figures import energy_figures
from bench.serve.load_test import Batching, Bound, ServedVariant, judged
from bench.serve.loadgen_logs import LoadGenResult
from bench.serve.measure import Asked, Serving
from bench.serve.search import LoadVerdict
from bench.timing.query_energy import QueryEnergy
from bench.worker import serving as worker_serving
from bench.worker.serving import Server

CASE = Case("seed", "fixed", "inference", "cpu", 1)
UNCOUNTED = Idle(reason="planted: none")
#: A batch of so many takes so long, seconds.
SIZE, TAKES_S = 8, 0.01
RIGHT_QPS = SIZE / TAKES_S


class SimulatedVariant:
    """A queue and a system of fixed speed in simulated time, asked as `ServedVariant` is, without LoadGen."""

    single_s = largest_s = TAKES_S

    def __init__(self, batching: Batching) -> None:
        self.batching = batching

    def test(self, phase, scenario, qps, duration_s, most_s, bound, seed):
        """One test as LoadGen would make it."""
        del most_s
        arrivals = self.arrivals(scenario, qps, duration_s, bound, seed)
        if scenario == "single-stream":
            done = arrivals + TAKES_S
        else:
            done = self.served(arrivals, self.batching.wait_s if scenario == "server" else 0.0)
        latencies, lasted_s = done - arrivals, float(done[-1])
        told = float(np.percentile(latencies, bound.percentile, method="inverted_cdf"))
        unsatisfied = []
        if scenario != "server" and lasted_s < duration_s:
            unsatisfied.append("Min duration")
        elif scenario == "server" and told > bound.seconds:
            unsatisfied.append("Performance constraints")
        verdict = "INVALID" if unsatisfied else "VALID"
        result = LoadGenResult(verdict, tuple(unsatisfied), {bound.percentile: told}, len(done) / lasted_s,
                               latencies, np.zeros(len(done)))  # fmt: skip
        served = {"batches": 1, "together": 1, "waste": 0.0, "busy_s": 0.0, "queries": len(done)}
        served |= {"energy_j": None, "energy_queries": None, "energy_s": None}
        return judged(phase, qps, result, served, {"cpu_s": 0.0, "wall_s": lasted_s}, bound, "")

    @staticmethod
    def arrivals(scenario, qps, duration_s, bound, seed):
        """When queries are there, seconds: all at once, one after the other, or by Poisson."""
        if scenario == "offline":
            return np.zeros(int(1.1 * qps * duration_s) + 1)
        if scenario == "single-stream":
            return TAKES_S * np.arange(max(bound.least_queries, int(duration_s / TAKES_S) + 1))
        count = max(bound.least_queries, int(2 * qps * duration_s))
        drawn = np.cumsum(np.random.default_rng(seed).exponential(1 / qps, count))
        return drawn[: max(bound.least_queries, int(np.searchsorted(drawn, duration_s)))]

    def served(self, arrivals, wait_s):
        """When each query is done: a batch leaves when it is full, or when its oldest has waited long enough."""
        done, free_s, place = np.empty_like(arrivals), 0.0, 0
        while place < len(arrivals):
            full = place + self.batching.largest - 1
            filled_s = arrivals[full] if full < len(arrivals) else np.inf
            begins_s = max(free_s, min(filled_s, arrivals[place] + wait_s))
            after = min(place + self.batching.largest, int(np.searchsorted(arrivals, begins_s, "right")))
            free_s = begins_s + TAKES_S
            done[place:after] = free_s
            place = after
        return done


class SimulatedServing(Serving):
    """Serving in simulated time."""

    def _in_process(self, candidate, what, step):
        del what
        if not candidate.lost:
            step(candidate, SimulatedVariant(candidate.batching))


def simulated(folder, bound: Bound, seconds: float = 5.0, repeats: int = 3) -> ServingRecord:
    """The record of the system under a bound."""
    batching = Batching(SIZE, 0.1 * bound.seconds, "padded")
    asked = Asked("server", bound, batching, seconds, repeats)
    described = SimpleNamespace(case=CASE, facts={}, unavailable=None)
    (record,) = SimulatedServing(asked, None, folder, Console(), 1, UNCOUNTED)._run([(described, batching)])
    return record


@pytest.mark.parametrize(("device", "parents"), [("cpu", 3), ("cuda", 0)])
def test_workers_with_a_gpu_are_not_forked(monkeypatch, tmp_path, device, parents):
    """As in a run: a process that has asked for a GPU cannot be forked, and nobody says that its parent did not."""
    asked = []

    @contextlib.contextmanager
    def servers(settings, log, modules):
        del settings, log
        asked.append(len(modules))
        yield []

    monkeypatch.setattr(measure, "fork_servers", servers)
    described = SimpleNamespace(case=Case("seed", "fixed", "inference", device, 1), facts={}, unavailable="not here")
    request = Asked("server", Bound(99, 0.04), Batching(SIZE, 0.0, "padded"), 5.0, 3)
    SimulatedServing(request, None, tmp_path, Console(), 1, UNCOUNTED).run([(described, request.batching)])
    assert asked == [parents]


def test_the_gpu_is_looked_at_while_queries_are_served(monkeypatch, tmp_path):
    """A GPU that is slowed, or that others use, makes a test doubtful, too."""
    asked = []
    monkeypatch.setattr(load_test.interference, "judge", lambda *arguments: asked.append(arguments[2:]) or 1 / 0)
    monkeypatch.setattr(load_test, "read_logs", lambda _: None)

    def generate(task, limit_s):
        del limit_s
        (Path(task["folder"]) / load_test.SUMMARY).touch()
        return {"process_s": 0.0}

    monkeypatch.setattr(load_test, "generate", generate)
    worker = SimpleNamespace(ask=lambda *_, **__: iter([{"event": "listening"}, {"event": "served", "cpu_s": 0.0}]))
    case = Case("seed", "fixed", "inference", "cuda", 1)
    served = ServedVariant(worker, case, Batching(SIZE, 0.0, "padded"), tmp_path, tmp_path / "kept", 1.0)
    with pytest.raises(ZeroDivisionError):
        served.test("offline", "offline", 1.0, 1.0, 1.0, Bound(99, 0.04), 1)
    assert asked == [("cuda",)]


@pytest.mark.parametrize("bound", [Bound(99, 0.04), Bound(90, 0.15), Bound(95, 0.5), Bound(50, 0.2)])
def test_no_bound_lets_a_system_bear_more_than_it_can_do(bound, tmp_path):
    """However few seconds are asked for: a test is so long that the backlog of too high a load breaks the bound."""
    record = simulated(tmp_path, bound)
    assert record.offline_qps == pytest.approx(RIGHT_QPS, rel=0.02)
    assert record.offline_qps_lo <= record.offline_qps <= record.offline_qps_hi
    assert 0.5 * RIGHT_QPS < record.qps <= serving.RESOLUTION * RIGHT_QPS
    assert serving.beyond_offline(record) == ""
    if bound.seconds > 10 * TAKES_S:
        # So late a bound costs next to nothing of what can be done.
        assert record.qps > 0.85 * RIGHT_QPS


def test_tests_that_are_too_short_are_found_out_by_the_offline_rate(tmp_path, monkeypatch):
    """In a quarter of a second half as much again as is possible keeps a bound of 0.15 s."""
    monkeypatch.setattr(Asked, "search_s", lambda self, _: self.test_s)
    record = simulated(tmp_path, Bound(90, 0.15), seconds=1.0)
    assert record.qps > 1.3 * RIGHT_QPS
    assert "fixed on seed seems to sustain" in serving.beyond_offline(record)


def test_a_load_to_be_distrusted_is_marked():
    """In the table, and in a line of its own."""
    shown = ServingRecord(workload="seed", variant="fixed", scenario="server", qps=1500.0, qps_lo=1400.0, qps_hi=1600.0,
                          offline_qps=800.0, offline_qps_lo=780.0, offline_qps_hi=820.0)  # fmt: skip
    assert serving.load_text(shown) == "~1500 [1400, 1600]"
    told = serving.beyond_offline(shown)
    assert "seems to sustain 1500 [1400, 1600] queries/s, but answers 800 [780, 820] when all are there at once" in told


@pytest.mark.parametrize(
    ("load", "offline"),
    [
        ({"qps": 900.0, "qps_lo": 700.0, "qps_hi": 1100.0}, {"offline_qps": 800.0}),
        ({"qps": 900.0}, {"offline_qps": 800.0, "offline_qps_lo": 700.0, "offline_qps_hi": 900.0}),
        ({"qps": 820.0, "qps_lo": 815.0, "qps_hi": 825.0}, {"offline_qps": 800.0}),
        ({"qps": 900.0}, {}),
        ({}, {"offline_qps": 800.0}),
    ],
)
def test_a_load_within_the_doubts_is_not_distrusted(load, offline):
    """Those of both figures, and what a search cannot tell."""
    assert serving.beyond_offline(ServingRecord(scenario="server", **load, **offline)) == ""


def test_the_length_of_tests_follows_from_bound_and_resolution():
    """A load 6 % too high makes the 99th percentile later by 59 ms a second; a short bound needs no more than usual."""
    asked = Asked("server", Bound(99, 0.594), Batching(8, 0.01, "padded"), 26.0, 5)
    assert asked.test_s == 1.0
    assert asked.search_s(1.06) == pytest.approx(10.0)
    assert asked.load_s == pytest.approx(7 + 4 * 0.594 / 0.198 + 15 * 10)
    assert Asked("server", Bound(99, 0.02), asked.batching, 26.0, 5).search_s(1.06) == 1.0


class FixedServer(Server):
    """The worker's own queue and socket before a system that sleeps."""

    def __init__(self, takes_s: float, size: int) -> None:
        self.takes_s, self.largest, self.wait_s, self.case = takes_s, size, 0.01, CASE
        self.bucket_of = lambda _: 0
        self.executable = SimpleNamespace(context=contextlib.nullcontext)
        self.library = SimpleNamespace(lengths=((1,),) * 64, gather=lambda samples: samples)

    def run(self, batch):
        """Take the time of a batch, whatever is in it."""
        del batch
        time.sleep(self.takes_s)
        return {}


class FixedWorker:
    """A worker in a thread of this process."""

    def __init__(self, server: FixedServer) -> None:
        self.server = server

    def ask(self, request, limit_s, *, action, path, scenario, energy):
        """Serve one test."""
        del request, limit_s, action
        events: queue.Queue = queue.Queue()

        def emit(event, **fields):
            events.put({"event": event, **fields})

        thread = threading.Thread(target=self.server.load, args=(path, emit, scenario), kwargs={"energy": energy})
        thread.start()
        yield events.get(timeout=30)
        yield events.get(timeout=30)
        thread.join()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A system that takes 20 ms for a batch of 4, and a package that takes 30 W."""
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    cap = tmp_path / "cap"
    batching = Batching(4, 0.01, "padded")
    variant = ServedVariant(FixedWorker(FixedServer(0.02, 4)), CASE, batching, tmp_path, tmp_path / "kept", 60.0, True)
    variant._samples = 64
    with PlantedPower(cap, 30.0):
        monkeypatch.setattr(worker_serving, "counter_if_any", lambda _: Rapl(cap))
        yield variant


def test_loadgen_finds_what_a_known_system_can_do(served):
    """All at once: 200 queries per second at 30 W, so 0.15 J each; half of it is borne, and half as much again is not.

    The bound is five times what a batch takes.
    """
    bound = Bound(90, 0.1)
    length_s = Asked("server", bound, served.batching, 1.0, 5).search_s(measure.WIDE_END)
    offline = served.test("offline", "offline", 200.0, 0.5, 5.0, bound, 1)
    assert offline.verdict is LoadVerdict.HELD
    # On a busy machine a sleep lasts longer, and never less.
    assert 0.75 * 200 < offline.result.qps <= 1.02 * 200
    assert offline.energy_queries >= 0.9 * offline.queries
    assert offline.energy_j / offline.energy_queries == pytest.approx(30 / offline.result.qps, rel=0.1)
    found = {load: served.test("repeat 1", "server", load, length_s, 5.0, bound, 2) for load in (100.0, 300.0)}
    assert found[100.0].verdict is LoadVerdict.HELD
    assert found[300.0].verdict is LoadVerdict.BROKEN
    idle = Idle("RAPL package-0", 10.0, 1e-3)
    figures = energy_figures([offline, offline], idle)
    assert (figures["energy"], figures["idle_power_w"]) == ("RAPL package-0", 10.0)
    assert figures["power_w"] == pytest.approx(30.0, rel=0.05)
    assert figures["energy_per_query_lo_j"] <= figures["energy_per_query_j"] <= figures["energy_per_query_hi_j"]
    row = offline.row("seed", "fixed")
    assert set(row) == set(serving.TEST_COLUMNS)


def test_a_counter_that_cannot_tell_gives_no_figure():
    """None, one that no test read, one that moves too seldom, or one that stood still: the reason is in the record."""
    tested = SimpleNamespace(energy_j=1.0, energy_queries=10, energy_s=0.5)
    unread = SimpleNamespace(energy_j=None, energy_queries=None, energy_s=None)
    still = SimpleNamespace(energy_j=0.0, energy_queries=10, energy_s=0.5)
    for tests, idle, told in (
        ([tested], UNCOUNTED, "unavailable: planted: none"),
        ([unread], Idle("NVML", 60.0, 0.01), "no test has a reading"),
        ([tested], Idle("NVML", 60.0, 0.1), "NVML moves every 100 ms and a test took 0.5 s; it takes more --budget"),
        ([still], Idle("NVML", 60.0, 0.01), "did not move in a test"),
    ):
        found = energy_figures(tests, idle)
        assert told in found["energy"]
        assert set(found) == {"energy", "idle_power_w"}


def test_energy_counts_up_to_the_last_reading():
    """Answers after it are in neither; what comes after the last answer is in none."""
    now, shown = [0.0], [0]
    counter = SimpleNamespace(read=lambda: (shown[0],), joules=lambda before, after: float(after[0] - before[0]))
    found = QueryEnergy(counter, lambda: now[0])
    for moment, joules, queries in ((0.0, 5, 0), (0.004, 6, 2), (0.02, 9, 3), (0.024, 12, 4)):
        now[0], shown[0] = moment, joules
        found.begin()
        found.answered(queries)
    now[0], shown[0] = 9.0, 500
    assert found.fields() == {"energy_j": 4.0, "energy_queries": 5, "energy_s": 0.02}
    assert QueryEnergy(None).fields()["energy_j"] is None
