"""One stage: a child process in a process group of its own, which is killed with its children at its limit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Environment variable that marks the processes of one day, so that a resumed day finds what a killed one left.
MARK = "SEQ2SEQ_GPU_DAY"
#: Seconds between SIGTERM, on which a command writes what it has, and SIGKILL; and for the system to clear up.
TERMINATE_S, KILL_S = 3.0, 5.0
#: Seconds between two looks at a running stage.
LOOK_S = 0.25
OK, WRONG, PARTIAL, ERROR, HANG, CRASH = "ok", "wrong", "partial", "error", "hang", "crash"
#: Statuses by exit code; any other code is an error.
STATUSES = {0: OK, 1: WRONG, 4: PARTIAL}
_FAULT = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b|error:|WRONG|HANG|CRASH|ERROR|LEFT OUT|NOT TIMED|FAILED)")
_TRACEBACK = "Traceback (most recent call last)"
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class StageEnd:
    """End of a stage.

    Attributes:
        status: `ok`; `wrong`, the command found something wrong; `partial`, its own time limit left some; `error`;
            `hang`, killed at the limit; `crash`, ended by a signal.
        reason: one line when not `ok`.
        took_s: wall clock.
    """

    status: str
    reason: str
    took_s: float


def run_stage(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    limit_s: float,
    started: Callable[[int], None],
    look: Callable[[], None],
) -> StageEnd:
    """Run a command until it ends or its limit is reached; nothing of its process group is left afterwards.

    Args:
        command: the program and its arguments.
        log: file that gets what it prints.
        cwd: folder that it runs in.
        environment: all of its environment.
        limit_s: seconds until it is killed.
        started: called with the id of the process, which is that of its group.
        look: called a few times a second while it runs.
    """
    begin = time.monotonic()
    with log.open("ab") as out:
        child = subprocess.Popen(  # noqa: S603 - a stage of this module's own lists
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
    hung = False
    try:
        started(child.pid)
        while child.poll() is None and not hung:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_S)
            hung = child.poll() is None and time.monotonic() - begin > limit_s
    finally:
        left = _end(child)
    took_s = time.monotonic() - begin
    said = first_fault(log)
    if hung:
        stuck = "; the system could not end it" if left else ""
        return StageEnd(HANG, f"killed at its limit of {limit_s:.0f} s{stuck}", took_s)
    if child.returncode < 0:
        return StageEnd(CRASH, f"ended by {signal.Signals(-child.returncode).name}", took_s)
    status = STATUSES.get(child.returncode, ERROR)
    if status == WRONG and _TRACEBACK in log.read_text(encoding="utf-8", errors="replace"):
        status = ERROR
    return StageEnd(status, "" if status == OK else said, took_s)


def kill_left(pid: int, token: str) -> None:
    """Kill the group of a stage that outlived the process that began it; only if it bears the day's mark."""
    try:
        marked = f"{MARK}={token}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return
    if marked:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def first_fault(log: Path) -> str:
    """The first line of a log that names a fault, or else its last line, shortened."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    line = next((line for line in lines if _FAULT.match(line)), lines[-1] if lines else "it printed nothing")
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _end(child: subprocess.Popen[bytes]) -> bool:
    """End a group, first gently while its leader runs; return whether the leader could not be ended."""
    if child.poll() is None:
        _signal(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATE_S)
    # Children of a leader that has ended, too: one that hangs in the driver holds the GPU.
    _signal(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILL_S)
    return child.poll() is None


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
