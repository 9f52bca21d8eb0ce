"""The cold start of a case: whatever is compiled for it is compiled in it, and nothing is compiled beforehand."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.plan.cases import PASSES, Case
from bench.run.cold import ColdCase, ColdRuns
from bench.run.worker_process import Settings, Worker
from kernels.cpu import build

ROOT = Path(__file__).parents[1]
WORKLOAD = "seed@batch=2,length=3"
CASE = Case(WORKLOAD, "cpu-fused", "inference", "cpu", 1)

needs_compiler = pytest.mark.skipif(build.missing() is not None, reason="there is no C++ compiler")


def cold(folder: Path) -> dict[str, float]:
    """Fields of the cold run of `CASE`, whose caches are in a folder."""
    with Worker(Settings(1), folder / "log", folder) as worker:
        found = [
            event for event in worker.ask("cold", 120.0, case=dataclasses.asdict(CASE)) if event["event"] == "cold"
        ]
    return found[0]["fields"]


def reasons(folder: Path, compile_it: Sequence[bool]) -> list[str | None]:
    """Reasons why `CASE` cannot run, by one worker that is asked several times."""
    found = []
    with Worker(Settings(1), folder / "log", folder / "cache") as worker:
        for build_it in compile_it:
            *_, event = worker.ask("describe", 120.0, cases=[dataclasses.asdict(CASE)], build=build_it)
            assert event["builds"]
            found.append(event["reason"])
    return found


@needs_compiler
@pytest.mark.slow
def test_a_run_compiles_the_kernel_once_and_counts_it_in_every_first_call(monkeypatch, tmp_path):
    """The second cold run finds it compiled, and its first call is as long as a user's is with an empty cache.

    With what was compiled there, it is no part of a cold start; the user's own cache is left alone.
    """
    user, kept = tmp_path / "user's", tmp_path / "kept"
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(user))
    monkeypatch.setenv("SEQ2SEQ_KERNEL_FLAGS", "-Og")  # 3 s instead of 12.
    start, log = functools.partial(Worker, Settings(1)), tmp_path / "log"
    cases = (dataclasses.replace(CASE, mode=mode) for mode in PASSES)
    asked = [ColdCase(case, start, kept, log, builds=True) for case in cases]
    first, second = (fields for _, fields, _ in ColdRuns(tmp_path, 120.0, cores=2).run(asked))
    # The first one waited; of the second one it is computed from the time of each library.
    assert second["compile_s"] == pytest.approx(first["compile_s"], rel=0.05)
    assert first["compile_s"] > 0.2
    assert all(fields["first_call_s"] > fields["compile_s"] for fields in (first, second))
    compiled = sorted(path.name.partition("-")[0] for path in (kept / "kernels").glob("*.so"))
    assert compiled == ["entry", "lstm"]
    again = cold(kept)
    assert again["compile_s"] == 0
    assert again["build_s"] + again["first_call_s"] < first["compile_s"]
    assert not user.exists()


@needs_compiler
def test_a_dry_run_compiles_nothing(tmp_path):
    """It says that the kernel runs here, and leaves its cache as it was."""
    user, temporary = tmp_path / "user's", tmp_path / "temporary"
    temporary.mkdir()
    words = ["--workload", WORKLOAD, "--variant", "cpu-fused", "--mode", "inference", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", *words],
        env=os.environ | {"SEQ2SEQ_KERNEL_CACHE": str(user), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "2 can run here" in done.stdout
    assert not user.exists()
    assert list(temporary.iterdir()) == []


def test_a_kernel_that_cannot_be_compiled_is_unavailable(monkeypatch, tmp_path):
    """A compiler that is there is enough for a dry run; a run finds out whether it compiles."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'error: planted' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    dry, real = reasons(tmp_path, (False, True))
    assert dry is None
    assert "error: planted" in real
    monkeypatch.setenv("CXX", "no-such-compiler")
    (none,) = reasons(tmp_path, (False,))
    assert "install a C++ compiler" in none
