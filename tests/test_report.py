"""The report of a run: nothing is dropped in silence, doubts are marked, and the page needs no network."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from bench import units
from bench.record import COLUMNS, SAMPLE_COLUMNS, Record, Status
from bench.report import Report, ReportError, charts, interactive, load_run, plots, summary_table, tables, write_report
from bench.report.frames import groups
from bench.report.style import COLOURS, look
from bench.report.words import answers

HOSTILE = "no CUDA device: <b>&\"'</script><img src=https://example.org/x.png> $x^2$"
KINDS = ("speedup", "latency", "throughput", "memory", "cold-start", "scaling")


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


def everything() -> list[Record]:
    """Two workloads in two modes with every way to end, and a sweep."""
    records = []
    for workload in ("seed", "forecast-deepar"):
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
    pd.DataFrame([r.as_dict() for r in records], columns=list(COLUMNS)).to_csv(path / "records.csv", index=False)
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


@pytest.fixture
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter in which Plotly cannot be imported."""
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)


def figures(html: str) -> list[dict]:
    """The descriptions of the page's interactive figures."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)]


def test_every_kind_of_plot_is_written_as_png_and_svg(report: Report) -> None:
    """Each of the six kinds gives a PNG and an SVG with something in them."""
    assert {path.name for path in report.plots} == {f"{kind}.{end}" for kind in KINDS for end in ("png", "svg")}
    for path in report.plots:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert len(data) > 5000


def test_svg_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    """Two reports of one run differ in no byte of their SVG."""
    folder = run_folder(tmp_path, little())
    first = [path.read_bytes() for path in write_report(folder).plots if path.suffix == ".svg"]
    assert first == [path.read_bytes() for path in write_report(folder).plots if path.suffix == ".svg"]


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
    assert "b" in {tag for tag, _ in parsed.tags}, "the page's own <b> is found"
    assert parsed.text.count("<b>&") >= 4
    assert len(figures(html)) == 22


def test_json_in_the_page_cannot_end_its_element() -> None:
    """A name that holds a closing tag comes back whole, and the page's parser sees no tag."""
    text = interactive.as_json({"name": "</script><b>&"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": "</script><b>&"}


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
    """The page carries one copy of the script for all its figures."""
    assert html.count("* plotly.js v") == 1


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


@pytest.mark.parametrize("doubt", [{"disturbed": 1}, {"interval_wide": True}])
def test_doubtful_figures_are_marked_in_the_plots(tmp_path: Path, doubt: dict) -> None:
    """A doubtful record hatches its bar, and a run without one has neither hatch nor hollow point."""
    marked = write_report(run_folder(tmp_path / "marked", [ran("reference"), ran("onednn", 1.2, **doubt)]))
    clean = write_report(run_folder(tmp_path / "clean", [ran("reference"), ran("onednn", 1.2)]))
    for found, expected in ((marked, True), (clean, False)):
        # One hatch is the bar's, one the legend's.
        assert (found.page.parent / "plots" / "speedup.svg").read_text().count("<pattern") == 2 * expected
        drawn = figures(found.page.read_text(encoding="utf-8"))
        shapes = str([trace["marker"] for figure in drawn for trace in figure["data"] if "marker" in trace])
        assert ("'/'" in shapes) is expected
        assert ("-open" in shapes) is expected


def test_mark_is_explained_on_the_page(html: str) -> None:
    """Who sees a mark finds its meaning on the page, and its cause over the figure."""
    assert "~ doubtful: samples were taken while something else used the machine" in Parsed(html).text
    titles = {attrs.get("title", "") for tag, attrs in Parsed(html).tags if tag == "td"}
    assert "3 of 30 samples were taken while something else used the machine" in titles


def test_page_works_without_plotly(tmp_path: Path, without_plotly: None) -> None:  # noqa: ARG001
    """Without Plotly the page holds the plots' SVG, as data, and says so."""
    page = write_report(run_folder(tmp_path, little())).page.read_text(encoding="utf-8")
    images = [attrs["src"] for tag, attrs in Parsed(page).tags if tag == "img"]
    assert len(images) == len(KINDS)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)
    assert "Plotly is not installed" in page
    assert figures(page) == []


def test_plotly_accepts_every_figure(tmp_path: Path) -> None:
    """Each description has only properties that Plotly knows."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    run = load_run(run_folder(tmp_path, everything()))
    drawn = [interactive.figure(chart) for kind in charts.kinds(run) for chart in kind.charts]
    assert len(drawn) == 22
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
    assert {path.stem for path in report.plots} == {"speedup", "throughput", "memory", "cold-start"}
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
    write_report(run_folder(tmp_path, little()))
    assert (tmp_path / "plots" / "scaling.png").exists()
    (tmp_path / "plots" / "mine.png").write_bytes(b"x")
    write_report(run_folder(tmp_path, [ran("reference")]))
    assert not (tmp_path / "plots" / "scaling.png").exists()
    assert (tmp_path / "plots" / "mine.png").exists()


def test_curve_is_thinned_but_for_its_tails() -> None:
    """A million calls become 500 points, and the largest calls are all there."""
    places = charts.thinned(1_000_000)
    assert len(places) == 500
    assert list(places[-charts.TAIL_POINTS :]) == list(range(1_000_000 - charts.TAIL_POINTS, 1_000_000))
    assert list(places[:3]) == [0, 1, 2]


def test_curve_leaves_out_the_rounds_that_the_record_left_out(tmp_path: Path) -> None:
    """Disturbed calls are on the curve only where the record's figures were made of them."""
    folder = run_folder(tmp_path, [ran("reference"), ran("loop", 0.5, disturbed=1)])
    with gzip.open(folder / "samples.csv.gz", "at") as file:
        file.writelines(f"seed,{name},inference,cpu,2,1,50,0,call,1,9.0,,1\n" for name in ("reference", "loop"))
    run = load_run(folder)
    largest = {record.variant: run.calls(record)[-1] for record in run.records}
    assert largest["loop"] == 9.0
    assert largest["reference"] < 1.0


def test_summary_table_puts_the_fastest_first_and_marks_it() -> None:
    """Within a group the order is by speedup, with what did not run and its reason last."""
    table = summary_table([refused("triton", Status.UNAVAILABLE, "no GPU"), ran("reference"), ran("onednn", 1.634)])
    assert list(table["variant"]) == ["onednn *", "reference", "triton"]
    assert table["speedup"][0] == "1.63x [1.58, 1.68]"
    assert (table["status"][2], table["what ran"][2], table["p50"][2]) == ("unavailable", "no GPU", "")


def test_summary_table_is_the_same_from_a_frame(tmp_path: Path) -> None:
    """Records that went through records.csv give the table that they gave before."""
    run = load_run(run_folder(tmp_path, everything()))
    pd.testing.assert_frame_equal(summary_table(everything()), summary_table(run.frame))
    assert run.records == tuple(everything())


def test_overlap_with_the_runner_up_is_said() -> None:
    """The answer claims a winner only where the intervals are apart."""
    near = groups([ran("reference"), ran("onednn", 1.60), ran("compile", 1.63)])
    far = groups([ran("reference"), ran("onednn", 1.20), ran("compile", 1.63)])
    assert "the intervals overlap" in answers(near)[0].text
    assert "the intervals do not overlap" in answers(far)[0].text
    assert answers(far)[0].text.startswith("`compile` is fastest, 1.63x [1.58, 1.68] as fast as the reference.")


def test_answer_says_that_nothing_beats_the_reference() -> None:
    """A reference that nothing beats is no winner with a speedup."""
    assert answers(groups([ran("reference"), ran("loop", 0.4)]))[0].text.startswith("Nothing is faster than the `ref")


def test_sweep_gets_one_answer() -> None:
    """The points of a sweep share one sentence with the best at each value."""
    swept = [record for record in everything() if record.sweep_axis]
    assert [answer.text for answer in answers(groups(swept))] == [
        "Fastest is `onednn` at 1 and 8 (1.32x to 2.00x); `reference` at 64."
    ]


def test_case_recorded_twice_counts_once(tmp_path: Path) -> None:
    """The last record of a case is the one that is shown, and the page says that there was another."""
    records = [ran("reference"), refused("loop", Status.TIMEOUT, "too slow at first"), ran("loop", 0.5)]
    folder = run_folder(tmp_path, records)
    assert [record.status.value for record in load_run(folder).records] == ["ok", "ok"]
    assert "1 earlier record of cases" in write_report(folder).page.read_text(encoding="utf-8")


def test_run_without_environment_has_a_page(tmp_path: Path) -> None:
    """The machine is unknown then, and the page says so."""
    folder = run_folder(tmp_path, [ran("reference")])
    (folder / "environment.json").unlink()
    assert "holds no environment.json" in write_report(folder).page.read_text(encoding="utf-8")


def test_nested_environment_is_shown(html: str) -> None:
    """Sections are shown whatever they hold, escaped."""
    text = Parsed(html).text
    assert "nested.seed" in text
    assert "A <CPU> & more" in text


def test_report_imports_no_torch() -> None:
    """A run is reported on machines that have no torch."""
    command = "import sys, bench.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


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
    with pytest.raises(ReportError, match="nowhere is not a folder; expected"):
        write_report(tmp_path / "nowhere")


def test_missing_records_is_an_error(tmp_path: Path) -> None:
    """A folder without records.csv is not a run."""
    with pytest.raises(ReportError, match=r"records\.csv is missing; expected"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (",".join(COLUMNS) + "\n", "holds no record"),
        ("", "lacks the columns"),
        ("name,age\nx,1\n", "lacks the columns workload"),
        ("schema_version\n99\n", "schema_version 99; expected 3"),
        (b"\xff\xfe\x00", "is not a CSV file"),
    ],
)
def test_foreign_records_are_an_error(tmp_path: Path, content: str | bytes, message: str) -> None:
    """Empty, foreign and newer tables are refused in one line that says which file."""
    (tmp_path / "records.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportError, match=message) as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)
    assert "records.csv" in str(caught.value)


@pytest.mark.parametrize(("column", "value"), [("speedup", "fast"), ("status", "fine"), ("interval_wide", "perhaps")])
def test_cell_of_the_wrong_type_is_an_error(tmp_path: Path, column: str, value: str) -> None:
    """A cell that does not fit its column is named with its row."""
    folder = run_folder(tmp_path, [ran("reference")])
    frame = pd.read_csv(folder / "records.csv", dtype=str)
    frame[column] = value
    frame.to_csv(folder / "records.csv", index=False)
    with pytest.raises(ReportError, match=f"row 1: column {column} holds '{value}'"):
        load_run(folder)


def test_samples_that_end_early_are_an_error(tmp_path: Path) -> None:
    """A cut file is not reported as if it were whole."""
    folder = run_folder(tmp_path, [ran("reference")])
    path = folder / "samples.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReportError, match=r"cannot be read .* move it away"):
        load_run(folder)


def test_a_list_of_sections_is_shown_leaf_by_leaf():
    """Each time a run was resumed has rows of its own in the environment's table."""
    found = list(tables.flat([{"seed": 1, "load": {"before": 2}}, {"seed": 3}]))
    assert found == [("1.seed", "1"), ("1.load.before", "2"), ("2.seed", "3")]
    assert list(tables.flat({"affinity": [0, 1], "none": []})) == [("affinity", "0, 1"), ("none", "")]
