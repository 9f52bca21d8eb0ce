"""Fresh workers forked from one process: for tests of real runs that are about what comes after a worker's start.

Importing torch takes a fresh worker seconds, and a run starts one for its plan, its ceilings and each of its cases.
`python tests/warm_workers.py run ...` is `python -m bench run ...` whose workers are forks, as seats are anyway; the
fixture `warm` does it for calls in the test's own process. Workers that want variables of their own, or run another
checkout, are fresh still.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.run import forks
from bench.run.forks import Forked, ForkServer
from bench.run.worker_process import Home, Settings, Worker


class WarmWorkers:
    """Processes that have imported torch and fork workers, one for each number of threads; a context manager."""

    def __init__(self) -> None:
        self._stack, self._lock = contextlib.ExitStack(), threading.Lock()
        self._servers: dict[tuple[int, str], ForkServer] = {}

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Fork what would be started fresh. A run makes no servers of its own then: its seats are like the others."""
        if not forks.supported():
            yield
            return
        plain = Worker._start

        def start(worker: Worker, requests: int, answers: int):
            if worker.forks is None and not worker.settings.environment and worker.settings.home == Home():
                worker.forks = _Asked(self, worker.settings)
            return plain(worker, requests, answers)

        with mock.patch.object(Worker, "_start", start), mock.patch.object(forks, "supported", return_value=False):
            yield

    def fork(self, settings: Settings, descriptors: tuple[int, int, int], environment: Mapping[str, str]) -> Forked:
        """Start a worker; plugins and own models are loaded in it. Several threads may ask."""
        # What libraries read as they are loaded.
        loaded = settings.threads, settings.wait_policy
        with self._lock:
            if loaded not in self._servers:
                server = ForkServer(Settings(*loaded), self._folder / "server.log", ["torch._dynamo"])
                self._servers[loaded] = self._stack.enter_context(server)
                server.ready()
            return self._servers[loaded].fork(descriptors, {**settings.variables(), **environment})


class _Asked:
    """What a worker is forked from, by its settings."""

    def __init__(self, warm: WarmWorkers, settings: Settings) -> None:
        self._warm, self._settings = warm, settings

    def fork(self, descriptors: tuple[int, int, int], environment: Mapping[str, str]) -> Forked:
        """Start a worker."""
        return self._warm.fork(self._settings, descriptors, environment)


if __name__ == "__main__":
    from bench.__main__ import main
    from kernels.host.output import run_command

    with WarmWorkers() as workers, workers.used():
        run_command(main)
