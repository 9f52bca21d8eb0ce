"""Checks of the input of all commands: a complaint becomes one line, and nothing that exists is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from seq2seq.data.errors import DataUnavailableError
from seq2seq.models import checkpoint
from seq2seq.training.folder import TrainFolder, TrainingError


class CommandError(ValueError):
    """Bad input; the message is one line."""


def model_folder(name: str) -> Path:
    """The folder of a model: that of a run's best weights, or itself."""
    folder = TrainFolder(Path(name))
    return folder.model if (folder.path / "run.json").is_file() else folder.path


def usage(action: Callable[[], Any]) -> Any:
    """The value of an action, whose complaints about input become one line."""
    try:
        return action()
    except (CommandError, OSError):
        raise
    except (ValueError, TrainingError, DataUnavailableError, checkpoint.CheckpointError) as error:
        raise CommandError(" ".join(str(error).split())) from error


def refuse_existing(*paths: Path | None) -> None:
    """Refuse files to be written that exist, that are the same, or whose folder there is not.

    Raises:
        CommandError: naming the first.
    """
    given = [path.resolve() for path in paths if path is not None]
    if len(set(given)) < len(given):
        msg = f"{given[0]} is named for two things; name another file for one of them"
        raise CommandError(msg)
    for path in paths:
        if path is not None and path.exists():
            msg = f"{path} exists, and nothing is overwritten; name another file"
            raise CommandError(msg)
        if path is not None and not path.parent.is_dir():
            msg = f"{path}: there is no folder {path.parent}; make it, or name another file"
            raise CommandError(msg)
