"""The most important stage: is the exchange between the programs of a launch right, and how fast is it?

At the sizes where the most programs wait for each other, each way of waiting runs many times at full length, alone and
beside another grid; a grid that does not fit must be refused. What was right is then timed in turns with torch's own
LSTM. Every answer is a line of rows.jsonl as it comes, every timed phase is written to timings.json. When its time is
over, it begins nothing more, and exits with 4 if anything was left.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import measurements as table
from ... import refusals
from ...dispatch import MODULES
from ...host.numbers import duration, seconds, whole
from ...host.output import run_command
from ...host.usage import Parser
from .. import check_work
from ..check import row_of
from ..check_work import CheckQuestion, CheckResult
from ..problems import DEVICE, Sizes
from ..process_pool import Pool
from ..tune import PHASES, timed
from ..tune_work import WHILE_TIMED, Candidate, Job, measure
from . import json_lines

KERNEL = "persistent"
#: FlashRNN's size, DeepBench's, and the sizes whose grid runs beside the first on another stream.
SHAPES = (Sizes(16, 1024, 768, dtype=torch.float16), Sizes(64, 50, 1024, dtype=torch.float16))
BESIDE = Sizes(16, 100, 512, dtype=torch.float16)
SMALL_SHAPES = (Sizes(2, 3, 8), Sizes(3, 2, 17))
#: More programs than any GPU runs at once.
TOO_LARGE = Sizes(4096, 2, 512, dtype=torch.float16)
GRID = "grid"
#: Steps where the question is not how long an exchange goes well, and children at a time on a GPU.
SHORTER, JOBS = 100, 4
EXIT_LEFT = 4

Item = TypeVar("Item")


class TimeLeft:
    """Gives out items until a time is over, and counts those that were left.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._until, self.left = time.monotonic() + seconds, 0

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items while there is time."""
        source = iter(items)
        for item in source:
            if time.monotonic() > self._until:
                self.left += sum(1 for _ in itertools.chain([item], source))
                return
            yield item


def main() -> int:
    """Ask, time, and return 1 when an answer was wrong, 4 when something was left."""
    parser = Parser(prog="python -m kernels.tools.gpu_day.exchange", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of the stage")
    parser.add_argument("--timeout", type=seconds, default=25.0, help="limit of one question or timing")
    parser.add_argument("--runs", type=whole(), default=200, help="runs that must give the same bits")
    parser.add_argument(
        "--time-limit", type=duration, default=600.0, metavar="TIME", help="begin nothing more after this time"
    )
    options = parser.parse_args()
    small, time_left = DEVICE != "cuda", TimeLeft(options.time_limit)
    with Pool(work, jobs=1 if small else JOBS, timeout_s=options.timeout) as pool:
        alone = list(_alone(2 if small else options.runs, small=small))
        wrong, right = _ask(pool, time_left.of(alone), options.folder)
        # Before what two grids do to each other: a hang there would take the time for it.
        wrong += _time(right, options.folder, options.timeout, time_left)
        together = () if small else _together(alone[: len(alone) // len(SHAPES)])
        wrong += _ask(pool, time_left.of(together), options.folder)[0]
    if time_left.left:
        print(f"the time is over: {time_left.left} questions and timings were not begun", flush=True)
    return 1 if wrong else EXIT_LEFT if time_left.left else 0


def _ask(pool: Pool, questions: Iterable[CheckQuestion], folder: Path) -> tuple[int, list[tuple[CheckQuestion, float]]]:
    """Write each answer; the number of wrong ones, and the questions with right ones and their errors."""
    wrong, right = 0, list[tuple[CheckQuestion, float]]()
    for outcome in pool.run(questions):
        line = row_of(outcome)
        json_lines.append(folder / json_lines.ROWS, line)
        what = f"{line['kind']} {line['phase']} {line['sizes']} {line['config']}"
        print(f"{line['status'].upper()}: {what} {line['reason']}", flush=True)
        wrong += line["status"] != "ok"
        if line["status"] == "ok":
            right.append((outcome.item, outcome.value.worst))
    return wrong, right


def _time(right: list[tuple[CheckQuestion, float]], folder: Path, timeout_s: float, time_left: TimeLeft) -> int:
    """Time what was right; return how many shapes and phases could not be timed."""
    found, failed = table.MeasuredTable("interpreter" if DEVICE != "cuda" else torch.cuda.get_device_name()), 0
    with Pool(measure, jobs=1, timeout_s=timeout_s) as clocks:
        for job in time_left.of(_jobs(right)):
            entry = timed(job, clocks)
            if entry is None:
                failed += 1
                continue
            failed += sum(WHILE_TIMED in text for text in entry.wrong)
            found = found.with_entry(entry)
            table.write(folder / json_lines.TIMINGS, found)
    return failed


def work(task: CheckQuestion) -> CheckResult:
    """Answer a question of this stage, or one of the check's."""
    return _grid_that_does_not_fit(task) if task.kind == GRID else check_work.work(task)


