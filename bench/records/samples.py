"""Raw samples read back: samples.csv.gz as the rounds that it was written from.

What compares runs or checks their figures starts here, from what the clock said, and goes through the same `Samples`
that a run's own records were made with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import UsageError
from bench.machine.interference import Interference
from bench.plan.identity import GroupKey
from bench.records.block import Block
from bench.records.raw_csv import ENERGY, ROUNDS, SAMPLES
from bench.records.rounds import Round, Samples


@dataclass
class _Turn:
    """The rows of one variant in one round."""

    position: int
    disturbed: bool
    calls_s: list[float] = field(default_factory=list)
    queued: tuple[int, float, float | None] = (0, 0.0, None)
    energy_j: float | None = None

    def block(self) -> Block:
        return Block(tuple(self.calls_s), *self.queued, energy_j=self.energy_j)


@dataclass(frozen=True)
class _Row:
    """One line of the file, checked."""

    group: GroupKey
    variant: str
    process: int
    round: int
    position: int
    kind: str
    calls: int
    wall_s: float
    device_s: float | None
    disturbed: bool

    @classmethod
    def of(cls, cells: list[str]) -> _Row:
        """From the cells in the order of SAMPLE_COLUMNS.

        Raises:
            ValueError, KeyError: for a cell that does not fit its column.
        """
        workload, variant, mode, device, threads, process, number, position, kind, calls, wall, events, flag = cells
        found = cls(
            GroupKey(workload, mode, device, int(threads)),
            variant,
            int(process),
            int(number),
            int(position),
            kind,
            int(calls),
            float(wall),
            float(events) if events else None,
            {"0": False, "1": True}[flag],
        )
        if not (0 < found.wall_s < math.inf) or found.calls < 1 or kind not in {"call", "block"}:
            raise ValueError
        return found


def read_samples(path: Path) -> dict[GroupKey, Samples]:
    """The rounds of every group of a run, in the order of its processes.

    A process that measured none of a group's cases to the end has no rows, and no place in the result. Without the file
    there is no group.

    Raises:
        UsageError: the file is damaged, is not one of ours, or holds a case twice.
    """
    turns: dict[GroupKey, dict[int, dict[int, dict[str, _Turn]]]] = {}
    last: tuple[GroupKey, str, int, int] | None = None
    for line, row in _rows(path):
        here = (row.group, row.variant, row.process, row.round)
        found = turns.setdefault(row.group, {}).setdefault(row.process, {}).setdefault(row.round, {})
        if here != last and row.variant in found:
            # Two measurements of a case would mix rounds that never took turns.
            msg = (
                f"{path}, line {line}: {row.group} {row.variant} has round {row.round} of process "
                f"{row.process} twice; expected the samples of one measurement, so measure the case again"
            )
            raise UsageError(msg)
        last = here
        turn = found.setdefault(row.variant, _Turn(row.position, row.disturbed))
        if row.kind == "block":
            turn.queued = (row.calls, row.wall_s, row.device_s)
        else:
            turn.calls_s.append(row.wall_s)
    for group, variant, process, number, energy_j in _energies(path.parent):
        if counted := turns.get(group, {}).get(process, {}).get(number, {}).get(variant):
            counted.energy_j = energy_j
    reasons = _reasons(path.parent)
    return {
        group: Samples(
            [_rounds(processes[number], reasons.get((str(group), number), {})) for number in sorted(processes)]
        )
        for group, processes in turns.items()
    }


def _reasons(folder: Path) -> dict[tuple[str, int], dict[int, str]]:
    """Read what disturbed rounds, in words: by group and process, and by round."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for number, (group, process, round_, _, _, why, *_) in enumerate(ROUNDS.rows(folder), start=2):
        try:
            found.setdefault((group, int(process)), {})[int(round_)] = why
        except ValueError as error:
            msg = (
                f"{folder / ROUNDS.name}, line {number} is not a round of a process: {process}, {round_}; put back the "
            )
            raise UsageError(msg + "file that the run wrote") from error
    return found


def _energies(folder: Path) -> Iterator[tuple[GroupKey, str, int, int, float]]:
    """Group, variant, process, round and joules of each timed block whose energy was counted."""
    for number, cells in enumerate(ENERGY.rows(folder), start=2):
        try:
            workload, variant, mode, device, threads, process, round_, _, _, energy_j = cells
            yield GroupKey(workload, mode, device, int(threads)), variant, int(process), int(round_), float(energy_j)
        except ValueError as error:
            msg = f"{folder / ENERGY.name}, line {number} is not the energy of a block: {','.join(cells)[:100]!r}; put "
            raise UsageError(msg + "back the file that the run wrote") from error


def _rounds(turns: dict[int, dict[str, _Turn]], reasons: dict[int, str]) -> list[Round]:
    """The rounds of a process, blocks in the order in which they ran, with what disturbed them."""
    found = []
    for number in sorted(turns):
        ordered = sorted(turns[number].items(), key=lambda item: item[1].position)
        disturbed = any(turn.disturbed for _, turn in ordered)
        beside = Interference(why=(reasons.get(number) or "disturbed") if disturbed else "")
        found.append(Round(number, {variant: turn.block() for variant, turn in ordered}, beside=beside))
    return found


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """The file's rows with their line numbers; the header is line 1."""
    for number, cells in enumerate(SAMPLES.rows(path.parent), start=2):
        try:
            yield number, _Row.of(cells)
        except (ValueError, KeyError) as error:
            msg = f"{path}, line {number} is not a sample: {','.join(cells)[:100]!r}; expected what `bench run` wrote"
            raise UsageError(msg) from error
