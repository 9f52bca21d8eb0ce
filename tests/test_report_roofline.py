"""The roofline of a report: no case above its lines, no case lost, and no figure where nothing was measured."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report_pages import page_text
from test_report import Parsed, figures, ran, refused, run_folder

from bench.analysis.roofline import Ceilings, Work, share
from bench.analysis.run_summary import load_run
from bench.errors import UsageError
from bench.records.schema import Record, Status
from bench.report import interactive, page, page_script, plots, roofline
from bench.report.descriptions import RooflineChart
from bench.report.page import write_report

MACHINE = {
    "threads": 2, "measurements": 1, "flops_per_s": {"fp32": 1e11, "bf16": 4e11, "fp16": 5e9},
    "bytes_per_s": {"32768": 3e11, "8388608": 2e11, "268435456": 4e10},
}  # fmt: skip


def worked(variant: str, speedup: float, least_bytes: int = 10**5, **more: object) -> Record:
    """A record with its work and its share of `MACHINE`."""
    record = ran(variant, speedup, flops=10**7, least_bytes=least_bytes, **more)
    record = replace(record, throughput_seq_per_s=record.batch / record.latency_p50_s)
    return replace(record, **share(Work.of(record.as_dict()), Ceilings.of(MACHINE)))


def cases() -> list[Record]:
    """Two workloads in two modes with four variants, and one that did not run."""
    names = ("reference", "onednn", "amp-bf16", "loop")
    found = [
        worked(name, 0.5 + place, workload=workload, mode=mode, precision="bf16" if "bf16" in name else "fp32")
        for workload in ("seed", "forecast-deepar")
        for mode in ("inference", "training")
        for place, name in enumerate(names)
    ]
    return [*found, refused("compile", Status.IMPOSSIBLE, "2.3x faster than this machine's fp32 products allow")]


def folder(path: Path, records: list[Record], section: object = None) -> Path:
    """A run folder with ceilings."""
    found = run_folder(path, records)
    (found / "environment.json").write_text(json.dumps({"ceilings": section or {"cpu": MACHINE}}))
    return found


def test_every_case_is_a_point(tmp_path: Path) -> None:
    """One panel a mode, one point a case that ran, at its FLOPs per byte and a second; what is impossible has none."""
    (kind,) = roofline.kinds(load_run(folder(tmp_path, cases())))
    assert [chart.title for chart in kind.charts] == ["inference", "training"]
    for chart in kind.charts:
        points = {variant: [(point.x, point.y) for point in points] for variant, points in chart.marks}
        # Variants stand a little beside each other.
        near = (pytest.approx(100.0, rel=0.05), pytest.approx(10**7 / (0.004 / 1.5)))
        assert points["onednn"] == [near] * 2
        assert {name: len(found) for name, found in points.items()} == dict.fromkeys(points, 2)
        assert set(points) == {"reference", "onednn", "amp-bf16", "loop"}
        assert [column.name for column in chart.columns] == ["seed", "forecast-deepar"]


def test_the_picture_holds_all_points_and_lines(tmp_path: Path) -> None:
    """Every point and both ends of every line lie inside the axes, and every point under its own precision's line."""
    for chart in roofline.kinds(load_run(folder(tmp_path, cases())))[0].charts:
        levels = [roof.start[1] for roof in chart.roofs if roof.level]
        assert levels == [1e11, 4e11]
        ends = [end for roof in chart.roofs for end in (roof.start, roof.end)]
        marks = [(point.x, point.y) for _, points in chart.marks for point in points]
        for x, y in (*ends, *marks):
            assert chart.x.lo * 0.999 <= x <= chart.x.hi * 1.001
            assert chart.y.lo * 0.999 <= y <= chart.y.hi * 1.001
        assert max(y for _, y in marks) <= max(levels)


def test_lines_rise_as_the_bandwidth_does(tmp_path: Path) -> None:
    """A rising line ends at the highest level where its bytes last exactly as long as the products."""
    # At 20 FLOPs per byte, near the ridge of the slowest bandwidth at 10.
    near = [worked(name, 1.0, 5 * 10**5, precision=kind) for name, kind in (("onednn", "fp32"), ("amp-bf16", "bf16"))]
    (kind,) = roofline.kinds(load_run(folder(tmp_path, near)))
    slopes = [roof for roof in kind.charts[0].roofs if not roof.level]
    assert slopes
    for roof in slopes:
        assert roof.start[1] / roof.start[0] == pytest.approx(roof.end[1] / roof.end[0])
        assert roof.end[1] == 4e11
    assert slopes[0].end[1] / slopes[0].end[0] == pytest.approx(4e10)


def words_below(chart: RooflineChart) -> list[str]:
    """Lines below the picture of a roofline, which must not be wider than its axis."""
    with mpl.rc_context(plots.RC):
        figure = Figure(figsize=(plots.PANEL_WIDTH, plots.ROOFLINE_HEIGHT), layout="constrained")
        axes = figure.subplots()
        plots.draw_roofline(axes, chart)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
    assert axes.xaxis.label.get_window_extent(renderer).width < axes.bbox.width
    return axes.get_xlabel().split("\n")


