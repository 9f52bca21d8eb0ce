"""The command line's grammar: commands, options, and what each value must look like. Nothing here does anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels.host.numbers import whole
from kernels.host.usage import Parser

TASKS = ("forecasting", "translation", "summarization", "speech")
MODELS = ("lstm", "attention", "gnmt", "transformer", "ctc")
LARGEST_BEAM = 100
FORMATS = {
    "torchscript": "scripted, for any sizes and lengths",
    "torchscript-trace": "one traced run",
    "torch-export": "torch.export, a file.pt2",
    "onnx": "for ONNX Runtime, OpenVINO and others",
    "aotinductor": "machine code for this machine, a file.pt2; needs a C++ compiler",
}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(
        prog="python -m seq2seq",
        description="Train sequence-to-sequence models on real data, and use them.",
        epilog="Without a command, or with `seed`, the seed's example runs. Exit codes: 0 done; 1 training failed, or "
        "the system refused to write during a run; 2 wrong usage, bad data, or a place that cannot be written, which "
        "is noticed before a run; 130 interrupted, 143 by SIGTERM.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("seed", help="the seed's example: 50 epochs on random data")
    _add_train(commands.add_parser("train", help="train a model on a task"))
    predict = commands.add_parser("predict", help="forecast series with a trained model, with intervals")
    _add_checkpoint(
        predict,
        "CSV of series, or built-in ones (default: what it was trained on)",
        "; all other options are those of the training",
    )
    predict.add_argument("--series", metavar="NAME", help="forecast only this series (default: all)")
    which = predict.add_mutually_exclusive_group()
    which.add_argument(
        "--series-as", metavar="NAME",
        help="the one series in --data is this series of the training, whatever the file's name",
    )  # fmt: skip
    which.add_argument(
        "--new-series", action="store_true",
        help="the series in --data were not in the training; each is scaled by its own first 80%%",
    )  # fmt: skip
    start = predict.add_mutually_exclusive_group()
    start.add_argument("--start", type=whole(0), metavar="STEP", help="step of the series at which the forecast starts")
    start.add_argument(
        "--last", action="store_true", help="forecast the last horizon of the data, to compare with the truth"
    )
    predict.add_argument("--samples", type=whole(), default=200, metavar="N", help="paths to sample (default: 200)")
    predict.add_argument(
        "--plot", type=_picture, metavar="FILE.png", help="new picture of forecasts, intervals and the truth"
    )
    predict.add_argument("--out", type=Path, metavar="FILE.csv", help="new file for the table (default: print it)")
    translate = commands.add_parser("translate", help="translate or summarise lines of text with a trained model")
    _add_checkpoint(translate, "lines to translate, or names of WAV files (default: standard input)")
    translate.add_argument("--beam", type=_beam, default=4, metavar="N", help="hypotheses of the search (default: 4)")
    translate.add_argument(
        "--attention", type=_picture, metavar="FILE.png", help="new picture of the attention weights of the first line"
    )
    translate.add_argument("--out", type=Path, metavar="FILE", help="new file for the lines (default: print them)")
    _add_export(commands.add_parser("export", help="write a trained model for deployment, and check that file"))
    return top


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a training run, or of a model")
    command.add_argument(
        "--format", choices=tuple(FORMATS), default="torchscript",
        help="; ".join(f"{name}: {summary}" for name, summary in FORMATS.items()) + " (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="new file; FILE.json describes its use; for series and texts in ONNX, FILE.py is a program that uses it",
    )  # fmt: skip
    command.add_argument("--lengths", action="store_true", help="take lengths of sources and targets as inputs")
    inputs = "size of the example inputs; some formats serve only this size (default: "
    command.add_argument("--batch", type=whole(), default=2, metavar="N", help=inputs + "%(default)s)")
    command.add_argument("--source-steps", type=whole(), metavar="N", help=inputs + "a forecaster's history, else 8)")
    command.add_argument("--target-steps", type=whole(), metavar="N", help=inputs + "a forecaster's horizon, else 6)")


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    what = command.add_argument_group("data and output")
    what.add_argument(
        "--data",
        metavar="FILE",
        help="your own: a CSV of series, TSV or JSON lines of texts, a folder of WAV files (default: built-in data)",
    )
    what.add_argument(
        "--option", action="append", type=_option, metavar="NAME=VALUE",
        help="option of the task, such as timestamp=time or value=load (columns of a CSV), encoding=cp1252, season=24, "
        "language=fr; can be repeated; an unknown name lists those of the task",
    )  # fmt: skip
    what.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: results/training/TIME-TASK)")
    what.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out with its settings; --epochs, --steps and --patience can be changed",
    )  # fmt: skip
    model = command.add_argument_group("the model")
    model.add_argument("--model", choices=MODELS, help="model family; ctc is only for speech (default: lstm)")
    model.add_argument(
        "--size",
        choices=("small", "full"),
        help="size of the model; small trains on 2 cores in minutes (default: small)",
    )
    model.add_argument(
        "--init", metavar="CHECKPOINT", help="start from the weights of this training run or model folder"
    )
    model.add_argument(
        "--freeze", action="append", metavar="PATTERN", help="keep these parameters fixed, for example 'encoder.*'"
    )
    model.add_argument(
        "--rate", action="append", type=_rate, metavar="PATTERN=FACTOR",
        help="factor of the learning rate for these parameters, for example 'encoder.*=0.1'; the first match applies",
    )  # fmt: skip
    how = command.add_argument_group("execution")
    how.add_argument(
        "--variant", metavar="NAME", help="a variant of `python -m bench list` (default: torch's own LSTM)"
    )
    how.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cpu)")
    how.add_argument(
        "--threads", type=whole(), metavar="N",
        help="CPU threads (default: torch's choice, at most the cores that affinity and quota leave)",
    )  # fmt: skip
    learning = command.add_argument_group("learning; defaults depend on the task")
    learning.add_argument("--epochs", type=whole(), metavar="N", help="at most N passes over the data")
    learning.add_argument("--steps", type=whole(), metavar="N", help="at most N steps")
    learning.add_argument("--batch", type=whole(), metavar="N", help="sequences in a batch")
    learning.add_argument("--learning-rate", type=float, metavar="X", help="learning rate of AdamW")
    learning.add_argument("--weight-decay", type=float, metavar="X", help="weight decay of AdamW (default: 0)")
    learning.add_argument(
        "--schedule", choices=("constant", "cosine"), help="schedule of the learning rate (default: cosine)"
    )
    learning.add_argument(
        "--warmup", type=whole(0), metavar="N", help="steps in which the rate rises from 0 (default: 0)"
    )
    learning.add_argument(
        "--clip", type=float, metavar="X", help="largest norm of the gradients, 0 for none (default: 1)"
    )
    learning.add_argument(
        "--evaluate-every", type=whole(), metavar="N",
        help="steps between validations (default: an epoch, or a tenth of --steps)",
    )  # fmt: skip
    learning.add_argument(
        "--patience", type=int, metavar="N",
        help="end after this many validations without a lower loss, 0 for never (default: 5)",
    )  # fmt: skip
    learning.add_argument("--seed", type=whole(0), metavar="N", help="seed of weights, order and dropout (default: 0)")


def _add_checkpoint(command: argparse.ArgumentParser, data: str, option: str = "") -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a training run, or of a model")
    command.add_argument("--data", metavar="FILE", help=data)
    command.add_argument(
        "--option", action="append", type=_option, metavar="NAME=VALUE",
        help="how to read the data, for example encoding=cp1252 or value=load; can be repeated" + option,
    )  # fmt: skip
    command.add_argument("--batch", type=whole(), default=32, metavar="N", help="sequences at a time (default: 32)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")


def _beam(text: str) -> int:
    """Hypotheses of a beam search: each takes a copy of the state, so a typing error would fill the memory."""
    if (value := whole()(text)) > LARGEST_BEAM:
        msg = f"{text} hypotheses, expected at most {LARGEST_BEAM}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _picture(text: str) -> Path:
    if not text.lower().endswith(".png"):
        msg = f"{text!r} does not end in .png, which is what is written"
        raise argparse.ArgumentTypeError(msg)
    return Path(text)


def _option(text: str) -> tuple[str, str]:
    """NAME=VALUE; what takes the option says what its value is."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        msg = f"{text!r} is not of the form NAME=VALUE"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def _rate(text: str) -> tuple[str, float]:
    pattern, equals, factor = text.rpartition("=")
    try:
        number = float(factor)
    except ValueError:
        number = -1.0
    if not (pattern and equals and number >= 0):
        msg = f"{text!r} is not of the form PATTERN=FACTOR with a factor of at least 0"
        raise argparse.ArgumentTypeError(msg)
    return pattern, number
