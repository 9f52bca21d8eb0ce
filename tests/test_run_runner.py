"""The parent: whatever a variant does, its record says so, and the others are measured all the same.

First the real thing, with a planted variant for each way to fail; then the parent alone, with workers that play a
part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from warm_workers import BRIEF_CEILINGS

from bench.__main__ import parser
from bench.console import Console
from bench.machine import environment
from bench.machine.core_distance import CoreDistance
from bench.machine.interference import Interference
from bench.plan.cases import LEAST_ROUNDS, Case, Group, Suite
from bench.records.block import Block, Turn
from bench.records.folder import RunFolder
from bench.records.rounds import CLEAN_PROCESSES, LEAST_CLEAN, Round
from bench.records.schema import COLUMNS, SAMPLE_COLUMNS, SCHEMA_VERSION, Record, Status
from bench.run import group as measurement
from bench.run import more, runner, seating
from bench.run.clock_check import Queued
from bench.run.planning import Described, Plan
from bench.run.runner import Runner
from bench.run.worker_process import Settings, WorkerError
from bench.timing import rounds as sampling

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "broken_variants.py"
WORKLOAD = "seed@batch=2,length=3"
SUITE = """
name = "planted"
summary = "one variant for each way to end"
budget_s = 1.5
interval = 0.9
processes = {processes}
case_limit_s = 5
[[select]]
workloads = ["{workload}"]
variants = {variants}
modes = ["{mode}"]
"""
FAILING = {
    "segfault": (Status.CRASHED, "signal 11 (SIGSEGV), during: first call"),
    "allocates-too-much": (Status.OOM, "can't allocate memory"),
    "killed": (Status.CRASHED, "signal 9 (SIGKILL), during: first call"),
    "hangs": (Status.TIMEOUT, "not ended within the limit of 5 s"),
    "raises": (Status.ERROR, "NotImplementedError: planted: the kernel does not take this"),
    "wrong": (Status.PARITY_FAILED, "outputs: error "),
    "wrong-when-warm": (Status.PARITY_FAILED, "(gate after the rounds)"),
    "segfault-when-timed": (Status.CRASHED, "signal 11 (SIGSEGV), during: turn"),
    "nowhere": (Status.UNAVAILABLE, "planted: it needs a machine that nobody has"),
}
HEALTHY = ("reference", "loop", "talkative")
TIMING = [
    name
    for name in COLUMNS
    if name.startswith(("latency_", "throughput_", "speedup", "interval_", "device_p50"))
    or name in {"samples", "calls", "processes", "disturbed"}
]
EXPECTED_FILES = {"records.jsonl", "records.csv", "samples.csv.gz", "environment.json", "report.html"}


def command(folder: Path, variants: list[str], mode: str, processes: int) -> list[str]:
    """Words of the command line that measures these variants into `folder / "run"`."""
    suite = folder / "planted.toml"
    suite.write_text(
        SUITE.format(workload=WORKLOAD, variants=json.dumps(variants), mode=mode, processes=processes), encoding="utf-8"
    )
    options = ["--suite", str(suite), "--plugin", str(PLUGIN), "--plugin", str(BRIEF_CEILINGS), "--threads", "1"]
    return ["run", *options, "--out", str(folder / "run")]


@pytest.fixture(scope="module")
def planted(warm_workers, tmp_path_factory):
    """A run with every plant in one group: how it ended, and its folder."""
    folder = tmp_path_factory.mktemp("planted")
    return warm_workers.run(*command(folder, [*HEALTHY, *FAILING], "inference", processes=1)), folder / "run"


@pytest.fixture(scope="module")
def records(planted) -> dict[str, dict[str, Any]]:
    """The planted run's records by variant."""
    lines = (planted[1] / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["variant"]: record for record in map(json.loads, lines)}


@pytest.mark.slow
def test_a_run_with_failures_ends_with_1_and_all_its_files(planted):
    """No plant ends the run; it says so by its exit code, in one line per case, and without a traceback."""
    done, folder = planted
    assert done.returncode == 1, done.stderr
    assert {path.name for path in folder.iterdir()} >= EXPECTED_FILES
    assert "Traceback" not in done.stdout + done.stderr
    for variant in FAILING:
        assert any(f" {variant} " in line for line in done.stdout.splitlines())


@pytest.mark.slow
def test_every_case_has_one_record(planted, records):
    """As many lines as cases, in the table too."""
    lines = (planted[1] / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(records) == len(HEALTHY) + len(FAILING)
    table = pd.read_csv(planted[1] / "records.csv")
    assert list(table["variant"]) == list(records)
    assert tuple(table.columns) == COLUMNS


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAILING)
def test_a_failure_is_told_by_status_and_reason(records, variant):
    """The record says how the case ended and why, in one line."""
    status, reason = FAILING[variant]
    assert records[variant]["status"] == status
    assert reason in records[variant]["reason"]
    assert "\n" not in records[variant]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAILING)
