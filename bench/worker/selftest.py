"""The worker's part of the self-test: pairs of one variant with itself, timed by us or by another instrument."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.plan.cases import BASE, OTHER, Case
from bench.timing.seat import READY, Ready, Subject, warm_up
from bench.worker import other_instruments as tools
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

Emit = Callable[..., None]

WEIGHTS_SEED, BATCH_SEED = 1, 0
#: Additions that one unit of extra work is calibrated with, and turns that each calibration takes.
UNIT, TURNS = 2000, 60


def pair(request: dict[str, Any], emit: Emit) -> None:
    """Make one variant ready under two names, the second with extra work of `slowdown` times a call.

    Both are built again for each pair, since where their memory lies is part of what two names of one variant share
    out by chance.
    """
    case = Case(**request["case"])
    base, other = build(case), build(case)
    emit("stage", name="warm-up")
    calls = warm_up(base, case.device)
    warm_up(other, case.device)
    extra = 0
    if request["slowdown"]:
        extra = extra_work(base, request["slowdown"])
        plain = other.call

        def slowed() -> None:
            plain()
            burn(extra)

        other = Subject(slowed, other.context)
    READY.update({name: Ready(subject, calls, case.device) for name, subject in ((BASE, base), (OTHER, other))})
    # Measured apart from the rounds, turn by turn with a plain call: what was really planted.
    emit("planted", share=share_of(base, extra) if extra else 0.0)


def prepare(request: dict[str, Any], emit: Emit) -> None:
    """Build and warm up a pair that the instruments share; it stays ready for those that come later."""
    del emit
    case = Case(**request["case"])
    for name in (BASE, OTHER):
        subject = build(case)
        READY[name] = Ready(subject, warm_up(subject, case.device), case.device)


def instrument(request: dict[str, Any], emit: Emit) -> None:
    """One instrument on one of the prepared pair."""
    subject = READY[request["name"]].subject
    if request["tool"] == "pyperf":
        emit("figures", values=tools.pyperf_values(subject))
    else:
        measure = {"torch": tools.by_torch, "pytest": tools.by_pytest}[request["tool"]]
        emit("figures", **measure(subject, request["seconds"]))


def build(case: Case) -> Subject:
    """A variant ready to be called on its own weights and batch."""
    workload = find_workload(case.workload)
    weights = starting_weights(workload, WEIGHTS_SEED)
    executable = Executable(VARIANTS[case.executed], workload.config, case.mode, case.device, weights)
    prepared = executable.prepare(workload.make_batch(BATCH_SEED))
    return Subject(functools.partial(executable.call, prepared), executable.context)


def burn(additions: int) -> None:
    """Work that no compiler or processor can skip: it takes as long as the additions take, faster clocks included."""
    total = 0
    for number in range(additions):
        total += number


def extra_work(subject: Subject, share: float) -> int:
    """Number of additions that take `share` of a call."""
    return max(1, round(UNIT * share / share_of(subject, UNIT)))


def share_of(subject: Subject, additions: int) -> float:
    """Time of the additions over time of a call, medians of calls and additions in turn."""
    taken: list[tuple[int, int]] = []
    clock = time.perf_counter_ns
    with subject.context():
        for _ in range(TURNS):
            start = clock()
            subject.call()
            between = clock()
            burn(additions)
            taken.append((between - start, clock() - between))
    call, burnt = np.median(np.array(taken), axis=0)
    return float(burnt / call)
