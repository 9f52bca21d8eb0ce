"""Options of a task: texts of a command line, or Python values, are converted to the types that the task declares.

Nothing is guessed from a text: `2023` is a number for an option that counts, and a name for one that names a column.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from kernels.host.usage import meant
from seq2seq.data.errors import DataError

T = TypeVar("T")

#: A whole number of at least 1.
Count = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
_EXPECTED: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def declared(source: Callable[..., Any]) -> dict[str, Any]:
    """Types of options by name: the fields of a dataclass, or a function's arguments but for its path.

    Args:
        source: dataclass or function.
    """
    hints = typing.get_type_hints(source, include_extras=True)
    return {name: kind for name, kind in hints.items() if name not in {"path", "return"}}


def typed(options: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Convert options to their types.

    Args:
        options: texts, or values of Python.
        kinds: the type of each option there is, as from `declared`.
        what: what the options are for, for messages.

    Raises:
        DataError: for an unknown option, and for a value that does not fit: the option, the value, what was expected.
    """
    found = {}
    for name, value in options.items():
        if name not in kinds:
            msg = f"there is no option {name!r} for {what}; {meant(name, kinds)}"
            raise DataError(msg)
        try:
            found[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            msg = f"{name} is {value!r}, expected {_expected(kinds[name])}"
            raise DataError(msg) from error
    return found


def takes_options(
    *, own: Collection[str] = (), along: Collection[str] = ()
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a task's `load`: its options are converted to the types of its arguments before it is called.

    Args:
        own: options that say how a user's own data is read, and are refused without any.
        along: options of the data that comes along, refused with a user's own.
    """

    def decorate(load: Callable[..., T]) -> Callable[..., T]:
        kinds, what = declared(load), load.__module__.rpartition(".")[2]

        @functools.wraps(load)
        def converting(path: Path | str | None = None, /, **options: Any) -> T:
            found = typed(options, kinds, what)
            idle = [name for name in found if name in (own if path is None else along)]
            if idle:
                where = "data of your own, in --data" if path is None else "the data that comes along, not for --data"
                msg = f"{', '.join(idle)}: only for {where}"
                raise DataError(msg)
            return load(path, **found)

        return converting

    return decorate


def _expected(kind: Any) -> str:
    """Describe a type in words: the description of its `Field`, the names of its `Literal`, or its own name."""
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        return " or ".join(_expected(part) for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    for part in getattr(kind, "__metadata__", ()):
        if isinstance(part, FieldInfo) and part.description:
            return part.description
    return _EXPECTED[kind]
