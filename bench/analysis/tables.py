"""Comparisons as people and programs read them: text, Markdown for a pull request, CSV.

All three are made from the same tables, so that they say the same.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import units
from bench.analysis import comparability as comparable
from bench.analysis.compare import JUDGED, CasePair, CaseVerdict, Comparison, Finding, Mean
from bench.analysis.intervals import CONFIDENCE, Interval
from bench.analysis.run_summary import DOUBT, doubts
from bench.console import Console
from bench.machine.interference import DISTURBED
from bench.plan.identity import CaseKey
from bench.records.schema import Record, Status

FORMATS = ("text", "csv", "markdown")
OUTCOME_STYLE = {Finding.FINE: "", Finding.UNCLEAR: "yellow", Finding.REGRESSION: "red"}
HOLDS, UNTOLD = "!", "?"
#: What the mark before a time means.
DOUBTFUL = f"{DOUBT}: a doubtful figure: samples were taken while {DISTURBED}, or the interval is wide"
#: What a reader of a pull request need not see at once.
UNCHANGED = (CaseVerdict.SAME, CaseVerdict.UNCLEAR, CaseVerdict.YARDSTICK, CaseVerdict.NEITHER)
#: What is counted rather than listed: runs of different suites share few cases.
ONE_SIDED = (CaseVerdict.ONLY_BASE, CaseVerdict.ONLY_NEW)
#: Number of names that are listed; the rest is counted.
MOST_NAMES = 5
CSV_COLUMNS = (
    "base_run",
    "new_run",
    "workload",
    "mode",
    "device",
    "threads",
    "variant",
    "verdict",
    "by",
    "base_value",
    "new_value",
    "change",
    "change_lo",
    "change_hi",
    "holds_among_all",
    "regression",
    "could_not_tell",
    "base_status",
    "new_status",
    "note",
    "not_comparable",
    "warnings",
    "plugins",
)


@dataclass(frozen=True)
class ComparisonTable:
    """Column names and rows of cells."""

    columns: list[str]
    rows: list[list[str]]


def render(comparisons: Sequence[Comparison], form: str) -> str:
    """Text of a file in one of `FORMATS`."""
    if form == "csv":
        return table_csv(comparisons)
    if form == "markdown":
        return markdown(comparisons)
    with contextlib.redirect_stdout(io.StringIO()) as caught:
        text(comparisons)
    return "\n".join(line.rstrip() for line in caught.getvalue().splitlines()) + "\n"


def text(comparisons: Sequence[Comparison]) -> None:
    """Print everything: sentences, the table of cases, the geometric means."""
    console = Console()
    for line in _header(comparisons):
        console.say(line)
    for label, comparison in labelled(comparisons):
        for mark in _marks(label, comparison):
            console.say(mark, "red")
        console.say(lead(label, comparison), f"bold {OUTCOME_STYLE[comparison.outcome]}".strip())
        for line in untold(label, comparison):
            console.say(line, "yellow")
    table = cases(comparisons)
    console.table(table.columns, table.rows)
    for line in _one_sided(comparisons):
        console.say(line)
    table = means(comparisons)
    if table.rows:
        console.table(table.columns, table.rows)
    for line in _footer(comparisons):
        console.say(line)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A pull request's comment: counts, geometric means and what changed; the rest folded away."""
    parts = []
    for label, comparison in labelled(comparisons):
        parts += [f"> **{escaped(mark)}**" for mark in _marks(label, comparison)]
        parts.append(f"**{escaped(lead(label, comparison))}**")
        parts += [escaped(line) for line in untold(label, comparison)]
    average = means(comparisons)
    if average.rows:
        parts.append(markdown_table(average))
    changed = cases(comparisons, lambda pairs: not all(pair.verdict in UNCHANGED for pair in pairs))
    if changed.rows:
        parts.append(markdown_table(changed))
    rest = cases(comparisons, lambda pairs: all(pair.verdict in UNCHANGED for pair in pairs))
    if rest.rows:
        folded = markdown_table(rest)
        parts.append(f"<details><summary>{units.counted(len(rest.rows), 'case')} without a clear change</summary>")
        parts += [folded, "</details>"]
    notes = [*_one_sided(comparisons), *_header(comparisons), *_footer(comparisons)]
    parts += ["\n".join(f"- {escaped(line)}" for line in notes)]
    return "\n\n".join(parts) + "\n"


