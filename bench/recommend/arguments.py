"""The grammar of `python -m bench recommend`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench.plan.cases import MODES
from bench.recommend.question import Objective, Question

#: Units that a bound may carry, as factors of seconds or bytes.
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SIZES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = command.add_argument
    add("dir", type=Path, metavar="RUN", help="run folder")
    add("--mode", choices=MODES, help="answer only for this mode")
    add(
        "--objective",
        choices=tuple(objective.value for objective in Objective),
        default=Objective.P50.value,
        help="what to optimise; latency-p99 needs some hundred calls per variant, load a folder of bench serve "
        "(default: latency-p50)",
    )
    add("--max-error", type=_positive, metavar="E", help="largest relative error against float64, such as 1e-3")
    add("--max-drop", type=_percent, metavar="PERCENT", help="largest change of the run's metric, such as 0.5%%")
    add(
        "--latency-bound",
        type=time_with_unit,
        metavar="TIME",
        help="longest p99 of a call where --objective is latency-p99, otherwise longest p50, such as 20ms; for load "
        "the bound of bench serve (default: the one that was measured)",
    )
    add("--memory-bound", type=_size, metavar="SIZE", help="largest peak memory above the bare process, such as 2GB")
    add(
        "--calls",
        type=_positive,
        metavar="N",
        help="calls per start, such as 1e6: the time of the start is spread over them (not with latency-p99)",
    )
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--apply",
        type=Path,
        metavar="OUT",
        help="write the recommended variant as a new Python file, load it in a fresh process, check and time it; the "
        "run must have one group left, by --mode and --workload",
    )
    add("--overwrite", action="store_true", help="let --apply replace a file that is there")
    add("--variant", metavar="NAME", help="variant that --apply writes (default: the recommended one)")
    add("--workload", metavar="NAME", help="answer only for this workload")


def question(arguments: argparse.Namespace) -> Question:
    """The question that the options ask."""
    return Question(
        Objective(arguments.objective),
        arguments.mode,
        arguments.max_error,
        arguments.max_drop,
        arguments.latency_bound,
        arguments.memory_bound,
        arguments.calls,
        arguments.workload,
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        msg = f"{text!r} is not a number above 0"
        raise argparse.ArgumentTypeError(msg)
    return value


def _percent(text: str) -> float:
    """`0.5%` as 0.005."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*%\s*", text)
    try:
        value = float(match[1]) / 100 if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        msg = f"{text!r} is not a percentage from 0% to 100%, as 0.5%"
        raise argparse.ArgumentTypeError(msg)
    return value


def time_with_unit(text: str) -> float:
    """`20ms` as 0.02."""
    return _with_unit(text, TIMES, "a time above 0 with its unit, as 20ms, 500us or 1.5s")


def _size(text: str) -> float:
    """`2GB` as 2e9."""
    return _with_unit(text, SIZES, "a size above 0 with its unit, as 2GB, 512MB or 1GiB")


def _with_unit(text: str, units: dict[str, float], expected: str) -> float:
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]+)\s*", text)
    named = {unit.lower(): factor for unit, factor in units.items()}
    try:
        value = float(match[1]) * named[match[2].lower()] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        msg = f"{text!r} is not {expected}"
        raise argparse.ArgumentTypeError(msg)
    return value
