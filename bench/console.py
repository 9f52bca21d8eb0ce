"""Terminal output of a run: a progress bar, one line per case as it ends, a table at the end.

rich draws it. Where rich is not installed the same lines are printed plainly, without the bar.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from bench import units
from bench.plan.cases import Case
from bench.records.schema import Record, Status

_STYLE = {Status.OK: "green", Status.UNAVAILABLE: "dim"}

#: Columns of output that goes into a file.
FILE_WIDTH = 180


class Console:
    """Output of one run; a context manager, inside which the bar is shown.

    Args:
        total: cases that will end.
    """

    def __init__(self, total: int = 0) -> None:
        self._total = total
        self._progress: Any = None
        self._task: Any = None
        try:
            from rich.console import Console as RichConsole  # noqa: PLC0415 - optional
        except ImportError:
            self._rich: Any = None
        else:
            self._rich = RichConsole(highlight=False, soft_wrap=True)
            if not self._rich.is_terminal:
                # A file has no width to keep to, and a table folded at 80 columns cannot be read.
                self._rich = RichConsole(highlight=False, soft_wrap=True, width=FILE_WIDTH)

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._rich is not None and self._rich.is_terminal:
            from rich import progress  # noqa: PLC0415

            self._progress = progress.Progress(
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.BarColumn(bar_width=30),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"),
                console=self._rich,
                # Each refresh takes CPU time from what is being timed.
                refresh_per_second=1,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        if self._rich is None:
            print(text, flush=True)
        else:
            from rich.text import Text  # noqa: PLC0415

            self._rich.print(Text(text, style=style))
            sys.stdout.flush()

    def warn_of_threads(self, threads: int, cores: int) -> None:
        """Say what more threads than cores mean, where there are more: figures of an overloaded machine."""
        if threads > cores:
            self.say(
                f"warning: {threads} threads share the {cores} cores that this process may use (affinity and quota): "
                f"they wait for each other, and every time is longer; --threads {cores} gives each its own",
                "yellow",
            )

    def status(self, text: str) -> None:
        """Say beside the bar what is going on."""
        if self._progress is not None:
            self._progress.update(self._task, description=text)

    def advance(self, case: Case, doing: str) -> None:
        """Say which case is at it."""
        self.status(f"{case.group} {case.variant}: {doing}")

    def record(self, record: Record) -> None:
        """One line for a case that ended."""
        if self._progress is not None:
            self._progress.advance(self._task)
        head = f"{record.workload:<24} {record.mode:<9} {record.variant:<16}"
        if record.status is not Status.OK:
            self.say(f"{head} {record.status}: {record.reason}", _STYLE.get(record.status, "red"))
            return
        speed = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
        if record.interval_wide or record.disturbed:
            speed += " ~"
        median = ""
        if record.latency_p50_s is not None:
            interval = (record.latency_p50_s, record.latency_p50_lo_s, record.latency_p50_hi_s)
            median = f"p50 {units.estimated_seconds(*interval)}"
        self.say(f"{head} {speed:<28} {median:<15} {record.evidence}", _STYLE[Status.OK])

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table."""
        if self._rich is None:
            widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
            for row in [columns, *rows]:
                print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
            return
        from rich import box, table  # noqa: PLC0415

        shown = table.Table(box=box.SIMPLE_HEAD)
        for column in columns:
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        # A line may be longer than a terminal, which wraps it; a table would fall apart, so its cells are wrapped.
        self._rich.print(shown, soft_wrap=False)
