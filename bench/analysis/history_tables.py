"""A history as people and programs read it: text, Markdown for a pull request, CSV; all three say the same."""

from __future__ import annotations

import csv
import io

from bench import units
from bench.analysis import comparability as comparable
from bench.analysis.causes import moved_from
from bench.analysis.change_points import FALSE_ALARMS, LEAST
from bench.analysis.history import CaseSeries, Explained, History, MeasuredBy
from bench.analysis.tables import ComparisonTable, escaped, markdown_table
from bench.console import Console
from bench.plan.cases import REFERENCE

CSV_COLUMNS = (
    "workload",
    "mode",
    "device",
    "threads",
    "variant",
    "by",
    "run",
    "recorded_at",
    "source",
    "value",
    "value_lo",
    "value_hi",
    "change",
    "change_lo",
    "change_hi",
    "chance",
    "before",
    "differs",
    "guess",
    "guesses",
)


def render(history: History, form: str) -> str:
    """A file's text as `csv` or `markdown`."""
    return table_csv(history) if form == "csv" else markdown(history)


def text(history: History) -> None:
    """Print the changes, the latest first, and what to know about them."""
    console = Console()
    console.say(lead(history), "bold")
    for series, change in history.changed:
        console.say("")
        console.say(f"{_case(series)}: {word(change)} since {change.after.path.name}", "bold")
        console.say(f"  last run before: {change.before.path.name}; changed since: {differs(change)}")
        for number, guess in enumerate(change.guesses, start=1):
            console.say(f"  {number}. {guess}")
    for line in notes(history):
        console.say(line, "dim")


def markdown(history: History) -> str:
    """A pull request's comment: the answer, a table of the changes, and the notes folded away."""
    parts = [f"**{escaped(lead(history))}**"]
    if history.changed:
        parts.append(markdown_table(changes(history)))
    folded = "\n".join(f"- {escaped(line)}" for line in notes(history))
    parts += ["<details><summary>How to read this</summary>", folded, "</details>"]
    return "\n\n".join(parts) + "\n"


def table_csv(history: History) -> str:
    """One row per figure, with all digits, times in seconds; where a level begins, the change to it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for series in history.series:
        begun = {change.change.place: change for change in series.changes}
        for place, (run, figure, record) in enumerate(zip(history.runs, series.figures, series.records, strict=True)):
            if figure is None or record is None:
                continue
            row: list[object] = [
                *series.key,
                history.by.value,
                run.path.name,
                record.recorded_at,
                comparable.source(run.environment),
            ]
            row += [figure.value, figure.low, figure.high]
            change = begun.get(place)
            if change is not None:
                factor = change.change.factor
                row += [factor.value, factor.low, factor.high, change.change.chance, change.before.path.name]
                row += [differs(change), change.guesses[0].cause.value, "; ".join(map(str, change.guesses))]
            writer.writerow(row + [""] * (len(CSV_COLUMNS) - len(row)))
    return out.getvalue()


def changes(history: History) -> ComparisonTable:
    """One row per change, the latest first."""
    columns = [
        "case",
        "change",
        "first run",
        "last run before",
        "what else changed",
        "possible causes, likeliest first",
    ]
    rows = [
        [
            _case(series),
            word(change),
            change.after.path.name,
            change.before.path.name,
            differs(change),
            ", ".join(str(guess) for guess in change.guesses),
        ]
        for series, change in history.changed
    ]
    return ComparisonTable(columns, rows)


def word(change: Explained) -> str:
    """`slower, 0.95x [0.94, 0.96]`."""
    factor = change.change.factor
    told = "faster" if factor.value > 1 else "slower"
    return f"{told}, {units.ratio_interval(factor.value, factor.low, factor.high, digits=3)}"


def differs(change: Explained) -> str:
    """Describe what changed in the environment between the two runs."""
    return "; ".join(map(moved_from, change.between.all)) or "nothing that is recorded"


def lead(history: History) -> str:
    """The answer in a sentence."""
    changed = {series.key for series, _ in history.changed}
    judged = _judged(history)
    runs = f"{history.runs[0].path.name} to {history.runs[-1].path.name}, {len(history.runs)} runs"
    if not changed:
        return f"{runs}: none of {judged} cases changed for good"
    return f"{runs}: {len(changed)} of {judged} cases changed for good"


def notes(history: History) -> list[str]:
    """Return the notes that a reader needs to read the figures correctly."""
    how = (
        "speedup over the reference of the same run, so drift of the machine cancels"
        if history.by is MeasuredBy.SPEEDUP
        else "time of a call, so drift of the machine counts"
    )
    return [
        *history.left_out,
        f"compared by {how}; a change above 1 is faster; brackets hold its 95 % interval",
        f"a change lasts at least {LEAST} runs: a single run that stands out is not one",
        "each case is judged by the noise of its own runs",
        f"in simulated histories without a change, at most {100 * FALSE_ALARMS:g} in 100 showed one",
        "the order of the causes is a rule of thumb, by what else changed and how many other cases changed too",
    ]


def _judged(history: History) -> int:
    """Number of cases with a figure."""
    return sum(any(figure is not None for figure in series.figures) for series in history.series)


def _case(series: CaseSeries) -> str:
    name = series.key.variant
    return (
        f"{series.title}, {name}" if name != REFERENCE else f"{series.title}, {name} (all speedups are relative to it)"
    )
