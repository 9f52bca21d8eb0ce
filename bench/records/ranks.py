"""Training over ranks: the records of `python -m bench ranks`, one for each way to divide the work.

`RanksRecord` is the single source of the columns of ranks.csv; results/columns.md is checked against it.
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
    "workload": "As in ranks.csv.",
    "variant": "As in ranks.csv.",
    "ranks": "As in ranks.csv.",
    "scaling": "As in ranks.csv.",
    "bucket_mb": "As in ranks.csv.",
    "accumulate": "As in ranks.csv.",
    "round": "The number of the round.",
    "rank": "The number of the rank whose step it was.",
    "compute_s": "The time before the rank's first collective, in seconds: forward and the first part of the "
    "backward pass.",
    "total_s": "The time of the whole step, in seconds, with waiting, the collectives and the optimizer.",
}
STEPS = RawFile("ranks-steps.csv.gz", tuple(STEP_COLUMNS), tuple(STEP_COLUMNS)[:6])


@dataclass(frozen=True)
class RanksRecord:
    """One row of ranks.csv: one variant trained by several processes that share the work in one way."""

    workload: str = column("As in records.csv.", "")
    variant: str = column("The name of the variant.", "")
    ranks: int = column("The number of processes that share the work.", 0)
    scaling: str = column(
        "How they share it: with `strong` they share the workload's batch, with `weak` each rank has a batch of its "
        "own.",
        "",
    )
    bucket_mb: float | None = column("The size of a gradient bucket of DistributedDataParallel, in MB.")
    accumulate: int = column("The number of micro-batches of a rank in a step, whose gradients are exchanged once.", 1)
    backend: str = column("The backend of the collectives: `gloo` on CPUs, `nccl` on GPUs.", "gloo")
    threads: int = column("The number of CPU threads of each rank.", 0)
    batch: int | None = column("The number of sequences in a step, over all ranks.")
    status: Status = column("As in records.csv.", Status.OK)
    reason: str = column("Why the status is not ok, with the rank that it is about.", "")
    rounds: int = column("The number of turns behind the figures.", 0)
    step_s: float | None = column(
        "The time of a training step of the slowest rank, as the median over rounds, in seconds."
    )
    step_lo_s: float | None = column(
        "Lower end of the 95 % interval of `step_s` (Student's t over rounds, on logarithms), in seconds."
    )
    step_hi_s: float | None = column("Upper end of the 95 % interval of `step_s`, in seconds.")
    compute_s: float | None = column(
        "The time of the slowest rank before the first collective, in seconds: forward pass and the first part of "
        "the backward pass."
    )
    wait_s: float | None = column(
        "The rest of `step_s`, in seconds: the wait for the others, the collectives and the optimizer."
    )
    efficiency: float | None = column(
        "The efficiency against one rank in the same rounds, a ratio. Strong: time of one rank / (ranks x time). "
        "Weak: time of one rank / time."
    )
    efficiency_lo: float | None = column("Lower end of the 95 % interval of `efficiency`, a ratio.")
    efficiency_hi: float | None = column("Upper end of the 95 % interval of `efficiency`, a ratio.")
    slowest_rank: int | None = column("The number of the rank with the longest time before the first collective.")
    slowest_ratio: float | None = column("That time over the median of the other ranks' times, a ratio.")
    slowest_ratio_lo: float | None = column("Lower end of the 95 % interval of `slowest_ratio`, a ratio.")
    slowest_ratio_hi: float | None = column("Upper end of the 95 % interval of `slowest_ratio`, a ratio.")
    straggler: int | None = column(
        "The number of that rank, if it is certainly slower than the others by more than a tenth. Otherwise empty."
    )
    grad_error: float | None = column(
        "The relative error of the gradient nearest to its limit: the mean over the ranks against one process in "
        "float64 on the joint batch."
    )
    grad_limit: float | None = column("The limit that applied to `grad_error`.")
    checkpoint_bytes: int | None = column("The size of a checkpoint (weights and optimizer), in bytes.")
    save_s: float | None = column("The time in which rank 0 writes the checkpoint to the disk, in seconds.")
    resume_s: float | None = column(
        "The time until new replicas have the checkpoint and can train, that of the slowest rank, in seconds."
    )
    resume_error: float | None = column(
        "The relative error of all weights after steps from the checkpoint, against those of the training that "
        "continued without it, of the worst rank."
    )
    resume_limit: float | None = column("The limit that applied to `resume_error`.")
    recorded_at: str = column("The time at which the record was written, in UTC.", "")


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
        UsageError: a line is not a record of this release.
    """
    path = folder / FILE
    return parse(path, path.read_text(encoding="utf-8").splitlines(), RanksRecord) if path.exists() else []


def dictionary() -> str:
    """The dictionary of columns in Markdown, as it stands in results/columns.md."""
    return in_markdown({TABLE: meanings(RanksRecord), STEPS.name: STEP_COLUMNS})
