"""Never lose a row: runs whose parent or worker is killed at random moments and that are resumed until they are done.

`SEQ2SEQ_BENCH_KILLS` says how many moments (default 6), `SEQ2SEQ_BENCH_KILL_SEED` which; `pytest -s` shows each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.analysis.figures import figures
from bench.plan.cases import Case
from bench.records.samples import read_samples

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("SEQ2SEQ_BENCH_KILLS", "6"))
SEED = int(os.environ.get("SEQ2SEQ_BENCH_KILL_SEED", "1"))
SUITE = """
name = "killed"
summary = "two groups of what is cheap"
budget_s = 1
interval = 0.9
processes = 1
case_limit_s = 60
[[select]]
workloads = ["seed@batch=2,length=3", "seed@batch=1,length=2"]
variants = ["loop"]
modes = ["inference"]
"""
#: A part of a run takes about so long after its plan is made, seconds, where nobody else uses the machine.
PART_S = 2.5
FIGURES = (
    "latency_p50_s",
    "throughput_seq_per_s",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "samples",
    "calls",
    "disturbed",
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")


class Killed:
    """A run that is killed now and then."""

    def __init__(self, folder: Path, suite: Path) -> None:
        self.folder = folder
        self.suite = suite
        self.workers_killed = 0

    def lines(self) -> list[bytes]:
        """Whole lines of records.jsonl now."""
        path = self.folder / "records.jsonl"
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

    def start(self) -> subprocess.Popen[str]:
        """Begin the run, or resume it once there is something to resume."""
        where = ["--resume", str(self.folder)]
        if not (self.folder / "environment.json").exists():
            where = ["--suite", str(self.suite), "--threads", "1", "--seed", "3", "--out", str(self.folder)]
        line = [sys.executable, "tests/warm_workers.py", "run", *where]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    def part(self, moments: list[tuple[float, str]]) -> list[str]:
        """Run a part, killing at the moments until it ends; what was done at each moment used up, in words."""
        done = []
        with self.start() as parent:
            begun = self._begin(parent)
            while moments and parent.poll() is None:
                after_s, victim = moments[0]
                if not _sleep(after_s - (time.monotonic() - begun), parent):
                    # It ended before: the next part of a run is hit earlier.
                    moments[0] = after_s / 2, victim
                    break
                before = self.lines()
                if victim == "worker" and not (workers := _workers(parent)):
                    time.sleep(0.05)
                    continue
                moments.pop(0)
                if victim == "worker":
                    workers[0].kill()
                    self.workers_killed += 1
                    begun = time.monotonic()
                else:
                    alive = _workers(parent, servers=True)
                    parent.kill()
                    parent.wait()
                    left = psutil.wait_procs(alive, timeout=2)[1]
                    assert not [worker for worker in left if not _ended(worker)], "a worker outlived its parent by 2 s"
                after = self.lines()
                assert grown(before, after)
                done.append(f"{after_s:5.2f} s after the part began, {victim:<6}: {len(after)} records")
                if victim == "parent":
                    return done
            output = parent.communicate(timeout=300)[0]
            assert parent.returncode in ((0, 1, 2) if self.workers_killed else (0, 1)), output
            assert "Traceback" not in output
        return done

    def _begin(self, parent: subprocess.Popen[str]) -> float:
        """Wait until a part writes: its own environment.json is there, or it ended."""
        path = self.folder / "environment.json"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while parent.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)
        return time.monotonic()

    def finished(self) -> bool:
        """Return whether every case of the plan is recorded and the table was made of it."""
        plan = self.folder / "plan.json"
        return plan.exists() and len(self.lines()) == len(json.loads(plan.read_text(encoding="utf-8"))["cases"])

    def check(self, seen: list[bytes]) -> None:
        """No row lost, none twice, and figures that the raw samples give again."""
        lines = self.lines()
        assert [line for line in lines if line in set(seen)] == seen, "a row that was there is gone or has moved"
        records = [json.loads(line) for line in lines]
        planned = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))["cases"]
        cases = [Case(**fields) for fields in planned]
        assert sorted((r["group"], r["variant"]) for r in records) == sorted((c.group, c.variant) for c in cases)
        crashed = [r for r in records if r["status"] == "crashed"]
        assert {r["status"] for r in records} <= {"ok", "unavailable", "crashed"}
        assert all("signal 9 (SIGKILL)" in r["reason"] for r in crashed)
        assert self.workers_killed or not crashed
        by_case = {(c.group, c.variant): c for c in cases}
        for record in (r for r in records if r["status"] == "ok"):
            self._check_figures(record, by_case[record["group"], record["variant"]])

    def _check_figures(self, record: dict[str, Any], case: Case) -> None:
        measured = read_samples(self.folder / "samples.csv.gz")
        samples = measured[case.workload, case.mode, case.device, case.threads]
        facts = {name: record[name] for name in ("batch", "valid_steps")}
        found = figures(case, samples, "reference", 0.9, facts)
        told = {name: record[name] for name in FIGURES if record[name] is not None}
        assert {name: found[name] for name in FIGURES if name in found} == pytest.approx(told, rel=1e-6)


def grown(before: list[bytes], after: list[bytes]) -> bool:
    """Return whether rows are there as they were, in their order, but for figures that more rounds gave anew."""
    for old, new in zip(map(json.loads, before), map(json.loads, after), strict=False):
        same = all(old[name] == new[name] for name in ("group", "variant", "build_s", "repro"))
        if not same or (old["status"] == "ok" == new["status"] and new["samples"] < old["samples"]):
            return False
    return len(after) >= len(before)


def _workers(parent: subprocess.Popen[str], *, servers: bool = False) -> list[psutil.Process]:
    """Workers of a parent, fresh and forked, and on demand what forks them."""
    try:
        children = psutil.Process(parent.pid).children(recursive=True)
        found = [child for child in children if "bench.worker" in child.cmdline()]
        # A forked worker has the command line of the server that it is a child of.
        return [child for child in found if servers or child.ppid() != parent.pid or "--forks" not in child.cmdline()]
    except psutil.Error:
        return []


def _ended(worker: psutil.Process) -> bool:
    """Return whether it runs no more, reaped by whoever inherited it or not yet."""
    try:
        return bool(worker.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _sleep(seconds: float, parent: subprocess.Popen[str]) -> bool:
    """Wait; false when the parent ended meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if parent.poll() is not None:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.slow
def test_no_row_is_lost_and_none_is_there_twice(tmp_path):
    """Killed at random moments and resumed until done, a run is what it would have been, and its samples prove it."""
    suite = tmp_path / "killed.toml"
    suite.write_text(SUITE, encoding="utf-8")
    draw = random.Random(SEED)
    moments = [(draw.uniform(0, PART_S), draw.choice(("parent", "worker"))) for _ in range(KILLS)]
    number = used = 0
    while moments:
        run = Killed(tmp_path / f"run{number}", suite)
        number += 1
        seen: list[bytes] = []
        while not run.finished() or seen != run.lines():
            for word in run.part(moments):
                used += 1
                print(f"kill {used:2}, run {number}: {word}")
            lines = run.lines()
            assert grown(seen, lines)
            seen = lines
        run.check(seen)
        print(f"         run {number}: {len(seen)} records, no row lost, none twice, figures as the samples give them")
    assert used == KILLS
