"""The command line: `python -m bench COMMAND`, with the commands of `bench.arguments`."""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench import commands
from bench.arguments import DEFAULT_SUITE, parser
from bench.commands import EXIT_INTERRUPTED, EXIT_NOT_OK, EXIT_OK, EXIT_TERMINATED, EXIT_UNFINISHED, EXIT_USAGE
from bench.console import Console, Output
from bench.errors import UsageError
from bench.machine import environment
from bench.plan import own_model
from bench.plan.cases import OWN, Filters, Suite, load_suite, overridden
from bench.plan.identity import CaseKey
from bench.records import quality as quality_record
from bench.records.folder import RunFolder
from bench.records.reader import read_beside
from bench.records.schema import Status
from bench.run import more, resume
from bench.run.planning import Plan, make_plan
from bench.run.runner import Runner
from bench.run.worker_process import Settings
from bench.timing import stopwatch
from bench.units import counted
from kernels.host.cores import usable_cores
from kernels.host.output import Terminated, run_command


def _plan(arguments: argparse.Namespace, suite: Suite) -> tuple[Plan, Settings]:
    suite = overridden(suite, vars(arguments))
    settings = Settings(
        arguments.threads or usable_cores(),
        arguments.omp_wait or "default",
        commands.plugin_paths(arguments.plugin),
        own_model=own_model.variable(vars(arguments)),
    )
    filters = Filters(
        tuple(arguments.workload),
        tuple(arguments.variant),
        tuple(arguments.mode),
        settings.threads,
        arguments.device,
    )
    plan = make_plan(suite, filters, settings, build=not arguments.dry_run)
    if settings.own_model and not any(found.case.workload.startswith(OWN) for found in plan.cases):
        names, option = (f"the suite {suite.name} has", "--suite")
        if filters.workloads:
            names, option = f"--workload {' --workload '.join(filters.workloads)} names", "--workload"
        msg = f"{names} no workload {OWN}*, so --model would not be measured; leave {option} out"
        raise UsageError(msg)
    return plan, replace(settings, own_checked=plan.own_checked)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure, write the run folder, print the table."""
    deadline_s = time.perf_counter() + (arguments.time_limit or math.inf)
    if arguments.resume is not None:
        return _resume(arguments, command, deadline_s)
    if arguments.more is not None:
        msg = "--more continues a run that has ended; name its folder with --resume"
        raise UsageError(msg)
    arguments.suite = arguments.suite or (own_model.SUITE if arguments.model else DEFAULT_SUITE)
    if arguments.out is not None:
        RunFolder.refuse(arguments.out)
    _say_looking(arguments)
    plan, settings = _plan(arguments, load_suite(arguments.suite))
    console = Console(len(plan.cases), plan.expected_s(), _output(arguments))
    runnable = len(plan.left())
    threads = counted(settings.threads, "thread")
    here = f"{runnable} can run here, {threads}; expected time about {commands.minutes(plan.expected_s())}"
    console.say(
        f"suite {plan.suite.name}: {counted(len(plan.cases), 'case')} in {counted(len(plan.groups), 'group')}, "
        + (here if runnable else "none can run here: nothing will be measured, and each is recorded with its reason")
    )
    console.warn_of_threads(settings.threads, usable_cores())
    _say_budget(console, arguments, plan)
    for device, names in plan.elsewhere.items():
        console.say(f"left out, because they do not exist on {device}: {', '.join(names)}")
    for line in own_model.lines(plan.own_model) if plan.own_model else ():
        console.say(line)
    if plan.second_cases:
        console.say(f"then pytest-benchmark, as a second instrument, times {len(plan.second_cases)} of them again")
    if arguments.dry_run:
        commands.print_cases(console, plan)
        return EXIT_OK
    console.say_once(plan.refused_together)
    folder = RunFolder.create(arguments.out, plan.suite.name)
    options = resume.kept_options(vars(arguments) | {"threads": settings.threads})
    with _writing(folder):
        if (folder.path / "environment.json").exists():
            msg = f"another run began in {folder.path} just now; name another folder with --out"
            raise UsageError(msg)
        runner = Runner(plan, folder, settings, console, options=options, deadline_s=deadline_s)
        if arguments.seed is not None:
            runner.seed = arguments.seed
        return _measure(runner, command)


def _say_looking(arguments: argparse.Namespace) -> None:
    """Say that a model of the user's own is being examined, which takes a minute if the model is large."""
    if arguments.model:
        what = "its LSTMs, their share of a call, and which variants can run it"
        Console(output=_output(arguments)).say(f"examining {arguments.model}: {what}")


