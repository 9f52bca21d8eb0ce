"""The second instrument: a run's quick cases again under pytest-benchmark, and what it found, for the report.

It runs in a process of its own, and whatever becomes of it costs the run nothing but its figures. Nothing here imports
torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.plan.cases import Case
from bench.plan.identity import CaseKey
from bench.run.worker_process import QUIET, ROOT, Settings, cache_variables, end, guard

#: The workload that it takes; what compiles long is left out.
WORKLOAD = "seed"
#: Its file in the run folder, as pytest-benchmark writes it.
FILE = "pytest-benchmark.json"
#: Its time a case is bounded; calls of the seed are so short that this gives hundreds of rounds.
OPTIONS = (
    "--benchmark-only",
    "--benchmark-max-time=0.4",
    "--benchmark-min-rounds=10",
    "--benchmark-disable-gc",
    "--benchmark-columns=median,iqr,rounds",
    "--tb=short",
    "-rf",
    # Nothing is written but the JSON, and no other plugin that happens to be installed joins in.
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_benchmark.plugin",
)
#: Seconds that its start and each case take, for the expected time.
START_S, CASE_S = 5.0, 0.6


@dataclass(frozen=True)
class Figure:
    """Figure that pytest-benchmark gives for a case: median seconds of its rounds, and the number of rounds."""

    median_s: float
    rounds: int


@dataclass(frozen=True)
class Findings:
    """Content of its file.

    Attributes:
        figures: by case.
        refused: why a case has no figure, by case.
        problem: why nothing could be read, in one line; empty when all is well or there is no file.
    """

    figures: dict[CaseKey, Figure] = field(default_factory=dict)
    refused: dict[CaseKey, str] = field(default_factory=dict)
    problem: str = ""


def case_id(workload: str, mode: str, variant: str, device: str) -> str:
    """The name of a case in `bench/microbench/test_variants.py`: `seed-inference-onednn`, on a GPU with the device."""
    return "-".join([workload, mode, variant, *([device] if device != "cpu" else [])])


def takes(case: Case, *, compiles: bool) -> bool:
    """Return whether a case is a quick one. A labelled variant is the same code a second time, so it is not."""
    return case.workload == WORKLOAD and not compiles and case.variant == case.executed


def expected_s(cases: int) -> float:
    """A rough guess of its length, seconds."""
    return START_S + CASE_S * cases if cases else 0.0


def done(folder: Path) -> bool:
    """Return whether a run folder has its figures already."""
    # pytest-benchmark makes its file empty at its start, so one that was interrupted leaves no figures to keep.
    return (folder / FILE).exists() and not read(folder).problem


def run(cases: Collection[Case], folder: Path, settings: Settings, cache: Path, limit_s: float) -> list[str]:
    """Time cases with pytest-benchmark; its figures go into `folder / FILE`, its output into workers.log.

    Args:
        cases: what to time, each taken by `takes`.
        folder: the run's.
        settings: threads and the like.
        cache: folder for whatever compilers cache.
        limit_s: seconds it may take in all.

    Returns:
        Lines for the user: what was refused, and what became of it. Nothing is raised.
    """
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("pytest_benchmark") is None:
        return ["second instrument: left out, since pytest-benchmark is not installed: pip install pytest-benchmark"]
    if done(folder):
        return [f"second instrument: {folder / FILE} is there already and is kept"]
    log = folder / "workers.log"
    try:
        with log.open("a", encoding="utf-8") as file:
            start = file.tell()
            code = _run(command(cases, folder), variables(settings, cache), file.fileno(), limit_s)
        with log.open("rb") as written:
            written.seek(start)
            said = written.read().decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        return [f"second instrument: left out, since pytest could not be run: {error}"]
    if code is None:
        return [f"second instrument: left out, since it did not end within {limit_s:g} s"]
    return [*_refusals(said), _summary(code, len(cases), read(folder))]


def command(cases: Iterable[Case], folder: Path) -> list[str]:
    """The command line that times the cases."""
    ids = [case_id(case.workload, case.mode, case.variant, case.device) for case in cases]
    devices = sorted({case.device for case in cases})
    threads = {case.threads for case in cases}
    return [
        *(sys.executable, "-m", "pytest", *OPTIONS, f"--benchmark-json={(folder / FILE).resolve()}"),
        *(f"--bench-threads={number}" for number in threads),
        *(f"--bench-device={device}" for device in devices),
        *(f"bench/microbench/test_variants.py::test_variant[{name}]" for name in ids),
    ]


def variables(settings: Settings, cache: Path) -> dict[str, str]:
    """Environment of its process: what the run's workers get, and nothing of the user's own pytest."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return (
        QUIET
        | kept
        | settings.variables()
        | cache_variables(cache)
        | {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            # pytest cuts its lines to the terminal's width, and reasons are longer.
            "COLUMNS": "600",
        }
    )


def _run(line: list[str], environment: dict[str, str], output: int, limit_s: float) -> int | None:
    """Exit code of the command, or None when it took too long; everything it started is ended with it."""
    child = subprocess.Popen(  # noqa: S603 - our own command
        line,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    watch: subprocess.Popen[bytes] | None = None
    try:
        watch = guard(child.pid)
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(child, watch)


def _refusals(said: str) -> list[str]:
    """A line for each case that failed, from pytest's summary."""
    pattern = r"^(?:FAILED|ERROR) bench/microbench/test_variants\.py::test_variant\[(.+?)\](?: - (?:Failed: )?(.*))?$"
    return [
        f"second instrument: no figure for {name}: {reason or 'workers.log has the reason'}"
        for name, reason in re.findall(pattern, said, re.MULTILINE)
    ]


def _summary(code: int, asked: int, found: Findings) -> str:
    """Describe how many figures there are, and anything that went wrong besides refusals."""
    text = f"second instrument: pytest-benchmark timed {len(found.figures)} of {asked} cases"
    if found.problem:
        text += f"; {found.problem}"
    # 0: all passed; 1: some failed, which was said line by line.
    if code not in {0, 1} or not found.figures:
        text += f"; pytest ended with exit code {code}, and workers.log has what it said"
    return text


def read(folder: Path) -> Findings:
    """Read what the second instrument left in a run folder; empty without its file. Nothing is raised."""
    path = folder / FILE
    if not path.is_file():
        return Findings()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        figures = {CaseKey.read(entry["extra_info"]): _figure(entry["stats"]) for entry in data["benchmarks"]}
        refused = {CaseKey.read(entry): str(entry["reason"]) for entry in data.get("refused", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = "".join(str(error).splitlines()[:1])
        return Findings(
            problem=f"{path.name} cannot be read ({type(error).__name__}: {first}): its figures are left out"
        )
    return Findings(figures, refused)


def _figure(stats: dict[str, Any]) -> Figure:
    median_s = float(stats["median"])
    if not 0 < median_s < math.inf:
        msg = f"a median of {median_s} s"
        raise ValueError(msg)
    return Figure(median_s, int(stats["rounds"]))
