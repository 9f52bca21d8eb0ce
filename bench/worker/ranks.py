"""One rank of a training over ranks: `python -m bench.worker.ranks` with a task on standard input.

Its keeper (`bench.ranks.keeper`) starts it, and knows one that works from one that hangs by what it says on standard
output, a JSON object a line. Whatever torch and its libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bench.gate.parity import Gate
from bench.gate.tolerance import GRADIENT, relative_error
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
#: Micro-batches of a step, and of each the factor of its loss.
Parts = list[tuple[Batch, float]]
WARM_STEPS = 3
#: Steps before a checkpoint and after it.
RESUMED_STEPS = 2
#: Relative error of all weights together after those steps, against a training without interruption: some roundings,
#: since new replicas begin with other buckets, which the order of sums over many ranks follows. A step whose moments
#: were lost moves weights by the learning rate, 1e-3.
RESUMED_LIMIT = 2e-6


@dataclass(frozen=True)
class RankSetting:
    """One way to divide the work: ranks that share it, `strong` or `weak`, size of a gradient bucket in MB.

    Each rank takes its part in `accumulate` micro-batches, whose gradients are exchanged once, as a sum.
    """

    world: int
    scaling: str
    bucket_mb: float
    accumulate: int = 1

    def joint_batch(self, batch: int) -> int:
        """Sequences of a step over all ranks, for a workload's batch."""
        return batch if self.scaling == "strong" else batch * self.world


@dataclass(frozen=True)
class RankedCase:
    """Subject of the training: a workload by a variant, on `cpu` or `cuda`."""

    workload: Workload
    variant: str
    device: str = "cpu"

    def joint(self, setting: RankSetting) -> Workload:
        """The workload with the batch of all ranks together."""
        return dataclasses.replace(self.workload, batch=setting.joint_batch(self.workload.batch))


