"""The tables of the page, as rows of texts with the numbers they sort by.

A table without a row is not made, and the page says nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench import units
from bench.analysis.roofline import Work, precision_words
from bench.analysis.run_summary import DOUBT, RankedGroup, doubts, percentile, summary_row
from bench.plan.cases import REFERENCE
from bench.plan.identity import CaseKey
from bench.records.schema import Record, Status
from bench.report.style import look
from bench.run.second_instrument import Findings

NO_REASON = "no reason was recorded"


@dataclass(frozen=True)
class Cell:
    """Content of a cell; `order` is the number it sorts by, `colour` that of the variant it names."""

    text: str
    order: float | None = None
    title: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Row:
    """A row; one with fewer cells than columns ends in a wide one.

    `look` is `best`, `off` (did not end well), `absent` (cannot run here) or empty.
    """

    cells: tuple[Cell, ...]
    look: str = ""


@dataclass(frozen=True)
class Table:
    """A table; `prose` names the columns that wrap, while figures do not; the filter goes through `filtered` ones."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    prose: tuple[str, ...] = ()
    folded: bool = False
    filtered: bool = False


def summary(group: RankedGroup) -> Table:
    """One group, fastest first; what did not run has its status and reason in place of figures."""
    names = ("variant", "speedup", "vs best", "p50", "p99", "steps/s", "peak memory", "first call", "what ran")
    rows = []
    for record in group.records:
        if record.status is not Status.OK:
            reason = Cell(f"{record.status.value}: {record.reason or NO_REASON}")
            absent = record.status is Status.UNAVAILABLE
            rows.append(Row((variant_cell(record, record.variant), reason), "absent" if absent else "off"))
            continue
        texts, orders = summary_row(record, best=record is group.winner), sort_orders(record)
        texts |= {"p50": with_interval(texts["p50"], record)}
        why = "; ".join(doubts(record))
        cells = [
            variant_cell(record, texts["variant"])
            if name == "variant"
            else Cell(texts[name], orders.get(name), why if texts[name].startswith(DOUBT) else "")
            for name in names
        ]
        rows.append(Row(tuple(cells), "best" if record is group.winner else ""))
    return Table(group.title, names, tuple(rows), ("what ran",), bool(group.sweep_axis), filtered=True)


def with_interval(text: str, record: Record) -> str:
    """A median with its interval, which may be far wider than that of the speedup."""
    lo, hi = record.latency_p50_lo_s, record.latency_p50_hi_s
    if lo is None or hi is None or not units.estimated(lo, hi):
        return text
    ends = [units.seconds(lo), units.seconds(hi)]
    # The unit once where it is the same: with three of them the table is wider than most windows.
    unit = f" {text.rpartition(' ')[2]}"
    if all(end.endswith(unit) for end in ends):
        ends = [end.removesuffix(unit) for end in ends]
    return f"{text} [{', '.join(ends)}]"


def sort_orders(record: Record) -> Mapping[str, float | None]:
    """The numbers behind the summary's columns."""
    return {
        "speedup": record.speedup if units.estimated(record.speedup_lo, record.speedup_hi) else None,
        "vs best": record.vs_best if units.estimated(record.vs_best_lo, record.vs_best_hi) else None,
        "p50": percentile(record, "p50")[1],
        "p99": percentile(record, "p99")[1],
        "steps/s": record.throughput_steps_per_s,
        "peak memory": record.memory_peak_bytes,
        "first call": record.first_call_s,
    }


def refused(groups: Iterable[RankedGroup]) -> Table | None:
    """Every case that did not end `ok`, with its reason: once where several groups have the same."""
    said: dict[tuple[str, str, str], dict[str, None]] = {}
    for group, record in every(groups):
        if record.status is not Status.OK:
            key = (record.variant, record.status.value, record.reason or NO_REASON)
            said.setdefault(key, {})[group.sweep_title] = None
    rows = [
        Row((Cell(name, colour=look(name).colour), Cell(status), Cell(reason), Cell("; ".join(titles))))
        for (name, status, reason), titles in said.items()
    ]
    return table("What did not run", ("variant", "status", "reason", "groups"), rows, ("reason", "groups"))


