"""`python -m bench serve`: every variant behind a queue, LoadGen in front, and what each can bear."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import random
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from bench import units
from bench.console import Console
from bench.errors import UsageError
from bench.machine import energy, environment
from bench.plan.cases import OWN, REFERENCE, Filters, Selection, Suite
from bench.plan.own_model import lines as own_lines
from bench.records import serving
from bench.records.folder import RunFolder
from bench.records.schema import Status
from bench.records.serving import ServingRecord
from bench.run import resume
from bench.run.planning import Described, Plan, make_plan
from bench.run.worker_process import Settings, Worker, WorkerError, scratch_folder
from bench.serve.load_test import Batching, Bound
from bench.serve.measure import Asked, Serving

WORKLOADS = {"inference": ("seed",), "decode": ("translation-small-scaled",)}
VARIANTS, VARIANTS_CUDA = ("onednn", "cpu-fused"), ("cudnn",)
#: Without a bound: the percentile that LoadGen is asked about, and the wait for company.
PERCENTILE, WAIT_S = 99.0, 2e-3
#: Share of the bound that a query may wait for company, unless the command line says otherwise.
WAIT_SHARE = 0.1
#: Seconds that a worker may take to find out how the inputs of an own model are taken apart.
ROWS_LIMIT_S = 180.0
EXIT_OK, EXIT_NOT_OK = 0, 1


def serve(arguments: argparse.Namespace, settings: Settings, command: str, cores: int) -> int:
    """Serve, write the folder, print the table.

    Returns:
        0 where every variant that can run here was served; 1 where the gate refused one or a process failed.

    Raises:
        UsageError: bad input.
    """
    check(arguments)
    _refuse(arguments.out)
    console = Console()
    plan = _plan(arguments, settings)
    settings = dataclasses.replace(settings, own_checked=plan.own_checked)
    _check_rows(plan, settings)
    asked = _asked(arguments)
    folder = _folder(arguments.out)
    for line in own_lines(plan.own_model) if plan.own_model else ():
        console.say(line)
    console.warn_of_threads(settings.threads, cores)
    if settings.threads >= cores:
        console.say(
            f"{settings.threads} threads leave the generator no core of its own ({cores} can be used), so it may issue "
            f"queries late; the results say how late; --threads {max(1, cores - 1)} leaves it a core",
            "yellow",
        )
    runnable = len(plan.left())
    console.say(
        f"serve, scenario {asked.scenario}: {len(plan.cases)} variants, {runnable} can run here; about "
        f"{asked.load_s * runnable:.0f} s of load; results in {folder.path}"
    )
    seed = random.SystemRandom().randrange(resume.SEEDS) if arguments.seed is None else arguments.seed
    records: list[ServingRecord] = []
    start = time.perf_counter()
    facts = environment.describe(plan.torch_facts, settings.variables())
    facts["run"] = {
        "suite": "serve", "command": command, "seed": seed,
        "plugins": resume.plugin_digests(settings.plugins) | plan.own_files,
        "loadgen": importlib.metadata.version("mlcommons-loadgen"),
    }  # fmt: skip
    idle = energy.idle(arguments.device)
    facts["energy"] = {arguments.device: dataclasses.asdict(idle)}
    facts["load"] = {"before": environment.load()}
    served = {described.case.executed for described in plan.cases}
    facts["needs"] = {v["name"]: v["needs"] for v in plan.catalogue["variants"] if v["name"] in served}
    try:
        with folder.locked():
            for group, cases in plan.groups:
                console.say(group.name, "bold")
                measured = Serving(asked, settings, folder.path, console, seed, idle)
                records += measured.run([_with_batching(case, arguments, asked) for case in cases])
    finally:
        facts["load"]["after"] = environment.load()
        facts["run"]["duration_s"] = round(time.perf_counter() - start, 1)
        there = (folder.path / "environment.json").exists()
        folder.write_json("environment-serve.json" if there else "environment.json", facts)
    show(console, records)
    _draw(console, folder.path)
    if asked.scenario == "server":
        console.say(
            f"which variant to ship: python -m bench recommend {shlex.quote(str(folder.path))} --objective load"
        )
    return EXIT_OK if {record.status for record in records} <= {Status.OK, Status.UNAVAILABLE} else EXIT_NOT_OK


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be served.

    Raises:
        UsageError: naming what is missing or wrong.
    """
    if arguments.scenario == "server" and arguments.bound is None:
        msg = "the scenario server searches for the highest load under a bound, which is missing; add --bound p99=20ms"
        raise UsageError(msg)
    if importlib.util.find_spec("mlperf_loadgen") is None:
        msg = "the package mlcommons-loadgen, which generates the load, is missing; pip install mlcommons-loadgen"
        raise UsageError(msg)
    if arguments.mode == "decode" and arguments.batching != "step":
        msg = "--mode decode serves queries that end at different steps, in rows that they join and leave; add "
        raise UsageError(msg + "--batching step")
    refuse_queue_options(arguments)
    if arguments.model and arguments.batching == "step":
        msg = "--batching step serves the workloads of this project, whose models can take one step at a time; "
        raise UsageError(msg + "leave it out for --model")
    if arguments.model and arguments.lengths == "bucketed":
        msg = "--lengths bucketed is for sequences that the queue pads, and those of --model keep the shape that the "
        raise UsageError(msg + "inputs function gave them; leave it out")
    if labelled := [name for name in arguments.variant if "@" in name]:
        msg = f"--variant {labelled[0]!r} has sizes; they belong to --workload"
        raise UsageError(msg)


