"""A run folder: records and samples are appended as they come, tables are made from them, nothing is overwritten.

`records.jsonl` is the truth: a case is recorded when its line is there, and a recorded case is never measured again.
What a killed run left half written is moved to another file when the run is resumed, before anything is added.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.plan.cases import Case
from bench.plan.identity import CaseKey
from bench.records import durable
from bench.records.raw_csv import ENERGY, RAW_FILES, ROUNDS, SAMPLES, RawFile
from bench.records.rounds import Samples
from bench.records.schema import COLUMNS, EMPTY, LACKING, SCHEMA_VERSION, Record, Status
from bench.records.tables import json_line, now, write_csv
from kernels.host.output import why_unwritable

RUNS = Path("results") / "runs"


class RunFolder:
    """One folder that one run writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def refuse(out: Path) -> None:
        """Refuse a folder that a run could not be written into, without making it.

        Raises:
            UsageError: when it holds something already, or cannot be made.
        """
        try:
            if out.exists() and not (out.is_dir() and all(map(durable.is_bookkeeping, out.iterdir()))):
                msg = f"{out} exists and is not an empty folder; a run writes into a new one: name another with --out"
                raise UsageError(msg)
        except OSError as error:
            msg = f"the run folder {out} cannot be written: {error.strerror or error}; name another with --out"
            raise UsageError(msg) from error
        if why := why_unwritable(out):
            msg = f"the run folder {out} cannot be written: {why}; name another with --out"
            raise UsageError(msg)

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
        cls.refuse(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the run folder {out} cannot be written: {error.strerror or error}; name another with --out"
            raise UsageError(msg) from error
        return cls(out)

    @property
    def records_path(self) -> Path:
        """records.jsonl."""
        return self.path / "records.jsonl"

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder against a second writer; readers need no lock.

        Raises:
            UsageError: naming the process that writes it already.
            OSError: when the lock cannot be written.
        """
        return durable.locked(self.path)

    def append(self, *records: Record) -> tuple[Record, ...]:
        """Write records, all or none, so that they survive a crash; returns them with their time.

        Raises:
            OSError: when they cannot be written; the file is unchanged.
        """
        time = now()
        stamped = tuple(dataclasses.replace(record, recorded_at=time) for record in records)
        lines = [_line(_written(record)) for record in stamped]
        if lines:
            durable.append(self.records_path, b"".join(lines))
        return stamped

    def replace(self, records: Mapping[CaseKey, Record]) -> None:
        """Put records in place of those of the same cases, in one step; order and times stay.

        Args:
            records: by case.

        Raises:
            OSError: when they cannot be written; the file is unchanged.
        """
        lines = []
        for entry in self.read().entries:
            record = records.get(CaseKey.read(entry.values))
            if record is None:
                # With the columns of its own release.
                lines.append(entry.line + b"\n")
            else:
                lines.append(_line(_written(record) | {"recorded_at": entry.values["recorded_at"]}))
        durable.replace(self.records_path, b"".join(lines))

    def append_seatings(
        self, cases: Sequence[Case], records: Sequence[Record], samples: Samples, first: int = 0
    ) -> None:
        """Append what is known of a group's rounds, and the samples of its cases that ended ok, each in one piece.

        Args:
            cases: of the group.
            records: theirs, in the same order.
            samples: of the group.
            first: number of the first seating that is not written yet.

        Raises:
            OSError: when they cannot be written; the file is unchanged.
        """
        seatings = list(enumerate(samples.processes))[first:]
        ok = [case for case, record in zip(cases, records, strict=True) if record.status is Status.OK]
        parts = [(case, *seating) for case in ok for seating in seatings]
        rows = [row for part in parts for row in samples.rows(*part)]
        if not rows:
            return
        known = (found.row(cases[0].group, number) for number, rounds in seatings for found in rounds)
        self.append_rows(ROUNDS, known)
        counted = [row for part in parts for row in samples.energy_rows(*part)]
        if counted:
            self.append_rows(ENERGY, counted)
        self.append_samples(rows)

    def append_samples(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append raw samples, all or none."""
        self.append_rows(SAMPLES, rows)

    def append_rows(self, file: RawFile, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows to a file of raw values, all or none.

        Raises:
            OSError: when they cannot be written; the file is unchanged.
        """
        file.append(self.path, rows)

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write or replace a derived JSON file in one step."""
        durable.replace(self.path / name, (json.dumps(data, indent=2, default=str) + "\n").encode())

    def write_table(self) -> None:
        """Make records.csv from records.jsonl: one row per case."""
        write_csv(self.path / "records.csv", COLUMNS, self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return the records written so far as plain values, without a torn end."""
        return [EMPTY | entry.values for entry in self.read().entries]

    def read(self) -> Recorded:
        """Read records.jsonl.

        Raises:
            UsageError: naming the line that is not a record, other than a torn last one, or is of another schema.
        """
        entries: list[RecordLine] = []
        if not self.records_path.exists():
            return Recorded((), b"")
        *lines, last = self.records_path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(RecordLine(line, _parse(line)))
            except ValueError as error:
                # Some systems lengthen a file before they fill it: then the torn line has its end.
                if number == len(lines) and not last:
                    return Recorded(tuple(entries), line + b"\n")
                msg = (
                    f"{self.records_path}, line {number} is not a record ({error}): fix the line or delete it; "
                    "nothing was changed"
                )
                raise UsageError(msg) from error
        for number, entry in enumerate(entries, start=1):
            version = entry.values.get("schema_version")
            lacking: frozenset[str] = LACKING.get(version or 0, frozenset())
            readable = version == SCHEMA_VERSION or version in LACKING
            if not readable or set(entry.values) != set(COLUMNS) - lacking:
                what = f"schema_version {version}, this release writes {SCHEMA_VERSION}"
                what = "other columns than this release writes" if readable else what
                msg = (
                    f"{self.records_path}, line {number} has {what}: use the release that recorded it; nothing was "
                    "changed"
                )
                raise UsageError(msg)
        return Recorded(tuple(entries), last)

    def mend(self, stays: Callable[[dict[str, Any]], bool]) -> list[str]:
        """Bring the folder into the state of a run that ended between two groups.

        A torn last line and records that may not stay go to records.torn.jsonl; raw values without a record are taken
        out. Each file changes in one step, and a mend that was itself interrupted is done again by the next.

        Args:
            stays: whether a record may stay.

        Returns:
            A line for each thing that was done.

        Raises:
            UsageError: for a file that is not ours or lacks what belongs to a record; nothing was changed.
            OSError: when something cannot be written.
        """
        found = self.read()
        kept = [entry for entry in found.entries if stays(entry.values)]
        aside = [entry for entry in found.entries if not stays(entry.values)]
        measured = [entry.values for entry in kept if entry.values["status"] == Status.OK]
        for file in RAW_FILES:
            if lost := file.lacks(self.path, map(file.key_of, measured)):
                msg = (
                    f"{self.path / file.name} has no values of {' '.join(min(lost))}, which is recorded; nothing "
                    "was changed: put the file back, or begin a new run"
                )
                raise UsageError(msg)
        for path in filter(durable.is_bookkeeping, self.path.iterdir()):
            if path.name != durable.LOCK:
                path.unlink()
        said = []
        if aside or found.torn:
            torn = self.path / "records.torn.jsonl"
            durable.append(torn, b"".join(entry.line + b"\n" for entry in aside) + found.torn)
            durable.replace(self.records_path, b"".join(entry.line + b"\n" for entry in kept))
        if found.torn:
            said.append(f"the last line of records.jsonl was torn; it is in {torn}")
        if aside:
            names = ", ".join(f"{entry.values['group']} {entry.values['variant']}" for entry in aside)
            said.append(f"a group that was not recorded as a whole is measured again; {names} went to {torn}")
        for file in (*RAW_FILES, ENERGY):
            keys = set(map(file.key_of, measured))
            if dropped := file.mend(self.path, keys.__contains__):
                said.append(f"{dropped} rows of {file.name} belonged to no record and were taken out")
        return said


@dataclass(frozen=True)
class RecordLine:
    """A line of records.jsonl, as bytes and as values."""

    line: bytes
    values: dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """Content of records.jsonl: its whole lines, and the rest that a torn append left behind them."""

    entries: tuple[RecordLine, ...]
    torn: bytes


def _parse(line: bytes) -> dict[str, Any]:
    values = json.loads(line.decode("utf-8"))
    if not isinstance(values, dict):
        msg = f"expected an object, got {type(values).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - one kind of error for a line that is not a record
    return values


def _written(record: Record) -> dict[str, Any]:
    """The values of a record as they are written: with all columns of this release, and so with its version.

    One that was read from a folder of an earlier release has that release's.
    """
    return record.as_dict() | {"schema_version": SCHEMA_VERSION}


def _line(values: dict[str, Any]) -> bytes:
    """A record as a line of records.jsonl."""
    return json_line(values).encode()
