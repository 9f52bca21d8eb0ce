"""A node's part of a sweep: measures one unit in a process of its own, and hands the files of its run back as bytes.

It runs inside a task of the cluster and from the checkout on the node. Whatever ends the task, a cancelled sweep or a
killed node process, ends the measuring process and its workers with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.run.worker_process import ROOT, end, guard, scratch_folder

#: Files of a run folder that a sweep keeps; tables and plots are made from them.
KEPT = (
    "records.jsonl",
    "samples.csv.gz",
    "rounds.csv.gz",
    "energy.csv.gz",
    "environment.json",
    "plan.json",
    "workers.log",
    "unit.log",
)
#: Most of a log that is handed back, bytes: its end.
LOG_BYTES = 1_000_000


def measure_unit(request: dict[str, Any]) -> dict[str, Any]:
    """Measure a unit on this node.

    Args:
        request: as `bench.sweep.units.request_of` writes it.

    Returns:
        `files` with their content, `ended` (`done`, `timeout`, `crashed` or `failed`), `reason` in words, and `wall_s`
        by this node's own clock.
    """
    start = time.perf_counter()
    with scratch_folder() as scratch:
        run = scratch / "run"
        run.mkdir()
        asked = scratch / "request.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        with (scratch / "unit.log").open("wb") as log:
            child = subprocess.Popen(  # noqa: S603 - our own module and two paths
                [sys.executable, "-m", "bench.sweep.measure", str(asked), str(run)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean(dict(os.environ)),
                cwd=ROOT,
                start_new_session=True,
            )
            watch = guard(child.pid)
            try:
                code: int | None = child.wait(request["limit_s"])
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(child, watch)
        (scratch / "unit.log").replace(run / "unit.log")
        ended, reason = _ending(code, request["limit_s"], (run / "unit.log").read_text("utf-8", errors="replace"))
        files = {name: _content(run / name) for name in KEPT if (run / name).is_file()}
    return {"files": files, "ended": ended, "reason": reason, "wall_s": round(time.perf_counter() - start, 1)}


def clean(variables: dict[str, str]) -> dict[str, str]:
    """Environment of the measuring process, without what Ray sets in its tasks: its names, and one OpenMP thread."""
    return {name: text for name, text in variables.items() if name != "OMP_NUM_THREADS" and not name.startswith("RAY_")}


def _ending(code: int | None, limit_s: float, log: str) -> tuple[str, str]:
    """Return how the process ended, and why."""
    if code == 0:
        return "done", ""
    if code is None:
        return "timeout", f"the unit took longer than its limit of {limit_s:g} s"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
    if code < 0:
        return "crashed", f"the measuring process was killed by signal {-code}; its last line: {last}"
    return "failed", f"the measuring process ended with code {code}: {last}"


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return content[-LOG_BYTES:] if path.suffix == ".log" else content
