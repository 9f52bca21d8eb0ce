"""The day on one page: machine, what was right, what failed, measured times against predictions, what to do next."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import measurements as table
from ...common.recurrence import Problem
from ...estimate import estimate_s
from . import findings, json_lines
from .facts import GROWS
from .stages import DayStage

#: Failures and table rows that fit the page; the archive has all.
SHOWN_FAILURES, SHOWN_TIMES, SHOWN_CHARACTERS = 12, 40, 220
#: A measured time off its prediction by this factor, either way, is a prediction to mend.
OFF = 1.5
#: Ways in which the programs of the persistent kernel learn that a row has come; the one in a configuration's words.
WAITS = ("barrier", "poll", "launch")
_SYNC = re.compile(r"sync='(\w+)'")
#: A share of time by which `poll` has to be shorter to be worth coming first.
SHORTER = 0.95


def write(state: Mapping[str, Any], work: Path, stages: Sequence[DayStage]) -> str:
    """Return the page in Markdown.

    Args:
        state: of the day.
        work: folder with the results of its stages.
        stages: all stages of the day, in order.
    """
    facts = _facts(work)
    gpu = facts.get("gpu") or {}
    title = "Rehearsal without a GPU" if state["rehearsal"] else f"GPU day: {gpu.get('name', 'GPU unknown')}"
    entries = [(name, entry) for name, found in findings.tables(work) for entry in found.entries]
    rows = findings.rows(work)
    parts = [
        f"# {title}",
        _machine(facts),
        _stages(state, stages),
        _right(rows),
        _failed(rows, work),
        _refused(work),
        _times(entries, gpu),
        _waits(entries),
        _ratios(work, state, stages),
        _ran(work, "cudnn-names", "What torch's own LSTM runs"),
        _ran(work, "own-kernels", "What a call of kernels.LSTM runs"),
        _next(state, stages, rows, entries, gpu, work),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _short(text: str) -> str:
    one = " ".join(text.split()).replace("|", "\\|")
    return one if len(one) <= SHOWN_CHARACTERS else f"{one[:SHOWN_CHARACTERS]}..."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _facts(work: Path) -> dict[str, Any]:
    """Facts of the machine, the last of each; one that failed has its error for a value."""
    found = {}
    for name in ("machine", "machine-2"):
        for line in json_lines.read(work / name / json_lines.FACTS):
            found[line["fact"]] = line["value"] if "value" in line else f"FAILED: {line['error']}"
    return found


def _machine(facts: Mapping[str, Any]) -> str:
    lines = ["## Machine", ""]
    for name, value in facts.items():
        if isinstance(value, dict):
            missing = [key for key, one in value.items() if one is None]
            value = ", ".join(f"{key} {one}" for key, one in value.items() if one is not None and name != "packages")  # noqa: PLW2901
            value += f"{'; ' if value else ''}missing: {', '.join(missing)}" if missing else ""  # noqa: PLW2901
        lines.append(f"- {name}: {_short(str(value) or 'all there')}")
    return "\n".join(lines) if facts else ""


def _stages(state: Mapping[str, Any], stages: Sequence[DayStage]) -> str:
    lines = []
    for stage in stages:
        found = state["stages"].get(stage.name, {})
        took = f"{found['took_s']:.0f}" if "took_s" in found else ""
        lines.append([stage.name, stage.asks, found.get("status", "not begun"), took, _short(found.get("reason", ""))])
    text = _table(["stage", "question", "status", "s", "first line of what was wrong"], lines)
    outside = state.get("not_packed") or []
    note = f"\n\nNot in the archive, since too large or unreadable: {', '.join(outside)} in {state['work']}."
    note = note if outside else ""
    return f"## Stages\n\n{text}{note}"


def _right(rows: Sequence[Mapping[str, str]]) -> str:
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["implementation"], row["phase"], row["type"]].append(row)
    lines = []
    for key, group in sorted(groups.items()):
        right = [row for row in group if row["status"] == "ok"]
        kinds = sorted({row["kind"] for row in right})
        worst = max((float(row["worst"]) for row in right), default=float("nan"))
        lines.append([*key, str(len(right)), str(len(group) - len(right)), f"{worst:.2g}", ", ".join(kinds)])
    head = ["kernel", "phase", "type", "right", "not", "worst error / limit", "right in"]
    return f"## Right or not\n\n{_table(head, lines)}" if lines else ""


def _failed(rows: Sequence[Mapping[str, str]], work: Path) -> str:
    lines = [
        f"- {row['stage']}: {row['status']}, {row['kind']} {row['implementation']} {row['phase']} {row['type']} "
        f"{row['sizes']} {row['config']}: {_short(row['reason'])}"
        for row in rows
        if row["status"] != "ok"
    ]
    lines += [
        f"- {record['stage']}: {record['status']}, {record['workload']}/{record['mode']}/{record['variant']}: "
        f"{_short(record['reason'])}"
        for record in findings.cases(work)
        if record["status"] != "ok"
    ]
    more = [f"- and {len(lines) - SHOWN_FAILURES} more in the archive"] if len(lines) > SHOWN_FAILURES else []
    return "\n".join(["## Failed", "", *lines[:SHOWN_FAILURES], *more]) if lines else ""


def _refused(work: Path) -> str:
    found = findings.listed(work)
    if not found:
        return ""
    lines = [
        f"- {one.implementation} {'backward' if one.backward else 'forward'} {one.config or '(all of it)'}: "
        f"{_short(one.reason)}"
        for one in found
    ]
    more = [f"- and {len(lines) - SHOWN_FAILURES} more in refused.json"] if len(lines) > SHOWN_FAILURES else []
    what = "Never timed after they were found, neither by tuning nor by the suite:"
    return "\n".join(["## Left out", "", what, "", *lines[:SHOWN_FAILURES], *more])


def _predicted_s(entry: table.MeasuredShape, name: str, gpu: Mapping[str, Any]) -> float:
    tf32 = entry.dtype == "tf32"
    dtype = torch.float32 if tf32 else getattr(torch, entry.dtype)
    problem = Problem(
        "cuda" if gpu else "cpu", dtype, entry.batch, entry.steps, entry.hidden_size, entry.directions,
        entry.phase != "inference", masked=False, tf32=tf32, capability=gpu.get("capability", 90),
        multiprocessors=gpu.get("multiprocessors", 132),
    )  # fmt: skip
    return estimate_s(problem, name, backward=entry.phase == "backward")


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _best(entry: table.MeasuredShape) -> str | None:
    return min(entry.kernels, key=lambda name: entry.kernels[name].time_s, default=None)


def _fairest_s(entry: table.MeasuredShape) -> float | None:
    times = (*entry.vendors_s, entry.vendor_float16_s)
    return min((value for value in times if value is not None), default=None)


def _speedup(fair_s: float, entry: table.MeasuredShape, time: table.Timing) -> str:
    """Torch's own time over the whole of ours, with quartiles where there are any."""
    speedup, quartiles = fair_s / time.whole_s(entry.around_s), time.whole_quartiles_s(entry.around_s)
    return f"{speedup:.3g}" if quartiles is None else _interval(speedup, fair_s / quartiles[1], fair_s / quartiles[0])


