"""Exporting a run: what pytest-benchmark reads is what the run recorded, and pytest-benchmark really reads it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import SPEEDUPS, make_run

from bench import __main__ as command_line
from bench import commands
from bench.records.reader import read_records

pytest.importorskip("pytest_benchmark")

FAILED = {"compile": ("parity-failed", "off by 3e-1")}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A made run with one case that did not end ok."""
    from bench.records.schema import Status

    monkeypatch.setattr("bench.analysis.intervals.RESAMPLES", 100)
    failed = {name: (Status(status), reason) for name, (status, reason) in FAILED.items()}
    return make_run(tmp_path / "run", failed=failed, noise=0.05, disturbed_share=0.3, figured=True)


def export(*words: object) -> int:
    """Exit code of an export."""
    return command_line.main(["export", "--format", "pytest-benchmark", *map(str, words)])


def outside(folder: Path, *words: str) -> str:
    """Return what another program prints, run from a folder of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_benchmark_is_a_case_with_its_record_s_figures(run, capsys):
    """One benchmark a case that is ok: its median is the record's p50, its data the calls of the kept rounds."""
    assert export(run) == 0
    said = capsys.readouterr().out
    assert "3 cases" in said
    assert "seed-inference-compile (parity-failed)" in said
    data = json.loads((run / "export.pytest-benchmark.json").read_text())
    records = {f"{r.group}/{r.variant}": r for r in read_records(run) if r.variant in SPEEDUPS}
    assert [bench["fullname"] for bench in data["benchmarks"]] == list(records)
    for bench in data["benchmarks"]:
        record, stats = records[bench["fullname"]], bench["stats"]
        assert stats["median"] == pytest.approx(record.latency_p50_s, rel=1e-7)
        assert stats["rounds"] == len(stats["data"]) == record.calls
        assert stats["iterations"] == 1
        assert stats["min"] <= stats["q1"] <= stats["median"] <= stats["q3"] <= stats["max"]
        assert bench["group"] == record.group
        assert bench["params"]["variant"] == record.variant
        assert bench["extra_info"]["speedup"] == record.speedup
        assert bench["extra_info"]["status"] == "ok"
    assert data["commit_info"]["id"] == "0123456789abcdef"
    assert data["machine_info"]["cpu"]["brand_raw"] == "Some CPU"


def test_the_file_has_every_key_that_pytest_benchmark_writes(run, tmp_path):
    """Keys of file, benchmark and statistics are those of a file that pytest-benchmark itself saved."""
    (tmp_path / "test_own.py").write_text("def test_own(benchmark):\n    benchmark(sum, [1, 2])\n")
    words = ["--benchmark-json=own.json", "--benchmark-save-data", "--benchmark-max-time=0.01"]
    outside(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_own.py", *words)
    own = json.loads((tmp_path / "own.json").read_text())
    assert export(run, "--out", tmp_path / "ours.json") == 0
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert set(own) == set(ours)
    assert set(own["benchmarks"][0]) == set(ours["benchmarks"][0])
    assert set(own["benchmarks"][0]["stats"]) == set(ours["benchmarks"][0]["stats"])
    assert ours["version"] == own["version"]


def test_pytest_benchmark_compares_two_runs(run, tmp_path):
    """`pytest-benchmark compare` shows each case of both files with its median."""
    other = make_run(tmp_path / "other", drift=1.5, seed=1)
    assert export(run, "--out", tmp_path / "a.json") == 0
    assert export(other, "--out", tmp_path / "b.json") == 0
    words = ["compare", "a.json", "b.json", "--columns=median,rounds", "--csv=table.csv"]
    shown = outside(tmp_path, "pytest_benchmark", *words)
    assert "benchmark 'seed/inference/cpu/1t': 6 tests" in shown
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
    for bench in data:
        found = [float(row["median"]) for row in rows if row["name"] == bench["fullname"]]
        assert len(found) == 2
        assert pytest.approx(bench["stats"]["median"]) in found
        assert max(found) / min(found) == pytest.approx(1.5, rel=0.1)


def test_pytest_compares_its_own_benchmark_with_an_exported_one(run, tmp_path):
    """`--benchmark-compare` lays a case beside the benchmark of the same name."""
    assert export(run, "--out", tmp_path / "ours.json") == 0
    (tmp_path / "test_own.py").write_text(
        "def test_own(benchmark):\n"
        "    benchmark.fullname = 'seed/inference/cpu/1t/onednn'\n"
        "    benchmark.group = 'seed/inference/cpu/1t'\n"
        "    benchmark(sum, [1, 2])\n"
    )
    words = ["--benchmark-compare=ours.json", "--benchmark-max-time=0.01", "--benchmark-columns=median"]
    shown = outside(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_own.py", *words)
    assert "Comparing against benchmarks from: " in shown
    assert "benchmark 'seed/inference/cpu/1t': 2 tests" in shown


def test_a_file_that_is_there_is_refused(run, capsys):
    """Nothing is overwritten: exit code 2 and one line."""
    assert export(run) == 0
    capsys.readouterr()
    before = (run / "export.pytest-benchmark.json").read_text()
    assert export(run) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "exists" in shown.err
    assert shown.err.count("\n") == 1
    assert (run / "export.pytest-benchmark.json").read_text() == before


def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path):
    """Between the first look and the writing another program may have made it."""
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(command_line.UsageError, match="cannot be written"):
        commands.write_text(tmp_path / "taken", "ours")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("words", [["nowhere"], ["run", "--format", "asv"], []])
def test_wrong_usage_is_one_line(words, tmp_path, monkeypatch, capsys):
    """No folder, an unknown format, no run: exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    try:
        code = export(*words)
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert "error: " in shown.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_pytest_benchmark_the_line_says_what_to_install(run, monkeypatch, capsys):
    """An absent library costs this feature and is named."""
    monkeypatch.setitem(sys.modules, "pytest_benchmark.stats", None)
    assert export(run) == 2
    assert "pip install pytest-benchmark" in capsys.readouterr().err
    assert not (run / "export.pytest-benchmark.json").exists()
