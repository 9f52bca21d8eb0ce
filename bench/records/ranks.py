"""Training over ranks: the records of `python -m bench ranks`, one for each way to divide the work.

`RanksRecord` is the single source of the columns of ranks.csv; results/README.md is checked against it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.records import durable
from bench.records.folder import finite
from bench.records.raw_csv import RawFile
from bench.records.schema import Status, column
from kernels.host.output import utf8

FILE, TABLE = "ranks.jsonl", "ranks.csv"

STEP_COLUMNS = {
    "workload": "as in ranks.csv",
    "variant": "as in ranks.csv",
    "ranks": "as in ranks.csv",
    "scaling": "as in ranks.csv",
    "bucket_mb": "as in ranks.csv",
    "round": "number of the round",
    "rank": "whose step it was",
    "compute_s": "seconds before the rank's first collective: forward pass and the first part of the backward pass",
    "total_s": "seconds of the whole step: with the wait for the others, the collectives, the optimizer",
}
STEPS = RawFile("ranks-steps.csv.gz", tuple(STEP_COLUMNS), ("workload", "variant", "ranks", "scaling", "bucket_mb"))


@dataclass(frozen=True)
class RanksRecord:
    """One row of ranks.csv: one variant trained by several processes that share the work in one way."""

    workload: str = column("as in records.csv", "")
    variant: str = column("name of the variant", "")
    ranks: int = column("processes that share the work", 0)
    scaling: str = column("`strong`: the workload's batch is shared; `weak`: each rank has a batch of its own", "")
    bucket_mb: float | None = column("size of a gradient bucket of DistributedDataParallel, MB")
    backend: str = column("`gloo`", "gloo")
    threads: int = column("CPU threads of each rank", 0)
    batch: int | None = column("sequences of a step, over all ranks")
    status: Status = column("as in records.csv", Status.OK)
    reason: str = column("why the status is not `ok`, with the rank that it is about", "")
    rounds: int = column("turns that the figures are made from", 0)
    step_s: float | None = column("time of a training step: of the slowest rank, median over rounds, seconds")
    step_lo_s: float | None = column("lower end of its 95 % interval (Student's t over rounds, on logarithms)")
    step_hi_s: float | None = column("upper end")
    compute_s: float | None = column(
        "time before the first collective, the slowest rank's; forward pass and the first part of the backward pass"
    )
    wait_s: float | None = column("step_s without it: the wait for the others, the collectives, the optimizer")
    efficiency: float | None = column(
        "against one rank in the same rounds; strong: time of one / (ranks x time), weak: time of one / time"
    )
    efficiency_lo: float | None = column("lower end of its 95 % interval")
    efficiency_hi: float | None = column("upper end")
    slowest_rank: int | None = column("rank with the longest time before the first collective")
    slowest_ratio: float | None = column("that time over the median of the other ranks'")
    slowest_ratio_lo: float | None = column("lower end of its 95 % interval")
    slowest_ratio_hi: float | None = column("upper end")
    straggler: int | None = column("that rank, if it is surely slower than the others by more than a tenth")
    grad_error: float | None = column(
        "error of the gradient nearest to its limit: the ranks' means against one process in float64 on the joint batch"
    )
    grad_limit: float | None = column("limit of that error")
    recorded_at: str = column("when the record was written, UTC", "")


COLUMNS = tuple(found.name for found in dataclasses.fields(RanksRecord))


def write(folder: Path, records: Iterable[RanksRecord], steps: Iterable[Sequence[Any]]) -> list[RanksRecord]:
    """Write raw steps, then the records; returns them with their time.

    Raises:
        OSError: when something cannot be written.
    """
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    stamped = [dataclasses.replace(record, recorded_at=now) for record in records]
    STEPS.append(folder, steps)
    lines = [json.dumps(finite(dataclasses.asdict(record)), allow_nan=False) + "\n" for record in stamped]
    durable.append(folder / FILE, "".join(lines).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(record) for record in stamped)
    durable.replace(folder / TABLE, utf8(text.getvalue()))
    return stamped


def read(folder: Path) -> list[RanksRecord]:
    """The records of a folder; none where nothing was trained over ranks.

    Raises:
        UsageError: a line is no record of this release.
    """
    path = folder / FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            found.append(RanksRecord(**(values | {"status": Status(values["status"])})))
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{path}, line {number} is no record of this release ({error}); use the release that wrote it"
            raise UsageError(msg) from error
    return found


def dictionary() -> str:
    """The dictionary of columns in Markdown, as it stands in results/README.md."""
    tables = {
        TABLE: [(found.name, found.metadata["meaning"]) for found in dataclasses.fields(RanksRecord)],
        STEPS.name: list(STEP_COLUMNS.items()),
    }
    head = "| column | meaning |\n| --- | --- |\n"
    return "\n".join(
        f"### {name}\n\n{head}" + "".join(f"| `{column}` | {meaning} |\n" for column, meaning in rows)
        for name, rows in tables.items()
    )