def test_what_is_not_right_has_no_time(records, variant):
    """No figure of timing stands in the record of a case that is not ok, also when it was timed before it failed."""
    assert {name: records[variant][name] for name in TIMING if records[variant][name] is not None} == {}


@pytest.mark.slow
def test_what_is_refused_has_no_samples(planted):
    """Raw times of a variant that the gate refused after the rounds are not kept."""
    samples = pd.read_csv(planted[1] / "samples.csv.gz")
    assert tuple(samples.columns) == tuple(SAMPLE_COLUMNS)
    assert set(samples["variant"]) == set(HEALTHY)


@pytest.mark.slow
@pytest.mark.parametrize("variant", HEALTHY)
def test_a_healthy_variant_is_measured_beside_the_failing_ones(records, variant):
    """The reference, the loop, and one that prints all the time: ok, with times, parity, memory and evidence."""
    record = records[variant]
    assert (record["status"], record["reason"]) == ("ok", "")
    p50 = [record[name] for name in ("latency_p50_lo_s", "latency_p50_s", "latency_p50_hi_s")]
    # Left out where a busy machine's few calls cannot bound it.
    assert p50 == [None] * 3 or p50 == sorted(p50)
    assert record["speedup_lo"] <= record["speedup"] <= record["speedup_hi"]
    assert record["samples"] >= 2
    assert record["throughput_seq_per_s"] > 0
    assert 0 <= record["parity_error"] <= record["parity_limit"]
    assert record["memory_baseline_bytes"] > 0
    assert record["evidence"]
    assert record["ran_operators"]
    assert record["ran_threads"] == 1


@pytest.mark.slow
def test_the_reference_is_its_own_yardstick(records):
    """Its speedup is 1, whatever failed around it."""
    assert [records["reference"][name] for name in ("speedup", "speedup_lo", "speedup_hi")] == [1, 1, 1]


@pytest.mark.slow
def test_a_refused_case_says_by_how_much(records):
    """Error and limit of the gate stand in the record."""
    for variant in ("wrong", "wrong-when-warm"):
        assert records[variant]["parity_error"] > records[variant]["parity_limit"] > 0
        assert records[variant]["parity_worst"]


@pytest.mark.slow
def test_facts_known_beforehand_are_in_every_record(records):
    """Sizes, source and schema are told of a failed case too."""
    for record in records.values():
        assert (record["batch"], record["source_steps"], record["hidden_size"]) == (2, 3, 16)
        assert (record["workload"], record["mode"], record["device"], record["threads"]) == (
            WORKLOAD,
            "inference",
            "cpu",
            1,
        )
        assert record["schema_version"] == SCHEMA_VERSION
        assert record["recorded_at"]


@pytest.mark.slow
def test_the_environment_is_written_with_the_run(planted):
    """Machine, versions, threads, source tree, command, and the load before and after."""
    facts = json.loads((planted[1] / "environment.json").read_text(encoding="utf-8"))
    assert {"processor", "caches", "cores_physical", "cores_logical"} <= set(facts["machine"])
    assert {"python", "torch", "numpy"} <= set(facts["software"])
    assert facts["threads"]["workers"]["OMP_NUM_THREADS"] == "1"
    assert facts["git"]["commit"]
    assert facts["run"]["suite"] == "planted"
    assert "--suite" in facts["run"]["command"]
    assert facts["run"]["duration_s"] > 0
    assert set(facts["load"]) == {"before", "after"}


@pytest.mark.slow
def test_a_run_where_all_that_can_run_is_right_ends_with_0(warm_workers, tmp_path):
    """Unavailable variants are no failure; the others' figures can be computed again from the samples."""
    done = warm_workers.run(*command(tmp_path, ["reference", "loop", "nowhere"], "training", processes=2))
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "run" / "records.csv").set_index("variant")
    assert dict(table["status"]) == {"nowhere": "unavailable", "reference": "ok", "loop": "ok"}
    assert table.loc[["nowhere"], "reason"].notna().all()
    measured = table.loc[["reference", "loop"]]
    assert (measured["processes"] >= 2).all()
    assert (measured["grad_error"] <= measured["grad_limit"]).all()
    samples = pd.read_csv(tmp_path / "run" / "samples.csv.gz")
    assert {0, 1} <= set(samples["process"])
    for variant, record in measured.iterrows():
        kept = recomputed(samples, str(variant))
        assert len(kept) == record["calls"]
        assert kept.groupby("process")["round"].nunique().sum() == record["samples"]
        typical_s = kept.groupby(["process", "round"])["wall_s"].median().median()
        assert record["batch"] / typical_s == pytest.approx(record["throughput_seq_per_s"])
        if pd.notna(record["latency_p50_s"]):
            assert kept["wall_s"].median() == pytest.approx(record["latency_p50_s"])


