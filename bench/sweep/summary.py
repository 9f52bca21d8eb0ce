"""The result of a sweep, one row for each unit: on the terminal and in summary.csv; the spread in between-hosts.csv."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import units
from bench.console import Console
from bench.errors import UsageError
from bench.machine.interference import DISTURBED
from bench.records.folder import RunFolder
from bench.records.reader import read_beside, read_environment
from bench.records.schema import Status
from bench.records.tables import write_csv
from bench.sweep import between_hosts
from bench.sweep.between_hosts import HostPair
from bench.sweep.folder import StoredUnit, SweepFolder
from bench.sweep.pulling import UnitJob

SUMMARY, BETWEEN = "summary.csv", "between-hosts.csv"
#: Columns of summary.csv, with their meaning.
SUMMARY_COLUMNS = {
    "unit": "group (workload, mode, device), without its threads",
    "kind": "kind of host; names the folder under `hosts/`",
    "repeat": "1; 2 and up where another host of the kind measured the group again; names the folder `run-1`",
    "host": "node that measured it; empty if nothing did yet",
    "hostname": "network name of the machine",
    "ended": "`done`; `timeout`, `crashed` or `failed`, with a reason; `left` if --resume has yet to measure it",
    "reason": "why it did not end as `done`",
    "cases": "number of cases by status, as `4 ok 1 unavailable`",
    "rounds": "timed rounds",
    "disturbed": "timed rounds in which something else used the host, or the host moved its cores apart",
    "others": "cores that other programs used during the rounds, on average",
    "wall_s": "duration by the clock of the host, seconds",
    "lost": "nodes that were lost while they measured it",
    "time_spread": "largest relative difference of a median time from that on another host; empty without a repeat",
    "speedup_spread": "the same for speedups",
}
#: Columns of between-hosts.csv, with their meaning.
BETWEEN_COLUMNS = {
    "unit": "group (workload, mode, device), without its threads",
    "variant": "as in records.csv",
    "kind": "kind of both hosts",
    "first": "one host",
    "second": "the other host",
    "first_s": "median time of a call on the first host, seconds",
    "second_s": "median time of a call on the second host, seconds",
    "first_speedup": "speedup on the first host, over its own reference",
    "second_speedup": "speedup on the second host, over its own reference",
    "time_ratio": "second_s / first_s",
    "speedup_ratio": "second_speedup / first_speedup",
    "beyond": "True if the intervals of the two speedups do not overlap",
}


def row_of(unit: StoredUnit, pairs: Sequence[HostPair]) -> dict[str, Any]:
    """A row of summary.csv."""
    beside = read_beside(unit.path)
    mine = [pair for pair in pairs if (pair.unit, pair.kind) == (unit.unit, unit.kind)]
    mine = [pair for pair in mine if unit.host in {pair.first, pair.second}]
    ratios = [pair.speedup_ratio for pair in mine if pair.speedup_ratio is not None]
    return {
        **dict.fromkeys(SUMMARY_COLUMNS, ""),
        **{name: getattr(unit, name) for name in ("unit", "kind", "repeat", "host", "hostname", "ended", "reason")},
        "cases": statuses(unit),
        "rounds": beside.rounds if beside else 0,
        "disturbed": beside.disturbed if beside else 0,
        "others": round(beside.others, 3) if beside else "",
        "wall_s": unit.wall_s,
        "lost": " ".join(unit.lost),
        "time_spread": round(between_hosts.largest([pair.time_ratio for pair in mine]), 4) if mine else "",
        "speedup_spread": round(between_hosts.largest(ratios), 4) if ratios else "",
    }


def statuses(unit: StoredUnit) -> str:
    """Number of cases of a unit by status: `4 ok 1 unavailable`."""
    counts = Counter(str(values["status"]) for values in RunFolder(unit.path).records())
    return " ".join(f"{count} {status}" for status, count in counts.most_common())


def line(unit: StoredUnit) -> str:
    """Describe a unit that ended in one line."""
    took = f" in {unit.wall_s:.0f} s" if unit.wall_s is not None else ""
    return f"{unit.host}: {unit.unit} {unit.ended}{took}: {unit.reason or statuses(unit)}"


def show(console: Console, folder: SweepFolder, stored: Sequence[StoredUnit], left: Sequence[UnitJob]) -> bool:
    """Print and write the summary; return True if a case that can run failed.

    Args:
        console: what the user sees.
        folder: of the sweep.
        stored: units that are done.
        left: jobs that are not done.
    """
    pairs = between_hosts.host_pairs(stored)
    names = folder.state().units
    rows = [row_of(unit, pairs) for unit in folder.stored()]
    for job in left:
        known = {"unit": names[job.number - 1], "kind": job.kind, "repeat": job.repeat, "ended": "left"}
        rows.append(dict.fromkeys(SUMMARY_COLUMNS, "") | known)
    write_csv(folder.path / SUMMARY, list(SUMMARY_COLUMNS), rows)
    columns = ["group", "host", "kind of host", "cases", "disturbed rounds", "time", "lost nodes", "speedups differ by"]
    console.table(columns, [_shown(row) for row in rows])
    if any(row["disturbed"] for row in rows):
        console.say(f"disturbed rounds: {DISTURBED}; in brackets, the cores that other programs used on average", "dim")
    if pairs:
        write_csv(folder.path / BETWEEN, list(BETWEEN_COLUMNS), map(dataclasses.asdict, pairs))
        console.say(f"{between_hosts.told(pairs)}; all cases: {folder.path / BETWEEN}")
    for path in sorted({folder.run_path(unit.kind, unit.repeat) for unit in stored}):
        for difference in read_environment(path).get("host_differences", []):
            console.say(f"hosts of one kind differ: {difference}", "yellow")
    console.say(f"summary: {folder.path / SUMMARY}")
    fine = {Status.OK, Status.UNAVAILABLE}
    return any({values["status"] for values in RunFolder(unit.path).records()} - fine for unit in stored)


def _shown(row: dict[str, Any]) -> list[str]:
    """A row for the terminal."""
    company = ""
    if row["rounds"]:
        company = f"{row['disturbed']} of {row['rounds']} ({row['others']:.2f} cores)"
    spread = f"{row['speedup_spread']:.1%}" if row["speedup_spread"] != "" else ""
    group = row["unit"] if row["repeat"] == 1 else f"{row['unit']} (repeat {row['repeat']})"
    ended = row["cases"] if row["ended"] == "done" else " ".join(filter(None, (row["ended"], row["cases"])))
    took = units.seconds(row["wall_s"]) if row["wall_s"] not in {"", None} else ""
    return [group, row["host"], row["kind"], ended, company, took, row["lost"], spread]


def pages(console: Console, folder: SweepFolder, runs: Sequence[Path]) -> None:
    """Write the page of each run folder, and where there are several one of them side by side."""
    from bench.report import runs_page  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report.page import write_report  # noqa: PLC0415

    there = [path for path in runs if RunFolder(path).records()]
    for path in there:
        console.say(f"run:  {path}; page: {write_report(path).page.resolve().as_uri()}", "bold")
    if len(there) > 1:
        try:
            page = runs_page.write_side_by_side(there, folder.path / "side-by-side.html")
        except UsageError as error:
            console.say(f"no side-by-side page: {error}", "yellow")
        else:
            console.say(f"side by side: {page.resolve().as_uri()}", "bold")
