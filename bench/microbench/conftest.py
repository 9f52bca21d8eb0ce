"""The pytest-benchmark surface: its own options, the user's plugins, and the rule that what fails has no figure."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.run.worker_process import PLUGINS, plugin_paths
from bench.worker.server import load_plugins
from kernels.host.cores import usable_cores

HERE = Path(__file__).parent
#: What the gate or an error kept from a figure, as plain values.
REFUSED = pytest.StashKey[list[dict[str, Any]]]()
#: What pytest-benchmark notes of the machine that differs from one minute to the next, or names the host: the former
#: would make every comparison warn of another machine, the latter does not belong into a published folder.
NO_FACTS = ("hz_actual", "hz_actual_friendly"), ("node",)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Device, threads and seed, with a prefix that no other plugin has."""
    group = parser.getgroup("seq2seq-bench")
    group.addoption(
        "--bench-device",
        action="append",
        choices=("cpu", "cuda"),
        help="device to time on; can be repeated (default: cpu, and cuda where torch sees a GPU)",
    )
    group.addoption(
        "--bench-threads",
        type=int,
        metavar="N",
        help="CPU threads (default: torch's own, at most the usable cores)",
    )
    group.addoption("--bench-seed", type=int, metavar="N", help="of the gates' inputs (default: new each time)")


def pytest_configure(config: pytest.Config) -> None:
    """Load plugins before any case is listed."""
    config.stash[REFUSED] = []
    threads = config.getoption("--bench-threads", None)
    if threads is not None and threads < 1:
        msg = f"--bench-threads is {threads}, expected at least 1"
        raise pytest.UsageError(msg)
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    try:
        load_plugins(plugin_paths())
    except Exception as error:
        msg = f"a plugin of {PLUGINS} cannot be loaded: {type(error).__name__}: {error}"
        raise pytest.UsageError(msg) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let a variant that warns be timed: a warning is an error only in the tests."""
    known = [line for line in config.getini("filterwarnings") if line != "error"]
    # What the gate refuses is not timed, and its failure says so.
    known.append("ignore:Benchmark fixture was not used at all")
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.filterwarnings("default", *known))


@pytest.fixture(scope="session")
def gate_seed(pytestconfig: pytest.Config) -> int:
    """Seed of the gates, a new one for each session unless given."""
    given = pytestconfig.getoption("--bench-seed", None)
    return random.randrange(2**31) if given is None else int(given)  # noqa: S311 - not a secret


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Take the figure away from what failed, whenever it failed: the second gate comes after the timing."""
    report = yield
    if report.failed and call.excinfo is not None:
        reason = " ".join(str(call.excinfo.value).split())
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        threads = torch.get_num_threads()
        item.config.stash[REFUSED].append({**parameters, "name": item.name, "threads": threads, "reason": reason})
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if isinstance(benchmark, BenchmarkFixture):
            # pytest-benchmark leaves what has an error out of its JSON, and what has no data out of its table.
            benchmark.has_error = True
            if benchmark.stats is not None:
                benchmark.stats.stats.data.clear()
    return report


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Say in the JSON too what was refused, and why."""
    output_json["refused"] = config.stash[REFUSED]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave out `NO_FACTS`."""
    of_processor, of_machine = NO_FACTS
    for name in of_processor:
        machine_info.get("cpu", {}).pop(name, None)
    for name in of_machine:
        machine_info.pop(name, None)
