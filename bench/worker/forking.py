"""Forking workers: what the process does that has imported everything and run nothing (`bench.run.forks`)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from bench.machine import own_pages
from bench.run.forks import LARGEST, OWN, SHARED


def serve_forks(control: int, main: Callable[[str, str], int]) -> int:
    """Fork a worker for each message, and report how each ended, until the control socket closes.

    Args:
        control: descriptor of the socket.
        main: what a worker does, from the descriptors of its requests and answers; returns its exit code.
    """
    living: dict[int, tuple[int, int]] = {}
    with socket.socket(fileno=control) as asked:
        asked.send(OWN if own_pages.note() else SHARED)
        while True:
            # A child's pidfd can be read when it has ended, and not when it was merely stopped.
            readable, _, _ = select.select([control, *living], [], [])
            for ended in set(readable) & living.keys():
                _bury(ended, *living.pop(ended))
            if control not in readable:
                continue
            message, descriptors, _, _ = socket.recv_fds(asked, LARGEST, 4)
            if not message:
                return 0
            *theirs, status = descriptors
            pid = os.fork()
            if pid == 0:
                others = [descriptor for child, (_, known) in living.items() for descriptor in (child, known)]
                _become_worker(json.loads(message), theirs, [control, status, *others], main)
            living[os.pidfd_open(pid)] = pid, status
            for descriptor in theirs:
                os.close(descriptor)
            asked.send(str(pid).encode())


def _bury(child: int, pid: int, status: int) -> None:
    """Tell how a child ended."""
    os.close(child)
    _, code = os.waitpid(pid, 0)
    with os.fdopen(status, "wb") as pipe, contextlib.suppress(OSError):
        pipe.write(str(os.waitstatus_to_exitcode(code)).encode())


def _become_worker(
    environment: dict[str, Any], descriptors: list[int], foreign: list[int], main: Callable[[str, str], int]
) -> NoReturn:
    """Be a worker in the forked process, and end with it."""
    code = 1
    try:
        # A group of its own, as a fresh worker has.
        os.setsid()
        requests, answers, log = descriptors
        for descriptor in foreign:
            os.close(descriptor)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        os.environ.update(environment)
        code = main(str(requests), str(answers))
    except SystemExit as ending:
        # As the interpreter ends: None is success, a number is the code, and anything else is printed.
        code = 0 if ending.code is None else ending.code if isinstance(ending.code, int) else 1
        if not isinstance(ending.code, int | None):
            print(ending.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - nothing may return into the server's loop
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
