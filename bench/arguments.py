"""The command line's grammar: commands, options, and what each value must look like. Nothing here does anything."""

from __future__ import annotations

import argparse
import functools
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
from bench.sweep import arguments as sweep
from kernels.host.numbers import duration, seconds, share, whole
from kernels.host.usage import Parser

DEFAULT_SUITE = "quick"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(
        prog="python -m bench",
        description="Measure ways to run an LSTM model: which is fastest here, is it still right, how sure is that?",
        epilog="Exit codes: 0 every case that can run here is ok; 1 a gate refused a variant, a case was faster than "
        "the machine can be, a worker failed, the system refused to write during a run, selftest missed a target, the "
        "file of recommend --apply failed its check, or doctor found that something is missing that a run needs; 2 "
        "wrong usage, runs that are not comparable, or a folder that cannot be written, which is noticed before a "
        "run; 3 compare or ab found a regression, or recommend found no variant within the bounds; 4 --time-limit or "
        "lost nodes left cases for --resume; 5 compare or ab could not tell whether there is a regression, or "
        "recommend could not tell which variant is best; 130 interrupted, 143 by SIGTERM.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure a suite and write CSV, plots and a page")
    _add_selection(run)
    run.add_argument(
        "--seed",
        type=whole(0, SEEDS),
        metavar="N",
        help="seed of the gates' inputs and of the order of turns; environment.json records it (default: a new one)",
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
        help="finish the interrupted run of that folder, with the options it began with; recorded cases are kept",
    )
    run.add_argument(
        "--more",
        type=duration,
        metavar="TIME",
        help="with --resume of a run that has ended: measure groups without a clear answer longer, those that need "
        "least first, such as 90s or 3min",
    )
    told = run.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="print only errors and the path of the page")
    told.add_argument(
        "--json", action="store_true", help="print one JSON object per line: each record, and the verdict at the end"
    )
    listing = commands.add_parser(
        "list", help="show suites, workloads, and variants with the reason why one cannot run here"
    )
    listing.add_argument("--suite", metavar="NAME|FILE.toml", help="show the cases of this suite instead")
    _add_device(listing)
    commands.add_parser(
        "doctor", help="check what this machine has for measuring and what is missing, and say what to do"
    )
    show = commands.add_parser("show", help="show the cases of a run, or everything about one of them")
    show.add_argument("dir", type=Path, metavar="RUN", help="run folder")
    show.add_argument(
        "case", metavar="CASE", nargs="?", help="WORKLOAD/MODE/VARIANT, or some of its parts; * matches anything"
    )
    versus = show.add_mutually_exclusive_group()
    versus.add_argument(
        "--against",
        metavar="VARIANT",
        help="show speedups over this variant, such as cudnn-fair, instead of over the reference",
    )
    versus.add_argument(
        "--rivals",
        metavar="PATTERN",
        help="compare the fastest of the variants with such names, as 'cpu-fused*', with the fastest of all others, in "
        "each precision and in any",
    )
    show.add_argument(
        "--format", choices=("text", "markdown"), default="text", help="form of a table of cases (default: text)"
    )
    show.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="write a Chrome trace of one of its calls to this new file"
    )
    report = commands.add_parser("report", help="write the plots and page of a run again, or a page of several runs")
    report.add_argument(
        "dir", type=Path, metavar="DIR", nargs="+", help="run folder; several are shown side by side on one page"
    )
    report.add_argument(
        "--history", action="store_true", help="DIR is a folder of runs: write a page of them over time"
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="page of several runs (default: side-by-side.html in the first folder, or history.html)",
    )
    _add_selftest(
        commands.add_parser("selftest", help="test the suite itself: equal pairs, planted slowdowns, other tools")
    )
    serve.add_arguments(
        commands.add_parser(
            "serve", help="find the highest load at which a latency bound holds, behind a batching queue"
        )
    )
    ranks.add_arguments(
        commands.add_parser(
            "ranks", help="measure training over ranks: scaling, stragglers, gradients; started by torchrun"
        )
    )
    sweep.add_arguments(
        commands.add_parser("sweep", help="measure a suite over the machines of a Ray cluster, group by group")
    )
    _add_ab(commands.add_parser("ab", help="measure two interpreters or revisions in turns: is NEW slower than BASE?"))
    comparing.add_compare(
        commands.add_parser("compare", help="compare runs with a base: faster, slower, same or unclear")
    )
    comparing.add_history(
        commands.add_parser(
            "history", help="show where cases changed for good over the runs of a folder, and possible causes"
        )
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
        help="format of the file (default: pytest-benchmark)",
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="new file (default: RUN/export.pytest-benchmark.json)")
    return top


