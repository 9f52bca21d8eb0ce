"""The gate of batched serving: what a query gets in a batch equals what it gets alone.

A variant can pass the gate although queries influence each other: through padding that leaks into a result, a scale
that is taken over the whole batch, or swapped rows. Each side is allowed the error of the gate's limit, so the two are
allowed to differ by twice that.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.gate.tolerance import relative_error
from seq2seq.data.batch import Batch
from seq2seq.decoding.rows import StepRows

#: Queries that a check asks alone, at most.
MOST_ALONE = 48
#: Runs a batch and returns its results by name.
Run = Callable[[Any], Mapping[str, Tensor]]


class Library(Protocol):
    """The queries that can be asked about, each a sequence of a workload."""

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Steps of each query, one number a tensor that the model reads."""

    def gather(self, samples: Sequence[int]) -> Any:
        """The batch of some queries."""

    def result(self, name: str, together: Tensor, row: int, alone: Tensor) -> Tensor:
        """One query's part of a result of a batch, in the shape that the query has alone."""


@functools.singledispatch
def library_of(workload: Any, least: int) -> Library:
    """The queries of a workload, at least this many."""
    count = -(-least // workload.batch)
    return QueryLibrary.of([workload.make_batch(seed) for seed in range(count)])


@dataclass(frozen=True)
class QueryLibrary:
    """The queries that can be asked: sequences on the CPU, padded to the longest of all.

    Attributes:
        batch: all of them.
        lengths: of each its steps, one number a tensor that the model reads.
    """

    batch: Batch
    lengths: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(batches: Sequence[Batch]) -> QueryLibrary:
        """Put batches of one workload together."""
        names = batches[0].tensors()
        joint = {name: torch.cat([batch.tensors()[name] for batch in batches]) for name in names}
        absent = {"target", "source_lengths", "target_lengths"} - joint.keys()
        batch = Batch(**(joint | dict.fromkeys(absent)))  # type: ignore[arg-type]
        columns = [_steps(batch.source, batch.source_lengths)]
        if batch.target is not None:
            columns.append(_steps(batch.target, batch.target_lengths))
        return QueryLibrary(batch, tuple(zip(*columns, strict=True)))

    def gather(self, samples: Sequence[int]) -> Batch:
        """The batch of some queries, as long as its longest."""
        places, whole = torch.tensor(samples), self.batch
        longest = [max(steps) for steps in zip(*(self.lengths[sample] for sample in samples), strict=True)]
        # Labels (CTC) are not along what a decoder reads, and stay as they are.
        read = whole.source if whole.target is None else whole.target
        along = whole.expected.size(1) == read.size(1)
        return Batch(
            source=whole.source[places, : longest[0]],
            target=None if whole.target is None else whole.target[places, : longest[1]],
            source_lengths=None if whole.source_lengths is None else whole.source_lengths[places],
            target_lengths=None if whole.target_lengths is None else whole.target_lengths[places],
            expected=whole.expected[places, : longest[-1]] if along else whole.expected[places],
        )

    def result(self, name: str, together: Tensor, row: int, alone: Tensor) -> Tensor:
        """One query's part of `outputs` (batch first) or of a state (batch second), cut to the steps it has alone."""
        if name == "outputs":
            return together[row : row + 1, : alone.size(1)]
        return together[:, row : row + 1]


def _steps(value: Tensor, lengths: Tensor | None) -> list[int]:
    return [value.size(1)] * len(value) if lengths is None else lengths.tolist()


@dataclass(frozen=True)
class Batched:
    """Result of the gate: the largest difference, its limit, and where it was."""

    error: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        """Return whether it keeps within the limit; a difference that is no number does not."""
        return self.error <= self.limit

    @property
    def reason(self) -> str:
        """Describe a difference that is too large; empty otherwise."""
        if self.passed:
            return ""
        return (
            f"a query gets another result in a batch than alone: {self.where}, {self.error:.2e}, limit {self.limit:.2e}"
        )


def check(run: Run, library: Library, largest: int, parity_limit: float, seed: int) -> Batched:
    """Ask queries in batches of mixed lengths and alone, and compare.

    Args:
        run: the variant.
        library: what can be asked.
        largest: most queries in a batch.
        parity_limit: that each side may err by.
        seed: of the queries.
    """
    order = random.Random(seed)  # noqa: S311 - a choice of queries
    sizes = [min(size, MOST_ALONE // 2) for size in {2, order.randint(1, largest), largest}]
    worst, where = 0.0, "nothing differs"
    for size in sizes:
        samples = [order.randrange(len(library.lengths)) for _ in range(size)]
        together = {name: value.clone() for name, value in run(library.gather(samples)).items()}
        for row, sample in enumerate(samples):
            for name, alone in run(library.gather([sample])).items():
                # What is there for a query alone, and not in its batch, is wrong there.
                found = library.result(name, together[name], row, alone) if name in together else alone[:0]
                error = relative_error(found, alone.double())
                if not error <= worst:
                    worst, where = error, f"{name} of query {row + 1} of {size}, {library.lengths[sample][0]} steps"
    return Batched(worst, 2 * parity_limit, where)


def check_rows(rows: StepRows, run: Run, library: QueryLibrary, parity_limit: float, seed: int) -> Batched:
    """Ask queries in rows that they join and leave at random steps, each row several times, and whole and alone.

    Args:
        rows: of the variant, all free.
        run: the variant on a whole batch.
        library: what can be asked.
        parity_limit: that each side may err by.
        seed: of the queries.
    """
    samples, found = stepped(rows, library, seed)
    worst, where = 0.0, "nothing differs"
    for query, sample in enumerate(samples):
        for name, alone in run(library.gather([sample])).items():
            error = relative_error(found[query][name], alone.double())
            if not error <= worst:
                worst, where = error, f"{name} of query {query + 1}, step by step, {library.lengths[sample][0]} steps"
    return Batched(worst, 2 * parity_limit, where)


def stepped(rows: StepRows, library: QueryLibrary, seed: int) -> tuple[list[int], dict[int, Mapping[str, Tensor]]]:
    """Ask queries in rows that they join and leave at random steps; returns their samples, and the results of each."""
    order = random.Random(seed)  # noqa: S311 - a choice of queries
    count = min(MOST_ALONE, 2 * rows.free + 1)
    samples = [order.randrange(len(library.lengths)) for _ in range(count)]
    waiting = list(enumerate(samples))
    found: dict[int, Mapping[str, Tensor]] = {}
    while waiting or rows.active:
        joining = order.randint(0 if rows.active else 1, rows.free) if waiting else 0
        for query, sample in waiting[:joining]:
            rows.join(query, sample)
        del waiting[:joining]
        found |= {finished.query: finished.results for finished in rows.advance()}
    return samples, found
