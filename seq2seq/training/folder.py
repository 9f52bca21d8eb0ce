"""The folder of a training run: what it began with, its curve, its checkpoint, and its best model.

Files are replaced in one step, and the curve is on the disk before the checkpoint that follows it, so a process that is
killed at any moment leaves a run that can be resumed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.host.output import utf8, write_whole

#: Columns of curve.csv: one row per step, and one per validation, which has the seconds of training until then.
CURVE = ("step", "epoch", "learning_rate", "loss", "gradient_norm", "validation_loss", "training_s")
FORMAT = 1


class TrainingError(RuntimeError):
    """Training cannot start or continue; the message is one line."""


@dataclass(frozen=True)
class TrainFolder:
    """One folder that one training run writes.

    Attributes:
        path: the folder.
        made: folders that were made for it, the deepest first.
    """

    path: Path
    made: tuple[Path, ...] = ()

    @classmethod
    def create(cls, path: Path) -> TrainFolder:
        """A new folder.

        Raises:
            TrainingError: when it holds something already, or cannot be made; nothing is left of it then.
        """
        made: list[Path] = []
        try:
            made += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                what = "holds a training run" if (path / "run.json").exists() else "is not empty"
                msg = f"{path} {what}, and nothing is overwritten: continue it with --resume, or name another --out"
                raise TrainingError(msg)
        except OSError as error:
            _remove(made)
            msg = f"{path} cannot be written: {error.strerror or error}; name another folder with --out"
            raise TrainingError(msg) from error
        return cls(path, tuple(made))

    @classmethod
    def open(cls, path: Path) -> TrainFolder:
        """The folder of a run that was begun.

        Raises:
            TrainingError: when there is none.
        """
        if not (path / "run.json").is_file():
            msg = f"{path} holds no training run to resume; leave --resume out to begin one"
            raise TrainingError(msg)
        return cls(path)

    @contextlib.contextmanager
    def removed_unless_trained(self) -> Iterator[None]:
        """Remove a new folder again if the block fails before anything was trained."""
        try:
            yield
        except BaseException:
            if not (self.curve_path.exists() or self.checkpoint_path.exists() or self.model.exists()):
                (self.path / "run.json").unlink(missing_ok=True)
                _remove(self.made)
            raise

    @property
    def model(self) -> Path:
        """Folder of the best weights so far."""
        return self.path / "model"

    @property
    def curve_path(self) -> Path:
        """curve.csv."""
        return self.path / "curve.csv"

    @property
    def checkpoint_path(self) -> Path:
        """checkpoint.pt."""
        return self.path / "checkpoint.pt"

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write or replace run.json: settings, versions, and in the end the result."""
        text = json.dumps({"format": FORMAT} | facts, indent=2, ensure_ascii=False)
        write_whole(self.path / "run.json", utf8(text + "\n"))

    def read_run(self) -> dict[str, Any]:
        """run.json.

        Raises:
            TrainingError: when it cannot be read or is of another format.
        """
        path = self.path / "run.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = facts["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"{path} cannot be read ({type(error).__name__}: {error}); begin a new run"
            raise TrainingError(msg) from error
        if version != FORMAT:
            msg = f"{path} has format {version}, this release reads {FORMAT}; use the release that wrote it"
            raise TrainingError(msg)
        return facts

    def save(self, state: dict[str, Any]) -> None:
        """Write or replace the checkpoint."""
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.checkpoint_path, content.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The checkpoint; None when the run ended before its first.

        Raises:
            TrainingError: when it cannot be read.
        """
        path = self.checkpoint_path
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else ""
            msg = f"{path} cannot be read ({type(error).__name__}: {first[:200]}); begin a new run"
            raise TrainingError(msg) from error
        return state

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to the curve; they are on the disk when this returns."""
        new = not self.curve_path.exists()
        with self.curve_path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CURVE, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, step: int, evaluated_step: int) -> None:
        """Take out of the curve what a resumed run does again: what comes after a step and a validation."""
        if not self.curve_path.exists():
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, CURVE, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            row for row in self.curve() if int(row["step"]) <= (evaluated_step if row["validation_loss"] else step)
        )
        write_whole(self.curve_path, text.getvalue().encode())

    def curve(self) -> Iterator[dict[str, str]]:
        """The rows of the curve; a torn last one is left out."""
        if not self.curve_path.exists():
            return
        whole = self.curve_path.read_text(encoding="utf-8").rpartition("\n")[0]
        yield from csv.DictReader(io.StringIO(whole))


def _remove(folders: Iterable[Path]) -> None:
    """Remove empty folders."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
