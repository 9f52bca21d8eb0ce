"""Measured tables: which implementation was fastest at which shape on one model of GPU, with which configuration.

`kernels.tools.tune` writes one file per GPU, `kernels/measured/<name>.json`; `kernels.dispatch` reads the file of the
GPU at hand. A table holds what was measured and nothing that was interpolated: the nearest measured shape is looked up.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .common.recurrence import Problem
from .host.output import write_whole

#: Version of the files' schema. 1: the first.
SCHEMA = 1
FOLDER = Path(__file__).parent / "measured"
#: Environment variable that names another folder of tables; the tables of `FOLDER` then count for nothing.
VARIABLE = "SEQ2SEQ_KERNEL_TABLES"
#: Farthest that a measured shape is taken for another: `distance` of, for example, two octaves of the hidden size.
FAR = 4.0
PHASES = ("inference", "forward", "backward")


@dataclass(frozen=True)
class Timing:
    """The best configuration of one implementation at one shape.

    Attributes:
        config: fields of the configuration, a dataclass of the kernel's module.
        time_s: median time of one recurrence, without the products over all steps.
        low_s, high_s: quartiles over the rounds.
        rounds: how many rounds there were.
        error: largest error of an output or gradient over what its type allows.
        module_s: median time of `kernels.LSTM` as a user calls it, all of the phase; None where it was not measured.
        module_low_s, module_high_s: its quartiles; None in tables that an earlier release wrote.
    """

    config: Mapping[str, Any]
    time_s: float
    low_s: float = 0.0
    high_s: float = 0.0
    rounds: int = 0
    error: float = 0.0
    module_s: float | None = None
    module_low_s: float | None = None
    module_high_s: float | None = None

    def whole_s(self, around_s: float) -> float:
        """Time of the whole phase: of the module as it is called, or of the recurrence and the products around it."""
        return self.time_s + around_s if self.module_s is None else self.module_s

    def whole_quartiles_s(self, around_s: float) -> tuple[float, float] | None:
        """Quartiles of `whole_s`, the lower one first; None where they were not kept."""
        if self.module_s is None:
            return self.low_s + around_s, self.high_s + around_s
        if self.module_low_s is None or self.module_high_s is None:
            return None
        return self.module_low_s, self.module_high_s


@dataclass(frozen=True)
class MeasuredShape:
    """Measurements at one shape in one phase.

    Attributes:
        phase: `inference`; `forward`, which keeps what backward needs; or `backward`.
        dtype: `float32`, `tf32`, `float16` or `bfloat16`.
        batch, steps, hidden_size, directions: the shape; the input is as wide as the hidden state.
        kernels: by implementation, those that were right.
        around_s: the products over all steps that this phase needs with one of our kernels; 0 if not measured.
        vendor_s: torch's own LSTM (cuDNN) in the same type, the whole phase with its products; None if not measured.
        vendor_padded_s: the same on padded sizes (`vendor-padded`); None where that changes nothing.
        vendor_float16_s: the same at cuDNN's best: float16, batch padded to a multiple of 8.
        wrong: configurations that were left out, each with its reason.
        medians_s: median time of each candidate's recurrence, by implementation and configuration in words; of a
            hopeless one, over the few rounds that it had.
    """

    phase: str
    dtype: str
    batch: int
    steps: int
    hidden_size: int
    directions: int
    kernels: Mapping[str, Timing]
    around_s: float = 0.0
    vendor_s: float | None = None
    vendor_float16_s: float | None = None
    wrong: tuple[str, ...] = ()
    vendor_padded_s: float | None = None
    medians_s: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def vendors_s(self) -> tuple[float | None, float | None]:
        """Times of torch's own LSTM, on padded sizes and as it is."""
        return self.vendor_padded_s, self.vendor_s

    @property
    def key(self) -> tuple[str, str, int, int, int, int]:
        """Key that distinguishes one entry from another."""
        return self.phase, self.dtype, self.batch, self.steps, self.hidden_size, self.directions

    @property
    def shape(self) -> str:
        """The shape in words, as `B16 H768 T1024 float16`."""
        both = " both ways" if self.directions == 2 else ""  # noqa: PLR2004 - two directions
        return f"B{self.batch} H{self.hidden_size} T{self.steps} {self.dtype}{both}"

    def distance(self, problem: Problem) -> float:
        """Octaves between this shape and a problem's, weighted by how much they matter for which kernel is best.

        The hidden size decides what fits on chip, so it weighs double; steps change next to nothing but the share
        of what is done once.
        """

        def octaves(one: int, other: int) -> float:
            return abs(math.log2(max(one, 1) / max(other, 1)))

        return (
            2 * octaves(self.hidden_size, problem.hidden_size)
            + octaves(self.batch, problem.batch)
            + octaves(self.directions, problem.directions)
            + octaves(self.steps, problem.steps) / 4
        )


