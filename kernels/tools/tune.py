"""Measure which kernel is fastest for each shape on this GPU: `python -m kernels tune`.

For each shape and type: every configuration of every kernel is compared with float64 first, then run many times at full
length, which must give the same bits; a configuration that is wrong, varies or hangs is left out and
reported. The others are timed in turns with torch's own LSTM (cuDNN). The table is written after every shape, so a
process that is killed loses nothing, and a second call continues where the first stopped. `kernels.dispatch` reads it.
`--device cpu` tries the same at tiny sizes in Triton's interpreter, whose times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import hashlib
import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .. import measurements as table
from .. import refusals
from ..dispatch import MODULES
from ..host.numbers import duration, seconds, whole
from ..host.output import run_command
from ..host.usage import PACKAGE, Parser, part_of
from ..measurements import MeasuredShape, MeasuredTable
from . import check_work
from .check import TYPES
from .problems import Sizes
from .process_pool import Pool, children
from .tune_work import Candidate, Job, measure

#: Batch, hidden size, steps, directions; the most important first: FlashRNN's plot, DeepBench; where cuDNN cannot take
#: its persistent kernel: two directions (IWSLT's encoder), an odd size (Zaremba's medium language model), a batch above
#: 128; GNMT, a batch of one; DeepAR and the seed last, where the host decides.
QUICK = (
    (16, 768, 1024, 1), (16, 512, 25, 1), (64, 1024, 25, 1), (128, 512, 50, 2), (20, 650, 35, 1),
    (16, 1024, 25, 1), (256, 512, 50, 1), (128, 1024, 50, 1), (16, 256, 150, 1),
    (16, 1536, 50, 1), (32, 2048, 25, 1), (1, 1024, 50, 1), (64, 40, 168, 1), (16, 16, 10, 1),
)  # fmt: skip
#: The rest of DeepBench's training shapes; TFT; encoders that read both ways (pointer-generator, IWSLT).
REST = (
    *((batch, hidden, 25, 1) for hidden in (512, 1024, 2048, 4096) for batch in (16, 32, 64, 128)),
    (8, 1536, 50, 1), (32, 1536, 50, 1), (32, 256, 150, 1), (64, 256, 150, 1),
    (1024, 128, 168, 1), (16, 256, 400, 2), (128, 512, 50, 2), (1, 256, 100, 1), (64, 64, 100, 1),
)  # fmt: skip
#: What `--device cpu` measures, in the types whose products the interpreter computes.
TINY = ((2, 16, 2, 1), (1, 4, 2, 2))
TINY_ORDER = ("float32", "float16")
#: In this order: what most people train in, then what they get without asking.
ORDER = ("float16", "tf32", "bfloat16", "float32")
#: Steps of the comparison with float64, which walks over them one by one.
CHECKED_STEPS = 20
#: Runs at full length that must give the same bits: a race that shows once in these is not written into a table.
REPEATS = 50
#: The same in the interpreter, which runs programs one after another.
TINY_REPEATS = 2
#: Facts that figures depend on: if one has changed, old figures are measured again.
DEPENDS = ("torch", "triton", "cudnn", "driver", "kernels")
PHASES = {"inference": (False, False), "forward": (False, True), "backward": (True, True)}


def main(arguments: list[str] | None = None) -> int:
    """Measure until all is measured or the time limit is reached; 0, or 2 when it cannot run here."""
    options = _options(arguments)
    interpreted = options.device == "cpu"
    if interpreted and options.out is None:
        print("tune: --device cpu needs --out: its times are the interpreter's, not for `auto`", file=sys.stderr)
        return 2
    if interpreted == torch.cuda.is_available():
        told = "hide the GPU: CUDA_VISIBLE_DEVICES= python -m kernels tune --device cpu" if interpreted else (
            "torch sees no GPU; run it on the machine whose table you want")  # fmt: skip
        print(f"tune: {told}", file=sys.stderr)
        return 2
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "Triton's interpreter" if interpreted else torch.cuda.get_device_name()
    path = options.out or table.path_of(device)
    facts = _facts(options.commit)
    try:
        known = start(path, device, facts, again=options.again)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    until = time.monotonic() + options.time_limit
    left = [one for one in _plan(options) if not _known(known, *one)]
    with (
        Pool(check_work.work, jobs=options.jobs or children(), timeout_s=options.timeout) as checks,
        Pool(measure, jobs=1, timeout_s=options.timeout) as clocks,
    ):
        for number, (sizes, kind) in enumerate(left):
            if time.monotonic() > until:
                print(
                    f"tune: the time limit of {options.time_limit:g} s is reached, {len(left) - number} shapes are left"
                )
                break
            for entry in _shape(sizes, kind, options, checks, clocks):
                known = known.with_entry(entry)
                print(line(entry), flush=True)
            table.write(path, known)
    print(f"{len(known.entries)} entries in {path}")
    return 0


def start(path: Path, device: str, facts: dict[str, str], *, again: bool) -> MeasuredTable:
    """The table to continue: the file's if it is of this GPU, these versions and these kernels, otherwise an empty one.

    Raises:
        ValueError: when the file is of another GPU or broken; it is not overwritten.
    """
    if not path.exists():
        return MeasuredTable(device, facts=facts)
    old = table.read(path)
    if old.device != device:
        msg = f"{path} is of {old.device}, and here is {device}; give another --out"
        raise ValueError(msg)
    same = all(old.facts.get(name) == facts[name] for name in DEPENDS)
    return MeasuredTable(device, old.entries if same and not again else (), facts)


def line(entry: MeasuredShape) -> str:
    """An entry in a line: times of our kernels and of torch's own LSTM, fastest first; products count on our side."""
    times = {name: timing.time_s + entry.around_s for name, timing in entry.kernels.items()}
    if entry.vendor_s is not None:
        times["cuDNN"] = entry.vendor_s
    if entry.vendor_float16_s is not None:
        times["cuDNN float16"] = entry.vendor_float16_s
    ranked = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in sorted(times.items(), key=lambda one: one[1]))
    wrong = f"; left out: {len(entry.wrong)}" if entry.wrong else ""
    return f"{entry.shape} {entry.phase}, us: {ranked} (products {entry.around_s * 1e6:.1f}){wrong}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {PACKAGE} tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file of the table (default: where `auto` looks for it)"
    )
    parser.add_argument(
        "--time-limit",
        type=duration,
        default=1200.0,
        metavar="TIME",
        help="start no further shape after this time, such as 600, 600s or 10min (default: 20min)",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes in Triton's interpreter"
    )
    parser.add_argument("--shapes", choices=("quick", "all"), default="quick", help="which shapes (default: quick)")
    parser.add_argument("--type", action="append", choices=list(ORDER), help="measure only this type; can be repeated")
    parser.add_argument(
        "--most",
        type=whole(),
        default=12,
        help="most candidates of a kernel in one phase of one shape (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=whole(), default=15, help="timed blocks of each candidate (default: 15)")
    parser.add_argument(
        "--jobs",
        type=whole(),
        help="child processes that compile and check (default: up to 12 by cores and the GPU's memory)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=90.0,
        metavar="SECONDS",
        help="limit of one configuration, each time that it is tried or timed (default: %(default)s)",
    )
    parser.add_argument("--again", action="store_true", help="measure again what the file already has")
    parser.add_argument("--commit", default="", help="commit to record if git is not available")
    options = parser.parse_args(arguments)
    parser.refuse_unwritable(options.out)
    return options


def _plan(options: argparse.Namespace) -> Iterator[tuple[Sizes, str]]:
    """Shapes and types, the most important first; the quick ones of all types before the rest."""
    if options.device == "cpu":
        for kind, (batch, hidden, steps, directions) in itertools.product(options.type or TINY_ORDER, TINY):
            yield Sizes(batch, steps, hidden, directions, dtype=TYPES[kind][0]), kind
        return
    for shapes in (QUICK, REST) if options.shapes == "all" else (QUICK,):
        for kind, (batch, hidden, steps, directions) in itertools.product(options.type or ORDER, shapes):
            if shapes is QUICK or (batch, hidden, steps, directions) not in QUICK:
                yield Sizes(batch, steps, hidden, directions, dtype=TYPES[kind][0]), kind


def _known(known: MeasuredTable, sizes: Sizes, kind: str) -> bool:
    keys = {entry.key for entry in known.entries}
    return all((phase, kind, sizes.batch, sizes.steps, sizes.hidden, sizes.directions) in keys for phase in PHASES)


def _shape(sizes: Sizes, kind: str, options: argparse.Namespace, checks: Pool, clocks: Pool) -> Iterator[MeasuredShape]:
    """Check all candidates of all phases side by side, then time each phase alone on the GPU."""
    right: dict[str, list[Candidate]] = {phase: [] for phase in PHASES}
    wrong: dict[str, list[str]] = {phase: [] for phase in PHASES}
    phases = {pair: phase for phase, pair in PHASES.items()}

    def passed(tasks: Iterable[check_work.CheckQuestion]) -> Iterator[tuple[check_work.CheckQuestion, float]]:
        """Tasks whose answer was right, with the worst error over what is allowed."""
        for outcome in checks.run(tasks):
            task: check_work.CheckQuestion = outcome.item
            if outcome.status == "ok" and outcome.value.worst <= 1:
                yield task, outcome.value.worst
                continue
            phase, reason = phases[task.backward, task.save], outcome.reason or outcome.value.text
            wrong[phase].append(f"{task.implementation} {task.config}: {reason}")
            print(f"LEFT OUT: {sizes} {kind} {phase}: {wrong[phase][-1]}", flush=True)

    checked = [task for task, _ in passed(_tasks(sizes, tf32=TYPES[kind][1], most=options.most))]
    runs = TINY_REPEATS if options.device == "cpu" else REPEATS
    repeated = [dataclasses.replace(task, kind="repeat", sizes=sizes, runs=runs) for task in checked]
    for task, worst in passed(repeated):
        right[phases[task.backward, task.save]].append(Candidate(task.implementation, task.config, worst))
    for phase in PHASES:
        job = Job(sizes, TYPES[kind][1], phase, tuple(right[phase]), tuple(wrong[phase]), options.rounds)
        if (entry := timed(job, clocks)) is not None:
            yield entry


def timed(job: Job, clocks: Pool) -> MeasuredShape | None:
    """Time a job, without what hangs or breaks in it, however many parts that is; None where nothing is left to time.

    A part that fails is known by its name, and whatever is right is timed in the end. Each failure costs at most one
    limit, and what was timed until then, as all other parts are timed again from the start.
    """
    while True:
        (outcome,) = clocks.run([job])
        if outcome.status == "ok":
            found: MeasuredShape = outcome.value
            return found
        what = f"{job.sizes} {job.phase}: {outcome.at or 'outside of any part'}: {outcome.reason}"
        left = job.without(outcome.at, outcome.reason)
        if left is None:
            print(f"NOT TIMED: {what}", flush=True)
            return None
        print(f"LEFT OUT: {what}: {left.wrong[-1]}", flush=True)
        job = left


def _tasks(sizes: Sizes, *, tf32: bool, most: int) -> Iterator[check_work.CheckQuestion]:
    """Parity of the candidates, at fewer steps; modules put their best guesses first."""
    checked = dataclasses.replace(sizes, steps=min(sizes.steps, CHECKED_STEPS))
    for (backward, save), name in itertools.product(PHASES.values(), MODULES):
        module = importlib.import_module(MODULES[name])
        problem = sizes.problem(save=save, tf32=tf32)
        if module.refuses(problem, backward=backward) is None:
            offered = module.configs(problem, backward=backward)
            for config in offered:
                if (reason := refusals.reason(name, config, backward=backward)) is not None:
                    print(f"LEFT OUT: {name} {config}: {table.folder() / refusals.NAME}: {reason}", flush=True)
            for config in refusals.allowed(name, offered, backward=backward)[:most]:
                yield check_work.CheckQuestion("parity", name, checked, backward, save, tf32, config=config)


def _facts(commit: str) -> dict[str, str]:
    """Facts that the figures depend on besides the code."""
    triton = importlib.import_module("triton")
    driver = Path("/proc/driver/nvidia/version")
    here = Path(__file__).parent.parent
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    sources = b"".join(path.read_bytes() for path in sorted((here / "gpu").glob("*.py")))
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": commit or said.stdout.strip() or "unknown",
        "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.exists() else "unknown",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": torch.__version__,
        "triton": str(triton.__version__),
        "kernels": hashlib.sha256(sources).hexdigest()[:12],
        "input": "as wide as the hidden state",
    }


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} tune"))
