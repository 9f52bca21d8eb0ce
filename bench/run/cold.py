"""Cold runs of cases: each alone in a fresh process with empty caches of compilers.

Most of a cold run is the import of torch, which says nothing of the case. So several processes are started side by
side; then they stand still, and each has the machine to itself in its own run.

The C++ kernel is the same for every case. It is compiled once, as the run is planned or in the first cold run that
needs it; the others find it compiled, and the seconds that it took count in their first call as in a user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.plan.cases import Case
from bench.run.worker_process import KERNELS, Worker, WorkerError

#: Processes that are started side by side at most: each has some 250 MB.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class CompiledKernel:
    """The C++ kernel as it was compiled for a run.

    Attributes:
        seconds: that compiling took.
        files: libraries by name.
    """

    seconds: float = 0.0
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def found(cls, cache: Path, seconds: float) -> Self:
        """What a worker with a folder for caches has compiled."""
        return cls(seconds, {path.name: path.read_bytes() for path in sorted((cache / KERNELS).glob("*.so"))})

    def write(self, cache: Path) -> None:
        """Put it where workers with a folder for caches look for it."""
        for name, content in self.files.items():
            (cache / KERNELS).mkdir(parents=True, exist_ok=True)
            (cache / KERNELS / name).write_bytes(content)


@dataclass(frozen=True)
class ColdCase:
    """What is to run cold.

    Attributes:
        case: which.
        start: makes its process, not started yet, from a folder for what compilers cache.
        kept: folder that later processes of the same kind use, which takes what was compiled.
        began: called when it begins.
    """

    case: Case
    start: Callable[[Path], Worker]
    kept: Path
    began: Callable[[], object] = lambda: None


@dataclass
class ColdRuns:
    """Runs cases cold.

    Attributes:
        scratch: where folders for caches are made.
        limit_s: longest time that a process may be silent, seconds.
        cores: that may start processes side by side.
    """

    scratch: Path
    limit_s: float
    cores: int = 1
    #: Seconds that compiling the kernel took, by the folder in which it is kept.
    _built_s: dict[Path, float] = field(default_factory=dict, init=False)

    def run(self, cases: Sequence[ColdCase]) -> Iterator[tuple[Case, dict[str, Any], WorkerError | None]]:
        """Yield each case with the fields found, and what ended its process or None."""
        size = max(1, min(SIDE_BY_SIDE, self.cores))
        for first in range(0, len(cases), size):
            some = cases[first : first + size]
            with contextlib.ExitStack() as stack:
                waiting = [stack.enter_context(_Waiting(cold, self)) for cold in some]
                with ThreadPoolExecutor(len(some)) as pool:
                    list(pool.map(_Waiting.start, waiting))
                for one in waiting:
                    one.cold.began()
                    # Ended before the next one is measured.
                    with one:
                        yield one.cold.case, *one.measure()

    def built_s(self, kept: Path) -> float:
        """Seconds that compiling the kernel took that is kept in a folder; 0 where it was not compiled yet."""
        return self._built_s.get(kept, 0.0)

    def keep(self, kept: Path, kernel: CompiledKernel) -> None:
        """Put a compiled kernel where later processes look for it."""
        kernel.write(kept)
        self.built(kept, kernel.seconds)

    def built(self, kept: Path, seconds: float) -> None:
        """Note that compiling the kernel took so long."""
        self._built_s[kept] = max(self.built_s(kept), seconds)


class _Waiting:
    """A fresh process that is started and stands still; a context manager, which may be left twice.

    Args:
        cold: what it is to run.
        runs: whose it is.
    """

    def __init__(self, cold: ColdCase, runs: ColdRuns) -> None:
        self.cold, self._runs = cold, runs
        self._stack = contextlib.ExitStack()
        self._failure: WorkerError | None = None

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and remove its caches."""
        self._stack.close()

    def start(self) -> None:
        """Start the process, have it import what belongs to no variant, and stop it."""
        self._cache = Path(tempfile.mkdtemp(dir=self._runs.scratch))
        self._stack.callback(shutil.rmtree, self._cache, ignore_errors=True)
        try:
            self._worker = self._stack.enter_context(self.cold.start(self._cache))
            list(self._worker.ask("prepare", self._runs.limit_s, case=dataclasses.asdict(self.cold.case)))
            self._worker.stop()
        except WorkerError as error:
            self._failure = error

    def measure(self) -> tuple[dict[str, Any], WorkerError | None]:
        """Build and call the case, and find its memory and the evidence of what ran."""
        fields: dict[str, Any] = {}
        if self._failure is not None:
            return fields, self._failure
        kept, runs = self.cold.kept, self._runs
        _copy(kept / KERNELS, self._cache / KERNELS)
        wanted = {"case": dataclasses.asdict(self.cold.case), "built_s": runs.built_s(kept)}
        try:
            self._worker.go_on()
            for event in self._worker.ask("cold", runs.limit_s, **wanted):
                if event["event"] == "cold":
                    fields |= event["fields"]
                    runs.built(kept, event["built_s"])
        except WorkerError as error:
            return fields, error
        finally:
            _copy(self._cache, kept)
        return fields, None


def _copy(source: Path, target: Path) -> None:
    """Copy what compilers cached; without it processes compile again, so a copy that fails costs time alone."""
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(source, target, dirs_exist_ok=True)
