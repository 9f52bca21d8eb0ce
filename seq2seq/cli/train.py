"""`train`: a task into a folder, and the same run resumed with what it began with."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.host.usage import meant
from seq2seq.cli import plots
from seq2seq.cli.command_input import CommandError, model_folder, usage
from seq2seq.cli.progress import TrainingBar
from seq2seq.data.errors import DataUnavailableError
from seq2seq.execution.variants import VARIANTS
from seq2seq.layers.likelihoods import LOSSES
from seq2seq.models import checkpoint
from seq2seq.models.base import Config, Model
from seq2seq.models.cost import built_parameters
from seq2seq.models.weights import Weights
from seq2seq.runtimes.runtime import digest_of
from seq2seq.tasks.registry import TASKS
from seq2seq.tasks.task import Task
from seq2seq.training.folder import TrainFolder
from seq2seq.training.settings import TrainSettings
from seq2seq.training.trainer import Trainer, variant_of

RUNS = Path("results") / "training"
#: Options of a resumed run that may differ from those it began with.
LIMITS = ("epochs", "steps", "patience")
#: Options that are fields of `TrainSettings` as they are.
SETTINGS = (
    "variant", "device", "seed", "batch", "learning_rate", "weight_decay", "schedule", "warmup", "clip", "epochs",
    "steps", "evaluate_every", "patience",
)  # fmt: skip
#: Number of validations that are spread over a run with a step limit.
VALIDATIONS = 10


def train(arguments: argparse.Namespace) -> int:
    """Train, evaluate, draw the curve."""
    given = _given(arguments)
    begun = _begun(arguments, given) if arguments.resume else None
    if begun:
        given = begun["given"] | {name: given[name] for name in LIMITS if name in given}
    # Sums in another number of parts round otherwise.
    if threads := begun["threads"] if begun else arguments.threads:
        torch.set_num_threads(threads)
    task = _task(arguments.task, given)
    settings = usage(lambda: _settings(task, given))
    if begun:
        settings = usage(lambda: _settings_of(begun, settings))
    config, weights = _start(task, given)
    facts = _facts(arguments.task, given, settings, config, weights)
    if begun:
        _refuse_other_data(begun, facts)
        facts |= _history(begun, facts)
        out = arguments.out
    else:
        out = arguments.out or RUNS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{arguments.task}"
    kept = {"name": task.name, "state": task.state()}

    def save(model: Model) -> None:
        checkpoint.save_pretrained(model, TrainFolder(out).model, kept)

    trainer = usage(lambda: Trainer(task, config, settings, weights=weights, save_model=save))
    # Made last, so that nothing is left of what was refused.
    folder = TrainFolder.open(out) if begun else usage(lambda: TrainFolder.create(out))
    trainer.folder = folder
    if begun and (state := usage(folder.load)):
        usage(lambda: trainer.resume(state))
    with contextlib.nullcontext() if begun else folder.removed_unless_trained():
        folder.write_run(facts)
        # Suited to the model, it may say more about the data.
        for line in getattr(trainer.task, "notes", ()):
            print(line)
        print(f"{config.family} of {facts['parameters']:,} parameters by {facts['variant']}, into {folder.path}")
        return _finish(trainer, task, folder, facts)


def _begun(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The run.json of the run to continue, after a check of the other options."""
    if arguments.out is None:
        msg = "--resume continues the run in --out; name it"
        raise CommandError(msg)
    begun: dict[str, Any] = usage(lambda: TrainFolder.open(arguments.out).read_run())
    changed = [name for name, value in given.items() if name not in LIMITS and begun["given"].get(name) != value]
    if changed:
        options = ", ".join("--" + name.replace("_", "-") for name in changed)
        msg = f"--resume continues with what the run began with; leave out {options}"
        raise CommandError(msg)
    if arguments.threads not in {None, begun["threads"]}:
        msg = f"--resume continues with the {begun['threads']} threads that the run began with, since others round "
        raise CommandError(msg + "otherwise; leave out --threads, or begin a new run")
    return begun


def _settings_of(begun: dict[str, Any], settings: TrainSettings) -> TrainSettings:
    """The settings that a run began with, whatever the defaults are by now, with the limits that hold now."""
    kept = {name: value for name, value in begun["settings"].items() if name not in LIMITS}
    kept |= {"variant": begun["variant"], "freeze": tuple(kept["freeze"])}
    return dataclasses.replace(settings, **kept)


