"""Spread between hosts: how much the same cases differ that two hosts of one kind measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.records.reader import read_records
from bench.records.schema import Record, Status
from bench.sweep.folder import StoredUnit


@dataclass(frozen=True)
class HostPair:
    """A case on two hosts of one kind.

    Attributes:
        unit, variant, kind: which.
        first, second: hosts.
        first_s, second_s: median time of a call on each, seconds.
        first_speedup, second_speedup: over the reference of the same host.
        time_ratio: second over first; each time is a difference of one host's own clock.
        speedup_ratio: the same of the speedups; None for what has none.
        beyond: whether the intervals of the two speedups have nothing in common; None without them.
    """

    unit: str
    variant: str
    kind: str
    first: str
    second: str
    first_s: float
    second_s: float
    first_speedup: float | None
    second_speedup: float | None
    time_ratio: float
    speedup_ratio: float | None
    beyond: bool | None


def host_pairs(stored: Sequence[StoredUnit]) -> list[HostPair]:
    """Cases that two hosts of one kind measured, each pair of hosts once."""
    found = []
    ordered = sorted(stored, key=lambda unit: (unit.kind, unit.number, unit.repeat))
    for _, same in itertools.groupby(ordered, key=lambda unit: (unit.kind, unit.number)):
        for first, second in itertools.combinations(same, 2):
            others = {record.variant: record for record in read_records(second.path)}
            for record in read_records(first.path):
                other = others.get(record.variant)
                if other is not None and (pair := _pair(first, second, record, other)) is not None:
                    found.append(pair)
    return found


def _pair(first: StoredUnit, second: StoredUnit, one: Record, other: Record) -> HostPair | None:
    if {one.status, other.status} != {Status.OK} or not one.latency_p50_s or not other.latency_p50_s:
        return None
    ratio = other.speedup / one.speedup if one.speedup and other.speedup else None
    ends = (one.speedup_lo, one.speedup_hi, other.speedup_lo, other.speedup_hi)
    beyond = None
    if one.variant != "reference" and None not in ends:
        low, high, other_low, other_high = (float(end) for end in ends if end is not None)
        beyond = other_low > high or other_high < low
    return HostPair(
        first.unit, one.variant, first.kind, first.host, second.host, one.latency_p50_s, other.latency_p50_s,
        one.speedup, other.speedup, other.latency_p50_s / one.latency_p50_s, ratio, beyond,
    )  # fmt: skip


def largest(ratios: Sequence[float]) -> float:
    """The ratio farthest from 1, either way, as a share: 0.05 for 1.05 and for 1 / 1.05."""
    return max((math.exp(abs(math.log(ratio))) - 1 for ratio in ratios), default=0.0)


def told(pairs: Sequence[HostPair]) -> str:
    """The spread of a sweep in a sentence; empty without a pair."""
    if not pairs:
        return ""
    times = [pair.time_ratio for pair in pairs]
    speedups = [pair.speedup_ratio for pair in pairs if pair.speedup_ratio is not None and pair.variant != "reference"]
    typical = math.exp(float(np.median([abs(math.log(ratio)) for ratio in times]))) - 1
    text = f"{len(pairs)} cases on two hosts: times differ by {typical:.1%} (median), at most {largest(times):.1%}"
    if speedups:
        judged = [pair for pair in pairs if pair.beyond is not None]
        beyond = sum(bool(pair.beyond) for pair in judged)
        text += f"; speedups by at most {largest(speedups):.1%}, in {beyond} of {len(judged)} beyond their intervals"
    return text
