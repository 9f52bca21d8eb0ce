"""The page of a run without the plots that `write_report` draws as files beside it, which take most of its time."""

from __future__ import annotations

from pathlib import Path

from bench.analysis.run_summary import load_run
from bench.report import page


def page_text(folder: Path) -> str:
    """The HTML that `write_report` would write for the run in a folder."""
    run = load_run(folder)
    return page.render(run, page.all_kinds(run))
