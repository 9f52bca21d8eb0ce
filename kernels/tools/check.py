"""`python -m kernels check`: checks that the kernels are right on this GPU.

Every kernel, every configuration that it offers and every type is compared with float64 on random recurrences. Then
come checks of what one run cannot show: races (the same run many times must give the same bits), streams and threads at
the same time, and CUDA graphs of the whole module. Each check runs in a child process under a time limit. Each failure
is one line, a table comes last, and the exit status is 1 if anything failed. `--device cpu` tries the same in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import itertools
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..dispatch import MODULES
from ..host.numbers import duration, seconds, whole
from ..host.output import run_command
from ..host.usage import PACKAGE, Parser, part_of
from .check_work import CheckQuestion, CheckResult, work
from .problems import Sizes
from .process_pool import Pool, WorkOutcome, children

#: dtype and whether products are in TF32. The interpreter computes no bfloat16 products.
TYPES = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "float16": (torch.float16, False),
         "bfloat16": (torch.bfloat16, False)}  # fmt: skip
CPU_TYPES = ("float32", "float16")
HIDDEN = (1, 16, 17, 40, 64, 100, 128, 256, 384, 512, 768, 1024, 1536)
BATCH = (1, 3, 16, 17, 64, 100, 128)
STEPS = (1, 2, 5, 12, 33)
#: Where repetition, streams, threads and graphs are tried: weights that fit on all multiprocessors together, on fewer,
#: on one. The more programs wait for each other, the sooner, since a hang there is what a short check must find.
SPECIAL = (Sizes(16, 100, 768), Sizes(64, 50, 1024), Sizes(5, 100, 256, directions=2), Sizes(64, 100, 64))
#: What runs next to the first of these on a second stream: another grid, which needs other room on the multiprocessors.
BESIDE = Sizes(16, 100, 512)
#: Tasks that are not parity after each turn through all types.
SPECIAL_A_TURN = 24
#: The kernel whose programs wait for each other within a launch.
WAITING = "persistent"
COLUMNS = (
    "kind",
    "implementation",
    "phase",
    "type",
    "sizes",
    "config",
    "status",
    "worst",
    "worst_name",
    "took_s",
    "reason",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the check; 0 when all was right, 1 when anything was not, 2 when it cannot run here."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("check: torch sees no GPU; --device cpu tries tiny sizes in Triton's interpreter", file=sys.stderr)
        return 2
    if options.device == "cpu":
        if torch.cuda.is_available():
            print("check: hide the GPU: CUDA_VISIBLE_DEVICES= python -m kernels check --device cpu", file=sys.stderr)
            return 2
        # Triton asks for it when a kernel is defined, here and in the children, which inherit it.
        os.environ["TRITON_INTERPRET"] = "1"
    names = options.kernel or list(MODULES)
    if options.sanitize:
        return _sanitize(names)
    until = time.monotonic() + options.time_limit
    jobs = options.jobs or (children() if options.device == "cuda" else 1)
    rows: list[dict[str, Any]] = []
    with Pool(work, jobs=jobs, timeout_s=options.timeout) as pool:
        for outcome in pool.run(_tasks(names, options, until)):
            rows.append(row_of(outcome))
            if rows[-1]["status"] != "ok":
                print(_line(rows[-1]), flush=True)
            if options.out is not None:
                _append(options.out / "check.csv", rows[-1], first=len(rows) == 1)
    print(_table(rows) if rows else f"no check ended within {options.time_limit:g} s; raise --time-limit")
    print(
        "memory and races inside a kernel: compute-sanitizer --tool memcheck|racecheck "
        f"{Path(sys.executable).name} -m kernels check --sanitize"
    )
    return 0 if rows and all(row["status"] == "ok" for row in rows) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {PACKAGE} check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--time-limit",
        type=duration,
        default=300.0,
        metavar="TIME",
        help="start no more work after this time, such as 90s or 5min (default: 5min)",
    )
    parser.add_argument(
        "--runs", type=whole(), default=200, help="number of runs that must give the same bits (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for check.csv")
    parser.add_argument(
        "--kernel", action="append", choices=list(MODULES), help="check only this kernel; can be repeated"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes in Triton's interpreter"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=90.0, help="seconds for one item, compilation included (default: 90)"
    )
    parser.add_argument(
        "--most", type=whole(), default=4, help="most configurations of a kernel for one problem (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=whole(),
        help="child processes at a time (default: up to 12 by cores and the GPU's memory, 1 on a CPU)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the problems (default: 0)")
    parser.add_argument(
        "--sanitize", action="store_true", help="run a tiny subset in this process, for compute-sanitizer"
    )
    options = parser.parse_args(arguments)
    parser.refuse_unwritable(options.out, "folder")
    return options


def _tasks(names: list[str], options: argparse.Namespace, until: float) -> Iterator[CheckQuestion]:
    """Random recurrences until the time is up, and after the first of them everything that is not parity."""
    generator = random.Random(options.seed)  # noqa: S311 - sizes of tests
    small = options.device == "cpu"
    special = _special(names, options.runs, small=small)
    while time.monotonic() < until:
        for kind in CPU_TYPES if small else TYPES:
            dtype, tf32 = TYPES[kind]
            sizes = dataclasses.replace(_random(generator, small=small), dtype=dtype)
            for task in _parity(names, sizes, generator, tf32=tf32, most=options.most):
                if time.monotonic() > until:
                    return
                yield task
        # What is not parity comes once, a few at a time, so that a short run has seen some of all.
        yield from itertools.islice(special, SPECIAL_A_TURN)


def _random(generator: random.Random, *, small: bool) -> Sizes:
    """A recurrence of random sizes; lengths may be 0, states may be missing, rows may begin anew."""
    batch = generator.choice((1, 3) if small else BATCH)
    steps = generator.choice((1, 2, 4) if small else STEPS)
    lengths = None
    if generator.random() < 0.4:  # noqa: PLR2004 - often enough for each
        lengths = tuple(generator.randint(0, steps) for _ in range(batch))
    return Sizes(
        batch,
        steps,
        hidden=generator.choice((4, 16, 17) if small else HIDDEN),
        directions=generator.choice((1, 1, 2)),
        lengths=lengths,
        state=generator.random() < 0.7,  # noqa: PLR2004
        batch_first=generator.random() < 0.5,  # noqa: PLR2004
        seed=generator.randrange(1 << 16),
        resets=generator.random() < 0.2,  # noqa: PLR2004 - few kernels serve them
    )


def _parity(
    names: list[str], sizes: Sizes, generator: random.Random, *, tf32: bool, most: int
) -> Iterator[CheckQuestion]:
    """Kernels that offer to serve a problem, with some configurations: forward, forward that saves, and backward."""
    for name, (backward, save) in itertools.product(names, ((False, True), (False, False), (True, True))):
        final = generator.random() < 0.5  # noqa: PLR2004
        task = CheckQuestion("parity", name, sizes, backward=backward, save=save, tf32=tf32, final=final)
        # The first is what runs where nothing was measured; the others come in turns, as sizes do.
        first, *others = _configs(task) or [None]
        if first is not None:
            for config in (first, *generator.sample(others, min(most - 1, len(others)))):
                yield dataclasses.replace(task, config=config)


def _special(names: list[str], runs: int, *, small: bool) -> Iterator[CheckQuestion]:
    """Repetition, streams, threads and graphs; first of the kernel whose programs wait for each other."""
    shapes = (Sizes(3, 3, 16),) if small else SPECIAL
    dtype = torch.float32 if small else torch.float16
    ordered = sorted(names, key=lambda name: name != WAITING)
    for name, sizes, backward in itertools.product(ordered, shapes, (False, True)):
        task = CheckQuestion("repeat", name, dataclasses.replace(sizes, dtype=dtype), backward=backward, runs=runs)
        configs = _in_turns(_configs(task))
        for config in configs[: 1 if small else None]:
            yield dataclasses.replace(task, config=config)
        if small:
            continue
        both = bool(_configs(dataclasses.replace(task, backward=not backward)))
        for config in _each_exchange(configs):
            for kind in ("streams", "threads", *(("graph", "replay") if both else ())):
                yield dataclasses.replace(task, kind=kind, config=config)
            if name == WAITING and sizes is SPECIAL[0]:
                other = dataclasses.replace(task, sizes=dataclasses.replace(BESIDE, dtype=dtype), backward=not backward)
                yield dataclasses.replace(task, kind="streams", config=config, beside=other)


def _each_exchange(configs: list[Any]) -> list[Any]:
    """The first configuration of each way in which programs hand h to each other; otherwise only the first."""
    found: dict[str | None, Any] = {}
    for config in configs:
        found.setdefault(getattr(config, "sync", None), config)
    return list(found.values())


def _in_turns(configs: list[Any]) -> list[Any]:
    """Configurations with the ways of exchanging h alternating, each in its own order."""
    groups: dict[str | None, list[Any]] = defaultdict(list)
    for config in configs:
        groups[getattr(config, "sync", None)].append(config)
    turns = itertools.zip_longest(*groups.values())
    return [config for turn in turns for config in turn if config is not None]


def _configs(task: CheckQuestion) -> list[Any]:
    """Configurations that a kernel offers for a task; none where it refuses."""
    module = importlib.import_module(MODULES[task.implementation])
    problem = task.sizes.problem(save=task.save, tf32=task.tf32)
    if module.refuses(problem, backward=task.backward) is not None:
        return []
    return list(module.configs(problem, backward=task.backward))


def row_of(outcome: WorkOutcome) -> dict[str, Any]:
    """Return the line of the CSV file for an answer."""
    task: CheckQuestion = outcome.item
    verdict: CheckResult = outcome.value or CheckResult()
    status = outcome.status if outcome.status != "ok" or verdict.worst <= 1 else "wrong"
    reason = outcome.reason or ("" if status == "ok" else verdict.text)
    kind = next(name for name, pair in TYPES.items() if pair == (task.sizes.dtype, task.tf32))
    phase = "backward" if task.backward else "forward" if task.save else "inference"
    sizes = {
        field.name: getattr(task.sizes, field.name)
        for field in dataclasses.fields(task.sizes)
        if field.name != "dtype" and getattr(task.sizes, field.name) != field.default
    }
    values = (
        task.kind, task.implementation, phase, kind, sizes, task.config, status,
        f"{verdict.worst:.3g}", verdict.worst_name, f"{outcome.took_s:.2f}", reason,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _line(row: dict[str, Any]) -> str:
    what = f"{row['kind']} {row['implementation']} {row['phase']} {row['type']}"
    return f"{row['status'].upper()}: {what} {row['sizes']} {row['config']}: {row['reason']}"


def _append(path: Path, row: dict[str, Any], *, first: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if first else "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if first:
            writer.writeheader()
        writer.writerow(row)


def _table(rows: list[dict[str, Any]]) -> str:
    """Summarise how much was right, and how near the limit the worst came."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["implementation"], row["phase"], row["type"]].append(row)
    lines = ["| kind | kernel | phase | type | right | not | worst error / limit |", "|---|---|---|---|---:|---:|---:|"]
    for key, group in sorted(groups.items()):
        right = [row for row in group if row["status"] == "ok"]
        worst = max((float(row["worst"]) for row in right), default=float("nan"))
        lines.append(f"| {' | '.join(key)} | {len(right)} | {len(group) - len(right)} | {worst:.2g} |")
    return "\n".join(lines)


def _sanitize(names: list[str]) -> int:
    """The smallest recurrences that use all of a kernel, here and now, for a tool that watches this process."""
    wrong = 0
    device_types = ("float32", "float16") if torch.cuda.is_available() else ("float32",)
    sizes = Sizes(3, 3, 24, directions=2, lengths=(3, 0, 2))
    for name, kind, backward in itertools.product(names, device_types, (False, True)):
        task = CheckQuestion("parity", name, dataclasses.replace(sizes, dtype=TYPES[kind][0]), backward=backward)
        for config in _configs(task)[:1]:
            verdict = work(dataclasses.replace(task, config=config))
            wrong += verdict.worst > 1
            print(f"{name} {kind} {'backward' if backward else 'forward'}: error {verdict.worst:.2g} of the limit")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} check"))
