"""Writing that survives: what a function here has written is on the disk when it returns, whole or not at all.

A process that is killed at any moment leaves the old state or the new one. Only an append may leave a torn end, so a
reader of an appended file must recognise whole entries.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.errors import UsageError
from kernels.host.output import replacing, sync_folder

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"


def append(path: Path, data: bytes) -> None:
    """Append to a file, all of the data or, where the system refuses, nothing.

    Raises:
        OSError: naming the file, when it cannot be written; its old content stays.
    """
    new = not path.exists()
    with _named(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            _write(file.fileno(), data)
            os.fsync(file.fileno())
        except OSError:
            # A disk that is full takes a part. Cutting it off again needs no room.
            with contextlib.suppress(OSError):
                file.truncate(before)
                if new:
                    path.unlink()
            raise
    if new:
        sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Write or replace a file in one step: at every moment it holds all of the old or all of the new.

    Raises:
        OSError: naming the file, when it cannot be written; it is unchanged.
    """
    with _named(path), replacing(path) as file:
        _write(file.fileno(), data)
    sync_folder(path.parent)


def is_bookkeeping(path: Path) -> bool:
    """Return whether a file is a lock or what a killed process left of a replacement: nothing of value."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".new"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases when this process ends, however it ends.

    Raises:
        UsageError: naming the process that holds it, or where the system has no such locks.
        OSError: when the lock cannot be written.
    """
    if sys.platform == "win32":
        msg = "this system has no file locks (flock), without which two runs could write one folder; use Linux or macOS"
        raise UsageError(msg)
    path = folder / LOCK
    with _named(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
            msg = f"{folder} is being written by process {holder or 'unknown'}; wait until it ends, or end it"
            raise UsageError(msg) from error
        with _named(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system with the name of the file: a write that fails has none of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
