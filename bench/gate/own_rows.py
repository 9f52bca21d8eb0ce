"""The queries of an own model: its sequences one by one, as `seq2seq.own_model.rows` takes its inputs apart.

All sequences have the shape that the user's function gave them, so a batch of any of them needs no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bench.gate.batched import library_of
from seq2seq.own_model.inputs import Given
from seq2seq.own_model.rows import Rows, rows_of
from seq2seq.own_model.workload import OwnWorkload

__all__ = ["OwnQueryLibrary", "library_of", "rows_of"]


@dataclass(frozen=True)
class OwnQueryLibrary:
    """The sequences of an own model that can be asked for.

    Attributes:
        given: all of them in one.
        rows: how they are taken apart.
        lengths: steps of each as its LSTM reads them, padding that the user's function brought included.
    """

    given: Given
    rows: Rows
    lengths: tuple[tuple[int, ...], ...]

    def gather(self, samples: Sequence[int]) -> Given:
        """The inputs of some sequences."""
        return self.rows.picked(self.given, samples)

    def result(self, name: str, together: Tensor, row: int, alone: Tensor) -> Tensor:
        """One query's part of the results of a batch."""
        return self.rows.output(name, together, row, alone)


@library_of.register(OwnWorkload)
def _(workload: OwnWorkload, least: int) -> OwnQueryLibrary:
    rows = rows_of(workload)
    batches = -(-least // workload.batch)
    joint = rows.joined([workload.make_batch(seed) for seed in range(batches)])
    return OwnQueryLibrary(joint, rows, ((workload.source_steps,),) * (batches * workload.batch))
