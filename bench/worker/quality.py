"""Time to quality in the child: one variant's training, block by block as the parent asks for it.

The step that is timed is `Executable.call`, the very one that mode training measures and that gate and audit judge.
Quality is judged the same way for all: the weights are put into a model of `torch.nn.LSTM` in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bench.gate.audit import Audit
from bench.gate.parity import Gate
from bench.machine import interference
from bench.timing import clock
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED, gated, refuse_replaced
from kernels.common.cudnn_precision import cudnn_precision
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.base import Config
from seq2seq.models.weights import initial_weights
from seq2seq.tasks.registry import TASKS
from seq2seq.tasks.task import Task
from seq2seq.training.task_workload import task_workload

Emit = Callable[..., None]
#: Steps before the first timed one, which are taken back: compiling and filling caches belongs to no block.
WARM_STEPS = 3


class Training:
    """One variant's training in this process."""

    def __init__(self, request: dict[str, Any], emit: Emit) -> None:
        part = request["part"]
        self.batch, self.device, self.order = part["batch"], request["device"], request["seed"]
        self.task: Task = TASKS[part["task"]](part["data"] or None, samples=part["samples"])
        self.config: Config = self.task.model_config("lstm", part["size"])
        if self.config.dropout:
            msg = "the model drops values at random, so the curves of variants could not be compared"
            raise ValueError(msg)
        workload = task_workload(self.task, self.config, self.batch, self.order)
        variant = VARIANTS[request["variant"]]
        self.reason = variant.why_not(self.device, "training", workload)
        emit("described", reason=self.reason, metric=self.task.quality)
        if self.reason:
            return
        emit("stage", name="build and gate", variant=variant.name)
        self.gate = Gate(workload, "training", self.device)
        self.weights = initial_weights(self.config, WEIGHTS_SEED)
        self.executable = Executable(variant, self.config, "training", self.device, self.weights)
        first = workload.make_batch(TIMED_SEED)
        self.audit = Audit(self.gate, self.weights, first)
        self.prepared = self.executable.prepare(first)
        refuse_replaced("a plugin")
        self.judge = self.config.build(nn.LSTM).to(self.device).eval()
        self.batches = self._endless()
        self.taken = 0

    def check(self, seed: int, when: str, emit: Emit) -> bool:
        """Gate and audit; afterwards the weights are those that training starts from."""
        found = gated(self.gate, self.audit, self.executable, self.prepared, seed, warm=False)
        emit("gate", when=when, **found)
        return bool(found["passed"])

    def warm_up(self) -> None:
        """A few steps that are taken back."""
        with self.executable.context():
            for _ in range(WARM_STEPS):
                self.executable.call(self.prepared)
        self.executable.restart(self.weights)

    def block(self, steps: int, emit: Emit) -> None:
        """Train a few steps against the clock, and evaluate apart."""
        start = clock.now_s()
        batches = [self.executable.prepare(next(self.batches)) for _ in range(steps)]
        losses = []
        before = interference.read()
        clock.synchronize(self.device)
        prepare_s = clock.now_s() - start
        start = clock.now_s()
        with self.executable.context():
            for batch in batches:
                loss: Any = self.executable.call(batch)
                # A copy: in a captured graph the next loss is written into the same memory.
                losses.append(loss.detach().clone())
        clock.synchronize(self.device)
        training_s = clock.now_s() - start
        why = interference.judge(before, interference.read(), self.device).why
        refuse_replaced(self.executable.variant.name)
        self.taken += steps
        values = [float(loss) for loss in losses]
        for number, value in enumerate(values):
            if not math.isfinite(value):
                msg = f"the training loss is {value} at step {self.taken - steps + number + 1}"
                raise RuntimeError(msg)
        start = clock.now_s()
        self.judge.load_state_dict(self.executable.weights())
        # cuDNN's LSTM takes TF32 by default.
        with cudnn_precision("ieee"):
            scores = self.task.evaluate(self.judge, self.batch, self.device)
        clock.synchronize(self.device)
        emit(
            "block",
            step=self.taken,
            prepare_s=prepare_s,
            training_s=training_s,
            evaluation_s=clock.now_s() - start,
            scores=scores,
            losses=values,
            why=why,
        )

    def _endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.task.batches("train", self.batch, self.order, epoch)
            epoch += 1


_training: list[Training] = []


def quality(request: dict[str, Any], emit: Emit) -> None:
    """Answer a request: `begin`, `block` or `end`.

    Args:
        request: `action`; to begin `part`, `variant`, `device` and `seed`, to train `steps`, to end `seed`.
        emit: sends an event.
    """
    torch.manual_seed(request.get("seed", 0))
    if request["action"] == "begin":
        training = Training(request, emit)
        if not training.reason and training.check(request["seed"], "before", emit):
            emit("stage", name="warm-up", variant=request["variant"])
            training.warm_up()
            _training.append(training)
        return
    (training,) = _training
    if request["action"] == "block":
        training.block(request["steps"], emit)
    else:
        training.check(request["seed"] + 1, "after", emit)
