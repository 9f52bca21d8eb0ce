"""What the commands do: train a task into a folder; use what was trained."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.cores import usable_cores
from seq2seq import checkpoint, plots
from seq2seq import export as deployment
from seq2seq.contract import Config, Model
from seq2seq.execution import Weights
from seq2seq.probabilistic import LOSSES
from seq2seq.tasks import TASKS, restore
from seq2seq.tasks.batch import DataUnavailableError
from seq2seq.tasks.forecasting_task import INTERPOLATED
from seq2seq.tasks.task import Task
from seq2seq.train import Settings, Trainer, variant_of
from seq2seq.train_folder import TrainFolder, TrainingError
from seq2seq.training_bar import TrainingBar
from seq2seq.variants import VARIANTS

RUNS = Path("results") / "training"
#: Options of a resumed run that may differ from those it began with.
LIMITS = ("epochs", "steps", "patience")
#: Options that are fields of `Settings` as they are.
SETTINGS = (
    "variant", "device", "seed", "batch", "learning_rate", "weight_decay", "schedule", "warmup", "clip", "epochs",
    "steps", "evaluate_every", "patience",
)  # fmt: skip
#: Where a step limit decides a run, so many validations are spread over it.
VALIDATIONS = 10


class UsageError(ValueError):
    """Bad input; the message is one line."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command of parsed arguments.

    Raises:
        UsageError: for bad input.
        TrainingError: when training fails on its way.
    """
    if getattr(arguments, "device", None) == "cuda" and not torch.cuda.is_available():
        msg = "--device cuda needs an NVIDIA GPU; this torch sees none"
        raise UsageError(msg)
    # Torch's own number of threads does not know of a container's quota.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    commands = {"train": train, "predict": predict, "translate": translate, "export": export}
    return commands[arguments.command](arguments)


def train(arguments: argparse.Namespace) -> int:
    """Train, evaluate, draw the curve."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    given = _given(arguments)
    begun = None
    if arguments.resume:
        if arguments.out is None:
            msg = "--resume goes on with the run in --out; name it"
            raise UsageError(msg)
        begun = _usage(lambda: TrainFolder.open(arguments.out).read_run())
        _refuse_changes(begun, given)
        given = begun["given"] | {name: given[name] for name in LIMITS if name in given}
    task = _task(arguments.task, given)
    settings = _usage(lambda: _settings(task, given))
    config, weights = _start(task, given)
    facts = _facts(arguments.task, given, settings, config)
    if begun:
        _refuse_other_data(begun, facts)
        out = arguments.out
    else:
        out = arguments.out or RUNS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{arguments.task}"
    kept = {"name": task.name, "state": task.state()}

    def save(model: Model) -> None:
        checkpoint.save_pretrained(model, TrainFolder(out).model, kept)

    trainer = _usage(lambda: Trainer(task, config, settings, weights=weights, save_model=save))
    # Made last, so that nothing is left of what was refused.
    folder = TrainFolder.open(out) if begun else _usage(lambda: TrainFolder.create(out))
    trainer.folder = folder
    if begun and (state := _usage(folder.load)):
        _usage(lambda: trainer.resume(state))
    folder.write_run(facts)
    # Suited to the model, it may tell more about the data.
    for line in getattr(trainer.task, "notes", ()):
        print(line)
    print(f"{config.family} of {facts['parameters']:,} parameters by {facts['variant']}, into {folder.path}")
    return _finish(trainer, task, folder, facts)


def predict(arguments: argparse.Namespace) -> int:
    """Forecast; the table goes to standard output or a file, the plot to another."""
    _refuse_existing(arguments.plot, arguments.out)
    model, task = _trained(arguments)
    if not hasattr(task, "forecast"):
        msg = f"{arguments.checkpoint} was trained on {task.name}; predict forecasts series, see translate for texts"
        raise UsageError(msg)
    forecaster: Any = task
    names = [scaled.raw.name for scaled in forecaster.series]
    if arguments.series:
        names = [arguments.series]
    if not names:
        msg = f"{arguments.checkpoint} was trained on a file; name the series to forecast with --data"
        raise UsageError(msg)
    for line in forecaster.changes([scaled for scaled in forecaster.series if scaled.raw.name in names]):
        print(line, file=sys.stderr)
    if getattr(model.config, "likelihood", "") == "quantile":
        print(INTERPOLATED, file=sys.stderr)
    found = []
    for name in names:
        start = arguments.start
        if arguments.last:
            lengths = {scaled.raw.name: len(scaled.raw.values) for scaled in forecaster.series}
            start = lengths.get(name, 0) - forecaster.horizon
        found.append(_usage(partial(forecaster.forecast, model, name, start, arguments.samples, arguments.device)))
    text = "".join(
        forecast.table().to_csv(index=False, header=not number, float_format="%.6g")
        for number, forecast in enumerate(found)
    )
    _write(text, arguments.out)
    if arguments.plot:
        plots.forecasts(found, arguments.plot)
    return 0


