"""`python -m bench selftest`: runs the parts, writes their folder, and ends with 1 where a target was missed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.console import Console
from bench.errors import UsageError, meant
from bench.machine import environment
from bench.records.folder import RunFolder
from bench.run.worker_process import WorkerError
from bench.selftest import carryover, instrument, neighbour, null, power
from bench.selftest.names import PARTS, STANDARD
from bench.selftest.part import Found, Options

Run = Callable[[Options, Path, Console], Found]
RUNS: dict[str, Run] = {
    "null": null.run, "power": power.run, "instrument": instrument.run, "neighbour": neighbour.run,
    "carryover": carryover.run,
}  # fmt: skip
FOLDER = Path("results") / "selftest"
#: Parts that read an option; the other options are for all.
_OF_PAIRS = tuple(name for name in PARTS if name != "carryover")
READ_BY = {
    "planted": ("power",), "group": ("carryover",), "unstopped": ("carryover",), "pairs": _OF_PAIRS,
    "variant": _OF_PAIRS,
}  # fmt: skip
#: Seconds that a pair takes besides its rounds, and a worker's start.
WARM_S, START_S = 2.0, 3.0


def options_of(arguments: argparse.Namespace, cores: int) -> Options:
    """Read the options from the command line.

    Raises:
        UsageError: for options that do not fit together.
    """
    if arguments.mode and not arguments.workload:
        msg = "--mode without --workload; name the workload that it is the mode of"
        raise UsageError(msg)
    plain = Options()
    return Options(
        pairs=arguments.pairs,
        seconds=arguments.budget,
        processes=arguments.seatings,
        threads=tuple(dict.fromkeys(arguments.threads or (1, cores))),
        workloads=((arguments.workload, arguments.mode or "inference"),) if arguments.workload else plain.workloads,
        variant=arguments.variant,
        wait_policy=arguments.omp_wait,
        planted=tuple(dict.fromkeys(arguments.planted or ())),
        group=tuple(dict.fromkeys(arguments.group or ())),
        unstopped=arguments.unstopped,
    )


def refuse_idle_options(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse options that none of the parts to run would read.

    Raises:
        UsageError: naming the first of them.
    """
    for option, parts in READ_BY.items():
        if getattr(arguments, option) not in (None, False, Options.variant) and not set(parts) & set(names):
            msg = f"--{option} is read by {', '.join(parts)} alone, and {', '.join(names)} would run; leave it out, or "
            raise UsageError(msg + f"name {parts[0]} among the parts")


def selftest(arguments: argparse.Namespace, command: str, cores: int) -> int:
    """Run the parts; 0 when every target was reached, 1 when one was missed or could not be measured."""
    from bench.selftest import plots  # noqa: PLC0415 - matplotlib is slow to import

    names: Sequence[str] = arguments.part or STANDARD
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        msg = "; ".join(f"no part {name!r}, {meant(name, PARTS)}" for name in unknown)
        raise UsageError(msg)
    refuse_idle_options(arguments, names)
    options = options_of(arguments, cores)
    if set(names) != {"carryover"}:
        options.check()
    if "carryover" in names:
        carryover.check(options)
    folder = RunFolder.create(arguments.out or FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}", "selftest")
    console = Console()
    console.warn_of_threads(max(options.threads), cores)
    expected_s = sum(expected(name, options) for name in names)
    console.say(f"selftest {', '.join(names)}: expected time about {expected_s / 60:.0f} min; results in {folder.path}")
    folder.write_json("environment.json", _facts(command, options))
    missed: list[str] = []
    for name in names:
        start = time.perf_counter()
        try:
            found = RUNS[name](options, folder.path, console)
        except WorkerError as error:
            console.say(f"{name}: could not be measured: {error.reason}", "red")
            missed.append(name)
            continue
        found.write(folder.path, console)
        plots.draw(name, found.raw, folder.path / f"{name}.png")
        console.say(f"{name}: {time.perf_counter() - start:.0f} s; {folder.path / name}.csv and .png beside it")
        missed += found.missed
    return 1 if missed else 0


def expected(name: str, options: Options) -> float:
    """A rough guess of a part's length, seconds."""
    if name == "carryover":
        count = len(carryover.names(options))
        ready_s = options.processes * count * WARM_S
        return len(options.threads) * (carryover.budget_s(options, count) + START_S + ready_s)
    planted = len(options.planted or power.SLOWDOWNS)
    settings = {"null": 1, "power": planted, "instrument": len(instrument.TOOLS) + 1, "neighbour": 4}[name]
    count = (
        options.pairs or {"null": null, "power": power, "instrument": instrument, "neighbour": neighbour}[name].PAIRS
    )
    start_s = START_S * options.processes * (count * settings if name == "neighbour" else 1)
    return len(options.threads) * (start_s + count * settings * (options.seconds + WARM_S))


def _facts(command: str, options: Options) -> dict[str, object]:
    facts = environment.describe({}, options.settings(options.threads[0]).variables())
    facts["run"] = {"command": command, "seconds": options.seconds, "processes": options.processes}
    facts["load"] = {"before": environment.load()}
    return facts