def latency(groups: Iterable[RankedGroup]) -> Table | None:
    """Percentiles of single calls with the median's interval, and the device's own time."""
    rows = []
    for group, record in every(groups):
        if record.status is not Status.OK or record.latency_p50_s is None:
            continue
        mark = DOUBT if doubts(record) else ""
        times = [percentile(record, name) for name in ("p50", "p90", "p95", "p99")]
        cells = [Cell(text and mark + text, value) for text, value in times]
        lo, hi = record.latency_p50_lo_s, record.latency_p50_hi_s
        shown = lo is not None and units.estimated(lo, hi)
        cells.insert(1, Cell(f"[{units.seconds(lo)}, {units.seconds(hi)}]" if shown else "", lo if shown else None))
        cells += [seconds(record.device_p50_s), number(record.calls), number(record.processes)]
        rows.append(Row((*where(group, record), *cells)))
    names = ("group", "variant", "p50", "95 % interval", "p90", "p95", "p99", "device p50", "calls", "processes")
    return table("Latency of single calls", names, rows)


def decoding(groups: Iterable[RankedGroup]) -> Table | None:
    """Tokens a second, and what one takes, of cases in the mode `decode`."""
    rows = []
    for group, record in every(groups):
        if record.status is not Status.OK or record.tokens_per_s is None:
            continue
        mark = DOUBT if doubts(record) else ""
        cells = [number(record.batch), number(record.beam), number(record.target_steps)]
        cells.append(Cell(mark + units.count(record.tokens_per_s), record.tokens_per_s))
        times = (record.token_latency_p50_s, record.token_latency_p99_s)
        cells += [Cell(mark + units.seconds(time_s) if time_s is not None else "", time_s) for time_s in times]
        rows.append(Row((*where(group, record), *cells)))
    names = ("group", "variant", "batch", "beam", "steps", "tokens/s", "a token's p50", "a token's p99")
    return table("Decoding: a call over its steps, each sequence's best hypothesis counted", names, rows)


def energy(groups: Iterable[RankedGroup]) -> Table | None:
    """Energy of a sequence and of a token, and the power that the machine takes when idle; reasons where none is."""
    rows = []
    for group, record in every(groups):
        if record.status is not Status.OK or record.energy_per_seq_j is None:
            continue
        lo, hi = record.energy_per_seq_lo_j, record.energy_per_seq_hi_j
        ends = f"[{units.joules(lo)}, {units.joules(hi)}]" if lo is not None and units.estimated(lo, hi) else ""
        cells = [Cell(units.joules(record.energy_per_seq_j), record.energy_per_seq_j), Cell(ends, lo if ends else None)]
        cells.append(Cell(units.joules(record.energy_per_token_j), record.energy_per_token_j))
        powers = (record.power_w, record.idle_power_w)
        cells += [Cell("" if power_w is None else f"{power_w:.3g} W", power_w) for power_w in powers]
        rows.append(Row((*where(group, record), *cells, Cell(record.energy))))
    names = ("group", "variant", "a sequence", "95 % interval", "a token", "power", "power when idle", "counter")
    return table("Energy of the whole package or board, idle power included", names, rows)


def memory(groups: Iterable[RankedGroup]) -> Table | None:
    """Resident memory of the process and the allocator's peaks."""
    columns = {
        "peak": "memory_peak_bytes",
        "steady": "memory_steady_bytes",
        "baseline": "memory_baseline_bytes",
        "CUDA allocated": "memory_cuda_allocated_bytes",
        "CUDA reserved": "memory_cuda_reserved_bytes",
    }
    return figures("Memory", groups, columns, units.megabytes)


