"""Reads users' text files, of any encoding and line ends. What is wrong is reported in one line."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path

from seq2seq.data.errors import DataError

#: Encoding of texts where none is named.
ENCODING = "utf-8"
#: Byte order marks and the encodings that read them; UTF-32's comes before UTF-16's, which it starts with.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: Encodings of one byte a letter that people name for a file that is UTF-8 already; it would be read as garbage.
_LATIN = ("iso8859-", "cp125")
#: Encodings that Python has for names of hosts, for its own source, and to fail.
_NO_TEXT = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}
#: One line end; a text that was converted to Windows' twice has two carriage returns in each.
_LINE_END = re.compile(r"\r*\n|\r")
#: Files that were joined have a byte order mark at the start of each part.
_MARK = re.compile("^\ufeff", re.MULTILINE)
_CONTROLS = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f]")
#: Bytes around a bad one that are shown as another encoding would read them.
_AROUND = 12


def bad_file(path: Path | str, cause: str, row: int | None = None) -> DataError:
    """Make the error for a file, ready to be raised.

    Args:
        path: of the file, or what it is called.
        cause: what is wrong and what was expected.
        row: line of the file, counted from 1; None when it is about the file as a whole.
    """
    place = str(path) if row is None else f"{path}, row {row}"
    return DataError(f"{place}: {' '.join(cause.split())}")


def read_text(path: Path, encoding: str = ENCODING) -> str:
    r"""Read the text of a file that must hold some; its lines end in \n.

    Args:
        path: of the file.
        encoding: of its text.

    Raises:
        DataError: when it cannot be read, is empty, or is not of that encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise bad_file(path, f"cannot be read: {error.strerror or error}; expected a text file") from error
    text = decode(raw, path, encoding)
    if not text.strip():
        raise bad_file(path, "is empty, expected at least one row of data")
    return text


def decode(raw: bytes, where: Path | str, encoding: str = ENCODING, errors: str = "strict") -> str:
    r"""Decode a text; byte order marks are taken off, and its lines end in \n.

    Args:
        raw: its bytes. A byte order mark says which UTF it is, whichever was named.
        where: what they came from, for messages.
        encoding: any spelling of its name.
        errors: of `bytes.decode`; `surrogateescape` for names of files, which may be bytes of no encoding.

    Raises:
        DataError: for an unknown encoding, and for bytes that are not of it or make no text in it. Where another
            encoding fits it is named.
    """
    try:
        codec = _codec(encoding)
        mark = next((mark for mark in _MARKS if raw.startswith(mark)), b"")
        _refuse_contradiction(raw, where, codec, mark)
        codec = _MARKS.get(mark, codec)
        text = raw.decode(codec, errors)
    except LookupError as error:
        cause = f"{encoding!r} is not an encoding of texts that Python knows; expected one like utf-8, cp1252 or utf-16"
        raise bad_file(where, cause) from error
    except UnicodeDecodeError as error:
        row = len(_LINE_END.findall(raw[: error.start].decode(codec, "replace"))) + 1
        name = codec.removesuffix("-sig")
        cause = f"byte 0x{raw[error.start]:02x} is not {name}: {_advice(raw, error.start, codec)}"
        raise bad_file(where, cause, row) from error
    # What latin-1 has where Windows has a euro sign, quotation marks and dashes.
    odd = re.search("\0" if codec.startswith("utf") else "[\0\x80-\x9f]", text)
    if odd:
        row = len(_LINE_END.findall(text, 0, odd.start())) + 1
        cause = f"read as {codec} it holds the control character {odd.group()!r}: {_advice(raw, odd.start(), codec)}"
        raise bad_file(where, cause, row)
    return _MARK.sub("", _LINE_END.sub("\n", text))


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC): letters that look alike become the same characters."""
    return unicodedata.normalize("NFC", text)


def _codec(encoding: str) -> str:
    """Python's name of an encoding, which may be spelt as `CP-1252`, `windows 1252` or `1252`.

    Raises:
        LookupError: when there is none.
    """
    squeezed = re.sub(r"[\W_]", "", encoding.lower())
    for spelling in (encoding, squeezed, re.sub(r"^win(?=\d)", "cp", squeezed)):
        try:
            name = codecs.lookup(spelling).name
        except (LookupError, ValueError):
            continue
        if name.replace("_", "-") not in _NO_TEXT:
            return name
    raise LookupError(encoding)


def _refuse_contradiction(raw: bytes, where: Path | str, codec: str, mark: bytes) -> None:
    """Raise where the bytes themselves say that they are of another encoding than the named one."""
    if mark and not codec.startswith("utf"):
        cause = f"starts with the byte order mark of {_MARKS[mark]}, expected {codec}; leave the encoding out"
        raise bad_file(where, cause)
    if not mark and codec in {"utf-16", "utf-32"}:
        cause = f"has no byte order mark, expected one in {codec}; name {codec}-le or {codec}-be"
        raise bad_file(where, cause)
    if codec.startswith(_LATIN) and not raw.isascii() and _reads(raw, "utf-8"):
        raise bad_file(where, f"is utf-8, expected {codec} as it was named; leave the encoding out")


def _advice(raw: bytes, place: int, codec: str) -> str:
    """Say what to do about a text that is not of its encoding; another encoding is named only where it fits."""
    if raw.startswith(tuple(_MARKS)):
        return "its byte order mark says that it is; save the file as UTF-8 again"
    name = _fitting(raw, codec)
    if name is None and b"\0" in raw:
        return "expected a text file"
    advice = "save the file as UTF-8, or name its encoding"
    if name is None:
        return f"{advice} with --option encoding=NAME"
    place -= place % 2  # where a character of UTF-16 starts
    before = raw[max(0, place - 2 * _AROUND) : place].decode(name, "ignore")
    after = raw[place : place + 2 * _AROUND].decode(name, "ignore")
    shown = _LINE_END.split(before)[-1] + _LINE_END.split(after)[0]
    return f"{advice}, as --option encoding={name}, which reads {shown!r}"


def _fitting(raw: bytes, other_than: str) -> str | None:
    """Name of an encoding in which the bytes are text; None when none is known.

    Windows-1252 equals Latin-1 except for the bytes 0x80 to 0x9f. In UTF-16 every second byte of most texts is 0.
    """
    candidates = ["utf-8", "latin-1", "cp1252"]
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if 4 * raw[start::2].count(0) > len(raw):
            candidates = [name]
    fit = (name for name in candidates if codecs.lookup(name).name != other_than and _reads(raw, name))
    return next(fit, None)


def _reads(raw: bytes, name: str) -> bool:
    """Report whether the bytes are text in an encoding, without control characters."""
    try:
        return not _CONTROLS.search(raw.decode(name))
    except UnicodeDecodeError:
        return False
