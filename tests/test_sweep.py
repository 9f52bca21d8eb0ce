"""`python -m bench sweep` without Ray: units, kinds of hosts, nodes that are lost, what is put together."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_cluster import LARGE, SMALL, TOLD, FakeCluster, arguments, made_units, node, plan_made, told

from bench.__main__ import main
from bench.analysis.run_summary import summary_table
from bench.errors import UsageError
from bench.plan.cases import Case, Filters, Selection, Suite, Sweep, expand, overridden
from bench.records.raw_csv import ENERGY, RAW_FILES
from bench.records.reader import planned_cases, read_environment, read_records, read_run
from bench.records.schema import Status
from bench.run import resume
from bench.run.planning import Described, Plan
from bench.sweep import between_hosts
from bench.sweep import node as on_node
from bench.sweep.cluster import SHARED_MACHINE, RayCluster, reach
from bench.sweep.command import sweep
from bench.sweep.folder import SweepFolder
from bench.sweep.hosts import code_digest, gpu_models, kind_of, machine_id
from bench.sweep.pulling import MOST_LOSSES, JobEnd, Pulling, UnitJob
from bench.sweep.summary import BETWEEN_COLUMNS, SUMMARY_COLUMNS
from bench.sweep.units import same_cases, units_of

ROOT = Path(__file__).parent.parent
CATALOGUE = {
    "workloads": [{"name": "seed"}, {"name": "forecast"}],
    "variants": [{"name": name} for name in ("reference", "loop", "onednn")],
    "torch": {},
}


def plan_for(suite: Suite) -> Plan:
    """A plan of a suite by the catalogue above."""
    groups = expand(suite, CATALOGUE, Filters(threads=1, device="cpu"))
    return Plan(suite, tuple((g, tuple(Described(c, {}, None) for c in g.cases)) for g in groups), {}, CATALOGUE)


SUITE = Suite(
    "swept",
    "",
    (
        Selection(("seed",), ("loop",), ("inference",), (Sweep("batch", (2, 4)),)),
        Selection(("seed@length=3",), ("onednn",), ("training",), (Sweep("hidden", (8,)),)),
        Selection(("forecast",), ("loop", "onednn#again"), ("inference", "training")),
    ),
    budget_s=50.0,
    second_instrument=True,
)


def test_a_unit_expands_to_its_group_and_no_other():
    """Each unit's suite, taken alone, gives the cases that the whole suite has in that group, axes of sweeps too."""
    units = units_of(plan_for(SUITE), 3600.0)
    assert len(units) == 5
    for unit in units:
        cases = [found.case for found in unit.cases]
        filters = Filters(
            variants=tuple(case.variant for case in cases), modes=(cases[0].mode,), threads=1, device="cpu"
        )
        (group,) = expand(unit.suite, CATALOGUE, filters)
        assert same_cases(cases, group.cases) == ""
        assert list(group.cases) == cases
        assert unit.suite.budget_s == pytest.approx(10.0)
        assert not unit.suite.second_instrument


def test_other_cases_on_a_node_are_named():
    cases = [Case("seed", variant, "inference", "cpu", 1) for variant in ("reference", "loop", "mine")]
    assert same_cases(cases[:2], cases[1:]) == "lacks reference; adds mine"


def test_a_unit_that_would_take_too_long_is_refused():
    """With its name, and what to lower."""
    with pytest.raises(UsageError, match=r"is expected to take \d+ s, and --unit-limit is 5 s; lower --budget"):
        units_of(plan_for(SUITE), 5.0)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("processor", "Other CPU"),
        ("stepping", "family 6, model 1, stepping 3"),
        ("caches", {"L2 unified": "1024K"}),
        ("vector_flags", ["avx2"]),
        ("cores_logical", 2),
        ("cpu_quota", 1.5),
        ("gpu", "H100, 535, 80 GB, 1980 MHz, 700 W"),
    ],
)
def test_what_computes_makes_another_kind(fact, value):
    assert kind_of(told(**{fact: value})).key != SMALL.key


def test_other_versions_of_what_computes_make_another_kind():
    """Those of what only draws do not."""
    assert kind_of(TOLD | {"software": TOLD["software"] | {"torch": "2.12.0"}}).key != SMALL.key
    assert kind_of(TOLD | {"software": TOLD["software"] | {"matplotlib": "3.10"}}).key == SMALL.key


