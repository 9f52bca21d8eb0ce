"""The gate of an own model: truth is the user's model itself in float64, or in float32 with wider limits.

Where the model does not run in float64, truth has roundings of its own. What they come to is asked of the model: with
every weight moved by one rounding of float32 its results move by as much as roundings matter, and that is the yardstick
in place of the reference's error, which would be zero against itself. Limits are `WIDENED` times as wide then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.gate.parity import Gate, gate_for, kept_weights
from bench.gate.tolerance import GRADIENT, ROUNDOFF, Check, Verdict, limit_for, relative_error
from seq2seq.execution.variants import REFERENCE
from seq2seq.models.weights import Weights
from seq2seq.own_model.execution import OwnExecutable, execute_own
from seq2seq.own_model.workload import OwnWorkload, random_weights
from seq2seq.runtimes.int8 import round_inputs, rounded_weights

__all__ = ["WIDENED", "OwnGate", "gate_for", "nudged"]

#: Both sides of a comparison round, and the truth's roundings are those of one order of operations among many.
WIDENED = 4.0
_NUDGE_SEED = 7


@gate_for.register(OwnWorkload)
def _(workload: OwnWorkload, mode: str, device: str) -> Gate:
    return OwnGate(workload, mode, device)


class OwnGate(Gate):
    """Gate for one set of inputs of an own model."""

    workload: OwnWorkload  # type: ignore[assignment]

    def __init__(self, workload: OwnWorkload, mode: str, device: str) -> None:
        self.widened = WIDENED if workload.narrow else 1.0
        super().__init__(workload, mode, device)  # type: ignore[arg-type]

    def draw(self, seed: int) -> Weights:
        """Weights of a seed: the user's, moved."""
        return random_weights(self.workload, seed)

    def true(self, weights: Weights, batch: object) -> dict[str, Tensor]:
        """The user's own model, eager, in float64 where it runs so."""
        executable: OwnExecutable = execute_own(self.workload, REFERENCE, self.mode, self.device, weights)
        given = executable.prepare(batch)
        if not self.workload.narrow:
            executable.model.double()
            given = given.to(self.device, torch.float64)
        found = executable.quantities(given, together=True)
        return {name: value.double() for name, value in found.items()}

    def compute(self, weights: Weights, batch: object, precision: str) -> dict[str, Tensor]:
        """Quantities of the truth (`precision` is "truth"), or of the model at a precision, eager.

        Lower precisions are autocast: a model of any kind need not run with weights of another type. Against a truth in
        float32, the weights are moved by a rounding.
        """
        if precision == "truth":
            return self.true(weights, batch)
        variant = REFERENCE
        if precision in {"bf16", "fp16"}:
            variant = dataclasses.replace(variant, name=f"amp-{precision}", precision=precision, autocast=True)
        elif precision == "int8":
            variant, weights = dataclasses.replace(variant, lstm="rounded"), self.rounded(weights)
        elif precision in {"bf16-weights", "bf16-split"}:
            weights = kept_weights(weights, precision)
        elif self.workload.narrow:
            weights = nudged(weights)
        executable = execute_own(self.workload, variant, self.mode, self.device, weights)
        if precision == "int8":
            round_inputs(executable.model)
        return executable.quantities(executable.prepare(batch), together=True)

    def rounded(self, weights: Weights) -> Weights:
        """Weights as dynamic quantisation rounds them: embeddings as they are."""
        own = self.workload.own.model
        embedded = {
            f"{name}.weight".lstrip(".")
            for name, module in own.named_modules()
            if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
        }
        kept = {name: value for name, value in weights.items() if name in embedded or not value.is_floating_point()}
        others = {name: value for name, value in weights.items() if name not in kept}
        return rounded_weights(others) | kept

    def judge(
        self,
        found: dict[str, Tensor],
        truth: dict[str, Tensor],
        expected: Callable[[], dict[str, Tensor]],
        precision: str,
        usual: Callable[[], Mapping[str, float]],
        usual_errors: Callable[[], Mapping[str, float]],
    ) -> Verdict:
        """Judge as `Gate.judge` does, the floor of the limits first.

        The yardstick can only raise a limit above the floor, so it is not asked for where the floor is kept: in bf16 it
        took 18 times as long as the call that it is to judge (a language model of 2 x 650, on a processor with
        AVX512-BF16).
        """
        checks = []
        for name, true in truth.items():
            limit = limit_for(0.0, precision, self.terms if name.startswith(GRADIENT) else 0, self.widened)
            checks.append(Check(name, relative_error(found[name], true) if name in found else math.inf, limit))
        by_floor = Verdict(tuple(checks))
        if by_floor.passed:
            return by_floor
        return super().judge(found, truth, expected, precision, usual, usual_errors)


def nudged(weights: Weights) -> Weights:
    """Weights of which each is moved by one rounding of float32, up or down at random."""
    generator = torch.Generator().manual_seed(_NUDGE_SEED)
    return {
        name: value * (1 + 2 * ROUNDOFF["fp32"] * (2 * torch.randint(2, value.shape, generator=generator) - 1))
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }
