"""The commands that look at runs or hold them against each other; `bench.__main__` has the one that measures."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from bench.console import Console
from bench.errors import UsageError, writing
from bench.plan import own_model
from bench.plan.cases import Filters, Selection, Suite, load_suite, suite_names
from bench.plan.identity import CaseKey
from bench.records.schema import Status
from bench.run.planning import Plan, make_plan
from bench.run.worker_process import Settings
from kernels.host.cores import usable_cores
from kernels.host.output import utf8, why_unwritable, write_new

EXIT_OK, EXIT_NOT_OK, EXIT_USAGE, EXIT_REGRESSION, EXIT_UNFINISHED, EXIT_UNCLEAR = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


def listing(arguments: argparse.Namespace) -> int:
    """Print suites, workloads, and variants with what keeps each from running here; or the cases of one suite."""
    console = Console()
    if arguments.suite is not None:
        suite = load_suite(arguments.suite)
        filters = Filters(threads=usable_cores(), device=arguments.device)
        plan = make_plan(suite, filters, Settings(usable_cores(), plugins=plugin_paths(arguments.plugin)), build=False)
        console.say(f"{suite.name}: {suite.summary}", "bold")
        print_cases(console, plan)
        console.say(f"{len(plan.left())} of {len(plan.cases)} cases can run here; about {minutes(plan.expected_s())}")
        return EXIT_OK
    # It has no lengths and no packing: what cannot run there cannot run at all.
    simplest = Selection(workloads=("seed",))
    suite = Suite(name="list", summary="", select=(simplest,), device=arguments.device or "cpu")
    settings = Settings(usable_cores(), plugins=plugin_paths(arguments.plugin))
    # Named, so that what does not exist on the device has its line too.
    every = Filters(threads=settings.threads, variants=("*",))
    plan = make_plan(suite, every, settings, build=False)
    console.table(["suite", "what it measures"], [[s.name, s.summary] for s in map(load_suite, suite_names())])
    workloads = [[w["name"], w["data"], w["source"]] for w in plan.catalogue["workloads"]]
    console.table(["workload", "data", "sizes from"], workloads)
    here: dict[str, list[str]] = {}
    for found in plan.cases:
        reasons = here.setdefault(found.case.variant, [])
        if (reason := found.unavailable or "runs") not in reasons:
            reasons.append(reason)
    rows = [[v["name"], v["summary"], "; ".join(here[v["name"]])] for v in plan.catalogue["variants"]]
    console.table(["variant", "what it is", f"here, on {suite.device}"], rows)
    return EXIT_OK


def plugin_paths(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The plugins that a command line names.

    Raises:
        UsageError: for one that does not exist.
    """
    for path in paths:
        if not path.is_file():
            msg = f"plugin {path} does not exist; expected the path of a Python file"
            raise UsageError(msg)
    return tuple(paths)


def report(arguments: argparse.Namespace) -> int:
    """Write plots and page again, or a page of several runs."""
    from bench.analysis.history import read_history  # noqa: PLC0415 - pandas is slow to import
    from bench.report import history_page, runs_page  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report.page import write_report  # noqa: PLC0415 - matplotlib is slow to import

    first, *others = arguments.dir
    if arguments.history or others:
        if arguments.history and others:
            msg = f"--history takes one folder that holds the runs, not {len(arguments.dir)}; leave the others out"
            raise UsageError(msg)
        out = arguments.out or first / ("history.html" if arguments.history else "side-by-side.html")
        if arguments.history:
            page = history_page.write_history(read_history(first), out, _title(first))
        else:
            page = runs_page.write_side_by_side(arguments.dir, out)
        Console().say(f"page: {page.resolve().as_uri()}")
        return EXIT_OK
    if arguments.out is not None:
        msg = "--out is for a page of several runs; that of one run is report.html in its folder"
        raise UsageError(msg)
    if first.is_dir() and (why := why_unwritable(first / "report.html")):
        msg = (
            f"{first} cannot be written: {why}; the page of a run goes into its folder, so copy that and name the copy"
        )
        raise UsageError(msg)
    found = write_report(first)
    Console().say(f"page: {found.page.resolve().as_uri()}; {len(found.plots)} plots beside it")
    return EXIT_OK


