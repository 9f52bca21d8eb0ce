"""Time to quality: variants train one task from the same weights on the same batches until they are good enough.

Each variant has a worker process of its own until it drops out, all alive at once and one at work: in each round every
variant takes its block of steps, in a new random order, so that whatever disturbs the machine meets all of them alike.
The gate judges each before its first and after its last step.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.plan.cases import REFERENCE, Filters, Quality, match
from bench.records.quality import FILE, QualityRecord, Trained, figures, task_name, write
from bench.records.schema import Status
from bench.run.worker_process import Event, Settings, Worker, WorkerError

#: What a worker says of its own time may differ from the parent's clock by so much: start and end of a request.
SLACK_S, SLACK_SHARE = 0.5, 0.25
#: A rough guess of the length of a stage, for the expected time: a variant's start and gates, and one of its steps.
START_S, STEP_S = 15.0, 0.15


def expected_s(parts: Iterable[Quality]) -> float:
    """A rough guess of how long the parts take, as if half of their steps were enough and half of the variants ran."""
    return sum(len(part.variants) / 2 * (START_S + STEP_S * part.steps / 2) for part in parts)


def narrowed(parts: Iterable[Quality], catalogue: dict[str, Any], filters: Filters) -> tuple[Quality, ...]:
    """The parts with the names of their variants; those that the command line names replace the suite's.

    Speedups need the reference, so it joins every part.

    Args:
        parts: of a suite.
        catalogue: as for `bench.plan.cases.expand`.
        filters: what the command line said.

    Raises:
        UsageError: for a pattern that selects nothing.
    """
    names = [entry["name"] for entry in catalogue["variants"]]
    found = []
    for part in parts:
        chosen = match(filters.variants or part.variants, names, "variant")
        # A second name for the same variant would train the same curve again.
        chosen = [name.partition("#")[0] for name in chosen]
        ordered = dict.fromkeys([*(name for name in (REFERENCE,) if name in names), *chosen])
        found.append(dataclasses.replace(part, variants=tuple(ordered)))
    return tuple(found)


class Stage:
    """The training of one part's variants.

    Args:
        part: what to train.
        settings: of the workers.
        device: `cpu` or `cuda`.
        seed: of gates, order of turns and order of the data.
        limit_s: longest silence of a worker, seconds.
        log: file that takes what workers print.
        cache: folder for whatever compilers cache.
    """

    def __init__(
        self, part: Quality, settings: Settings, device: str, seed: int, limit_s: float, log: Path, cache: Path
    ) -> None:
        self.part, self.settings, self.device, self.seed, self.limit_s = part, settings, device, seed, limit_s
        self._log, self._cache = log, cache
        self._metric = ""
        self._workers: dict[str, Worker] = {}
        self.trained: dict[str, Trained] = {}

    def run(self, variants: Iterable[str], status: Callable[[str], object]) -> list[QualityRecord]:
        """Train them all; whatever happens to one is its own record.

        Args:
            variants: names.
            status: called with a line about each step.
        """
        try:
            self._train(variants, status)
        finally:
            for name in list(self._workers):
                self._dismiss(name)
        return figures(self.part, self._metric, self.device, self.settings.threads, self.trained)

    def _train(self, variants: Iterable[str], status: Callable[[str], object]) -> None:
        """Gate all, then let them take turns until all are good enough or no steps are left, then gate again."""
        for name in variants:
            status(f"time to quality: {name}, build and gate")
            self.trained[name] = Trained(name)
            self._guarded(name, lambda name=name: self._begin(name))  # type: ignore[misc]
        order = random.Random(self.seed)  # noqa: S311 - an order, not a secret
        step = 0
        while self._running() and step < self.part.steps and not self._all_reached():
            steps = min(self.part.block, self.part.steps - step)
            step += steps
            turns = self._running()
            order.shuffle(turns)
            for name in turns:
                status(f"time to quality: step {step} of at most {self.part.steps}, {name}")
                self._guarded(name, lambda name=name, steps=steps: self._block(name, steps))  # type: ignore[misc]
        for name in self._running():
            self._guarded(name, lambda name=name: self._end(name))  # type: ignore[misc]

    def _running(self) -> list[str]:
        return list(self._workers)

    def _all_reached(self) -> bool:
        """Return whether every variant that still runs has reached the target: all take the same number of steps."""
        for name in self._running():
            one = self.trained[name]
            if not one.rounds or one.step_at(self.part.target_share * one.rounds[0]["baseline"]) is None:
                return False
        return True

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except WorkerError as error:
            self._drop(name, error.status, error.reason)
        # Its threads would disturb the steps of the others.
        if "status" in self.trained[name].fields:
            self._dismiss(name)

    def _dismiss(self, name: str) -> None:
        """End a variant's process, if it has one."""
        if worker := self._workers.pop(name, None):
            worker.__exit__()

    def _begin(self, name: str) -> None:
        worker = self._workers[name] = Worker(self.settings, self._log, self._cache).__enter__()
        request = {"part": dataclasses.asdict(self.part), "variant": name, "device": self.device, "seed": self.seed}
        for event in worker.ask("quality", self.limit_s, action="begin", **request):
            if event["event"] == "described":
                self._metric = event["metric"]
                if event["reason"]:
                    self._drop(name, Status.UNAVAILABLE, event["reason"])
            self._gate(name, event)

    def _block(self, name: str, steps: int) -> None:
        start = time.perf_counter()
        found: Event = {}
        for event in self._workers[name].ask("quality", self.limit_s, action="block", steps=steps):
            if event["event"] == "block":
                found = event
        wall_s = time.perf_counter() - start
        told_s = found["prepare_s"] + found["training_s"] + found["evaluation_s"]
        if not 0 < told_s <= wall_s or wall_s - told_s > SLACK_S + SLACK_SHARE * wall_s:
            reason = f"its clock reported {told_s:.2f} s for a block that took {wall_s:.2f} s"
            self._drop(name, Status.PARITY_FAILED, reason)
            return
        one, scores = self.trained[name], found["scores"]
        one.losses += found["losses"]
        row = {key: found[key] for key in ("step", "training_s", "evaluation_s", "why")}
        one.rounds.append(row | {"quality": scores[self._metric], "baseline": scores[self.part.baseline]})

    def _end(self, name: str) -> None:
        for event in self._workers[name].ask("quality", self.limit_s, action="end", seed=self.seed):
            self._gate(name, event)

    def _gate(self, name: str, event: Event) -> None:
        if event["event"] != "gate":
            return
        fields = self.trained[name].fields
        for error, limit in (("parity_error", "parity_limit"), ("grad_error", "grad_limit")):
            if event[error] is None:
                continue
            nearest = fields.get("parity_error", 0.0) / fields.get("parity_limit", 1.0)
            if not event[error] / event[limit] <= nearest:
                fields |= {"parity_error": event[error], "parity_limit": event[limit]}
        if not event["passed"]:
            self._drop(name, Status.PARITY_FAILED, f"{event['reason']} (gate {event['when']} the training)")

    def _drop(self, name: str, status: Status, reason: str) -> None:
        self.trained[name].fields |= {"status": status, "reason": reason}


