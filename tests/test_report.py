"""The report of a run: nothing is dropped in silence, doubts are marked, and the page needs no network."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import page_text

from bench import units
from bench.analysis.run_summary import groups, load_run, summary_table
from bench.errors import UsageError
from bench.machine.interference import DISTURBED
from bench.records.schema import SAMPLE_COLUMNS, SCHEMA_VERSION, Record, Status
from bench.report import charts, checks, interactive, other_tables, page, page_script, plots, tables, words
from bench.report.descriptions import Axis, Scale
from bench.report.page import Report, write_report
from bench.report.style import COLOURS, look
from bench.report.words import answers
from bench.run.second_instrument import Figure, Findings

HOSTILE = "no CUDA device: <b>&\"'</script><img src=https://example.org/x.png> $x^2$"
ROOT = Path(__file__).parent.parent
KINDS = (
    "speedup", "latency", "throughput", "memory", "cold-start", "break-even", "parity-errors", "rounds", "scaling",
)  # fmt: skip


def ran(variant: str, speedup: float = 1.0, workload: str = "seed", mode: str = "inference", **more: object) -> Record:
    """A record that ended ok."""
    time = 0.004 / speedup
    record = Record(
        workload=workload, variant=variant, mode=mode, device="cpu", precision="fp32", threads=2,
        latency_p50_s=time, latency_p50_lo_s=0.98 * time, latency_p50_hi_s=1.02 * time, latency_p90_s=1.2 * time,
        throughput_steps_per_s=3200 / time, speedup=speedup, speedup_lo=0.97 * speedup, speedup_hi=1.03 * speedup,
        interval_wide=False, memory_peak_bytes=150_000_000, memory_steady_bytes=20_000_000, build_s=0.02,
        first_call_s=3 * time, evidence="nn.LSTM as written", parity_error=1e-7, parity_limit=1e-5,
        samples=30, calls=30, disturbed=0, batch=32,
    )  # fmt: skip
    return replace(record, **more)


def refused(variant: str, status: Status, reason: str, workload: str = "seed", mode: str = "inference") -> Record:
    """A record that did not end ok."""
    return Record(workload, "lstm", variant, mode, "cpu", "fp32", 2, status, reason)


def everything(workloads: Sequence[str] = ("seed", "forecast-deepar")) -> list[Record]:
    """Workloads in two modes with every way to end, and a sweep."""
    records = []
    for workload in workloads:
        for mode in ("inference", "training"):
            records += [
                ran("reference", 1.0, workload, mode),
                ran("onednn", 1.63, workload, mode),
                ran("compile", 1.4, workload, mode, disturbed=3, first_call_s=20.0, compile_s=19.5),
                ran("loop", 0.4, workload, mode, interval_wide=True),
                refused("triton", Status.UNAVAILABLE, f"{HOSTILE} {workload} {mode}", workload, mode),
                refused("amp-fp16", Status.PARITY_FAILED, f"outputs are off by 3e-1 & more {workload}", workload, mode),
                refused("openvino", Status.TIMEOUT, f"no answer after 600 s {mode}", workload, mode),
            ]
    for batch in (1, 8, 64):
        swept = {"workload": f"seed@batch={batch}", "sweep_axis": "batch", "sweep_value": batch}
        records += [ran("reference", **swept), ran("onednn", 2.0 / batch**0.2, **swept)]
    return records


def little() -> list[Record]:
    """The smallest run that has every kind of figure."""
    swept = [{"workload": f"seed@batch={n}", "sweep_axis": "batch", "sweep_value": n} for n in (1, 8)]
    return [ran("reference"), ran("onednn", 1.63), *(ran("reference", **point) for point in swept)]


def run_folder(path: Path, records: list[Record], *, with_samples: bool = True) -> Path:
    """A run folder as the store writes it, its samples in two gzip members."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "records.jsonl").write_text("".join(json.dumps(record.as_dict()) + "\n" for record in records))
    environment = {"run": {"suite": "quick", "nested": {"seed": 7}}, "machine": {"cpu": "A <CPU> & more"}}
    (path / "environment.json").write_text(json.dumps(environment))
    timed = [record for record in records if record.status is Status.OK]
    members = [",".join(SAMPLE_COLUMNS) + "\n"]
    members += ["".join(sample_rows(record, process) for record in timed) for process in range(2)]
    if with_samples:
        (path / "samples.csv.gz").write_bytes(b"".join(gzip.compress(text.encode()) for text in members))
    return path


def sample_rows(record: Record, process: int) -> str:
    """Forty calls and one block."""
    case = f"{record.workload},{record.variant},{record.mode},{record.device},{record.threads},{process}"
    time = record.latency_p50_s or 0.0
    calls = [f"{case},{n},0,call,1,{time * (0.9 + 0.005 * n)},,0\n" for n in range(40)]
    return "".join([*calls, f"{case},40,0,block,50,{50 * time},,0\n"])


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        """Parse `html` at once."""
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.styles = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag, and remember whether text or code follows."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag if tag in {"script", "style"} else ""

    def handle_endtag(self, _tag: str) -> None:
        """Text follows."""
        self.inside = ""

    def handle_data(self, data: str) -> None:
        """Keep text apart from code."""
        self.text += data if not self.inside else ""
        self.styles += data if self.inside == "style" else ""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of `everything`, with Plotly."""
    return write_report(run_folder(tmp_path_factory.mktemp("run"), everything()))


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    """Its page."""
    return report.page.read_text(encoding="utf-8")


def unpacked(html: str, name: str) -> str:
    """What the page holds compressed under a name."""
    (found,) = re.findall(rf'<script type="application/octet-stream" id="{name}">(.*?)</script>', html)
    return gzip.decompress(base64.b64decode(found)).decode()


def figures(html: str, within: str = "") -> list[dict]:
    """The descriptions of the page's interactive figures, or of those that a section has a place for."""
    found = json.loads(unpacked(html, "figures"))
    return [figure for name, figure in found.items() if f'id="{name}"' in (within or html)]