def recomputed(samples: pd.DataFrame, variant: str) -> pd.DataFrame:
    """The calls that a record's figures are made of: of each process that has enough of them, the clean rounds.

    All rounds of the others count too, or only the clean ones, if they have some, where enough processes are clean.
    """
    clean, spoilt = [], []
    for _, calls in samples.groupby("process"):
        own = calls[calls["variant"] == variant]
        rounds, fine = calls["round"].nunique(), calls[calls["disturbed"] == 0]["round"].nunique()
        if fine >= LEAST_ROUNDS or 2 * fine > rounds:
            clean.append(own[own["disturbed"] == 0])
        else:
            spoilt.append(own)
    spoilt = [calls for calls in spoilt if len(calls)]
    if sum(len(calls) > 0 for calls in clean) >= min(CLEAN_PROCESSES, len(spoilt) + 1):
        few = [calls[calls["disturbed"] == 0] for calls in spoilt]
        return pd.concat([*clean, *(calls for calls in few if calls["round"].nunique() >= LEAST_CLEAN)])
    return pd.concat([*clean, *spoilt])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_what_it_has(number, code, tmp_path):
    """Ctrl-C ends with 130, SIGTERM with 143, without a traceback; the folder is complete and no worker is left."""
    line = [sys.executable, "-m", "bench", *command(tmp_path, ["nowhere", "hangs"], "inference", processes=1)]
    # A shell that starts something in the background has it ignore Ctrl-C, and children inherit that.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=listening,  # noqa: PLW1509 - no threads in the parent at that moment
    ) as process:
        try:
            first = tmp_path / "run" / "workers.log"
            wait_for(lambda: first.exists() and psutil.Process(process.pid).children())
            workers = psutil.Process(process.pid).children()
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, output
    assert "Traceback" not in output
    # The reference may still be in its cold run, which comes before what is unavailable.
    assert re.search(r"interrupted; (1 of 3 cases are recorded|no case is recorded yet) in ", output)
    assert f"python -m bench run --resume {tmp_path / 'run'}" in output
    assert not psutil.wait_procs(workers, timeout=10)[1]
    folder = tmp_path / "run"
    assert pd.read_csv(folder / "records.csv").shape[1] == len(COLUMNS)
    assert set(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["load"]) == {"before", "after"}


def wait_for(condition) -> None:
    """Wait until something holds, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.05)


# The parent alone: workers that play a part instead of the real ones.


def gate(variant: str, when: str, *, passed: bool = True, strain: float = 0.1) -> dict[str, Any]:
    """A gate's event."""
    fields = {"parity_error": strain, "parity_limit": 1.0, "grad_error": strain, "grad_limit": 1.0}
    event = {"event": "gate", "variant": variant, "when": when, "passed": passed, "strain": strain}
    return event | {"reason": "" if passed else "planted"} | fields | {"parity_worst": when}


class Actor:
    """Answers like a worker whose variants are all healthy, unless `dies` says otherwise.

    A call of the reference takes 2 s, one of any other 1 s, on the parent's clock, which is played too.

    Attributes:
        asked: all requests so far, of all workers, with the environment that each worker was started with.
        dies: called with each request and its variants; raises what a worker dies of.
        after: whether a variant passes the gate after the rounds.
        now: the parent's clock in its turns, seconds.
    """

    asked: list[dict[str, Any]]
    dies: Any
    after: dict[str, bool]
    now: list[float]
    #: Seconds that its clock counts in one of the parent's.
    speed = 1.0

    def __init__(self, settings: Settings, *_: object) -> None:
        self._environment = dict(settings.environment)
        self._ready: list[str] = []

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        """Stand still."""

    def go_on(self) -> None:
        """Go on."""

    def queued(self) -> Queued:
        """Never wait for a core."""
        return Queued(0.0, 0.0)

    def ask(self, request: str, limit_s: float, **fields: Any):
        """Play the request."""
        self.asked.append({"request": request, "limit_s": limit_s, "environment": self._environment, **fields})
        if request == "ceilings":
            self.dies(request, [])
            yield {"event": "ceilings", "threads": 1, "flops_per_s": {"fp32": 1e9}, "bytes_per_s": {"32768": 1e9}}
        elif request == "prepare":
            self.dies(request, [fields["case"]["variant"]])
        elif request == "cold":
            self.dies(request, [fields["case"]["variant"]])
            yield {"event": "cold", "fields": {"build_s": 0.5, "evidence": "played"}, "built": {}}
        elif request == "sit":
            self._ready = [case["variant"] for case in fields["cases"]]
            self.dies(request, self._ready)
            yield from (gate(name, "before") for name in self._ready)
        elif request == "turn":
            self.dies(request, [fields["name"]])
            yield {"event": "turn"} | self._turn(2.0 if fields["name"] == "reference" else 1.0).fields()
        else:
            assert request == "stand"
            self.dies(request, self._ready)
            yield from (gate(name, "after", passed=self.after.get(name, True)) for name in self._ready)

    def _turn(self, call_s: float) -> Turn:
        start_s = self.now[0]
        self.now[0] += call_s
        told_s = self.speed * call_s
        return Turn(Block((told_s,)), 0.0, self.speed * start_s, told_s, 0.0, 0.0)


