"""What the tuner blames for a failure is what ran: the work itself names its parts, told by a real child process."""

from __future__ import annotations

import contextlib
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.common.recurrence import loop_forward
from kernels.measurements import MeasuredShape
from kernels.tools import tune_work
from kernels.tools.gpu_day import exchange
from kernels.tools.interleave import WARM_CALLS, Call
from kernels.tools.problems import Sizes
from kernels.tools.process_pool import Pool
from kernels.tools.tune import timed
from kernels.tools.tune_work import Candidate, Job, measure

#: Number of a call's block that is the first one after its warm-up.
FIRST_ROUND = WARM_CALLS + 2
WORK = "kernels.tools.tune_work"


class PlantedError(Exception):
    """An error that the work does not expect of any of its parts."""


@dataclass(frozen=True)
class Config:
    """A configuration of a kernel that does not exist."""

    tile: int


@dataclass(frozen=True)
class Broken:
    """A job in which something raises.

    Attributes:
        what: a function by its full name, or a group of calls on the clock.
        number: which of its calls raises.
    """

    job: Job
    what: str
    number: int
    error: type[Exception] = PlantedError


def planted(function: Callable[..., Any], item: Broken) -> Callable[..., Any]:
    """Return the function, of which one call raises."""
    numbers = itertools.count(1)

    def run(*args: Any, **options: Any) -> Any:
        if next(numbers) == item.number:
            msg = "planted"
            raise item.error(msg)
        return function(*args, **options)

    return run


def work(item: Broken) -> MeasuredShape:
    """Measure a job on a CPU, with the plain loop as every kernel."""

    def time(call: Call, count: int) -> float:
        del count
        if call.group == item.what:
            block()
        call.run()
        return 1.0

    block = planted(lambda: None, item)
    fake = SimpleNamespace(
        refuses=lambda *_, **__: None,
        configs=lambda *_, **__: [one.config for one in CANDIDATES],
        forward=lambda args, _: loop_forward(args),
    )
    dispatch.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fake_kernel", fake)
        for one in CANDIDATES:
            patch.setitem(tune_work.MODULES, one.implementation, "fake_kernel")
        if " " not in item.what and "." in item.what:
            patch.setattr(item.what, planted(pkgutil.resolve_name(item.what), item))
        return measure(item.job, SimpleNamespace(time=time))


CANDIDATES = tuple(Candidate(name, Config(tile), 0.1) for tile, name in enumerate(("cell", "sequence", "persistent")))
JOB = Job(Sizes(3, 4, 8), tf32=False, phase="inference", candidates=CANDIDATES, rounds=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A child that measures."""
    with Pool(work, timeout_s=60.0) as found:
        yield found


@pytest.mark.parametrize(
    ("what", "number", "part"),
    [
        ("kernels.tools.problems.Sizes.forward", 1, ""),
        ("fake_kernel.forward", 2, "ours 1"),
        (f"{WORK}._around", 1, "around"),
        (f"{WORK}.padded_vendor.changes", 1, ""),
        (f"{WORK}._module", 1, "vendor"),
        (f"{WORK}._module", 2, "vendor padded"),
        (f"{WORK}._module", 3, "vendor float16"),
        (f"{WORK}.evaluate", 1, ""),
        ("sequence", 1, "ours 1"),
        ("sequence", FIRST_ROUND, "ours 1"),
        ("around", 1, "around"),
        ("around", FIRST_ROUND, "around"),
        ("module vendor torch.float32", 1, "vendor"),
        ("module vendor torch.float32", FIRST_ROUND, "vendor"),
        (f"{WORK}.quartiles", 1, ""),
        (f"{WORK}.configured", 1, ""),
        (f"{WORK}._module", 4, "module cell"),
        ("module sequence torch.float32", 1, "module sequence"),
        ("module sequence torch.float32", FIRST_ROUND, "module sequence"),
        (f"{WORK}.quartiles", 8, ""),
    ],
)
def test_the_part_that_is_blamed_is_the_part_that_ran(pool, what, number, part):
    """A failure between two parts is blamed on neither."""
    (outcome,) = pool.run([Broken(JOB, what, number)])
    assert (outcome.status, outcome.at) == ("error", part), outcome.reason
    assert outcome.reason.startswith("PlantedError: planted")


@pytest.mark.parametrize(
    ("what", "error", "part"),
    [
        (f"{WORK}._around", torch.OutOfMemoryError, "around"),
        (f"{WORK}.quartiles", PlantedError, "outside of any part"),
    ],
)
def test_candidates_do_not_pay_for_what_failed_beside_them(pool, monkeypatch, tmp_path, capsys, what, error, part):
    """A phase that cannot be timed is given up at once and counts once, and no candidate is left out for it."""
    asked = []

    def run(jobs: list[Job]) -> Any:
        asked.extend(jobs)
        return pool.run([Broken(job, what, 1, error) for job in jobs])

    assert timed(JOB, SimpleNamespace(run=run)) is None
    assert asked == [JOB]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"NOT TIMED: {JOB.sizes} inference: {part}: {error.__name__}: planted")
    monkeypatch.setattr(exchange, "Pool", lambda *_, **__: contextlib.nullcontext(SimpleNamespace(run=run)))
    monkeypatch.setattr(exchange, "_jobs", lambda _: [JOB])
    assert exchange._time([], tmp_path, 60.0, exchange.TimeLeft(60.0)) == 1
