"""Faults that the stages of a day found, read from their files, and the configurations to refuse because of them."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ... import measurements as table
from ...refusals import NAME as REFUSED
from ...refusals import Refusal
from ...refusals import read as read_refusals
from . import json_lines

#: The list that the checkout had when the day began.
INHERITED = "inherited.json"
#: Questions whose wrong answer makes a configuration unfit for use. A CUDA graph of a whole module may fail for reasons
#: that are not the configuration's.
UNFIT = frozenset({"parity", "repeat", "streams", "threads"})
#: If at least this many configurations are wrong or vary, and more than are right, the whole kernel counts as unfit.
MANY = 3
#: A configuration that the tuner left out, as it writes it.
_LEFT_OUT = re.compile(r"^(cell|sequence|persistent) (\w+\([^()]*\)): (.*)$")
#: Beginnings of reasons that speak of a wrong result, a hang or a crash; others, such as too little memory, are of one
#: size alone.
_WRONG = ("errors:", "AssertionError", "no answer within", "the child died")


def rows(work: Path) -> list[dict[str, str]]:
    """Answers of all checks, in the columns of check.csv, with the stage that asked."""
    found = []
    for path in sorted(work.glob("*/check.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            # A line that a kill cut off lacks its last columns.
            found += [
                {**line, "stage": path.parent.name} for line in csv.DictReader(file) if line["reason"] is not None
            ]
    for path in sorted(work.glob(f"*/{json_lines.ROWS}")):
        for line in json_lines.read(path):
            found.append({**{name: str(value) for name, value in line.items()}, "stage": path.parent.name})
    return found


def tables(work: Path) -> Iterator[tuple[str, table.MeasuredTable]]:
    """Measured tables of a day that can be read, with the names of their files."""
    for path in [*sorted(work.glob(f"*/{json_lines.TIMINGS}")), *sorted((work / "tables").glob("*.json"))]:
        if path.name != REFUSED:
            yield str(path.relative_to(work)), table.read(path)


def refusals(work: Path) -> list[Refusal]:
    """Configurations that were wrong, moved, hung or crashed in any stage."""
    found: dict[tuple[str, bool, str], str] = {}
    judged: dict[tuple[str, bool], dict[str, bool]] = defaultdict(dict)
    for row in rows(work):
        key = row["implementation"], row["phase"] == "backward", row["config"]
        wrong = _unfit(row)
        if wrong:
            found.setdefault(key, f"{row['kind']} in {row['type']} at {row['sizes']}: {row['reason']}")
        if row["kind"] in {"parity", "repeat"} and row["status"] in {"ok", "wrong", "error"}:
            judged[key[:2]][key[2]] = judged[key[:2]].get(key[2], True) and not wrong
    for _, measured in tables(work):
        for entry in measured.entries:
            for text in entry.wrong:
                if (match := _LEFT_OUT.match(text)) and match[3].startswith(_WRONG):
                    key = match[1], entry.phase == "backward", match[2]
                    found.setdefault(key, f"tuning at {entry.shape}: {match[3]}")
    unfit = [Refusal(*key, reason) for key, reason in found.items()]
    return [*_whole(judged, unfit), *unfit]


def listed(work: Path) -> list[Refusal]:
    """Configurations that must not run: what the day found, and what was known before and was not found right since."""
    found = {_key(one): one for one in refusals(work)}
    kinds: dict[tuple[str, bool, str], set[str]] = defaultdict(set)
    for row in rows(work):
        if row["status"] == "ok":
            kinds[row["implementation"], row["phase"] == "backward", row["config"]].add(row["kind"])
    for one in read_refusals(work / INHERITED):
        # A right result says nothing of a race: the question that found the fault has to be answered.
        asked = {one.reason.partition(" ")[0]} & UNFIT or {"parity", "repeat"}
        if not asked <= kinds[_key(one)]:
            found.setdefault(_key(one), one)
    return list(found.values())


def _key(one: Refusal) -> tuple[str, bool, str]:
    return one.implementation, one.backward, one.config


def _unfit(row: Mapping[str, str]) -> bool:
    if row["kind"] not in UNFIT or row["config"] == "None":
        return False
    if row["status"] == "error":
        return row["reason"].startswith(_WRONG)
    return row["status"] != "ok"


def _whole(judged: Mapping[tuple[str, bool], Mapping[str, bool]], unfit: Iterable[Refusal]) -> Iterator[Refusal]:
    """Kernels of which most configurations that were compared are wrong."""
    reasons = {(one.implementation, one.backward): one.reason for one in unfit}
    for (name, backward), configs in judged.items():
        wrong = sum(not right for right in configs.values())
        if wrong >= MANY and 2 * wrong > len(configs):
            reason = f"{wrong} of {len(configs)} configurations were wrong, such as {reasons[name, backward]}"
            yield Refusal(name, backward, "", reason)


def cases(work: Path) -> Iterator[dict[str, Any]]:
    """Records of the suite's runs, with the stage that ran them."""
    for path in sorted(work.glob("*/run/records.jsonl")):
        for record in json_lines.read(path):
            yield {**record, "stage": path.parents[1].name}