@pytest.mark.parametrize(
    "facts",
    [
        {"frequency_mhz": 3900},
        {"processor": "Some CPU @ 3.10GHz"},
        {"memory_bytes": 1},
        {"microcode": "0x2"},
        {"governor": "powersave"},
    ],
)
def test_clock_rates_make_no_other_kind(facts):
    """Nor does anything else that changes while a machine stays the same."""
    assert kind_of(told(**facts)).key == SMALL.key


def test_a_second_node_of_a_machine_waits_until_the_first_is_gone(monkeypatch):
    """It may measure then; nodes of machines that are not known are all different."""
    cluster = RayCluster("auto", ROOT, (), "cpu", lambda _: "", lambda *_: None)
    cluster._machines |= {"id-one": "boot", "id-two": "boot", "id-three": "", "id-four": ""}
    cluster._known |= {"id-one": node("one"), "id-two": None, "id-three": node("three")}
    assert cluster._beside("id-two").startswith("it is on the machine of one, and two units")
    assert cluster._beside("id-four") == ""
    monkeypatch.setenv(SHARED_MACHINE, "1")
    assert cluster._beside("id-two") == ""
    monkeypatch.delenv(SHARED_MACHINE)
    del cluster._known["id-one"]
    cluster._gone("id-one")
    assert "id-two" not in cluster._known, "it is not asked again"
    assert cluster._beside("id-two") == ""


def test_a_machine_is_the_same_to_all_its_processes():
    assert machine_id() == machine_id() == on_host("from bench.sweep.hosts import machine_id; print(machine_id())")


def on_host(program: str) -> str:
    """What a program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_cluster_that_is_not_there_is_one_line_at_once(tmp_path, capsys):
    """Before Ray is asked, which would try for half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        reach(address)
    start_s = time.perf_counter()
    assert main(["sweep", "--cluster", address, "--suite", "smoke", "--out", str(tmp_path / "out")]) == 2
    assert time.perf_counter() - start_s < 20
    error = capsys.readouterr().err
    assert f"no Ray cluster answers at {address}: Connection refused; start one with" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["head", "head:port", ":6379", "head:70000", ""])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match="is not an address; expected HOST:PORT"):
        reach(address)


def test_a_gpu_is_its_model():
    """Without driver, clock and power limit, each GPU of a host."""
    line = "NVIDIA H200, 570.1, 143771 MiB, 1980 MHz, 700.00 W"
    assert gpu_models(f"{line}\n{line}") == "NVIDIA H200, 143771 MiB; NVIDIA H200, 143771 MiB"
    assert gpu_models("none") == "none"


def test_the_code_s_digest_sees_every_change(tmp_path):
    """One that is not committed, and a file that is only renamed."""
    file = tmp_path / "kernels" / "cell.cpp"
    file.parent.mkdir()
    file.write_text("1")
    first = code_digest(tmp_path)
    (file.parent / "notes.txt").write_text("no code")
    assert code_digest(tmp_path) == first
    file.write_text("2")
    second = code_digest(tmp_path)
    file.rename(file.with_name("row.cpp"))
    assert len({first, second, code_digest(tmp_path)}) == 3


def test_a_measuring_process_has_no_variables_of_ray():
    """Ray gives its tasks one OpenMP thread, which would look like the user's setting."""
    found = on_node.clean({"OMP_NUM_THREADS": "1", "RAY_JOB_ID": "01", "KMP_BLOCKTIME": "1", "PATH": "/bin"})
    assert found == {"KMP_BLOCKTIME": "1", "PATH": "/bin"}


def test_a_unit_beyond_its_limit_is_ended():
    """With what it had written so far, and nothing of it left running."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    result = on_node.measure_unit({"limit_s": 0.3})
    assert (result["ended"], result["reason"]) == ("timeout", "the unit took longer than its limit of 0.3 s")
    assert "unit.log" in result["files"]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("code", "log", "ended", "reason"),
    [
        (0, "", "done", ""),
        (2, "error: no variant\n\n", "failed", "the measuring process ended with code 2: error: no variant"),
        (-9, "", "crashed", "the measuring process was killed by signal 9; its last line: it printed nothing"),
    ],
)
def test_the_end_of_a_unit_is_told(code, log, ended, reason):
    assert on_node._ending(code, 60.0, log) == (ended, reason)


def pulled(cluster, units, kinds=(SMALL.key,), repeats=1, deadline_s=float("inf"), patience_s=0.05):
    """A sweep's scheduling alone; returns it, whether it ended, and the jobs kept with their hosts and endings."""
    kept = []
    pulling = Pulling(
        units, kinds, repeats, cluster,
        lambda unit: {"threads": 1, "cases": [dataclasses.asdict(found.case) for found in unit.cases]},
        lambda job, found, result: kept.append((job, found.name, result["ended"])),
        lambda _: None, lambda *_: None, deadline_s, patience_s=patience_s,
    )  # fmt: skip
    return pulling, pulling.run(), kept