def _say_budget(console: Console, arguments: argparse.Namespace, plan: Plan) -> None:
    """Say that a narrowed suite keeps all its time, unless the command line says how long to measure."""
    narrowed = arguments.workload or arguments.variant or arguments.mode
    if not narrowed or arguments.budget is not None or not plan.runnable_groups:
        return
    groups = "one group" if plan.runnable_groups == 1 else f"{plan.runnable_groups} groups"
    console.say(
        f"the chosen cases ({groups}) get the whole measuring time of the suite {plan.suite.name}, "
        f"{commands.minutes(plan.suite.budget_s)}; --budget TIME changes it"
    )


def _resume(arguments: argparse.Namespace, command: str, deadline_s: float) -> int:
    """Finish an interrupted run with the options it began with; recorded cases are kept."""
    begun = resume.begun(arguments.resume)
    _refuse_options(arguments, begun)
    began_with = parser().parse_args(["run", *begun.words])
    began_with.model_folder = own_model.folder(begun.facts)
    with contextlib.nullcontext() if arguments.dry_run else _writing(begun.folder):
        recorded = resume.recorded(begun)
        plan, settings = _plan(began_with, begun.suite)
        now = environment.describe(plan.torch_facts, settings.variables())
        now["plugins"] = resume.plugin_digests(settings.plugins) | plan.own_files
        resume.check(begun, [case.case for case in plan.cases], now)
        expected_s = plan.expected_s(recorded, begun.folder.path)
        console = Console(len(plan.cases) - len(recorded), expected_s, _output(arguments))
        console.warn_of_threads(settings.threads, usable_cores())
        for line in resume.remarks(begun, now["git"]["commit"]):
            console.say(line, "yellow")
        console.say(
            f"suite {plan.suite.name}: {len(recorded)} of {len(plan.cases)} cases are recorded; "
            f"expected time for the others about {commands.minutes(expected_s)}"
        )
        if arguments.dry_run:
            commands.print_cases(console, plan, recorded)
            return EXIT_OK
        console.say_once(plan.refused_together)
        if arguments.more is not None:
            more.check_finished(len(plan.left(recorded)), begun.folder.path)
        for line in begun.folder.mend(lambda values: CaseKey.read(values) in recorded):
            console.say(line, "yellow")
        seed = resume.new_seed(begun.seeds)
        runner = Runner(
            plan, begun.folder, settings, console, seed, begun=begun, recorded=recorded, deadline_s=deadline_s
        )
        if arguments.more is not None and not runner.open_groups():
            console.say("every group has a clear answer; nothing is left to measure", "green")
            return EXIT_OK
        return _measure(runner, command, arguments.more or 0.0)


def _refuse_options(arguments: argparse.Namespace, begun: resume.Begun) -> None:
    """Refuse options that differ from those the run began with, by name."""
    given = resume.given_options(vars(arguments))
    if "suite" in given:
        if resume.kept_options({"suite": arguments.suite})["suite"] != begun.suite_word:
            msg = f"{begun.folder.path} is a run of the suite {begun.suite_word}, not of {arguments.suite}; "
            raise UsageError(msg + "leave --suite out to finish it, or begin a new run without --resume")
        given.remove("suite")
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        msg = f"--resume continues with the options that the run began with; leave out {options}"
        raise UsageError(msg)