def twenty(players, *_: object):
    """Twenty rounds, however long they take."""
    for number in range(20):
        yield Round(number, {name: player.turn().block for name, player in players.items()})


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Runs variants on played workers; returns the records by variant, and all requests."""

    def play(*variants: str, dies=lambda *_: None, after=None, work=None, alone=None, rounds=twenty, **suite: Any):
        played = {"asked": [], "dies": staticmethod(dies), "after": after or {}, "now": [0.0]}
        found = type("Played", (Actor,), played)
        monkeypatch.setattr(runner, "Worker", found)
        monkeypatch.setattr(runner, "fork_servers", lambda *_: contextlib.nullcontext([]))
        monkeypatch.setattr(seating, "time", types.SimpleNamespace(perf_counter=lambda: found.now[0]))
        monkeypatch.setattr(sampling, "rounds", rounds)
        monkeypatch.setattr(environment, "describe", lambda *_: {})
        monkeypatch.setattr(environment, "load", dict)
        cases = [Case("seed", name, "inference", "cpu", 1) for name in variants]
        facts = {"batch": 16, "valid_steps": 320, "precision": "fp32"}
        described = tuple(
            Described(
                case,
                facts | (work or {}).get(case.variant, {}),
                None,
                alone=case.variant in (alone or {}),
                environment=(alone or {}).get(case.variant, {}),
            )
            for case in cases
        )
        options = {"budget_s": 6.0, "processes": 3, "interval": 0.5} | suite
        plan = Plan(Suite("s", "", (), **options), ((Group("g", tuple(cases)), described),), {}, {"variants": []})
        folder = RunFolder.create(tmp_path / "run", "s")
        records = Runner(plan, folder, Settings(1), Console(), seed=5).run("command")
        assert [r.variant for r in records] == [r["variant"] for r in folder.records()]
        return {record.variant: record for record in records}, found.asked

    return play


def measured(asked: list[dict[str, Any]]) -> list[list[str]]:
    """The variants of each process that sat down to be measured."""
    return [[case["variant"] for case in request["cases"]] for request in asked if request["request"] == "sit"]


def test_how_cold_runs_started_is_written_with_the_run(stage, tmp_path):
    """Beside the run's other facts, which the page shows one by one."""
    stage("reference")
    facts = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert facts["run"]["cold_runs"] == "fresh: there is no process to fork them from"


def test_each_case_runs_cold_once_then_together(stage):
    """One cold process a case, then the suite's number of seatings with all of them, on problems that differ."""
    records, asked = stage("reference", "a", "b")
    assert [r["case"]["variant"] for r in asked if r["request"] == "cold"] == ["reference", "a", "b"]
    assert measured(asked) == [["reference", "a", "b"]] * 3
    assert all(record.status is Status.OK for record in records.values())
    assert (records["a"].speedup, records["a"].samples, records["a"].processes) == (2.0, 60, 3)
    seeds = [request["seed"] for request in asked if "seed" in request]
    assert [request["request"] for request in asked if "seed" in request] == ["sit", "stand"] * 3
    assert seeds == seeds[:2] * 3
    assert seeds[0] != seeds[1]


def test_processes_of_a_group_share_their_truth(stage):
    """In a folder of the group's own, which is gone afterwards."""
    _, asked = stage("reference", "a", "b", alone={"b": {}})
    folders = {request["truth"] for request in asked if request["request"] == "sit"}
    assert len(folders) == 1
    assert not Path(folders.pop()).exists()


def test_timed_calls_are_audited_in_the_first_seating_that_ends_well(stage):
    """A seating that a crash ended has audited nobody after the rounds."""
    left = ["stand"]

    def dies(what, variants):
        if what in left and "bad" in variants:
            left.remove(what)
            raise WorkerError(Status.CRASHED, "played", what, "bad")

    records, asked = stage("reference", "bad", "a", dies=dies)
    assert records["bad"].status is Status.CRASHED
    assert [request["audit"] for request in asked if request["request"] == "sit"] == [True, True, False, False]


def test_who_must_not_share_a_process_has_its_own(stage):
    """In each seating, with its environment, in which it ran cold too; all take turns in the same rounds."""
    variables = {"KMP_BLOCKTIME": "0"}
    records, asked = stage("reference", "a", "b", "c", alone={"a": {}, "b": variables})
    assert measured(asked) == [["reference", "c"], ["a"], ["b"]] * 3
    for request in asked:
        if request["request"] in {"cold", "sit"}:
            (name, *_) = [case["variant"] for case in request.get("cases", [request.get("case")])]
            assert request["environment"] == (variables if name == "b" else {})
    names = [request["name"] for request in asked if request["request"] == "turn"]
    assert names == ["reference", "c", "a", "b"] * 60
    assert all(record.status is Status.OK for record in records.values())
    assert (records["b"].speedup, records["b"].samples, records["b"].processes) == (2.0, 60, 3)


