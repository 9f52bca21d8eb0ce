"""From the rounds of a group to the figures of its records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.cases import LEAST_ROUNDS, Case
from bench.rounds import Round
from bench.statistics import Floats, Interval, percentile, ratio_interval

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclass
class Samples:
    """The rounds of a group, one list a worker process."""

    processes: list[list[Round]] = field(default_factory=list)

    def kept(self) -> list[list[Round]]:
        """The rounds that figures are made of: a process's clean ones where it has enough, otherwise all."""
        chosen = []
        for rounds in self.processes:
            clean = [r for r in rounds if not r.disturbed]
            chosen.append(clean if len(clean) >= LEAST_ROUNDS else rounds)
        return chosen

    def kept_of(self, variant: str) -> list[list[Round]]:
        """The kept rounds that have a variant, one list a process; no list is empty."""
        found = [[r for r in rounds if variant in r.blocks] for rounds in self.kept()]
        return [rounds for rounds in found if rounds]

    def calls(self, variant: str) -> list[list[Floats]]:
        """Single calls of a variant in its kept rounds, seconds: the calls that its percentiles are made of.

        One list a process, one array a round; a queued block has no single calls, and a round without any no array.
        """
        found = [[np.array(r.blocks[variant].calls_s) for r in rounds] for rounds in self.kept_of(variant)]
        return [[timed for timed in rounds if len(timed)] for rounds in found]

    def forget(self, variant: str) -> None:
        """Take out what was timed of a variant."""
        for rounds in self.processes:
            for found in rounds:
                found.blocks.pop(variant, None)

    def stretch(self) -> float:
        """Factor by which intervals must be wider, so that kept rounds that were disturbed narrow none.

        They are in the figures for lack of better ones; doubt falls with the square root of the clean rounds alone.
        """
        kept = [found for rounds in self.kept() for found in rounds]
        clean = sum(not found.disturbed for found in kept)
        return math.sqrt(len(kept) / max(1, clean)) if kept else 1.0

    def ratios(self, reference: str, variant: str) -> list[Floats]:
        """time(reference) / time(variant) of each kept round that has both, one array a process."""
        both = [[r.blocks for r in rounds if reference in r.blocks] for rounds in self.kept_of(variant)]
        return [np.array([b[reference].typical_s / b[variant].typical_s for b in blocks]) for blocks in both if blocks]

    def times(self, variant: str) -> list[Floats]:
        """Median call of each kept round that has the variant, seconds, one array a process."""
        return [np.array([r.blocks[variant].typical_s for r in rounds]) for rounds in self.kept_of(variant)]

    def speedup(self, reference: str, variant: str) -> Interval | None:
        """Median of the ratios with its interval; None when nothing was measured."""
        ratios = self.ratios(reference, variant)
        if not ratios:
            return None
        if reference == variant:
            return Interval(1.0, 1.0, 1.0)
        return ratio_interval(ratios).widened(self.stretch())

    def rows(self, case: Case, process: int, rounds: Iterable[Round]) -> Iterator[list[Any]]:
        """Raw samples of a case in one process, in the order of SAMPLE_COLUMNS."""
        head = [case.workload, case.variant, case.mode, case.device, case.threads, process]
        for found in rounds:
            if case.variant not in found.blocks:
                continue
            block = found.blocks[case.variant]
            place = [found.number, (found.order or tuple(found.blocks)).index(case.variant)]
            flag = int(found.disturbed)
            if block.queued_calls:
                timed = [f"{block.queued_wall_s:.9g}", f"{block.queued_device_s:.9g}"]
                yield [*head, *place, "block", block.queued_calls, *timed, flag]
            for seconds in block.calls_s:
                yield [*head, *place, "call", 1, f"{seconds:.9g}", "", flag]


def figures(case: Case, samples: Samples, reference: str, interval: float, facts: dict[str, Any]) -> dict[str, Any]:
    """The timing fields of a case's record.

    Args:
        case: whose.
        samples: of its group.
        reference: variant that speedups are relative to.
        interval: half-width that the suite asked for, as a share.
        facts: `batch` and `valid_steps` of the workload, for decoding `target_steps` too.
    """
    kept = samples.kept_of(case.variant)
    blocks = [r.blocks[case.variant] for rounds in kept for r in rounds]
    if not blocks:
        return {}
    calls = samples.calls(case.variant)
    per_call_s = float(np.median([block.typical_s for block in blocks]))
    found: dict[str, Any] = {
        "samples": len(blocks),
        "calls": sum(len(block.calls_s) for block in blocks),
        "processes": len(kept),
        "disturbed": sum(r.disturbed for rounds in kept for r in rounds),
        "throughput_seq_per_s": facts["batch"] / per_call_s,
        "throughput_steps_per_s": facts["valid_steps"] / per_call_s,
    }
    for name, share in PERCENTILES.items():
        at = percentile(calls, share)
        if at is not None:
            at = at.widened(samples.stretch())
            found |= {f"latency_{name}_s": at.value, f"latency_{name}_lo_s": at.low, f"latency_{name}_hi_s": at.high}
    if case.mode == "decode":
        found |= _per_token(found, facts, per_call_s)
    device = [b.queued_device_s / b.queued_calls for b in blocks if b.queued_device_s]
    if device:
        found["device_p50_s"] = float(np.median(device))
    speedup = samples.speedup(reference, case.variant)
    if speedup is not None:
        found |= {"speedup": speedup.value, "speedup_lo": speedup.low, "speedup_hi": speedup.high}
        found["interval_wide"] = speedup.half_width > interval
    return found


def _per_token(found: dict[str, Any], facts: dict[str, Any], per_call_s: float) -> dict[str, Any]:
    """Figures of a decoded token: every sequence takes all steps, and the best of its hypotheses counts once."""
    steps = facts["target_steps"]
    figured = {"tokens_per_s": facts["batch"] * steps / per_call_s}
    for name in ("p50", "p99"):
        if f"latency_{name}_s" in found:
            figured[f"token_latency_{name}_s"] = found[f"latency_{name}_s"] / steps
    return figured
