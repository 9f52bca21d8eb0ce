"""The page in a real browser: it draws, filters, sorts and switches, at two widths and in both themes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_pages import page_text
from test_report import HOSTILE, KINDS, everything, ran, refused, run_folder

from bench.records.schema import Status
from bench.report.runs_page import write_side_by_side

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
#: Each width and each theme is there, not each of both: no colour makes anything wider.
WIDE, NARROW = VIEWS = (1400, "light"), (420, "dark")
DRAW_ALL = """async () => {
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
  await Promise.all(plots.map(draw));
}"""


@pytest.fixture(scope="module")
def browser():
    """One Chromium for all tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """The page of a run with every way to end, and with names that try to be more than names."""
    hostile = [
        ran("<img src=x onerror=alert(1)>", 1.2, workload="<b>bold</b>"),
        ran("reference", 1.0, workload="<b>bold</b>"),
        refused("javascript:alert(2)", Status.UNAVAILABLE, HOSTILE, workload="<b>bold</b>"),
    ]
    folder = run_folder(tmp_path_factory.mktemp("run") / "run", [*everything(("seed",)), *hostile])
    file = folder / "report.html"
    file.write_text(page_text(folder), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What pages wrote on the console or asked in a dialog, since a test last looked."""
    return []


@pytest.fixture(autouse=True)
def nothing_said(said):
    """No message of the console, no error and no dialog is allowed in any test."""
    yield
    found, said[:] = list(said), []
    assert found == []


@pytest.fixture(scope="module")
def open_at(browser, page_file, said):
    """Open a page at a width and in a theme."""
    contexts = []

    def opened(width: int = 1400, theme: str = "light", file: Path = page_file):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def drawn(open_at):
    """Pages with all figures drawn, by width and theme; drawing takes seconds, so tests leave them as they were."""
    pages = {view: open_at(*view) for view in VIEWS}
    for page in pages.values():
        page.evaluate(DRAW_ALL)
    return pages


@pytest.fixture
def wide(drawn):
    """The wide one, in light colours."""
    return drawn[WIDE]


def visible_rows(page, table: int = 0) -> list[str]:
    """The first cells of the rows of a result table that can be seen."""
    rows = page.locator("#results table").nth(table).locator("tbody tr:visible td:first-child")
    return [text.strip() for text in rows.all_inner_texts()]


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_every_figure_is_drawn_and_fits(drawn, width, theme):
    """All figures have a plot in them, nothing is wider than the window, and a picture can be taken."""
    page = drawn[width, theme]
    page.wait_for_function("plots.every((plot) => plot.dataset.state === 'drawn')")
    names = page.evaluate("plots.map((plot) => plot.id)")
    assert {name.rpartition("-")[0] for name in names} == set(KINDS)
    assert page.locator(".plot .main-svg").count() >= len(names)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.screenshot(full_page=True)) > 50_000
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert ink == ("rgb(228, 232, 238)" if theme == "dark" else "rgb(29, 34, 40)")


def test_figures_are_drawn_when_they_come_into_view(open_at):
    """The page is there before its figures: those far below wait until somebody looks."""
    page = open_at()
    last = page.locator(".plot").last
    assert last.get_attribute("data-state") is None
    last.scroll_into_view_if_needed()
    page.wait_for_function("plots.at(-1).dataset.state === 'drawn'")


def test_the_filter_leaves_rows_with_all_its_words(open_at):
    """Words of the group and of the row count; the number of rows is said; an empty filter shows all again."""
    page = open_at()
    before = visible_rows(page)
    page.fill("#filter", "seed inference ONEDNN")
    assert visible_rows(page) == [name for name in before if "onednn" in name]
    assert page.inner_text("#count").startswith("4 of ")  # itself and three points of the sweep
    page.fill("#filter", "nothing like it")
    assert visible_rows(page) == []
    page.fill("#filter", "")
    assert visible_rows(page) == before


def test_a_heading_sorts_by_the_numbers_behind_it(open_at):
    """By pointer and by keyboard, up and down; what has no figure stays last."""
    page = open_at()
    heading = page.locator("#results table").first.locator("th button", has_text="speedup")
    heading.click()
    assert [name.rstrip(" *") for name in visible_rows(page)][:4] == ["loop", "reference", "compile", "onednn"]
    heading.focus()
    page.keyboard.press("Enter")
    assert [name.rstrip(" *") for name in visible_rows(page)][:4] == ["onednn", "compile", "reference", "loop"]
    assert page.locator("#results th[aria-sort=descending]").count() == 1


def test_what_cannot_run_is_hidden_until_it_is_asked_for(open_at):
    """Unavailable cases are behind a switch; failures are always there."""
    page = open_at()
    assert "triton" not in visible_rows(page)
    assert {"amp-fp16", "openvino"} <= set(visible_rows(page))
    page.check("#all")
    assert "triton" in visible_rows(page)


def test_a_legend_switches_a_variant(wide):
    """A button of a legend hides the traces of its variant, says so, and shows them again."""
    button = wide.locator("#latency .legend button[data-key=onednn]").first
    states = (
        "plots.find((plot) => plot.id === 'latency-0').data.filter((t) => t.meta === 'onednn').map((t) => t.visible)"
    )
    button.click()
    assert wide.evaluate(states) == [False, False]
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert wide.evaluate(states) == [True, True]


def test_the_theme_can_be_changed(wide):
    """The button turns page and figures dark and light."""
    colours = "[getComputedStyle(document.body).color, plots[0].layout.font.color]"
    assert wide.evaluate(colours) == ["rgb(29, 34, 40)", "#1d2228"]
    wide.click("#theme")
    assert wide.evaluate(colours) == ["rgb(228, 232, 238)", "#e4e8ee"]
    wide.click("#theme")
    assert wide.evaluate(colours) == ["rgb(29, 34, 40)", "#1d2228"]


def test_hostile_names_stay_names(wide):
    """No name of a run becomes an element, and it can be read as it is."""
    assert wide.locator("img").count() == 0
    assert wide.locator("main b, main script").count() == 0
    assert any("<img src=x onerror=alert(1)>" in name for name in wide.locator("#results td").all_inner_texts())


@pytest.mark.parametrize("width", [1024, 1300])
def test_results_need_no_scrolling_in_a_usual_window(open_at, tmp_path, width):
    """At 1300 pixels all columns stand beside each other; below, an interval may go under its figure."""
    slow = {"latency_p50_s": 0.0345, "latency_p50_lo_s": 0.0331, "latency_p50_hi_s": 0.0367, "latency_p99_s": 0.0512}
    close = {"vs_best": 0.0853, "vs_best_lo": 0.0841, "vs_best_hi": 0.0872, "evidence": "LSTM ran in oneDNN, 2 layers"}
    cases = [ran("reference", 1.0), *(ran(name, 12.3) for name in ("cpu-fused-int8", "torchscript", "onnxruntime"))]
    folder = run_folder(tmp_path / "run", [replace(case, **slow, **close) for case in cases])
    file = folder / "report.html"
    file.write_text(page_text(folder), encoding="utf-8")
    page = open_at(width, file=file)
    box = page.locator("#results .scroll").first
    assert "34.5 ms [33.1, 36.7]" in " ".join(box.inner_text().split())
    assert box.evaluate("box => box.scrollWidth - box.clientWidth") <= 0


def test_a_phone_shows_rows_as_cards(open_at):
    """At 420 pixels a row needs no scrolling: its figures stand below its name, each with that of its column."""
    page = open_at(NARROW[0])
    cell = page.locator("#results tbody tr").first.locator("td[data-name=p99], td[data-name=p50]").first
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"p50" " "' or "p50" in cell.evaluate(
        "cell => cell.dataset.name"
    )
    box = cell.bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 420
    assert page.evaluate("document.querySelectorAll('details.part:not([open])').length") > 3


def test_print_opens_what_is_folded(open_at):
    """On paper nothing is behind a fold, and afterwards it is as it was."""
    page = open_at(NARROW[0])
    folded = "document.querySelectorAll('details:not([open])').length"
    before = page.evaluate(folded)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(folded) == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(folded) == before


def test_runs_side_by_side_in_the_browser(open_at, tmp_path):
    """The page of several runs draws, sorts and filters with the same script."""
    first = run_folder(tmp_path / "old", [ran("reference"), ran("onednn", 1.5)])
    second = run_folder(tmp_path / "<i>new", [ran("reference"), replace(ran("onednn", 2.0))])
    page = open_at(file=write_side_by_side([first, second], tmp_path / "side.html"))
    page.evaluate(DRAW_ALL)
    assert page.locator("i").count() == 0
    assert "<i>new: change" in page.locator("#results th").all_inner_texts()
    page.fill("#filter", "onednn")
    assert visible_rows(page) == ["onednn"]
