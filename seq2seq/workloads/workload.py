"""Workloads: named, citable problems, each made of a model's sizes, a batch, lengths and their sources."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seq2seq.data import windows
from seq2seq.data.batch import Batch
from seq2seq.data.lengths import Lengths
from seq2seq.models.base import Config
from seq2seq.workloads import synthetic

#: Sizes that an override may change.
AXES = ("batch", "hidden", "length", "layers", "beam")
#: Those of the model itself.
MODEL_AXES = ("hidden", "layers")


class UnknownWorkloadError(ValueError):
    """No workload of that name, or an override it does not take."""


@dataclass(frozen=True)
class Workload:
    """A problem to measure.

    Attributes:
        name: what it is called, overrides included.
        summary: one line for people.
        source: who uses these sizes.
        data: `real: ...` or `synthetic: ...`.
        config: sizes of the model. Dropout is off: its random stream differs between implementations, so results
            could not be compared.
        batch: sequences in a batch.
        source_steps: longest source.
        target_steps: longest target; None when there is none, as in the seed, whose decoder reads the source.
        source_lengths, target_lengths: length distributions; None when every sequence fills all steps.
        label_steps: most labels of a sequence, for a model that has no decoder and gets labels without their places
            (CTC); None for any other.
        label_lengths: distribution of the labels' number.
        beam: hypotheses of a sequence in the mode `decode`; 1 is greedy.
        temperatures: whether the batches are windows of the Seattle temperatures.
        checkpoint: folder or hub name that the weights come from; drawn from a seed when empty.
    """

    name: str
    summary: str
    source: str
    data: str
    config: Config
    batch: int
    source_steps: int
    target_steps: int | None = None
    source_lengths: Lengths | None = None
    target_lengths: Lengths | None = None
    temperatures: bool = False
    beam: int = 1
    label_steps: int | None = None
    label_lengths: Lengths | None = None
    checkpoint: str = ""

    @property
    def has_lengths(self) -> bool:
        """Return whether sequences differ in length."""
        return self.source_lengths is not None or self.target_lengths is not None

    @property
    def decoded_steps(self) -> int | None:
        """Longest sequence that a decoder reads; None for a single LSTM."""
        return (self.target_steps or self.source_steps) if self.config.decodes else None

    def refuses(self, variant: Any, mode: str) -> str | None:
        """Reason why a variant is not a way to execute this workload, besides what its requirements say, or None."""
        del variant, mode
        return None

    def make_batch(self, seed: int) -> Batch:
        """The batch of a seed, on the CPU; equal seeds give equal batches.

        Raises:
            DataUnavailableError: when real data is not installed.
        """
        if self.temperatures:
            return windows.temperature_batch(self.batch, self.source_steps, self.target_steps or 1, seed)
        if self.label_steps is not None:
            return synthetic.labelled_batch(
                self.config,
                self.batch,
                self.source_steps,
                self.label_steps,
                seed,
                self.source_lengths,
                self.label_lengths,
            )
        return synthetic.random_batch(
            self.config,
            self.batch,
            self.source_steps,
            self.target_steps,
            seed,
            self.source_lengths,
            self.target_lengths,
        )


def scaled(base: Workload, name: str, *, config: Mapping[str, Any], **sizes: Any) -> Workload:
    """A smaller twin of a workload, named as such, with other sizes of the model and of the batch."""
    return dataclasses.replace(
        base,
        name=name,
        summary=f"{base.name} scaled down for 2 cores: {base.summary}",
        source=f"scaled down from: {base.source}",
        config=dataclasses.replace(base.config, **config),
        **sizes,
    )


def overridden(workload: Workload, overrides: str) -> Workload:
    """A workload with sizes changed.

    Args:
        workload: whose name begins the message of what is raised.
        overrides: `AXIS=NUMBER`, several divided by commas.

    Raises:
        UnknownWorkloadError: for an override that does not exist, comes twice, or a size out of range.
    """
    base = workload.name
    given: set[str] = set()
    for part in overrides.split(","):
        match = re.fullmatch(r"(\w+)=(\d+)", part)
        if not match or match[1] not in AXES or int(match[2]) < 1:
            msg = f"override {part!r} of {base}: expected AXIS=NUMBER with AXIS one of {', '.join(AXES)}, NUMBER >= 1"
            raise UnknownWorkloadError(msg)
        if match[1] in given:
            msg = f"override {match[1]} of {base} is given twice; give it once"
            raise UnknownWorkloadError(msg)
        given.add(match[1])
        try:
            workload = _override(workload, match[1], int(match[2]))
        except ValueError as error:
            msg = f"override {part!r} of {base}: {error}"
            raise UnknownWorkloadError(msg) from error
    return workload


def _override(workload: Workload, axis: str, value: int) -> Workload:
    if axis == "batch":
        return dataclasses.replace(workload, batch=value)
    if axis == "beam":
        return dataclasses.replace(workload, beam=value)
    if axis in MODEL_AXES and workload.checkpoint:
        msg = f"a checkpoint has weights of its own sizes; change {', '.join(a for a in AXES if a not in MODEL_AXES)}"
        raise ValueError(msg)
    if axis == "hidden":
        return dataclasses.replace(workload, config=dataclasses.replace(workload.config, hidden_size=value))
    if axis == "layers":
        return dataclasses.replace(workload, config=dataclasses.replace(workload.config, num_layers=value))
    # Length: target and labels keep their proportion to the source.
    target, labels = (
        None if steps is None else max(1, round(steps * value / workload.source_steps))
        for steps in (workload.target_steps, workload.label_steps)
    )
    positions = workload.config.positions
    if positions is not None and max(value, target or 0) > positions:
        msg = f"the model has {positions} positions, so at most that many steps are possible"
        raise ValueError(msg)
    return dataclasses.replace(workload, source_steps=value, target_steps=target, label_steps=labels)