def _times(entries: Sequence[tuple[str, table.MeasuredShape]], gpu: Mapping[str, Any]) -> str:
    lines = []
    for file, entry in entries[:SHOWN_TIMES]:
        name = _best(entry)
        fair = _fairest_s(entry)
        if name is None:
            lines.append([file, entry.shape, entry.phase, "none was right", "", "", "", ""])
            continue
        time = entry.kernels[name]
        step = 1e6 / entry.steps
        ratio = "" if fair is None else _speedup(fair, entry, time)
        config = ", ".join(f"{key} {value}" for key, value in time.config.items())
        lines.append([
            file, entry.shape, entry.phase, f"{name} ({config})",
            _interval(*(value * step for value in (time.time_s, time.low_s, time.high_s))),
            f"{_predicted_s(entry, name, gpu) * step:.3g}", "" if fair is None else f"{fair * 1e6:.0f}", ratio,
        ])  # fmt: skip
    if not lines:
        return ""
    head = ["file", "shape", "phase", "fastest of ours", "us a step", "predicted", "torch's own, us", "speedup over it"]
    note = (
        "Times of ours without the products over all steps, with quartiles. The speedup is of whole calls: torch's own "
        "at its fairest (the fastest of the same type, the same on padded sizes, and float16 with a padded batch) over "
        "kernels.LSTM as a user calls it, by quartiles of ours; where that call was not timed, over the recurrence and "
        "its products. Predictions are those of kernels/estimate.py"
    )
    note += "." if gpu else " for an H200; measured times are the interpreter's, so they say nothing about a GPU."
    more = f"\n\nAnd {len(entries) - SHOWN_TIMES} more in the tables." if len(entries) > SHOWN_TIMES else ""
    return f"## Times\n\n{note}\n\n{_table(head, lines)}{more}"


