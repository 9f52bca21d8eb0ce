"""Stage that asks first what decides most: is the exchange between the programs of a launch right, and how fast is it?

At the sizes where the most programs wait for each other, each way of waiting runs many times at full length, alone and
beside another grid; a grid that does not fit must be refused. What was right is then timed in turns with torch's own
LSTM. Every answer is a line of rows.jsonl as it comes, every timed phase is written to timings.json.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import measurements as table
from ...dispatch import MODULES
from ...host.numbers import seconds, whole
from ...host.output import run_command
from ...host.usage import Parser
from .. import check_work
from ..check import row_of
from ..check_work import CheckQuestion, CheckResult
from ..problems import DEVICE, Sizes
from ..process_pool import Pool
from ..tune import PHASES
from ..tune_work import Candidate, Job, measure
from . import json_lines

KERNEL = "persistent"
#: FlashRNN's size, DeepBench's, and the sizes whose grid runs beside the first on another stream.
SHAPES = (Sizes(16, 1024, 768, dtype=torch.float16), Sizes(64, 50, 1024, dtype=torch.float16))
BESIDE = Sizes(16, 100, 512, dtype=torch.float16)
SMALL_SHAPES = (Sizes(2, 3, 8), Sizes(3, 2, 17))
#: More programs than any GPU runs at once.
TOO_LARGE = Sizes(4096, 2, 512, dtype=torch.float16)
GRID = "grid"


def main() -> int:
    """Ask, time, and return 1 when an answer was wrong."""
    parser = Parser(prog="python -m kernels.tools.gpu_day.exchange", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of the stage")
    parser.add_argument("--timeout", type=seconds, default=25.0, help="limit of one question or timing")
    parser.add_argument("--runs", type=whole(), default=200, help="runs that must give the same bits")
    options = parser.parse_args()
    small = DEVICE != "cuda"
    wrong, right = 0, list[tuple[CheckQuestion, float]]()
    with Pool(work, jobs=1 if small else 4, timeout_s=options.timeout) as pool:
        for outcome in pool.run(_questions(2 if small else options.runs, small=small)):
            line = row_of(outcome)
            json_lines.append(options.folder / json_lines.ROWS, line)
            print(f"{line['status'].upper()}: {line['kind']} {line['phase']} {line['sizes']} {line['config']} "
                  f"{line['reason']}", flush=True)  # fmt: skip
            wrong += line["status"] != "ok"
            if line["status"] == "ok" and line["kind"] == "repeat":
                right.append((outcome.item, outcome.value.worst))
    found = table.MeasuredTable(torch.cuda.get_device_name() if not small else "interpreter")
    with Pool(measure, jobs=1, timeout_s=options.timeout) as clocks:
        for outcome in clocks.run(_jobs(right)):
            if outcome.status != "ok":
                print(f"NOT TIMED: {outcome.item.sizes} {outcome.item.phase}: {outcome.reason}", flush=True)
                wrong += 1
                continue
            found = found.with_entry(outcome.value)
            table.write(options.folder / json_lines.TIMINGS, found)
    return 1 if wrong else 0


def work(task: CheckQuestion) -> CheckResult:
    """Answer a question of this stage, or one of the check's."""
    return _grid_that_does_not_fit(task) if task.kind == GRID else check_work.work(task)


def _questions(runs: int, *, small: bool) -> Iterator[CheckQuestion]:
    """The largest exchange first, both ways of waiting in turns; what two grids do to each other last."""
    first = list(_first_of_each(small=small))
    for sizes in SMALL_SHAPES if small else SHAPES:
        for task in (dataclasses.replace(task, sizes=sizes) for task in first):
            for config in _each_wait(task):
                yield dataclasses.replace(task, config=config, runs=runs)
    if small:
        return
    yield CheckQuestion(GRID, KERNEL, TOO_LARGE)
    for task in first:
        for config in _each_wait(task):
            other = CheckQuestion("streams", KERNEL, BESIDE, backward=not task.backward)
            sizes = dataclasses.replace(task.sizes, steps=100)
            yield dataclasses.replace(task, kind="streams", sizes=sizes, config=config, runs=runs, beside=other)


def _first_of_each(*, small: bool) -> Iterator[CheckQuestion]:
    for backward, save in PHASES.values():
        yield CheckQuestion("repeat", KERNEL, (SMALL_SHAPES if small else SHAPES)[0], backward, save)


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
    """Launch more programs than can run at once: an error at once, after which the GPU still works.

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
    """One for each shape and phase in which something was right."""
    phases = {pair: phase for phase, pair in PHASES.items()}
    groups: dict[tuple[Sizes, str], list[Candidate]] = {}
    for task, worst in right:
        key = task.sizes, phases[task.backward, task.save]
        groups.setdefault(key, []).append(Candidate(task.implementation, task.config, worst))
    for (sizes, phase), candidates in groups.items():
        yield Job(sizes, tf32=False, phase=phase, candidates=tuple(candidates))


if __name__ == "__main__":
    run_command(main)