def cold_start(groups: Iterable[RankedGroup]) -> Table | None:
    """Times before the first result."""
    columns = {"build": "build_s", "first call": "first_call_s", "of it compiling": "compile_s"}
    return figures("Cold start", groups, columns, units.seconds)


def roofline(groups: Iterable[RankedGroup]) -> Table | None:
    """Least work, the share of the machine's ceiling that was reached, and which ceiling that is."""
    rows = []
    for group, record in every(groups):
        work = Work.of(asdict(record))
        if record.status is not Status.OK or work is None:
            continue
        rate, intensity = work.flops / work.call_s, work.flops / work.least_bytes
        cells = [
            Cell(units.amount(work.flops, "FLOP"), work.flops),
            Cell(units.amount(work.least_bytes, "B"), work.least_bytes),
            Cell(f"{intensity:.3g}", intensity),
            Cell(f"{DOUBT if doubts(record) else ''}{units.amount(rate, 'FLOP')}/s", rate),
            Cell(units.share(record.ceiling_share), record.ceiling_share),
            Cell(record.bound),
        ]
        rows.append(Row((*where(group, record), *cells)))
    names = ("group", "variant", "FLOPs", "least bytes", "FLOP per byte", "reached", "share of ceiling", "ceiling")
    return table("Roofline", names, rows)


def parity(groups: Iterable[RankedGroup]) -> Table | None:
    """Errors against their limits, of what passed the gate and of what did not."""
    rows = [
        Row(
            (
                *where(group, record),
                Cell(record.status.value),
                *(Cell(units.error(value), value) for value in gate(record)),
                Cell(record.parity_worst),
            ),
            "" if record.status is Status.OK else "off",
        )
        for group, record in every(groups)
        if record.parity_error is not None or record.grad_error is not None
    ]
    names = ("group", "variant", "status", "error", "limit", "gradient error", "gradient limit", "nearest to its limit")
    return table("Parity", names, rows)


def gate(record: Record) -> tuple[float | None, ...]:
    """Errors and limits in the order of the parity table."""
    return (record.parity_error, record.parity_limit, record.grad_error, record.grad_limit)


def second_instrument(groups: Iterable[RankedGroup], found: Findings) -> Table | None:
    """Our p50 next to pytest-benchmark's median, of the cases that both have; what it refused has its reason.

    A case is marked if its medians and our interval disagree whether it is faster or slower than the reference.
    """
    rows = []
    medians = {key: figure.median_s for key, figure in found.figures.items()}
    for group, record in every(groups):
        figure, reason = found.figures.get(record.key), found.refused.get(record.key)
        if reason is not None:
            rows.append(Row((*where(group, record), Cell(f"no figure there: {reason}")), "off"))
        if figure is None or record.status is not Status.OK or record.latency_p50_s is None:
            continue
        mark, ours = DOUBT if doubts(record) else "", record.latency_p50_s
        quotient = figure.median_s / ours
        cells = (
            Cell(mark + units.seconds(ours), ours, "; ".join(doubts(record))),
            seconds(figure.median_s),
            Cell(units.ratio(quotient), quotient),
            contradiction(record, medians),
            number(figure.rounds),
        )
        rows.append(Row((*where(group, record), *cells)))
    names = ("group", "variant", "our p50", "its median", "its median / our p50", "its speedup", "its rounds")
    return table("Second instrument: pytest-benchmark", names, rows)


def contradiction(record: Record, medians: Mapping[CaseKey, float]) -> Cell:
    """Speedup by the second instrument, marked where our interval excludes its side of 1."""
    key = record.key
    base = medians.get(key.group.of(REFERENCE))
    if base is None:
        return Cell("")
    speedup = base / medians[key]
    ours_faster = record.speedup_lo is not None and record.speedup_lo > 1
    ours_slower = record.speedup_hi is not None and record.speedup_hi < 1
    against = (ours_faster and speedup < 1) or (ours_slower and speedup > 1)
    text = units.ratio(speedup)
    return Cell(f"{text}, against ours" if against else text, speedup)