def test_every_kind_of_plot_is_written_as_png_and_svg(report: Report) -> None:
    """Each kind gives a PNG and an SVG with something in them."""
    assert {path.name for path in report.plots} == {f"{kind}.{end}" for kind in KINDS for end in ("png", "svg")}
    for path in report.plots:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert len(data) > 5000


def test_svg_is_the_same_for_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reports of one run differ in no byte of their SVG, drawn in this process or, as where there are many, in two.

    Each figure stays with its kind and its name.
    """
    folder = run_folder(tmp_path, little())
    first = {path: path.read_bytes() for path in write_report(folder).plots if path.suffix == ".svg"}
    monkeypatch.setattr(plots, "LEAST_SHEETS", 1)
    monkeypatch.setattr(plots, "usable_cores", lambda: 2)
    # In this process nothing is drawn now.
    monkeypatch.setattr(plots, "draw", None)
    assert first == {path: path.read_bytes() for path in write_report(folder).plots if path.suffix == ".svg"}


def test_every_reason_is_on_the_page(html: str) -> None:
    """No case that did not run is dropped: the reader sees its reason, word for word."""
    section = html[html.index('<section id="refused">') :]
    text = Parsed(section[: section.index("</section>")]).text
    reasons = {record.reason for record in everything() if record.status is not Status.OK}
    assert len(reasons) == 8
    assert [reason for reason in reasons if reason not in text] == []


def test_hostile_text_makes_no_tag(html: str) -> None:
    """Text of a record stays text, in tables and inside the figures' JSON."""
    parsed = Parsed(html)
    assert not [attrs for tag, attrs in parsed.tags if tag == "img"]
    tags = {tag for tag, _ in parsed.tags}
    assert "article" in tags, "the page's own tags are found"
    assert "b" not in tags
    assert parsed.text.count("<b>&") >= 4
    assert len(figures(html)) == 34


def test_json_in_the_page_cannot_end_its_element() -> None:
    """A name that holds a closing tag comes back whole, and the page's parser sees no tag."""
    text = page_script.packed(page_script.as_json({"one": {"name": "</script><b>&"}}))
    assert not set("<>&\"'") & set(text)
    assert json.loads(gzip.decompress(base64.b64decode(text))) == {"one": {"name": "</script><b>&"}}


def test_page_loads_nothing_from_a_network(html: str) -> None:
    """No attribute and no style of the page leads to another place than the page."""
    parsed = Parsed(html)
    loaded = [
        (tag, name, value)
        for tag, attrs in parsed.tags
        for name, value in attrs.items()
        if name in {"src", "href", "srcset", "data", "action", "poster"} and not value.startswith(("#", "data:"))
    ]
    assert loaded == []
    assert not re.search(r"@import|url\(", parsed.styles)


def test_plotly_is_embedded_once(html: str) -> None:
    """The page carries one copy of the script for all its figures, compressed."""
    assert unpacked(html, "plotly").count("* plotly.js v") == 1


@pytest.mark.parametrize("variant", ["onednn", "compile", "loop", "reference"])
def test_variant_has_one_colour_everywhere(report: Report, html: str, variant: str) -> None:
    """A variant's colour is in every plot, in every table chip and in every interactive figure."""
    colour = look(variant).colour
    # Compiling does not take part in the sweep, nor does the loop.
    kinds = KINDS if variant in {"onednn", "reference"} else KINDS[:-1]
    for kind in kinds:
        assert colour in (report.page.parent / "plots" / f"{kind}.svg").read_text(), kind
    chip = re.search(rf'<span class="chip" style="background:(#\w+)"></span>{variant}', html)
    assert chip is not None
    assert chip[1] == colour
    lines = [t["line"]["color"] for f in figures(html) for t in f["data"] if t["name"] == variant and "line" in t]
    assert lines
    assert set(lines) == {colour}


def test_page_of_the_largest_kept_run_is_small() -> None:
    """A page of 252 cases with all figures stays below 4 MB, so that it can be mailed and is there at once."""
    run = load_run(ROOT / "results" / "reference" / "cpu-2core-avx512-bf16-kernels")
    assert len(page.render(run, page.all_kinds(run)).encode()) < 4_000_000


@given(
    scale=st.sampled_from(["linear", "log", "ratio"]),
    lo=st.floats(1e-9, 1e9),
    width=st.floats(1.02, 1e6),
    share=st.floats(0, 1),
)
def test_a_position_has_the_digits_that_can_be_seen(scale: Scale, lo: float, width: float, share: float) -> None:
    """It is off by less than an eighth of a pixel on 500 pixels, wherever the axis lies and however long it is."""
    axis = Axis("", scale, lo, lo * width, ())
    value = lo + share * (axis.hi - lo)
    where, ends = interactive.place(value, axis), [interactive.position(end, scale) for end in (axis.lo, axis.hi)]
    assert abs(where - interactive.position(value, scale)) <= (ends[1] - ends[0]) / 4000
    assert len(f"{where:.12g}".strip("-").replace(".", "").strip("0")) <= 9


