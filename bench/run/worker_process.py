"""A worker process seen from the parent: started fresh or forked, asked, watched, and ended whatever state it is in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from bench.machine import gpu, interference
from bench.plan import own_model as given
from bench.records.schema import Status
from bench.run.clock_check import Queued

ROOT = Path(__file__).parent.parent.parent
Event = dict[str, Any]

#: Waits for the end of its input, which it shares only with the parent, then ends the process group `$0`.
#: A worker inside a long call does not notice that its parent was killed, and no compiler that it started would.
_GUARD = 'read -r _; kill -s KILL -- "-$0"'

#: Environment variable with the plugin files, a JSON list: a path may hold any character.
PLUGINS = "SEQ2SEQ_BENCH_PLUGINS"

#: Kineto logs each start and end of a profile above the level of errors; the profiler raises what matters.
QUIET = {"KINETO_LOG_LEVEL": "6"}

#: Version of what parent and worker say to each other: requests, their fields, events. Both may be of different
#: revisions, so it grows with each change that the other side would not understand.
PROTOCOL = 3

#: Folder of the compiled C++ kernel, in that for whatever compilers cache.
KERNELS = "kernels"
#: Seconds a worker may take to start (importing torch).
START_LIMIT_S = 120.0
#: Seconds a process may take to end that has no reason to live, and the last lines to arrive of one that has ended.
GRACE_S, DRAIN_S = 5.0, 1.0


@dataclass(frozen=True)
class Home:
    """Interpreter and checkout that a worker runs from.

    Attributes:
        python: path of the interpreter.
        root: folder of the checkout.
    """

    python: str = sys.executable
    root: Path = ROOT


@dataclass(frozen=True)
class Settings:
    """Settings shared by every worker of a run.

    Attributes:
        threads: CPU threads.
        wait_policy: `default`, `active` or `passive`: how OpenMP threads wait (OMP_WAIT_POLICY).
        plugins: Python files that add variants or workloads.
        environment: variables that a worker is started with besides, as pairs.
        home: interpreter and checkout of a worker.
        own_model: what the command line says of a model of the user's own, as `bench.plan.own_model` writes it.
        own_checked: what the first worker found of it, by workload, so that no other has to call it first.
    """

    threads: int
    wait_policy: str = "default"
    plugins: tuple[Path, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    home: Home = field(default_factory=Home)
    own_model: str = ""
    own_checked: dict[str, Any] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """Environment variables that carry them."""
        found = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if self.wait_policy != "default":
            found["OMP_WAIT_POLICY"] = self.wait_policy
        if self.plugins:
            found[PLUGINS] = json.dumps([str(path.resolve()) for path in self.plugins])
        if self.own_model:
            found[given.VARIABLE] = self.own_model
        return found | dict(self.environment)

    def with_environment(self, more: Mapping[str, str]) -> Settings:
        """Return the settings with more variables."""
        return dataclasses.replace(self, environment=(*self.environment, *more.items()))


@dataclass(eq=False)
class WorkerError(Exception):
    """A worker that ended a request without an answer.

    Attributes:
        status: what its record gets.
        reason: in words.
        stage: what it was doing.
        variant: which variant it was doing it to, where known.
    """

    status: Status
    reason: str
    stage: str = ""
    variant: str = ""


class Child(Protocol):
    """A child process: what is used of subprocess.Popen."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, or subprocess.TimeoutExpired."""


class Forks(Protocol):
    """A process that forks workers: `bench.run.forks.ForkServer`."""

    def fork(self, descriptors: tuple[int, int, int], environment: Mapping[str, str]) -> Child:
        """Start a worker with descriptors of its requests, its answers and its log."""


