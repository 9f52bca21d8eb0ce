"""A run in another program's format: pytest-benchmark's JSON, which `pytest-benchmark compare` opens.

pytest-benchmark itself computes the statistics, so that a column means the same as in its other files. One of its
rounds is a single call, and its median is the p50 of the case's record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis.compare import load
from bench.errors import UsageError
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status

#: Columns of a record that go along with each benchmark.
EXTRA = (
    "status",
    "evidence",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "parity_error",
    "parity_limit",
    "grad_error",
    "grad_limit",
    "precision",
    "ran_precision",
    "disturbed",
    "interval_wide",
)


@dataclass(frozen=True)
class Exported:
    """Text of the file, number of cases in it, and the cases left out, each with its status."""

    text: str
    cases: int
    left_out: tuple[str, ...]


def pytest_benchmark(path: Path) -> Exported:
    """A run folder as pytest-benchmark's JSON.

    Raises:
        UsageError: it is not a run folder, or pytest-benchmark is not installed.
    """
    try:
        from pytest_benchmark import __version__  # noqa: PLC0415 - optional
        from pytest_benchmark.stats import Stats  # noqa: PLC0415
    except ImportError as error:
        msg = "this format needs pytest-benchmark, whose statistics it holds: pip install pytest-benchmark"
        raise UsageError(msg) from error
    run = load(path)
    ok = [record for record in run.records if record.status is Status.OK]
    benchmarks = []
    for record in ok:
        found = Stats()
        found.data = _calls(run, record)
        benchmarks.append(_benchmark(record, found.as_dict() | {"data": found.data, "iterations": 1}))
    data = {
        "machine_info": _machine(run.environment),
        "commit_info": _commit(run.environment),
        "benchmarks": benchmarks,
        "datetime": min((record.recorded_at for record in run.records), default=""),
        "version": __version__,
    }
    left_out = [record for record in run.records if record.status is not Status.OK]
    return Exported(json.dumps(data, indent=1), len(ok), tuple(f"{_name(r)} ({r.status})" for r in left_out))


def _calls(run: RecordedRun, record: Record) -> list[float]:
    """Single calls of the rounds that the record's figures were made of, seconds, in the order of their rounds."""
    if len(calls := run.calls(record)):
        return [float(seconds) for seconds in calls]
    # A block that was queued on a GPU may have no single calls; then its mean stands for one.
    kept = run.group(record).kept_of(record.variant)
    return [found.blocks[record.variant].per_call_s for rounds in kept for found in rounds]


def _benchmark(record: Record, stats: Mapping[str, Any]) -> dict[str, Any]:
    values = record.as_dict()
    return {
        "group": record.group,
        "name": _name(record),
        "fullname": f"{record.group}/{record.variant}",
        "params": {name: values[name] for name in ("workload", "mode", "device", "threads", "variant")},
        "param": f"{record.workload}-{record.mode}-{record.device}-{record.threads}-{record.variant}",
        "extra_info": {name: _plain(values[name]) for name in EXTRA},
        "options": {},
        "stats": dict(stats),
    }


def _name(record: Record) -> str:
    return f"{record.workload}-{record.mode}-{record.variant}"


def _plain(value: Any) -> Any:
    """Convert a value to one that JSON has."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that the run recorded about its machine, under pytest-benchmark's names where they exist."""
    machine, software = (_section(environment, name) for name in ("machine", "software"))
    return {
        "processor": machine.get("processor"),
        "machine": machine.get("architecture"),
        "python_version": software.get("python"),
        "system": machine.get("system"),
        "cpu": {"brand_raw": machine.get("processor"), "count": machine.get("cores_logical")},
        "software": dict(software),
        "gpu": machine.get("gpu"),
    }


def _commit(environment: Mapping[str, Any]) -> dict[str, Any]:
    git = _section(environment, "git")
    return {"id": git.get("commit"), "dirty": git.get("dirty"), "project": "seq2seq-bench"}


def _section(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = environment.get(name)
    return found if isinstance(found, Mapping) else {}
