"""Time series out of a user's CSV: a column of timestamps, one of values, maybe one that names the series.

Whatever does not fit is an error that names the row; a row is a line of the file, its header being row 1.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kernels.output import printable
from seq2seq.tasks.errors import DataError
from seq2seq.tasks.files import bad_file, read_text
from seq2seq.tasks.series import Frequency, TimeSeries, regular

#: Values of a cell that mean that there is none.
MISSING = frozenset({"", "na", "nan", "n/a", "null", "none", "-"})


@dataclass(frozen=True)
class Columns:
    """How a CSV is to be read.

    Attributes:
        timestamp, value: names of the two columns.
        series: name of the column that says which series a row belongs to; None for a file of one series.
        delimiter: one character; found out from the header (comma, semicolon, tab) when None.
        decimal: the decimal mark of the values, `.` or `,`.
        timestamp_format: for `datetime.strptime`; ISO 8601, a year or year and month when None.
        encoding: of the file.
        missing: `error`, or `interpolate` for missing values and rows, and for repeated timestamps, whose values are
            then averaged.
        unit: of the values, for people; the name of their column when None.
    """

    timestamp: str = "timestamp"
    value: str = "value"
    series: str | None = None
    delimiter: str | None = None
    decimal: str = "."
    timestamp_format: str | None = None
    encoding: str = "utf-8-sig"
    missing: str = "error"
    unit: str | None = None

    def __post_init__(self) -> None:
        expected = {"missing": ("error", "interpolate"), "decimal": (".", ",")}
        for name, choices in expected.items():
            if getattr(self, name) not in choices:
                msg = f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, choices))}"
                raise DataError(msg)
        if self.delimiter is not None and len(self.delimiter) != 1:
            msg = f"delimiter is {self.delimiter!r}, expected one character"
            raise DataError(msg)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Columns:
        """From the options of a command line.

        Raises:
            DataError: for an option that there is not.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                msg = f"there is no option {name!r} for reading a series, expected one of {', '.join(names)}"
                raise DataError(msg)
        return cls(**options)


@dataclass
class _Rows:
    """What the rows of one series say."""

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
    parts = _parse(path, read_text(path, columns.encoding), columns)
    if not parts:
        raise bad_file(path, "holds a header and no values, expected at least one row below it")
    return [_series(path, name, part, columns) for name, part in parts.items()]


def _parse(path: Path, text: str, columns: Columns) -> dict[str, _Rows]:
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = columns.delimiter or max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    parts: dict[str, _Rows] = {}
    header: list[str] | None = None
    aware: bool | None = None
    try:
        for cells in reader:
            row = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                wanted = [name for name in (columns.timestamp, columns.value, columns.series) if name is not None]
                at = [_column(path, header, name, row) for name in wanted]
                continue
            if len(cells) != len(header):
                counted = f"has {len(cells)} column{'s' * (len(cells) != 1)}"
                raise bad_file(path, f"{counted}, expected {len(header)} as in the header", row)
            stamp = _timestamp(path, row, cells[at[0]].strip(), columns)
            if aware is not None and aware != (stamp.tzinfo is not None):
                raise bad_file(path, "timestamps are with and without a time zone, expected one way throughout", row)
            aware = stamp.tzinfo is not None
            part = parts.setdefault(cells[at[2]].strip() if columns.series else printable(path.stem), _Rows())
            part.aware = aware
            part.rows.append(row)
            part.timestamps.append(stamp.astimezone(UTC).replace(tzinfo=None) if aware else stamp)
            part.numbers.append(_value(path, row, cells[at[1]].strip(), columns))
    except csv.Error as error:
        cause = f"is no row of a CSV ({error}), expected cells between {delimiter!r}"
        raise bad_file(path, cause, reader.line_num) from error
    return parts


def _column(path: Path, header: list[str], name: str, row: int) -> int:
    if header.count(name) != 1:
        found = "several columns" if name in header else "no column"
        cause = f"{found} named {name!r} in the header {', '.join(header)}; expected one"
        raise bad_file(path, f"{cause}, or the option timestamp or value with the name of another", row)
    return header.index(name)


def _timestamp(path: Path, row: int, cell: str, columns: Columns) -> datetime:
    # A year, or a year and a month, which ISO 8601 allows but Python does not take.
    full = cell + {4: "-01-01", 7: "-01"}.get(len(cell), "")
    try:
        if columns.timestamp_format is not None:
            return datetime.strptime(cell, columns.timestamp_format)  # noqa: DTZ007 - the format may have a zone
        return datetime.fromisoformat(full)
    except ValueError:
        expected = columns.timestamp_format or "ISO 8601 such as 2024-01-31 18:00, or name its timestamp_format"
        raise bad_file(path, f"{cell!r} is no timestamp, expected {expected}", row) from None


def _value(path: Path, row: int, cell: str, columns: Columns) -> float:
    if cell.lower() in MISSING:
        if columns.missing == "interpolate":
            return math.nan
        raise bad_file(path, "the value is missing, expected a number; missing=interpolate fills it", row)
    try:
        value = float(cell.replace(",", ".") if columns.decimal == "," else cell)
    except ValueError:
        value = math.nan
    # Python also reads 1_000, which no table means.
    if not math.isfinite(value) or "_" in cell:
        raise bad_file(path, f"{cell!r} is no number, expected one with decimal mark {columns.decimal!r}", row)
    return value


def _series(path: Path, name: str, part: _Rows, columns: Columns) -> TimeSeries:
    """Check that the rows are a regular series, or make them one where that is asked for."""
    stamps = np.array(part.timestamps, dtype="datetime64[s]")
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
        raise bad_file(path, f"{index[place]} is off the {frequency} steps of the series {name}", int(rows[place]))
    jumps = np.diff(np.rint(places))
    if (gaps := np.flatnonzero(jumps != 1)).size and not interpolate:
        place = int(gaps[0]) + 1
        cause = f"{int(jumps[place - 1]) - 1} {frequency} steps are missing before {index[place]}; "
        raise bad_file(path, cause + "missing=interpolate fills them", int(rows[place]))
    known = np.isfinite(frame["value"].to_numpy())
    if not (known[0] and known[-1]):
        row = int(rows[0 if not known[0] else -1])
        raise bad_file(path, "the first and the last value must be there, nothing beyond them is known", row)
    found = regular(name, columns.unit or columns.value, index, frame["value"].to_numpy(), frequency)
    # Beside a named column, the file's name says little.
    title = name if columns.series or columns.value == Columns.value else columns.value
    return dataclasses.replace(found, converted=part.aware, title=title)