def history(arguments: argparse.Namespace) -> int:
    """Show where cases changed for good over the runs of a folder, and what may have done it."""
    from bench.analysis import history_tables  # noqa: PLC0415 - pandas is slow to import
    from bench.analysis.history import MeasuredBy, read_history  # noqa: PLC0415
    from bench.report import history_page  # noqa: PLC0415 - matplotlib is slow to import

    if arguments.format != "text":
        _refuse_existing(arguments.out, "--out")
    elif arguments.out is not None and (table := {".csv": "csv", ".md": "markdown"}.get(arguments.out.suffix.lower())):
        msg = f"--out {arguments.out} names a table, and without --format it is the page: add --format {table}"
        raise UsageError(msg)
    found = read_history(arguments.dir, MeasuredBy(arguments.by))
    if arguments.format == "text":
        history_tables.text(found)
        out = arguments.out or arguments.dir / "history.html"
        page = history_page.write_history(found, out, _title(arguments.dir))
        Console().say(f"page: {page.resolve().as_uri()}", "bold")
    elif arguments.out is not None:
        write_text(arguments.out, history_tables.render(found, arguments.format))
        Console().say(f"{history_tables.lead(found)}; written: {arguments.out}")
    else:
        print(history_tables.render(found, arguments.format), end="")
    return EXIT_OK


def _title(folder: Path) -> str:
    return str(folder.resolve().name)


def compare(arguments: argparse.Namespace) -> int:
    """Compare runs with a base."""
    from bench.analysis import compare as comparing  # noqa: PLC0415 - pandas is slow to import
    from bench.analysis import tables as compare_tables  # noqa: PLC0415

    _check_fail_on(arguments)
    _refuse_existing(arguments.out, "--out")
    if any(path.resolve() == arguments.base.resolve() for path in arguments.new):
        msg = f"{arguments.base} is the base and a run to compare with it; name two runs"
        raise UsageError(msg)
    options = comparing.CompareOptions(arguments.by, arguments.margin, arguments.fail_on, arguments.force)
    base = comparing.load(arguments.base)
    found = [comparing.compare(base, comparing.load(path), options) for path in arguments.new]
    if arguments.out:
        write_text(arguments.out, compare_tables.render(found, arguments.format))
        for label, comparison in compare_tables.labelled(found):
            for line in (compare_tables.lead(label, comparison), *compare_tables.untold(label, comparison)):
                Console().say(line)
        Console().say(f"written: {arguments.out}")
    elif arguments.format == "text":
        compare_tables.text(found)
    else:
        print(compare_tables.render(found, arguments.format), end="")
    return exit_code(arguments, max(comparison.outcome for comparison in found).name)


def ab(arguments: argparse.Namespace, command: str) -> int:
    """Measure two interpreters or revisions in turns."""
    from bench.ab import command as sides  # noqa: PLC0415 - pandas is slow to import

    _check_fail_on(arguments)
    settings = Settings(arguments.threads or usable_cores(), arguments.omp_wait, plugin_paths(arguments.plugin))
    return exit_code(arguments, sides.ab(arguments, settings, command).name)


def _check_fail_on(arguments: argparse.Namespace) -> None:
    if arguments.allow_unclear and arguments.fail_on is None:
        msg = "--allow-unclear is about --fail-on, which is missing; add --fail-on slower:PERCENT"
        raise UsageError(msg)


def exit_code(arguments: argparse.Namespace, outcome: str) -> int:
    """The exit code of an `Outcome` of `--fail-on`, by name."""
    unclear = EXIT_OK if arguments.allow_unclear else EXIT_UNCLEAR
    return {"REGRESSION": EXIT_REGRESSION, "UNCLEAR": unclear}.get(outcome, EXIT_OK)