def _history(begun: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of the beginning that run.json keeps, and a line if other releases continue it."""
    found = {"versions": begun["versions"], "resumed_with": begun.get("resumed_with", [])}
    if facts["versions"] not in (found["versions"], *found["resumed_with"]):
        before, now = (", ".join(map(" ".join, one.items())) for one in (begun["versions"], facts["versions"]))
        print(f"begun with {before}; {now} continues it, and may round differently", file=sys.stderr)
        found["resumed_with"].append(facts["versions"])
    return found


def _finish(trainer: Trainer, task: Task, folder: TrainFolder, facts: dict[str, Any]) -> int:
    """Train to the end and report the result; or save, and say how to continue."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        # The second time, the user does not want to wait for the step.
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.stopping = True

    with _signals(stop), TrainingBar(trainer.settings) as bar:
        progress = trainer.run(bar.tick)
    if folder.curve_path.exists():
        plots.curve(list(folder.curve()), folder.path / "curve.png", _loss_name(trainer.config))
    if not progress.ended:
        again = f"python -m seq2seq train {task.name} --out {shlex.quote(str(folder.path))} --resume"
        print(f"interrupted at step {progress.step}, which is saved; to continue: {again}", file=sys.stderr)
        return 128 + received[0] if received else 130
    print(f"ended by {progress.ended}, after {progress.training_s:.1f} s of training")
    result = dataclasses.asdict(progress)
    try:
        result["scores"] = trainer.evaluate()
    except DataUnavailableError as error:
        print(f"the scores are left out: {error}", file=sys.stderr)
    folder.write_run(facts | {"result": result})
    print(f"lowest validation loss {progress.best_loss:.4g} at step {progress.best_step}; its weights: {folder.model}")
    for name, value in result.get("scores", {}).items():
        print(f"  {name}: {value:.4g}")
    return 0


def _loss_name(config: Config) -> str:
    """Name of a model's loss, for the axis of its curve."""
    usual = "cross entropy (nats per token)" if config.target_vocabulary else LOSSES[config.likelihood]
    return config.loss_name or usual


@contextmanager
def _signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Send Ctrl-C and SIGTERM to a handler inside the block; only the main thread can set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line, as run.json keeps them."""
    passing = {"command", "task", "out", "resume", "threads"}
    found = {name: value for name, value in vars(arguments).items() if name not in passing and value is not None}
    for name in ("option", "rate"):
        if name in found:
            found[name] = dict(found[name])
    return found


def _refuse_other_data(begun: dict[str, Any], facts: dict[str, Any]) -> None:
    others = {
        "task": "another task",
        "data_sha256": "other data",
        "config": "another model by its data",
        "init_digest": "other weights in --init",
    }
    for name, what in others.items():
        # Earlier releases did not keep all of them.
        if (begun.get(name) or facts[name]) != facts[name]:
            msg = f"the run was begun with {what}, so it cannot be resumed; begin a new one"
            raise CommandError(msg)


def _task(name: str, given: dict[str, Any]) -> Task:
    path = Path(given["data"]) if "data" in given else None
    # A name of built-in data is not a file.
    data = given.get("data") if path is not None and not path.exists() else path
    task: Task = usage(lambda: TASKS[name](data, **given.get("option", {})))
    return task


def _settings(task: Task, given: dict[str, Any]) -> TrainSettings:
    """The settings: what was given, else what the task says, else what holds for all."""
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    defaults: dict[str, Any] = {"schedule": "cosine"}
    defaults |= {name: getattr(task, name) for name in ("learning_rate", "batch", "steps") if hasattr(task, name)}
    defaults |= {name: value for name, value in getattr(task, "defaults", {}).items() if name in names}
    limits = {"epochs", "steps"}
    if limits & given.keys():
        defaults = {name: value for name, value in defaults.items() if name not in limits}
    chosen = defaults | {name: given[name] for name in SETTINGS if name in given}
    if chosen.get("steps") is not None:
        chosen.setdefault("epochs", None)
        chosen.setdefault("evaluate_every", max(1, chosen["steps"] // VALIDATIONS))
    if chosen.get("variant") not in {None, *VARIANTS}:
        msg = f"there is no variant {chosen['variant']!r}; {meant(chosen['variant'], VARIANTS)}"
        raise CommandError(msg)
    return TrainSettings(**chosen, freeze=tuple(given.get("freeze", ())), rates=given.get("rate", {}))


def _start(task: Task, given: dict[str, Any]) -> tuple[Config, Weights | None]:
    """Sizes of the model, and the weights to start from where some are named."""
    config = usage(lambda: task.model_config(given.get("model", "lstm"), given.get("size", "small")))
    if "init" not in given:
        return config, None
    found = usage(lambda: checkpoint.from_pretrained(model_folder(given["init"])))
    if not {"model", "size"} & given.keys():
        # Sizes of the model that is tuned, where none were asked for; what the data decides must fit.
        sizes = ("input_size", "target_size", "output_size", "source_vocabulary", "target_vocabulary")
        other = [name for name in sizes if getattr(found.config, name) != getattr(config, name)]
    else:
        other = [] if found.config == config else ["sizes"]
    if other:
        msg = f"{given['init']} has other {' and '.join(other)} than this task's model, so it cannot be tuned on it"
        raise CommandError(msg)
    saved = (found.task_state or {}).get("state", {})
    # A model knows tokens by number: another vocabulary would give every word another meaning.
    if saved.get("tokenizer") != task.state().get("tokenizer"):
        msg = f"{given['init']} was trained with another vocabulary, so its tokens mean other words here"
        raise CommandError(msg)
    return found.config, {name: value.float() for name, value in found.model.state_dict().items()}


def _facts(
    task: str, given: dict[str, Any], settings: TrainSettings, config: Config, weights: Weights | None
) -> dict[str, Any]:
    """The content of run.json."""
    name = variant_of(config, settings)
    return {
        "task": task,
        "given": given,
        "settings": dataclasses.asdict(settings),
        "variant": name,
        "variant_summary": VARIANTS[name].summary,
        "family": config.family,
        "config": dataclasses.asdict(config),
        "parameters": built_parameters(config),
        "data_sha256": _data_digest(given.get("data")),
        "init_digest": "" if weights is None else digest_of(weights).hex(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _data_digest(data: str | None) -> str:
    """Digest of a file, or of the recordings and transcripts of a folder; none of data that comes along."""
    path = Path(data or "")
    if not data or not path.exists():
        return ""
    found = hashlib.sha256()
    if path.is_file():
        found.update(path.read_bytes())
    else:
        for one in sorted(path.rglob("*")):
            if one.suffix.lower() in {".wav", ".txt", ".tsv"} and one.is_file():
                found.update(os.fsencode(one.relative_to(path)) + b"\0")
                found.update(hashlib.sha256(one.read_bytes()).digest())
    return found.hexdigest()