@pytest.mark.parametrize(
    ("limit", "took", "begun", "unfinished"),
    [(3.5, 1.0, 3, False), (2.5, 1.0, 2, True), (3.5, 2.0, 1, True), (0.1, 1.0, 1, True)],
    ids=["long enough", "too short for all", "slower than expected", "too short for one"],
)
def test_a_time_limit_holds_back_what_would_pass_it(limit, took, begun, unfinished, tmp_path, monkeypatch):
    """Groups are begun while they are expected to end in time, at the pace of those before, and one in any case."""
    cases = [Described(Case(f"seed@batch={n}", "reference", "inference", "cpu", 1), {}, None) for n in (1, 2, 3)]
    groups = tuple((Group(found.case.group, (found.case,)), (found,)) for found in cases)
    plan = Plan(Suite("mine", "", (), budget_s=3.0), groups, {}, {"variants": []})
    one_s, now = plan.group_expected_s((cases[0],)), 0.0
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)
    run = Runner(plan, RunFolder(tmp_path), Settings(1), Console(), deadline_s=limit * one_s)
    names = []
    for group, _ in run._groups_in_time():
        names.append(group.name)
        now += took * one_s
    assert names == [found.case.group for found in cases][:begun]
    assert run.unfinished is unfinished


def test_the_budget_is_shared_among_seatings(stage):
    """Three seatings get a third each of what is left: nothing was spent, so all of it goes on to the next."""
    budgets_s = []

    def noted(players, _device: str, budget_s: float, *_: object):
        budgets_s.append(budget_s)
        return twenty(players)

    stage("reference", "a", budget_s=6.0, rounds=noted)
    assert budgets_s == pytest.approx([2.0, 3.0, 6.0], rel=0.05)


@pytest.mark.parametrize("alone", [None, {"bad": {}}])
@pytest.mark.parametrize("at", [1, 30])
def test_a_death_in_the_rounds_is_laid_at_the_door_of_whose_turn_it_was(stage, alone, at):
    """The parent knows it; the others are measured again without it, and the broken seating gives no samples."""
    turns = itertools.count(1)

    def dies(what: str, variants: list[str]) -> None:
        if what == "turn" and "bad" in variants and next(turns) == at:
            raise WorkerError(Status.CRASHED, "planted", "turn")

    records, asked = stage("reference", "bad", "good", dies=dies, alone=alone)
    assert (records["bad"].status, records["bad"].reason) == (Status.CRASHED, "planted")
    assert records["bad"].latency_p50_s is None
    without = [variants for variants in measured(asked) if "bad" not in variants]
    # The first seating died at its first round, or the second at its tenth.
    begun = 1 if at == 1 else 2
    assert len(measured(asked)) - len(without) == begun
    assert without[-(4 - begun) :] == [["reference", "good"]] * (4 - begun)
    assert (records["good"].status, records["good"].speedup, records["good"].processes) == (Status.OK, 2.0, 3)


@pytest.mark.parametrize("request_", ["sit", "stand"])
def test_a_death_before_or_after_the_rounds_is_laid_at_the_door_of_the_one_in_hand(stage, request_):
    """The worker's own last stage names it."""

    def dies(what: str, variants: list[str]) -> None:
        if what == request_ and "bad" in variants:
            raise WorkerError(Status.TIMEOUT, "planted", "warm-up", "bad")

    records, asked = stage("reference", "bad", dies=dies)
    assert (records["bad"].status, records["reference"].status) == (Status.TIMEOUT, Status.OK)
    assert measured(asked) == [["reference", "bad"]] + [["reference"]] * 3


@pytest.mark.parametrize("request_", ["sit", "stand"])
def test_a_worker_that_dies_with_nobody_to_blame_ends_its_group(stage, request_):
    """Every case of the group gets the failure, and no further process is started."""

    def dies(what: str, *_: object) -> None:
        if what == request_:
            raise WorkerError(Status.CRASHED, "planted")

    records, asked = stage("reference", "a", dies=dies)
    assert {(record.status, record.reason) for record in records.values()} == {(Status.CRASHED, "planted")}
    assert len(measured(asked)) == 1


def test_a_death_in_a_further_seating_costs_that_seating_alone(stage, monkeypatch):
    """After a complete first pass a case keeps its figures, says what happened, and takes no further turns."""
    monkeypatch.setattr(measurement.Measurement, "_needing", lambda *_: frozenset({"reference", "bad"}))
    begun = []

    def dies(what: str, variants: list[str]) -> None:
        if what == "sit":
            begun.append(variants)
        if what == "turn" and variants == ["bad"] and len(begun) == 5:
            raise WorkerError(Status.CRASHED, "planted", "turn")

    records, asked = stage("reference", "bad", dies=dies, budget_s=1e9)
    bad, reference = records["bad"], records["reference"]
    assert (bad.status, bad.processes, bad.speedup) == (Status.OK, 4, 2.0)
    assert bad.reason == "crashed in seating 5, whose rounds are not counted: planted"
    assert (reference.status, reference.processes, reference.reason) == (Status.OK, 10, "")
    assert measured(asked) == [["reference", "bad"]] * 5 + [["reference"]] * 6


