"""Training over ranks: the records of `python -m bench ranks`, one for each way to divide the work.

`RanksRecord` is the single source of the columns of ranks.csv; results/README.md is checked against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import durable
from bench.records.raw_csv import RawFile
from bench.records.schema import Status, column, in_markdown, meanings
from bench.records.tables import json_line, now, parse, write_csv

FILE, TABLE = "ranks.jsonl", "ranks.csv"

STEP_COLUMNS = {
    "workload": "as in ranks.csv",
    "variant": "as in ranks.csv",
    "ranks": "as in ranks.csv",
    "scaling": "as in ranks.csv",
    "bucket_mb": "as in ranks.csv",
    "accumulate": "as in ranks.csv",
    "round": "number of the round",
    "rank": "whose step it was",
    "compute_s": "seconds before the rank's first collective: forward pass and the first part of the backward pass",
    "total_s": "seconds of the whole step: with the wait for the others, the collectives, the optimizer",
}
STEPS = RawFile("ranks-steps.csv.gz", tuple(STEP_COLUMNS), tuple(STEP_COLUMNS)[:6])


@dataclass(frozen=True)
class RanksRecord:
    """One row of ranks.csv: one variant trained by several processes that share the work in one way."""

    workload: str = column("as in records.csv", "")
    variant: str = column("name of the variant", "")
    ranks: int = column("processes that share the work", 0)
    scaling: str = column("`strong`: the workload's batch is shared; `weak`: each rank has a batch of its own", "")
    bucket_mb: float | None = column("size of a gradient bucket of DistributedDataParallel, MB")
    accumulate: int = column("micro-batches of a rank in a step, whose gradients are exchanged once", 1)
    backend: str = column("`gloo` on CPUs, `nccl` on GPUs", "gloo")
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
    checkpoint_bytes: int | None = column("size of a checkpoint: weights and optimizer, bytes")
    save_s: float | None = column("time in which rank 0 writes it to the disk, seconds")
    resume_s: float | None = column("time until new replicas have it and can train, the slowest rank's, seconds")
    resume_error: float | None = column(
        "relative error of all weights after steps from the checkpoint, against those of the training that went on "
        "without it, the worst rank's"
    )
    resume_limit: float | None = column("limit of that error")
    recorded_at: str = column("when the record was written, UTC", "")


COLUMNS = tuple(found.name for found in dataclasses.fields(RanksRecord))


def write(folder: Path, records: Iterable[RanksRecord], steps: Iterable[Sequence[Any]]) -> list[RanksRecord]:
    """Write raw steps, then the records; returns them with their time.

    Raises:
        OSError: when something cannot be written.
    """
    time = now()
    stamped = [dataclasses.replace(record, recorded_at=time) for record in records]
    STEPS.append(folder, steps)
    lines = [json_line(dataclasses.asdict(record)) for record in stamped]
    durable.append(folder / FILE, "".join(lines).encode())
    write_csv(folder / TABLE, COLUMNS, map(dataclasses.asdict, stamped))
    return stamped


def read(folder: Path) -> list[RanksRecord]:
    """The records of a folder; none where nothing was trained over ranks.

    Raises:
        UsageError: a line is no record of this release.
    """
    path = folder / FILE
    return parse(path, path.read_text(encoding="utf-8").splitlines(), RanksRecord) if path.exists() else []


def dictionary() -> str:
    """The dictionary of columns in Markdown, as it stands in results/README.md."""
    return in_markdown({TABLE: meanings(RanksRecord), STEPS.name: STEP_COLUMNS})
