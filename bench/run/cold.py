"""A case's cold run: alone in a fresh process with empty caches of compilers and kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plan.cases import Case
from bench.run.worker_process import Worker, WorkerError


def run_cold(
    start: Callable[[Path], Worker], case: Case, limit_s: float, scratch: Path, kept: Path
) -> tuple[dict[str, Any], WorkerError | None]:
    """Build and call a case, and find its memory and the evidence of what ran.

    Args:
        start: starts the process with a folder for what compilers cache.
        case: which.
        limit_s: longest time that the process may be silent, seconds.
        scratch: where that folder is made.
        kept: folder that later processes use, which takes what was compiled here.

    Returns:
        The fields found, and what ended the process or None.
    """
    cache = Path(tempfile.mkdtemp(dir=scratch))
    fields: dict[str, Any] = {}
    try:
        with start(cache) as worker:
            for event in worker.ask("cold", limit_s, case=dataclasses.asdict(case)):
                if event["event"] == "cold":
                    fields |= event["fields"]
    except WorkerError as error:
        return fields, error
    finally:
        # Without it later processes compile again, so a copy that fails costs time alone.
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(cache, kept, dirs_exist_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
    return fields, None