def done(folder: Path) -> bool:
    """Return whether a run folder has this stage already."""
    return (folder / FILE).exists()


def line(record: QualityRecord) -> str:
    """Describe a record in a line."""
    if record.status is not Status.OK:
        return f"time to quality, {record.variant}: {record.status.value}: {record.reason}"
    if record.time_to_target_s is None:
        how = f"not reached in {record.steps} steps; best {record.best_quality:.3g}"
    else:
        how = f"{record.time_to_target_s:.1f} s, {record.steps_to_target} steps"
    return f"time to quality, {record.variant}: {record.metric} {record.target:.3g}: {how}"


def run(  # noqa: PLR0913, PLR0917 - all that a stage is made of
    parts: Iterable[Quality],
    folder: Path,
    settings: Settings,
    device: str,
    seed: int,
    limit_s: float,
    cache: Path,
    status: Callable[[str], object],
) -> list[QualityRecord]:
    """Train all parts and write what was found into a run folder; nothing when that is there already.

    Args:
        parts: what to train, their variants by name.
        folder: the run's.
        settings: of the workers.
        device: `cpu` or `cuda`.
        seed: see `Stage`.
        limit_s: longest silence of a worker, seconds.
        cache: folder for whatever compilers cache.
        status: called with a line about each step.

    Raises:
        OSError: when something cannot be written.
    """
    if done(folder):
        return []
    records: list[QualityRecord] = []
    raw: list[tuple[str, Trained]] = []
    for part in parts:
        stage = Stage(part, settings, device, seed, limit_s, folder / "workers.log", cache)
        records += stage.run(part.variants, status)
        raw += [(task_name(part), one) for one in stage.trained.values()]
    if records:
        write(folder, records, raw)
    return records
