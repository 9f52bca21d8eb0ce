"""Fresh workers forked from one process: for tests of real runs that are about what comes after a worker's start.

Importing torch takes a fresh worker seconds, and a run starts one for its plan, its ceilings and each of its cases.
`WarmWorkers.run` is `python -m bench` in the test's own process whose workers are forks, as seats are anyway; the
fixture `warm` has all workers forked that a test starts; and `python tests/warm_workers.py run ...` is
`python -m bench run ...` as a process that can be killed. Workers that want variables of libraries are fresh still, and
so is the first one of another checkout. Ceilings are measured in a tenth of the time. Of a run's report the page alone
is written: the plots beside it take seconds to draw, and are for tests of reports and of whole commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import __main__ as command_line
from bench.run import forks
from bench.run.forks import Forked, ForkServer
from bench.run.worker_process import PLUGINS, Home, Settings, Worker, cache_variables
from kernels.host.output import run_command

BRIEF_CEILINGS = Path(__file__).parent / "plugins" / "brief_ceilings.py"


#: In place of what draws plots.
NO_PLOTS = types.ModuleType("bench.report.plots")
vars(NO_PLOTS)["write_plots"] = lambda _kinds, _folder: {}


class WarmWorkers:
    """Processes that have imported torch and fork workers, one for each number of threads; a context manager.

    Args:
        imports: what they have imported besides: torch's optimizers need Dynamo, which takes 3.5 s.
    """

    def __init__(self, imports: Sequence[str] = ("torch._dynamo",)) -> None:
        self._imports = list(imports)
        self._stack, self._lock = contextlib.ExitStack(), threading.Lock()
        self._servers: dict[tuple[int, str, Path], ForkServer] = {}
        self._homes = {Home()}

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
            settings, descriptors = worker.settings, (requests, answers, worker._log_file.fileno())
            fresh = settings.home not in self._homes or settings.home.python != sys.executable
            self._homes.add(settings.home)
            # Our own variables are read by what runs in a worker, those of libraries as these are loaded.
            fresh |= not all(name.startswith("SEQ2SEQ_") for name, _ in settings.environment)
            if fresh or worker.forks is not None:
                return plain(worker, requests, answers)
            return self._fork(settings, descriptors, cache_variables(worker.cache))

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Worker, "_start", start))
            stack.enter_context(mock.patch.object(forks, "supported", return_value=False))
            if sys.modules.get(NO_PLOTS.__name__) is not NO_PLOTS:
                stack.enter_context(mock.patch("bench.report.page.plots", NO_PLOTS))
            yield

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m bench` with these words in this process; returns its exit code and what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with self.used(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line.main(list(words))
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def _fork(self, settings: Settings, descriptors: tuple[int, int, int], environment: Mapping[str, str]) -> Forked:
        """Start a worker; plugins and own models are loaded in it. Several threads may ask."""
        # What libraries read as they are loaded, and where they are.
        loaded = settings.threads, settings.wait_policy, settings.home.root
        plugins = [str(BRIEF_CEILINGS), *(str(path.resolve()) for path in settings.plugins)]
        variables = settings.variables() | {PLUGINS: json.dumps(plugins)}
        with self._lock:
            if loaded not in self._servers:
                server = ForkServer(Settings(*loaded[:2]), self._folder / "server.log", self._imports)
                with mock.patch.object(forks, "ROOT", settings.home.root):
                    self._servers[loaded] = self._stack.enter_context(server)
                server.ready()
            return self._servers[loaded].fork(descriptors, variables | environment)


if __name__ == "__main__":
    # For runs in inference alone: each that a test kills and resumes has a process of its own that forks.
    sys.modules[NO_PLOTS.__name__] = NO_PLOTS  # And Matplotlib is not even imported.
    with WarmWorkers(imports=()) as workers, workers.used():
        run_command(command_line.main)
