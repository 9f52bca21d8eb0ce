"""A task as a workload, so that the requirements of variants and the gate can use it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.data.lengths import Lengths
from seq2seq.models.base import Config
from seq2seq.tasks.task import Task, suited
from seq2seq.workloads.workload import Workload


@dataclass(frozen=True, kw_only=True)
class TaskWorkload(Workload):
    """A workload whose batches are those that a task trains on.

    Attributes:
        task: gives them.
        order: seed of the order that batches are taken in.
    """

    task: Task
    order: int = 0

    def make_batch(self, seed: int) -> Batch:
        """The first training batch of the epoch that the seed names; equal seeds give equal batches."""
        return next(self.task.batches("train", self.batch, self.order, seed))


def task_workload(task: Task, config: Config, batch: int, order: int = 0) -> TaskWorkload:
    """The workload of training a model on a task.

    Args:
        task: gives the batches.
        config: sizes of the model.
        batch: sequences in a batch.
        order: seed of the order that batches are taken in.

    Raises:
        ValueError: when the task has no training batch.
    """
    task = suited(task, config)
    first = next(islice(task.batches("train", batch, order, 0), 1), None)
    if first is None:
        msg = f"the task {task.name} has no training batch; give it more data"
        raise ValueError(msg)
    return TaskWorkload(
        name=task.name,
        summary=f"training on the task {task.name}",
        source="this project: the task's own sizes",
        data=f"the training batches of the task {task.name}",
        config=config,
        batch=first.size,
        source_steps=first.source.size(1),
        target_steps=None if first.target is None else first.target.size(1),
        source_lengths=_lengths(first.source_lengths, task.name),
        target_lengths=_lengths(first.target_lengths, task.name),
        task=task,
        order=order,
    )


def _lengths(lengths: Tensor | None, corpus: str) -> Lengths | None:
    """The distribution of a batch's lengths."""
    if lengths is None:
        return None
    least, *others = torch.quantile(lengths.double(), torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0]).double()).tolist()
    return Lengths(f"a batch of {corpus}", (least, others[0], others[1], others[2], others[3]))
