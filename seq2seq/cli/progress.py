"""Terminal output of a training: a bar on a terminal, one line per validation everywhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seq2seq.training.settings import Progress as TrainingProgress
from seq2seq.training.settings import TrainSettings


class TrainingBar:
    """A bar as far as the limit of steps or, without one, of epochs; a context manager, inside which it is shown.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            # Each refresh takes CPU time from training.
            refresh_per_second=2,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=settings.steps or settings.epochs)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def tick(self, progress: TrainingProgress, validation_loss: float | None) -> None:
        """Take a step, or a validation."""
        done = progress.step if self._settings.steps else progress.epoch
        text = f"step {progress.step}, epoch {progress.epoch + 1}"
        self._bar.update(self._task, completed=done, description=text)
        if validation_loss is not None:
            best = " (lowest)" if progress.best_step == progress.step else ""
            self._console.print(f"step {progress.step}: validation loss {validation_loss:.4g}{best}")
