"""Commands that use a trained model: forecast, translate, export; training itself is in `train_command`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.host.cores import usable_cores
from kernels.host.output import is_closed, lacking, utf8, write_new
from seq2seq.cli import plots
from seq2seq.cli.command_input import CommandError, model_folder, refuse_existing, usage
from seq2seq.cli.train import train
from seq2seq.data.text_file import ENCODING, decode
from seq2seq.deployment import export as deployment
from seq2seq.deployment.facts import describe
from seq2seq.models import checkpoint
from seq2seq.models.base import Model
from seq2seq.tasks.forecasting_task import INTERPOLATED
from seq2seq.tasks.registry import TASKS, restore
from seq2seq.tasks.task import Task

#: Programs that use an ONNX file of a task without this project, and how they are called.
PROGRAMS = {
    "forecasting": ("deployed_forecast.py", "python {} SERIES.csv"),
    "translation": ("deployed_texts.py", "python {} < LINES"),
    "summarization": ("deployed_texts.py", "python {} < LINES"),
}


def run(arguments: argparse.Namespace) -> int:
    """Run the command of parsed arguments.

    Raises:
        CommandError: for bad input.
        TrainingError: when training fails on its way.
    """
    if getattr(arguments, "device", None) == "cuda" and not torch.cuda.is_available():
        msg = "--device cuda needs an NVIDIA GPU; this torch sees none"
        raise CommandError(msg)
    # Torch's own number of threads does not know of a container's quota.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    commands = {"train": train, "predict": predict, "translate": translate, "export": export}
    return commands[arguments.command](arguments)


def predict(arguments: argparse.Namespace) -> int:
    """Forecast; the table goes to standard output or a file, the plot to another."""
    refuse_existing(arguments.plot, arguments.out)
    _refuse_nowhere(arguments.out)
    found, trained_on = _checkpoint(arguments)
    if trained_on != "forecasting":
        msg = f"{arguments.checkpoint} was trained on {trained_on}; predict forecasts series, see translate for texts"
        raise CommandError(msg)
    if arguments.data is None and (arguments.series_as or arguments.new_series):
        msg = "--series-as and --new-series are about the file in --data; name one, or leave them out"
        raise CommandError(msg)
    which = {"series_as": arguments.series_as, "new_series": arguments.new_series}
    model, task = _restored(arguments, found, arguments.data, which)
    forecaster: Any = task
    names = [scaled.raw.name for scaled in forecaster.series]
    if arguments.series:
        names = [arguments.series]
    if not names:
        msg = f"{arguments.checkpoint} was trained on a file; name the series to forecast with --data"
        raise CommandError(msg)
    for line in forecaster.changes([scaled for scaled in forecaster.series if scaled.raw.name in names]):
        print(line, file=sys.stderr)
    if model.config.likelihood == "quantile":
        print(INTERPOLATED, file=sys.stderr)
    forecasts = []
    for name in names:
        start = arguments.start
        if arguments.last:
            lengths = {scaled.raw.name: len(scaled.raw.values) for scaled in forecaster.series}
            start = lengths.get(name, 0) - forecaster.horizon
        forecasts.append(usage(partial(forecaster.forecast, model, name, start, arguments.samples, arguments.device)))
    text = "".join(
        forecast.table().to_csv(index=False, header=not number, float_format="%.6g")
        for number, forecast in enumerate(forecasts)
    )
    _write(text, arguments.out, arguments.plot, lambda: plots.forecasts(forecasts))
    return 0


def translate(arguments: argparse.Namespace) -> int:
    """Translate lines."""
    refuse_existing(arguments.attention, arguments.out)
    _refuse_nowhere(arguments.out)
    options, arguments.option = dict(arguments.option or ()), None
    encoding = options.pop("encoding", ENCODING)
    if options:
        msg = f"there is no option {', '.join(options)} for translate, expected only encoding, that of the lines"
        raise CommandError(msg)
    found, trained_on = _checkpoint(arguments)
    if trained_on == "forecasting":
        msg = f"{arguments.checkpoint} was trained on {trained_on}; translate is for texts, see predict for series"
        raise CommandError(msg)
    model, task = _restored(arguments, found, None, {})
    translator: Any = task
    if arguments.attention and not hasattr(translator, "subwords"):
        msg = f"--attention shows words, but {arguments.checkpoint} was trained on {task.name}; leave it out"
        raise CommandError(msg)
    if arguments.attention and not plots.looks(model):
        msg = f"--attention needs a model with attention, but {arguments.checkpoint} is of the family "
        raise CommandError(msg + model.config.family)
    lines = _lines(arguments.data, encoding, names=getattr(translator, "reads_files", False))
    if not lines:
        _write("", arguments.out, None, bytes)
        return 0
    if hasattr(translator, "cut") and (rows := translator.cut(lines)):
        # To standard error, as all that is about the lines and none of them.
        told = (
            f"{len(rows)} of {len(lines)} lines were cut to {translator.max_source} tokens, the first is line {rows[0]}"
        )
        print(told, file=sys.stderr)
    outputs = usage(
        lambda: translator.predict(model, lines, arguments.batch, device=arguments.device, beam=arguments.beam)
    )

    def draw() -> bytes:
        return plots.attention(model, translator.subwords, lines[0], outputs[0], translator.max_source)

    _write("".join(f"{line}\n" for line in outputs), arguments.out, arguments.attention, draw)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a model as a file that runs without this project, with instructions; say which sizes it serves."""
    out = arguments.out
    refuse_existing(out)
    sidecar, program = (out.with_name(f"{out.name}{suffix}") for suffix in (".json", ".py"))
    found = usage(lambda: checkpoint.from_pretrained(model_folder(arguments.checkpoint)))
    kept = found.task_state or {}
    forecasts = kept.get("name") == "forecasting"
    facts = describe(found.config, kept, arguments.format, lengths=arguments.lengths)
    beside = {sidecar: utf8(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")}
    example = PROGRAMS.get(kept.get("name", "")) if arguments.format == "onnx" and not arguments.lengths else None
    if example:
        beside[program] = Path(deployment.__file__).with_name(example[0]).read_bytes()
    refuse_existing(out, *beside)
    usual = {"source_steps": facts["history"], "target_steps": facts["horizon"]} if forecasts else {}
    given = {name: getattr(arguments, name) for name in ("source_steps", "target_steps")}
    sizes = deployment.ExportSizes(arguments.batch, **usual | {name: value for name, value in given.items() if value})
    served = usage(
        lambda: deployment.export(
            found.model, out, arguments.format, sizes, lengths=arguments.lengths, facts=facts, beside=beside
        )
    )
    print(f"{out}: {arguments.format}, results equal the model's; serves {served.words(sizes)}")
    print(f"{sidecar}: its inputs, outputs and what else is needed to use it without this project")
    if example:
        call = example[1].format(shlex.quote(str(program))) + (" NAME" if len(facts.get("scales", ())) > 1 else "")
        print(f"{program}: uses it where this project is not: {call}")
    return 0


def _lines(data: str | None, encoding: str = ENCODING, *, names: bool = False) -> list[str]:
    """Lines to translate: of a file, or of standard input; or names of files, which need not be of any encoding."""
    where = data or "standard input"
    if not data and sys.stdin is None:
        msg = "standard input is closed; expected lines there, or a file named with --data"
        raise CommandError(msg)
    try:
        # As bytes: in some locales Python reads bytes that are not UTF-8 as half characters, and says nothing.
        raw = Path(data).read_bytes() if data else sys.stdin.buffer.read()
    except OSError as error:
        msg = f"{where} cannot be read: {error.strerror or error}; expected a text file"
        raise CommandError(msg) from error
    text: str = usage(lambda: decode(raw, where, encoding, "surrogateescape" if names else "strict"))
    # At line feeds alone: Unicode's other line ends may be part of a text, and lines out answer to lines in.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for row, line in enumerate(lines, 1):
        if not line.strip():
            msg = f"{where}, row {row}: the line is empty, expected a text"
            raise CommandError(msg)
    return lines


def _checkpoint(arguments: argparse.Namespace) -> tuple[checkpoint.Checkpoint, str]:
    """A checkpoint, and the name of the task that it was trained on."""
    found: checkpoint.Checkpoint = usage(lambda: checkpoint.from_pretrained(model_folder(arguments.checkpoint)))
    name = (found.task_state or {}).get("name")
    if name not in TASKS:
        msg = f"{arguments.checkpoint} does not say what it was trained on, expected one of {', '.join(TASKS)}"
        raise CommandError(msg)
    return found, name


def _restored(
    arguments: argparse.Namespace, found: checkpoint.Checkpoint, data: str | None, which: dict[str, Any]
) -> tuple[Model, Task]:
    """The model of a checkpoint on its device, and its task with the data that was named."""
    kept = found.task_state or {}
    options = dict(arguments.option or ())
    if taken := [name for name in options if name in which]:
        msg = f"--option {taken[0]}=...: that is an option of its own, --{taken[0].replace('_', '-')}"
        raise CommandError(msg)
    task = usage(lambda: restore(kept["name"], kept["state"], data, **which, **options))
    return found.model.float().to(arguments.device), task


def _refuse_nowhere(out: Path | None) -> None:
    if out is None and is_closed(sys.stdout):
        msg = "standard output is closed, so the result would be lost; name a file with --out"
        raise CommandError(msg)


def _write(text: str, out: Path | None, picture: Path | None, draw: Callable[[], bytes]) -> None:
    """Write a result, and a picture of it where one is asked for: both or none."""
    files = {} if picture is None else {picture: draw()}
    if out is not None:
        files[out] = utf8(text)
    write_new(files)
    if out is None:
        if lacking(text, sys.stdout):
            told = f"standard output takes {sys.stdout.encoding}: characters that it lacks are written as \\x and \\u"
            print(f"{told} escapes; --out FILE writes UTF-8", file=sys.stderr)
        sys.stdout.write(text)
