"""Reading text files that somebody gave: what is wrong with one is said in one line."""

from __future__ import annotations

from pathlib import Path

from seq2seq.tasks.errors import DataError


def bad_file(path: Path, cause: str, row: int | None = None) -> DataError:
    """The error for a file, ready to be raised.

    Args:
        path: of the file.
        cause: what is wrong and what was expected.
        row: line of the file, counted from 1; None when it is about the file as a whole.
    """
    place = str(path) if row is None else f"{path}, row {row}"
    return DataError(f"{place}: {' '.join(cause.split())}")


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file that must hold some.

    Args:
        path: of the file.
        encoding: of its text; a byte order mark is taken off.

    Raises:
        DataError: when it cannot be read, is empty, or is not of that encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise bad_file(path, f"cannot be read: {error.strerror or error}; expected a text file") from error
    if not raw.strip():
        raise bad_file(path, "is empty, expected at least one row of data")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig")
        cause = f"byte 0x{raw[error.start]:02x} is no {name}: save the file as UTF-8, or name its encoding, "
        cause += "as --option encoding=latin-1"
        raise bad_file(path, cause, row) from error
    except LookupError as error:
        raise bad_file(path, f"{encoding!r} is no encoding that Python knows; expected one like utf-8") from error
