"""Limits of the gate by precision, and what it finds: `bench.gate.parity` says where the numbers come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 4.0
SUMMATION = 2.0
#: How names of gradients begin.
GRADIENT = "grad "


@dataclass(frozen=True)
class Tolerance:
    """Bounds of a precision: no error below `floor` is refused, none above `cap` is let through."""

    floor: float
    cap: float


#: Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "int8": 2.0**-8,
    "bf16-weights": 2.0**-8,
    "bf16-split": 2.0**-16,
    "int8-head": 2.0**-8,
}
TOLERANCES = {
    "fp32": Tolerance(64 * ROUNDOFF["fp32"], 2.5e-4),
    "tf32": Tolerance(8 * ROUNDOFF["tf32"], 3e-2),
    "fp16": Tolerance(8 * ROUNDOFF["fp16"], 3e-2),
    "bf16": Tolerance(4 * ROUNDOFF["bf16"], 2.5e-1),
    "int8": Tolerance(ROUNDOFF["int8"], 1e-1),
    "bf16-weights": Tolerance(ROUNDOFF["bf16-weights"], 5e-2),
    "bf16-split": Tolerance(ROUNDOFF["bf16-split"], 2.5e-4),
    "int8-head": Tolerance(ROUNDOFF["int8-head"], 5e-2),
}


@dataclass(frozen=True)
class Check:
    """One quantity against its limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Return whether the error keeps within the limit; an error that is not a number does not."""
        return self.error <= self.limit

    @property
    def strain(self) -> float:
        """Error over limit: 1 is the limit itself."""
        return self.error / self.limit


@dataclass(frozen=True)
class Verdict:
    """Findings of the gate in one run or several."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Return whether every quantity keeps within its limit."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        """The quantity nearest to its limit, or furthest past it."""
        return max(self.checks, key=lambda check: check.strain)

    def worst_of(self, *, gradients: bool) -> Check | None:
        """The worst among gradients, or among everything else; None if there is none."""
        chosen = [check for check in self.checks if check.name.startswith(GRADIENT) == gradients]
        return max(chosen, key=lambda check: check.strain, default=None)

    def describe(self) -> str:
        """The refused quantities in words, worst first."""
        refused = sorted((c for c in self.checks if not c.passed), key=lambda c: -c.strain)
        shown = "; ".join(f"{c.name}: error {c.error:.2e}, limit {c.limit:.2e}" for c in refused[:4])
        return shown + (f"; and {len(refused) - 4} more" if len(refused) > 4 else "")  # noqa: PLR2004


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of truth, in float64; infinite for a wrong shape or anything not finite."""
    if value.shape != truth.shape:
        return math.inf
    difference = float(torch.linalg.vector_norm(value.to(truth.device, torch.float64) - truth))
    norm = float(torch.linalg.vector_norm(truth))
    if not math.isfinite(difference):
        return math.inf
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def limit_for(yardstick: float, precision: str, terms: int = 0, widened: float = 1.0) -> float:
    """The error that a quantity may have.

    Args:
        yardstick: error of the reference at that precision; not finite counts as none.
        precision: key of `TOLERANCES`.
        terms: how many products a gradient sums up, batch x steps; 0 for what is not a gradient.
        widened: factor for a truth that has roundings of its own; the cap stays.
    """
    tolerance = TOLERANCES[precision]
    scaled = FACTOR * yardstick if math.isfinite(yardstick) else 0.0
    floor = tolerance.floor + SUMMATION * math.sqrt(terms) * ROUNDOFF["fp32"]
    return min(widened * max(scaled, floor), tolerance.cap)
