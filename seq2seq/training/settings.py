"""Settings and progress of a training run, and the learning rate that follows from both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEDULES = ("constant", "cosine")
#: Above it a step of Adam is not a float32.
MOST_RATE = 1e30


@dataclass(frozen=True)
class TrainSettings:
    """Settings that decide a run, besides the data.

    Attributes:
        variant: key of `VARIANTS`; torch's own way on that device when "".
        device: `cpu` or `cuda`.
        seed: of the weights, of the order of the data, and of dropout.
        batch: sequences in a batch.
        learning_rate: of Adam, after the warm-up.
        weight_decay: of AdamW; 0 makes it Adam.
        schedule: `constant`, or `cosine`, which falls to 0 at the limit that ends the run.
        warmup: steps in which the learning rate rises from 0.
        clip: largest norm of all gradients together; 0 for none.
        epochs, steps: limits, the first that is met ends the run; None is none.
        evaluate_every: steps between validations; an epoch when None.
        patience: validations without a new lowest loss after which the run ends; 0 for never.
        freeze: patterns of parameters that stay as they are.
        rates: factors of the learning rate by pattern of parameters; the first that matches holds.

    Raises:
        ValueError: for a value out of range.
    """

    variant: str = ""
    device: str = "cpu"
    seed: int = 0
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    epochs: int | None = 20
    steps: int | None = None
    evaluate_every: int | None = None
    patience: int = 5
    freeze: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("steps", 1), ("evaluate_every", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                msg = f"{name} is {value}, expected at least {least}"
                raise ValueError(msg)
        for name in ("weight_decay", "warmup", "clip", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                msg = f"{name} is {getattr(self, name)}, expected at least 0"
                raise ValueError(msg)
        if not 0 < self.learning_rate <= MOST_RATE:
            msg = f"learning_rate is {self.learning_rate}, expected above 0 and at most {MOST_RATE:g}"
            raise ValueError(msg)
        if self.schedule not in SCHEDULES:
            msg = f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}"
            raise ValueError(msg)
        if self.epochs is None and self.steps is None:
            msg = "neither epochs nor steps limits the run; give one"
            raise ValueError(msg)


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: optimizer steps taken.
        epoch: the epoch that the next batch is of, from 0.
        position: batches of that epoch that are done.
        best_loss: lowest validation loss so far; infinite before the first.
        best_step: where that was.
        waited: validations since then.
        evaluated_step: step of the latest validation.
        training_s: seconds of steps, without validation.
        ended: why the run ended, in words; empty while it runs.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    evaluated_step: int = 0
    training_s: float = 0.0
    ended: str = ""


def rate_factor(settings: TrainSettings, step: int, total: int) -> float:
    """Factor of the learning rate for the next step.

    Args:
        settings: of the run.
        step: steps taken.
        total: steps that the run takes at most.
    """
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "cosine":
        factor *= (1 + math.cos(math.pi * min(1.0, step / total))) / 2
    return factor
