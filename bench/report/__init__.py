"""The report of a run: tables, plots and a page, made from a run folder alone.

Nothing here imports torch, so a run that was recorded on one machine can be reported on any other.
"""

from bench.report.frames import LEGEND, Run, load_run, summary_table
from bench.report.page import Report, write_report

__all__ = ["LEGEND", "Report", "Run", "load_run", "summary_table", "write_report"]