def table_csv(comparisons: Sequence[Comparison]) -> str:
    """One row per case and NEW, figures with all digits; times in seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for comparison in comparisons:
        bad, open_ = ({pair.key for pair in found} for found in (comparison.regressions, comparison.unclear))
        for pair in comparison.pairs:
            workload, mode, device, threads, variant = pair.key
            change: Sequence[object] = ("", "", "")
            if pair.change is not None:
                change = (pair.change.value, pair.change.low, pair.change.high)
            statuses = [record.status.value if record else "" for record in (pair.base, pair.new)]
            writer.writerow([
                comparison.base.path, comparison.new.path, workload, mode, device, threads or "", variant,
                pair.verdict.value, pair.by, pair.base_value, pair.new_value, *change,
                pair.holds if pair.verdict in JUDGED else "", pair.key in bad,
                pair.key in open_, *statuses, pair.note,
                "; ".join(map(str, comparison.differences)), "; ".join(comparison.warnings),
                "; ".join(comparison.plugins),
            ])  # fmt: skip
    return out.getvalue()


def labelled(comparisons: Sequence[Comparison]) -> list[tuple[str, Comparison]]:
    """Each comparison with what its run is called: NEW, or NEW1, NEW2 and so on."""
    alone = len(comparisons) == 1
    return [("NEW" if alone else f"NEW{number}", found) for number, found in enumerate(comparisons, start=1)]


def lead(label: str, comparison: Comparison) -> str:
    """The answer in a sentence: how many cases of each verdict, and whether there is a regression."""
    counts = Counter(pair.verdict for pair in comparison.pairs)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in CaseVerdict if counts[verdict])
    sentence = f"{label} {comparison.new.path} against BASE {comparison.base.path}: {told}"
    threshold = comparison.options.threshold
    if threshold is None:
        return sentence
    if found := len(comparison.regressions):
        what = f"certainly slower, by an estimated {_percent(threshold)} or more, or broken"
        return f"{sentence}; {units.counted(found, 'regression')} ({what})"
    if comparison.outcome is Finding.UNCLEAR:
        return f"{sentence}; could not tell whether anything became slower by {_percent(threshold)} or more"
    return f"{sentence}; no regression (no case became slower by {_percent(threshold)} or more, or broke)"


def untold(label: str, comparison: Comparison) -> list[str]:
    """Describe what `--fail-on` could not decide, and what would decide it."""
    threshold = comparison.options.threshold
    if threshold is None:
        return []
    lines = []
    if not comparison.judged:
        lines.append(f"{label}: no case was measured in both runs and judged, so nothing can be said")
    unfinished = [pair for pair in comparison.unclear if pair.unfinished]
    if unfinished:
        lines.append(
            f"{label}: {_named(unfinished)} {'is' if len(unfinished) == 1 else 'are'} yet to be measured; finish that "
            f"run: python -m bench run --resume {shlex.quote(str(comparison.new.path))}"
        )
    wide = [pair for pair in comparison.unclear if not pair.unfinished]
    if wide:
        disturbed = any(record.disturbed for pair in wide for record in (pair.base, pair.new) if record)
        cure = "measure again on a quiet machine, with a larger --budget" if disturbed else "measure longer: --budget"
        because = f"; {DISTURBED} meanwhile" if disturbed else ""
        lines.append(
            f"{label}: a slowdown by {_percent(threshold)} or more is neither shown nor excluded for {_named(wide)}"
            f"{because}. To tell, {cure}"
        )
    return lines


def _named(pairs: Sequence[CasePair]) -> str:
    """The cases of pairs by name, the first few of them."""
    names = [f"{pair.key.workload} {pair.key.mode} {pair.key.variant}" for pair in pairs]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def cases(
    comparisons: Sequence[Comparison], chosen: Callable[[list[CasePair]], bool] = lambda _: True
) -> ComparisonTable:  # fmt: skip
    """One row per case that a run shares with BASE, with a change and a verdict for each NEW.

    Args:
        comparisons: of one BASE.
        chosen: picks rows by their pairs.
    """
    by_case: dict[object, dict[int, CasePair]] = {}
    for number, comparison in enumerate(comparisons):
        for pair in comparison.pairs:
            by_case.setdefault(pair.key, {})[number] = pair
    by_case = {
        key: found for key, found in by_case.items() if any(pair.verdict not in ONE_SIDED for pair in found.values())
    }
    keys = [pair.key for found in by_case.values() for pair in found.values()]
    shown = [place for place in (0, 1, 2, 3, 4) if place not in {2, 3} or len({key[place] for key in keys}) > 1]
    columns = [CaseKey._fields[place] for place in shown] + [f"BASE {comparisons[0].base.path.resolve().name}"]
    for label, comparison in labelled(comparisons):
        columns += [f"{label} {comparison.new.path.resolve().name}", "change", "verdict"]
    rows = []
    for found in by_case.values():
        if not chosen(list(found.values())):
            continue
        first = next(iter(found.values()))
        row = [str(first.key[place]) for place in shown] + [_figure(first.by, first.base_value, first.base)]
        for number, comparison in enumerate(comparisons):
            row += _cells(found[number], comparison)
        rows.append(row)
    return ComparisonTable(columns, rows)


def means(comparisons: Sequence[Comparison]) -> ComparisonTable:
    """Geometric mean of the changes of each variant, and of the yardstick's times."""
    found: dict[tuple[str, str], dict[int, Mean]] = {}
    for number, comparison in enumerate(comparisons):
        for mean in comparison.means:
            found.setdefault((mean.variant, mean.by), {})[number] = mean
    columns = ["variant", "geometric mean of"]
    for label, _ in labelled(comparisons):
        columns += [label, "cases"]
    rows = []
    for (variant, by), values in found.items():
        yardstick = by != comparisons[0].options.by
        row = [variant, "its time (yardstick)" if yardstick else f"changes by {by}"]
        for number in range(len(comparisons)):
            average = values.get(number)
            row += [_change(average.change), str(average.cases)] if average else ["", ""]
        rows.append(row)
    return ComparisonTable(columns, rows)


