"""Output of every command line here: standard streams that take any text, and new files that are whole or absent.

In the lowest room so that all command lines share it; it imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

EXIT_NOT_OK, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it was writing is cleared away."""


def run_command(main: Callable[[], int]) -> NoReturn:
    """End this process with the exit code of a command line, whatever its standard streams are.

    Args:
        main: the command line; what it raises beyond an interrupt is a fault of its own.
    """
    open_streams()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        code = EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        sys.stdout.flush()
    except OSError as error:
        _to_nowhere(sys.stdout.fileno())
        print(f"error: standard output: {error.strerror or error}", file=sys.stderr)
        code = code or EXIT_NOT_OK
    sys.exit(code)


def open_streams() -> None:
    r"""Let standard output and error take any text, whatever their encoding, and let their reader leave at any time.

    Characters that an encoding lacks become escapes such as \xfc. A closed stream is replaced by the null device:
    otherwise the next file that is opened would get its number, and output of other libraries would be written into
    that file.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                number = -1  # noqa: PLW2901 - something else has it by now
            if number > 0:
                _to_nowhere(number)
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif type(stream) is io.TextIOWrapper:  # not a replacement
            stream.flush()
            setattr(sys, name, _reopened(stream))


def is_closed(stream: Any) -> bool:
    """Return whether a standard stream was closed when this process began, so that what is written to it is lost."""
    return stream is None or getattr(stream, "name", "") == os.devnull


def lacking(text: str, stream: Any) -> bool:
    """Return whether a text has characters that a stream's encoding lacks, so that they are written as escapes."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return True
    return False


def printable(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text: bytes in it that are not UTF-8 become escapes such as \xfc.

    Python keeps such bytes as half characters that no file and no other program takes. In a locale without UTF-8 it
    keeps all but ASCII so; the name is the same in every locale.
    """
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def utf8(text: str) -> bytes:
    r"""Encode any text; half characters become escapes such as \udcfc, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def write_new(files: Mapping[Path, bytes]) -> None:
    """Write new files: all of them, or none.

    Raises:
        OSError: when one is there already, which stays as it is, or cannot be written.
    """
    begun: list[Path] = []
    try:
        for path, data in files.items():
            with path.open("xb") as file:
                begun.append(path)
                file.write(data)
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        raise


def why_unwritable(path: Path) -> str:
    """Return why nothing can be written at a path, found by trying; empty where it can, and nothing is left behind.

    For commands that write only after long work. Folders on the way that do not exist yet are no reason.
    """
    try:
        there = next(found for found in (path, *path.absolute().parents) if found.exists())
        if not there.is_dir():
            denied = "" if os.access(there, os.W_OK) else "Permission denied"
            return denied if there == path else f"{there} is not a folder"
        # The superuser may write everywhere, but not every file system lets anybody.
        probe = there / f".{secrets.token_hex(4)}.new"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of another in one step, once it is written and on the disk.

    A process that is killed leaves the old file or the new one. Of two that write the same file, the later one wins.

    Args:
        path: of the file.
        synced: whether it has to survive a power cut too; without, nobody waits for the disk.

    Raises:
        OSError: when it cannot be written; the old file is unchanged, and nothing is left beside it.
    """
    # Threads and machines that share a folder write to files of their own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with temporary.open("xb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk."""
    # Not every file system lets a folder be synced; the files themselves are safe.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file as a whole, in a folder that is made where it is missing; otherwise as `replacing`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


class _Patient(io.FileIO):
    """A standard stream whose reader may leave: the work continues, and what is written after that is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _to_nowhere(self.fileno())
            return memoryview(data).nbytes


def _reopened(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Patient(stream.fileno(), "wb", closefd=False)
    # Without a buffer where Python was asked for none, as by -u.
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


def _to_nowhere(number: int) -> None:
    """Let a file number lead to the null device."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)


def _terminate(*_: object) -> None:
    raise Terminated
