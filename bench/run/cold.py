"""Cold runs of cases: each alone in a fresh process with empty caches of compilers.

Most of a cold run would be the import of torch, which says nothing of the case. So processes are forked from one that
has imported it, with memory of their own (`bench.machine.own_pages`). Where that cannot be, as on a GPU, several are
started side by side; then they stand still, and each has the machine to itself in its own run.

Cases have the libraries of the C++ kernel in common. Each is compiled once, as the run is planned or in the first cold
run that needs it; the others find it compiled, and the seconds that it took count in their first call as in a user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from bench.plan.cases import Case
from bench.run.worker_process import KERNELS, Worker, WorkerError

#: The module that a cold run imports before it begins to count; whatever else it imports is part of its first call.
COMPILER = "torch._dynamo"
#: Processes that are started side by side at most, and memory that has to be free for each.
SIDE_BY_SIDE, ROOM_BYTES = 4, 1 << 30


def before_cold(imports: Sequence[str]) -> tuple[str, ...]:
    """Imports of a case that a process has already made when the timing of its cold run starts."""
    return tuple(name for name in imports if name == COMPILER)


@dataclass(frozen=True)
class CompiledKernel:
    """The C++ kernel as it was compiled for a run.

    Attributes:
        seconds: that compiling each library took, by its name as `kernels.cpu.build.spent` has it.
        files: libraries by name.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def found(cls, cache: Path, seconds: Mapping[str, float]) -> Self:
        """Return what a worker with a folder for caches has compiled."""
        files = {path.name: path.read_bytes() for path in sorted((cache / KERNELS).glob("*.so"))}
        # Where there is no library, the seconds are those of an attempt that failed.
        return cls({name: s for name, s in seconds.items() if any(file.startswith(name) for file in files)}, files)

    def write(self, cache: Path) -> None:
        """Put it where workers with a folder for caches look for it."""
        for name, content in self.files.items():
            (cache / KERNELS).mkdir(parents=True, exist_ok=True)
            (cache / KERNELS / name).write_bytes(content)


@dataclass(frozen=True)
class ColdCase:
    """A case to be run cold.

    Attributes:
        case: which.
        start: makes its process, not started yet, from its log and a folder for what compilers cache.
        kept: folder that later processes of the same kind use, which takes what was compiled.
        log: file that takes what the process printed, when it has ended.
        builds: whether it needs the C++ kernel.
        began: called when it begins.
    """

    case: Case
    start: Callable[[Path, Path], Worker]
    kept: Path
    log: Path
    builds: bool = False
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
    #: Seconds that compiling the kernel's libraries took, by the folder in which they are kept.
    _built: dict[Path, dict[str, float]] = field(default_factory=dict, init=False)

    def run(self, cases: Sequence[ColdCase]) -> Iterator[tuple[Case, dict[str, Any], WorkerError | None]]:
        """Yield each case with the fields found, and what ended its process or None."""
        size = max(1, min(SIDE_BY_SIDE, self.cores, psutil.virtual_memory().available // ROOM_BYTES))
        for first in range(0, len(cases), size):
            some = cases[first : first + size]
            with contextlib.ExitStack() as stack:
                waiting = [stack.enter_context(self.begun(cold)) for cold in some]
                for one in waiting:
                    one.join()
                for one in waiting:
                    one.cold.began()
                    # Ended before the next one is measured.
                    with contextlib.closing(one):
                        yield one.cold.case, *one.measure()

    def begun(self, cold: ColdCase) -> Waiting:
        """A process of a case, started as its context is entered."""
        return Waiting(cold, self)

    def built_of(self, kept: Path) -> dict[str, float]:
        """Seconds that compiling each library took that is kept in a folder."""
        return self._built.get(kept, {})

    def keep(self, kept: Path, kernel: CompiledKernel) -> None:
        """Put a compiled kernel where later processes look for it."""
        kernel.write(kept)
        self.built(kept, kernel.seconds)

    def built(self, kept: Path, seconds: Mapping[str, float]) -> None:
        """Note that compiling libraries took so long."""
        self._built[kept] = self.built_of(kept) | dict(seconds)


class Waiting:
    """A fresh process that starts and then stands still; a context manager, inside which it lives unless closed.

    Args:
        cold: what it is to run.
        runs: whose it is.
    """

    def __init__(self, cold: ColdCase, runs: ColdRuns) -> None:
        self.cold, self._runs = cold, runs
        self._stack = contextlib.ExitStack()
        self._failure: BaseException | None = None
        self._lock, self._left = threading.Lock(), False
        # Nothing waits for it at the end of the program, so that Ctrl-C is obeyed while a process starts.
        self._thread = threading.Thread(target=self._start, daemon=True)

    def __enter__(self) -> Self:
        """Begin to start the process."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the process, keep what it compiled and printed, and remove its folder; it may still be starting."""
        with self._lock:
            self._left = True
        self._stack.close()

    def join(self) -> None:
        """Wait until the process has started, has imported what belongs to no variant, and was stopped.

        Raises:
            OSError: when there is no place for its folder, or the process cannot be started.
        """
        self._thread.join()
        if self._failure is not None and not isinstance(self._failure, WorkerError):
            raise self._failure

    def _start(self) -> None:
        try:
            with contextlib.ExitStack() as own:
                folder = Path(tempfile.mkdtemp(dir=self._runs.scratch))
                own.callback(shutil.rmtree, folder, ignore_errors=True)
                self._cache, log = folder / "cache", folder / "log"
                own.callback(_append, log, self.cold.log)
                # After its end, since a compiler that it started may still be writing.
                own.callback(_copy, self._cache, self.cold.kept)
                self._worker = own.enter_context(self.cold.start(log, self._cache))
                list(self._worker.ask("prepare", self._runs.limit_s, case=dataclasses.asdict(self.cold.case)))
                self._worker.stop()
                with self._lock:
                    if not self._left:
                        self._stack = own.pop_all()
        except BaseException as error:  # noqa: BLE001 - for the thread that waits for this one
            self._failure = error

    def measure(self) -> tuple[dict[str, Any], WorkerError | None]:
        """Build and call the case, and find its memory and the evidence of what ran."""
        fields: dict[str, Any] = {}
        if isinstance(self._failure, WorkerError):
            return fields, self._failure
        kept, runs = self.cold.kept, self._runs
        built = runs.built_of(kept) if self.cold.builds else {}
        if built:
            _copy(kept / KERNELS, self._cache / KERNELS)
        try:
            self._worker.go_on()
            wanted = {"case": dataclasses.asdict(self.cold.case), "built": built}
            for event in self._worker.ask("cold", runs.limit_s, **wanted):
                if event["event"] == "cold":
                    fields |= event["fields"]
                    if self.cold.builds:
                        runs.built(kept, event.get("built", {}))
        except WorkerError as error:
            return fields, error
        return fields, None


def _append(log: Path, to: Path) -> None:
    """Append what a process printed to the log of all; a full disk costs only the text."""
    with contextlib.suppress(OSError), to.open("ab") as file:
        file.write(log.read_bytes())


def _copy(source: Path, target: Path) -> None:
    """Copy what compilers cached; without it processes compile again, so a copy that fails costs only time."""
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(source, target, dirs_exist_ok=True)