def _ratios(work: Path, state: Mapping[str, Any], stages: Sequence[DayStage]) -> str:
    texts = [
        f"{stage.asks}\n\n```text\n{(work / stage.name / 'log.txt').read_text(encoding='utf-8').strip()}\n```"
        for stage in stages
        if stage.name.endswith("ratios") and state["stages"].get(stage.name, {}).get("status") == "ok"
    ]
    return "\n\n".join(["## Suite", *texts]) if texts else ""


def _ran(work: Path, stage: str, title: str) -> str:
    """Kernels by shape, how often a call launches each, and how long nothing ran before the heaviest one."""
    lines, notes = [], []
    for line in json_lines.read(work / stage / json_lines.FACTS):
        value = line.get("value")
        if value is None:
            lines.append([line["fact"], "", "", "", f"FAILED: {_short(line['error'])}"])
        elif "kernels" in value:
            # Whatever they are called, kernels of which none runs once a step take all steps in one.
            whole = "by name" if value["persistent"] else "no" if value.get("once a step", True) else "by launches"
            first = value["kernels"][0]["name"] if value["kernels"] else ""
            gap = value.get("gap us", {}).get(first)
            names = ", ".join(f"{one['name'][:60]} x{one['calls']:g}" for one in value["kernels"][:2])
            lines.append([line["fact"], whole, f"{value['us']:.0f}", "" if gap is None else f"{gap:g}", _short(names)])
        else:
            notes.append(f"- {line['fact']}: {', '.join(f'{key} {one}' for key, one in value.items())}")
    head = ["shape", "persistent", "us a call", "us before the heaviest", "heaviest kernels"]
    parts = [f"## {title}", _table(head, lines) if lines else "", "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) if lines or notes else ""


def _each_wait_s(entry: table.MeasuredShape) -> dict[str, float]:
    """Median time of the fastest configuration of each way in which programs wait for each other."""
    found: dict[str, float] = {}
    for text, median_s in entry.medians_s.items():
        if match := _SYNC.search(text):
            found[match[1]] = min(median_s, found.get(match[1], median_s))
    return found


def _waits(entries: Sequence[tuple[str, table.MeasuredShape]]) -> str:
    """Times of the ways to wait, where more than one was right and timed."""
    lines = []
    for _, entry in entries:
        found = _each_wait_s(entry)
        if len(found) > 1:
            step_us = {name: f"{1e6 * found[name] / entry.steps:.3g}" if name in found else "" for name in WAITS}
            lines.append([entry.shape, entry.phase, *step_us.values()])
    head = ["shape", "phase", *(f"{name}, us a step" for name in WAITS)]
    return f"## Ways to wait for the other programs\n\n{_table(head, lines)}" if lines else ""


def _next(
    state: Mapping[str, Any],
    stages: Sequence[DayStage],
    rows: Sequence[Mapping[str, str]],
    entries: Sequence[tuple[str, table.MeasuredShape]],
    gpu: Mapping[str, Any],
    work: Path,
) -> str:
    lines = [*_next_stages(state, stages), *_next_kernels(rows, work), *_next_times(entries, gpu), *_next_facts(work)]
    if gpu and entries:
        lines.append("copy the table next to this page to kernels/measured/, so that `auto` uses it")
    if not lines:
        lines = ["nothing is open"]
    return "\n".join(["## Next", "", *(f"- next: {line}" for line in dict.fromkeys(lines))])


def _next_stages(state: Mapping[str, Any], stages: Sequence[DayStage]) -> Iterator[str]:
    for stage in stages:
        found = state["stages"].get(stage.name, {})
        status, name = found.get("status", "not begun"), stage.name
        if status in {"hang", "crash", "error"}:
            yield f"{name} ended by {status}: read {name}/log.txt in the archive, fix it, then --resume --again {name}"
        elif status in {"skipped", "unavailable"}:
            yield f"{name} did not run: {found['reason']}"
    open_ones: dict[int, list[str]] = defaultdict(list)
    for stage in stages:
        status = state["stages"].get(stage.name, {}).get("status", "not begun")
        if status in {"left", "partial", "not begun", "running"}:
            open_ones[stage.part].append(stage.name)
    for part, names in open_ones.items():
        yield f"to run with --resume --part {part} and time for it: {', '.join(names)}"


def _next_kernels(rows: Sequence[Mapping[str, str]], work: Path) -> Iterator[str]:
    kinds: dict[tuple[str, ...], int] = defaultdict(int)
    for row in rows:
        if row["status"] != "ok":
            kinds[row["kind"], row["implementation"], row["phase"], row["status"]] += 1
    for (kind, name, phase, status), count in sorted(kinds.items(), key=lambda one: -one[1]):
        yield f"{name} {phase}: {count} x {status} in `{kind}`: fix the kernel; until then its times do not count"
    if not rows and work.exists():
        yield "no kernel was checked yet: run part 1"


def _next_times(entries: Sequence[tuple[str, table.MeasuredShape]], gpu: Mapping[str, Any]) -> Iterator[str]:
    if not gpu:
        return
    for _, entry in entries:
        name, fair = _best(entry), _fairest_s(entry)
        if name is None:
            yield f"{entry.shape} {entry.phase}: no kernel was right there"
            continue
        measured_s = entry.kernels[name].time_s
        factor = measured_s / _predicted_s(entry, name, gpu)
        if not 1 / OFF <= factor <= OFF:
            yield f"{entry.shape} {entry.phase}: {name} takes {factor:.1f} times what kernels/estimate.py predicts"
        waits = _each_wait_s(entry)
        if {"barrier", "poll"} <= waits.keys() and waits["poll"] < SHORTER * waits["barrier"]:
            share = waits["poll"] / waits["barrier"]
            yield f"{entry.shape} {entry.phase}: poll takes {share:.2f} of barrier's time: `configs` may put it first"
        whole_s = entry.kernels[name].whole_s(entry.around_s)
        if fair is not None and whole_s > fair:
            behind = whole_s / fair
            yield f"{entry.shape} {entry.phase}: {name} is {behind:.2f} times slower than torch's own at its fairest"


def _next_facts(work: Path) -> Iterator[str]:
    """Pick what the machine said that asks for something to be done."""
    for name, value in _facts(work).items():
        if GROWS in str(value):
            yield f"{name}: torch keeps memory of dropped graphs ({_short(str(value))}): hold fewer, or drop none"
    for stage in ("cudnn-names", "own-kernels"):
        for line in json_lines.read(work / stage / json_lines.FACTS):
            if "error" in line:
                yield f"{stage}, {line['fact']}: {_short(line['error'])}"
