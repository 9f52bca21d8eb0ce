"""Our figures next to those of other instruments, on the same calls in the same processes in one run.

Each repetition builds a pair of one variant with itself, and every instrument measures both names, as its users would:
one name after the other. The order of the instruments is drawn at random each time. Where they disagree about the time
of a call, one of them is wrong; how far the two names are apart is each instrument's own error.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.console import Console
from bench.plan.cases import BASE, OTHER
from bench.selftest.pairs import Bench, bench
from bench.selftest.part import Found, Options, percent, spread

PAIRS = 10
#: By how much the instruments' times of a call may differ from ours.
AGREEMENT = 0.03

#: Times of a call under both names, by the figure that an instrument gives.
Figures = dict[str, tuple[float, float]]

MEDIANS = ("torch.utils.benchmark, median", "pytest-benchmark, median", "pyperf's way, mean")


def run(options: Options, folder: Path, console: Console) -> Found:
    """Measure the pairs of each number of threads with every instrument."""
    columns = ["threads", "instrument", "pairs", "time of a call over ours", "|ratio - 1| p50 / p90 / max", "seconds"]
    found = Found("instrument", columns)
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    for threads in options.threads:
        seen: list[dict[str, Any]] = []
        count = options.pairs or PAIRS
        with bench(options.settings(threads), options.processes, folder) as workers:
            for number, case in enumerate(options.cases(threads, count)):
                console.status(f"instrument, {threads} threads: pair {number + 1} of {count}")
                workers.ask_all("prepare", case=dataclasses.asdict(case))
                figures: Figures = {}
                for tool in order.sample(TOOLS, len(TOOLS)):
                    figures |= tool(workers, options.seconds)
                ours = workers.interleaved(case, options.seconds)
                shares = (ours.call_s, ours.call_s / ours.speedup.value)
                figures["seq2seq-bench, rounds"] = shares
                for name, (base, other) in figures.items():
                    row = {"number": number, "workload": case.workload, "mode": case.mode, "threads": threads}
                    times = {"base_s": base, "other_s": other, "ratio": base / other, "over_ours": base / shares[0]}
                    seen.append(row | {"instrument": name} | times | {"noticed": ours.noticed, "rounds": ours.rounds})
        found.raw += seen
        _judge(found, threads, seen, options)
    return found


def _judge(found: Found, threads: int, seen: list[dict[str, Any]], options: Options) -> None:
    names = dict.fromkeys(sorted((row["instrument"] for row in seen), key=lambda name: "seq2seq" not in name))
    for name in names:
        rows = [row for row in seen if row["instrument"] == name]
        over = float(np.median([row["over_ours"] for row in rows]))
        errors = spread(abs(row["ratio"] - 1) for row in rows)
        found.rows.append(
            [str(threads), name, str(len(rows)), f"{over:.3f}", percent(errors), f"{options.seconds:g} a pair"]
        )
        if name in MEDIANS:
            words = f"time of a call by {name} is {over:.3f} of ours at {threads} threads"
            found.judge(abs(over - 1) <= AGREEMENT, f"{words}, target within {percent(AGREEMENT, 0)}")


def _by_torch(workers: Bench, seconds: float) -> Figures:
    return {"torch.utils.benchmark, median": _both(_ask(workers, "torch", seconds), "median")}


def _by_pytest(workers: Bench, seconds: float) -> Figures:
    answers = _ask(workers, "pytest", seconds)
    return {f"pytest-benchmark, {figure}": _both(answers, figure) for figure in ("median", "min")}


def _by_pyperf(workers: Bench, seconds: float) -> Figures:
    answers = _ask(workers, "pyperf", seconds)
    values = {name: list(itertools.chain(*(a["values"] for a in found))) for name, found in answers.items()}
    return {
        "pyperf's way, mean": (float(np.mean(values[BASE])), float(np.mean(values[OTHER]))),
        "pyperf's way, minimum": (min(values[BASE]), min(values[OTHER])),
    }


def _both(answers: dict[str, list[dict[str, Any]]], figure: str) -> tuple[float, float]:
    return _over(answers[BASE], figure), _over(answers[OTHER], figure)


def _ask(workers: Bench, tool: str, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Answers of all workers about the first name, then about the second, each name for half of the seconds."""
    share = seconds / 2 / workers.count
    answers = {}
    for name in (BASE, OTHER):
        events = workers.ask_all("instrument", tool=tool, name=name, seconds=share)
        answers[name] = [event for event in itertools.chain(*events) if event["event"] == "figures"]
    return answers


def _over(answers: list[dict[str, Any]], figure: str) -> float:
    """One figure for several processes: their median, which favours the instrument."""
    return float(np.median([answer[figure] for answer in answers]))


TOOLS: tuple[Callable[[Bench, float], Figures], ...] = (_by_torch, _by_pytest, _by_pyperf)
