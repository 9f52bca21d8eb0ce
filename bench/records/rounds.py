"""Rounds: one pass over a group's variants, one turn each, and all that were kept of a group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine.interference import Interference
from bench.plan.cases import LEAST_ROUNDS, Case
from bench.records.block import Block

Floats = NDArray[np.float64]
#: This many clean processes show how processes differ; disturbed ones are then left out, however many they are.
CLEAN_PROCESSES = 3
#: Clean rounds with which a process that has not enough of them takes part all the same. Where 3 of 6 processes had 2,
#: 76 % of the intervals of 500 synthetic runs held the truth; with 3 to 5, 90 to 98 %. More such runs are in
#: `bench.analysis.derive_intervals`.
LEAST_CLEAN = 3


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
        word_ns: time of a word between two cores next to it (`bench.machine.core_distance`), nanoseconds; None if
            unknown.
    """

    number: int
    blocks: dict[str, Block]
    wall_s: float = 0.0
    waited_s: float = 0.0
    beside: Interference = field(default_factory=Interference)
    order: tuple[str, ...] = ()
    word_ns: float | None = None

    @property
    def disturbed(self) -> bool:
        """Return whether something else used the machine or its cores were moved apart meanwhile."""
        return bool(self.beside.why)

    @property
    def usable(self) -> bool:
        """Return whether nothing disturbed it but that the cores were far apart, if that."""
        return not self.disturbed or self.beside.far_alone

    def row(self, group: str, process: int) -> list[Any]:
        """Facts that the round knows about itself, in the order of ROUND_COLUMNS."""
        return [
            *(group, process, self.number, f"{self.wall_s:.6g}", f"{self.waited_s:.6g}"),
            *dataclasses.asdict(self.beside).values(),
        ]