def _header(comparisons: Sequence[Comparison]) -> list[str]:
    """Lines that name the runs and the way they were compared."""
    first = comparisons[0]
    lines = [f"BASE is {first.base.path}, {comparable.source(first.base.environment)}"]
    for label, comparison in labelled(comparisons):
        lines.append(f"{label} is {comparison.new.path}, {comparable.source(comparison.new.environment)}")
        lines += [f"BASE against {label}: {plugin}; the change may be in it" for plugin in comparison.plugins]
        lines += [f"warning, BASE against {label}: {warning}" for warning in comparison.warnings]
    if first.options.by == "speedup":
        how = "speedup over the reference in the same rounds, so drift of the machine cancels"
    else:
        how = "time, so drift of the machine counts"
    return [*lines, f"compared by {how}; a change above 1 is faster"]


def _footer(comparisons: Sequence[Comparison]) -> list[str]:
    """Notes that the figures need to be read correctly."""
    options = comparisons[0].options
    lines = []
    for label, comparison in labelled(comparisons):
        if comparison.moved:
            lines.append(_moved(label, comparison))
        if comparison.judged:
            lines.append(_chances(label, comparison))
    lines += verdicts(options.margin)
    if options.threshold is not None:
        lines.append(f"{UNTOLD}: a slowdown of {_percent(options.threshold)} or more is neither shown nor excluded")
    if options.by == "speedup":
        lines.append("yardstick: the reference's own time, which is never judged")
    too_wide = f"the interval is too wide: its ends are more than {units.MOST_SPREAD:g} times apart"
    return [*lines, DOUBTFUL, f"{units.NO_ESTIMATE}: {too_wide}"]


def verdicts(margin: float) -> list[str]:
    """Lines that explain the verdicts of a comparison.

    Args:
        margin: a change whose interval lies within it is none, as a share.
    """
    return [
        f"same: the {_percent(CONFIDENCE)} interval of the change lies within {_percent(margin)} of 1",
        f"faster, slower: the interval excludes 1; {HOLDS} if it does so after correction for all comparisons (Holm)",
        "unclear: neither of these",
    ]


