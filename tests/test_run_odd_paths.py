"""Folders with spaces, colons, line ends, umlauts and bytes that are no UTF-8: a run works in and with all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from warm_workers import BRIEF_CEILINGS

from bench.worker import evidence
from kernels.cpu import build

ROOT = Path(__file__).parents[1]
SUITE = """
name = "odd"
summary = "one group in odd places"
budget_s = 1
processes = 1
second_instrument = true
[[select]]
workloads = ["seed"]
variants = ["planted", "cpu-fused"]
modes = ["inference"]
"""
PLUGIN = """
import dataclasses
from seq2seq.execution.variants import VARIANTS
VARIANTS["planted"] = dataclasses.replace(VARIANTS["loop"], name="planted")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
def test_a_run_works_in_odd_folders(tmp_path):
    """The checkout, the run, the plugin, the suite, the caches, the temporary folder: each has a name of its kind."""
    checkout, temporary = tmp_path / "ä check:out\nhere", tmp_path / "t:mp ü\n"
    temporary.mkdir()
    for room in ("bench", "kernels", "seq2seq"):
        # Not what another process is compiling at this moment.
        shutil.copytree(ROOT / room, checkout / room, ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    plugin, suite = tmp_path / os.fsdecode(b"pl:ug \xff\n.py"), tmp_path / "süite : of\nmine.toml"
    plugin.write_text(PLUGIN, encoding="utf-8")
    suite.write_text(SUITE, encoding="utf-8")
    places = {"TMPDIR": str(temporary), "SEQ2SEQ_KERNEL_CACHE": str(tmp_path / "c:ache ü\n")}
    places["SEQ2SEQ_KERNEL_FLAGS"] = "-Og"  # Compiled in 3 s instead of 12.
    expected = {"reference": "ok", "planted": "ok", "cpu-fused": "ok" if build.missing() is None else "unavailable"}
    out = tmp_path / os.fsdecode(b"o:ut \xff\n x")
    words = ["--suite", str(suite), "--plugin", str(plugin), "--plugin", str(BRIEF_CEILINGS), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", *words, "--out", str(out)],
        env=os.environ | places | {"PYTHONIOENCODING": "utf-8:backslashreplace"},
        capture_output=True,
        check=False,
        cwd=checkout,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    records = [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {record["variant"]: record["status"] for record in records}
    assert found == expected, [record["reason"] for record in records]
    assert (out / "report.html").is_file()
    assert (out / "plots" / "speedup.png").is_file()
    assert json.loads((out / "pytest-benchmark.json").read_text(encoding="utf-8"))["benchmarks"]
    assert list(temporary.iterdir()) == []


def test_what_ran_is_seen_from_an_odd_temporary_folder(tmp_path, monkeypatch):
    """The profiler writes there, and takes line ends out of paths."""
    import torch

    odd = tmp_path / "t:mp ü\n x"
    odd.mkdir()
    monkeypatch.setattr(evidence.tempfile, "tempdir", str(odd))
    before = Path.cwd()
    seen = evidence.observe(lambda: torch.ones(3) + 1, "cpu", None)
    assert "aten::add" in seen.shown()
    assert Path.cwd() == before
    assert not list(odd.rglob("trace.json"))
