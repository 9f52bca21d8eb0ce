"""`python -m bench sweep`: plan, connect, hand out, put together, report."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.console import Console
from bench.errors import UsageError, meant
from bench.machine import environment
from bench.plan.cases import Filters, Suite, load_suite, overridden
from bench.records.folder import RunFolder
from bench.run.planning import Plan, make_plan
from bench.run.resume import given_options, kept_options, plugin_digests
from bench.run.worker_process import Settings
from bench.sweep import summary
from bench.sweep.arguments import DEFAULT_SUITE, UNIT_LIMIT_S
from bench.sweep.cluster import RayCluster
from bench.sweep.folder import SweepFolder, SweepState
from bench.sweep.hosts import HostKind, code_digest
from bench.sweep.merging import MergedRun
from bench.sweep.pulling import Executor, Pulling, SweepNode, UnitJob
from bench.sweep.units import SweepUnit, request_of, units_of
from bench.units import counted

EXIT_OK, EXIT_NOT_OK, EXIT_UNFINISHED = 0, 1, 4
#: Options that say how to continue, not what to measure: a resumed sweep may have others.
PASSING = ("command", "cluster", "checkout", "time_limit", "dry_run", "out", "resume")


class Cluster(Executor, Protocol):
    """Nodes that can be connected to: `bench.sweep.cluster.RayCluster`."""

    def connected(self) -> AbstractContextManager[Cluster]:
        """Reach the nodes."""

    def cancel(self) -> None:
        """End what is being measured."""


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep before it measures.

    Attributes:
        state: what it was begun with.
        suite: as the command line wants it.
        units: of the suite.
        folder: None where nothing is to be written.
    """

    state: SweepState
    suite: Suite
    units: tuple[SweepUnit, ...]
    folder: SweepFolder | None

    @property
    def limit_s(self) -> float:
        """Seconds that a unit may take."""
        return float(self.state.options.get("unit_limit") or UNIT_LIMIT_S)

    def threads(self, kind: HostKind) -> int:
        """CPU threads of a unit on a kind of host."""
        return int(self.state.options.get("threads") or kind.threads)

    def run_of(self, kind: HostKind, repeat: int) -> MergedRun:
        """The run folder of a kind and a repeat."""
        assert self.folder is not None  # noqa: S101 - a dry run puts nothing together
        path = self.folder.run_path(kind.key, repeat)
        return MergedRun(path, kind, self.suite, self.units, self.threads(kind), self.state.command)


def sweep(arguments: argparse.Namespace, command: str, cluster: Cluster | None = None) -> int:
    """Measure a suite over the nodes of a cluster, or finish a sweep that was begun.

    Args:
        arguments: of the command line.
        command: the command line itself.
        cluster: nodes to use instead of those of the command line.

    Returns:
        0 where every case that can run is ok, 1 where one is not, 4 where units are left for --resume.

    Raises:
        UsageError: bad input.
    """
    start_s = time.perf_counter()
    console = Console()
    begun = _begun(arguments) if arguments.resume else None
    options = begun.options if begun else kept_options({n: v for n, v in vars(arguments).items() if n not in PASSING})
    options |= {"suite": options.get("suite") or DEFAULT_SUITE}
    if arguments.out is not None:
        RunFolder.refuse(arguments.out)
    suite, units = _planned(options, console)
    plugins = tuple(plugin_digests(map(Path, options["plugin"])).values())
    state = begun or SweepState(
        options["suite"], options, tuple(unit.name for unit in units), (), int(options.get("repeats") or 1),
        code_digest(environment.ROOT), environment.git()["commit"], plugins, command,
    )  # fmt: skip
    _check_same(state, units, plugins, arguments.resume)
    device = units[0].suite.device
    checkout = (arguments.checkout or environment.ROOT).absolute()
    found = cluster or RayCluster(
        arguments.cluster, checkout, options["plugin"], device, lambda told: _refusal(told, state), console.say
    )
    with found.connected() as connected:
        nodes = connected.nodes()
        kinds = state.kinds if begun else _kinds(nodes, options["kind"])
        state = dataclasses.replace(state, kinds=kinds)
        _check_hosts(state, nodes, begun is not None)
        prepared = PreparedSweep(state, suite, units, None)
        _announce(console, prepared, nodes)
        if arguments.dry_run:
            return EXIT_OK
        folder = SweepFolder(arguments.resume or RunFolder.create(arguments.out, f"{suite.name}-sweep").path)
        prepared = dataclasses.replace(prepared, folder=folder)
        with RunFolder(folder.path).locked():
            if begun is None:
                folder.begin(state)
            deadline_s = start_s + (arguments.time_limit or math.inf)
            return _measure(prepared, connected, console, deadline_s)


