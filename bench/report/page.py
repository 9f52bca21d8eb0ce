"""The report of a run: plots as files, and one page that needs nothing but itself.

The page embeds its style, its scripts and its figures, so it can be mailed, archived and opened without
a network. With Plotly its figures answer to the pointer; without, they are the plots' SVG.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.analysis.run_summary import LEGEND, ReportedRun, load_run
from bench.records import durable
from bench.records.folder import RunFolder
from bench.report import interactive, plots, quality, roofline, tables, words
from bench.report.charts import kinds
from bench.report.descriptions import Kind
from bench.run import second_instrument
from kernels.host.output import utf8


@dataclass(frozen=True)
class Report:
    """Files that `write_report` wrote for a run: the page, and PNG and SVG of each plot."""

    run: ReportedRun
    page: Path
    plots: tuple[Path, ...]


@dataclass(frozen=True)
class Embedded:
    """One figure of the page: Plotly's JSON, or without Plotly an image's address that holds its data."""

    title: str
    json: Markup | None = None
    image: str | None = None


def write_report(run_dir: Path) -> Report:
    """Write `plots/`, `report.html` and `records.csv` into the folder of a run, over those of an earlier report.

    Raises:
        UsageError: the folder holds no run that this release can read.
        OSError: the folder cannot be written to.
    """
    run = load_run(Path(run_dir))
    RunFolder(run.path).write_table()
    drawn = (*kinds(run), *quality.kinds(run), *roofline.kinds(run))
    written = plots.write_plots(drawn, run.path / "plots")
    page = run.path / "report.html"
    durable.replace(page, utf8(render(run, drawn, written)))
    return Report(run, page, tuple(path for paths in written.values() for path in paths))


def render(run: ReportedRun, drawn: tuple[Kind, ...], written: dict[str, tuple[Path, ...]]) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    script = interactive.script()
    second = second_instrument.read(run.path)
    return environment.get_template("report.html.j2").render(
        run=run,
        lead=words.lead(run),
        answers=words.answers(run.groups),
        legend=LEGEND,
        recorded=recorded(run),
        summaries=[tables.summary(group) for group in run.groups],
        refused=tables.refused(run.groups),
        decoding=tables.decoding(run.groups),
        latency=tables.latency(run.groups),
        memory=tables.memory(run.groups),
        cold_start=tables.cold_start(run.groups),
        evidence=tables.evidence(run.groups),
        parity=tables.parity(run.groups),
        second=tables.second_instrument(run.groups, second),
        second_problem=second.problem,
        workloads=tables.workloads(run.groups),
        roofline=tables.roofline(run.groups),
        quality=quality.table(run),
        environment=environment_tables(run),
        kinds=drawn,
        figures={kind.name: embedded(kind, written[kind.name], script) for kind in drawn},
        # Marked as safe: it is the package's own script, and holds no closing script tag.
        script=Markup(script) if script else None,  # noqa: S704
        files=[
            path.name
            for path in sorted(run.path.iterdir())
            if path.is_file() and path.name != "report.html" and not durable.is_bookkeeping(path)
        ],
    )


def environment_tables(run: ReportedRun) -> tuple[tables.Table, ...]:
    """The sections of environment.json, the ceilings in units that people read."""
    found = roofline.ceilings(run.environment)
    plain = {name: section for name, section in run.environment.items() if not (found and name == "ceilings")}
    return (*tables.environment(plain), *tables.ceilings(found))


def embedded(kind: Kind, files: tuple[Path, ...], script: str | None) -> list[Embedded]:
    """The figures of one kind: one a chart with Plotly, one a file without."""
    if script:
        return [
            # Marked as safe: `as_json` leaves no character that HTML reads.
            Embedded(chart.title, json=Markup(interactive.as_json(interactive.figure(chart))))  # noqa: S704
            for chart in kind.charts
        ]
    return [
        Embedded(f"{kind.heading} ({path.stem})", image=data_address(path)) for path in files if path.suffix == ".svg"
    ]


def data_address(path: Path) -> str:
    """The bytes of an SVG as an address. As an image it keeps its ids to itself and runs no script."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def recorded(run: ReportedRun) -> str:
    """From when to when the records were written, UTC."""
    times = sorted(record.recorded_at for record in run.records if record.recorded_at)
    if not times:
        return ""
    return times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"


def code(text: str) -> Markup:
    """`text` escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped first
