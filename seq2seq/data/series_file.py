"""Time series out of a user's CSV: a column of timestamps, one of values, maybe one that names the series.

Whatever does not fit is an error that names the row; a row is a line of the file, its header being row 1.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kernels.host.output import printable
from seq2seq.data import cells
from seq2seq.data.errors import DataError
from seq2seq.data.options import declared, typed
from seq2seq.data.series import Frequency, TimeSeries, regular
from seq2seq.data.text_file import ENCODING, bad_file, composed, read_text

#: The first line that names the separator of cells for Excel.
_EXCEL = re.compile(r'"?sep=(.)"?[,;\t]*(?=\n)', re.IGNORECASE)
#: Ways to write a tab on a command line.
_TABS = {"\\t": "\t", "tab": "\t"}
#: Most steps, a value that is there, that interpolation fills: beyond it a timestamp is mistyped.
MOST_FILLED = 100
#: Columns of a header that a message names.
_COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """Options for reading a CSV.

    Attributes:
        timestamp, value: names of the two columns; "" is the column without a name.
        series: name of the column that says which series a row belongs to; None for a file of one series.
        delimiter: one character, or `tab`; None for that of the file's first line `sep=`, or found out from the header
            (comma, semicolon, tab).
        decimal: the decimal mark of the values, `.` or `,`; the other one may then stand between thousands. A point
            when None, and commas are refused.
        timestamp_format: for `datetime.strptime`, or the unit of numbers that count since 1970: s, ms, us or ns. ISO
            8601, a year or year and month when None.
        encoding: of the file.
        missing: `error`, or `interpolate` for missing values and rows, and for repeated timestamps, whose values are
            then averaged.
        unit: of the values, for people; the name of their column when None.
    """

    timestamp: str = "timestamp"
    value: str = "value"
    series: str | None = None
    delimiter: str | None = None
    decimal: str | None = None
    timestamp_format: str | None = None
    encoding: str = ENCODING
    missing: str = "error"
    unit: str | None = None

    def __post_init__(self) -> None:
        expected = {"missing": ("error", "interpolate"), "decimal": (".", ",", None)}
        for name, choices in expected.items():
            if getattr(self, name) not in choices:
                msg = f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, filter(None, choices)))}"
                raise DataError(msg)
        delimiter = _TABS.get(self.delimiter or "", self.delimiter)
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            msg = f"delimiter is {self.delimiter!r}, expected one character that separates cells, or tab"
            raise DataError(msg)
        object.__setattr__(self, "delimiter", delimiter)
        if self.timestamp_format is not None:
            try:
                cells.check_format(self.timestamp_format)
            except ValueError as error:
                raise DataError(str(error)) from error

    @classmethod
    def of(cls, options: dict[str, Any]) -> Columns:
        """Make one of the options of a command line.

        Raises:
            DataError: for an option that there is not, or a value that it cannot have.
        """
        return cls(**typed(options, declared(cls), "reading a series"))


@dataclass
class _Rows:
    """Values in the rows of one series."""

    rows: list[int] = field(default_factory=list)
    timestamps: list[datetime] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    aware: bool = False


def read_series(path: Path, columns: Columns | None = None) -> list[TimeSeries]:
    """The series of a CSV file, in the order in which they appear.

    Args:
        path: of the file; it starts with a header row.
        columns: how to read it.

    Raises:
        DataError: naming file, row and cause: no such column, a column too few, a timestamp or value that is none,
            timestamps that repeat or go back or leave something out, an empty file, another encoding.
    """
    columns = columns or Columns()
    text = read_text(path, columns.encoding)
    found = _EXCEL.match(text)
    delimiter = columns.delimiter
    if found:
        # The line stays as an empty one, so that rows are counted as in the file.
        text = text[found.end() :]
        delimiter = delimiter or found[1]
    parts = _parse(path, text, columns, delimiter or _delimiter(text, _wanted(columns)))
    if not parts:
        raise bad_file(path, "holds a header and no values, expected at least one row below it")
    return [_series(path, name, part, columns) for name, part in parts.items()]


def _wanted(columns: Columns) -> dict[str, str]:
    """Names of the columns that are read, by their option."""
    named = {"timestamp": columns.timestamp, "value": columns.value, "series": columns.series}
    return {option: _name(name) for option, name in named.items() if name is not None}


def _name(text: str) -> str:
    """A name as it is compared: letters that look alike are the same."""
    return composed(text).strip()


def _delimiter(text: str, wanted: dict[str, str]) -> str:
    """The delimiter with which the header has the columns that are wanted, or else the one it holds most often."""
    line = text.lstrip("\n").split("\n", 1)[0]

    def fits(delimiter: str) -> tuple[int, int]:
        names = {_name(cell) for cell in next(csv.reader([line], delimiter=delimiter))}
        return len(names.intersection(wanted.values())), line.count(delimiter)

    return max(",;\t", key=fits)


def _parse(path: Path, text: str, columns: Columns, delimiter: str) -> dict[str, _Rows]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    parts: dict[str, _Rows] = {}
    try:
        filled = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
        at, header = _header(path, filled, _wanted(columns))
        alone = {} if "series" in at else {"series": composed(printable(path.stem)).strip() or printable(path.name)}
        for number, row in filled:
            if len(row) != header:
                counted = f"has {len(row)} column{'s' * (len(row) != 1)}"
                raise bad_file(path, f"{counted}, expected {header} as in the header", number)
            _add(path, parts, number, alone | {option: row[place].strip() for option, place in at.items()}, columns)
    except csv.Error as error:
        cause = f"is not a row of a CSV ({error}), expected cells between {delimiter!r}"
        raise bad_file(path, cause, reader.line_num) from error
    return parts


def _header(path: Path, rows: Iterable[tuple[int, list[str]]], wanted: dict[str, str]) -> tuple[dict[str, int], int]:
    """Places of the columns that are wanted, by option, and how many columns there are."""
    row, first = next(iter(rows), (0, []))
    if not first:
        raise bad_file(path, "is empty, expected a header and at least one row of data")
    names = [_name(cell) for cell in first]
    for option, name in wanted.items():
        if names.count(name) != 1:
            found = "several columns" if name in names else "no column"
            listed = ", ".join(cells.shown(name)[1:-1] or "(no name)" for name in names[:_COLUMNS_SHOWN])
            more = f" and {len(names) - _COLUMNS_SHOWN} more" * (len(names) > _COLUMNS_SHOWN)
            cause = f"{found} named {name!r} in the header {listed}{more}; expected one, or --option {option}=NAME with"
            cause += " the name of another" + " (nothing after = for the one without a name)" * ("" in names)
            raise bad_file(path, cause, row)
    return {option: names.index(name) for option, name in wanted.items()}, len(names)


def _add(path: Path, parts: dict[str, _Rows], row: int, texts: dict[str, str], columns: Columns) -> None:
    """Add a row to its series."""
    name = _name(texts["series"])
    if not name:
        raise bad_file(path, f"the cell of {columns.series!r} is empty, expected the name of a series", row)
    try:
        stamp = cells.read_timestamp(texts["timestamp"], columns.timestamp_format)
        missing = texts["value"].lower() in cells.MISSING
        value = math.nan if missing else cells.read_number(texts["value"], columns.decimal)
    except ValueError as error:
        raise bad_file(path, str(error), row) from error
    if missing and columns.missing != "interpolate":
        raise bad_file(path, "the value is missing, expected a number; missing=interpolate fills it", row)
    aware = stamp.tzinfo is not None
    if parts and aware != next(iter(parts.values())).aware:
        raise bad_file(path, "timestamps are with and without a time zone, expected one way throughout", row)
    part = parts.setdefault(name, _Rows(aware=aware))
    part.rows.append(row)
    part.timestamps.append(stamp.replace(tzinfo=None) if aware else stamp)
    part.numbers.append(value)


def _series(path: Path, name: str, part: _Rows, columns: Columns) -> TimeSeries:
    """Check that the rows are a regular series, or make them one where that is asked for."""
    stamps = np.array(part.timestamps, dtype="datetime64[us]")
    steps = np.diff(stamps).astype(np.int64)
    if (back := np.flatnonzero(steps < 0)).size:
        place = int(back[0]) + 1
        cause = f"{part.timestamps[place]} comes after {part.timestamps[place - 1]}, expected rising timestamps"
        raise bad_file(path, cause, part.rows[place])
    interpolate = columns.missing == "interpolate"
    if (same := np.flatnonzero(steps == 0)).size and not interpolate:
        place = int(same[0]) + 1
        cause = f"{part.timestamps[place]} is there twice, expected once; missing=interpolate takes the mean"
        raise bad_file(path, cause, part.rows[place])
    # Repeated timestamps become one, with the mean of the values that are there.
    frame = pd.DataFrame({"value": part.numbers, "row": part.rows}, index=pd.DatetimeIndex(stamps))
    frame = frame.groupby(level=0).agg({"value": "mean", "row": "first"})
    if len(frame) < 3:  # noqa: PLR2004 - two steps are needed to see that they are equal
        raise bad_file(path, f"the series {name} has {len(frame)} timestamps, expected at least 3")
    index, rows = pd.DatetimeIndex(frame.index), frame["row"].to_numpy()
    frequency = Frequency.infer(index)
    places = frequency.places(index)
    if (off := np.flatnonzero(np.abs(places - np.rint(places)) > 1e-6)).size:  # noqa: PLR2004 - rounding
        place = int(off[0])
        cause = f"{index[place]} is off the {frequency} steps of the series {name}, expected equal steps; round the"
        cause += " timestamps, or leave out the time zone where a step is a day" if part.aware else " timestamps"
        raise bad_file(path, cause, int(rows[place]))
    jumps = np.diff(np.rint(places))
    most = MOST_FILLED * len(frame) if interpolate else 1
    if (gaps := np.flatnonzero(jumps > most)).size:
        place = int(gaps[0]) + 1
        cause = f"{int(jumps[place - 1]) - 1} {frequency} steps are missing before {index[place]}; "
        cause += f"expected at most {most} to fill" if interpolate else "missing=interpolate fills them"
        raise bad_file(path, cause, int(rows[place]))
    known = np.isfinite(frame["value"].to_numpy())
    if not (known[0] and known[-1]):
        row = int(rows[0 if not known[0] else -1])
        raise bad_file(path, "the first and the last value must be there, nothing beyond them is known", row)
    found = regular(name, columns.unit or columns.value, index, frame["value"].to_numpy(), frequency)
    # Beside a named column, the file's name says little.
    title = name if columns.series or columns.value == Columns.value else columns.value
    averaged = len(part.rows) - len(frame)
    return dataclasses.replace(found, converted=part.aware, title=title, averaged=averaged)
