"""The report of a run: plots as files, and one self-contained page.

The page embeds its style, its scripts and its figures, so it can be mailed, archived and opened without a network.
Plotly's script and the figures are compressed, and drawn when they come into view.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bench.analysis.run_summary import LEGEND, ReportedRun, load_run
from bench.records import durable
from bench.records.folder import RunFolder
from bench.records.reader import read_beside
from bench.records.schema import Status
from bench.report import (
    checks,
    interactive,
    other_tables,
    page_script,
    plots,
    quality,
    roofline,
    serving,
    tables,
    words,
)
from bench.report.charts import kinds
from bench.report.descriptions import Kind
from bench.run import second_instrument
from kernels.host.output import utf8

#: Sections of environment.json that other parts of the page show.
HIDDEN = {"needs"}


@dataclass(frozen=True)
class Report:
    """Files that `write_report` wrote for a run: the page, and PNG and SVG of each plot."""

    run: ReportedRun
    page: Path
    plots: tuple[Path, ...]


@dataclass(frozen=True)
class Embedded:
    """One figure of the page: the id by which the script finds what to draw, and what stands around it."""

    id: str
    title: str
    height: int
    legend: tuple[interactive.Entry, ...]
    note: str


def write_report(run_dir: Path) -> Report:
    """Write `plots/`, `report.html` and `records.csv` into the folder of a run, over those of an earlier report.

    Raises:
        UsageError: the folder holds no run that this release can read.
        OSError: the folder cannot be written to.
    """
    run = load_run(Path(run_dir))
    RunFolder(run.path).write_table()
    drawn = all_kinds(run)
    written = plots.write_plots(drawn, run.path / "plots")
    page = run.path / "report.html"
    durable.replace(page, utf8(render(run, drawn)))
    return Report(run, page, tuple(path for paths in written.values() for path in paths))


def all_kinds(run: ReportedRun) -> tuple[Kind, ...]:
    """Every kind of figure that a run has data for, in the page's order."""
    return (*kinds(run), *checks.kinds(run), *quality.kinds(run), *roofline.kinds(run), *serving.kinds(run.path))


def templates() -> jinja2.Environment:
    """The templates of the pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    return environment


def render(run: ReportedRun, drawn: tuple[Kind, ...]) -> str:
    """The page's HTML."""
    figures, described = embedded(drawn)
    second = second_instrument.read(run.path)
    beside = read_beside(run.path)
    cores = (run.environment.get("machine") or {}).get("cores_logical")
    quiet = words.beside(beside, cores) if beside else ""
    details = {
        "latency": tables.latency(run.groups),
        "memory": tables.memory(run.groups),
        "cold-start": tables.cold_start(run.groups),
        "roofline": tables.roofline(run.groups),
        "quality": quality.table(run),
        "serving": serving.table(run.path),
        "parity-errors": tables.parity(run.groups),
    }
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            run=run,
            machine=words.machine(run),
            quiet=quiet[:1].upper() + quiet[1:],
            lead=words.lead(run),
            answers=words.advised(run),
            second_says=words.second_opinion(run, second),
            legend=LEGEND,
            recorded=recorded(run),
            absent=sum(record.status is Status.UNAVAILABLE for record in run.records),
            summaries=[tables.summary(group) for group in run.groups],
            refused=tables.refused(run.groups),
            decoding=tables.decoding(run.groups),
            energy=tables.energy(run.groups),
            details={name: table for name, table in details.items() if table} | other_tables.of_charts(drawn, details),
            evidence=tables.evidence(run.groups),
            second=tables.second_instrument(run.groups, second),
            second_problem=second.problem,
            workloads=tables.workloads(run.groups),
            environment=environment_tables(run),
            kinds=drawn,
            figures=figures,
            plotly=page_script.script(),
            packed=page_script.packed(page_script.as_json(described)),
            files=[
                path.name
                for path in sorted(run.path.iterdir())
                if path.is_file() and path.name != "report.html" and not durable.is_bookkeeping(path)
            ],
        )
    )


def environment_tables(run: ReportedRun) -> tuple[tables.Table, ...]:
    """The sections of environment.json, the ceilings in units that people read."""
    found = roofline.ceilings(run.environment)
    plain = {
        name: section
        for name, section in run.environment.items()
        if name not in HIDDEN and not (found and name == "ceilings")
    }
    return (*other_tables.environment(plain), *other_tables.ceilings(found))


def embedded(drawn: Iterable[Kind]) -> tuple[dict[str, list[Embedded]], dict[str, dict[str, Any]]]:
    """The figures of each kind, and what the script draws by their ids."""
    figures: dict[str, list[Embedded]] = {}
    described = {}
    for kind in drawn:
        for number, chart in enumerate(kind.charts):
            name, figure = f"{kind.name}-{number}", interactive.figure(chart)
            described[name] = figure
            shown = Embedded(
                name, chart.title, figure["layout"]["height"], interactive.legend(chart), interactive.note(chart)
            )
            figures.setdefault(kind.name, []).append(shown)
    return figures, described


def recorded(run: ReportedRun) -> str:
    """From when to when the records were written, UTC."""
    times = sorted(record.recorded_at for record in run.records if record.recorded_at)
    if not times:
        return ""
    return times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"


def code(text: str) -> Markup:
    """`text` escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped first
