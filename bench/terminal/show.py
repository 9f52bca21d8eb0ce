"""`python -m bench show RUN [CASE]`: all cases, or one in depth with the command that measures it again and a trace."""

from __future__ import annotations

import fnmatch
import os
import shlex
import subprocess
import sys
from pathlib import Path

from bench import units
from bench.analysis.figures import speedup
from bench.analysis.roofline import precision_words
from bench.analysis.run_summary import DOUBT, doubts, rate
from bench.analysis.tables import DOUBTFUL, ComparisonTable, markdown_table
from bench.console import Console
from bench.errors import UsageError, meant, writing
from bench.plan import own_model
from bench.plan.cases import OWN, REFERENCE, executed
from bench.records.reader import RecordedRun, read_run
from bench.records.schema import Record, Status
from bench.run.worker_process import ROOT, Settings
from bench.terminal.rivals import COLUMNS, pairings

TRACE_LIMIT_S = 600.0
EXIT_OK, EXIT_FAILED = 0, 1


def show(path: Path, pattern: str, trace: Path | None) -> int:
    """Print everything that is known of one case of a run.

    Args:
        path: run folder.
        pattern: `WORKLOAD/MODE/VARIANT`, or only the last parts of it; may hold `*`.
        trace: new file for a Chrome trace of one call of the case.

    Raises:
        UsageError: no case, or more than one, fits the pattern; the trace's file exists or cannot be written.
    """
    run, console = read_run(path), Console()
    if trace is not None and trace.exists():
        msg = f"--trace {trace} exists, and nothing is overwritten: name a new file"
        raise UsageError(msg)
    record = chosen(run, pattern)
    for key, value in facts(record):
        console.say(f"{key + ':':<22}{value}")
    console.say(f"{'measure it again:':<22}{again(record, run)}", "bold")
    if trace is None:
        return EXIT_OK
    return _trace(record, run, trace, console)


def show_all(path: Path, against: str | None, rivals: str | None, form: str) -> int:
    """Print the cases of a run in one table.

    Args:
        path: run folder.
        against: variant that speedups are relative to, from rounds in which both took turns; None for the reference.
        rivals: names of variants, in which * stands for anything: their fastest against the fastest of all others.
        form: `text` or `markdown`.

    Raises:
        UsageError: the run did not measure such variants.
    """
    run, console = read_run(path), Console()
    if rivals is not None:
        table = ComparisonTable([*COLUMNS], [found.cells for found in pairings(run, rivals)])
    elif against is not None:
        table = _against(run, against)
    else:
        rows = [[name(record), str(record.status), _speed(record)] for record in run.records]
        table = ComparisonTable(["case", "status", "speedup"], rows)
    if form == "markdown":
        console.say(markdown_table(table))
    else:
        console.table(table.columns, table.rows)
    if any(cell.startswith(DOUBT) for row in table.rows for cell in row):
        # A line right below a table in Markdown would be its last row.
        console.say(f"\n{DOUBTFUL}" if form == "markdown" else DOUBTFUL)
    return EXIT_OK


def _against(run: RecordedRun, against: str) -> ComparisonTable:
    measured = sorted({record.variant for record in run.records if record.status is Status.OK})
    if against not in measured:
        reason = next((record.reason for record in run.records if record.variant == against and record.reason), None)
        msg = f"--against {against}: not measured in this run; {reason or meant(against, measured)}"
        raise UsageError(msg)
    rows = []
    yardsticks = {record.key.group: record for record in run.records if record.variant == against}
    for record in run.records:
        found = speedup(run.group(record), against, record.variant) if record.status is Status.OK else None
        ratio = units.ratio_interval(found.value, found.low, found.high) if found else ""
        doubtful = found and (doubts(record) or doubts(yardsticks[record.key.group]))
        mark = DOUBT if doubtful else ""
        rows.append([name(record), str(record.status), mark + ratio])
    return ComparisonTable(["case", "status", f"speedup over {against}"], rows)


def name(record: Record) -> str:
    """Name of a case on the command line."""
    return f"{record.workload}/{record.mode}/{record.variant}"


def chosen(run: RecordedRun, pattern: str) -> Record:
    """The one record that a pattern fits.

    Raises:
        UsageError: none or several do.
    """
    names = {name(record): record for record in run.records}
    fitting = [n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern) or n.endswith(f"/{pattern}")]
    if not fitting:
        fitting = [n for n in names if fnmatch.fnmatchcase(n, f"*/{pattern}") or pattern in n.split("/")]
    if len(fitting) > 1:
        msg = f"{pattern!r} matches {len(fitting)} cases of {run.path}: {', '.join(fitting)}; name one of them"
        raise UsageError(msg)
    if not fitting:
        # Compared with as much of each name as was given.
        parts = pattern.count("/") + 1
        known = dict.fromkeys("/".join(n.split("/")[-parts:]) for n in names)
        msg = f"{run.path} has no case {pattern!r}; {meant(pattern, known)}"
        raise UsageError(msg)
    return names[fitting[0]]


