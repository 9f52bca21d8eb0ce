"""Setup of all tests: one hypothesis profile, how kernels run where there is no GPU, and how tests share cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from planted_kernels import KernelPrograms
from warm_workers import WarmWorkers

# Triton decides when a kernel is defined whether it will be interpreted, so this comes before any import of one.
# Without a GPU there is no other way to run them; on a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor would start processes that compile beside this one: each imports torch, and the other core has tests to run.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

try:
    from hypothesis import settings
except ImportError:
    pass  # The modules that need it skip themselves.
else:
    # A first call compiles or allocates, so one example may take far longer than the next: no deadline.
    settings.register_profile("project", deadline=None, max_examples=10, print_blob=True)
    settings.load_profile("project")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees no GPU; under pytest-xdist, begin with the files that take long.

    One that began last would keep one core busy and the others waiting.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (torch.cuda.is_available() is false)"))
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _no_worker_below() -> Iterator[None]:
    """Programs that tests start are no workers of pytest-xdist, in which pytest-benchmark would time nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


@pytest.fixture(scope="session")
def warm_workers() -> Iterator[WarmWorkers]:
    """Processes from which tests fork workers, and runs whose workers are forks of theirs."""
    with WarmWorkers() as found:
        yield found


@pytest.fixture
def warm(warm_workers: WarmWorkers) -> Iterator[None]:
    """Let workers that this process starts be forks of one that has imported torch."""
    with warm_workers.used():
        yield


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelPrograms]:
    """Runs programs on changed C++ kernels."""
    folder = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own in that of the run.
    with KernelPrograms(folder.parent if hasattr(request.config, "workerinput") else folder) as found:
        yield found
