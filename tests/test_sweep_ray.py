"""`python -m bench sweep` on a Ray cluster of two nodes on this machine, one of which is killed while it measures.

Both nodes share the cores here, so their figures are worth nothing: what counts is that no row is lost and none twice.
A sweep leaves out the second node of a machine; `BENCH_SWEEP_SHARED_MACHINE=1` lets it measure, for tests alone.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.__main__ import main
from bench.records.reader import planned_cases, read_run
from bench.records.schema import Status
from bench.sweep.cluster import SHARED_MACHINE

ROOT = Path(__file__).parent.parent
SUITE = """
name = "killed"
summary = "groups of what is cheap"
budget_s = 4
interval = 0.9
processes = 1
case_limit_s = 120
[[select]]
workloads = ["seed@length=3"]
variants = ["onednn"]
modes = ["inference"]
sweeps = [{axis = "batch", values = [2, 3, 4, 5]}]
"""
STORE_BYTES = 100_000_000

pytestmark = [
    pytest.mark.slow,
    # Ray's own processes leave sockets and files to the end of this one.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def cluster():
    """A head that does not measure; nodes are added by tests."""
    pytest.importorskip("ray", reason="needs ray (nox -s cluster installs it)")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    found = Cluster(initialize_head=True, head_node_args=head)
    yield found
    found.shutdown()


def measuring() -> list[psutil.Process]:
    """Processes that measure a unit."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if "bench.sweep.measure" in (process.info["cmdline"] or ())]


def test_a_node_that_is_killed_costs_nothing(cluster, tmp_path):
    """Its unit is measured on the other one, once; what it had begun ends with it."""
    suite, out, log = tmp_path / "killed.toml", tmp_path / "out", tmp_path / "log"
    suite.write_text(SUITE)
    nodes = {
        name: cluster.add_node(num_cpus=1, resources={"bench_slot": 1}, node_name=name, object_store_memory=STORE_BYTES)
        for name in ("one", "two")
    }
    words = ["sweep", "--cluster", cluster.address, "--suite", str(suite), "--threads", "1", "--out", str(out)]
    with log.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, "-m", "bench", *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {SHARED_MACHINE: "1"},
        )  # fmt: skip
    end_s = time.monotonic() + 300
    while len(measuring()) < 2 and driver.poll() is None and time.monotonic() < end_s:
        time.sleep(0.1)
    begun = measuring()
    assert len(begun) == 2, log.read_text()
    cluster.remove_node(nodes["two"], allow_graceful=False)
    time.sleep(5)
    assert sum(process.is_running() for process in begun) <= 1, "what the killed node measured outlived it"
    code = driver.wait(600)
    text = log.read_text()
    print(text)
    assert code == 0, text
    assert "Traceback" not in text
    lost = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["host"] for event in lost] == ["two"]
    (merged,) = (out / "hosts").glob("*/run-1")
    run = read_run(merged)
    found = [(r.workload, r.mode, r.device, r.threads, r.variant) for r in run.records]
    assert sorted(found) == sorted(planned_cases(merged))
    assert len(found) == len(set(found)) == 8
    assert run.superseded == 0
    assert {record.status for record in run.records} == {Status.OK}
    summary = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert {row["host"] for row in summary} <= {"one", "two"}
    assert [row["host"] for row in summary if row["lost"] == "two"] == ["one"]
    assert main(["recommend", str(merged)]) in {0, 3, 5}


def test_groups_are_repeated_on_two_nodes(cluster, tmp_path, monkeypatch, capsys):
    """Each is measured by both, into a run folder each, and the spread between them is told."""
    suite, out = tmp_path / "repeated.toml", tmp_path / "out"
    suite.write_text(SUITE.replace("[2, 3, 4, 5]", "[2, 3]"))
    for name in ("one", "two"):
        cluster.add_node(num_cpus=1, resources={"bench_slot": 1}, node_name=name, object_store_memory=STORE_BYTES)
    monkeypatch.setenv(SHARED_MACHINE, "1")
    words = ["sweep", "--cluster", cluster.address, "--suite", str(suite), "--threads", "1", "--repeats", "2"]
    assert main([*words, "--out", str(out)]) == 0
    assert "4 cases on two hosts: times differ by" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert len(rows) == 4
    for unit in {row["unit"] for row in rows}:
        of_unit = [row for row in rows if row["unit"] == unit]
        assert {row["host"] for row in of_unit} == {"one", "two"}
        assert sorted(row["repeat"] for row in of_unit) == ["1", "2"]
    assert len(list((out / "hosts").glob("*/run-*"))) == 2
    pairs = list(csv.DictReader((out / "between-hosts.csv").read_text().splitlines()))
    assert {frozenset((row["first"], row["second"])) for row in pairs} == {frozenset(("one", "two"))}


def test_a_node_without_a_slot_measures_nothing(cluster, tmp_path, capsys):
    """The sweep says what to start nodes with."""
    assert main(["sweep", "--cluster", cluster.address, "--suite", "smoke", "--out", str(tmp_path / "out")]) == 2
    assert """no node of the cluster can measure; start each with ray start --resources""" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_nodes_of_one_machine_are_one_host(cluster, tmp_path, capsys):
    """They would disturb each other, and are no two hosts for --repeats."""
    for name in ("one", "two"):
        cluster.add_node(num_cpus=1, resources={"bench_slot": 1}, node_name=name, object_store_memory=STORE_BYTES)
    words = ["sweep", "--cluster", cluster.address, "--suite", "smoke", "--out", str(tmp_path / "out")]
    assert main([*words, "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"node (one|two) is left out: it is on the machine of (one|two), and two units at a time", text)
    assert main([*words, "--repeats", "2"]) == 2
    assert "--repeats 2 needs as many hosts of each kind" in capsys.readouterr().err