@pytest.mark.parametrize("least_bytes", [(10**5, 2 * 10**3), (10**5, 10**5), (4 * 10**6, 10**7), (10**5, 10**7)])
def test_the_cases_fill_the_picture(tmp_path: Path, least_bytes: tuple[int, int]) -> None:
    """The outermost cases stand near the ends of the picture; a ridge that is not in it is named below it."""
    variants = ("reference", "loop", "onednn", "compile", "torchscript", "cpu-fused", "onnxruntime")
    pairs = itertools.product(zip(("seed", "other"), least_bytes, strict=True), variants)
    records = [worked(variant, 0.01, moved, workload=name) for (name, moved), variant in pairs]
    (chart,) = roofline.kinds(load_run(folder(tmp_path, records)))[0].charts
    places = [column.x for column in chart.columns]
    ridge = 1e11 / 4e10
    room = roofline.PAD * roofline.NEAR * math.sqrt(roofline.LEAST_WIDTH)
    assert chart.x.lo * room > min(places)
    assert chart.x.hi < room * max(places)
    assert ("products limit" in chart.beyond) == (chart.x.lo > ridge)
    assert ("memory limits" in chart.beyond) == (chart.x.hi < ridge)
    assert chart.roofs
    marks = [point.x for _, points in chart.marks for point in points]
    assert chart.x.lo * 1.1 < min(marks)
    assert max(marks) < chart.x.hi / 1.1
    assert chart.beyond in interactive.note(chart)
    assert words_below(chart) == list(filter(None, (chart.x.title, plots.BESIDE, chart.beyond)))


@pytest.mark.parametrize("places", [[], [0.5], [0.5] * 7, [0.99, 0.995, 1.0], [0.0, 0.01, 0.8], [0.3] * 60])
def test_names_are_moved_apart(places: list[float]) -> None:
    """They keep their order, stay inside, and stand apart as far as there is room."""
    moved = roofline.spread(places)
    room = min(roofline.NAME_ROOM, 1 / max(1, len(places)))
    assert len(moved) == len(places)
    assert all(-1e-9 <= place <= 1 for place in moved)
    assert all(right - left >= room - 1e-9 for left, right in itertools.pairwise(moved))


def test_the_page_shows_plot_and_table(tmp_path: Path) -> None:
    """Plot files, a section with figures, a table with the share, and the machine's ceilings in units people read."""
    run = folder(tmp_path, cases())
    written = plots.write_plots(roofline.kinds(load_run(run)), run / "plots")
    assert [path.name for path in written["roofline"]] == ["roofline.png", "roofline.svg"]
    html = page_text(run)
    section = html[html.index('<section id="roofline">') :]
    section = section[: section.index("</section>")]
    assert len(figures(html, section)) == 2
    text = Parsed(section).text
    # 10 MFLOP in 4 ms / 1.5 at 100 GFLOP/s.
    assert all(
        word in text for word in ("share of ceiling", "3.75 GFLOP/s", "3.8 %", "10.0 MFLOP", "100 kB", "compute")
    )
    assert "400 GFLOP/s" in Parsed(html[html.index('<section id="environment">') :]).text
    assert "impossible: 2.3x faster" in Parsed(html).text


def test_without_ceilings_there_is_no_roofline(tmp_path: Path) -> None:
    """An older run has its report, without the figure."""
    run = run_folder(tmp_path, [ran("reference"), ran("loop", 0.4)])
    assert not [kind for kind in page.all_kinds(load_run(run)) if "roofline" in kind.name]
    assert 'id="roofline' not in page_text(run)


def test_plotly_accepts_the_figure(tmp_path: Path) -> None:
    """The description has only properties that Plotly knows, and its values are numbers."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for chart in roofline.kinds(load_run(folder(tmp_path, cases())))[0].charts:
        figure = interactive.figure(chart)
        graph_objects.Figure(figure)
        assert json.loads(page_script.as_json(figure)) == figure
        assert all(math.isfinite(x) for trace in figure["data"] for x in trace["x"] if x is not None)


def test_a_doubtful_case_is_hollow(tmp_path: Path) -> None:
    """As in every other figure."""
    records = [worked("reference", 1.0), worked("loop", 0.5, disturbed=2)]
    (chart,) = roofline.kinds(load_run(folder(tmp_path, records)))[0].charts
    assert {variant: points[0].doubtful for variant, points in chart.marks} == {"reference": False, "loop": True}


def test_a_broken_section_is_an_error(tmp_path: Path) -> None:
    """In one line that says what to do."""
    with pytest.raises(UsageError, match=r"the section ceilings is broken .* remove it"):
        write_report(folder(tmp_path, cases(), {"cpu": {"threads": 2}}))