def _add_ab(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    several = functools.partial(add, action="append", default=[])
    side = "bin/python of an environment with torch, its folder, a folder with a checkout, or a git revision"
    add("base", metavar="BASE", help=f"side to compare with: {side}")
    add("new", metavar="NEW", help="side to judge, in one of the same forms")
    several(
        "--workload",
        type=_workload,
        metavar="GLOB",
        help="workloads, overrides as seed@batch=64; can be repeated (default: seed and forecast-deepar)",
    )
    several(
        "--variant",
        metavar="GLOB",
        help="variants; can be repeated (default: onednn and cpu-fused, on a GPU cudnn and triton)",
    )
    several("--mode", choices=MODES, help="modes; can be repeated (default: inference)")
    add("--threads", type=whole(), metavar="N", help="CPU threads (default: the cores that may be used)")
    add(
        "--budget",
        type=duration,
        default=60.0,
        metavar="TIME",
        help="time of timed rounds in all; start-up is extra (default: 60)",
    )
    add(
        "--seatings",
        type=whole(),
        default=8,
        metavar="N",
        help="sets of fresh processes that share these seconds; more sets make narrower intervals (default: 8)",
    )
    _add_block(command)
    add(
        "--omp-wait",
        choices=("default", "active", "passive"),
        default="default",
        help="how OpenMP threads wait (default: default)",
    )
    add(
        "--seed",
        type=whole(0, SEEDS),
        metavar="N",
        help="seed of the gates' inputs and of the order of turns (default: a new one)",
    )
    comparing.add_margin(command)
    add("--out", type=Path, metavar="DIR", help="new folder for the run (default: results/runs/TIME-ab)")
    _add_device(command, "device (default: cpu)")


def _add_block(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--block",
        type=seconds,
        metavar="SECONDS",
        help="least length of a timed block (default: 0.02); an energy counter that updates seldom needs longer ones",
    )


def _add_selftest(command: argparse.ArgumentParser) -> None:
    words = "; ".join(f"{name}: {summary}" for name, summary in PARTS.items()).replace("%", "%%")
    add = command.add_argument
    add("part", nargs="*", metavar="PART", help=f"parts to run ({words}; default: {' '.join(STANDARD)})")
    add(
        "--pairs",
        type=whole(),
        metavar="N",
        help="pairs of each setting (default: null 40, power 20, instrument 10, neighbour 3)",
    )
    add(
        "--budget",
        type=duration,
        default=5.0,
        metavar="TIME",
        help="time of rounds per pair; in `carryover`, per pair of neighbours (default: 5)",
    )
    add("--seatings", type=whole(), default=4, metavar="N", help="sets of fresh processes that share them (default: 4)")
    add(
        "--threads",
        action="append",
        type=whole(),
        metavar="N",
        help="CPU threads; can be repeated (default: 1 and all)",
    )
    add(
        "--planted",
        action="append",
        type=share,
        metavar="PERCENT",
        help="slowdown that `power` plants, 0 for none; can be repeated (default: 0, 1, 2, 3 and 5)",
    )
    add("--workload", type=_workload, metavar="NAME", help="measure only this workload")
    add("--mode", choices=MODES, help="its mode (default: inference)")
    add("--variant", default="reference", metavar="NAME", help="variant to measure against itself (default: reference)")
    add(
        "--group",
        action="append",
        metavar="NAME",
        help="variant that takes turns in `carryover` with the planted ones; can be repeated (default: all runtimes)",
    )
    add(
        "--unstopped",
        action="store_true",
        help="run `carryover` with all variants in one process without ever stopping any, to see what stopping gains",
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
    several = functools.partial(add, action="append", default=[])
    add(
        "--suite",
        metavar="NAME|FILE.toml",
        help=f"what to measure: {', '.join(suite_names())}, or a file (default: {DEFAULT_SUITE})",
    )
    several(
        "--workload",
        type=_workload,
        metavar="GLOB",
        help="workloads instead of the suite's, with overrides as in seed@batch=64; checkpoint:PATH is a model trained "
        "with python -m seq2seq train or a folder of the transformers library; can be repeated",
    )
    several(
        "--variant",
        metavar="GLOB",
        help="variants instead of the suite's, always with the reference; name#label runs one twice; can be repeated",
    )
    several("--mode", choices=MODES, help="modes instead of the suite's; can be repeated")
    add("--threads", type=whole(), metavar="N", help="CPU threads (default: the cores that affinity and quota leave)")
    add(
        "--budget",
        type=duration,
        metavar="TIME",
        help="time of timed rounds for the whole run, shared by its groups; start-up is extra; a group ends sooner if "
        "its answer is clear (default: the suite's, even if --workload, --variant or --mode leave fewer groups)",
    )
    _add_block(command)
    add(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="time such as 600, 600s or 10min: stop before a group of cases, the second instrument or a training that "
        "would not finish within this time from the start. The first group is always measured. The exit code is then "
        "4, and --resume measures the rest",
    )
    add(
        "--omp-wait",
        choices=("default", "active", "passive"),
        help="how OpenMP threads wait for work: default is as for users who set nothing; passive is steadier on a busy "
        "machine, but waking a thread can take longer than the work itself (default: default)",
    )
    add(
        "--no-second-instrument",
        action="store_true",
        help=f"leave out timing the quick cases again with pytest-benchmark, as the suite {DEFAULT_SUITE} does",
    )
    _add_device(command)


def _add_own_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("a model of your own", "docs/your-model.md has examples").add_argument
    several = functools.partial(add, action="append", default=[])
    add(
        "--model",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="function that builds any nn.Module with an nn.LSTM in it, or PACKAGE.MODULE:FUNCTION, or a saved file "
        "(.pt2, TorchScript, ONNX, a module of torch.save); measured by the suite "
        f"{own_model.SUITE} unless --suite says otherwise",
    )
    several(
        "--inputs",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION|TRACE.jsonl",
        help="function that returns what the model is called with, one set or several with weights (default: "
        "example_inputs beside the model); or a trace: its arguments with counts; one of each can be given",
    )
    add(
        "--loss",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="loss(output, inputs): training is measured too (default: loss in that file); not needed if the model "
        "returns its loss",
    )
    add(
        "--metric",
        type=own_model.reference,
        metavar="FILE.py:FUNCTION",
        help="score(output, inputs), a number that is recorded for every variant (default: metric in that file)",
    )
    several(
        "--add-variant",
        type=own_model.named_reference,
        metavar="[NAME=]FILE.py:FUNCTION",
        help="variant of your own: make(model) returns what is called in its place; can be repeated",
    )


def _add_device(command: argparse.ArgumentParser, what: str = "device instead of the suite's") -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), help=what)
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="file that adds variants or workloads of your own; can be repeated",
    )


def _workload(text: str) -> str:
    """A workload as workers need it: they run in the project's folder, not in the user's."""
    if not text.startswith(CHECKPOINT):
        return text
    name, overrides = split_name(text)
    path = Path(name.removeprefix(CHECKPOINT))
    # Else a hub name, or nothing, which a worker finds out.
    if path.exists():
        place = path.resolve()
        path = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    # What follows an @ is not an override where a / ends it.
    end = f"@{overrides}" if overrides else "/" if "@" in path.name else ""
    return f"{CHECKPOINT}{path}{end}"
