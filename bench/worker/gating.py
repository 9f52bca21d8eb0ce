"""The gate and the audit as the worker asks them, and the seeds that all its work begins from."""

from __future__ import annotations

from typing import Any

from bench.gate.audit import Audit, restore_timekeepers
from bench.gate.parity import Gate, Verdict
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable

#: Of the weights that all variants start from, and of the batch that is timed.
WEIGHTS_SEED = 1
TIMED_SEED = 0


def refuse_replaced(who: str) -> None:
    """Put back the clocks that a variant or plugin replaced.

    Raises:
        RuntimeError: naming what was replaced.
    """
    if replaced := restore_timekeepers():
        msg = f"{who} replaced {', '.join(replaced)}, which measures time"
        raise RuntimeError(msg)


def gated(
    gate: Gate,
    audit: Audit | None,
    executable: Executable,
    prepared: Batch,
    seed: int,
    *,
    warm: bool,
    of_inputs: bool = True,
) -> dict[str, Any]:
    """Fields of the gate's event: the gate's own verdict and, where it lets through, what an audit has against it."""
    fields = verdict_fields(gate.check(executable, seed, of_inputs=of_inputs))
    reason = audit.find(executable, prepared, seed, warm=warm) if audit is not None and fields["passed"] else ""
    return fields | {"passed": False, "reason": reason} if reason else fields


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain values."""
    forward, gradient = verdict.worst_of(gradients=False), verdict.worst_of(gradients=True)
    return {
        "passed": verdict.passed,
        "reason": "" if verdict.passed else verdict.describe(),
        "strain": verdict.worst.strain,
        "parity_worst": verdict.worst.name,
        "parity_error": forward.error if forward else None,
        "parity_limit": forward.limit if forward else None,
        "grad_error": gradient.error if gradient else None,
        "grad_limit": gradient.limit if gradient else None,
    }
