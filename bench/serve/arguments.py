"""The grammar of `python -m bench serve`."""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path

from bench.plan import own_model
from bench.recommend.arguments import time_with_unit
from bench.run.resume import SEEDS
from bench.serve.load_test import Bound
from kernels.host.numbers import duration, whole

SCENARIOS = ("server", "single-stream", "offline")
LENGTHS = ("padded", "bucketed")
BATCHING = ("queue", "step")
MODES = ("inference", "decode")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = command.add_argument
    several = functools.partial(add, action="append", default=[])
    several(
        "--workload",
        metavar="GLOB",
        help="workloads, overrides as seed@hidden=64; can be repeated (default: seed; to decode: "
        "translation-small-scaled)",
    )
    several(
        "--variant",
        metavar="GLOB",
        help="variants, always with the reference; can be repeated (default: onednn and cpu-fused, on a GPU cudnn)",
    )
    add(
        "--bound",
        type=bound,
        metavar="pN=TIME",
        help="latency bound, such as p99=20ms; required by the scenario server",
    )
    add(
        "--scenario",
        choices=SCENARIOS,
        default="server",
        help="LoadGen scenario. server: Poisson arrivals, and a search for the highest load at which the bound holds; "
        "single-stream: one query after the other; offline: all queries at once (default: server)",
    )
    add(
        "--budget",
        type=duration,
        default=60.0,
        metavar="TIME",
        help="time of load for each variant; more if a percentile needs more queries (default: 60)",
    )
    add(
        "--repeats",
        type=whole(),
        default=5,
        metavar="N",
        help="searches, or tests, of each variant, each in a process of its own (default: 5)",
    )
    add(
        "--batching",
        choices=BATCHING,
        default="queue",
        help="queue: a batch leaves together and is answered whole; step: queries join and leave rows between steps, "
        "for LSTM models of one direction in eager PyTorch (default: queue)",
    )
    add(
        "--mode",
        choices=MODES,
        default="inference",
        help="inference: a decoder reads a given target; decode: it reads what it generated, greedily, until its end "
        "token, and takes --batching step (default: inference)",
    )
    add(
        "--largest-batch",
        type=whole(),
        metavar="N",
        help="most queries in a batch; by step, rows (default: the workload's batch)",
    )
    add(
        "--longest-wait",
        type=time_with_unit,
        metavar="TIME",
        help="longest time that a query waits for others to fill its batch (default: a tenth of the bound, or 2ms)",
    )
    add(
        "--lengths",
        choices=LENGTHS,
        help="padded: any queries share a batch, padded to its longest; bucketed: only queries of about the same "
        "length do (default: padded)",
    )
    add(
        "--threads",
        type=whole(),
        metavar="N",
        help="CPU threads of the variant (default: all usable cores except one, which the generator gets)",
    )
    add(
        "--model",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="function that builds a model of your own, as in run; it is served in place of a workload",
    )
    several(
        "--inputs",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION|TRACE.jsonl",
        help="function that returns its inputs, as in run: batches of two sequences or more, each of which becomes a "
        "query (default: example_inputs beside the model)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    several("--plugin", type=Path, metavar="FILE.py", help="as in run; can be repeated")
    add("--seed", type=whole(0, SEEDS), metavar="N", help="seed of gates, orders and arrivals (default: a new one)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder, or the folder of a run that has served nothing yet (default: results/runs/TIME-serve)",
    )


def bound(text: str) -> Bound:
    """`p99=20ms` as a bound."""
    match = re.fullmatch(r"p([0-9.]+)=(.+)", text.strip())
    try:
        percentile = float(match[1]) if match else 0.0
    except ValueError:
        percentile = 0.0
    if match is None or not 0 < percentile < 100:  # noqa: PLR2004 - percent
        msg = f"{text!r} is not a percentile between p0 and p100 with a time, such as p99=20ms"
        raise argparse.ArgumentTypeError(msg)
    return Bound(percentile, time_with_unit(match[2]))