def test_a_worker_that_dies_in_a_further_seating_with_nobody_to_blame_leaves_all_figures(stage, monkeypatch):
    """Its group ends there, and every case says so."""
    monkeypatch.setattr(measurement.Measurement, "_needing", lambda *_: frozenset({"reference", "a"}))
    begun = []

    def dies(what: str, variants: list[str]) -> None:
        begun.extend([variants] * (what == "sit"))
        if len(begun) == 4:
            raise WorkerError(Status.CRASHED, "planted")

    records, asked = stage("reference", "a", dies=dies, budget_s=1e9)
    assert {(r.status, r.reason, r.processes) for r in records.values()} == {
        (Status.OK, "crashed in seating 4, whose rounds are not counted: planted", 3)
    }
    assert len(measured(asked)) == 4


def test_more_rounds_keep_what_a_record_says_of_earlier_ones():
    """A process that failed in an earlier seating is still in the reason of the record that takes its place."""
    kept = more._kept({"status": "ok", "reason": "crashed in seating 6", "unknown": 1})
    assert kept == {"reason": "crashed in seating 6"}


def test_a_case_that_fails_cold_is_not_measured(stage):
    """A case measured alone never takes others with it; what was found until then stays in its record."""

    def dies(what: str, variants: list[str]) -> None:
        if what == "cold" and variants == ["bad"]:
            raise WorkerError(Status.OOM, "planted", "build")

    records, asked = stage("reference", "bad", dies=dies)
    assert (records["bad"].status, records["bad"].reason) == (Status.OOM, "planted")
    assert measured(asked) == [["reference"]] * 3


def test_a_case_refused_after_the_rounds_has_no_times(stage):
    """Its times were taken from something wrong, in this process at the latest; it is not measured again."""
    records, asked = stage("reference", "bad", after={"bad": False})
    assert records["bad"].status is Status.PARITY_FAILED
    assert records["bad"].reason == "planted (gate after the rounds)"
    assert (records["bad"].latency_p50_s, records["bad"].speedup, records["bad"].samples) == (None, None, None)
    assert measured(asked) == [["reference", "bad"], ["reference"], ["reference"]]


def test_samples_by_a_wrong_clock_are_refused(stage, monkeypatch):
    """The parent's clock saw half of the time pass that the seat counted: no case of that seat has a time."""
    monkeypatch.setattr(Actor, "speed", 2.0)
    records, asked = stage("reference", "a")
    assert {record.status for record in records.values()} == {Status.PARITY_FAILED}
    assert all(
        record.reason.startswith("the worker's clock is wrong: it counted 120.00 s for turns that took 60.00 s")
        for record in records.values()
    )
    assert records["a"].latency_p50_s is None
    assert len(measured(asked)) == 1


def test_a_wrong_clock_is_no_reason_to_refuse_another_seat(stage, monkeypatch):
    """Who sits in a process of its own is refused alone; the others are measured on without it."""
    monkeypatch.setattr(Actor, "speed", property(lambda self: 2.0 if self._ready == ["liar"] else 1.0))
    records, asked = stage("reference", "liar", "a", alone={"liar": {}})
    assert records["liar"].status is Status.PARITY_FAILED
    assert "the worker's clock is wrong" in records["liar"].reason
    assert records["liar"].latency_p50_s is None
    assert (records["a"].status, records["a"].speedup, records["a"].processes) == (Status.OK, 2.0, 3)
    assert measured(asked) == [["reference", "a"], ["liar"], ["reference", "a"], ["reference", "a"]]


def test_a_refused_reference_leaves_times_without_ratios(stage):
    """The others are still measured; there is nothing to divide by."""
    records, _ = stage("reference", "a", after={"reference": False})
    assert records["reference"].status is Status.PARITY_FAILED
    assert records["a"].status is Status.OK
    assert records["a"].latency_p50_s == 1.0
    assert records["a"].speedup is None


#: Of one call; the played machine does 1e9 a second of either, the reference takes 2 s and all others 1 s.
MUCH, LITTLE = {"flops": 2_500_000_000, "least_bytes": 1000}, {"flops": 500_000_000, "least_bytes": 1000}


def test_a_case_gets_its_share_of_the_ceiling(stage, tmp_path):
    """Half a second's work in one second; the ceilings are measured once and stand in environment.json."""
    records, asked = stage("reference", "a", work={"a": LITTLE})
    assert (records["a"].ceiling_share, records["a"].bound) == (pytest.approx(0.5), "compute")
    assert (records["a"].flops, records["a"].least_bytes) == (500_000_000, 1000)
    assert records["reference"].ceiling_share is None
    assert [request["device"] for request in asked if request["request"] == "ceilings"] == ["cpu"]
    assert asked[0]["request"] == "ceilings"
    facts = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert facts["ceilings"]["cpu"]["flops_per_s"] == {"fp32": 1e9}