ENDED = {"files": {}, "ended": "done", "reason": "", "wall_s": 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_no_unit_is_lost_and_none_is_there_twice(tmp_path, seed):
    """Whatever nodes are lost, each job is kept once, a repeat on another host, on its kind of host alone."""
    draw = random.Random(seed)
    nodes = [node(f"s{n}") for n in range(4)] + [node(f"l{n}", LARGE) for n in range(3)]
    by_name = {found.name: found for found in nodes}
    losses = 4

    def before(_job, _node):
        nonlocal losses
        for name in set(by_name) - set(cluster.there):
            # It comes back now and then.
            if draw.random() < 0.5:
                cluster.there[name] = by_name[name]
        if losses and draw.random() < 0.3:
            losses -= 1
            return "made up"
        return dict(ENDED)

    cluster = FakeCluster(nodes, tmp_path, before)
    units = made_units(5)
    _, finished, kept = pulled(cluster, units, (SMALL.key, LARGE.key), repeats=2, patience_s=5.0)
    assert finished
    jobs = [job for job, _, _ in kept]
    assert len(jobs) == len(set(jobs)) == 5 * 2 * 2
    assert all(by_name[name].kind.key == job.kind for job, name, _ in kept)
    hosts = {(job.number, job.kind, name) for job, name, _ in kept}
    assert len(hosts) == len(kept), "a repeat was measured on the host of the first"


def test_a_lost_unit_runs_elsewhere(tmp_path):
    """Though the node that was lost with it is there again."""
    nodes = [node("one"), node("two")]
    lost = []

    def before(job, found):
        if job.number == 1 and not lost:
            lost.append(found.name)
            return "the node is dead"
        for each in nodes:
            cluster.there[each.name] = each
        return dict(ENDED)

    cluster = FakeCluster(nodes, tmp_path, before)
    _, finished, kept = pulled(cluster, made_units(4))
    assert finished
    where = {job.number: name for job, name, _ in kept}
    assert {lost[0], where[1]} == {"one", "two"}


def test_a_unit_that_ends_every_node_is_recorded_as_crashed(tmp_path):
    """After a number of losses, so that it does not take down a cluster."""
    nodes = [node(f"n{number}") for number in range(6)]
    cluster = FakeCluster(nodes, tmp_path, lambda job, _: "it died" if job.number == 1 else dict(ENDED))
    _, finished, kept = pulled(cluster, made_units(2))
    assert finished
    assert [ended for job, _, ended in kept if job.number == 1] == ["crashed"]
    assert len([job for job, _ in cluster.begun if job.number == 1]) == MOST_LOSSES


def test_a_late_result_of_a_lost_node_counts_for_nothing(tmp_path):
    """A node that was given up and answers after all: another one has its unit."""
    cluster = FakeCluster([node("one"), node("two")], tmp_path, lambda _job, _node: dict(ENDED))
    pulling, _, kept = pulled(cluster, made_units(2))
    job, name = cluster.begun[0]
    pulling._take(JobEnd(job, node(name), dict(ENDED)))
    assert len(kept) == 2


def test_without_a_node_of_the_kind_the_rest_is_left(tmp_path):
    """The sweep ends, and says so, rather than wait for ever."""
    cluster = FakeCluster([node("one")], tmp_path, lambda job, _: "it died" if job.number == 2 else dict(ENDED))
    pulling, finished, kept = pulled(cluster, made_units(3))
    assert not finished
    assert [job.number for job, _, _ in kept] == [1]
    assert [job.number for job in pulling.left] == [2, 3]


def test_a_time_limit_begins_nothing_that_would_pass_it(tmp_path):
    """But for the first, so that each part of a sweep gets on."""
    cluster = FakeCluster([node("one")], tmp_path, lambda _job, _node: dict(ENDED))
    pulling, finished, kept = pulled(cluster, made_units(3, expected_s=100.0), deadline_s=0.0)
    assert (finished, len(kept), len(pulling.left)) == (False, 1, 2)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def keys(path: Path) -> list[tuple[str, str, int]]:
    """Cases that a run folder has recorded."""
    return [(record.workload, record.variant, record.threads) for record in read_records(path)]


def test_a_sweep_gives_run_folders_that_everything_reads(tmp_path, monkeypatch):
    """One for each kind, with every case once; `absent` keeps its reason."""
    plan_made(monkeypatch)
    cluster = FakeCluster([node("one"), node("two"), node("big", LARGE)], tmp_path / "made")
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out)), "the command", cluster) == 0
    for kind, threads in ((SMALL, 2), (LARGE, 8)):
        run = read_run(out / "hosts" / kind.key / "run-1")
        assert len(run.records) == len({(r.workload, r.variant) for r in run.records}) == 9
        assert run.superseded == 0
        assert {record.threads for record in run.records} == {threads}
        assert planned_cases(run.path) == {(r.workload, r.mode, r.device, r.threads, r.variant) for r in run.records}
        assert len(summary_table(run.records)) == 9
        assert run.environment["run"]["kind"] == kind.key
    found = rows(out / "summary.csv")
    assert [row["cases"] for row in found] == ["2 ok 1 unavailable"] * 6
    assert {(row["rounds"], row["disturbed"]) for row in found} == {("1", "0")}


