"""A run folder: records and samples are appended as they come, tables are made from them, nothing is overwritten."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.record import COLUMNS, SAMPLE_COLUMNS, Record

RUNS = Path("results") / "runs"


class RunFolder:
    """One folder that one run writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: Path | None, suite: str) -> RunFolder:
        """Make a new folder: `out`, or one named by the time and the suite under results/runs/.

        Raises:
            UsageError: when the folder holds something already, or cannot be made.
        """
        if out is None:
            stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{suite}"
            out = RUNS / stem
            number = 2
            while out.exists():
                out = RUNS / f"{stem}-{number}"
                number += 1
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                msg = f"{out} exists and is not an empty folder; a run writes into a new one: name another with --out"
                raise UsageError(msg)
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            msg = f"the run folder {out} cannot be written: {error.strerror or error}; name another with --out"
            raise UsageError(msg) from error
        return cls(out)

    @property
    def records_path(self) -> Path:
        """records.jsonl."""
        return self.path / "records.jsonl"

    def append(self, record: Record) -> Record:
        """Write a record so that it survives whatever comes next; returns it with its time."""
        stamped = dataclasses.replace(record, recorded_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        with self.records_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(stamped.as_dict()), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return stamped

    def append_samples(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append raw samples as one more gzip member; readers see one file."""
        path = self.path / "samples.csv.gz"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.exists():
            writer.writerow(SAMPLE_COLUMNS)
        writer.writerows(rows)
        with path.open("ab") as raw, gzip.open(raw, "wt", encoding="utf-8", compresslevel=6) as file:
            file.write(text.getvalue())

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write or replace a derived JSON file in one step."""
        self._replace(name, json.dumps(data, indent=2, default=str) + "\n")

    def write_table(self) -> None:
        """Make records.csv from records.jsonl: one row a case."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records())
        self._replace("records.csv", text.getvalue())

    def records(self) -> list[dict[str, Any]]:
        """The records written so far, as plain values."""
        if not self.records_path.exists():
            return []
        return [json.loads(line) for line in self.records_path.read_text(encoding="utf-8").splitlines()]

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values, None for what JSON has no word for; a record's reason tells an infinite error."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