def facts(record: Record) -> list[tuple[str, str]]:
    """Names and texts of everything that is known of a case, nothing that is not."""
    sizes = (
        ("batch", record.batch),
        ("source steps", record.source_steps),
        ("target steps", record.target_steps),
        ("hidden", record.hidden_size),
        ("layers", record.num_layers),
        ("parameters", record.parameters),
    )
    found = [
        ("case", f"{name(record)}, {record.device}, {record.threads} threads"),
        ("status", f"{record.status}{f': {record.reason}' if record.reason else ''}"),
        ("model", ", ".join([record.model, *(f"{key} {value:,}" for key, value in sizes if value is not None)])),
        ("data", record.data),
        ("speedup", _speed(record)),
        ("doubtful", "; ".join(doubts(record)) if record.status is Status.OK else ""),
    ]
    mark = DOUBT if doubts(record) else ""
    for key in ("p50", "p90", "p95", "p99"):
        value, lo, hi = (getattr(record, f"latency_{key}{end}_s") for end in ("", "_lo", "_hi"))
        if value is not None:
            ends = f"[{units.seconds(lo)}, {units.seconds(hi)}]"
            found.append((key, f"{mark}{units.estimated_seconds(value, lo, hi)} {ends}"))
    throughput = rate(record, record.throughput_seq_per_s)
    counted = "" if throughput == units.NO_ESTIMATE else " sequences/s"
    disturbed = f", {record.disturbed} of them disturbed" if record.disturbed else ""
    samples = f"{record.samples} rounds in {record.processes} processes{disturbed}, {record.calls} calls"
    start = [("build", record.build_s), ("first call", record.first_call_s), ("compiling", record.compile_s)]
    found += [
        ("measured in", samples if record.samples else ""),
        ("throughput", f"{mark}{throughput}{counted}" if throughput else ""),
        ("share of ceiling", f"{units.share(record.ceiling_share)}, {record.bound}" if record.ceiling_share else ""),
        ("start", ", ".join(f"{key} {units.seconds(value)}" for key, value in start if value is not None)),
        ("memory", units.megabytes(record.memory_peak_bytes)),
        ("error", f"{units.error(record.parity_error)} of {units.error(record.parity_limit)}"
                  if record.parity_error is not None else ""),
        ("gradient error", f"{units.error(record.grad_error)} of {units.error(record.grad_limit)}"
                           if record.grad_error is not None else ""),
        ("what ran", record.evidence),
        ("precision", precision_words(record.precision, record.ran_precision)),
        ("graphs", f"{record.graphs}, {record.graph_breaks} breaks, {record.recompiles} recompiles"
                   if record.graphs is not None else ""),
        ("operators", record.ran_operators),
    ]  # fmt: skip
    return [(key, value) for key, value in found if value]


def again(record: Record, run: RecordedRun) -> str:
    """The command that measures a case again, with the reference that its speedup is relative to."""
    words = ["python", "-m", "bench", "run", *own_model.run_words(_own_model(record, run), executed(record.variant))]
    words += ["--workload", record.workload, "--mode", record.mode]
    words += ["--variant", record.variant] if record.variant != REFERENCE else []
    words += ["--device", record.device, "--threads", str(record.threads)]
    if record.omp_wait not in {"", "default"}:
        words += ["--omp-wait", record.omp_wait]
    for plugin in _plugins(run):
        words += ["--plugin", str(plugin)]
    return shlex.join(words)


def _own_model(record: Record, run: RecordedRun) -> str:
    """Return what the run's command line said of a model of the user's own, if this case is one of it."""
    return own_model.stored(run.environment) if record.workload.startswith(OWN) else ""


def _plugins(run: RecordedRun) -> tuple[Path, ...]:
    section = run.environment.get("run")
    arguments = section.get("arguments") if isinstance(section, dict) else None
    found = arguments.get("plugin") if isinstance(arguments, dict) else None
    return tuple(Path(str(path)) for path in found) if isinstance(found, list) else ()


def _speed(record: Record) -> str:
    text = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
    return f"{DOUBT}{text}" if text and doubts(record) else text


def _trace(record: Record, run: RecordedRun, path: Path, console: Console) -> int:
    """Profile one call in a fresh process, which knows the run's plugins and own model."""
    if record.status is not Status.OK:
        msg = f"{name(record)} did not end ok, so there is nothing to trace: {record.reason}"
        raise UsageError(msg)
    with writing(path):
        # Before the minute that a profile may take.
        path.touch()
        path.unlink()
    words = [sys.executable, "-m", "bench.worker.chrome_trace"]
    words += [record.workload, record.variant, record.mode, record.device]
    waits = record.omp_wait or "default"
    settings = Settings(record.threads, waits, _plugins(run), own_model=_own_model(record, run))
    variables = settings.variables() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603 - our own module
        [*words, str(path.resolve())], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
        timeout=TRACE_LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        console.say(f"error: the trace could not be made: {last}", "red")
        return EXIT_FAILED
    console.say(f"trace: {path}; open it in https://ui.perfetto.dev or chrome://tracing", "bold")
    return EXIT_OK