@dataclass
class Worker:
    """One child process.

    Args:
        settings: threads and the like.
        log: file that takes what the child prints.
        cache: folder for whatever compilers cache.
        forks: what forks the process; without it a fresh one is started.
    """

    settings: Settings
    log: Path
    cache: Path
    forks: Forks | None = None
    _lines: queue.Queue[str | None] = field(default_factory=queue.Queue, init=False)
    _guard: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _own_tasks: tuple[str, ...] = field(default=(), init=False)

    def __enter__(self) -> Self:
        """Start the process and wait until it is up."""
        self._kills = _oom_kills()
        self._log_file = self.log.open("a", encoding="utf-8")
        self._log_start = self._log_file.tell()
        # Pipes of their own: whatever a library, a plugin or a child of theirs prints, at whatever level and moment,
        # is not an answer, and what reads standard input takes no request.
        (requests, own_requests), (own_answers, answers) = os.pipe(), os.pipe()
        self._requests = os.fdopen(own_requests, "w", encoding="utf-8")
        self._answers = os.fdopen(own_answers, encoding="utf-8")
        try:
            self._child = self._start(requests, answers)
        finally:
            os.close(requests)
            os.close(answers)
        try:
            self._guard = guard(self._child.pid)
            reader = threading.Thread(target=self._read, daemon=True)
            reader.start()
            own = (reader.native_id, threading.get_native_id())
            self._own_tasks = tuple(f"{os.getpid()}/task/{thread}" for thread in own)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
            self._greet(self._next(START_LIMIT_S, "start"))
        except BaseException:
            # `with` calls __exit__ only for what was entered.
            self.__exit__()
            raise
        return self

    def _start(self, requests: int, answers: int) -> Child:
        """Start the process; a group of its own, since compilers start children, and all must end together."""
        cache = cache_variables(self.cache) | {gpu.FAMILY: str(os.getpid())}
        # What the environment does to libraries as they are loaded cannot be had by a fork.
        home = self.settings.home
        if self.forks is not None and not self.settings.environment and home == Home():
            return self.forks.fork((requests, answers, self._log_file.fileno()), cache)
        return subprocess.Popen(  # noqa: S603 - our own module and two numbers
            [home.python, "-u", "-m", "bench.worker", str(requests), str(answers)],
            pass_fds=(requests, answers),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=QUIET | os.environ | self.settings.variables() | cache,
            # Where `-m` looks for modules first; in PYTHONPATH a folder with a colon in its name would be two.
            cwd=home.root,
            start_new_session=True,
        )

    def _greet(self, hello: Event) -> None:
        """Check that a worker of another checkout uses the protocol of this parent.

        Raises:
            WorkerError: when it does not.
        """
        spoken = hello.get("protocol", 0)
        if self.settings.home.root != ROOT and spoken != PROTOCOL:
            msg = f"its worker uses protocol version {spoken}; this checkout needs {PROTOCOL}"
            raise WorkerError(Status.ERROR, msg, "start")

    def __exit__(self, *_: object) -> None:
        """End the process and everything it started."""
        end(self._child, self._guard)
        for pipe in (self._requests, self._answers):
            # A child that died early leaves unread requests behind.
            with contextlib.suppress(OSError):
                pipe.close()
        self._log_file.close()

    def stop(self) -> None:
        """Make the process and everything it started stand still."""
        with contextlib.suppress(OSError):
            os.killpg(self._child.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let the process continue where it was stopped."""
        with contextlib.suppress(OSError):
            os.killpg(self._child.pid, signal.SIGCONT)

    def queued(self) -> Queued:
        """Return how long the threads that pass on requests and answers were ready but had no core so far.

        They are two threads of this process, and the first one of the worker, which also makes the calls.
        """
        pid = self._child.pid
        return Queued(interference.queued_s(self._own_tasks), interference.queued_s((f"{pid}/task/{pid}",)))

    def ask(self, request: str, limit_s: float, **fields: Any) -> Iterator[Event]:
        """Send a request and yield its events until it is done.

        Args:
            request: name of the request.
            limit_s: longest time without an event, seconds.
            fields: its arguments.

        Raises:
            WorkerError: when the worker reports a failure, dies, or is silent for too long.
        """
        stage, variant = request, ""
        with contextlib.suppress(BrokenPipeError):
            common: dict[str, Any] = {"request": request, "threads": self.settings.threads}
            common |= {"own_checked": self.settings.own_checked} if self.settings.own_checked else {}
            self._requests.write(json.dumps(common | fields) + "\n")
            self._requests.flush()
        while True:
            event = self._next(limit_s, stage, variant)
            if event["event"] == "done":
                return
            if event["event"] == "failed":
                raise WorkerError(Status(event["status"]), event["reason"], stage, variant)
            if event["event"] == "stage":
                stage, variant = event["name"], event.get("variant", "")
            yield event

    def _read(self) -> None:
        # A closed pipe ends the thread; what that means is for the main thread to find out.
        with contextlib.suppress(ValueError, OSError):
            for line in self._answers:
                # The last one may be torn.
                if line.endswith("\n"):
                    self._lines.put(line)
        self._lines.put(None)

    def _watch(self, reader: threading.Thread) -> None:
        """Tell of the child's end also where something that it started holds its pipe open."""
        self._child.wait()
        reader.join(DRAIN_S)
        self._lines.put(None)

    def _next(self, limit_s: float, stage: str, variant: str = "") -> Event:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            hint = ", in which a compiler may run" if stage in {"first call", "build and gate"} else ""
            reason = f"{stage}{hint}: not ended within the limit of {limit_s:g} s"
            raise WorkerError(Status.TIMEOUT, reason, stage, variant) from None
        if line is None:
            status, reason = self._post_mortem()
            raise WorkerError(status, f"{reason}, during: {stage}", stage, variant)
        event: Event = json.loads(line)
        return event

    def _post_mortem(self) -> tuple[Status, str]:
        """Reason why the process is gone, or answers no more."""
        try:
            code = self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return Status.CRASHED, "the worker closed its answers and lived on, so it was ended"
        if code == -signal.SIGKILL and _oom_kills() > self._kills:
            return Status.OOM, "the worker was killed by the kernel for memory"
        if code < 0:
            named = signal.Signals(-code).name if -code in set(signal.Signals) else "no name"
            return Status.CRASHED, f"the worker died of signal {-code} ({named})"
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            said = file.read().decode(errors="replace").splitlines()[-1:]
        tail = f"; it said last: {' '.join(said)[:300]}" if said else ""
        return Status.CRASHED, f"the worker ended with exit code {code}{tail}"


def cache_variables(cache: Path) -> dict[str, str]:
    """Environment variables that have compilers keep what they cache in a folder of the run's."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "SEQ2SEQ_KERNEL_CACHE": str(cache / KERNELS),
    }


def plugin_paths() -> list[str]:
    """The plugin files that this process was given, as `Settings.variables` names them."""
    return [str(path) for path in json.loads(os.environ.get(PLUGINS) or "[]")]


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for caches and logs of workers, which goes away with them."""
    with tempfile.TemporaryDirectory(prefix="seq2seq-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def guard(group: int) -> subprocess.Popen[bytes]:
    """Start what ends a process group when this process is gone, however it went.

    Args:
        group: number of the group, which is that of its first process.
    """
    return subprocess.Popen(  # noqa: S603 - fixed words and a number
        ["/bin/sh", "-c", _GUARD, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is only for the parent.
        start_new_session=True,
    )


def end(child: Child, watch: subprocess.Popen[bytes] | None) -> None:
    """End a process with its group, and then its guard; one that even the kernel cannot end is left.

    Args:
        child: started as the first of its group.
        watch: what `guard` gave for it.
    """
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    # Before the number is free for another process.
    if watch:
        watch.kill()
        watch.communicate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)


def _oom_kills() -> int:
    """Number of processes that the kernel has killed for memory so far; 0 if the system does not report it."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