def _begun(arguments: argparse.Namespace) -> SweepState:
    """The sweep that is resumed; options that say otherwise than it began are refused by name."""
    passing = {name: None for name in PASSING if name != "out"}
    if given := given_options(vars(arguments) | passing):
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        msg = f"--resume continues with the options that the sweep began with; leave out {names}"
        raise UsageError(msg)
    return SweepFolder(arguments.resume).state()


def _planned(options: Mapping[str, Any], console: Console) -> tuple[Suite, tuple[SweepUnit, ...]]:
    """The suite and its units, from the names that there are; what can run is found out on each node."""
    suite = overridden(load_suite(options["suite"]), options)
    left_out = ["its second instrument"] * suite.second_instrument + ["its [[quality]] parts"] * bool(suite.quality)
    if left_out:
        console.say(f"a sweep measures only the groups of {suite.name}; left out: {' and '.join(left_out)}")
    device = options.get("device") or suite.device or "cpu"
    plugins = tuple(map(Path, options["plugin"]))
    for path in plugins:
        if not path.is_file():
            msg = f"plugin {path} does not exist; expected the path of a Python file"
            raise UsageError(msg)
    # One thread here, as each kind of host has its own number.
    settings = Settings(1, options.get("omp_wait") or "default", plugins)
    workloads, variants, modes = (tuple(options[name]) for name in ("workload", "variant", "mode"))
    filters = Filters(workloads, variants, modes, 1, device)
    plan: Plan = make_plan(suite, filters, settings, build=False)
    return suite, units_of(plan, float(options.get("unit_limit") or UNIT_LIMIT_S))


def _check_same(state: SweepState, units: Sequence[SweepUnit], plugins: tuple[str, ...], resumed: Path | None) -> None:
    """Refuse to continue with code or units that differ from those the sweep began with.

    Raises:
        UsageError: naming what differs.
    """
    if resumed is None:
        return
    differs = ""
    if state.code != code_digest(environment.ROOT):
        differs = f"the code has changed since commit {state.commit[:12]}, or since what was not committed then"
    elif state.plugins != plugins:
        differs = "a plugin has changed"
    elif state.units != tuple(unit.name for unit in units):
        differs = f"the suite {state.suite} has changed"
    if differs:
        msg = f"{resumed} cannot be resumed, since {differs}; nothing was changed: begin a new sweep"
        raise UsageError(msg)


def _refusal(told: Mapping[str, Any], state: SweepState) -> str:
    """Why a node may not measure, by what it says of itself; empty if it may."""
    if told["code"] != state.code:
        other = str(told["commit"])[:12]
        return f"its checkout has other code (commit {other}, here {state.commit[:12]}); check out the same there"
    if tuple(told["plugins"]) != state.plugins:
        return "its plugins are missing or differ; put the same files at the same paths there"
    return ""


def _kinds(nodes: Sequence[SweepNode], wanted: Sequence[str]) -> tuple[HostKind, ...]:
    """Kinds of the hosts that are there, narrowed to those that are wanted.

    Raises:
        UsageError: no host is of a kind that is wanted.
    """
    found = {node.kind.key: node.kind for node in nodes}
    for key in wanted:
        if key not in found:
            msg = f"no host of the kind {key!r}; {meant(key, tuple(found))}"
            raise UsageError(msg)
    return tuple(found[key] for key in sorted(wanted or found))


def _check_hosts(state: SweepState, nodes: Sequence[SweepNode], resumed: bool) -> None:
    """Refuse a sweep that the nodes cannot finish; a resumed one may continue with some of its kinds.

    Raises:
        UsageError: naming the kind that has too few hosts.
    """
    for kind in state.kinds:
        count = len({node.name for node in nodes if node.kind.key == kind.key})
        if count < state.repeats and not resumed:
            msg = (
                f"--repeats {state.repeats} needs as many hosts of each kind, and {kind.key} has {count}; "
                "lower it, name other kinds with --kind, or add hosts"
            )
            raise UsageError(msg)
    if not any(node.kind.key == kind.key for node in nodes for kind in state.kinds):
        keys = ", ".join(kind.key for kind in state.kinds)
        msg = f"no host is of a kind that the sweep began with ({keys}); nothing was changed"
        raise UsageError(msg)