def translate(arguments: argparse.Namespace) -> int:
    """Translate lines."""
    _refuse_existing(arguments.attention, arguments.out)
    data, arguments.data = arguments.data, None
    model, task = _trained(arguments)
    if not hasattr(task, "predict"):
        msg = f"{arguments.checkpoint} was trained on {task.name}; translate is for texts, see predict for series"
        raise UsageError(msg)
    translator: Any = task
    if arguments.attention and not hasattr(translator, "subwords"):
        msg = f"--attention shows words, but {arguments.checkpoint} was trained on {task.name}; leave it out"
        raise UsageError(msg)
    if arguments.attention and not plots.looks(model):
        msg = f"--attention needs a model with attention, but {arguments.checkpoint} is of the family "
        raise UsageError(msg + model.config.family)
    lines = _lines(data)
    if not lines:
        return 0
    if hasattr(translator, "cut") and (rows := translator.cut(lines)):
        # To standard error, as all that is about the lines and none of them.
        told = (
            f"{len(rows)} of {len(lines)} lines were cut to {translator.max_source} tokens, the first is line {rows[0]}"
        )
        print(told, file=sys.stderr)
    outputs = _usage(
        lambda: translator.predict(model, lines, arguments.batch, device=arguments.device, beam=arguments.beam)
    )
    _write("".join(f"{line}\n" for line in outputs), arguments.out)
    if arguments.attention:
        plots.attention(model, translator.subwords, lines[0], outputs[0], arguments.attention, translator.max_source)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a model as a file that runs without this project; say which sizes it serves."""
    _refuse_existing(arguments.out)
    sizes = deployment.Sizes(arguments.batch, arguments.source_steps, arguments.target_steps)
    model = _usage(lambda: checkpoint.from_pretrained(_model_folder(arguments.checkpoint))).model
    served = _usage(lambda: deployment.export(model, arguments.out, arguments.format, sizes, lengths=arguments.lengths))
    print(f"{arguments.out}: {arguments.format}, results equal the model's; serves {served.words(sizes)}")
    return 0


def _lines(data: str | None) -> list[str]:
    """Lines to translate: of a file, or of standard input."""
    where = data or "standard input"
    try:
        # As bytes: in some locales Python reads bytes that are no UTF-8 as half characters, and says nothing.
        text = (Path(data).read_bytes() if data else sys.stdin.buffer.read()).decode("utf-8-sig")
    except OSError as error:
        msg = f"{where} cannot be read: {error.strerror or error}; expected a text file"
        raise UsageError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8"
        raise UsageError(msg) from error
    # At line feeds alone: Unicode's other line ends may be part of a text, and lines out answer to lines in.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for row, line in enumerate(lines, 1):
        if not line.strip():
            msg = f"{where}, row {row}: the line is empty, expected a text"
            raise UsageError(msg)
    return lines


def _finish(trainer: Trainer, task: Task, folder: TrainFolder, facts: dict[str, Any]) -> int:
    """Train to the end, and tell what came of it; or save, and tell how to go on."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        # The second time, whoever asks does not want to wait for the step.
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.stopping = True

    with _signals(stop), TrainingBar(trainer.settings) as bar:
        progress = trainer.run(bar.tick)
    if folder.curve_path.exists():
        plots.curve(list(folder.curve()), folder.path / "curve.png", _loss_name(trainer.config))
    if not progress.ended:
        again = f"python -m seq2seq train {task.name} --out {folder.path} --resume"
        print(f"interrupted at step {progress.step}, which is saved; to go on: {again}", file=sys.stderr)
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
    """What the loss of a model is, for the axis of its curve."""
    usual = "cross entropy (nats a token)" if config.target_vocabulary else LOSSES[getattr(config, "likelihood", "")]
    # A family that learns by a loss of its own says so.
    return str(getattr(config, "loss_name", usual))


