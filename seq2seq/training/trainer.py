"""Training: any task, with a model of any family, executed in any variant that has gradients.

A run is a function of its settings: on a CPU two runs of one seed give the same weights, and a run that was
interrupted anywhere and resumed gives those of one that was not. So that curves of variants can be compared, validation
always runs the same way, by `torch.nn.LSTM` in fp32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kernels.common.cudnn_precision import cudnn_precision
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models import layer_groups as pretrained
from seq2seq.models.base import IGNORE_TOKEN, Config, Model
from seq2seq.models.weights import Weights, initial_weights
from seq2seq.tasks.task import Task, suited
from seq2seq.training.folder import TrainFolder, TrainingError
from seq2seq.training.settings import Progress, TrainSettings, rate_factor
from seq2seq.training.task_workload import task_workload

#: Steps after which losses are looked at: reading one waits for the device.
LOOK_STEPS = 10
#: Seconds after which a checkpoint is written between validations.
SAVE_S = 60.0
#: Variant that trains LSTMs where none is named: what torch itself does on that device.
DEFAULT_VARIANTS = {"cpu": "onednn", "cuda": "cudnn"}


class Trainer:
    """One training run.

    Attributes:
        progress: how far it has come.
        folder: where the run is kept.
        stopping: set it to make the training save and end after the current step.

    Args:
        task: what to learn; it gives the batches that suit the model, see `seq2seq.tasks.task.suited`.
        config: sizes of the model.
        settings: how.
        folder: where the run is kept; it is not kept when None.
        weights: to start from; torch's own initialisation from the seed when None.
        save_model: writes a model's weights somewhere, called with each new best.

    Raises:
        TrainingError: when the variant cannot train here, and why, or there is nothing to validate with.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        settings: TrainSettings,
        folder: TrainFolder | None = None,
        weights: Weights | None = None,
        save_model: Callable[[Model], None] | None = None,
    ) -> None:
        task = suited(task, config)
        self.task, self.config, self.settings, self.folder = task, config, settings, folder
        if next(iter(task.batches("validation", settings.batch, settings.seed, 0)), None) is None:
            msg = f"the task {task.name} has no validation batch; give it more data"
            raise TrainingError(msg)
        self._save_model = save_model
        self.progress = Progress()
        self.stopping = False
        weights = initial_weights(config, settings.seed) if weights is None else weights
        self.executable = _executable(task, config, settings, weights)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.executable.model, settings),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._most_steps = _most_steps(task, settings)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._judge = config.build(nn.LSTM).to(settings.device).eval()
        self.best: Weights = weights
        self._pending: list[tuple[dict[str, Any], Tensor, Tensor | None]] = []
        self._saved_s = time.monotonic()
        torch.manual_seed(settings.seed)

    def run(self, tick: Callable[[Progress, float | None], object] = lambda *_: None) -> Progress:
        """Train until a limit is met, the loss no longer falls, or `stopping` is set.

        Args:
            tick: called after each step, and with the loss after each validation.

        Raises:
            TrainingError: when the loss is no longer a number, or there is no data.
        """
        progress = self.progress
        while not progress.ended:
            count = progress.position
            for batch in self._batches():
                self._step(batch)
                count += 1
                tick(progress, None)
                every = self.settings.evaluate_every
                if progress.step == self.settings.steps:
                    progress.ended = f"the limit of {progress.step} steps"
                if (every and progress.step % every == 0) or progress.ended:
                    tick(progress, self._evaluate())
                elif self.stopping or time.monotonic() - self._saved_s > SAVE_S:
                    self.save()
                if progress.ended or self.stopping:
                    return progress
            if not count:
                msg = f"the task {self.task.name} has no training batch; give it more data"
                raise TrainingError(msg)
            self._end_epoch(tick)
            if self.stopping:
                self.save()
                return progress
        return progress

    def save(self) -> None:
        """Write the checkpoint: a run resumed from it continues as if it had not been interrupted."""
        self._look()
        self._saved_s = time.monotonic()
        if self.folder is None:
            return
        cuda = self.settings.device == "cuda"
        self.folder.save(
            {
                "weights": {name: value.detach().cpu() for name, value in self.executable.model.state_dict().items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.executable.scaler.state_dict(),
                # Tasks have generators of their own, so that torch's are all there is.
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if cuda else [],
                "progress": dataclasses.asdict(self.progress),
                "best": self.best,
            }
        )

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: when it is of another model or of other settings.
        """
        try:
            self.executable.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.executable.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            self.best = state["best"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            first = str(error).splitlines()[0]
            msg = f"the checkpoint does not fit this model: {first}; begin a new run"
            raise TrainingError(msg) from error
        torch.set_rng_state(state["random"])
        if self.settings.device == "cuda":
            # The machine before may have had more GPUs; training uses the first.
            torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])
        if self.folder is not None:
            self.folder.cut(self.progress.step, self.progress.evaluated_step)
        # What ended it before may be another limit now.
        self.progress.ended = ""
        self._check_limits(epoch_ended=self.progress.position == 0)

    def evaluate(self) -> dict[str, float]:
        """Quality of the best weights, and the baselines, by name."""
        self._judge.load_state_dict(self.best)
        with self._undisturbed():
            torch.manual_seed(self.settings.seed)
            return self.task.evaluate(self._judge, self.settings.batch, self.settings.device)

    def _batches(self) -> Iterator[Batch]:
        """Batches left in the epoch."""
        settings, progress = self.settings, self.progress
        batches = self.task.batches("train", settings.batch, settings.seed, progress.epoch)
        return islice(batches, progress.position, None)

    def _step(self, batch: Batch) -> None:
        if len(self._pending) >= LOOK_STEPS:
            self._look()
        factor = rate_factor(self.settings, self.progress.step, self._most_steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        start = time.perf_counter()
        with self.executable.context():
            prepared = self.executable.prepare(batch)
            loss, norm = self.executable.step(prepared, self.optimizer, self.settings.clip or None)
        self.progress.training_s += time.perf_counter() - start
        self.progress.step += 1
        self.progress.position += 1
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch + 1,
            "learning_rate": self.settings.learning_rate * factor,
        }
        # A copy: a variant that runs in a captured graph writes the next loss into the same memory.
        self._pending.append((row, loss.detach().clone(), norm))

    def _look(self) -> None:
        """Read the losses since the last look, and write them to the curve.

        Raises:
            TrainingError: at the first that is not a number.
        """
        start = time.perf_counter()
        rows = []
        for row, loss, norm in self._pending:
            rows.append(row | {"loss": float(loss), "gradient_norm": None if norm is None else float(norm)})
        self._pending.clear()
        # On a GPU the steps themselves are waited for here.
        self.progress.training_s += time.perf_counter() - start
        bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
        if self.folder is not None and rows:
            self.folder.append(rows)
        if bad:
            msg = (
                f"the training loss is {bad['loss']} at step {bad['step']} (epoch {bad['epoch']}): lower "
                "--learning-rate, or try another --variant; the last checkpoint is from before"
            )
            raise TrainingError(msg)

    def _evaluate(self) -> float:
        """Validation loss now; keeps the weights when it is the lowest, and writes a checkpoint."""
        progress = self.progress
        self._look()
        loss = self._validation_loss()
        progress.evaluated_step = progress.step
        if self.folder is not None:
            row = {"step": progress.step, "epoch": progress.epoch + bool(progress.position), "validation_loss": loss}
            self.folder.append([row | {"training_s": round(progress.training_s, 3)}])
        if not math.isfinite(loss):
            msg = f"the validation loss is {loss} at step {progress.step}: lower --learning-rate, or look at the data"
            raise TrainingError(msg)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.waited = loss, progress.step, 0
            self.best = self.executable.weights()
            if self._save_model is not None:
                self._save_model(self._judge)
        else:
            progress.waited += 1
        self._check_limits(epoch_ended=False)
        self.save()
        return loss

    def _end_epoch(self, tick: Callable[[Progress, float | None], object]) -> None:
        self.progress.epoch += 1
        self.progress.position = 0
        self._check_limits(epoch_ended=True)
        due = not self.settings.evaluate_every or self.progress.ended
        if due and self.progress.evaluated_step != self.progress.step:
            tick(self.progress, self._evaluate())

    def _check_limits(self, *, epoch_ended: bool) -> None:
        progress, settings = self.progress, self.settings
        if settings.patience and progress.waited >= settings.patience:
            progress.ended = f"no lower validation loss in {progress.waited} validations"
        elif settings.steps is not None and progress.step >= settings.steps:
            progress.ended = f"the limit of {progress.step} steps"
        elif epoch_ended and settings.epochs is not None and progress.epoch >= settings.epochs:
            progress.ended = f"the limit of {progress.epoch} epochs"

    def _validation_loss(self) -> float:
        """Mean loss per valid step, or label, of the validation split, in fp32."""
        self._judge.load_state_dict(self.executable.model.state_dict())
        total = weight = 0.0
        batches = self.task.batches("validation", self.settings.batch, self.settings.seed, 0)
        with self._undisturbed(), torch.inference_mode():
            for batch in batches:
                moved = batch.to(self.settings.device)
                outputs = self._judge(moved.source, moved.target, moved.source_lengths, moved.target_lengths)
                steps = _expected_steps(batch)
                total += steps * float(self._judge.loss(outputs, moved.expected, moved.decoded_lengths))
                weight += steps
        return total / weight

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Judge apart from training: what is drawn inside leaves its generators as they are, and fp32 is no TF32.

        cuDNN's LSTM takes TF32 by default.
        """
        devices = range(torch.cuda.device_count()) if self.settings.device == "cuda" else []
        with torch.random.fork_rng(devices=devices), cudnn_precision("ieee"):
            yield


def variant_of(config: Config, settings: TrainSettings) -> str:
    """The variant that trains: the one named, else torch's own way, which is `reference` for a model without LSTMs."""
    return settings.variant or (DEFAULT_VARIANTS[settings.device] if config.stacks else "reference")


def why_not(task: Task, config: Config, settings: TrainSettings) -> str | None:
    """Reason why the variant cannot train this, or None."""
    variant = VARIANTS[variant_of(config, settings)]
    return variant.why_not(settings.device, "training", task_workload(task, config, settings.batch))


def _executable(task: Task, config: Config, settings: TrainSettings, weights: Weights) -> Executable:
    name = variant_of(config, settings)
    try:
        reason = why_not(task, config, settings)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if reason:
        msg = f"the variant {name} cannot train here: {reason}"
        raise TrainingError(msg)
    return Executable(VARIANTS[name], config, "training", settings.device, weights)


def _parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameters by learning rate; frozen ones take no gradients.

    Raises:
        TrainingError: for a pattern that no parameter matches, or when nothing is left to train.
    """
    try:
        pretrained.check_patterns([name for name, _ in model.named_parameters()], settings.rates)
        frozen = pretrained.freeze(model, settings.freeze)
    except pretrained.PretrainedError as error:
        raise TrainingError(str(error)) from error
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name not in frozen:
            factor = next((f for p, f in settings.rates.items() if fnmatch.fnmatchcase(name, p)), 1.0)
            groups.setdefault(factor, []).append(parameter)
    return [{"params": found, "lr": settings.learning_rate * factor} for factor, found in groups.items()]


def _most_steps(task: Task, settings: TrainSettings) -> int:
    """Steps that a run takes at most; a task gives as many batches in every epoch."""
    limits = [] if settings.steps is None else [settings.steps]
    # Counting takes a pass over the data, which a constant rate does without.
    if settings.epochs is not None and settings.schedule == "cosine":
        batches = sum(1 for _ in task.batches("train", settings.batch, settings.seed, 0))
        limits.append(settings.epochs * max(1, batches))
    return min(limits, default=1)


def _expected_steps(batch: Batch) -> int:
    """Steps of a batch, or its labels, that its loss is the mean of."""
    if not batch.expected.is_floating_point():
        return int((batch.expected != IGNORE_TOKEN).sum())
    lengths = batch.decoded_lengths
    return batch.expected.size(0) * batch.expected.size(1) if lengths is None else int(lengths.sum())