def test_a_sweep_keeps_the_energy_of_each_host(tmp_path, monkeypatch):
    """All raw files come back and are put together; what one host's counter is says nothing of another's."""
    assert {file.name for file in (*RAW_FILES, ENERGY)} <= set(on_node.KEPT)
    plan_made(monkeypatch, 2)
    cluster = FakeCluster([node("one"), node("two")], tmp_path / "made")
    cluster.power_w = {"one": 10.0, "two": 20.0}
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out)), "", cluster) == 0
    (path,) = (out / "hosts").glob("*/run-1")
    assert sorted(row[-1] for row in ENERGY.rows(path)) == ["10.0", "20.0"]
    facts = read_environment(path)
    assert {unit["host"]: unit["energy"]["cpu"]["power_w"] for unit in facts["units"]} == cluster.power_w
    assert "energy" not in facts


def test_the_length_of_a_block_reaches_the_nodes():
    """As the reason why there is no energy advises."""
    options = vars(arguments("--suite", "smoke", "--block", "0.2"))
    assert overridden(SUITE, options).block_s == 0.2
    (unit, *_) = units_of(plan_for(overridden(SUITE, options)), 3600.0)
    assert unit.suite.block_s == 0.2


def test_company_on_a_node_is_reported(tmp_path, monkeypatch, capsys):
    """From the rounds that its own interference check marked."""
    plan_made(monkeypatch, 1)
    cluster = FakeCluster([node("one")], tmp_path / "made")
    cluster.others = 1.25
    sweep(arguments("--out", str(tmp_path / "out")), "", cluster)
    assert "1 of 1 (1.25 cores)" in capsys.readouterr().out
    assert rows(tmp_path / "out" / "summary.csv")[0]["others"] == "1.25"


def test_the_spread_between_hosts_is_that_of_the_hosts(tmp_path, monkeypatch, capsys):
    """A host that takes 10 % longer shows in times and not in speedups; each repeat is a run of its own."""
    plan_made(monkeypatch, 2)
    cluster = FakeCluster([node("one"), node("slow")], tmp_path / "made")
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out), "--repeats", "2"), "", cluster) == 0
    found = rows(out / "between-hosts.csv")
    assert len(found) == 4
    for row in found:
        ratio = float(row["time_ratio"]) if row["second"] == "slow" else 1 / float(row["time_ratio"])
        assert ratio == pytest.approx(1.1, rel=0.01)
        assert float(row["speedup_ratio"]) == pytest.approx(1.0, abs=0.02)
    runs = [read_run(out / "hosts" / SMALL.key / f"run-{number}") for number in (1, 2)]
    assert [len(run.records) for run in runs] == [6, 6]
    text = capsys.readouterr().out
    assert "4 cases on two hosts: times differ by" in text


