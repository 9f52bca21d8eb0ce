"""Terminal output of a run: a live table with the time left, one line per case as it ends, a table at the end.

Without a terminal the same lines are printed plainly, and one now and then says how far the run is. With `--quiet`,
only errors and the last line are left. With `--json`, standard output has one line per record and the verdict, and all
else goes to standard error.
"""

from __future__ import annotations

import enum
import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench import units
from bench.plan.cases import Case
from bench.records.schema import Record, Status
from bench.records.tables import finite

_STYLE = {Status.OK: "green", Status.UNAVAILABLE: "dim"}

#: Columns of output that goes into a file.
FILE_WIDTH = 180
#: Seconds between two lines of progress where there is no terminal.
LOG_EVERY_S = 30.0


class Output(enum.Enum):
    """Ways to print a run."""

    FULL = enum.auto()
    QUIET = enum.auto()
    JSON = enum.auto()


class Console:
    """Output of one run; a context manager, inside which the live table is shown.

    Args:
        total: cases that will end.
        expected_s: guess of how long they take, seconds; 0 for none.
        output: way to print.
    """

    def __init__(self, total: int = 0, expected_s: float = 0.0, output: Output = Output.FULL) -> None:
        self._total, self._expected_s, self._output = total, expected_s, output
        self._start_s = self._said_s = time.monotonic()
        self._ended = 0
        self._rows: dict[str, str] = {}
        self._said_once: frozenset[str] = frozenset()
        self._group = self._doing = ""
        self._live: Live | None = None
        stderr = output is Output.JSON
        self._rich = RichConsole(highlight=False, soft_wrap=True, stderr=stderr)
        if not self._rich.is_terminal:
            # A file has no width to keep to, and a table folded at 80 columns cannot be read.
            self._rich = RichConsole(highlight=False, soft_wrap=True, width=FILE_WIDTH, stderr=stderr)

    def __enter__(self) -> Self:
        """Show the live table."""
        self._start_s = self._said_s = time.monotonic()
        if self._rich.is_terminal and self._output is Output.FULL:
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._rich,
            )
            self._task = self._progress.add_task("", total=self._total)
            # Each refresh takes CPU time from what is being timed.
            self._live = Live(self._shown(), console=self._rich, refresh_per_second=1, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line; with quiet output, only errors and warnings (red, yellow) and the main result (bold)."""
        if self._output is Output.QUIET and style not in {"red", "yellow", "bold"}:
            return
        self._rich.print(Text(text, style=style))
        sys.stdout.flush()

    def warn_of_threads(self, threads: int, cores: int) -> None:
        """Warn if there are more threads than cores: the figures are then those of an overloaded machine."""
        if threads > cores:
            self.say(
                f"warning: {threads} threads share the {cores} cores that this process may use (affinity and quota): "
                f"they wait for each other, and every time is longer; --threads {cores} gives each its own",
                "yellow",
            )

    def say_once(self, refused: Mapping[str, int]) -> None:
        """Say reasons for which many cases cannot run, in place of a line for each case.

        Args:
            refused: the number of cases by reason.
        """
        self._said_once = frozenset(refused)
        for reason, number in refused.items():
            self.say(f"{number} cases unavailable: {reason}", "dim")

    def lists(self, status: str, reason: str) -> bool:
        """Return whether a case has a line of its own, which it has unless `say_once` covers it."""
        return status != Status.UNAVAILABLE or reason not in self._said_once

    def status(self, text: str) -> None:
        """Say what is going on: in the live table, or now and then as a line."""
        self._doing = text
        if self._live is not None:
            self._update()
        elif self._total and time.monotonic() - self._said_s >= LOG_EVERY_S:
            self._said_s = time.monotonic()
            self.say(f"{self._ended}/{self._total} cases{self._left()}: {text}", "dim")

    def advance(self, case: Case, doing: str) -> None:
        """Show which case is being measured."""
        if case.group != self._group:
            self._group, self._rows = case.group, {}
        self._rows[case.variant] = doing
        self.status(f"{case.group} {case.variant}: {doing}")

    def record(self, record: Record, *, again: bool = False) -> None:
        """Print one line for a case that ended, or again after more rounds."""
        self._ended += not again
        if self._output is Output.JSON:
            print(json.dumps({"event": "record"} | finite(record.as_dict())), flush=True)
            return
        head = f"{record.workload:<24} {record.mode:<9} {record.variant:<16}"
        if not self.lists(record.status, record.reason):
            self._ends(record, str(record.status))
            return
        if record.status is not Status.OK:
            self.say(f"{head} {record.status}: {record.reason}", _STYLE.get(record.status, "red"))
            self._ends(record, str(record.status))
            return
        speed = units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)
        if record.interval_wide or record.disturbed or record.reason:
            speed += " ~"
        median = ""
        if record.latency_p50_s is not None:
            interval = (record.latency_p50_s, record.latency_p50_lo_s, record.latency_p50_hi_s)
            median = f"p50 {units.estimated_seconds(*interval)}"
        what = "; ".join(filter(None, (record.reason, record.evidence)))
        self.say(f"{head} {speed:<28} {median:<15} {what}", "yellow" if record.reason else _STYLE[Status.OK])
        self._ends(record, f"{speed} {median}")

    def verdict(self, values: Mapping[str, Any]) -> None:
        """The last line of a run as JSON; nothing otherwise."""
        if self._output is Output.JSON:
            print(json.dumps({"event": "verdict"} | finite(values)), flush=True)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table, unless the output is quiet or JSON."""
        if self._output is not Output.FULL:
            return
        shown = Table(box=box.SIMPLE_HEAD)
        for column in columns:
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))
        # A line may be longer than a terminal, which wraps it; a table would fall apart, so its cells are wrapped.
        self._rich.print(shown, soft_wrap=False)

    def _ends(self, record: Record, text: str) -> None:
        self._rows[record.variant] = text
        if self._live is not None:
            self._progress.update(self._task, completed=self._ended)
            self._update()

    def _update(self) -> None:
        self._progress.update(self._task, description=f"{self._left().removeprefix(', ')}")
        if self._live is not None:
            self._live.update(self._shown())

    def _shown(self) -> Group:
        """The group that is being measured, what is going on, and the bar."""
        table = Table(box=None, show_header=False, padding=(0, 2))
        for variant, doing in self._rows.items():
            table.add_row(Text(variant), Text(doing, style="dim"))
        return Group(Text(self._group, style="bold"), table, Text(self._doing, style="dim"), self._progress)

    def _left(self) -> str:
        """`, about 3 min left`: by the guess at first, and ever more by the pace so far."""
        share = self._ended / self._total if self._total else 0.0
        elapsed_s = time.monotonic() - self._start_s
        by_pace_s = elapsed_s / share if share else 0.0
        left_s = (1 - share) * self._expected_s + share * by_pace_s - elapsed_s
        if not self._expected_s or left_s <= 0:
            return ""
        return f", about {left_s:.0f} s left" if left_s < 90 else f", about {left_s / 60:.0f} min left"  # noqa: PLR2004
