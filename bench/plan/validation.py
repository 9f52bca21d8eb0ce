"""Checks at the edges: data from a file against the dataclass that it should fit, with one line for what does not.

pydantic does the checking; its findings are worded for a TOML file, with no Python in them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import UsageError, meant

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

#: What pydantic's kinds of error ask for; the longest beginning that fits counts.
_EXPECTED = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "finite": "a number that is finite",
    "bool": "true or false",
    "tuple": "a list",
    "dataclass": "a table",
}
_SHOWN_CHARACTERS = 40
_SHOWN_PROBLEMS = 5


def validate(kind: type[T], data: dict[str, Any], what: str) -> T:
    """Build a dataclass from plain data.

    Args:
        kind: the dataclass, whose fields may be dataclasses or tuples of them.
        data: as read from TOML or JSON.
        what: how to name the data's origin in an error.

    Raises:
        UsageError: naming every field that is missing, unknown or of the wrong type.
    """
    from pydantic import ValidationError  # noqa: PLC0415 - slow to import, and no worker validates

    problems = _unknown(kind, data)
    try:
        if not problems:
            return typing.cast("T", _adapter(typing.cast("Any", kind)).validate_python(data))
    except ValidationError as error:
        problems = [_problem(kind, found) for found in error.errors()]
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    msg = f"{what}: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}"
    raise UsageError(msg)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # noqa: PLC0415 - see `validate`

    return TypeAdapter(kind)


def _unknown(kind: type, data: Any, inside: str = "") -> list[str]:
    """A line for each field that the dataclass, or one inside it, does not have."""
    if not isinstance(data, dict):
        return []
    fields = [f.name for f in dataclasses.fields(kind)]
    found = []
    for name, value in data.items():
        if name not in fields:
            found.append(f"unknown field {name!r}{inside}; {meant(name, fields)}")
        elif (inner := _elements(kind).get(name)) is not None and isinstance(value, list):
            for number, entry in enumerate(value, start=1):
                found += _unknown(inner, entry, f" of [[{name}]] {number}{inside}")
    return found


def _problem(kind: type, found: Mapping[str, Any]) -> str:
    """One of pydantic's findings as `place: what was expected, what is there`."""
    path, value = found["loc"], found["input"]
    place = _place(kind, path) or "the file"
    if found["type"] == "missing":
        return f"{place} is missing"
    if found["type"] == "tuple_type" and isinstance(value, dict) and _part_at(kind, path):
        return f"{place}: write [[{path[-1]}]] with two brackets: each begins one part of a list"
    expected = next((text for name, text in _EXPECTED.items() if found["type"].startswith(name)), None)
    # What a Status or a Literal expects is in pydantic's own words.
    return f"{place}: expected {expected or found.get('ctx', {}).get('expected', found['msg'])}, got {_shown(value)}"


def _place(kind: type, path: Sequence[str | int]) -> str:
    """`workloads of [[select]] 2` for a field of the second part; entries count from 1."""
    words: list[str] = []
    for step, name in enumerate(path):
        if isinstance(name, str):
            words.append(name)
        elif _part_at(kind, path[:step]):
            words[-1] = f"[[{words[-1]}]] {name + 1}"
        else:
            words.append(f"entry {name + 1}")
    return " of ".join(reversed(words))


def _part_at(kind: type, path: Sequence[str | int]) -> type | None:
    """The dataclass of the parts that the list at a path holds; None where it holds plain values."""
    inner: type | None = kind
    for name in path:
        if isinstance(name, str):
            inner = _elements(inner).get(name) if inner else None
    return inner


def _shown(value: Any) -> str:
    """A value as a file has it, short."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


@functools.cache
def _elements(kind: Any) -> dict[str, type]:
    """The dataclasses that the fields of a dataclass hold tuples of, by field."""
    first = {name: (*typing.get_args(hint), None)[0] for name, hint in typing.get_type_hints(kind).items()}
    return {name: inner for name, inner in first.items() if isinstance(inner, type) and dataclasses.is_dataclass(inner)}
