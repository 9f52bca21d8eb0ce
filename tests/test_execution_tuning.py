"""Tuned processes: the settings reach the process, the evidence says so, and what is missing is told."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from bench.plan.cases import Case, load_suite, match
from bench.run.worker_process import Settings, Worker
from seq2seq.execution import tuning
from seq2seq.execution.tuning import TUNINGS, in_force, needs_library
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.registry import WORKLOADS

TUNED = {name: variant for name, variant in VARIANTS.items() if variant.environment}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as Linux does it")


def test_each_setting_is_there_for_torchs_lstm_and_ours():
    """By a name that no pattern for the plain variants takes, in a process of its own, and else like the plain one."""
    assert set(TUNED) == {f"{t.name}-{name}" for t in TUNINGS for name in ("onednn", "cpu-fused")}
    for name, variant in TUNED.items():
        plain = VARIANTS[name.partition("-")[2]]
        assert variant.alone
        own = ("name", "summary", "environment", "requirements")
        assert all(
            getattr(variant, f.name) == getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name not in own
        )
        assert set(plain.requirements) <= set(variant.requirements)
    assert not set(match(["onednn*", "cpu-fused*"], list(VARIANTS), "variant")) & set(TUNED)


def test_the_suite_has_them_beside_the_plain_ones():
    """All that there are, and nothing twice."""
    (part,) = load_suite("tuning").select
    chosen = match(part.variants, list(VARIANTS), "variant")
    assert set(chosen) == {"reference", "onednn", "cpu-fused", *TUNED}
    assert len(chosen) == len(set(chosen))


def test_a_library_that_is_missing_is_named_with_its_package(monkeypatch):
    """Also where there is one of that name in another version, which the loader would not take."""
    for found in (None, "libjemalloc.so.1"):
        monkeypatch.setattr(tuning, "_found", lambda _, found=found: found)
        reason = VARIANTS["jemalloc-onednn"].why_not("cpu", "inference", WORKLOADS["seed"])
        assert reason == "needs libjemalloc.so.2, which is not installed: sudo apt-get install libjemalloc2"
    monkeypatch.setattr(tuning, "_found", lambda _: "libjemalloc.so.2")
    assert needs_library("libjemalloc.so.2", "libjemalloc2")("cpu", "inference", WORKLOADS["seed"]) is None


@LINUX
def test_what_is_not_in_force_is_said(monkeypatch):
    """A variable that did not arrive, and a library that the loader left out."""
    assert in_force({"OMP_WAIT_POLICY": "SOME"}) == "OMP_WAIT_POLICY=SOME was NOT set in this process"
    monkeypatch.setenv("LD_PRELOAD", "libnothing.so.9")
    assert in_force({"LD_PRELOAD": "libnothing.so.9"}) == "LD_PRELOAD=libnothing.so.9 was NOT loaded"
    monkeypatch.setenv("OMP_WAIT_POLICY", "SOME")
    assert in_force({"OMP_WAIT_POLICY": "SOME"}) == "OMP_WAIT_POLICY=SOME"


def asked(name: str, folder: Path, request: str, **fields) -> list[dict]:
    """Events of a worker started as a variant wants."""
    settings = Settings(1).with_environment(VARIANTS[name].environment)
    with Worker(settings, folder / "log", folder) as worker:
        return list(worker.ask(request, 240, **fields))


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("passive-onednn", "OMP_WAIT_POLICY=PASSIVE"),
        ("bound-onednn", "OMP_PROC_BIND=close (threads bound to core "),
    ],
)
def test_evidence_names_the_settings(tmp_path, name, said):
    """From a process that was started with them, and they were seen there."""
    if name.startswith("bound") and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("with one core every thread is bound to it")
    case = Case("seed", name, "inference", "cpu", 1)
    *_, cold = asked(name, tmp_path, "cold", case=dataclasses.asdict(case))
    assert "oneDNN" in cold["fields"]["evidence"]
    assert said in cold["fields"]["evidence"]


def test_the_record_has_the_variants_own_wait_policy(tmp_path):
    """Whatever the run's is, in the worker that describes the case."""
    cases = [dataclasses.asdict(Case("seed", n, "inference", "cpu", 1)) for n in ("onednn", "passive-onednn")]
    with Worker(Settings(1, "active"), tmp_path / "log", tmp_path) as worker:
        events = worker.ask("describe", 240, cases=cases, build=False)
        found = [event for event in events if event["event"] == "described"]
    assert [event["facts"]["omp_wait"] for event in found] == ["active", "passive"]
    assert found[1]["environment"] == {"OMP_WAIT_POLICY": "PASSIVE"}


@LINUX
@pytest.mark.parametrize("name", ["tcmalloc-onednn", "jemalloc-onednn"])
def test_an_allocator_is_really_loaded_where_it_is_installed(tmp_path, name):
    """Its requirement and the loader agree."""
    case = Case("seed", name, "inference", "cpu", 1)
    if VARIANTS[name].why_not("cpu", "inference", WORKLOADS["seed"]):
        pytest.skip("not installed here")
    *_, cold = asked(name, tmp_path, "cold", case=dataclasses.asdict(case))
    assert cold["fields"]["evidence"].endswith(f"LD_PRELOAD={VARIANTS[name].environment['LD_PRELOAD']}")
