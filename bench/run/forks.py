"""Workers by fork: a process that has imported everything and run nothing, and forks a worker when asked.

A fresh worker spends two seconds on imports; a fork takes milliseconds. Children of one parent share its address
layout, so the differences between processes need several parents. The parent must have run nothing: threads,
OpenMP's team and a CUDA context do not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from bench.records.schema import Status
from bench.run.worker_process import GRACE_S, QUIET, ROOT, START_LIMIT_S, Settings, WorkerError, end, guard

#: Bytes of a message at most: it holds environment variables.
LARGEST = 1 << 20
#: First words of a server: whether its children can have pages of their own, as fresh processes have.
OWN, SHARED = b"own", b"shared"


class Forked:
    """A forked worker, with what the project uses of subprocess.Popen.

    Args:
        pid: its number.
        status: descriptor on which its parent writes how it ended.
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self._code: int | None = None
        try:
            self._self: int | None = os.pidfd_open(pid)
        except OSError:
            self._self = None
        self._ended = threading.Event()
        threading.Thread(target=self._read, args=(status,), daemon=True).start()

    def wait(self, timeout: float | None = None) -> int:
        """Exit code; of a signal its negative number.

        Raises:
            subprocess.TimeoutExpired: when the process still lives.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(["worker"], timeout or 0.0)
        assert self._code is not None  # noqa: S101 - set before the event
        return self._code

    def _read(self, status: int) -> None:
        with os.fdopen(status, "rb") as pipe:
            said = pipe.read()
        if self._self is not None:
            # Without a word the server is gone, and this process may live on.
            select.select([self._self], [], [])
            os.close(self._self)
        self._code = int(said) if said else -signal.SIGKILL
        self._ended.set()


def supported() -> bool:
    """Return whether this system can start workers by fork and see them end."""
    return hasattr(os, "fork") and hasattr(os, "pidfd_open") and hasattr(socket, "recv_fds")


class ForkServer:
    """A process that forks workers; a context manager, inside which it lives.

    Args:
        settings: of all workers.
        log: file that takes what it prints.
        modules: names of modules that it imports besides, so that no worker has to.
    """

    def __init__(self, settings: Settings, log: Path, modules: Sequence[str] = ()) -> None:
        self._settings, self._log, self._modules = settings, log, tuple(modules)
        self._over = False
        # A request and its answer belong together, and several threads may ask.
        self._asking = threading.Lock()
        #: Whether a child can be as a fresh process in its memory (`bench.machine.own_pages`); known when it is ready.
        self.gives_own_pages = False

    def __enter__(self) -> Self:
        """Start it; `ready` waits until it has imported everything."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._log.open("a", encoding="utf-8") as log, theirs:
            self._child = subprocess.Popen(  # noqa: S603 - our own module and a number
                [sys.executable, "-u", "-m", "bench.worker", "--forks", str(theirs.fileno()), *self._modules],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=QUIET | os.environ | self._settings.variables(),
                cwd=ROOT,
                start_new_session=True,
            )
        self._guard = guard(self._child.pid)
        return self

    def __exit__(self, *_: object) -> None:
        """End it, unless that was done before; a worker ends with the process that asked for it."""
        if not self._over:
            self._over = True
            end(self._child, self._guard)
            self._control.close()

    @property
    def alive(self) -> bool:
        """Return whether the process is there."""
        return self._child.poll() is None

    def ready(self) -> None:
        """Wait until it can fork.

        Raises:
            WorkerError: when it does not come up.
        """
        self.gives_own_pages = self._answer("start") == OWN

    def fork(self, descriptors: tuple[int, int, int], environment: Mapping[str, str]) -> Forked:
        """Start a worker.

        Args:
            descriptors: of its requests, its answers and its log.
            environment: variables that it gets besides.

        Raises:
            WorkerError: when the server is gone.
        """
        ours, status = os.pipe()
        try:
            with self._asking:
                with contextlib.suppress(OSError):
                    socket.send_fds(self._control, [json.dumps(dict(environment)).encode()], [*descriptors, status])
                pid = int(self._answer("fork"))
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(status)
        return Forked(pid, ours)

    def _answer(self, stage: str) -> bytes:
        self._control.settimeout(START_LIMIT_S)
        try:
            said = self._control.recv(LARGEST)
        except TimeoutError:
            msg = f"{stage}: the process that starts workers did not answer within {START_LIMIT_S:g} s"
            raise WorkerError(Status.TIMEOUT, msg, stage) from None
        except OSError:
            said = b""
        if not said:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(GRACE_S)
            said_last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            msg = f"the process that starts workers is gone; it said last: {' '.join(said_last)[:300]}"
            raise WorkerError(Status.CRASHED, msg, stage)
        return said


def cold_runs(servers: Sequence[ForkServer], *, gpu: bool) -> str:
    """Say whether a run's cold runs are forked or fresh processes, and why; for environment.json.

    Args:
        servers: that they could be forked from.
        gpu: whether the run uses a GPU.
    """
    if gpu:
        return "fresh: what asks for a GPU leaves a process that cannot be forked"
    if not servers:
        return "fresh: there is no process to fork them from"
    if not all(server.gives_own_pages for server in servers):
        return "fresh: this system cannot give a forked process memory of its own"
    return "forked; fresh where a variant has environment variables"


@contextlib.contextmanager
def fork_servers(settings: Settings, log: Path, modules: Sequence[Sequence[str]]) -> Iterator[list[ForkServer]]:
    """Start servers side by side and wait until all can fork; none where the system has no way to.

    Args:
        settings: of all workers.
        log: file that takes what the servers print.
        modules: of each server the names of modules that it imports besides.

    Raises:
        WorkerError: when one does not come up.
    """
    with contextlib.ExitStack() as stack:
        wanted = modules if supported() else ()
        servers = [stack.enter_context(ForkServer(settings, log, names)) for names in wanted]
        for server in servers:
            server.ready()
        yield servers
