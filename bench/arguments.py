"""The command line's grammar: commands, options, and what each value must look like. Nothing here does anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.analysis import arguments as comparing
from bench.plan import own_model
from bench.plan.cases import CHECKPOINT, MODES, split_name, suite_names
from bench.ranks import arguments as ranks
from bench.recommend import arguments as recommend
from bench.run.resume import SEEDS
from bench.run.worker_process import ROOT
from bench.selftest.names import PARTS, STANDARD
from bench.serve import arguments as serve
from kernels.host.numbers import duration, seconds, share, whole
from kernels.host.usage import Parser

DEFAULT_SUITE = "quick"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(
        prog="python -m bench",
        description="Measure the ways to execute an LSTM Seq2Seq model: which is fastest here, is it right, how sure.",
        epilog="Exit codes: 0 every case that can run here is ok; 1 a gate refused a variant, a case was faster than "
        "the machine can be, a worker failed, the system refused to write, selftest missed a target, recommend --apply "
        "found that the file does not hold, or doctor found something lacking; 2 wrong usage, or runs that are not "
        "comparable; 3 compare or ab found a regression, or recommend found nothing that keeps the bounds; 4 "
        "--time-limit left cases for --resume; 5 compare or ab could not tell whether there is a regression, or "
        "recommend which variant is best; 130 interrupted, 143 by SIGTERM.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure a suite and write CSV, plots and a page")
    _add_selection(run)
    run.add_argument(
        "--seed",
        type=whole(0, SEEDS),
        metavar="N",
        help="of gates and orders, as environment.json of a run has it (default: new)",
    )
    _add_own_model(run)
    run.add_argument("--dry-run", action="store_true", help="print the cases and the expected time, run nothing")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder for the run (default: results/runs/TIME-SUITE)"
    )
    run.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="finish the interrupted run of that folder, with the options it began with; what is recorded stays",
    )
    run.add_argument(
        "--more",
        type=duration,
        metavar="TIME",
        help="with --resume of a run that has ended: so much time for further rounds (90s, 3min) of the groups whose "
        "answer does not stand yet",
    )
    told = run.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="print what goes wrong, and where the page is")
    told.add_argument(
        "--json", action="store_true", help="print one JSON object a line: each record, at the end the verdict"
    )
    listing = commands.add_parser("list", help="suites, workloads, and variants with their availability here")
    listing.add_argument("--suite", metavar="NAME|FILE.toml", help="the cases of one suite instead")
    _add_device(listing)
    commands.add_parser("doctor", help="what this machine offers and lacks for measuring, and what to do about it")
    show = commands.add_parser("show", help="the cases of a run, or one of them in depth")
    show.add_argument("dir", type=Path, metavar="RUN", help="run folder")
    show.add_argument(
        "case", metavar="CASE", nargs="?", help="WORKLOAD/MODE/VARIANT, or the last parts of it; may hold *"
    )
    show.add_argument("--trace", type=Path, metavar="FILE.json", help="new file for a Chrome trace of one call of it")
    report = commands.add_parser(
        "report", help="write plots and page of a run again, of runs side by side, or of their history"
    )
    report.add_argument(
        "dir", type=Path, metavar="DIR", nargs="+", help="run folder; of several, a page shows them side by side"
    )
    report.add_argument(
        "--history", action="store_true", help="DIR is a folder of runs: write a page of them in the order of time"
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="page of several runs (default: side-by-side.html in the first folder, or history.html)",
    )
    _add_selftest(
        commands.add_parser(
            "selftest", help="hold the suite against itself: null pairs, planted slowdowns, other tools"
        )
    )
    serve.add_arguments(
        commands.add_parser("serve", help="behind a batching queue: highest load at which a latency bound holds")
    )
    ranks.add_arguments(
        commands.add_parser("ranks", help="training over ranks: scaling, straggler, gradients; started by torchrun")
    )
    _add_ab(commands.add_parser("ab", help="two interpreters or two revisions in turns: is NEW slower than BASE?"))
    comparing.add_compare(
        commands.add_parser("compare", help="hold runs against a base: faster, slower, same or unclear")
    )
    comparing.add_history(
        commands.add_parser("history", help="runs of a folder in time: where cases changed for good, and perhaps why")
    )
    recommend.add_arguments(
        commands.add_parser("recommend", help="say which variant of a run to ship, how sure that is, and what it costs")
    )
    export = commands.add_parser("export", help="write a run in another program's format")
    export.add_argument("dir", type=Path, metavar="RUN", help="run folder")
    export.add_argument(
        "--format",
        choices=("pytest-benchmark",),
        default="pytest-benchmark",
        help="whose format (default: pytest-benchmark)",
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="new file (default: RUN/export.pytest-benchmark.json)")
    return top


def _add_ab(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    side = "bin/python of an environment with torch, its folder, a folder with a checkout, or a git revision"
    add("base", metavar="BASE", help=f"what NEW is held against: {side}")
    add("new", metavar="NEW", help="likewise")
    add(
        "--workload",
        action="append",
        default=[],
        type=_workload,
        metavar="GLOB",
        help="workloads, overrides as seed@batch=64; may be repeated (default: seed and forecast-deepar)",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="GLOB",
        help="variants; may be repeated (default: onednn and cpu-fused, on a GPU cudnn and triton)",
    )
    add("--mode", action="append", default=[], choices=MODES, help="modes; may be repeated (default: inference)")
    add("--threads", type=whole(), metavar="N", help="CPU threads (default: the cores that may be used)")
    add(
        "--budget",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="seconds of timed rounds in all; start-up is extra (default: 60)",
    )
    add(
        "--seatings",
        type=whole(),
        default=8,
        metavar="N",
        help="sets of fresh processes that share them; processes differ, so more make a narrower interval (default: 8)",
    )
    add(
        "--omp-wait",
        choices=("default", "active", "passive"),
        default="default",
        help="how OpenMP threads wait (default: default)",
    )
    add("--seed", type=whole(0, SEEDS), metavar="N", help="of gates and orders (default: new)")
    comparing.add_margin(command)
    add("--out", type=Path, metavar="DIR", help="new folder for the run (default: results/runs/TIME-ab)")
    _add_device(command)


def _add_selftest(command: argparse.ArgumentParser) -> None:
    words = "; ".join(f"{name}: {summary}" for name, summary in PARTS.items()).replace("%", "%%")
    add = command.add_argument
    add(
        "part",
        nargs="*",
        metavar="PART",
        help=f"what to hold against the suite ({words}; default: {' '.join(STANDARD)})",
    )
    add(
        "--pairs",
        type=whole(),
        metavar="N",
        help="pairs of each setting (default: null 40, power 20, instrument 10, neighbour 3)",
    )
    add(
        "--seconds",
        type=seconds,
        default=5.0,
        metavar="S",
        help="of rounds a pair; in `carryover` for each variant after each other one (default: 5)",
    )
    add("--processes", type=whole(), default=4, metavar="N", help="worker processes that share them (default: 4)")
    add(
        "--threads",
        action="append",
        type=whole(),
        metavar="N",
        help="CPU threads; may be repeated (default: 1 and all)",
    )
    add(
        "--planted",
        action="append",
        type=share,
        metavar="PERCENT",
        help="slowdown that `power` plants, 0 for none; may be repeated (default: 0, 1, 2, 3 and 5)",
    )
    add("--workload", type=_workload, metavar="NAME", help="measure this workload alone")
    add("--mode", choices=MODES, help="its mode (default: inference)")
    add("--variant", default="reference", metavar="NAME", help="variant to measure against itself (default: reference)")
    add(
        "--group",
        action="append",
        metavar="NAME",
        help="variant that takes turns in `carryover` beside the planted ones; may be repeated (default: all runtimes)",
    )
    add(
        "--unstopped",
        action="store_true",
        help="`carryover` with all variants in one process that is never stopped: what seats are good for",
    )
    add(
        "--omp-wait",
        choices=("default", "active", "passive"),
        default="default",
        help="how OpenMP threads wait; `neighbour` measures all three (default: default)",
    )
    add("--out", type=Path, metavar="DIR", help="new folder (default: results/selftest/TIME)")


def _add_selection(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--suite",
        metavar="NAME|FILE.toml",
        help=f"what to measure: {', '.join(suite_names())}, or a file (default: {DEFAULT_SUITE})",
    )
    add(
        "--workload",
        action="append",
        default=[],
        type=_workload,
        metavar="GLOB",
        help="workloads instead of the suite's; overrides as seed@batch=64; checkpoint:PATH for a model of your own, a "
        "run or folder of python -m seq2seq train or one of transformers; may be repeated",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="GLOB",
        help="variants instead of the suite's, which the reference joins; name#label runs one twice; may be repeated",
    )
    add("--mode", action="append", default=[], choices=MODES, help="modes instead of the suite's; may be repeated")
    add(
        "--threads",
        type=whole(),
        metavar="N",
        help="CPU threads (default: the cores that affinity and quota leave)",
    )
    add(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="seconds of timed rounds for the whole run, shared out among its groups; start-up is extra",
    )
    add(
        "--time-limit",
        type=seconds,
        metavar="SECONDS",
        help="begin no group of cases, second instrument or training that is not expected to end within this many "
        "seconds from the start, the first one excepted; what is left is for --resume, and the exit code is 4",
    )
    add(
        "--omp-wait",
        choices=("default", "active", "passive"),
        help="how OpenMP threads wait for work: default is what a user gets who sets nothing; passive is calmer "
        "beside busy neighbours, but waking a thread can cost more than the work (default: default)",
    )
    add(
        "--no-second-instrument",
        action="store_true",
        help=f"leave out timing the quick cases once more with pytest-benchmark, as the suite {DEFAULT_SUITE} does",
    )
    _add_device(command)


def _add_own_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("a model of your own", "docs/your-model.md has examples").add_argument
    add(
        "--model",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="function that builds any nn.Module with an nn.LSTM in it, or PACKAGE.MODULE:FUNCTION, or a module that "
        f"torch.save wrote; measured by the suite {own_model.SUITE} unless --suite says otherwise",
    )
    add(
        "--inputs",
        action="append",
        default=[],
        type=own_model.reference,
        metavar="FILE.py:FUNCTION|TRACE.jsonl",
        help="function that returns what the model is called with, one set or several with weights (default: "
        "example_inputs beside the model); a trace of its arguments with counts; one of each may be given",
    )
    add(
        "--loss",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="loss(output, inputs), with which training is measured too; not needed where the model returns its loss",
    )
    add(
        "--metric",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="score(output, inputs), recorded for every variant",
    )
    add(
        "--add-variant",
        action="append",
        default=[],
        type=own_model.named_reference,
        metavar="[NAME=]FILE.py:FUNCTION",
        help="variant of your own: make(model) returns what is called in its place; may be repeated",
    )


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help="device instead of the suite's")
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="file that adds variants or workloads of your own; may be repeated",
    )


def _workload(text: str) -> str:
    """A workload as workers know it, who run in the project's folder and not where the user is."""
    if not text.startswith(CHECKPOINT):
        return text
    name, overrides = split_name(text)
    path = Path(name.removeprefix(CHECKPOINT))
    # Else a hub name, or nothing, which a worker finds out.
    if path.exists():
        place = path.resolve()
        path = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    # What follows an @ is no override where a / ends it.
    end = f"@{overrides}" if overrides else "/" if "@" in path.name else ""
    return f"{CHECKPOINT}{path}{end}"
