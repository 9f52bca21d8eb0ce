"""A run folder in memory, and the groups and summary that terminal, plots and page share.

Loading is strict: a cell that does not fit the schema is an error with its line, because a report
made from misread figures is worse than none. Everything after loading works on typed `Record`s.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import units
from bench.cases import split_name
from bench.errors import UsageError
from bench.record import COLUMNS, LACKING, SCHEMA_VERSION, Record, Status

REFERENCE = "reference"
BEST, DOUBT = "*", "~"
LEGEND = (
    f"{BEST} fastest of its group; {DOUBT} doubtful: samples were taken while something else used the machine, "
    "or the interval is wider than the suite asked for"
)
#: Columns of samples.csv.gz that name a case.
CASE = ("workload", "mode", "device", "threads", "variant")
SAMPLES_READ = (*CASE, "kind", "wall_s", "disturbed")
#: Columns that tables of older versions lack: empty.
NEW = dict.fromkeys(frozenset().union(*LACKING.values()))
#: How a sample says that nothing disturbed it.
UNDISTURBED = ("0", "0.0", "False", "nan")


class ReportError(UsageError):
    """A run folder that no report can be made of; the message is one line and says what to do."""


@dataclass(frozen=True)
class Run:
    """A run folder: `records` one a case, `samples` of single calls (empty without the file)."""

    path: Path
    records: tuple[Record, ...]
    superseded: int
    samples: pd.DataFrame
    environment: dict[str, Any]

    @property
    def frame(self) -> pd.DataFrame:
        """`records` as a frame with the columns of records.csv."""
        return pd.DataFrame([record.as_dict() for record in self.records], columns=list(COLUMNS))

    @property
    def suite(self) -> str:
        """Name of the suite, or the folder's where environment.json does not say."""
        section = self.environment.get("run")
        name = section.get("suite") if isinstance(section, Mapping) else None
        return str(name or self.path.resolve().name)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The run's groups in the order they were recorded."""
        return groups(self.records)

    @cached_property
    def by_case(self) -> dict[tuple[str, str, str, int, str], pd.DataFrame]:
        """The samples of single calls, by `case_key`."""
        single = self.samples[self.samples["kind"] == "call"]
        found = {}
        for key, part in single.groupby(list(CASE), observed=True, sort=False):
            workload, mode, device, threads, variant = map(str, key)
            found[workload, mode, device, int(threads), variant] = part
        return found

    def calls(self, record: Record) -> np.ndarray[Any, Any]:
        """Sorted wall times in seconds of the single calls that the figures of `record` were made of."""
        part = self.by_case.get(case_key(record))
        if part is None:
            return np.empty(0)
        # A record that counts no disturbed sample left the disturbed rounds out; so does its curve.
        clean = part if record.disturbed else part[part["disturbed"].astype(str).isin(UNDISTURBED)]
        return np.sort(clean["wall_s"].to_numpy(dtype=float))


@dataclass(frozen=True)
class Group:
    """The cases that differ in variant alone, fastest first, those that did not run last."""

    workload: str
    mode: str
    device: str
    threads: int
    title: str
    records: tuple[Record, ...]

    @property
    def ok(self) -> tuple[Record, ...]:
        """The records that ran and passed the gate, fastest first."""
        return tuple(record for record in self.records if record.status is Status.OK)

    @property
    def best(self) -> Record | None:
        """The fastest record, the reference included; None when nothing ran."""
        return next((r for r in self.ok if r.speedup is not None or r.latency_p50_s is not None), None)

    @property
    def sweep_axis(self) -> str:
        """What the sweep varies that this group is one point of; empty outside sweeps."""
        return self.records[0].sweep_axis

    @property
    def sweep_key(self) -> tuple[str, str, str, str, int]:
        """What the points of one sweep have in common: workload without the swept override, axis, and the rest."""
        return (sweep_base(self.workload, self.sweep_axis), self.sweep_axis, self.mode, self.device, self.threads)

    @property
    def sweep_title(self) -> str:
        """The title that the points of one sweep share, or `title` outside sweeps."""
        if not self.sweep_axis:
            return self.title
        return f"{self.sweep_key[0]}{self.title.removeprefix(self.workload)}, over {self.sweep_axis}"


