"""From the rounds of a group to the figures of its records."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.analysis.intervals import Interval, percentile, ratio_interval
from bench.plan.cases import Case
from bench.records.rounds import Samples

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


def speedup(samples: Samples, reference: str, variant: str) -> Interval | None:
    """Median of the ratios with its interval; None when nothing was measured."""
    ratios = samples.ratios(reference, variant)
    if not ratios:
        return None
    if reference == variant:
        return Interval(1.0, 1.0, 1.0)
    return ratio_interval(ratios).widened(samples.stretch(reference, variant))


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
            at = at.widened(samples.stretch(case.variant))
            found |= {f"latency_{name}_s": at.value, f"latency_{name}_lo_s": at.low, f"latency_{name}_hi_s": at.high}
    if case.mode == "decode":
        found |= _per_token(found, facts, per_call_s)
    device = [b.queued_device_s / b.queued_calls for b in blocks if b.queued_device_s]
    if device:
        found["device_p50_s"] = float(np.median(device))
    ratio = speedup(samples, reference, case.variant)
    if ratio is not None:
        found |= {"speedup": ratio.value, "speedup_lo": ratio.low, "speedup_hi": ratio.high}
        found["interval_wide"] = ratio.half_width > interval
    return found


def _per_token(found: dict[str, Any], facts: dict[str, Any], per_call_s: float) -> dict[str, Any]:
    """Figures of a decoded token: every sequence takes all steps, and the best of its hypotheses counts once."""
    steps = facts["target_steps"]
    figured = {"tokens_per_s": facts["batch"] * steps / per_call_s}
    for name in ("p50", "p99"):
        if f"latency_{name}_s" in found:
            figured[f"token_latency_{name}_s"] = found[f"latency_{name}_s"] / steps
    return figured