def mark(device: str) -> Any:
    """A moment: on a GPU one in the order of its work, which the host is ahead of."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    """Seconds between two moments; waits for the last."""
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e-3


class Replica:
    """A rank's copy of a model under DistributedDataParallel, on its part of the joint batch."""

    def __init__(self, setting: RankSetting, trained: RankedCase, weights: dict[str, Tensor], group: Any) -> None:
        self.setting, self.device = setting, trained.device
        variant, config = VARIANTS[trained.variant], trained.workload.config
        self.executable = Executable(variant, config, "training", trained.device, weights)
        self.ddp = DistributedDataParallel(self.executable.model, process_group=group, bucket_cap_mb=setting.bucket_mb)
        # DistributedDataParallel takes no hook whose annotations are text, so this one shows none.
        self.ddp.register_comm_hook(group, lambda state, bucket: self._hook(state, bucket))  # noqa: PLW0108
        self._first: Any = None
        self.optimizer = torch.optim.Adam(self.ddp.parameters(), lr=LEARNING_RATE)

    def parts(self, joint: Batch) -> Parts:
        """This rank's rows of a batch in micro-batches, with factors that make the losses' sum the batch's own.

        Its mean over the ranks, that is. A loss is a mean over valid steps, of which one part may have more than
        another.
        """
        world, pieces = self.setting.world, self.setting.accumulate
        first = dist.get_rank() * pieces
        edges = [place * joint.size // (world * pieces) for place in range(first, first + pieces + 1)]
        found = []
        for begin, end in itertools.pairwise(edges):
            mine = dataclasses.replace(joint, **{name: value[begin:end] for name, value in joint.tensors().items()})
            found.append((self.executable.prepare(mine), world * _counted(mine) / _counted(joint)))
        return found

    def backward(self, parts: Parts) -> None:
        """Forward and backward; the gradients are the means over the ranks afterwards, exchanged with the last part."""
        *others, last = parts
        with self.ddp.no_sync():
            for part in others:
                self._backward(*part)
        self._backward(*last)

    def _backward(self, batch: Batch, factor: float) -> None:
        outputs = self.ddp(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        loss = self.executable.model.loss(outputs, batch.expected, batch.decoded_lengths)
        (factor * loss).backward()

    def step(self, parts: Parts) -> tuple[float, float]:
        """One training step; returns the seconds before the first collective, and of all."""
        self._first = None
        start = mark(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(parts)
        self.optimizer.step()
        end = mark(self.device)
        return between(start, self._first or end), between(start, end)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the names that the gate knows."""
        return {
            f"{GRADIENT}{name}": torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in self.executable.model.named_parameters()
        }

    def save(self, path: Path) -> None:
        """Write weights and optimizer into a file, in one step."""
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            torch.save({"model": self.executable.weights(), "optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    @classmethod
    def resumed(cls, setting: RankSetting, trained: RankedCase, path: Path, group: Any) -> Replica:
        """A new replica that continues from such a file."""
        kept = torch.load(path, weights_only=True, map_location="cpu")
        replica = cls(setting, trained, kept["model"], group)
        replica.optimizer.load_state_dict(kept["optimizer"])
        return replica

    def _hook(self, group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        if self._first is None:
            self._first = mark(self.device)
        return allreduce_hook(group, bucket)


def _counted(batch: Batch) -> int:
    """Number of values that the loss of a batch is a mean over."""
    if not batch.expected.is_floating_point():
        return int((batch.expected != IGNORE_TOKEN).sum())
    if batch.decoded_lengths is not None:
        return int(batch.decoded_lengths.sum())
    return batch.expected.size(0) * batch.expected.size(1)


def check(
    setting: RankSetting, trained: RankedCase, group: Any, seed: int, alone: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """Hold the gradients of all ranks against those of one process in float64 on the joint batch.

    Args:
        setting: how the work is divided.
        trained: the workload and its variant.
        group: of the ranks that take part.
        seed: of weights and batch.
        alone: called on rank 0 before it goes on computing without the others.

    Returns:
        The verdict's fields on rank 0, None on all others.
    """
    gate = Gate(trained.joint(setting), "training", trained.device)
    weights, joint = gate.weights(seed), gate.batch(seed)
    replica = Replica(setting, trained, weights, group)
    with replica.executable.context():
        replica.backward(replica.parts(joint))
    found = replica.gradients()
    if dist.get_rank() != 0:
        return None
    alone()
    precision = replica.executable.variant.precision
    truth = {name: value for name, value in gate.true(weights, joint).items() if name in found}
    expected = gate.compute(weights, joint, precision)
    usual = gate.usual_norms
    verdict = gate.judge(found, truth, lambda: expected, precision, usual, lambda: gate.usual_errors(precision))
    return verdict_fields(verdict)


def check_resumed(setting: RankSetting, trained: RankedCase, group: Any, path: Path) -> dict[str, Any]:
    """Train, write a checkpoint and continue; then let new replicas continue from the file, and compare their weights.

    Args:
        setting: how the work is divided.
        trained: the workload and its variant.
        group: of the ranks that take part.
        path: of the file, in a folder that all of them see; rank 0 writes it.

    Returns:
        Seconds that rank 0 took to write, and this rank to be ready again; size of the file; and the error.
    """
    replica = Replica(setting, trained, starting_weights(trained.workload, WEIGHTS_SEED), group)
    parts = replica.parts(trained.joint(setting).make_batch(TIMED_SEED))
    save_s = None
    with replica.executable.context():
        for step in range(2 * RESUMED_STEPS):
            if step == RESUMED_STEPS and dist.get_rank() == 0:
                start = time.perf_counter()
                replica.save(path)
                save_s = time.perf_counter() - start
            replica.step(parts)
    # The steps after it have met all ranks, so the file is there.
    start = time.perf_counter()
    again = Replica.resumed(setting, trained, path, group)
    resume_s = time.perf_counter() - start
    with again.executable.context():
        for _ in range(RESUMED_STEPS):
            again.step(parts)
    found, expected = (
        torch.cat([value.flatten().double() for value in each.executable.weights().values()])
        for each in (again, replica)
    )
    return {
        "save_s": save_s, "resume_s": resume_s, "checkpoint_bytes": path.stat().st_size,
        "resume_error": relative_error(found, expected), "resume_limit": RESUMED_LIMIT,
    }  # fmt: skip


class Meetings:
    """Points that ranks pass together, however long one of them computes alone before.

    A step's collectives wait for `silence_s`. The first rank's gate may take longer, and so may turns of settings in
    which a rank has no part. So here ranks wait in gloo, which blocks and does not spin, with the time of the whole
    run: a rank that hangs is ended by its keeper, and gloo notices the lost connection.
    """

    def __init__(self, worlds: list[int], limit_s: float, emit: Emit) -> None:
        self._emit, limit = emit, timedelta(seconds=limit_s)
        sizes = sorted({*worlds, dist.get_world_size()})
        self._groups = {size: dist.new_group(list(range(size)), timeout=limit, backend="gloo") for size in sizes}

    def wait(self, stage: str, world: int | None = None) -> None:
        """Wait for the first `world` ranks, or for all."""
        self._emit("waits", stage=stage)
        dist.barrier(self._groups[world or dist.get_world_size()])
        self._emit("alive", stage=stage)


def measure(
    replicas: dict[RankSetting, tuple[Replica, Parts]],
    settings: list[RankSetting],
    rounds: int,
    steps: int,
    emit: Emit,
    meetings: Meetings,
) -> None:
    """Take turns: in each round every setting makes its steps, in an order that changes from round to round."""
    rank = dist.get_rank()
    for number in range(rounds):
        shift = number % len(settings)
        for setting in settings[shift:] + settings[:shift]:
            meetings.wait(f"round {number + 1}")
            if setting not in replicas:
                continue
            replica, parts = replicas[setting]
            with replica.executable.context():
                taken = []
                for _ in range(steps):
                    taken.append(replica.step(parts))
                    emit("alive", stage=f"round {number + 1}")
            fields = dataclasses.asdict(setting) | {"round": number, "rank": rank}
            emit("steps", **fields, compute_s=[c for c, _ in taken], total_s=[t for _, t in taken])
    meetings.wait("end")


def refusal(trained: RankedCase, settings: list[RankSetting]) -> str | None:
    """Reason why something cannot be trained over ranks here, or None."""
    if trained.device == "cuda":
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if gpus < ranks:
            return f"{ranks} ranks of this machine take a GPU each, and torch sees {gpus}"
    variant, workload = VARIANTS[trained.variant], trained.workload
    if variant.compiler or variant.runtime or variant.precision != "fp32":
        return "only variants that run eagerly in fp32 are trained over ranks"
    for setting in settings:
        least, there = setting.world * setting.accumulate, setting.joint_batch(workload.batch)
        if there < least:
            wanted = least if setting.scaling == "strong" else setting.accumulate
            return (
                f"{there} sequences of a step ({setting.scaling}) do not fill {least} micro-batches of {setting.world} "
                f"ranks; take a larger batch, as {workload.name.partition('@')[0]}@batch={wanted}"
            )
    return variant.why_not(trained.device, "training", workload)


def run(task: dict[str, Any], emit: Emit) -> None:
    """Join the others, pass the gate, measure."""
    torch.set_num_threads(task["threads"])
    emit("alive", stage="plugins")
    load_plugins(task["plugins"])
    emit("computes", stage="imports")
    importlib.import_module("torch._dynamo")  # as the first optimizer would, for 3.5 s in which other ranks wait
    emit("waits", stage="join")
    workload = find_workload(task["workload"])
    trained = RankedCase(workload, task["variant"], task["device"])
    settings = [RankSetting(**fields) for fields in task["settings"]]
    if reason := refusal(trained, settings):
        emit("unavailable", reason=reason)
        return
    if trained.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first rank may be here long before the last one has imported torch.
    dist.init_process_group("gloo", timeout=timedelta(seconds=task["join_s"]))
    rank = dist.get_rank()
    worlds = sorted({setting.world for setting in settings})
    meetings = Meetings(worlds, task["limit_s"], emit)
    # A group has half an hour of its own unless told otherwise.
    patience = timedelta(seconds=task["silence_s"])
    groups = {world: dist.new_group(list(range(world)), timeout=patience, backend=task["backend"]) for world in worlds}
    emit("alive", stage="join")
    weights = starting_weights(workload, WEIGHTS_SEED)
    replicas: dict[RankSetting, tuple[Replica, Parts]] = {}
    checkpoint = Path(task["checkpoint"])
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        stage = f"gate, {setting.world} ranks"
        meetings.wait(stage)
        if rank >= setting.world:
            continue
        group = groups[setting.world]
        verdict = check(setting, trained, group, task["seed"], functools.partial(emit, "computes", stage=stage))
        if verdict is not None:
            emit("gate", **dataclasses.asdict(setting), batch=setting.joint_batch(workload.batch), **verdict)
        meetings.wait(f"checkpoint, {setting.world} ranks", setting.world)
        resumed = check_resumed(setting, trained, group, checkpoint)
        emit("resumed", **dataclasses.asdict(setting), **resumed)
        replica = Replica(setting, trained, weights, group)
        replicas[setting] = replica, replica.parts(trained.joint(setting).make_batch(TIMED_SEED))
        with replica.executable.context():
            for _ in range(WARM_STEPS):
                replica.step(replicas[setting][1])
    measure(replicas, settings, task["rounds"], task["steps"], emit, meetings)
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