def refuse_queue_options(arguments: argparse.Namespace) -> None:
    """Refuse options that say how a batch is formed, if there are no batches.

    Raises:
        UsageError: naming the first of them.
    """
    if arguments.batching == "queue":
        return
    given = {"--longest-wait": arguments.longest_wait, "--lengths": arguments.lengths}
    for option in (name for name, value in given.items() if value is not None):
        msg = (
            f"{option} says how a queue makes up a batch, and with --batching step a query joins at the next step, "
            f"whatever its length; leave {option} out"
        )
        raise UsageError(msg)


def _plan(arguments: argparse.Namespace, settings: Settings) -> Plan:
    variants = tuple(arguments.variant or (VARIANTS if arguments.device == "cpu" else VARIANTS_CUDA))
    workloads = arguments.workload or ([f"{OWN}*"] if arguments.model else WORKLOADS[arguments.mode])
    select = Selection(tuple(workloads), (REFERENCE, *variants), (arguments.mode,))
    suite = Suite("serve", "", (select,), arguments.budget, device=arguments.device)
    # Named here, so that the user hears of variants that do not exist on the device.
    return make_plan(suite, Filters(variants=(REFERENCE, *variants), threads=settings.threads), settings, build=True)


def _check_rows(plan: Plan, settings: Settings) -> None:
    """Refuse an own model whose inputs cannot be taken apart into sequences, before anything is written.

    Raises:
        UsageError: naming the input or output that cannot; or that no case is of the model.
    """
    if not settings.own_model:
        return
    own = list(dict.fromkeys(f.case.workload for f in plan.cases if f.case.workload.startswith(OWN)))
    if not own:
        msg = f"--workload names no {OWN}*, so --model would not be served; leave --workload out"
        raise UsageError(msg)
    try:
        with scratch_folder() as folder, Worker(settings, folder / "rows.log", folder) as worker:
            list(worker.ask("serving", ROWS_LIMIT_S, action="rows", workloads=own))
    except WorkerError as error:
        raise UsageError(error.reason.removeprefix("OwnModelError: ")) from error


def _asked(arguments: argparse.Namespace) -> Asked:
    bound = arguments.bound or Bound(PERCENTILE, 0.0)
    wait_s = arguments.longest_wait
    if wait_s is None:
        wait_s = WAIT_SHARE * bound.seconds if arguments.bound else WAIT_S
    # The largest batch is the workload's unless named; it is filled in for each.
    batching = Batching(arguments.largest_batch or 0, wait_s, arguments.lengths or "padded")
    if arguments.batching == "step":
        batching = Batching(arguments.largest_batch or 0, None, "", "step")
    return Asked(arguments.scenario, bound, batching, arguments.budget, arguments.repeats)


def _with_batching(described: Described, arguments: argparse.Namespace, asked: Asked) -> tuple[Described, Batching]:
    largest = arguments.largest_batch or int(described.facts["batch"])
    return described, dataclasses.replace(asked.batching, largest=largest)


def _refuse(out: Path | None) -> None:
    """Refuse a folder that could not be written into, without making it.

    Raises:
        UsageError: it has served something already, or cannot be written.
    """
    if out is None:
        return
    if (out / serving.FILE).exists():
        msg = f"{out} has a {serving.FILE} already, and nothing is overwritten; name another folder with --out"
        raise UsageError(msg)
    if not (out / "records.jsonl").is_file():
        RunFolder.refuse(out)


def _folder(out: Path | None) -> RunFolder:
    """The folder to write into: a new one, or that of a run that has served nothing."""
    if out is not None and (out / "records.jsonl").is_file():
        return RunFolder(out)
    return RunFolder.create(out, "serve")


def show(console: Console, records: Sequence[ServingRecord]) -> None:
    """Print a row per variant, the one that sustains the highest load first."""
    ordered = sorted(records, key=lambda found: (found.workload, -(found.qps or 0.0)))
    columns = ["workload", "variant", "queries/s", "latency, LoadGen", "latency, ours", "lone query p50", "offline/s"]
    columns += ["batch", "padding", "generator delay p99", "LoadGen"]
    rows = [row(record) for record in ordered]
    if any(record.energy_per_query_j for record in ordered):
        columns.append("energy/query")
        rows = [[*cells, units.joules(record.energy_per_query_j)] for cells, record in zip(rows, ordered, strict=True)]
    console.table(columns, rows)
    for doubt in filter(None, map(serving.beyond_offline, ordered)):
        console.say(f"~ {doubt}", "yellow")


def row(record: ServingRecord) -> list[str]:
    """A row of the table."""
    why = f"{record.status}: {record.reason}" if record.status is not Status.OK else record.reason
    return [
        record.workload,
        record.variant,
        serving.load_text(record),
        units.seconds(record.latency_bound_s),
        units.seconds(record.latency_ours_s),
        units.seconds(record.single_p50_s),
        units.count(record.offline_qps),
        "" if record.batch_mean is None else f"{record.batch_mean:.1f}",
        units.share(record.waste),
        units.seconds(record.lateness_p99_s),
        why or record.loadgen,
    ]


def _draw(console: Console, folder: Path) -> None:
    """Draw latency against load; in the folder of a run, its page is made anew too."""
    from bench.report import serving as charts  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report.page import write_report  # noqa: PLC0415
    from bench.report.plots import write_plots  # noqa: PLC0415

    console.say(f"records: {folder / serving.TABLE}; every LoadGen test: {folder / serving.TESTS.name}")
    if (folder / "records.jsonl").exists():
        console.say(f"page: {write_report(folder).page.resolve().as_uri()}", "bold")
        return
    written = write_plots(charts.kinds(folder), folder / "plots")
    for paths in written.values():
        console.say(f"plot: {paths[0]}", "bold")
