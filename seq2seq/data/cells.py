"""Cells of a table as numbers and timestamps. What could mean two things is refused, with the option that decides."""

from __future__ import annotations

import functools
import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

#: Texts of a cell that mean that there is no value.
MISSING = frozenset({"", "na", "nan", "n/a", "#n/a", "<na>", "null", "none", "-"})
#: Units in which a number may count the time since 1970, and microseconds in each.
EPOCH_UNITS = {"s": Decimal(1_000_000), "ms": Decimal(1000), "us": Decimal(1), "ns": Decimal("0.001")}
#: Characters of a cell that a message shows.
_SHOWN = 40
#: What stands between thousands whatever the decimal mark is: spaces that break a line or do not, and apostrophes.
_SPACES = " \u00a0\u2009\u202f'\u2019"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: More microseconds than any year has that a timestamp takes.
_LARGEST = 10**18
_PLAIN = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
#: A date that is followed by a digit, as a number of milliseconds may: Python would take the digit for the separator.
_RUN_ON = re.compile(r"\d{4}-?\d\d-?\d\d\d")
_TOO_FINE = re.compile(r"[.,]\d{6}0*[1-9]")


def read_number(cell: str, decimal: str | None) -> float:
    """Read a finite number.

    Args:
        cell: its text, without blanks around it. Thousands may stand apart by a space or an apostrophe.
        decimal: the decimal mark, `.` or `,`; the other one may then stand between thousands. When None it is a point,
            and a comma is refused.

    Raises:
        ValueError: for anything else, with what was expected.
    """
    mark = decimal or "."
    found = _number(decimal).fullmatch(cell.replace("\u2212", "-"))
    value = math.nan
    if found:
        plain = found.group()
        if found["apart"]:
            plain = plain.replace(found["apart"], "")
        value = float(plain.replace(mark, "."))
    if not math.isfinite(value):
        msg = f"{shown(cell)} is not a number, expected one with decimal mark {mark!r}"
        if decimal is None and "," in cell:
            msg += "; --option decimal=, reads a comma as that mark, decimal=. as one between thousands"
        raise ValueError(msg)
    return value


@functools.cache
def _number(decimal: str | None) -> re.Pattern[str]:
    """The pattern of a number: plain digits, or groups of three that all stand apart by the same character."""
    mark = re.escape(decimal or ".")
    apart = _SPACES + {None: "", ".": ",", ",": "."}[decimal]
    whole = rf"(?:\d+|[1-9]\d{{0,2}}(?P<apart>[{apart}])\d{{3}}(?:(?P=apart)\d{{3}})*)"
    return re.compile(rf"[+-]?(?:{whole}(?:{mark}\d*)?|{mark}\d+)(?:[eE][+-]?\d+)?")


def read_timestamp(cell: str, form: str | None) -> datetime:
    """Read a timestamp; one with a time zone comes out in UTC.

    Args:
        cell: its text, without blanks around it.
        form: for `datetime.strptime`, or a key of `EPOCH_UNITS`; ISO 8601, a year or year and month when None.

    Raises:
        ValueError: for anything else, with what was expected.
    """
    try:
        stamp = _from_epoch(cell, form) if form in EPOCH_UNITS else _from_calendar(cell, form)
        return stamp.astimezone(UTC) if stamp.tzinfo else stamp
    except OverflowError as error:
        msg = f"{shown(cell)} is beyond the years 1 to 9999"
        raise ValueError(msg) from error


def check_format(form: str) -> None:
    """Raise ValueError for a format that `read_timestamp` cannot use."""
    now = datetime.now(UTC)
    try:
        if form not in EPOCH_UNITS:
            datetime.strptime(now.strftime(form), form)  # noqa: DTZ007 - only whether it can be read
    except ValueError as error:
        msg = f"timestamp_format is {form!r}, expected directives of strptime such as %d.%m.%Y %H:%M, or for numbers "
        msg += f"that count since 1970 their unit, {', '.join(EPOCH_UNITS)}"
        raise ValueError(msg) from error


def shown(cell: str) -> str:
    """A cell as a message quotes it: the beginning, where it is long."""
    return repr(cell if len(cell) <= _SHOWN else cell[:_SHOWN] + "...")


def _from_calendar(cell: str, form: str | None) -> datetime:
    # A year, or a year and a month, which ISO 8601 allows but Python does not take.
    full = cell + {4: "-01-01", 7: "-01"}.get(len(cell), "")
    expected = form or "ISO 8601 such as 2024-01-31 18:00, or name its timestamp_format"
    if form is None and (_RUN_ON.match(cell) or (_PLAIN.fullmatch(cell) and len(cell) not in {4, 8})):
        expected = f"{expected}; a number that counts since 1970 needs its unit, as --option timestamp_format=s, or "
        expected += ", ".join(unit for unit in EPOCH_UNITS if unit != "s")
        full = ""
    try:
        stamp = datetime.fromisoformat(full) if form is None else datetime.strptime(cell, form)  # noqa: DTZ007 - the format may have a zone
    except ValueError as error:
        msg = f"{shown(cell)} is not a timestamp, expected {expected}"
        raise ValueError(msg) from error
    if form is None and _TOO_FINE.search(cell):
        _refuse_fine(cell)
    return stamp


def _from_epoch(cell: str, unit: str) -> datetime:
    try:
        count = Decimal(cell) * EPOCH_UNITS[unit]
        whole = int(count) if abs(count) < _LARGEST else None
    except ArithmeticError as error:
        msg = f"{shown(cell)} is not a timestamp, expected a number of {unit} since 1970"
        raise ValueError(msg) from error
    if whole is None:
        raise OverflowError
    if whole != count:
        _refuse_fine(cell)
    return _EPOCH + timedelta(microseconds=whole)


def _refuse_fine(cell: str) -> None:
    msg = f"{shown(cell)} is finer than a microsecond, the finest that is supported; expected it rounded"
    raise ValueError(msg)