def evidence(groups: Iterable[RankedGroup]) -> Table | None:
    """Table of what really ran; groups with the same evidence share a row."""
    # The points of a sweep are one place here.
    said: dict[tuple[str, ...], dict[str, None]] = {}
    for group, record in every(groups):
        if record.status is Status.OK:
            said.setdefault((record.variant, *noted(record)), {})[group.sweep_title] = None
    rows = [
        Row((Cell(key[0], colour=look(key[0]).colour), Cell("; ".join(titles)), *(Cell(text) for text in key[1:])))
        for key, titles in said.items()
        if any(key[1:])
    ]
    names = ("variant", "groups", "what ran", "precision", "operators", "graphs", "threads")
    return table("What really ran", names, rows, ("groups", "what ran", "operators"))


def noted(record: Record) -> tuple[str, ...]:
    """The evidence columns of a record as texts."""
    counts = (
        (record.graphs, "graph", "graphs"),
        (record.graph_breaks, "break", "breaks"),
        (record.recompiles, "recompile", "recompiles"),
    )
    graphs = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n is not None)
    threads = "" if record.ran_threads is None else f"{record.ran_threads} of {record.threads}"
    precision = precision_words(record.precision, record.ran_precision)
    return (record.evidence, precision, record.ran_operators, graphs, threads)


def workloads(groups: Iterable[RankedGroup]) -> Table | None:
    """The sizes and sources of what was run."""
    first = {group.key.workload: group.records[0] for group in reversed(tuple(groups))}
    rows = [
        Row(
            (
                Cell(record.workload),
                Cell(record.model),
                *(number(getattr(record, name)) for name in SIZES.values()),
                Cell(record.data),
                Cell(record.source),
            )
        )
        for record in reversed(first.values())
    ]
    return table("Workloads", ("workload", "model", *SIZES, "data", "source"), rows, ("data", "source"))


SIZES = {
    "batch": "batch",
    "source steps": "source_steps",
    "target steps": "target_steps",
    "hidden": "hidden_size",
    "layers": "num_layers",
    "parameters": "parameters",
}


def figures(title: str, groups: Iterable[RankedGroup], columns: Mapping[str, str], text: Any) -> Table | None:
    """Columns of plain figures; a column that no case has is left out."""
    ran = [(group, record) for group, record in every(groups) if record.status is Status.OK]
    used = {name: field for name, field in columns.items() if any(getattr(r, field) is not None for _, r in ran)}
    rows = []
    for group, record in ran:
        values = [getattr(record, field) for field in used.values()]
        if any(value is not None for value in values):
            rows.append(Row((*where(group, record), *(Cell(text(value), value) for value in values))))
    return table(title, ("group", "variant", *used), rows)


def table(title: str, columns: tuple[str, ...], rows: list[Row], prose: tuple[str, ...] = ()) -> Table | None:
    """A table, or None without rows."""
    return Table(title, columns, tuple(rows), prose) if rows else None


def every(groups: Iterable[RankedGroup]) -> Iterable[tuple[RankedGroup, Record]]:
    """Every record with its group."""
    return ((group, record) for group in groups for record in group.records)


def where(group: RankedGroup, record: Record) -> tuple[Cell, Cell]:
    """The cells that a row of several groups starts with."""
    return Cell(group.title), variant_cell(record, record.variant)


def variant_cell(record: Record, text: str) -> Cell:
    """The variant with its colour."""
    return Cell(text, colour=look(record.variant).colour)


def seconds(value: float | None) -> Cell:
    """A time."""
    return Cell(units.seconds(value), value)


def number(value: int | None) -> Cell:
    """A count, in full."""
    return Cell("" if value is None else f"{value:,}", value)