def test_a_case_faster_than_the_machine_is_impossible(stage, tmp_path):
    """Two and a half seconds' work in one, after a second measurement too: no time of it is kept or compared with."""
    records, asked = stage("reference", "fast", "a", work={"fast": MUCH, "a": LITTLE})
    fast = records["fast"]
    assert fast.status is Status.IMPOSSIBLE
    assert fast.reason == (
        "2.5x faster than this machine's fp32 products allow: 2.50 GFLOP in 1.00 s is 2.50 GFLOP/s, "
        "the most in 2 measurements is 1.00 GFLOP/s"
    )
    assert {name: getattr(fast, name) for name in (*TIMING, "ceiling_share") if getattr(fast, name) is not None} == {}
    assert [request["request"] for request in asked].count("ceilings") == 2
    assert (records["a"].status, records["a"].speedup) == (Status.OK, 2.0)
    assert set(pd.read_csv(tmp_path / "run" / "samples.csv.gz")["variant"]) == {"reference", "a"}


def test_nothing_is_compared_with_an_impossible_reference(stage):
    """The others keep their times and have no speedup."""
    records, _ = stage("reference", "a", work={"reference": {"flops": 5_000_000_000, "least_bytes": 1000}})
    assert records["reference"].status is Status.IMPOSSIBLE
    assert (records["a"].status, records["a"].latency_p50_s, records["a"].speedup) == (Status.OK, 1.0, None)


