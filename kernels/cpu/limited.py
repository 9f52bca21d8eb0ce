"""Run a compiler under limits, with all the processes that it starts: none of them outlives its limits or an interrupt.

The limit that counts is of processor time, since on a machine with many jobs a compiler may wait for a core many times
as long as it computes. A second one, of time, is for a compiler that hangs and computes nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Limits of one run, of each of its processes and of all. The largest part of the kernel takes about 10 s.
PROCESSOR_LIMIT_S, TIME_LIMIT_S = 120, 1800
#: The soft limit alone, at which a process is told why it ends.
_LIMITED = 'ulimit -S -t "$1" 2>/dev/null; shift; exec "$@"'
_running: set[subprocess.Popen[str]] = set()


class LimitError(RuntimeError):
    """A limit was reached; the message says which."""


def run(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its exit status and what it printed.

    Args:
        command: the program and its arguments.
        cwd: folder to run it in.
        env: of the process; this one's when None.

    Raises:
        LimitError: where it took longer than a limit.
    """
    words = ["/bin/sh", "-c", _LIMITED, "sh", str(PROCESSOR_LIMIT_S), *command]
    # What a system says of signals is translated, and is looked for below.
    environment = {**(os.environ if env is None else env), "LC_ALL": "C"}
    process = subprocess.Popen(  # noqa: S603 - what the user has
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment, cwd=cwd, process_group=0,
    )  # fmt: skip
    _running.add(process)
    try:
        printed, said = process.communicate(timeout=TIME_LIMIT_S)
    except BaseException as error:
        _end(process)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        msg = f"it took more than {TIME_LIMIT_S} s, though less than {PROCESSOR_LIMIT_S} s of processor time"
        raise LimitError(msg) from error
    finally:
        _running.discard(process)
    ended_by = process.returncode if process.returncode < 0 else 128 - process.returncode
    if process.returncode and (ended_by == -signal.SIGXCPU or "time limit exceeded" in said.lower()):
        msg = f"it took more than {PROCESSOR_LIMIT_S} s of processor time"
        raise LimitError(msg)
    return subprocess.CompletedProcess(list(command), process.returncode, printed, said)


def end_all() -> None:
    """End all that runs, whatever thread waits for it."""
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started, as a compiler does, which would keep its pipes open."""
    # Its number is its own until it was waited for.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
