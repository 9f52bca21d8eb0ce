"""Checks at the edges: data from a file against the dataclass that it should fit, with one line for what does not.

pydantic does the checking. Where it is not installed the data is taken as it stands, after its field names alone were
checked: the feature that is lost is the early message, not the run.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from bench.errors import UsageError

T = TypeVar("T")


def validate(kind: type[T], data: dict[str, Any], what: str) -> T:
    """Build a dataclass from plain data.

    Args:
        kind: the dataclass, whose fields may be dataclasses or tuples of them.
        data: as read from TOML or JSON.
        what: how to name the data's origin in an error.

    Raises:
        UsageError: naming the first field that is missing, unknown or of the wrong type.
    """
    try:
        import pydantic  # noqa: PLC0415 - optional
    except ImportError:
        return _plain(kind, data, what)
    try:
        adapter = pydantic.TypeAdapter(kind, config=None)
        _refuse_unknown(kind, data, what)
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        # TOML and JSON have lists where our dataclasses have tuples.
        problem = first["msg"].lower().replace("valid tuple", "valid list")
        msg = f"{what}: {place}: {problem} (got {first['input']!r})"
        raise UsageError(msg) from error


def _refuse_unknown(kind: type, data: Any, what: str) -> None:
    """Raise for a field that the dataclass, or one inside it, does not have."""
    if not isinstance(data, dict):
        return
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in data.items():
        if name not in fields:
            msg = f"{what}: unknown field {name!r}, expected one of {', '.join(fields)}"
            raise UsageError(msg)
        inner = _element_of(kind, name)
        if inner is not None and isinstance(value, list):
            for entry in value:
                _refuse_unknown(inner, entry, what)


def _plain(kind: type[T], data: dict[str, Any], what: str) -> T:
    _refuse_unknown(kind, data, what)
    hints = typing.get_type_hints(kind)
    values = {name: _plain_value(hints[name], value, f"{what}: {name}") for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        msg = f"{what}: {error}"
        raise UsageError(msg) from error


def _plain_value(hint: Any, value: Any, what: str) -> Any:
    """A value that fits the annotation: a tuple of such, a dataclass, or a plain type."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            msg = f"{what}: expected a list (got {value!r})"
            raise UsageError(msg)
        return tuple(_plain_value(typing.get_args(hint)[0], entry, what) for entry in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            msg = f"{what}: expected a table (got {value!r})"
            raise UsageError(msg)
        return _plain(typing.cast(type, hint), value, what)
    if not isinstance(value, (int, float) if hint is float else hint) or isinstance(value, bool) is not (hint is bool):
        msg = f"{what}: expected {hint.__name__} (got {value!r})"
        raise UsageError(msg)
    return value


def _element_of(kind: type, name: str) -> type | None:
    """The dataclass that the tuple field `name` holds, or None."""
    arguments = typing.get_args(typing.get_type_hints(kind)[name])
    if arguments and isinstance(arguments[0], type) and dataclasses.is_dataclass(arguments[0]):
        return arguments[0]
    return None