def _alone(runs: int, *, small: bool) -> Iterator[CheckQuestion]:
    """Many runs at full length, the largest exchange first, both ways of waiting in turns."""
    for sizes in SMALL_SHAPES if small else SHAPES:
        for backward, save in PHASES.values():
            task = CheckQuestion("repeat", KERNEL, sizes, backward, save, runs=runs)
            for config in _each_wait(task):
                yield dataclasses.replace(task, config=config)


def _together(tasks: Iterable[CheckQuestion]) -> Iterator[CheckQuestion]:
    """A grid that does not fit; the same configurations beside another grid, in two threads and in a CUDA graph."""
    yield CheckQuestion(GRID, KERNEL, TOO_LARGE)
    shorter = [dataclasses.replace(task, sizes=dataclasses.replace(task.sizes, steps=SHORTER)) for task in tasks]
    for task in shorter:
        other = CheckQuestion("streams", KERNEL, BESIDE, backward=not task.backward)
        yield dataclasses.replace(task, kind="streams", beside=other)
    for kind in ("graph", "threads"):
        yield from (dataclasses.replace(task, kind=kind) for task in shorter)


def _each_wait(task: CheckQuestion) -> list[Any]:
    """The first configuration of each way in which programs wait within a launch."""
    module = importlib.import_module(MODULES[task.implementation])
    problem = task.sizes.problem(save=task.save)
    if module.refuses(problem, backward=task.backward) is not None:
        return []
    found: dict[str, Any] = {}
    for config in module.configs(problem, backward=task.backward):
        if config.sync != "launch":
            found.setdefault(config.sync, config)
    return list(found.values())


def _grid_that_does_not_fit(task: CheckQuestion) -> CheckResult:
    """Launch more programs than can run at once: that must raise at once, and leave the GPU working.

    Raises:
        AssertionError: when the launch was accepted.
    """
    args = task.sizes.forward(save=False)
    module = importlib.import_module(MODULES[task.implementation])
    fitting = Sizes(16, 2, task.sizes.hidden, dtype=task.sizes.dtype).problem(save=False)
    config = next(one for one in module.configs(fitting, backward=False) if one.sync == "barrier")
    try:
        module.forward(args, config)
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "cooperative" not in str(error):
            raise
    else:
        msg = "a grid that cannot run all at once was launched"
        raise AssertionError(msg)
    small = dataclasses.replace(task, kind="parity", sizes=Sizes(16, 5, 512, dtype=torch.float16))
    return check_work.work(small)


def _jobs(right: list[tuple[CheckQuestion, float]]) -> Iterator[Job]:
    """One for each shape and phase in which something was right; never what another stage found wrong."""
    phases = {pair: phase for phase, pair in PHASES.items()}
    groups: dict[tuple[Sizes, str], list[Candidate]] = {}
    for task, worst in right:
        if (reason := refusals.reason(task.implementation, task.config, backward=task.backward)) is not None:
            print(f"LEFT OUT: {task.implementation} {task.config}: {reason}", flush=True)
            continue
        key = task.sizes, phases[task.backward, task.save]
        groups.setdefault(key, []).append(Candidate(task.implementation, task.config, worst))
    for (sizes, phase), candidates in groups.items():
        yield Job(sizes, tf32=False, phase=phase, candidates=tuple(candidates))


if __name__ == "__main__":
    run_command(main)