def load_run(run_dir: Path) -> Run:
    """Read a run folder.

    A case that was recorded more than once (a resumed run) counts with its last record.

    Raises:
        ReportError: the folder or records.csv is missing or empty, a file is not of this schema or is broken.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        msg = f"{run_dir} is not a folder; expected the folder of a run, with records.csv in it"
        raise ReportError(msg)
    found = read_records(run_dir / "records.csv")
    latest = {case_key(record): record for record in found}
    return Run(
        path=run_dir,
        records=tuple(latest.values()),
        superseded=len(found) - len(latest),
        samples=read_samples(run_dir / "samples.csv.gz"),
        environment=read_environment(run_dir / "environment.json"),
    )


def summary_table(records: Iterable[Record] | pd.DataFrame) -> pd.DataFrame:
    """The table a run ends with: one row a case, strings in human units, groups together and fastest first.

    `BEST` follows the variant that is fastest in its group, `DOUBT` precedes doubtful times; `LEGEND` explains both.
    `records` are `Record`s, or a frame with the columns of records.csv.
    """
    if isinstance(records, pd.DataFrame):
        records = [parse_record(row, f"row {n}") for n, row in enumerate(records.to_dict("records"))]
    rows = [summary_row(record, best=record is group.best) for group in groups(records) for record in group.records]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS), dtype=str)


SUMMARY_COLUMNS = (
    "workload",
    "mode",
    "variant",
    "status",
    "speedup",
    "p50",
    "p99",
    "steps/s",
    "peak memory",
    "first call",
    "what ran",
)


def summary_row(record: Record, *, best: bool) -> dict[str, str]:
    """One row of `summary_table`; a case that did not end `ok` shows its reason and no figure."""
    row = dict.fromkeys(SUMMARY_COLUMNS, "")
    row |= {"workload": record.workload, "mode": record.mode, "variant": record.variant, "status": record.status.value}
    if record.status is not Status.OK:
        return row | {"what ran": record.reason}
    mark = DOUBT if doubts(record) else ""
    times = {
        "speedup": units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi),
        "p50": units.seconds(record.latency_p50_s),
        "p99": units.seconds(record.latency_p99_s),
        "steps/s": units.count(record.throughput_steps_per_s),
    }
    return row | {
        "variant": f"{record.variant} {BEST}" if best else record.variant,
        **{name: text and mark + text for name, text in times.items()},
        "peak memory": peak_memory(record),
        "first call": units.seconds(record.first_call_s),
        "what ran": record.evidence,
    }


def peak_memory(record: Record) -> str:
    """Peak of the process, and of the CUDA allocator where there was one."""
    host, cuda = units.megabytes(record.memory_peak_bytes), units.megabytes(record.memory_cuda_allocated_bytes)
    return " + ".join(part for part in (host, cuda and f"{cuda} CUDA") if part)


def doubts(record: Record) -> tuple[str, ...]:
    """Why the times of `record` carry the mark; empty when they do not."""
    found = []
    if record.disturbed:
        out_of = f" of {record.samples}" if record.samples else ""
        found.append(f"{record.disturbed}{out_of} samples were taken while something else used the machine")
    if record.interval_wide:
        found.append("the interval is wider than the suite asked for")
    return tuple(found)


def groups(records: Iterable[Record]) -> tuple[Group, ...]:
    """The groups of `records`, titled with device and threads only where a run has several of them."""
    sorted_in: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in records:
        sorted_in.setdefault((record.workload, record.mode, record.device, record.threads), []).append(record)
    devices, threads = {key[2] for key in sorted_in}, {key[3] for key in sorted_in}
    return tuple(
        Group(*key, group_title(key, devices, threads), tuple(sorted(members, key=pace)))
        for key, members in sorted_in.items()
    )


def group_title(key: tuple[str, str, str, int], devices: set[str], threads: set[int]) -> str:
    """`seed, inference`, and what else tells a group from the others of its run."""
    workload, mode, device, thread_count = key
    more = [device] if len(devices) > 1 else []
    more += [f"{thread_count} threads"] if len(threads) > 1 else []
    return ", ".join([workload, mode, *more])


def pace(record: Record) -> tuple[int, float]:
    """Sorting key, fastest first; by time where no reference ran, and last what has no figure."""
    if record.status is not Status.OK:
        return (3, 0.0)
    if record.speedup is not None:
        return (0, -record.speedup)
    return (1, record.latency_p50_s) if record.latency_p50_s is not None else (2, 0.0)


def sweep_base(workload: str, axis: str) -> str:
    """`seed@batch=64` on the axis `batch` as `seed`; other overrides stay."""
    name, overrides = split_name(workload)
    kept = [part for part in overrides.split(",") if part and not part.startswith(axis)]
    return f"{name}@{','.join(kept)}" if kept else name


def case_key(record: Record) -> tuple[str, str, str, int, str]:
    """What tells a case from every other of its run."""
    return (record.workload, record.mode, record.device, record.threads, record.variant)


def read_records(path: Path) -> tuple[Record, ...]:
    """The rows of records.csv.

    Raises:
        ReportError: see `load_run`.
    """
    if not path.is_file():
        msg = f"{path} is missing; expected the folder of a run that recorded at least one case"
        raise ReportError(msg)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} is not a CSV file ({error}); expected the records.csv that `bench run` writes"
        raise ReportError(msg) from error
    check_schema(path, header, rows)
    return tuple(parse_record(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1))


def check_schema(path: Path, header: Iterable[str], rows: list[dict[str, str]]) -> None:
    """Refuse a table that is empty, of another version, or not one of ours."""
    header = set(header)
    if header and not rows:
        msg = f"{path} holds no record; expected one row a case, so run the suite first"
        raise ReportError(msg)
    versions = {str(row.get("schema_version")) for row in rows}
    older = [lacked for version, lacked in LACKING.items() if str(version) in versions]
    versions -= {str(version) for version in (SCHEMA_VERSION, *LACKING)}
    if "schema_version" in header and versions:
        msg = (
            f"{path} has schema_version {', '.join(sorted(versions))}; expected {SCHEMA_VERSION}, "
            "so report it with the release that recorded it"
        )
        raise ReportError(msg)
    empty = frozenset().union(*older)
    if missing := [name for name in COLUMNS if name not in header and name not in empty]:
        msg = f"{path} lacks the columns {', '.join(missing)}; expected the records.csv that `bench run` writes"
        raise ReportError(msg)


def parse_record(row: Mapping[Any, Any], where: str) -> Record:
    """A row, of strings or of values, as a `Record`; `where` opens the message of the error.

    Raises:
        ReportError: a cell is not of its column's type.
    """
    values = {}
    for column in dataclasses.fields(Record):
        try:
            cell = row[column.name] if column.name in row else NEW[column.name]
            values[column.name] = parse_cell(cell, str(column.type))
        except (KeyError, ValueError) as error:
            msg = f"{where}: column {column.name} holds {row.get(column.name)!r}; expected {column.type}"
            raise ReportError(msg) from error
    return Record(**values)


def parse_cell(value: Any, kind: str) -> Any:
    """One cell as the annotation `kind` of its column; blank and NaN are `None`, or an empty text."""
    blank = value is None or value == "" or bool(pd.isna(value)) or (kind != "str" and value == "nan")
    if kind == "str":
        return "" if blank else str(value)
    if kind == "Status":
        return Status(value)
    if blank:
        if "None" in kind:
            return None
        raise ValueError(kind)
    if kind.startswith("bool"):
        return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    return int(float(value)) if kind.startswith("int") else float(value)


def read_samples(path: Path) -> pd.DataFrame:
    """The single calls and blocks of samples.csv.gz, the columns `SAMPLES_READ` alone; empty without the file.

    Raises:
        ReportError: the file ends early or is not one of ours.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(SAMPLES_READ))
    types = {"threads": "int32", "wall_s": "float64"}
    try:
        # Several gzip members, one a group, read as one file.
        return pd.read_csv(
            path, usecols=list(SAMPLES_READ), dtype={name: types.get(name, "category") for name in SAMPLES_READ}
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = (
            f"{path} cannot be read ({reason}); move it away to make the report without latency distributions, or mend "
            "the folder of a killed run with `python -m bench run --resume`"
        )
        raise ReportError(msg) from error


def read_environment(path: Path) -> dict[str, Any]:
    """The sections of environment.json; empty without the file.

    Raises:
        ReportError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON ({error}); move it away to make the report without the environment"
        raise ReportError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds {type(found).__name__}; expected a JSON object of sections"
        raise ReportError(msg)
    return found
