"""Rounds: one pass over a group's variants, one turn each, and all that were kept of a group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine.interference import Interference
from bench.plan.cases import LEAST_ROUNDS, Case
from bench.records.block import Block

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """One pass over the variants of a group.

    Attributes:
        number: from 0, in its seating.
        blocks: what was timed, by variant, in the order in which they ran.
        wall_s: how long it took, untimed calls included, seconds.
        waited_s: how long a quiet moment was waited for before it, seconds.
        beside: what else happened meanwhile.
        order: the variants as they ran, those that were forgotten since included.
    """

    number: int
    blocks: dict[str, Block]
    wall_s: float = 0.0
    waited_s: float = 0.0
    beside: Interference = field(default_factory=Interference)
    order: tuple[str, ...] = ()

    @property
    def disturbed(self) -> bool:
        """Return whether something else used the machine or its cores were moved apart meanwhile."""
        return bool(self.beside.why)

    def row(self, group: str, process: int) -> list[Any]:
        """Facts that the round knows about itself, in the order of ROUND_COLUMNS."""
        return [
            *(group, process, self.number, f"{self.wall_s:.6g}", f"{self.waited_s:.6g}"),
            *dataclasses.asdict(self.beside).values(),
        ]


@dataclass
class Samples:
    """The rounds of a group, one list a worker process."""

    processes: list[list[Round]] = field(default_factory=list)

    def kept(self) -> list[list[Round]]:
        """The rounds that figures are made of: a process's clean ones where it has enough, otherwise all."""
        chosen = []
        for rounds in self.processes:
            clean = [r for r in rounds if not r.disturbed]
            chosen.append(clean if len(clean) >= LEAST_ROUNDS else rounds)
        return chosen

    def kept_of(self, variant: str) -> list[list[Round]]:
        """The kept rounds that have a variant, one list a process; no list is empty."""
        found = [[r for r in rounds if variant in r.blocks] for rounds in self.kept()]
        return [rounds for rounds in found if rounds]

    def calls(self, variant: str) -> list[list[Floats]]:
        """Single calls of a variant in its kept rounds, seconds: the calls that its percentiles are made of.

        One list a process, one array a round; a queued block has no single calls, and a round without any no array.
        """
        found = [[np.array(r.blocks[variant].calls_s) for r in rounds] for rounds in self.kept_of(variant)]
        return [[timed for timed in rounds if len(timed)] for rounds in found]

    def forget(self, variant: str) -> None:
        """Take out what was timed of a variant."""
        for rounds in self.processes:
            for found in rounds:
                found.blocks.pop(variant, None)

    def stretch(self) -> float:
        """Factor by which intervals must be wider, so that kept rounds that were disturbed narrow none.

        They are in the figures for lack of better ones; doubt falls with the square root of the clean rounds alone.
        """
        kept = [found for rounds in self.kept() for found in rounds]
        clean = sum(not found.disturbed for found in kept)
        return math.sqrt(len(kept) / max(1, clean)) if kept else 1.0

    def ratios(self, reference: str, variant: str) -> list[Floats]:
        """time(reference) / time(variant) of each kept round that has both, one array a process."""
        both = [[r.blocks for r in rounds if reference in r.blocks] for rounds in self.kept_of(variant)]
        return [np.array([b[reference].typical_s / b[variant].typical_s for b in blocks]) for blocks in both if blocks]

    def times(self, variant: str) -> list[Floats]:
        """Median call of each kept round that has the variant, seconds, one array a process."""
        return [np.array([r.blocks[variant].typical_s for r in rounds]) for rounds in self.kept_of(variant)]

    def rows(self, case: Case, process: int, rounds: Iterable[Round]) -> Iterator[list[Any]]:
        """Raw samples of a case in one process, in the order of SAMPLE_COLUMNS."""
        head = [case.workload, case.variant, case.mode, case.device, case.threads, process]
        for found in rounds:
            if case.variant not in found.blocks:
                continue
            block = found.blocks[case.variant]
            place = [found.number, (found.order or tuple(found.blocks)).index(case.variant)]
            flag = int(found.disturbed)
            if block.queued_calls:
                timed = [f"{block.queued_wall_s:.9g}", f"{block.queued_device_s:.9g}"]
                yield [*head, *place, "block", block.queued_calls, *timed, flag]
            for seconds in block.calls_s:
                yield [*head, *place, "call", 1, f"{seconds:.9g}", "", flag]

    def energy_rows(self, case: Case, process: int, rounds: Iterable[Round]) -> Iterator[list[Any]]:
        """Energy of a case's timed blocks in one process, in the order of ENERGY_COLUMNS."""
        head = [case.workload, case.variant, case.mode, case.device, case.threads, process]
        for found in rounds:
            block = found.blocks.get(case.variant)
            if block is not None and block.energy_j is not None:
                yield [*head, found.number, block.calls, f"{block.timed_s:.9g}", f"{block.energy_j:.9g}"]