def test_without_ceilings_a_run_goes_on(stage, capsys):
    """A machine that cannot be measured says so; its cases have no share, and none is impossible."""

    def dies(what: str, *_: object) -> None:
        if what == "ceilings":
            raise WorkerError(Status.TIMEOUT, "planted")

    records, _ = stage("reference", "fast", dies=dies, work={"fast": MUCH})
    assert (records["fast"].status, records["fast"].speedup, records["fast"].ceiling_share) == (Status.OK, 2.0, None)
    assert "the ceilings of cpu could not be measured: planted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_a_machine_that_cannot_be_so_fast_ends_with_1(warm_workers, tmp_path):
    """A real run under planted ceilings that are too low: its case is impossible, said in words, without a time."""
    words = command(tmp_path, ["reference"], "inference", processes=1)
    done = warm_workers.run(*words, "--plugin", str(PLUGIN.with_name("slow_machine.py")))
    assert done.returncode == 1, done.stderr
    (record,) = map(json.loads, (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["status"] == "impossible"
    assert "x faster than this machine's fp32 products allow" in record["reason"]
    assert record["latency_p50_s"] is None
    assert "impossible" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_parity_in_a_record_is_the_worst_of_all_gate_runs():
    """Of all events of a case the one nearest to its limit, the first included."""
    events = [gate("a", str(n), strain=strain) for n, strain in enumerate((0.2, 0.7, 0.4))]
    assert measurement.worst(events)["parity_worst"] == "1"
    assert measurement.worst(events)["parity_error"] == 0.7
    assert measurement.worst([]) == {}


def test_each_kind_of_error_is_the_one_nearest_to_its_own_limit():
    """The run with the worst gradient does not decide which error of the outputs is told."""
    gradient = gate("a", "gradient", strain=0.5) | {"parity_error": 1e-7, "parity_limit": 1e-6}
    outputs = gate("a", "outputs", strain=0.2) | {"parity_error": 2e-7, "grad_error": None, "grad_limit": None}
    outputs["parity_limit"] = 1e-6
    found = measurement.worst([gradient, outputs])
    assert (found["parity_error"], found["grad_error"], found["parity_worst"]) == (2e-7, 0.5, "gradient")


def test_a_seed_given_is_the_run_s_seed():
    """`--seed` takes what environment.json of an earlier run has, so that a gate can be run again."""
    arguments = parser().parse_args(["run", "--seed", "7"])
    assert arguments.seed == 7


def test_an_error_of_the_parent_leaves_the_folder_readable(stage, tmp_path):
    """Whatever ends a run, tables are made of what was recorded."""

    def dies(what: str, *_: object) -> None:
        if what == "turn":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage("reference", "a", dies=dies)
    assert tuple(pd.read_csv(tmp_path / "run" / "records.csv").columns) == COLUMNS
    assert "after" in json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["load"]


def test_a_group_that_is_never_narrow_gets_the_most_seatings(stage, monkeypatch):
    """More are begun only while the budget lasts, at most the most there may be, and hold who needs them alone."""
    monkeypatch.setattr(measurement.Measurement, "_needing", lambda *_: frozenset({"reference", "a"}))
    records, asked = stage("reference", "a", "b", budget_s=1e9)
    assert measured(asked) == [["reference", "a", "b"]] * 3 + [["reference", "a"]] * (measurement.MOST_SEATINGS - 3)
    assert {name: record.processes for name, record in records.items()} == {"reference": 10, "a": 10, "b": 3}


def spoilt(seatings, **fields):
    """Rounds of seatings, of which those with the given numbers are disturbed or had distant cores."""
    begun = itertools.count()

    def rounds(players, *rest):
        bad = next(begun) in seatings
        for found in twenty(players, *rest):
            yield dataclasses.replace(found, **fields) if bad else found

    return rounds


def test_a_disturbed_seating_is_replaced(stage):
    """All take turns in another one, and no figure rests on the disturbed one."""
    records, asked = stage("reference", "a", rounds=spoilt({1}, beside=Interference(why="far")))
    assert measured(asked) == [["reference", "a"]] * 4
    assert [(records["a"].processes, records["a"].disturbed)] == [(3, 0)]


def test_where_every_seating_is_disturbed_the_run_ends_and_says_so(stage):
    """The most seatings there may be are taken, and all of them are in the figures."""
    records, asked = stage("reference", "a", rounds=spoilt(range(99), beside=Interference(why="far")))
    assert len(measured(asked)) == measurement.MOST_SEATINGS
    assert (records["a"].processes, records["a"].disturbed) == (10, 200)


def test_only_some_seatings_are_given_up_for_others(stage, tmp_path):
    """Of three, two begin disturbed and end; those after them take their time although they are disturbed too."""

    def rounds(players, device, budget_s, seed, chosen, *rest):
        taken = []
        for found in twenty(players, device, budget_s, seed, chosen, *rest):
            taken.append(dataclasses.replace(found, beside=Interference(why="far")))
            yield taken[-1]
            if not chosen(taken):
                return

    stage("reference", "a", rounds=rounds)
    counts = pd.read_csv(tmp_path / "run" / "rounds.csv.gz").groupby("process").size()
    assert list(counts) == [6, 6, *[20] * (measurement.MOST_SEATINGS - 2)]


def test_a_seating_that_began_with_distant_cores_is_judged_again(stage, monkeypatch, tmp_path):
    """The cores are seen near in the second seating only; then the first one is marked and in no figure."""
    monkeypatch.setattr(CoreDistance, "__enter__", lambda self: self)
    seen = spoilt({0}, word_ns=600.0)

    def rounds(players, *rest):
        for found in seen(players, *rest):
            yield found
            distances[0].shortest_ns = found.word_ns or 250.0

    distances = []
    begin = CoreDistance.__init__
    monkeypatch.setattr(CoreDistance, "__init__", lambda self: (begin(self), distances.append(self))[0])
    records, asked = stage("reference", "a", rounds=rounds)
    assert len(measured(asked)) == 3
    assert (records["a"].processes, records["a"].disturbed) == (2, 0)
    found = pd.read_csv(tmp_path / "run" / "rounds.csv.gz").groupby("process")["why"].agg(["count", "first"])
    assert list(found["count"]) == [20, 0, 0]
    assert found["first"][0] == "a word from core to core and back took 600 ns, 250 at best in this run"


def test_no_scratch_folder_is_left(stage, monkeypatch, tmp_path):
    """Caches go away with the run."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    stage("reference")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), Status.OOM),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), Status.OOM),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), Status.OOM),
        (RuntimeError("Triton Error [CUDA]: out of memory"), Status.OOM),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Status.OOM),
        (RuntimeError("CUDA error: misaligned address"), Status.ERROR),
        (KeyError("x"), Status.ERROR),
    ],
)
def test_an_exception_is_told_in_one_line(error, status):
    """Running out of memory is told apart from all else; the reason names the exception."""
    worker = pytest.importorskip("bench.worker.server")
    found, reason = worker.classify(error)
    assert found is status
    assert reason.startswith(type(error).__name__)
    assert "\n" not in reason


def test_a_worker_that_found_nothing_wrong_says_so():
    """A verdict's fields are columns of the record, but for what the parent reads."""
    gating = pytest.importorskip("bench.worker.gating")
    from bench.gate.parity import Check, Verdict

    fields = gating.verdict_fields(Verdict((Check("outputs", 0.5, 1.0), Check("grad fc.bias", 0.8, 1.0))))
    assert (fields["passed"], fields["reason"], fields["strain"]) == (True, "", 0.8)
    assert (fields["parity_error"], fields["grad_error"], fields["parity_worst"]) == (0.5, 0.8, "grad fc.bias")
    assert set(fields) - {"passed", "strain"} <= set(COLUMNS)


def test_a_record_is_told_while_the_run_goes_on(capsys):
    """One line per case: what failed and why, or how fast."""
    console = Console(2)
    with contextlib.suppress(AttributeError):
        console._rich.file = sys.stdout
    console.record(Record("seed", "lstm", "bad", "inference", status=Status.OOM, reason="too [big]"))
    console.record(Record("seed", "lstm", "good", "inference", speedup=2.0, speedup_lo=1.9, speedup_hi=2.1))
    bad, good = capsys.readouterr().out.splitlines()
    assert "oom: too [big]" in bad
    assert "2.00x [1.90, 2.10]" in good
    assert os.linesep not in bad