def test_a_round_that_was_disturbed_is_shaded(tmp_path: Path) -> None:
    """Rounds stand in their order, disturbed ones shaded, with a line where a process begins."""
    folder = run_folder(tmp_path, [ran("reference"), ran("loop", 0.5)])
    path = folder / "samples.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(
        gzip.compress(re.sub(r"^(.*,1,(?:5|6|9),0,call,.*),0$", r"\1,1", text, flags=re.MULTILINE).encode())
    )
    (kind,) = [kind for kind in checks.kinds(load_run(folder)) if kind.name == "rounds"]
    (chart,) = kind.charts
    # 41 rounds a process: the second one begins behind the 41st.
    assert chart.breaks == (41.5,)
    assert chart.shaded == ((46.5, 48.5), (50.5, 51.5))


def test_no_line_joins_rounds_between_which_a_variant_rested(tmp_path: Path) -> None:
    """In the files and on the page the line breaks there, and the table counts the rounds that were played."""
    folder = run_folder(tmp_path, [ran("reference"), ran("loop", 0.5)])
    path = folder / "samples.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    rested = re.sub(r"^\w+,loop,.*,0,(?:7|8),\d,call,.*\n", "", text, flags=re.MULTILINE)
    assert rested != text
    path.write_bytes(gzip.compress(rested.encode()))
    (kind,) = [kind for kind in checks.kinds(load_run(folder)) if kind.name == "rounds"]
    (chart,) = kind.charts
    curves = {curve.variant: curve for curve in chart.curves}
    assert [n for n, y in enumerate(curves["loop"].ys) if math.isnan(y)] == [7, 8]
    (line,) = interactive.curve_traces(chart, curves["loop"])
    assert [n for n, y in enumerate(line["y"]) if y is None] == [7, 8]
    shown = {row.cells[1].text: row.cells[2].text for row in other_tables.chart_rows(chart)}
    assert (shown["loop"], shown["reference"]) == ("80 points", "82 points")


def test_own_time_is_drawn_longest_first(tmp_path: Path) -> None:
    """Seconds by kind of the run and of what was resumed, added up."""
    folder = run_folder(tmp_path, [ran("reference")])
    parts = {"run": {"own_time_s": {"timed rounds": 30.0, "gates": 5.0}}, "resumes": [{"own_time_s": {"gates": 40.0}}]}
    (folder / "environment.json").write_text(json.dumps(parts))
    chart = checks.own_time_chart(load_run(folder))
    assert chart is not None
    assert [(bar.variant, bar.parts[0].value) for bar in chart.bars] == [("gates", 45.0), ("timed rounds", 30.0)]


def test_the_front_holds_what_nothing_beats() -> None:
    """Of latency and throughput, a point is on the front where none is both faster and has more."""
    assert charts.pareto([(2, 5), (1, 3), (3, 4), (2, 4), (4, 9)]) == [(1, 3), (2, 5), (4, 9)]


def test_latency_against_throughput_needs_several_batches(tmp_path: Path) -> None:
    """At one batch the two say the same, and there is no chart; with two, every variant has a point at each."""

    def at(batch: int) -> dict:
        return {"workload": f"seed@batch={batch}", "batch": batch, "throughput_seq_per_s": batch / 0.004}

    one = load_run(run_folder(tmp_path / "one", [ran("reference", **at(1))], with_samples=False))
    two = [ran(name, speed, **at(n)) for n in (1, 8) for name, speed in (("reference", 1.0), ("onednn", 2.0))]
    both = load_run(run_folder(tmp_path / "two", two, with_samples=False))
    assert charts.trade_off_charts(one.groups) == ()
    (chart,) = charts.trade_off_charts(both.groups)
    assert [(curve.variant, len(curve.points)) for curve in chart.curves if not curve.helper] == [
        ("onednn", 2),
        ("reference", 2),
    ]


def test_the_second_instrument_is_held_against_ours(tmp_path: Path) -> None:
    """How many cases differ is said at the top, and a speedup on the other side of 1 is marked."""
    run = load_run(run_folder(tmp_path, [unit(), ran("onednn", 1.6)]))
    key = ("seed", "inference", "cpu", 2)
    medians = {(*key, "reference"): Figure(0.004, 9), (*key, "onednn"): Figure(0.005, 9)}
    assert words.second_opinion(run, Findings(medians)).startswith(
        "A second instrument differs by more than 10 % on 1 of"
    )
    table = tables.second_instrument(run.groups, Findings(medians))
    assert table is not None
    assert "0.80x, against ours" in [cell.text for row in table.rows for cell in row.cells]
    assert words.second_opinion(run, Findings()) == ""


