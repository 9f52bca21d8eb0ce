"""The grammar of `python -m bench sweep`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from bench.plan.cases import MODES, suite_names
from bench.run.resume import SEEDS
from kernels.host.numbers import duration, seconds, whole

DEFAULT_SUITE = "quick"
UNIT_LIMIT_S = 3600.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command; those that a resumed sweep began with have no default here."""
    add = command.add_argument
    several = functools.partial(add, action="append", default=[])
    add(
        "--cluster",
        default="local",
        metavar="ADDRESS|local",
        help="Ray cluster, such as HOST:6379 or auto; local starts one on this machine only (default: local)",
    )
    add(
        "--suite",
        metavar="NAME|FILE.toml",
        help=f"what to measure: {', '.join(suite_names())}, or a file (default: {DEFAULT_SUITE})",
    )
    several("--workload", metavar="GLOB", help="as in run; can be repeated")
    several("--variant", metavar="GLOB", help="as in run; can be repeated")
    several("--mode", choices=MODES, help="as in run; can be repeated")
    add("--device", choices=("cpu", "cuda"), help="device of all units (default: the suite's, else cpu)")
    add("--threads", type=whole(), metavar="N", help="CPU threads (default: the cores that each host may use)")
    add(
        "--budget",
        type=duration,
        metavar="TIME",
        help="time of timed rounds for the suite on one kind of host, shared by its groups",
    )
    add("--block", type=seconds, metavar="SECONDS", help="as in run (default: 0.02)")
    add("--omp-wait", choices=("default", "active", "passive"), help="as in run (default: default)")
    add(
        "--repeats",
        type=whole(),
        metavar="N",
        help="hosts of a kind that measure each group; from 2 on, the spread between hosts is shown (default: 1)",
    )
    several(
        "--kind",
        metavar="NAME",
        help="measure only on this kind of host, by the name that --dry-run shows; can be repeated (default: all, and "
        "each kind measures every group)",
    )
    add(
        "--unit-limit",
        type=duration,
        metavar="TIME",
        help="longest time of a group on a node, such as 90s or 20min; beyond it, its cases are recorded as timeout "
        f"(default: {UNIT_LIMIT_S / 60:.0f}min)",
    )
    add(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="begin no group that is not expected to end within this time from the start, except the first; "
        "--resume measures the rest, and the exit code is 4",
    )
    add("--seed", type=whole(0, SEEDS), metavar="N", help="as in run, for every group (default: a new one for each)")
    several(
        "--plugin",
        type=Path,
        metavar="FILE.py",
        help="file that adds variants or workloads, at the same path on every node; can be repeated",
    )
    add("--checkout", type=Path, metavar="DIR", help="folder of this project on the nodes (default: the same as here)")
    add("--dry-run", action="store_true", help="print hosts, groups and the expected time, measure nothing")
    add("--out", type=Path, metavar="DIR", help="new folder for the sweep (default: results/runs/TIME-SUITE)")
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="finish the sweep of that folder with the options it began with; finished groups are kept",
    )