@contextmanager
def _signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to a handler meanwhile; only the main thread may say so."""
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
    """What the command line said, as run.json keeps it."""
    passing = {"command", "task", "out", "resume", "threads"}
    found = {name: value for name, value in vars(arguments).items() if name not in passing and value is not None}
    for name in ("option", "rate"):
        if name in found:
            found[name] = dict(found[name])
    return found


def _refuse_changes(begun: dict[str, Any], given: dict[str, Any]) -> None:
    changed = [name for name, value in given.items() if name not in LIMITS and begun["given"].get(name) != value]
    if changed:
        options = ", ".join("--" + name.replace("_", "-") for name in changed)
        msg = f"--resume goes on with what the run began with; leave out {options}"
        raise UsageError(msg)


def _refuse_other_data(begun: dict[str, Any], facts: dict[str, Any]) -> None:
    for name in ("task", "data_sha256", "config"):
        if begun[name] != facts[name]:
            what = {"task": "another task", "data_sha256": "other data", "config": "another model by its data"}[name]
            msg = f"the run was begun with {what}, so it cannot be resumed; begin a new one"
            raise UsageError(msg)


def _task(name: str, given: dict[str, Any]) -> Task:
    path = Path(given["data"]) if "data" in given else None
    # A name of built-in data is no file.
    data = given.get("data") if path is not None and not path.exists() else path
    task: Task = _usage(lambda: TASKS[name](data, **given.get("option", {})))
    return task


def _settings(task: Task, given: dict[str, Any]) -> Settings:
    """The settings: what was given, else what the task says, else what holds for all."""
    names = [field.name for field in dataclasses.fields(Settings)]
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
        msg = f"there is no variant {chosen['variant']!r}, expected one of {', '.join(VARIANTS)}"
        raise UsageError(msg)
    return Settings(**chosen, freeze=tuple(given.get("freeze", ())), rates=given.get("rate", {}))


def _start(task: Task, given: dict[str, Any]) -> tuple[Config, Weights | None]:
    """Sizes of the model, and the weights to start from where some are named."""
    config = _usage(lambda: task.model_config(given.get("model", "lstm"), given.get("size", "small")))
    if "init" not in given:
        return config, None
    found = _usage(lambda: checkpoint.from_pretrained(_model_folder(given["init"])))
    if not {"model", "size"} & given.keys():
        # Sizes of the model that is tuned, where none were asked for; what the data decides must fit.
        sizes = ("input_size", "target_size", "output_size", "source_vocabulary", "target_vocabulary")
        other = [name for name in sizes if getattr(found.config, name) != getattr(config, name)]
    else:
        other = [] if found.config == config else ["sizes"]
    if other:
        msg = f"{given['init']} has other {' and '.join(other)} than this task's model, so it cannot be tuned on it"
        raise UsageError(msg)
    saved = (found.task_state or {}).get("state", {})
    # A model knows tokens by number: another vocabulary would give every word another meaning.
    if saved.get("tokenizer") != task.state().get("tokenizer"):
        msg = f"{given['init']} was trained with another vocabulary, so its tokens mean other words here"
        raise UsageError(msg)
    return found.config, {name: value.float() for name, value in found.model.state_dict().items()}


def _facts(task: str, given: dict[str, Any], settings: Settings, config: Config) -> dict[str, Any]:
    """The content of run.json."""
    with torch.device("meta"):
        parameters = sum(value.numel() for value in config.build(torch.nn.LSTM).parameters())
    name = variant_of(config, settings)
    data = given.get("data")
    digest = hashlib.sha256(Path(data).read_bytes()).hexdigest() if data and Path(data).is_file() else ""
    return {
        "task": task,
        "given": given,
        "settings": dataclasses.asdict(settings),
        "variant": name,
        "variant_summary": VARIANTS[name].summary,
        "family": config.family,
        "config": dataclasses.asdict(config),
        "parameters": parameters,
        "data_sha256": digest,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _trained(arguments: argparse.Namespace) -> tuple[Model, Task]:
    """The model of a checkpoint, and its task with the data that was named."""
    found = _usage(lambda: checkpoint.from_pretrained(_model_folder(arguments.checkpoint)))
    kept = found.task_state or {}
    if kept.get("name") not in TASKS:
        msg = f"{arguments.checkpoint} does not say what it was trained on, expected one of {', '.join(TASKS)}"
        raise UsageError(msg)
    options = dict(arguments.option or ())
    task = _usage(lambda: restore(kept["name"], kept["state"], arguments.data, **options))
    return found.model.float().to(arguments.device), task


def _model_folder(name: str) -> Path:
    """The folder of a model: that of a run's best weights, or itself."""
    folder = TrainFolder(Path(name))
    return folder.model if (folder.path / "run.json").is_file() else folder.path


def _usage(action: Callable[[], Any]) -> Any:
    """The value of an action, whose complaints about input become one line."""
    try:
        return action()
    except (UsageError, OSError):
        raise
    except (ValueError, TrainingError, DataUnavailableError, checkpoint.CheckpointError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    except TypeError as error:
        # An option that a task does not know.
        if "unexpected keyword argument" not in str(error):
            raise
        name = str(error).rpartition("argument ")[2]
        msg = f"--option {name} is none of this task's; see the `load` of its module in seq2seq/tasks"
        raise UsageError(msg) from error


def _refuse_existing(*paths: Path | None) -> None:
    given = [path.resolve() for path in paths if path is not None]
    if len(set(given)) < len(given):
        msg = f"{given[0]} is named for two things; name another file for one of them"
        raise UsageError(msg)
    for path in paths:
        if path is not None and path.exists():
            msg = f"{path} exists, and nothing is overwritten; name another file"
            raise UsageError(msg)
        if path is not None and not path.parent.is_dir():
            msg = f"{path}: there is no folder {path.parent}; make it, or name another file"
            raise UsageError(msg)


def _write(text: str, path: Path | None) -> None:
    if path is None:
        sys.stdout.write(text)
        return
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