def _moved(label: str, comparison: Comparison) -> str:
    """The line about references whose own time moved."""
    furthest = max(comparison.moved, key=lambda pair: max(_value(pair), 1 / _value(pair)))
    yardsticks = sum(pair.verdict is CaseVerdict.YARDSTICK for pair in comparison.pairs)
    return (
        f"{label}: the reference itself moved in {len(comparison.moved)} of {units.counted(yardsticks, 'group')}, "
        f"furthest in {furthest.key.workload} {furthest.key.mode}, where it took {1 / _value(furthest):.2f} times as "
        "long: the machine drifted, or a change affects everything; --by time shows it"
    )


def _value(pair: CasePair) -> float:
    return pair.change.value if pair.change else 1.0


def _chances(label: str, comparison: Comparison) -> str:
    """State how many verdicts chance alone would give."""
    count = len(comparison.judged)
    changed = [pair for pair in comparison.judged if pair.verdict in {CaseVerdict.FASTER, CaseVerdict.SLOWER}]
    holding = sum(pair.holds for pair in changed)
    return (
        f"{label}: of {units.counted(count, 'comparison')} of unchanged code about {count * (1 - CONFIDENCE):.1f} "
        f"would be faster or slower by chance; {len(changed)} are, {holding} of them after correction ({HOLDS})"
    )


def _marks(label: str, comparison: Comparison) -> list[str]:
    if not comparison.differences:
        return []
    what = "; ".join(map(str, comparison.differences))
    return [f"NOT COMPARABLE, compared by force; BASE against {label}: {what}"]


def _one_sided(comparisons: Sequence[Comparison]) -> list[str]:
    """Cases that only one of two runs has, counted by group."""
    lines = []
    for label, comparison in labelled(comparisons):
        for verdict in ONE_SIDED:
            pairs = [pair for pair in comparison.pairs if pair.verdict is verdict]
            if not pairs:
                continue
            there = [record for pair in pairs for record in (pair.base, pair.new) if record]
            ended = Counter(record.status for record in there if record.status is not Status.OK)
            told = f" ({', '.join(f'{count} {status}' for status, count in ended.items())})" if ended else ""
            where = verdict.replace("NEW", label)
            line = f"{units.counted(len(pairs), 'case')} {where}{told}: {_named(pairs)}"
            lines.append(f"{line}; --format csv lists all" if len(pairs) > MOST_NAMES else line)
    return lines


def _cells(pair: CasePair, comparison: Comparison) -> list[str]:
    """Figure, change and verdict of a case in one NEW."""
    word = f"{pair.verdict} {HOLDS}" if pair.holds and pair.verdict is not CaseVerdict.SAME else pair.verdict.value
    if comparison.options.threshold is not None and pair.unclear(comparison.options.threshold):
        word = f"{word} {UNTOLD}"
    if pair.verdict is CaseVerdict.YARDSTICK:
        word = "yardstick (its time)"
    note = f" ({' '.join(pair.note.split())})" if pair.note else ""
    return [_figure(pair.by, pair.new_value, pair.new), _change(pair.change), word + note]


def _figure(by: str, value: float | None, record: Record | None) -> str:
    """A speedup or a time, marked where it is doubtful."""
    if value is None or record is None:
        return ""
    if by == "speedup":
        known, text = units.estimated(record.speedup_lo, record.speedup_hi), units.ratio(value)
    else:
        known, text = units.estimated(record.latency_p50_lo_s, record.latency_p50_hi_s), units.seconds(value)
    return (DOUBT if doubts(record) else "") + (text if known else units.NO_ESTIMATE)


def _change(change: Interval | None) -> str:
    """With a digit more than other ratios, since what is looked for are a few percent."""
    return "" if change is None else units.ratio_interval(change.value, change.low, change.high, digits=3)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def markdown_table(table: ComparisonTable) -> str:
    """A table as Markdown has it."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(escaped(cell) for cell in line) + " |" for line in lines)


def escaped(cell: str) -> str:
    """A cell that stays one: no column, line, tag or emphasis of its own."""
    for character in "\\|<>*_`~#":
        cell = cell.replace(character, f"\\{character}")
    return " ".join(cell.split())