@dataclass(frozen=True)
class MeasuredTable:
    """All that was measured on one model of GPU.

    Attributes:
        device: the GPU's name as torch reports it.
        entries: in any order, one a key.
        facts: driver, versions, date and commit, in words.
    """

    device: str
    entries: tuple[MeasuredShape, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def near(self, problem: Problem, *, backward: bool) -> list[MeasuredShape]:
        """Entries of the problem's type and phase that are not `FAR` from it, the nearest first."""
        phase, dtype = phase_of(problem, backward=backward), dtype_name(problem)
        found = [
            (distance, entry)
            for entry in self.entries
            if entry.phase == phase and entry.dtype == dtype and (distance := entry.distance(problem)) <= FAR
        ]
        return [entry for _, entry in sorted(found, key=lambda pair: (pair[0], pair[1].key))]

    def with_entry(self, entry: MeasuredShape) -> MeasuredTable:
        """This table and one more entry, in place of an older one of its key."""
        kept = tuple(other for other in self.entries if other.key != entry.key)
        return dataclasses.replace(self, entries=(*kept, entry))


def phase_of(problem: Problem, *, backward: bool) -> str:
    """Name of the phase that a problem belongs to."""
    return "backward" if backward else "forward" if problem.saves else "inference"


def dtype_name(problem: Problem) -> str:
    """`float16` and so on; `tf32` for float32 whose products may use TF32."""
    if problem.tf32 and problem.dtype == torch.float32:
        return "tf32"
    return str(problem.dtype).removeprefix("torch.")


def slug(device: str) -> str:
    """A GPU's name as a file's: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def folder() -> Path:
    """Folder of the tables: the one that `SEQ2SEQ_KERNEL_TABLES` names, otherwise `FOLDER`."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else FOLDER


def path_of(device: str) -> Path:
    """Path of the table of a GPU, if there is one."""
    return folder() / f"{slug(device)}.json"


@functools.lru_cache(maxsize=16)
def load(device: str) -> MeasuredTable | None:
    """The table of a GPU, read once a process; None when nothing was measured on it.

    Raises:
        ValueError: when there is a file that is not a table of this schema.
    """
    path = path_of(device)
    return read(path) if device and path.exists() else None


def read(path: Path) -> MeasuredTable:
    """Read a table.

    Raises:
        ValueError: naming the file, when it is of another schema or broken; regenerate it with `kernels.tools.tune`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            msg = f"schema {data['schema']}, expected {SCHEMA}"
            raise ValueError(msg)  # noqa: TRY301 - one message for all that can be wrong with a file
        entries = tuple(_entry(entry) for entry in data["entries"])
        return MeasuredTable(data["device"], entries, data["facts"])
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path} is not a table of measurements ({error!r}); write it again: python -m kernels tune --out {path}"
        raise ValueError(msg) from error


def write(path: Path, table: MeasuredTable) -> None:
    """Write a table so that a process that is killed leaves the old file or the new one."""
    data = {
        "schema": SCHEMA,
        "device": table.device,
        "facts": dict(table.facts),
        "entries": [dataclasses.asdict(entry) for entry in sorted(table.entries, key=lambda entry: entry.key)],
    }
    write_whole(path, json.dumps(data, indent=1).encode() + b"\n")


def _entry(data: Mapping[str, Any]) -> MeasuredShape:
    kernels = {name: Timing(**timing) for name, timing in data["kernels"].items()}
    entry = MeasuredShape(**{**data, "kernels": kernels, "wrong": tuple(data["wrong"])})
    if entry.phase not in PHASES:
        msg = f"phase {entry.phase!r}, expected one of {', '.join(PHASES)}"
        raise ValueError(msg)
    return entry
