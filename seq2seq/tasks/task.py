"""Interface of a task for training: batches in a known order, sizes of models that fit, and a score.

A task's module has `load(path, **options)`, which reads a user's file or, without one, the data that comes with a
package, and `restore(state)`, which gives back what prediction needs without the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from seq2seq.data.batch import Batch
from seq2seq.models.base import Config

#: Model families that a decoder is part of, which every task has.
DECODERS = ("lstm", "attention", "gnmt", "transformer")
#: Model families that a task may be asked for.
MODELS = (*DECODERS, "ctc")


class Task(Protocol):
    """Data to learn from, and how well it was learnt.

    Attributes:
        name: key of `seq2seq.tasks.registry.TASKS`.
        quality: name of the metric that it is judged by, a key of what `evaluate` gives: MASE, BLEU, ...
        higher_is_better: of that metric.

    A task may have `defaults`, fields of `training.settings.TrainSettings` that suit its data, `notes`, lines about
    it, and `suited(config)`, where its batches depend on the model; see `suited`.
    """

    name: str
    quality: str
    higher_is_better: bool

    def model_config(self, model: str, size: str) -> Config:
        """Sizes of a model that fits the data.

        Args:
            model: of `MODELS`.
            size: `small`, which trains on 2 CPU cores in minutes, or `full`.

        Raises:
            ValueError: for a model or size that this task has not.
        """

    def batches(self, split: str, batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Batches of an epoch, on the CPU, the same on every run; no generator but the task's own is drawn from.

        Args:
            split: `train`, in an order that (seed, epoch) decides, or `validation`, in the data's order.
            batch: sequences in a batch; the last one may have fewer.
            seed: of the order.
            epoch: from 0; each has an order of its own.

        Raises:
            ValueError: for an unknown split, a batch below 1, or a task that was restored without data.
        """

    def evaluate(self, model: nn.Module, batch: int, device: str) -> dict[str, float]:
        """Decode the validation split: quality, and baselines by name.

        Args:
            model: on the device, a `seq2seq.models.base.Model`; left in the mode that it was in.
            batch: sequences in a batch.
            device: `cpu` or `cuda`.
        """

    def state(self) -> dict[str, Any]:
        """State that a checkpoint must keep to use a model again, in JSON's types: scaling, tokenizer, alphabet, ..."""


def suited(task: Task, config: Config) -> Task:
    """The task with the batches that a model of these sizes trains on; most tasks have only one kind.

    Args:
        task: as it was loaded, or suited already.
        config: sizes of the model.
    """
    own: Callable[[Config], Task] | None = getattr(task, "suited", None)
    return task if own is None else own(config)
