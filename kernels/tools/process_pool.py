"""Work in child processes under a time limit: a kernel that hangs or breaks its CUDA context costs one item only.

A child serves many items, since it takes seconds to start. It is killed when an item takes too long, and replaced when
it died or when its context no longer works. Work of many parts says which one it is at (`at`): the limit is then that
of a part, and what hung or died is known by its name.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch

from ..host.cores import usable_cores

#: Most children that compile and check at the same time, and memory of the GPU for each: its context, its libraries and
#: a problem with its truth in float64.
MOST_CHILDREN, CHILD_BYTES = 12, 3 << 30
#: Seconds until a child has imported torch and its work and can compute; machines under load take long.
STARTUP_S = 180.0
_READY, _AT = "ready", "at"


@dataclass(frozen=True)
class WorkOutcome:
    """Outcome of one item.

    Attributes:
        status: `ok`; `error`, the work raised; `hang`, it took longer than allowed; `crash`, the child died.
        value: what the work returned when `ok`.
        reason: one line when not `ok`.
        took_s: wall clock, compilation included.
        at: part that the work was at when it ended; empty outside of any part.
    """

    item: Any
    status: str
    value: Any = None
    reason: str = ""
    took_s: float = 0.0
    at: str = ""


#: What takes word of the part that this process is at: the parent's connection in a child, otherwise nothing.
_TOLD: list[Callable[[str], None]] = []


def at(part: str) -> None:
    """Say which part of its work this child begins, or by `""` that a part has ended; the time limit begins anew."""
    for told in _TOLD:
        told(part)


def children() -> int:
    """Children that can compile and check at the same time: two cores are left, and the GPU has room for all."""
    most = min(MOST_CHILDREN, usable_cores() - 2)
    if torch.cuda.is_available():
        most = min(most, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // CHILD_BYTES)
    return max(1, most)


class Pool:
    """Children that do one kind of work.

    Args:
        work: a module-level function of one item; its result must be picklable.
        jobs: children at a time.
        timeout_s: for one item, or for each part of one whose work names its parts.
    """

    def __init__(self, work: Callable[[Any], Any], *, jobs: int = 1, timeout_s: float = 60.0) -> None:
        self.work, self.jobs, self.timeout_s = work, jobs, timeout_s
        self._idle: list[_Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._idle:
            child.kill()
        self._idle.clear()

    def run(self, items: Iterable[Any]) -> Iterator[WorkOutcome]:
        """Do the work on each item and yield outcomes as they come; items are drawn only when a child is free."""
        source, busy, drained = iter(items), dict[Connection, _Child](), False
        try:
            while True:
                while not drained and len(busy) < self.jobs:
                    try:
                        item = next(source)
                    except StopIteration:
                        drained = True
                        break
                    child = self._idle.pop() if self._idle else _Child(self.work)
                    child.give(item, self.timeout_s)
                    busy[child.connection] = child
                if not busy:
                    return
                until = min(child.deadline for child in busy.values())
                spoken = wait(list(busy), timeout=max(until - time.monotonic(), 0))
                for child in [child for connection, child in busy.items() if connection in spoken]:
                    outcome = child.take(self.timeout_s)
                    if outcome is not None:
                        del busy[child.connection]
                        self._return(child)
                        yield outcome
                for child in [child for child in busy.values() if time.monotonic() > child.deadline]:
                    del busy[child.connection]
                    child.kill()
                    yield child.outcome("hang", reason=f"no answer within {self.timeout_s:g} s; the child was killed")
        finally:
            for child in busy.values():
                child.kill()

    def _return(self, child: _Child) -> None:
        if child.alive:
            self._idle.append(child)
        else:
            child.kill()


class _Child:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        # Not fork: CUDA does not survive it.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        # Else a dead child would not be seen as the end of its connection.
        other.close()
        self.alive, self.ready = True, False
        self.item: Any = None
        self.at = ""
        self.started = self.deadline = 0.0

    def give(self, item: Any, timeout_s: float) -> None:
        """Hand over an item; the first of a child waits for the child to start."""
        self.item, self.at, self.started = item, "", time.monotonic()
        self.deadline = self.started + timeout_s + (0.0 if self.ready else STARTUP_S)
        self.connection.send(item)

    def take(self, timeout_s: float) -> WorkOutcome | None:
        """Read the child's answer: None when it says that it has started, or which part it is at."""
        try:
            status, value, reason = self.connection.recv()
        except (EOFError, OSError):
            self.alive = False
            self.process.join(5)
            return self.outcome("crash", reason=f"the child died with exit code {self.process.exitcode}")
        if status == _READY:
            self.ready, self.started = True, time.monotonic()
            self.deadline = self.started + timeout_s
            return None
        if status == _AT:
            self.at, self.deadline = value, time.monotonic() + timeout_s
            return None
        if status == "last":
            self.alive, status = False, "error"
        return self.outcome(status, value, reason)

    def outcome(self, status: str, value: Any = None, reason: str = "") -> WorkOutcome:
        """Outcome of the item that the child has."""
        return WorkOutcome(self.item, status, value, reason, time.monotonic() - self.started, self.at)

    def kill(self) -> None:
        """Kill the child. A driver may keep it for a while, so the wait for it is short."""
        self.process.kill()
        self.process.join(5)
        self.connection.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """A child's life."""
    # There are many children, and the little that torch does on the CPU needs no team of threads in each.
    torch.set_num_threads(1)
    # A context and its libraries take seconds to load, and no item is to blame for them.
    _works()
    _TOLD.append(lambda part: connection.send((_AT, part, "")))
    connection.send((_READY, None, ""))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            message = ("ok", work(item), "")
        except Exception as error:  # noqa: BLE001 - whatever a kernel does is an outcome; the reason is kept
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            reason = f"{text} ({place.name}, line {place.lineno})"
            message = ("error" if _works() else "last", None, reason)
        connection.send(message)
        if message[0] == "last":
            return


def _works() -> bool:
    """Return whether the GPU still answers this process: after an illegal access nothing does."""
    if not torch.cuda.is_available():
        return True
    try:
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False