def test_the_farthest_ratio_counts_either_way():
    assert between_hosts.largest([1.02, 1 / 1.05]) == pytest.approx(0.05)
    assert between_hosts.largest([]) == 0.0


@pytest.mark.parametrize(
    ("ended", "status"), [("timeout", Status.TIMEOUT), ("crashed", Status.CRASHED), ("failed", Status.ERROR)]
)
def test_a_unit_that_does_not_end_well_is_a_record_of_each_case(tmp_path, monkeypatch, ended, status):
    """With the reason and the host, for those of its cases that it had not recorded; samples of the others go."""
    plan_made(monkeypatch, 2)

    def before(job, found):
        if job.number == 2:
            return None
        whole = cluster.measured(found, {"threads": 2, "cases": [{"workload": "seed@batch=1"}]})
        lines = whole["files"]["records.jsonl"].splitlines(keepends=True)
        absent = b"".join(line for line in lines if b'"absent"' in line)
        return whole | {"ended": ended, "reason": "made up", "files": whole["files"] | {"records.jsonl": absent}}

    cluster = FakeCluster([node("one")], tmp_path / "made", before)
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out)), "", cluster) == 1
    run = read_run(out / "hosts" / SMALL.key / "run-1")
    found = {r.variant: (r.status, r.reason) for r in run.records if r.workload == "seed@batch=1"}
    assert found["absent"][0] is Status.UNAVAILABLE
    assert found["reference"] == found["onednn"] == (status, "made up (on one)")
    assert all(group[0] != "seed@batch=1" for group in run.samples)


def test_files_that_do_not_fit_together_are_no_result(tmp_path, monkeypatch):
    """A record without its samples fails its own unit, and no other."""
    plan_made(monkeypatch, 2)

    def before(job, found):
        if job.number == 2:
            return None
        whole = cluster.measured(found, {"threads": 2, "cases": [{"workload": "seed@batch=1"}]})
        del whole["files"]["samples.csv.gz"]
        return whole

    cluster = FakeCluster([node("one")], tmp_path / "made", before)
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out)), "", cluster) == 1
    run = read_run(out / "hosts" / SMALL.key / "run-1")
    reasons = {r.reason for r in run.records if r.workload == "seed@batch=1"}
    assert len(reasons) == 1
    assert "the files that came back do not fit together: samples.csv.gz has no values of" in reasons.pop()
    assert sum(r.status is Status.OK for r in run.records) == 2


def test_a_killed_driver_loses_only_what_was_under_way(tmp_path, monkeypatch):
    """What was kept stays, byte by byte, half-written units go, and the rest is measured once."""
    plan_made(monkeypatch, 4)
    out = tmp_path / "out"
    state = {"left": 2}

    def before(_job, _node):
        if not state["left"]:
            msg = "killed"
            raise RuntimeError(msg)
        state["left"] -= 1

    with pytest.raises(RuntimeError):
        sweep(arguments("--out", str(out)), "", FakeCluster([node("one"), node("two")], tmp_path / "a", before))
    folder = SweepFolder(out)
    first = {unit.job: (unit.path / "records.jsonl").read_bytes() for unit in folder.stored()}
    assert len(first) == 2
    # As a kill in the middle of a write leaves it.
    half = out / "units" / ".003-made.new"
    half.mkdir()
    (half / "records.jsonl").write_text("{")
    merged = out / "hosts" / SMALL.key / "run-1" / "records.jsonl"
    assert len(keys(merged.parent)) == 6
    merged.write_bytes(merged.read_bytes()[:-50])
    cluster = FakeCluster([node("one")], tmp_path / "b")
    assert sweep(arguments("--resume", str(out)), "", cluster) == 0
    assert {job.number for job, _ in cluster.begun}.isdisjoint({job.number for job in first})
    assert {unit.job: (unit.path / "records.jsonl").read_bytes() for unit in folder.stored()}.items() >= first.items()
    assert not half.exists()
    assert len(keys(merged.parent)) == len(set(keys(merged.parent))) == 12