@contextlib.contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    """Hold a folder's lock; where the system does not allow it, report that like any wrong folder."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder.locked())
        except OSError as error:
            msg = f"the run folder {folder.path} cannot be written: {error.strerror}"
            raise UsageError(msg) from error
        yield


def _measure(runner: Runner, command: str, more_s: float = 0.0) -> int:
    """Run and show the result; if something ends the run early, say what is recorded and how to continue."""
    folder, console = runner.folder, runner.console
    quoted = shlex.quote(str(folder.path))
    again = f"python -m bench run --resume {quoted}"
    try:
        with console:
            runner.run(command, more_s)
        if runner.unfinished:
            console.say(f"time limit reached; {_safe(runner)}{_look(runner, quoted)}", "yellow")
            console.say(f"to continue: {again}", "bold")
            return EXIT_UNFINISHED
        _show(console, folder)
        _show_open(console, runner, again)
    except KeyboardInterrupt as error:
        console.say(f"interrupted; {_safe(runner)}{_look(runner, quoted)}", "red")
        console.say(f"to continue: {again}", "bold")
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = f"error: {where}{error.strerror or error}; {_safe(runner)}; once that is fixed, continue with: {again}"
        print(line, file=sys.stderr)
        return EXIT_NOT_OK
    ended = {values["status"] for values in folder.records()}
    ended |= {record.status for record in quality_record.read(folder.path)}
    code = EXIT_OK if ended <= {Status.OK, Status.UNAVAILABLE} else EXIT_NOT_OK
    console.verdict(_verdict(folder, code))
    return code


def _output(arguments: argparse.Namespace) -> Output:
    """The output that the command line asks for."""
    return Output.JSON if arguments.json else Output.QUIET if arguments.quiet else Output.FULL


def _verdict(folder: RunFolder, code: int) -> dict[str, Any]:
    """The last line of a run for programs: where it is, how it ended, and what is recommended for each group."""
    from bench.recommend.words import sentences  # noqa: PLC0415
    from bench.records.reader import read_run  # noqa: PLC0415 - scipy is slow to import

    found = [{"group": title, "text": text} for title, text in sentences(read_run(folder.path))]
    return {"run": str(folder.path), "exit_code": code, "recommendations": found}


def _safe(runner: Runner) -> str:
    """Describe how much is recorded."""
    count = len(runner.folder.records())
    if not count:
        return f"no case is recorded yet in {runner.folder.path}"
    return f"{count} of {len(runner.plan.cases)} cases are recorded in {runner.folder.path}"


def _look(runner: Runner, quoted: str) -> str:
    """Describe how to look at what is recorded, if anything is."""
    return f". To look at them: python -m bench report {quoted}" if runner.folder.records() else ""


def _show(console: Console, folder: RunFolder) -> None:
    from bench.analysis.run_summary import legend, summary_table  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report import words  # noqa: PLC0415 - matplotlib is slow to import
    from bench.report.page import write_report  # noqa: PLC0415 - matplotlib is slow to import

    report = write_report(folder.path)
    shown = [record for record in report.run.records if console.lists(record.status, record.reason)]
    table = summary_table(shown)
    # What ran was said line by line above; without it the table fits a terminal.
    table = table.drop(columns=["what ran", "first call"])
    if shown:
        console.table(list(table.columns), table.astype(str).to_numpy().tolist())
    measured = any(record.status is Status.OK for record in shown)
    for line in legend(table) if measured else ():
        console.say(line, "dim")
    if not measured:
        console.say("nothing was measured", "yellow")
    if beside := read_beside(folder.path):
        console.say(words.beside(beside, usable_cores()), "" if beside.quiet else "yellow")
    if any(record.workload.startswith(OWN) for record in report.run.records):
        from bench.recommend.words import sentences  # noqa: PLC0415 - scipy is slow to import

        for title, text in sentences(report.run):
            console.say(title, "bold")
            console.say(text)
    elif measured:
        console.say(f"which variant to ship: python -m bench recommend {shlex.quote(str(folder.path))}")
    console.say(f"records: {folder.path / 'records.csv'}")
    console.say(f"page:    {report.page.resolve().as_uri()}", "bold")


def _show_open(console: Console, runner: Runner, again: str) -> None:
    """Say which groups are undecided, how much longer would decide them, and how the time was spent."""
    if found := runner.open_groups():
        for each in found:
            console.say(each.told(), "yellow")
        console.say(f"to measure longer: {again} --more {more.duration(sum(each.needed_s for each in found))}", "bold")
    console.say(f"time spent: {stopwatch.told(runner.watch.found())}")


#: Commands that keep their command line with what they measured, and those that look at runs.
MEASURING = {
    "run": run, "ab": commands.ab, "selftest": commands.selftest, "serve": commands.serve, "ranks": commands.ranks,
    "sweep": commands.sweep,
}  # fmt: skip
LOOKING = {
    "list": commands.listing, "report": commands.report, "compare": commands.compare, "export": commands.export,
    "recommend": commands.recommend, "doctor": commands.doctor, "show": commands.show, "history": commands.history,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a usage error becomes one line and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if arguments.command in MEASURING:
            return MEASURING[arguments.command](arguments, shlex.join(["python", "-m", "bench", *words]))
        return LOOKING[arguments.command](arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return EXIT_NOT_OK
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    run_command(main)