def selftest(arguments: argparse.Namespace, command: str) -> int:
    """Test the suite itself."""
    from bench.selftest import command as parts  # noqa: PLC0415 - pandas is slow to import

    return parts.selftest(arguments, command, usable_cores())


def serve(arguments: argparse.Namespace, command: str) -> int:
    """Serve variants under load."""
    from bench.serve import command as serving  # noqa: PLC0415 - no other command needs it

    cores = usable_cores()
    settings = Settings(
        arguments.threads or max(1, cores - 1),
        plugins=plugin_paths(arguments.plugin),
        own_model=own_model.variable(vars(arguments)),
    )
    return serving.serve(arguments, settings, command, cores)


def ranks(arguments: argparse.Namespace, command: str) -> int:
    """Train over the ranks that torchrun started."""
    from bench.ranks import command as keeping  # noqa: PLC0415 - no other command needs it

    return keeping.ranks(arguments, plugin_paths(arguments.plugin), command)


def sweep(arguments: argparse.Namespace, command: str) -> int:
    """Measure a suite over the nodes of a cluster."""
    from bench.sweep import command as sweeping  # noqa: PLC0415 - no other command needs it

    return sweeping.sweep(arguments, command)


def export(arguments: argparse.Namespace) -> int:
    """Write a run in another program's format."""
    from bench.analysis import export as exporting  # noqa: PLC0415 - pandas is slow to import

    out = arguments.out or arguments.dir / "export.pytest-benchmark.json"
    _refuse_existing(out, "--out")
    found = exporting.pytest_benchmark(arguments.dir)
    write_text(out, found.text)
    left = f"; left out because they did not end ok: {', '.join(found.left_out)}" if found.left_out else ""
    Console().say(f"written: {out}, {found.cases} cases{left}")
    return EXIT_OK


def recommend(arguments: argparse.Namespace) -> int:
    """Say which variant to ship."""
    from bench.recommend.command import command  # noqa: PLC0415 - scipy is slow to import

    return command(arguments)


def doctor(_: argparse.Namespace) -> int:
    """Say what this machine offers and lacks."""
    from bench.terminal.doctor import doctor as look  # noqa: PLC0415 - no other command needs it

    return look()


def show(arguments: argparse.Namespace) -> int:
    """Print the cases of a run, or one in depth."""
    from bench.terminal import show as showing  # noqa: PLC0415 - scipy is slow to import

    if arguments.case is None:
        if arguments.trace is not None:
            msg = f"--trace {arguments.trace} is of one case: name it"
            raise UsageError(msg)
        return showing.show_all(arguments.dir, arguments.against, arguments.rivals, arguments.format)
    for option in ("against", "rivals"):
        if getattr(arguments, option) is not None:
            msg = f"--{option} {getattr(arguments, option)}: lists all cases, so leave out {arguments.case!r}"
            raise UsageError(msg)
    if arguments.format != "text":
        msg = f"--format {arguments.format}: is for tables of cases, so leave out {arguments.case!r}"
        raise UsageError(msg)
    return showing.show(arguments.dir, arguments.case, arguments.trace)


def _refuse_existing(path: Path | None, option: str) -> None:
    if path is not None and path.exists():
        msg = f"{path} exists, and nothing is overwritten; name another file with {option}"
        raise UsageError(msg)


def write_text(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        UsageError: when it cannot be written.
    """
    with writing(path):
        write_new({path: utf8(text)})


def print_cases(console: Console, plan: Plan, recorded: Collection[CaseKey] = ()) -> None:
    """Print the cases of a plan, and what keeps each from running here."""
    console.say_once(plan.refused_together)
    rows = []
    for found in plan.cases:
        if not console.lists(Status.UNAVAILABLE, found.unavailable or ""):
            continue
        case = found.case
        here = "recorded" if case.key in recorded else found.unavailable or "runs"
        rows.append([case.workload, case.mode, case.device, case.variant, here])
    if rows:
        console.table(["workload", "mode", "device", "variant", "here"], rows)


def minutes(seconds: float) -> str:
    """A time for people, as `50 s` or `3 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"  # noqa: PLR2004
