"""Common to all files of records: a line of JSON, a table for people, the time of writing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from bench.errors import UsageError
from bench.records import durable
from bench.records.schema import Status
from kernels.host.output import utf8

Kind = TypeVar("Kind")


def now() -> str:
    """Return the time in UTC, as records have it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with None for what JSON cannot express; a record's reason mentions an infinite error."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


def json_line(values: Mapping[str, Any]) -> str:
    """Return values as a line of JSON."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def parse(path: Path, lines: Iterable[str], kind: type[Kind]) -> list[Kind]:
    """Make records of a kind, with a status, from lines of JSON.

    Raises:
        UsageError: naming the line of the path that is not a record of this release.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            found.append(kind(**(values | {"status": Status(values["status"])})))
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{path}, line {number} is not a record of this release ({error}); use the release that wrote it"
            raise UsageError(msg) from error
    return found


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table all or nothing.

    Args:
        path: of the file.
        columns: their names.
        rows: values by column.

    Raises:
        OSError: when it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    durable.replace(path, utf8(text.getvalue()))
