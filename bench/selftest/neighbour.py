"""A busy neighbour: whether it is noticed, whether the ratio is still right, and what OpenMP's ways of waiting cost.

Users run OpenMP's default, so that is what the suite measures unless asked otherwise; this part shows what each choice
does to the time of a call, on a quiet machine and beside a process that keeps one core busy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.console import Console
from bench.selftest.null import TARGET_MORE, TARGET_ONE
from bench.selftest.pairs import Pair, bench
from bench.selftest.part import Found, Options, percent, row_of, spread

PAIRS = 3
POLICIES = ("default", "active", "passive")
#: Share of a neighbour's rounds that must be noticed.
NOTICED = 0.95
_BUSY = "print(flush=True)\nwhile True: pass"

Setting = tuple[int, str, bool]


def run(options: Options, folder: Path, console: Console) -> Found:
    """Measure pairs in each setting, the settings in turn: threads, OpenMP's way of waiting, a neighbour or none."""
    columns = ["threads", "OpenMP waits", "neighbour", "rounds", "noticed", "|ratio - 1| p50 / p90 / max", "marked"]
    found = Found("neighbour", [*columns, "time of a call, default and quiet = 1"])
    settings = [
        (threads, policy, busy)
        for threads in options.threads
        # One thread has none to wait for.
        for policy in (POLICIES if threads > 1 else POLICIES[:1])
        for busy in (False, True)
    ]
    pairs: dict[Setting, list[Pair]] = {setting: [] for setting in settings}
    turns = list(itertools.product(range(options.pairs or PAIRS), settings))
    for number, (turn, setting) in enumerate(turns):
        console.status(f"neighbour: pair {number + 1} of {len(turns)}")
        threads, policy, busy = setting
        (case,) = dataclasses.replace(options, workloads=options.workloads[:1]).cases(threads, 1)
        chosen = dataclasses.replace(options.settings(threads), wait_policy=policy)
        # Workers of their own each time: an idle one that waits actively is a neighbour itself.
        with bench(chosen, options.processes, folder) as workers, neighbour() if busy else contextlib.nullcontext():
            pairs[setting].append(workers.pair(case, options.seconds))
        found.raw.append(row_of(pairs[setting][-1], turn=turn, omp_wait=policy, neighbour=int(busy)))
    for setting in settings:
        _judge(found, setting, pairs[setting], pairs[setting[0], "default", False])
    return found


def _judge(found: Found, setting: Setting, pairs: list[Pair], quiet: list[Pair]) -> None:
    threads, policy, busy = setting
    rounds, noticed = sum(p.rounds for p in pairs), sum(p.noticed for p in pairs)
    marked = sum(p.marked for p in pairs)
    times = [pair.call_s / other.call_s for pair, other in zip(pairs, quiet, strict=True)]
    found.rows.append(
        [str(threads), policy, "busy" if busy else "none", str(rounds), percent(noticed / rounds, 1),
         percent(spread(p.error for p in pairs)), f"{marked} of {len(pairs)}", _span(times)]
    )  # fmt: skip
    if not busy:
        return
    where = f"{threads} threads, OpenMP waits by {policy}"
    share = noticed / rounds
    found.judge(share >= NOTICED, f"neighbour noticed in {percent(share, 1)} of rounds ({where}), target 95 %")
    target = TARGET_ONE if threads == 1 else TARGET_MORE
    unmarked = [p for p in pairs if not p.marked and p.error > target]
    found.judge(not unmarked, f"{len(unmarked)} ratios beyond {percent(target)} and not marked ({where}), target 0")


def _span(times: list[float]) -> str:
    """From the least to the largest: with a neighbour pairs can differ a thousandfold, which no average shows."""
    ends = (min(times), max(times))
    shown = dict.fromkeys(f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in ends)  # noqa: PLR2004
    return " to ".join(shown)


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps one core busy inside the block."""
    command = [sys.executable, "-c", _BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603 - this Python
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe, as asked
            process.stdout.readline()
            yield
        finally:
            process.kill()