def test_a_resumed_sweep_knows_the_nodes_that_were_lost(tmp_path, monkeypatch):
    """What ended two nodes before ends at most one more."""
    plan_made(monkeypatch, 1)
    out = tmp_path / "out"
    dying = FakeCluster([node("one"), node("two")], tmp_path / "a", lambda _job, _node: "it died")
    monkeypatch.setattr("bench.sweep.command.Pulling", functools.partial(Pulling, patience_s=0.05))
    assert sweep(arguments("--out", str(out)), "", dying) == 4
    assert SweepFolder(out).losses() == {UnitJob(1, SMALL.key, 1): ["one", "two"]}
    assert [row["ended"] for row in rows(out / "summary.csv")] == ["left"]
    three = FakeCluster([node("three"), node("four")], tmp_path / "b", lambda _job, _node: "it died")
    assert sweep(arguments("--resume", str(out)), "", three) == 1
    assert len(three.begun) == 1
    (record, *_) = read_records(out / "hosts" / SMALL.key / "run-1")
    assert record.status is Status.CRASHED
    assert "one, two, three" in record.reason


def test_an_interrupted_sweep_cancels_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    plan_made(monkeypatch, 2)

    def before(job, _node):
        if job.number == 2:
            raise KeyboardInterrupt

    cluster = FakeCluster([node("one")], tmp_path / "made", before)
    with pytest.raises(KeyboardInterrupt):
        sweep(arguments("--out", str(tmp_path / "out")), "", cluster)
    assert cluster.cancelled
    text = capsys.readouterr().out
    assert "1 of 2 units are recorded in" in text
    assert f"python -m bench sweep --resume {tmp_path / 'out'}" in text


@pytest.mark.parametrize(
    ("words", "nodes", "message"),
    [
        (["--repeats", "2"], ["one"], "--repeats 2 needs as many hosts of each kind"),
        (["--kind", "other"], ["one"], "no host of the kind 'other'"),
    ],
)
def test_a_sweep_that_the_hosts_cannot_end_is_refused(tmp_path, monkeypatch, words, nodes, message):
    """Before a folder is made."""
    plan_made(monkeypatch)
    cluster = FakeCluster(list(map(node, nodes)), tmp_path)
    with pytest.raises(UsageError, match=message):
        sweep(arguments("--out", str(tmp_path / "out"), *words), "", cluster)
    assert not (tmp_path / "out").exists()


def test_one_kind_can_be_measured_alone(tmp_path, monkeypatch):
    plan_made(monkeypatch, 1)
    cluster = FakeCluster([node("one"), node("big", LARGE)], tmp_path / "made")
    out = tmp_path / "out"
    assert sweep(arguments("--out", str(out), "--kind", LARGE.key), "", cluster) == 0
    assert [path.name for path in (out / "hosts").iterdir()] == [LARGE.key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "other"}, "the code has changed since commit"),
        ({"units": ["elsewhere"]}, "has changed"),
        ({"plugins": ["digest"]}, "a plugin has changed"),
    ],
)
def test_a_sweep_is_not_resumed_with_something_else(tmp_path, monkeypatch, change, message):
    """Figures of one sweep are of one code, one suite, one set of plugins."""
    plan_made(monkeypatch, 1)
    out = tmp_path / "out"
    sweep(arguments("--out", str(out)), "", FakeCluster([node("one")], tmp_path / "made"))
    state = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps(state | change))
    with pytest.raises(UsageError, match=message):
        sweep(arguments("--resume", str(out)), "", FakeCluster([node("one")], tmp_path / "again"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "none"], "holds no sweep that was begun"),
        (["--resume", "none", "--suite", "smoke", "--repeats", "2"], "leave out --suite, --repeats"),
        (["--suite", "smok"], "no suite 'smok'"),
        (["--plugin", "none.py"], "none.py does not exist; expected the path of a Python file"),
        (["--unit-limit", "0"], "is not a time above 0"),
    ],
)
def test_wrong_usage_is_one_line(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["sweep", *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_run_of_a_sweep_is_not_resumed_as_a_run(tmp_path, monkeypatch):
    """Its groups are of several hosts; the sweep is what can be finished."""
    plan_made(monkeypatch, 1)
    out = tmp_path / "out"
    sweep(arguments("--out", str(out)), "", FakeCluster([node("one")], tmp_path / "made"))
    with pytest.raises(UsageError, match=f"python -m bench sweep --resume {out}"):
        resume.begun(out / "hosts" / SMALL.key / "run-1")


def test_every_column_is_documented():
    """docs/sweep.md has each column of both tables with its meaning."""
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    for columns in (SUMMARY_COLUMNS, BETWEEN_COLUMNS):
        for name, meaning in columns.items():
            assert f"| `{name}` | {meaning} |" in page
