"""`python -m bench ab`: from the command line to a run folder and an answer."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from bench.ab import verdicts
from bench.ab.measure import Contest, Setting
from bench.ab.names import NEW, SIDES, on
from bench.ab.sides import Side, find, uncommitted
from bench.analysis import tables as compare_tables
from bench.analysis.compare import CompareOptions, Comparison, Finding
from bench.console import Console
from bench.errors import UsageError
from bench.machine import energy, environment
from bench.plan.cases import Filters, Selection, Suite
from bench.records.folder import RunFolder
from bench.records.reader import read_run
from bench.run import resume
from bench.run.planning import Described, Plan, make_plan
from bench.run.worker_process import Settings, scratch_folder

#: What is compared unless the user says otherwise: a short model and a real forecast, as a CPU user runs them by
#: default and with our kernel.
WORKLOADS, VARIANTS, MODES = ("seed", "forecast-deepar"), ("onednn", "cpu-fused"), ("inference",)
VARIANTS_CUDA = ("cudnn", "triton")
#: Seconds that a case takes on one side besides its rounds: alone in a process of its own, and in each seating.
COLD_S, READY_S, START_S = 4.0, 1.2, 2.5


def ab(arguments: argparse.Namespace, settings: Settings, command: str) -> Finding:
    """Measure BASE and NEW in turns and print the answer.

    Args:
        arguments: of the command line.
        settings: of all workers.
        command: the command line, for environment.json.

    Raises:
        UsageError: for sides, names or a folder that will not do; nothing was written.
    """
    if arguments.out is not None:
        RunFolder.refuse(arguments.out)
    _refuse_labels(arguments.variant)
    console = Console()
    with scratch_folder() as scratch:
        base, new = (find(name, getattr(arguments, name), scratch) for name in SIDES)
        if line := uncommitted((base, new)):
            console.say(line, "yellow")
        plans = [_plan(side, arguments, settings) for side in (base, new)]
        groups = contests(plans)
        cases = [found for group in groups for found in group]
        folder = RunFolder.create(arguments.out, "ab")
        console = Console(len(cases))
        expected_s = arguments.budget + len(cases) * (COLD_S + arguments.seatings * READY_S)
        expected_s += 2 * START_S * len(groups) * arguments.seatings
        console.say(
            f"cases on both sides: {len(cases) // 2}, groups: {len(groups)}, threads: {settings.threads}, seatings: "
            f"{arguments.seatings}; expected time about {expected_s / 60:.0f} min; results in {folder.path}"
        )
        seed = resume.new_seed() if arguments.seed is None else arguments.seed
        device = arguments.device or "cpu"
        idle = energy.idle(device)
        seatings, block_s = arguments.seatings, arguments.block
        setting = Setting((base, new), settings, folder, scratch, console, seatings, seed, idle, block_s)
        setting.keep(plans)
        facts = _facts(setting, plans, arguments.budget, command) | {"energy": {device: dataclasses.asdict(idle)}}
        with folder.locked(), console, setting.distance:
            _measure(setting, groups, facts, arguments.budget)
    options = CompareOptions("time", arguments.margin, arguments.fail_on)
    found = verdicts.judge(read_run(folder.path), (base.shown, new.shown), options)
    _show(console, found, (base, new), plans)
    for line in verdicts.advice(found, arguments.budget, arguments.seatings):
        console.say(line, "yellow")
    console.say(f"records: {folder.path / 'records.csv'}; page: python -m bench report {shlex.quote(str(folder.path))}")
    return found.outcome


def _refuse_labels(variants: Sequence[str]) -> None:
    if labelled := [name for name in variants if "#" in name]:
        msg = f"--variant {labelled[0]!r} has a label; expected a name or pattern, the sides are its labels"
        raise UsageError(msg)


def _plan(side: Side, arguments: argparse.Namespace, settings: Settings) -> Plan:
    """Ask a worker of a side what is known of its cases.

    Raises:
        UsageError: the side lacks what was named, or a worker cannot start there.
    """
    device = arguments.device or "cpu"
    variants = arguments.variant or (VARIANTS if device == "cpu" else VARIANTS_CUDA)
    select = Selection(
        tuple(arguments.workload or WORKLOADS),
        tuple(on(name, side.name) for name in variants),
        tuple(arguments.mode or MODES),
    )
    suite = Suite("ab", "", (select,), arguments.budget, processes=arguments.seatings, device=device)
    filters = Filters(threads=settings.threads)
    try:
        return make_plan(suite, filters, dataclasses.replace(settings, home=side.home), build=True)
    except UsageError as error:
        # The user named a variant without the label of its side.
        msg = f"{side.label} {side.word}: {str(error).replace(on('', side.name), '')}"
        raise UsageError(msg) from error


def contests(plans: Sequence[Plan]) -> list[list[Described]]:
    """The cases that both sides know, group by group, those of BASE first.

    Raises:
        UsageError: no case can run on both sides.
    """
    known = [
        {found.case.key.group.of(found.case.executed): found for found in plan.cases if "#" in found.case.variant}
        for plan in plans
    ]
    shared = [key for key in known[0] if key in known[1]]
    groups: dict[str, list[Described]] = {}
    for side in known:
        for key in shared:
            groups.setdefault(side[key].case.group, []).append(side[key])
    if not any(all(not side[key].unavailable for side in known) for key in shared):
        reasons = {f"{f.case.variant} {f.unavailable}" for side in known for f in side.values() if f.unavailable}
        why = "; ".join(sorted(reasons)) or "no variant of these names is on both sides"
        msg = f"no case can run on both sides: {why}"
        raise UsageError(msg)
    return list(groups.values())


def _facts(setting: Setting, plans: Sequence[Plan], budget_s: float, command: str) -> dict[str, Any]:
    """The content of environment.json: what both sides share, and a section for each."""
    facts = environment.describe({}, setting.workers.variables())
    del facts["software"]
    for side, plan in zip(setting.sides, plans, strict=True):
        facts[side.name] = side.facts(plan.catalogue["software"] | plan.torch_facts)
    facts["run"] = {
        "suite": "ab",
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": command,
        "budget_s": budget_s,
        "processes": setting.seatings,
        "seed": setting.seed,
        "plugins": resume.plugin_digests(setting.workers.plugins),
    }
    return facts


def _measure(setting: Setting, groups: Sequence[list[Described]], facts: dict[str, Any], budget_s: float) -> None:
    """Measure all groups; the folder is readable however this ends."""
    facts["load"] = {"before": environment.load()}
    start = time.perf_counter()
    try:
        for group in groups:
            contest = Contest(setting, group, budget_s / len(groups))
            for record in contest.run():
                setting.console.record(record)
    finally:
        facts["load"]["after"] = environment.load()
        facts["run"]["duration_s"] = round(time.perf_counter() - start, 1)
        setting.folder.write_json("environment.json", facts)
        setting.folder.write_table()


def _show(console: Console, found: Comparison, sides: Sequence[Side], plans: Sequence[Plan]) -> None:
    """Print who is who, the table, and the answer in a sentence."""
    for side, plan in zip(sides, plans, strict=True):
        software = plan.catalogue["software"] | plan.torch_facts
        console.say(
            f"{side.label} is {side.word}: torch {software['torch']}, Python {software['python']}, {_source(side)}"
        )
    table = compare_tables.cases([found])
    console.table(table.columns, table.rows)
    console.say(compare_tables.lead(NEW.upper(), found), f"bold {compare_tables.OUTCOME_STYLE[found.outcome]}".strip())
    for line in compare_tables.untold(NEW.upper(), found):
        console.say(line, "yellow")
    console.say("change: ratio within the same rounds; above 1, NEW is faster", "dim")
    for line in [*compare_tables.verdicts(found.options.margin), compare_tables.DOUBTFUL]:
        console.say(line, "dim")


def _source(side: Side) -> str:
    short = side.commit if " " in side.commit else f"commit {side.commit[:10]}"
    return f"{short}{', with uncommitted changes' if side.kind == 'checkout' else ''}"
