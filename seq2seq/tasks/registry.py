"""Sources of batches: one task per file, real data or synthetic tensors of cited sizes.

`TASKS` has what can be trained on, by name; a task's module and its packages are imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # models import batches from here, and tasks import models
    from seq2seq.tasks.task import Task


def _load(module: str, path: Path | None = None, /, **options: Any) -> Task:
    task: Task = importlib.import_module(f"seq2seq.tasks.{module}").load(path, **options)
    return task


#: Tasks by name: called with a path, or None for the data that comes with a package, and the task's own options.
TASKS: dict[str, Callable[..., Task]] = {
    name: functools.partial(_load, name) for name in ("forecasting", "translation", "summarization", "speech")
}


def restore(name: str, state: dict[str, Any], path: Path | str | None = None, /, **options: Any) -> Task:
    """The task of a checkpoint: it can prepare sources and read outputs.

    Args:
        name: key of `TASKS`.
        state: what the task's `state` gave.
        path: data to use the model on, for a task that reads it from a file; its own, or none, when None.
        options: how to read that file, and what else the task's own `restore` takes.

    Raises:
        KeyError: for an unknown name.
        ValueError: for a state that is not one of that task.
    """
    if name not in TASKS:
        raise KeyError(name)
    given = () if path is None else (path,)
    task: Task = importlib.import_module(f"seq2seq.tasks.{name}").restore(state, *given, **options)
    return task