def _announce(console: Console, prepared: PreparedSweep, nodes: Sequence[SweepNode]) -> None:
    """Say which hosts measure what, and how long that may take."""
    state = prepared.state
    wanted = {kind.key for kind in state.kinds}
    rows = [[node.name, node.hostname, node.kind.key, node.kind.told()] for node in nodes if node.kind.key in wanted]
    console.table(["node", "host", "kind of host", "hardware and software"], rows)
    for node in nodes:
        if node.kind.key not in wanted:
            console.say(f"{node.name} is left out: this sweep does not measure its kind, {node.kind.key}", "yellow")
    jobs = [unit.expected_s for unit in prepared.units] * len(state.kinds) * state.repeats
    per_node_s = sum(jobs) / max(1, len(rows))
    hosts = f"{counted(state.repeats, 'host')} of each kind ({counted(len(state.kinds), 'kind')} here)"
    console.say(
        f"suite {prepared.suite.name}: {counted(len(prepared.units), 'group')}, each on {hosts}; expected time about "
        f"{max(per_node_s, *jobs) / 60:.1f} min, longest group {max(jobs) / 60:.1f} min"
    )
    console.table(
        ["group", "variants", "expected time"],
        [[unit.name, str(len(unit.cases)), f"{unit.expected_s:.0f} s"] for unit in prepared.units],
    )


def _measure(prepared: PreparedSweep, cluster: Cluster, console: Console, deadline_s: float) -> int:
    """Hand out what is not done; if something ends the sweep early, say what is recorded and how to continue."""
    folder, state = prepared.folder, prepared.state
    assert folder is not None  # noqa: S101 - a dry run does not come here
    folder.mend()
    stored = folder.stored()
    for kind in state.kinds:
        for repeat in range(1, state.repeats + 1):
            prepared.run_of(kind, repeat).rebuild([u for u in stored if (u.kind, u.repeat) == (kind.key, repeat)])
    kinds = {kind.key: kind for kind in state.kinds}
    losses = folder.losses()

    def keep(job: UnitJob, node: SweepNode, result: dict[str, Any]) -> None:
        unit, kind = prepared.units[job.number - 1], kinds[job.kind]
        values = {
            "unit": unit.name, **dataclasses.asdict(job), "host": node.name, "hostname": node.hostname,
            "ended": result["ended"], "reason": result["reason"], "wall_s": result["wall_s"],
            "lost": pulling.losses.get(job, []),
        }  # fmt: skip
        new = folder.store(values, result["files"], unit.cases_with(prepared.threads(kind)))
        stored.append(new)
        mine = [u for u in stored if (u.kind, u.repeat) == (job.kind, job.repeat)]
        prepared.run_of(kind, job.repeat).add(mine)
        console.say(summary.line(new), "" if new.ended == "done" else "red")

    pulling = Pulling(
        prepared.units, tuple(kinds), state.repeats, cluster,
        lambda unit: request_of(unit, state.options, prepared.limit_s, state.command),
        keep, folder.lost, console.say, deadline_s,
        done={unit.job: unit.host for unit in stored}, losses=losses,
    )  # fmt: skip
    again = f"python -m bench sweep --resume {shlex.quote(str(folder.path))}"
    try:
        finished = pulling.run()
    except KeyboardInterrupt:
        cluster.cancel()
        total = len(prepared.units) * len(kinds) * state.repeats
        safe = f"{len(stored)} of {total} units are recorded in {folder.path}"
        console.say(f"interrupted; {safe}", "red")
        console.say(f"to continue: {again}, with --cluster", "bold")
        raise
    bad = summary.show(console, folder, stored, pulling.left)
    runs = [run for kind in state.kinds for n in range(1, state.repeats + 1) if (run := prepared.run_of(kind, n))]
    summary.pages(console, folder, [run.path for run in runs])
    if not finished:
        console.say(
            f"{len(pulling.left)} groups were not measured: the time limit was reached, or no node could take them",
            "yellow",
        )
        console.say(f"to continue: {again}, with --cluster", "bold")
        return EXIT_UNFINISHED
    return EXIT_NOT_OK if bad else EXIT_OK