@dataclass
class Samples:
    """The rounds of a group, one list per worker process."""

    processes: list[list[Round]] = field(default_factory=list)

    def kept(self, *variants: str) -> list[list[Round]]:
        """The rounds that figures of some variants are made of, one list per process, empty where it gives none.

        A process gives its clean rounds where it has enough of them. If `CLEAN_PROCESSES` have, or more than have not,
        the others give theirs too where they have `LEAST_CLEAN`, else none. If not, these give all their rounds.

        Args:
            variants: all of them took part in the rounds.
        """
        clean = [clean_rounds(rounds) for rounds in self.processes]
        chosen = [_with(variants, rounds or taken) for rounds, taken in zip(clean, self.processes, strict=True)]
        if not any(chosen):
            # They rested when the clean rounds came.
            return [_with(variants, taken) for taken in self.processes]
        enough = [bool(rounds and found) for rounds, found in zip(clean, chosen, strict=True)]
        spoilt = sum(bool(found) and not fine for found, fine in zip(chosen, enough, strict=True))
        if sum(enough) < min(CLEAN_PROCESSES, spoilt + 1):
            return chosen
        return [found if fine else _few(found) for found, fine in zip(chosen, enough, strict=True)]

    def kept_of(self, *variants: str) -> list[list[Round]]:
        """The kept rounds of some variants, one list per process; no list is empty."""
        return [rounds for rounds in self.kept(*variants) if rounds]

    def lacking(self, variant: str) -> int:
        """Number of clean processes that a variant whose kept rounds are disturbed lacks; 0 where they are not."""
        kept = self.kept_of(variant)
        dirty = sum(any(found.disturbed for found in rounds) for rounds in kept)
        return min(CLEAN_PROCESSES, dirty + 1) - (len(kept) - dirty) if dirty else 0

    def calls(self, variant: str) -> list[list[Floats]]:
        """Single calls of a variant in its kept rounds, seconds: the calls that its percentiles are made of.

        One list per process, empty if it gives none, with one array per round. A queued block has no single calls, and
        a round without single calls has no array.
        """
        found = [[np.array(r.blocks[variant].calls_s) for r in rounds] for rounds in self.kept(variant)]
        return [[timed for timed in rounds if len(timed)] for rounds in found]

    def forget(self, variant: str) -> None:
        """Take out what was timed of a variant."""
        for rounds in self.processes:
            for found in rounds:
                found.blocks.pop(variant, None)

    def stretch(self, *variants: str, elsewhere: bool = False) -> float:
        """Factor by which intervals must be wider, so that kept rounds that were disturbed narrow none.

        They are in the figures for lack of better ones; only the clean rounds reduce the doubt, by their square root.
        If there is no clean one, those count in which the cores were far apart and nothing else disturbed: that was the
        state of the machine then, for all variants.

        Args:
            variants: as for `kept`.
            elsewhere: whether they are compared with rounds of another run, in which the cores may have been near: only
                clean rounds count then.
        """
        kept = [found for rounds in self.kept(*variants) for found in rounds]
        clean = sum(not found.disturbed for found in kept)
        if not clean and not elsewhere:
            clean = sum(found.beside.far_alone for found in kept)
        return math.sqrt(len(kept) / max(1, clean)) if kept else 1.0

    def ratios(self, reference: str, variant: str) -> list[Floats]:
        """time(reference) / time(variant) of each kept round that has both, one array per process."""
        return ratios(self.kept_of(reference, variant), reference, variant)

    def states(self, *variants: str) -> list[list[list[Round]]]:
        """The rounds of some variants by the state of the machine, one list per process that shows it.

        The states are two: nothing disturbed, and the cores were far apart and nothing else disturbed. A state with
        fewer than `LEAST_ROUNDS` rounds counts as not seen. Of one that was seen, processes with fewer than
        `LEAST_CLEAN` rounds are left out; it is empty if the others have too few rounds, or if only one of several
        processes shows it.
        """
        found = []
        for in_state in (lambda taken: not taken.disturbed, lambda taken: taken.beside.far_alone):
            seen = [_with(variants, filter(in_state, rounds)) for rounds in self.processes]
            shown = [rounds for rounds in seen if len(rounds) >= LEAST_CLEAN]
            enough = sum(map(len, shown)) >= LEAST_ROUNDS and len(shown) >= min(2, len(self.processes))
            if sum(map(len, seen)) >= LEAST_ROUNDS:
                found.append(shown if enough else [])
        return found

    def times(self, variant: str) -> list[Floats]:
        """Median call of each kept round that has the variant, seconds, one array per process."""
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


def ratios(processes: Iterable[Sequence[Round]], reference: str, variant: str) -> list[Floats]:
    """time(reference) / time(variant) of each round, one array per process."""
    return [
        np.array([r.blocks[reference].typical_s / r.blocks[variant].typical_s for r in rounds]) for rounds in processes
    ]


def clean_rounds(rounds: Sequence[Round]) -> list[Round]:
    """Return a process's undisturbed rounds if they are enough, or more than the disturbed ones; otherwise none."""
    clean = _undisturbed(rounds)
    return clean if _enough(clean, rounds) else []


def _few(rounds: Iterable[Round]) -> list[Round]:
    """The clean rounds of a process that has not enough of them; none where they would say too little of it."""
    clean = _undisturbed(rounds)
    return clean if len(clean) >= LEAST_CLEAN else []


def _undisturbed(rounds: Iterable[Round]) -> list[Round]:
    return [found for found in rounds if not found.disturbed]


def spoilt(rounds: Sequence[Round]) -> bool:
    """Return whether a process has too few rounds that nothing disturbed but the distance of the cores, if that."""
    return not _enough([found for found in rounds if found.usable], rounds)


def _enough(some: Sequence[Round], rounds: Sequence[Round]) -> bool:
    return len(some) >= LEAST_ROUNDS or 2 * len(some) > len(rounds)


def _with(variants: Sequence[str], rounds: Iterable[Round]) -> list[Round]:
    return [found for found in rounds if all(variant in found.blocks for variant in variants)]