def test_the_machine_and_the_advice_stand_at_the_top(tmp_path: Path) -> None:
    """The processor, threads and torch are under the title, and every group has what to ship and how sure that is."""
    folder = run_folder(tmp_path, little())
    facts = {"machine": {"processor": "Some CPU", "cores_logical": 4}, "software": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    run = load_run(folder)
    assert words.machine(run) == "Some CPU, 4 cores, 2 threads, torch 2.13.0"
    advised = [answer for answer in words.advised(run) if answer.advice]
    assert [(answer.where, answer.verdict) for answer in advised] == [("seed, inference", "recommended")]
    assert "Ship `onednn`" in advised[0].advice


def test_known_variants_differ_in_colour() -> None:
    """No two known variants share a colour."""
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_unknown_variant_looks_the_same_in_another_process() -> None:
    """The look of an unknown name does not hang on Python's hash seed."""
    command = "from bench.report.style import look; print(look('my-own').colour)"
    colours = {
        subprocess.run(
            [sys.executable, "-c", command],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }
    assert colours == {look("my-own").colour + "\n"}


@pytest.mark.parametrize("doubt", [{"disturbed": 1}, {"interval_wide": True}])
def test_doubtful_figures_are_marked_in_the_table(doubt: dict) -> None:
    """A disturbed or wide record carries the mark on its times; its neighbour does not."""
    table = summary_table([ran("reference"), ran("onednn", 2.0), ran("loop", 0.5, **doubt)]).set_index("variant")
    assert table.loc["loop", "speedup"] == "~0.50x [0.48, 0.52]"
    assert table.loc["loop", "p50"] == "~8.00 ms"
    assert table.loc["onednn *", "speedup"] == "2.00x [1.94, 2.06]"


@pytest.mark.parametrize("doubt", [{"disturbed": 1}, {"interval_wide": True}, {}])
def test_doubtful_figures_are_marked_in_the_plots(tmp_path: Path, doubt: dict) -> None:
    """A doubtful record hatches its bar, and a run without one has neither hatch nor hollow point."""
    folder = run_folder(tmp_path, [ran("reference"), ran("onednn", 1.2, **doubt)])
    speedup, *_ = charts.kinds(load_run(folder))
    plots.write_plots([speedup], folder / "plots")
    # One hatch is the bar's, one the legend's.
    assert (folder / "plots" / "speedup.svg").read_text().count("<pattern") == (2 if doubt else 0)
    drawn = figures(page_text(folder))
    shapes = str([trace["marker"] for figure in drawn for trace in figure["data"] if "marker" in trace])
    assert ("'/'" in shapes) is bool(doubt)
    assert ("-open" in shapes) is bool(doubt)


def test_mark_is_explained_on_the_page(html: str) -> None:
    """A reader who sees a mark finds its meaning on the page, and its cause over the figure."""
    assert f"A doubtful figure: its samples were taken while {DISTURBED}" in Parsed(html).text
    titles = {attrs.get("title", "") for tag, attrs in Parsed(html).tags if tag == "td"}
    assert f"3 of 30 samples were taken while {DISTURBED}" in titles


def test_plotly_accepts_every_figure(tmp_path: Path) -> None:
    """Each description has only properties that Plotly knows."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    run = load_run(run_folder(tmp_path, everything()))
    drawn = [interactive.figure(chart) for kind in charts.kinds(run) for chart in kind.charts]
    assert len(drawn) == 26
    for figure in drawn:
        graph_objects.Figure(figure)


def test_what_did_not_run_keeps_its_row_in_the_speedup_plot() -> None:
    """A timeout is a row with its status, below the variants that ran."""
    group = groups([refused("openvino", Status.TIMEOUT, "slow"), ran("reference"), ran("onednn", 1.2)])[0]
    chart = charts.speedup_chart(group)
    assert chart is not None
    assert [(bar.variant, bar.label) for bar in chart.bars][-1] == ("openvino", "timeout")


def test_plot_without_data_is_not_written(tmp_path: Path) -> None:
    """Without samples and without a sweep there is no latency and no scaling plot, and no section for them."""
    report = write_report(run_folder(tmp_path, [ran("reference"), ran("loop", 0.4)], with_samples=False))
    assert {path.stem for path in report.plots} == {
        "speedup",
        "throughput",
        "memory",
        "cold-start",
        "break-even",
        "parity-errors",
    }
    assert 'id="scaling"' not in report.page.read_text(encoding="utf-8")


def test_run_in_which_nothing_ran_has_a_page(tmp_path: Path) -> None:
    """A run of failures still gives a page, with the reasons and no plot."""
    report = write_report(run_folder(tmp_path, [refused("reference", Status.CRASHED, "signal 11")]))
    assert report.plots == ()
    assert "signal 11" in Parsed(report.page.read_text(encoding="utf-8")).text


def test_many_groups_are_split_by_workload(tmp_path: Path) -> None:
    """Above eight groups each workload has its own file, also where two names give the same file name."""
    names = ["a/b", "a b", "c", "d", "e"]
    records = [ran("reference", workload=name, mode=mode) for name in names for mode in ("inference", "training")]
    speedup = charts.kinds(load_run(run_folder(tmp_path, records, with_samples=False)))[0]
    sheets = {stem: len(panels) for stem, panels in plots.sheets(speedup)}
    assert sheets == {"speedup-a-b": 2, "speedup-a-b-2": 2, "speedup-c": 2, "speedup-d": 2, "speedup-e": 2}


def test_second_report_leaves_no_plot_of_the_first(tmp_path: Path) -> None:
    """A plot that the run no longer has data for is removed; a file of the user is not."""
    folder = tmp_path / "plots"
    (scaling,) = [kind for kind in charts.kinds(load_run(run_folder(tmp_path, little()))) if kind.name == "scaling"]
    plots.write_plots([scaling], folder)
    assert (folder / "scaling.png").exists()
    (folder / "mine.png").write_bytes(b"x")
    speedup, *_ = charts.kinds(load_run(run_folder(tmp_path, [ran("reference")])))
    plots.write_plots([speedup], folder)
    assert {path.name for path in folder.iterdir()} == {"mine.png", "speedup.png", "speedup.svg"}


def test_curve_is_thinned_but_for_its_tails() -> None:
    """A million calls become 500 points, and the largest calls are all there."""
    places = charts.thinned(1_000_000)
    assert len(places) == 500
    assert list(places[-charts.TAIL_POINTS :]) == list(range(1_000_000 - charts.TAIL_POINTS, 1_000_000))
    assert list(places[:3]) == [0, 1, 2]


@pytest.mark.parametrize("disturbed", [1, 36])
def test_curve_is_drawn_from_the_calls_of_the_figures(tmp_path: Path, disturbed: int) -> None:
    """A process's disturbed rounds are on the curve only where too few others were left to make figures of."""
    folder = run_folder(tmp_path, [ran("reference"), ran("loop", 0.5, disturbed=disturbed)])
    path = folder / "samples.csv.gz"
    rows = [line.split(",") for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    for row in rows:
        if row[5] == "1" and row[6].isdecimal() and int(row[6]) < disturbed:
            row[-1] = "1"
    path.write_bytes(gzip.compress("".join(",".join(row) + "\n" for row in rows).encode()))
    run = load_run(folder)
    assert {len(run.calls(record)) for record in run.records} == {80 - disturbed if disturbed == 1 else 80}
    (chart,) = next(kind for kind in charts.kinds(run) if kind.name == "latency").charts
    assert {len(curve.xs) for curve in chart.curves} == {80 - disturbed if disturbed == 1 else 80}


@pytest.mark.parametrize("kept", sorted(path.name for path in (ROOT / "results" / "reference").iterdir()))
def test_curves_of_the_kept_runs_pass_through_their_figures(kept: str) -> None:
    """The median of a curve's calls is the record's p50, to the digits that are kept, and no call is more or fewer."""
    run = load_run(ROOT / "results" / "reference" / kept)
    assert run.groups
    timed = [record for record in run.records if record.latency_p50_s is not None]
    assert timed
    for record in timed:
        calls = run.calls(record)
        assert len(calls) == record.calls
        assert float(np.median(calls)) == pytest.approx(record.latency_p50_s, rel=1e-7)


def test_summary_table_puts_the_fastest_first_and_marks_it() -> None:
    """Within a group the order is by speedup, with what did not run and its reason last."""
    table = summary_table([refused("triton", Status.UNAVAILABLE, "no GPU"), ran("reference"), ran("onednn", 1.634)])
    assert list(table["variant"]) == ["onednn *", "reference", "triton"]
    assert table["speedup"][0] == "1.63x [1.58, 1.68]"
    assert (table["status"][2], table["what ran"][2], table["p50"][2]) == ("unavailable", "no GPU", "")


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Every cell has its value and type."""
    assert load_run(run_folder(tmp_path, everything())).records == tuple(everything())


def unit(**more: object) -> Record:
    """A reference as runs have it: the measure of all speedups, without an interval of its own."""
    return ran("reference", speedup_lo=1.0, speedup_hi=1.0, **more)


def test_no_winner_is_named_where_intervals_overlap() -> None:
    """Neither sentence, star nor green row crowns a variant that cannot be told from the next."""
    near = groups([unit(), ran("onednn", 1.60), ran("compile", 1.63)])
    (answer,) = answers(near)
    assert answer.text.startswith("No clear winner: `compile` (1.63x [1.58, 1.68]) or `onednn` (1.60x [1.55, 1.65]).")
    assert "The next is the `reference`: the interval of the first does not reach 1." in answer.text
    assert near[0].winner is None
    assert not [name for name in summary_table(near[0].records)["variant"] if "*" in name]
    assert {row.look for row in tables.summary(near[0]).rows} == {""}


def test_a_winner_stands_apart_from_all_others() -> None:
    """It is named with its interval, starred and green."""
    far = groups([unit(), ran("onednn", 1.20), ran("compile", 1.63)])
    (answer,) = answers(far)
    assert answer.text.startswith("`compile` is fastest, 1.63x [1.58, 1.68] as fast as the reference.")
    assert "The next is `onednn` with 1.20x [1.16, 1.24]: the intervals do not overlap." in answer.text
    assert [name for name in summary_table(far[0].records)["variant"] if "*" in name] == ["compile *"]
    assert [row.look for row in tables.summary(far[0]).rows] == ["best", "", ""]


def test_what_decides_between_overlapping_intervals_is_shown() -> None:
    """Ratios inside rounds tell the two apart, so the row with the star stands beside the ratio that it rests on."""
    best = ran("cpu-fused", 5.6, standing="best", vs_best=1.0, vs_best_lo=1.0, vs_best_hi=1.0)
    rival = ran("onnxruntime", 5.5, standing="slower", vs_best=0.947, vs_best_lo=0.934, vs_best_hi=0.959)
    (group,) = groups([unit(standing="slower"), best, rival])
    assert best.speedup_lo < rival.speedup_hi
    table = summary_table(group.records)
    assert list(table["variant"]) == ["cpu-fused *", "onnxruntime", "reference"]
    assert list(table["vs best"]) == ["1.00x", "0.95x [0.93, 0.96]", ""]
    shown = tables.summary(group)
    assert [row.cells[shown.columns.index("vs best")].text for row in shown.rows] == list(table["vs best"])
    said = "with 5.50x [5.33, 5.67], certainly slower: round by round 0.95x [0.93, 0.96] as fast as `cpu-fused`."
    assert said in answers([group])[0].text


@pytest.mark.parametrize("doubt", [{"disturbed": 3}, {"reason": "crashed in seating 6: planted"}])
def test_a_doubtful_row_has_no_star(doubt: dict[str, Any]) -> None:
    """Nor is it green; the sentence that names it says why it is doubtful, and a failed process stands in its row."""
    (group,) = groups([unit(standing="slower"), ran("onednn", 2.0, standing="best", **doubt)])
    table = summary_table(group.records)
    assert (table["variant"][0], table["speedup"][0][0]) == ("onednn", "~")
    assert {row.look for row in tables.summary(group).rows} == {""}
    (answer,) = answers([group])
    why = doubt.get("reason", "this figure is doubtful: ")
    assert answer.text.startswith(f"No clear winner: `onednn` leads with 2.00x [1.94, 2.06], but {why}")
    assert "fastest" not in answer.text
    assert answer.text.endswith("The next is `reference`, slower in these rounds.")
    assert table["what ran"][0].startswith(doubt.get("reason", ""))


def test_a_leader_that_is_certain_without_its_disturbed_samples_has_the_star() -> None:
    """Its figure stays marked; a process that failed leaves it open all the same."""
    best = ran("onednn", 2.0, standing="best", disturbed=3, certain=True)
    (group,) = groups([unit(standing="slower"), best])
    table = summary_table(group.records)
    assert (table["variant"][0], table["speedup"][0][0]) == ("onednn *", "~")
    (answer,) = answers([group])
    assert answer.text.startswith(
        "`onednn` is fastest, 2.00x [1.94, 2.06] as fast as the reference. The exact speedup is"
    )
    assert answer.text.endswith("The next is `reference`, certainly slower.")
    for changed in ({"certain": False}, {"certain": None}, {"reason": "crashed in seating 6: planted"}):
        (group,) = groups([unit(standing="slower"), dataclasses.replace(best, **changed)])
        assert group.winner is None, changed


def test_a_winner_by_a_margin_that_is_imprecise_is_still_named() -> None:
    """Ratios inside rounds decide who is first; by how much is marked. Without such ratios nothing was decided."""
    rival = {"vs_best": 0.73, "vs_best_lo": 0.65, "vs_best_hi": 0.86}
    wide = ran("cpu-fused", 8.1, standing="best", interval_wide=True)
    (group,) = groups([unit(standing="slower"), wide, ran("onnxruntime", 6.0, standing="slower", **rival)])
    table = summary_table(group.records)
    assert (table["variant"][0], table["speedup"][0][0]) == ("cpu-fused *", "~")
    assert tables.summary(group).rows[0].look == "best"
    said = answers([group])[0].text
    assert said.startswith("`cpu-fused` is fastest, 8.10x [7.86, 8.34] as fast as the reference. The exact speedup is")
    assert "certainly slower: round by round 0.73x [0.65, 0.86]" in said
    (undecided,) = groups([unit(), ran("cpu-fused", 8.1, interval_wide=True), ran("onnxruntime", 6.0)])
    assert undecided.winner is None


def test_a_sweep_says_where_the_margin_of_its_winner_is_imprecise() -> None:
    """A point with a precise margin is not among those that are doubtful."""
    points = []
    for value, wide in ((1, True), (8, True), (64, False)):
        at = {"workload": f"seed@batch={value}", "sweep_axis": "batch", "sweep_value": value}
        points += [unit(standing="slower", **at), ran("cpu-fused", 8.1, standing="best", interval_wide=wide, **at)]
    assert answers(groups(points))[0].text == (
        "Fastest is `cpu-fused` at 1, 8 and 64 (8.10x). "
        "The exact speedup is doubtful at 1 and 8: the interval is wider than the suite asked for."
    )
    assert "doubtful" not in answers(groups(points[-2:]))[0].text


def in_fp32(loop_hi: float | None, **doubt: Any) -> str:
    """The last sentence about a group that bf16 wins, and whose fastest in fp32 is `onednn`, 0.5x as fast as it."""
    ratios = {"standing": "slower", "vs_best_lo": 0.48, "vs_best_hi": 0.52, "vs_best": 0.5}
    loop = ratios | {"vs_best": 0.4, "vs_best_lo": 0.38, "vs_best_hi": loop_hi}
    reference = unit(standing="slower", vs_best=0.25, vs_best_lo=0.24, vs_best_hi=0.26)
    rivals = [ran("onednn", 2.0, **(ratios | doubt)), ran("loop", 1.6, **loop)]
    (group,) = groups([reference, ran("amp-bf16", 4.0, precision="bf16", standing="best"), *rivals])
    return answers([group])[0].text.partition(" In fp32, ")[2]


def test_the_fastest_in_the_precision_of_the_reference_may_have_an_imprecise_margin() -> None:
    """As for a winner: ratios inside rounds decide who is first, and only what else is doubtful leaves that open."""
    assert in_fp32(0.42) == "`onednn` is fastest with 2.00x [1.94, 2.06]."
    assert in_fp32(0.42, interval_wide=True) == (
        "`onednn` is fastest with 2.00x [1.94, 2.06]. "
        "The exact speedup is doubtful: the interval is wider than the suite asked for."
    )
    leads = "`onednn` leads with 2.00x [1.94, 2.06], but this is doubtful."
    assert in_fp32(0.49, interval_wide=True) == leads
    undecided = "the fastest is `onednn` (2.00x [1.94, 2.06]) or `loop` (1.60x [1.55, 1.65]): "
    assert in_fp32(0.49) == in_fp32(None) == f"{undecided}the run does not show which."
    assert in_fp32(None, interval_wide=True) == leads
    assert in_fp32(0.42, interval_wide=True, disturbed=3) == leads


@pytest.mark.parametrize(
    ("faster", "said"),
    [
        ({"vs_best_lo": 0.01, "vs_best_hi": 0.9}, "nothing was shown to be faster than the `reference`."),
        ({"vs_best_lo": 0.01, "vs_best_hi": 0.04}, "nothing is faster than the `reference`."),
        ({"vs_best_lo": 0.1, "vs_best_hi": 0.9}, "`loop` is faster than the `reference`, with no estimate of how"),
    ],
)
def test_what_has_no_estimate_is_neither_a_figure_nor_proof(faster: dict[str, float], said: str) -> None:
    """A variant with a huge interval does not leave the reference unbeaten, and no ratio is told that has none."""
    wild = {"speedup_lo": 0.3, "speedup_hi": 400.0, "interval_wide": True, "standing": "slower", "vs_best": 0.4}
    best = ran("int8", 40.0, precision="int8", standing="best", speedup_lo=0.9, speedup_hi=900.0)
    reference = unit(standing="slower", vs_best=0.06, vs_best_lo=0.05, vs_best_hi=0.07)
    (group,) = groups([reference, best, ran("loop", 11.0, **wild, **faster)])
    text = answers([group])[0].text
    assert text.startswith("`int8` is fastest; there is no estimate of its speedup. The next is `")
    assert "certainly slower" in text
    assert "no estimate as fast" not in text
    assert f" In fp32, {said}" in text


@pytest.mark.parametrize(("speedup", "wins"), [(1.5, True), (1.02, False), (0.99, False)])
def test_against_the_reference_one_interval_decides(speedup: float, wins: bool) -> None:
    """The reference has no interval: a rival is told from it by whether its own reaches 1."""
    (group,) = groups([unit(), ran("onednn", speedup)])
    (answer,) = answers([group])
    if wins:
        assert "The next is the `reference`: its interval does not reach 1." in answer.text
    else:
        assert answer.text.startswith("No clear winner: ")
        assert "`reference`" in answer.text
    assert (group.winner is not None) is wins


def test_no_winner_is_named_beside_one_that_has_no_estimate() -> None:
    """An interval of many orders of magnitude excludes nothing; its variant stands behind those that have a figure."""
    wild = ran("onnxruntime", 31.0, speedup_lo=8.8e-5, speedup_hi=46231840.0, interval_wide=True)
    (group,) = groups([unit(), wild, ran("onednn", 2.0)])
    assert [record.variant for record in group.records] == ["onednn", "reference", "onnxruntime"]
    assert group.winner is None
    assert "`onednn` (2.00x [1.94, 2.06]) or `onnxruntime` (no estimate)" in answers([group])[0].text
    assert summary_table(group.records)["speedup"][2] == "~no estimate"
    chart = charts.speedup_chart(group)
    assert chart is not None
    assert (chart.bars[2].label, chart.bars[2].parts) == ("no estimate", ())
    assert chart.axis.hi < 3


def test_times_too_wide_to_estimate_anything_are_not_figures() -> None:
    """A median with an interval of more than a factor of ten is none, in the table and among the percentiles."""
    record = ran("onednn", 2.0, latency_p50_lo_s=1e-4, latency_p50_hi_s=2e-3)
    (group,) = groups([record])
    assert summary_table([record])["p50"][0] == "no estimate"
    (row,) = tables.latency([group]).rows
    assert [cell.text for cell in row.cells[2:5]] == ["no estimate", "", "2.40 ms"]


def test_answer_says_that_nothing_beats_the_reference() -> None:
    """A reference that nothing beats is no winner with a speedup."""
    assert answers(groups([ran("reference"), ran("loop", 0.4)]))[0].text.startswith("Nothing is faster than the `ref")


def test_sweep_gets_one_answer() -> None:
    """The points of a sweep share one sentence with the best at each value, and one where none is clear."""
    swept = [record for record in everything() if record.sweep_axis]
    at = {"workload": "seed@batch=2", "sweep_axis": "batch", "sweep_value": 2}
    unclear = [unit(**at), ran("onednn", 1.01, **at)]
    text = answers(groups([*swept, *unclear]))[0].text
    assert text == (
        "Fastest is `onednn` at 1 and 8 (1.32x to 2.00x); `reference` at 64. "
        "No clear winner: `onednn` or `reference` at 2."
    )
    assert [answer.text for answer in answers(groups(swept))] == [
        "Fastest is `onednn` at 1 and 8 (1.32x to 2.00x); `reference` at 64."
    ]


def test_a_doubtful_reference_alone_leads_nothing() -> None:
    """There was nothing to be faster than."""
    (group,) = groups([unit(disturbed=3)])
    said = f"Only the `reference` ran. Its figure is doubtful: 3 of 30 samples were taken while {DISTURBED}."
    assert answers([group])[0].text == said


def test_a_sweep_names_no_doubtful_leader_the_fastest() -> None:
    """Its value is told apart from those at which the same variant wins."""
    points = []
    for value, doubt in ((1, {}), (2, {"reason": "crashed in seating 6: planted"})):
        at = {"workload": f"seed@batch={value}", "sweep_axis": "batch", "sweep_value": value}
        points += [unit(**at), ran("onednn", 2.0, **at, **doubt)]
    assert answers(groups(points))[0].text == (
        "Fastest is `onednn` at 1 (2.00x). `onednn` leads at 2, but this is doubtful: crashed in seating 6: planted."
    )


def test_case_recorded_twice_counts_once(tmp_path: Path) -> None:
    """The last record of a case is the one that is shown, and the page says that there was another."""
    records = [ran("reference"), refused("loop", Status.TIMEOUT, "too slow at first"), ran("loop", 0.5)]
    folder = run_folder(tmp_path, records)
    assert [record.status.value for record in load_run(folder).records] == ["ok", "ok"]
    assert "1 earlier record of cases" in page_text(folder)


def test_run_without_environment_has_a_page(tmp_path: Path) -> None:
    """The machine is unknown then, and the page says so."""
    folder = run_folder(tmp_path, [ran("reference")])
    (folder / "environment.json").unlink()
    assert "holds no environment.json" in page_text(folder)


def test_nested_environment_is_shown(html: str) -> None:
    """Sections are shown whatever they hold, escaped."""
    text = Parsed(html).text
    assert "nested.seed" in text
    assert "A <CPU> & more" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-5, "20.0 us"), (0.9996, "1.00 s"), (5.0, "5.00 s"), (0.00163, "1.63 ms"), (None, ""), (0.0, "0 s")],
)
def test_times_are_in_human_units(value: float | None, text: str) -> None:
    """Three digits and the unit that fits, also where rounding reaches the next unit."""
    assert units.seconds(value) == text


@pytest.mark.parametrize(("lo", "hi"), [(0.02, 40.0), (0.95, 1.05), (2e-5, 5.0), (1e-9, 1e9), (0.3, 2.2)])
def test_log_ticks_are_few_and_inside(lo: float, hi: float) -> None:
    """An axis of any range has two to six ticks, none outside it."""
    ticks = units.log_ticks(lo, hi)
    assert 2 <= len(ticks) <= 6
    assert all(lo <= tick <= hi for tick in ticks)


@pytest.mark.parametrize("span", [(0.02, 40.0), (0.91, 1.1), (0.3, 3.0), (0.001, 900.0)])
def test_ratio_axis_shows_one(span: tuple[float, float]) -> None:
    """The reference's own speed is among the ticks of a speedup axis."""
    assert 1.0 in units.log_ticks(*span)


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    """The message names the folder and what was expected."""
    with pytest.raises(UsageError, match="nowhere is not a folder; expected"):
        write_report(tmp_path / "nowhere")


def test_missing_records_is_an_error(tmp_path: Path) -> None:
    """A folder without records is not a run; a table of them cannot take their place."""
    with pytest.raises(UsageError, match=r"has no records\.jsonl; expected the folder of a run"):
        load_run(tmp_path)
    (tmp_path / "records.csv").write_text("workload\nseed\n")
    with pytest.raises(UsageError, match=r"records\.csv is a table made from it, and cannot take its place"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no record"),
        (b'{"workload"', "holds no record"),
        (b'{"name": "x", "age": 1}\n', "line 1 has schema_version None"),
        (b'{"schema_version": 4}\n', "other columns than this release writes"),
        (b'{"schema_version": 99}\n', f"schema_version 99, this release writes {SCHEMA_VERSION}"),
        (b"\xff\xfe\x00\n{}\n", "line 1 is not a record"),
    ],
)
def test_foreign_records_are_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Empty, foreign and newer records are refused in one line that says which file."""
    (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)
    assert "records.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("speedup", "fast", 'speedup: expected a number, got "fast"'),
        ("status", "fine", "status: expected 'ok', 'unavailable'"),
        ("interval_wide", "perhaps", 'interval_wide: expected true or false, got "perhaps"'),
        ("threads", None, "threads: expected a whole number, got null"),
    ],
)
def test_value_of_the_wrong_type_is_an_error(tmp_path: Path, column: str, value: object, said: str) -> None:
    """A value that does not fit its column is named with its line."""
    folder = run_folder(tmp_path, [ran("reference")])
    (folder / "records.jsonl").write_text(json.dumps(ran("reference").as_dict() | {column: value}) + "\n")
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        load_run(folder)
    assert "line 1" in str(caught.value)


def test_samples_without_a_recorded_case_are_an_error(tmp_path: Path) -> None:
    """A file that was cut by more than a torn append is not reported as if it were whole."""
    folder = run_folder(tmp_path, [ran("reference")])
    path = folder / "samples.csv.gz"
    path.write_bytes(gzip.compress((",".join(SAMPLE_COLUMNS) + "\n" + sample_rows(ran("loop"), 0)).encode()))
    with pytest.raises(UsageError, match=r"has no sample of .*reference, which records\.jsonl has as ok"):
        load_run(folder)


def test_a_list_of_sections_is_shown_leaf_by_leaf():
    """Each time a run was resumed has rows of its own in the environment's table."""
    found = list(other_tables.flat([{"seed": 1, "load": {"before": 2}}, {"seed": 3}]))
    assert found == [("1.seed", "1"), ("1.load.before", "2"), ("2.seed", "3")]
    assert list(other_tables.flat({"affinity": [0, 1], "none": []})) == [("affinity", "0, 1"), ("none", "")]
