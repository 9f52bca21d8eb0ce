"""One rank of a training over ranks: `python -m bench.worker.ranks` with a task on standard input.

Its keeper (`bench.ranks.keeper`) starts it, and knows one that works from one that hangs by what it says on standard
output, a JSON object a line. Whatever torch and its libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bench.gate.parity import Gate
from bench.gate.tolerance import GRADIENT
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED, verdict_fields
from bench.worker.server import load_plugins
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import LEARNING_RATE, Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import Workload

Emit = Callable[..., None]
WARM_STEPS = 3


@dataclass(frozen=True)
class RankSetting:
    """One way to divide the work: ranks that share it, `strong` or `weak`, size of a gradient bucket in MB."""

    world: int
    scaling: str
    bucket_mb: float

    def joint_batch(self, batch: int) -> int:
        """Sequences of a step over all ranks, for a workload's batch."""
        return batch if self.scaling == "strong" else batch * self.world


class Replica:
    """A rank's copy of a model under DistributedDataParallel, on its part of the joint batch."""

    def __init__(
        self, setting: RankSetting, workload: Workload, variant: str, weights: dict[str, Tensor], group: Any
    ) -> None:
        self.setting, self.workload = setting, workload
        self.executable = Executable(VARIANTS[variant], workload.config, "training", "cpu", weights)
        self.ddp = DistributedDataParallel(self.executable.model, process_group=group, bucket_cap_mb=setting.bucket_mb)
        # DistributedDataParallel takes no hook whose annotations are text, so this one shows none.
        self.ddp.register_comm_hook(group, lambda state, bucket: self._hook(state, bucket))  # noqa: PLW0108
        self._first: float | None = None
        self.optimizer = torch.optim.Adam(self.ddp.parameters(), lr=LEARNING_RATE)

    def part(self, joint: Batch) -> tuple[Batch, float]:
        """This rank's rows of a batch, and the factor that makes the mean of the ranks' losses the batch's own.

        The loss is a mean over valid steps, of which a rank may have more than another.
        """
        rank, world = dist.get_rank(), self.setting.world
        rows = slice(rank * joint.size // world, (rank + 1) * joint.size // world)
        mine = dataclasses.replace(joint, **{name: value[rows] for name, value in joint.tensors().items()})
        return mine, world * _counted(mine) / _counted(joint)

    def backward(self, batch: Batch, factor: float) -> None:
        """Forward and backward; the gradients are the means over the ranks afterwards."""
        outputs = self.ddp(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        loss = self.executable.model.loss(outputs, batch.expected, batch.decoded_lengths)
        (factor * loss).backward()

    def step(self, batch: Batch, factor: float) -> tuple[float, float]:
        """One training step; returns the seconds before the first collective, and of all."""
        self._first = None
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(batch, factor)
        self.optimizer.step()
        end = time.perf_counter()
        return (self._first or end) - start, end - start

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names that the gate knows."""
        return {
            f"{GRADIENT}{name}": torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in self.executable.model.named_parameters()
        }

    def _hook(self, group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        if self._first is None:
            self._first = time.perf_counter()
        return allreduce_hook(group, bucket)


def _counted(batch: Batch) -> int:
    """What the loss of a batch is a mean over."""
    if not batch.expected.is_floating_point():
        return int((batch.expected != IGNORE_TOKEN).sum())
    if batch.decoded_lengths is not None:
        return int(batch.decoded_lengths.sum())
    return batch.expected.size(0) * batch.expected.size(1)


def check(setting: RankSetting, workload: Workload, variant: str, group: Any, seed: int) -> dict[str, Any] | None:
    """Hold the gradients of all ranks against those of one process in float64 on the joint batch.

    Returns:
        The verdict's fields on rank 0, None on all others.
    """
    joint_workload = dataclasses.replace(workload, batch=setting.joint_batch(workload.batch))
    gate = Gate(joint_workload, "training", "cpu")
    weights, joint = gate.weights(seed), gate.batch(seed)
    replica = Replica(setting, workload, variant, weights, group)
    with replica.executable.context():
        replica.backward(*replica.part(joint))
    found = replica.gradients()
    if dist.get_rank() != 0:
        return None
    precision = replica.executable.variant.precision
    truth = {name: value for name, value in gate.true(weights, joint).items() if name in found}
    expected = gate.compute(weights, joint, precision)
    usual = gate.usual_norms
    verdict = gate.judge(found, truth, expected, precision, usual, lambda: gate.usual_errors(precision))
    return verdict_fields(verdict)


def measure(
    replicas: dict[RankSetting, tuple[Replica, Batch, float]],
    settings: list[RankSetting],
    rounds: int,
    steps: int,
    emit: Emit,
) -> None:
    """Take turns: in each round every setting makes its steps, in an order that changes from round to round."""
    rank = dist.get_rank()
    for number in range(rounds):
        shift = number % len(settings)
        for setting in settings[shift:] + settings[:shift]:
            # Ranks without a part wait here, where gloo blocks and does not spin.
            dist.barrier()
            if setting not in replicas:
                continue
            replica, batch, factor = replicas[setting]
            with replica.executable.context():
                taken = []
                for _ in range(steps):
                    taken.append(replica.step(batch, factor))
                    emit("alive", stage=f"round {number + 1}")
            fields = dataclasses.asdict(setting) | {"round": number, "rank": rank}
            emit("steps", **fields, compute_s=[c for c, _ in taken], total_s=[t for _, t in taken])
    dist.barrier()


def run(task: dict[str, Any], emit: Emit) -> None:
    """Join the others, pass the gate, measure."""
    torch.set_num_threads(task["threads"])
    emit("alive", stage="plugins")
    load_plugins(task["plugins"])
    emit("alive", stage="join")
    patience = timedelta(seconds=task["silence_s"])
    dist.init_process_group("gloo", timeout=patience)
    rank, settings = dist.get_rank(), [RankSetting(**fields) for fields in task["settings"]]
    workload = find_workload(task["workload"])
    variant = VARIANTS[task["variant"]]
    reason = variant.why_not("cpu", "training", workload)
    if variant.compiler or variant.runtime or variant.precision != "fp32":
        reason = reason or "only variants that run eagerly in fp32 are trained over ranks"
    if reason:
        emit("unavailable", reason=reason)
        return
    # A group has half an hour of its own unless told otherwise.
    worlds = sorted({setting.world for setting in settings})
    groups = {world: dist.new_group(list(range(world)), timeout=patience) for world in worlds}
    weights = starting_weights(workload, WEIGHTS_SEED)
    replicas: dict[RankSetting, tuple[Replica, Batch, float]] = {}
    for setting in settings:
        emit("alive", stage=f"gate, {setting.world} ranks")
        dist.barrier()
        if rank >= setting.world:
            continue
        group = groups[setting.world]
        verdict = check(setting, workload, task["variant"], group, task["seed"])
        if verdict is not None:
            emit("gate", **dataclasses.asdict(setting), batch=setting.joint_batch(workload.batch), **verdict)
        joint = dataclasses.replace(workload, batch=setting.joint_batch(workload.batch)).make_batch(TIMED_SEED)
        replica = Replica(setting, workload, task["variant"], weights, group)
        replicas[setting] = (replica, *replica.part(joint))
        with replica.executable.context():
            for _ in range(WARM_STEPS):
                replica.step(*replicas[setting][1:])
    dist.barrier()
    measure(replicas, settings, task["rounds"], task["steps"], emit)
    dist.destroy_process_group()


def main() -> int:
    """Run the task of standard input; what goes wrong is said as an event."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **fields: Any) -> None:
        answers.write(json.dumps({"event": event, **fields}) + "\n")
        answers.flush()

    try:
        run(json.load(sys.stdin), emit)
    except Exception as error:  # noqa: BLE001 - whatever it is becomes a record
        text = " ".join(str(error).split())[:300]
        emit("failed", reason=f"{type(error).__name__}: {text}")
        return 1
    emit("done")
    # Threads of gloo may outlive what they served.
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
