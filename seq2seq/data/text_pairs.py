"""Pairs of texts from a user's file: TSV, or JSON lines. A bad row is named, with its cause and what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from seq2seq.data.text_file import ENCODING, bad_file, composed, read_text

#: A source text and its target text.
Pair = tuple[str, str]

# Not all of Unicode's spaces: French puts a no-break space before a colon, and it must be translated.
_BLANKS = re.compile(r"[ \t\r\n\f\v]+")
_SUFFIXES = {".jsonl", ".ndjson", ".json"}


def read_pairs(path: Path, keys: tuple[str, str], encoding: str = ENCODING) -> list[Pair]:
    """Pairs of a file: JSON lines when it ends in .jsonl, .ndjson or .json, otherwise TSV.

    Args:
        path: of the file.
        keys: of source and target in JSON lines; in messages also the names of a TSV's columns.
        encoding: of the file.

    Raises:
        DataError: as `read_tsv` and `read_jsonl`.
    """
    read = read_jsonl if path.suffix.lower() in _SUFFIXES else read_tsv
    return read(path, keys, encoding)


def read_tsv(path: Path, names: tuple[str, str] = ("source", "target"), encoding: str = ENCODING) -> list[Pair]:
    """Pairs of a file of lines source<TAB>target, without a header.

    Raises:
        DataError: for a file that is missing, empty or not of that encoding, and for a row of other than two filled
            columns.
    """
    pairs = []
    for row, line in _lines(path, encoding):
        columns = line.split("\t")
        if len(columns) != 2:  # noqa: PLR2004 - source and target
            found = f"{len(columns)} column{'s' * (len(columns) != 1)}"
            raise bad_file(path, f"{found}, expected {names[0]}<TAB>{names[1]}", row)
        pairs.append(_filled(path, row, columns[0], columns[1], names))
    return pairs


def read_jsonl(path: Path, keys: tuple[str, str], encoding: str = ENCODING) -> list[Pair]:
    """Pairs of a file of JSON objects, one per line.

    Raises:
        DataError: for a file that is missing, empty or not of that encoding, and for a row that is not an object with
            text under both keys.
    """
    keys = (composed(keys[0]), composed(keys[1]))
    expected = f'expected an object {{"{keys[0]}": "...", "{keys[1]}": "..."}}'
    pairs = []
    for row, line in _lines(path, encoding):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_file(path, f"not JSON ({error}), {expected}", row) from error
        if not isinstance(value, dict):
            raise bad_file(path, f"a JSON {_json_type(value)}, {expected}", row)
        value = {composed(key): text for key, text in value.items()}
        for key in keys:
            if key not in value:
                raise bad_file(path, f"no key {key!r}, {expected}", row)
            if not isinstance(value[key], str):
                raise bad_file(path, f"{key!r} is a JSON {_json_type(value[key])}, expected a string", row)
            try:
                value[key].encode()
            except UnicodeEncodeError as error:
                # JSON can spell out one half of a character.
                raise bad_file(path, f"{key!r} holds half a surrogate pair, expected whole characters", row) from error
        pairs.append(_filled(path, row, value[keys[0]], value[keys[1]], keys))
    return pairs


def tidy(text: str) -> str:
    """The text on one line, with one space where there were several blanks, and none around it; composed (NFC)."""
    return _BLANKS.sub(" ", composed(text)).strip()


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Rows and their lines. Split at line feeds alone: Unicode's other line ends may be part of a text."""
    yield from enumerate(read_text(path, encoding).removesuffix("\n").split("\n"), 1)


def _filled(path: Path, row: int, source: str, target: str, names: tuple[str, str]) -> Pair:
    texts = tidy(source), tidy(target)
    for text, name in zip(texts, names, strict=True):
        if not text.strip():
            raise bad_file(path, f"the {name} is empty, expected text on both sides", row)
    return texts


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
