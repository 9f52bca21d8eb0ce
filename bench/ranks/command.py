"""`python -m bench ranks`: every process supervises its rank, and that of rank 0 writes the records."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import units
from bench.analysis.repeats import spread
from bench.console import Console
from bench.errors import UsageError
from bench.machine import environment
from bench.plan.cases import Filters, Selection, Suite
from bench.ranks import figures
from bench.ranks.arguments import BACKENDS, BUCKET_MB, SCALINGS
from bench.ranks.figures import Division
from bench.ranks.keeper import PATIENCE_S, RankEnd, RankPlace, RankReport, gather, keep, tell
from bench.records import ranks as kept
from bench.records.folder import RunFolder
from bench.records.ranks import RanksRecord
from bench.records.schema import Status
from bench.run.planning import make_plan
from bench.run.worker_process import START_LIMIT_S, Settings

EXIT_OK, EXIT_NOT_OK = 0, 1
STATUSES = {
    RankEnd.DIED: Status.CRASHED,
    RankEnd.HUNG: Status.TIMEOUT,
    RankEnd.FAILED: Status.ERROR,
    RankEnd.UNAVAILABLE: Status.UNAVAILABLE,
}
#: Message of a rank that failed because another one did.
OTHERS_FAULT = ("Connection", "gloo", "Timed out", "peer", "DistBackendError", "DistNetworkError", "ProcessGroup")


def ranks(arguments: argparse.Namespace, plugins: Sequence[Path], command: str) -> int:
    """Keep this process's rank; on rank 0 write the folder and print the table.

    Returns:
        0 where everything is ok or unavailable; 1 otherwise, on rank 0 alone: torchrun would end all others.

    Raises:
        UsageError: bad input.
    """
    arguments.variant = arguments.variant or ("onednn" if arguments.device == "cpu" else "cudnn")
    place = RankPlace.here(arguments.exchange)
    divisions = divided(arguments, place.world)
    folder = None
    if place.rank == 0:
        refuse_unknown(arguments, plugins)
        folder = RunFolder.create(arguments.out, "ranks")
    task: dict[str, Any] = {
        "workload": arguments.workload, "variant": arguments.variant, "threads": arguments.threads,
        "device": arguments.device, "backend": BACKENDS[arguments.device],
        "settings": [vars(division) for division in divisions], "rounds": arguments.rounds, "steps": arguments.steps,
        "seed": arguments.seed, "silence_s": arguments.silence, "limit_s": arguments.time_limit,
        "join_s": max(arguments.silence, START_LIMIT_S),
        "plugins": [str(path.resolve()) for path in plugins], "checkpoint": str(place.exchange / "checkpoint"),
    }  # fmt: skip
    report = keep(place, task, arguments.silence, arguments.time_limit)
    tell(place, report)
    if folder is None:
        return EXIT_OK
    console = Console()
    reports = gather(place, 2 * arguments.silence + PATIENCE_S)
    shutil.rmtree(place.exchange, ignore_errors=True)
    records = kept.write(folder.path, recorded(arguments, divisions, reports), steps(arguments, reports))
    facts = environment.describe({}, {"OMP_NUM_THREADS": str(arguments.threads)})
    facts["run"] = {"suite": "ranks", "command": command, "world": place.world, "seed": arguments.seed}
    facts["ranks"] = [{"rank": r.rank, "ended": r.ended, "reason": r.reason, "stage": r.stage} for r in reports]
    folder.write_json("environment.json", facts)
    show(console, records)
    _draw(console, folder.path, records)
    console.say(f"records: {folder.path / kept.TABLE}; every step: {folder.path / kept.STEPS.name}")
    return EXIT_OK if {r.status for r in records} <= {Status.OK, Status.UNAVAILABLE} else EXIT_NOT_OK


def refuse_unknown(arguments: argparse.Namespace, plugins: Sequence[Path]) -> None:
    """Refuse names that do not exist, before any rank trains and before anything is written.

    Raises:
        UsageError: naming the word, and what may have been meant.
    """
    select = Selection((arguments.workload,), (arguments.variant,), ("training",))
    make_plan(
        Suite(name="ranks", summary="", select=(select,), device=arguments.device), Filters(threads=arguments.threads),
        Settings(arguments.threads, plugins=tuple(plugins)), build=False,
    )  # fmt: skip


def _draw(console: Console, folder: Path, records: Sequence[RanksRecord]) -> None:
    """Draw efficiency over ranks, where there are several."""
    from bench.report.plots import write_plots  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report.ranks import kinds  # noqa: PLC0415

    for paths in write_plots(kinds(records), folder / "plots").values():
        console.say(f"plot: {paths[0]}", "bold")


def divided(arguments: argparse.Namespace, world: int) -> list[Division]:
    """The ways to divide the work: worlds, scalings, buckets, micro-batches; one rank alone exchanges no buckets.

    Raises:
        UsageError: more ranks than there are.
    """
    worlds = sorted({*arguments.world, 1}) if arguments.world else sorted({*_powers(world), world})
    if worlds[-1] > world:
        msg = f"--world {worlds[-1]} is more than the {world} ranks that torchrun started; raise --nproc-per-node"
        raise UsageError(msg)
    found = [
        Division(size, scaling, bucket, pieces)
        for pieces in arguments.accumulate or (1,)
        for scaling in arguments.scaling or SCALINGS
        for bucket in arguments.bucket_mb or (BUCKET_MB,)
        for size in worlds
    ]
    return list(dict.fromkeys(found))


def _powers(world: int) -> list[int]:
    return [2**power for power in range(world.bit_length()) if 2**power <= world]


def culprit(reports: Sequence[RankReport]) -> RankReport | None:
    """The rank that caused a failure: one that died, else one that hung, else one that failed by itself."""
    order = list(RankEnd)
    bad = [report for report in reports if report.ended is not RankEnd.DONE]

    def key(report: RankReport) -> tuple[int, bool, int]:
        return order.index(report.ended), any(word in report.reason for word in OTHERS_FAULT), report.rank

    return min(bad, key=key, default=None)


def recorded(
    arguments: argparse.Namespace, divisions: Sequence[Division], reports: Sequence[RankReport]
) -> list[RanksRecord]:
    """The records: figures where all ranks ended well, otherwise the status of the rank that did not."""
    guilty = culprit(reports)
    events = [event for report in reports for event in report.events]
    turns = figures.turns(events) if guilty is None else {}
    gates = {Division.of(e): e for e in events if e["event"] == "gate"}
    made = []
    for division in divisions:
        fields: dict[str, Any] = {
            "workload": arguments.workload, "variant": arguments.variant, "ranks": division.world,
            "scaling": division.scaling, "bucket_mb": division.bucket_mb, "accumulate": division.accumulate,
            "threads": arguments.threads, "backend": BACKENDS[arguments.device],
        }  # fmt: skip
        gate = gates.get(division)
        if gate is not None:
            fields |= {name: gate[name] for name in ("batch", "grad_error", "grad_limit")}
        fields |= (resumed := resumption(events, division))
        if guilty is not None:
            reason = f"rank {guilty.rank} {guilty.ended}: {guilty.reason}, during: {guilty.stage}"
            fields |= {"status": STATUSES[guilty.ended], "reason": reason}
        elif gate is None or not gate["passed"]:
            why = "no gate was told of" if gate is None else gate["reason"]
            fields |= {"status": Status.PARITY_FAILED, "reason": f"gradients over ranks: {why}"}
        elif not resumed or not resumed["resume_error"] <= resumed["resume_limit"]:
            why = f"weights differ by {resumed.get('resume_error')}, limit {resumed.get('resume_limit')}"
            reason = f"training resumed from the checkpoint differs from training without a stop: {why}"
            fields |= {"status": Status.PARITY_FAILED, "reason": reason}
        else:
            fields |= timed(turns, division)
        made.append(RanksRecord(**fields))
    return made


def resumption(events: Sequence[dict[str, Any]], division: Division) -> dict[str, Any]:
    """Fields for the times of checkpoints and the rank with the largest error; empty if no rank reported any."""
    told = [event for event in events if event["event"] == "resumed" and Division.of(event) == division]
    if not told:
        return {}
    worst = max(told, key=lambda event: math.inf if math.isnan(event["resume_error"]) else event["resume_error"])
    return {name: worst[name] for name in ("resume_error", "resume_limit", "checkpoint_bytes")} | {
        "save_s": next((event["save_s"] for event in told if event["save_s"] is not None), None),
        "resume_s": max(event["resume_s"] for event in told),
    }


def timed(turns: figures.Turns, division: Division) -> dict[str, Any]:
    """Figures of one way to divide the work."""
    rounds = turns[division]
    whole = spread(list(figures.step_s(rounds).values()))
    compute = spread([max(compute for compute, _ in ranks.values()) for ranks in rounds.values()])
    assert whole is not None  # noqa: S101 - there are two rounds at least
    assert compute is not None  # noqa: S101
    fields: dict[str, Any] = {
        "rounds": len(rounds), "step_s": whole.value, "step_lo_s": whole.low, "step_hi_s": whole.high,
        "compute_s": compute.value, "wait_s": max(0.0, whole.value - compute.value),
    }  # fmt: skip
    if (efficient := figures.efficiency(turns, division)) is not None:
        fields |= {"efficiency": efficient.value, "efficiency_lo": efficient.low, "efficiency_hi": efficient.high}
    if (slowest := figures.straggler(rounds)) is not None:
        ratio = slowest.ratio
        fields |= {"slowest_rank": slowest.rank, "slowest_ratio": ratio.value}
        fields |= {"slowest_ratio_lo": ratio.low, "slowest_ratio_hi": ratio.high}
        fields["straggler"] = slowest.rank if slowest.named else None
    return fields


def steps(arguments: argparse.Namespace, reports: Sequence[RankReport]) -> list[list[Any]]:
    """Rows of ranks-steps.csv.gz."""
    return [
        [arguments.workload, arguments.variant, *dataclasses.astuple(Division.of(e)), e["round"], e["rank"], *times]
        for report in reports
        for e in report.events
        if e["event"] == "steps"
        for times in zip(e["compute_s"], e["total_s"], strict=True)
    ]


def show(console: Console, records: Sequence[RanksRecord]) -> None:
    """Print one row for each way to divide the work, and name the stragglers."""
    columns = ["scaling", "bucket", "parts", "ranks", "step", "before the first collective", "wait and rest",
               "efficiency", "slowest rank", "gradients", "checkpoint, resume"]  # fmt: skip
    rows = []
    for record in records:
        row = [record.scaling, f"{record.bucket_mb:g} MB", str(record.accumulate), str(record.ranks)]
        if record.status is not Status.OK:
            rows.append([*row, f"{record.status}: {record.reason}", *[""] * 6])
            continue
        efficient = units.ratio_interval(record.efficiency, record.efficiency_lo, record.efficiency_hi, digits=2)
        slowest = ""
        if record.slowest_rank is not None:
            ratio = units.ratio_interval(
                record.slowest_ratio, record.slowest_ratio_lo, record.slowest_ratio_hi, digits=2
            )
            slowest = f"{record.slowest_rank}: {ratio}"
        rows.append([
            *row, units.estimated_seconds(record.step_s, record.step_lo_s, record.step_hi_s),
            units.seconds(record.compute_s), units.seconds(record.wait_s), efficient.replace("x", ""), slowest,
            f"{units.error(record.grad_error)} of {units.error(record.grad_limit)}",
            f"{units.seconds(record.save_s)}, {units.seconds(record.resume_s)}",
        ])  # fmt: skip
    console.table(columns, rows)
    for rank in sorted({record.straggler for record in records if record.straggler is not None}):
        found = [record for record in records if record.straggler == rank]
        ratios = [record.slowest_ratio or 1.0 for record in found]
        console.say(
            f"rank {rank} is a straggler: before the first collective it takes {min(ratios):.2f} to {max(ratios):.2f} "
            f"times as long as the others, in {len(found)} of {len(records)} ways to divide the work",
            "yellow",
        )
