"""Other instruments on the same calls, inside the worker: torch.utils.benchmark, pytest-benchmark, and pyperf's way."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from bench.timing.seat import Subject

Call = Callable[[], object]
#: pyperf's least length of a value, and its warm-ups and values a process. Source: pyperf, documentation of Runner.
PYPERF_VALUE_S, PYPERF_WARMUPS, PYPERF_VALUES = 0.1, 1, 3
_PROBE = """
def test_call(benchmark, the_call):
    benchmark(the_call)
"""


def by_torch(subject: Subject, seconds: float) -> dict[str, float]:
    """Median of `Timer.blocked_autorange`, what torch's tutorial recommends."""
    timer = benchmark.Timer("call()", globals={"call": subject.call}, num_threads=torch.get_num_threads())
    with subject.context():
        return {"median": float(timer.blocked_autorange(min_run_time=seconds).median)}


def by_pytest(subject: Subject, seconds: float) -> dict[str, float]:
    """Median and minimum of pytest-benchmark's `benchmark` fixture, in this process, with its own calibration."""
    import pytest  # noqa: PLC0415 - only used here

    class Provider:
        """Gives the test what to call, and keeps its statistics."""

        stats: Any = None

        @pytest.fixture
        def the_call(self) -> Call:
            return subject.call

        def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
            self.stats = output_json["benchmarks"][0]["stats"]

    provider = Provider()
    with tempfile.TemporaryDirectory() as folder, subject.context():
        path = Path(folder) / f"test_probe_{time.monotonic_ns()}.py"
        path.write_text(_PROBE, encoding="utf-8")
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", os.devnull]
        timing = [f"--benchmark-max-time={seconds}", f"--benchmark-json={folder}/out.json"]
        code = pytest.main([*options, *timing, str(path)], plugins=[provider])
    if code or provider.stats is None:
        msg = f"pytest-benchmark ended with code {int(code)}, expected 0"
        raise RuntimeError(msg)
    return {"median": provider.stats["median"], "min": provider.stats["min"]}


def pyperf_values(subject: Subject) -> list[float]:
    """Values that one of pyperf's processes gives: the mean of a loop, three times, after one that warms up."""
    with subject.context():
        start = time.perf_counter()
        subject.call()
        loops = 1
        # pyperf doubles the loops until a value is long enough.
        while (time.perf_counter() - start) < PYPERF_VALUE_S:
            loops *= 2
            start = time.perf_counter()
            for _ in range(loops):
                subject.call()
        values = []
        for _ in range(PYPERF_WARMUPS + PYPERF_VALUES):
            start = time.perf_counter()
            for _ in range(loops):
                subject.call()
            values.append((time.perf_counter() - start) / loops)
    return values[PYPERF_WARMUPS:]
