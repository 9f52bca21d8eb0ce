"""The gate: nothing is timed unless it is right.

Truth is the loop over the cell equations in float64, on the same weights and inputs. A quantity's error is the norm
of its difference from truth over the norm of truth. It may be at most `FACTOR` times the error that the eager
reference makes at the same precision, or the precision's floor, whichever is larger, and never more than the cap.

How the numbers were found: `python -m bench.gate.derive_tolerances` runs every variant that exists on the machine, and
six planted defects, over random problems, and prints what separates right from wrong (results/README.md shows it).

- FACTOR 4: right implementations differ in the order of sums and in where they round. At 4, the few errors of right
  variants that lie above it are small enough for the floor.
- floor, in unit roundoffs: above what the right variants needed at that factor. Below it an error is a
  handful of roundings, and the ratio of two such is luck. For fp32 it is 1500 times below the smallest defect.
- SUMMATION 2: a gradient sums batch x steps products. Rounding one after the other leaves sqrt(terms) roundoffs, which
  oneDNN's bias gradients show (0.8 times that), where ATen sums in blocks and leaves almost none, so that the
  reference's error is not a yardstick for them. The floor of gradients grows by twice that.
- cap: holds the reference itself, which would otherwise pass by definition. fp32: the geometric middle of the
  largest error of a right variant (5e-6) and the smallest of a defect (1.2e-2); else a little above the former.
- usual size: a gradient of few elements is a sum that now and then nearly cancels, and its error over what is left
  says nothing: in bf16 the last bias, one number, was refused in 3 of 600 problems. Against its usual size its error is
  at most 0.35 of the limit (460 problems). So what is refused by its own norm is judged again by its usual one.
- none by nature: a bias of attention's keys moves all scores of a query alike, and its gradient is zero but for
  rounding, in float64 too. What is left is judged by the size of the gradient of the same layer's matrix.
- terms that cancel: those of the gradients of attention's query and scale do by their nature, see `_uncancelled`. And
  the reference's error on one problem may be small by luck: what is refused is judged by its usual error too.
- kinks: the gradient of a pinball loss jumps where an error is zero; problems keep away from there (`kinked_losses`).
- tf32 rounds its products like fp16 and takes its numbers.
- bf16-split: each factor of the LSTMs' products is the sum of two bf16 numbers, so its roundoff is 2^-16: the rest
  after the first, 2^-8, is rounded to 2^-8 of itself, and the product of two such rests is left out. The floor is one
  roundoff, as that of bf16-weights, the cap that of fp32, and the yardstick the reference with its matrices split so.
- int8-head: the head's matrix is rounded to 8 bits, what it reads to 8 or 16, and the largest outputs computed again
  in fp32 (`kernels.ShortlistHead`). Floor and cap are those of bf16-weights, and the yardstick is the reference whose
  head's matrix alone is rounded. A greedy choice is judged by the limit of fp32.
- int8: the reference's error is that of the loop in fp32 with weights and inputs on the grids of dynamic quantisation.
  Over 25 random problems torch's int8 erred 0.77 to 1.19 times as much in outputs, h and c; the loss up to 11 times,
  at 1.9e-3, half the floor. Its largest error was 3.8e-2.

What the gate cannot do: in bf16 and int8, seldom in fp16, a defect that moves the result by less than the precision
rounds it passes (2 of 24 problems for the smallest two defects in bf16, 1 and 2 of 12 for two of them in int8). The
same code in fp32 is refused, so gate a kernel there too.
And a right variant may be refused by a little: attention in a model of a few units leaves gradients whose terms nearly
cancel. At hidden sizes of 1 and 5 that befell `cpu-fused` in 2 of 211 training problems (speech-las, summarize-pg and
translation-iwslt, scaled), at 1.1 and 1.2 times the limit, and `loop`, `onednn`, `lstmcell` and `torchscript` in none.
No limit is widened for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.gate import decoding
from bench.gate.kept import KeptQuantities
from bench.gate.kinked_losses import moved_away
from bench.gate.random_weights import random_weights
from bench.gate.tolerance import (
    FACTOR,
    GRADIENT,
    ROUNDOFF,
    SUMMATION,
    TOLERANCES,
    Check,
    Tolerance,
    Verdict,
    limit_for,
    relative_error,
)
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable, execute
from seq2seq.execution.variants import REFERENCE, VARIANTS
from seq2seq.models.base import Config
from seq2seq.models.weights import Weights
from seq2seq.runtimes.int8 import round_inputs, rounded_weights
from seq2seq.workloads.workload import Workload

__all__ = [
    "FACTOR",
    "GRADIENT",
    "ROUNDOFF",
    "SUMMATION",
    "TOLERANCES",
    "USUAL_SEEDS",
    "Check",
    "Gate",
    "Tolerance",
    "Verdict",
    "gate_for",
    "judge",
    "limit_for",
    "random_weights",
    "relative_error",
    "true_quantities",
]

#: Seeds of the problems that say how large a gradient usually is.
USUAL_SEEDS = (101, 102, 103, 104)
#: Error of a gradient, or twice the reference's if that is more, up to which it is judged by terms that cancel in it.
#: One that is missing or doubled errs by 1, and in bf16 so little is left of it that the limit by its terms is above
#: that. Right variants erred by at most 0.47, or 1.4 times as much as the reference (15 problems, hidden 16 to 128).
RECOGNISABLE = 0.75
#: Share of its matrix's gradient up to which a bias's is none. In float64 at most 4e-16 was left of those of keys, and
#: of all others at least 0.05 (6 problems each of translation-marian, -transformer, -iwslt and summarize-pg, scaled).
NOTHING = 1e-10


def judge(  # noqa: PLR0913 - three sides, and what their limits depend on
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    expected: dict[str, Tensor],
    precision: str,
    usual: Callable[[], Mapping[str, float]] = dict,
    usual_errors: Callable[[], Mapping[str, float]] = dict,
    *,
    terms: int = 0,
    widened: float = 1.0,
) -> Verdict:
    """Hold a variant's quantities against truth.

    A gradient that is refused is judged again, against its usual size where that is larger than its own, or
    against that of terms which cancel in it.

    Args:
        found: the variant's, by name.
        truth: the same in float64.
        expected: the eager reference's at the same precision, whose error is the yardstick.
        precision: key of `TOLERANCES`.
        terms: products that a gradient sums up.
        usual: gives the usual norms of gradients by name; asked only where one is refused.
        usual_errors: gives the reference's usual errors of gradients by name, as norms of the difference: its error on
            one problem may be small by luck. Called only when needed, too.
        widened: factor of the limits, 1 where truth is in float64; the caps stay.
    """
    limit_of = functools.partial(limit_for, precision=precision, widened=widened)
    checks = []
    for name, true in truth.items():
        size = _none_by_nature(name, truth)
        error = _error(found[name], true, size) if name in found else math.inf
        yardstick = _error(expected[name], true, size)
        summed = terms if name.startswith(GRADIENT) else 0
        check = Check(name, error, limit_of(yardstick, terms=summed))
        if not check.passed and size:
            yardstick = max(yardstick, usual_errors().get(name, 0.0) / size)
            check = Check(name, error, limit_of(yardstick, terms=summed))
        elif not check.passed and name.startswith(GRADIENT):
            # One that is exactly 0 has no relative error, and still a usual size.
            size = max(float(torch.linalg.vector_norm(true)), usual().get(name, 0.0), sys.float_info.min)
            usually = 0.0
            if error <= max(RECOGNISABLE, 2 * yardstick):
                size, usually = max(size, _uncancelled(name, truth)), usual_errors().get(name, 0.0)
            error = _error(found[name], true, size) if name in found else math.inf
            yardstick = max(_error(expected[name], true, size), usually / size)
            check = Check(name, error, limit_of(yardstick, terms=summed))
        checks.append(check)
    return Verdict(tuple(checks))


def _none_by_nature(name: str, truth: Mapping[str, Tensor]) -> float:
    """Norm of the gradient of a bias's matrix where its own is zero but for rounding, as a key's; else 0."""
    matrix = truth.get(name.removesuffix("bias") + "weight") if name.startswith(GRADIENT) else None
    if matrix is None or not name.endswith("bias"):
        return 0.0
    size = float(torch.linalg.vector_norm(matrix))
    return size if float(torch.linalg.vector_norm(truth[name])) <= NOTHING * size else 0.0


def _error(value: Tensor, truth: Tensor, size: float) -> float:
    """Relative error; against a size where one is given in place of truth's own."""
    if not size or value.shape != truth.shape:
        return relative_error(value, truth)
    missed = float(torch.linalg.vector_norm(value.to(truth.device, torch.float64) - truth))
    return missed / size if math.isfinite(missed) else math.inf


def _uncancelled(name: str, truth: Mapping[str, Tensor]) -> float:
    """Norm of the same terms where they do not cancel; 0 for a gradient whose terms do not.

    What moves all scores of a query alike has no part in a softmax. So the terms of the gradients of what makes the
    query, and of the scores' scale, nearly cancel over the source; the keys' gradient has them step by step.
    """
    part, found, rest = name.rpartition("attention.")
    keys = truth.get(f"{part}attention.key.weight")
    if not found or not rest.startswith(("query.", "scale")) or keys is None:
        return 0.0
    return float(torch.linalg.vector_norm(keys))


def _usual(problems: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Norm of each gradient, as the root of the mean square over problems."""
    squares: dict[str, list[float]] = {}
    for quantities in problems:
        for name, value in quantities.items():
            if name.startswith(GRADIENT):
                squares.setdefault(name, []).append(float(torch.linalg.vector_norm(value)) ** 2)
    return {name: math.sqrt(sum(found) / len(found)) for name, found in squares.items()}


@functools.singledispatch
def gate_for(workload: Any, mode: str, device: str) -> Gate:
    """The gate of a workload; a kind of workload with another truth registers a gate of its own."""
    return Gate(workload, mode, device)


class Gate:
    """Checks executables of one workload, mode and device on fresh weights and inputs.

    Weights, truth and yardsticks are computed once a seed and shared by all variants of a process.

    Args:
        workload: gives batches and the model's sizes.
        mode: in `training` all gradients are checked too; `decode` has a gate of its own, `bench.gate.decoding`.
        device: where everything runs.

    Attributes:
        kept: where truth and yardsticks are kept for other processes; None keeps them nowhere.
    """

    kept: KeptQuantities | None = None
    #: Factor of the limits: above 1 where truth is not in float64.
    widened = 1.0

    def __init__(self, workload: Workload, mode: str, device: str) -> None:
        self.workload, self.mode, self.device = workload, mode, device
        self.terms = workload.batch * max(workload.source_steps, workload.target_steps or 0)
        self.weights = functools.cache(self.draw)
        self._batch = functools.cache(lambda seed: self.askable(workload.make_batch(seed), self.weights(seed)))
        self.quantities = functools.cache(self._compute)

    def check(self, executable: Executable, seed: int, *, of_inputs: bool = True) -> Verdict:
        """Judge an executable on the weights and batch of a seed; its own weights are put back afterwards.

        Args:
            executable: what is judged.
            seed: of weights and batch.
            of_inputs: whether gradients of inputs are judged too, which take a pass of their own.
        """
        found, precision = self._found(executable, seed, of_inputs=of_inputs), executable.variant.precision
        expected = functools.partial(self.quantities, seed, precision)
        if self.mode == "decode":
            return self.judge_decoded(found, expected(), precision, self.weights(seed), self.batch(seed))
        truth = self.quantities(seed, "truth")
        if not of_inputs:
            inputs = {GRADIENT + name for name in self._batch(seed).tensors()}
            truth = {name: value for name, value in truth.items() if name not in inputs}
        usual_errors = functools.partial(self.usual_errors, precision)
        return self.judge(found, truth, expected, precision, self.usual_norms, usual_errors)

    def judge(
        self,
        found: dict[str, Tensor],
        truth: dict[str, Tensor],
        expected: Callable[[], dict[str, Tensor]],
        precision: str,
        usual: Callable[[], Mapping[str, float]],
        usual_errors: Callable[[], Mapping[str, float]],
    ) -> Verdict:
        """Compare quantities with truth with the limits of this gate; `expected` gives what `judge` takes."""
        return judge(found, truth, expected(), precision, usual, usual_errors, terms=self.terms, widened=self.widened)

    def draw(self, seed: int) -> Weights:
        """Weights of a seed, fp32."""
        return random_weights(self.workload.config, seed)

    def batch(self, seed: int) -> Batch:
        """The problem of a seed, on the CPU, in memory of its own."""
        return self._batch(seed).copy()

    def askable(self, batch: Batch, weights: Weights) -> Batch:
        """A batch whose gradients can be compared with truth's at these weights; see `bench.gate.kinked_losses`."""
        return moved_away(batch, self.workload.config, weights, self.device) if self.mode == "training" else batch

    def judge_decoded(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], precision: str, weights: Weights, batch: Batch
    ) -> Verdict:
        """Compare what was decoded with truth along its own path.

        Args:
            found: the variant's, by name; what a timed call does not give may be missing.
            expected: what `compute` gives at the precision.
            precision: key of `TOLERANCES`.
            weights: of the problem, fp32.
            batch: of the problem, on the CPU.
        """
        yardsticks = {name: float(error) for name, error in expected.items()}
        return decoding.judge(self._truth(weights, batch).errors(found), yardsticks, precision, self.workload.beam)

    def _truth(self, weights: Weights, batch: Batch) -> decoding.Truth:
        return decoding.Truth(self.workload.config, self.device, weights, batch, self.workload.beam)

    def usual_norms(self, weights: Weights | None = None) -> dict[str, float]:
        """Norm of each gradient in truth, as the root of the mean square over the problems of a few other seeds.

        Args:
            weights: fp32, whose gradients are meant; those of each seed when None.
        """
        return _usual(self._usually(seed, "truth", weights) for seed in USUAL_SEEDS)

    def usual_errors(self, precision: str, weights: Weights | None = None) -> dict[str, float]:
        """Norm of the reference's error of each gradient at a precision, also from several problems."""
        pairs = ((self._usually(seed, p, weights) for p in (precision, "truth")) for seed in USUAL_SEEDS)
        return _usual({name: found[name].to(true) - true for name, true in truth.items()} for found, truth in pairs)

    def _usually(self, seed: int, precision: str, weights: Weights | None) -> dict[str, Tensor]:
        """Quantities on the batch of a seed, at its weights or at others."""
        if weights is None:
            return self.quantities(seed, precision)
        return self.compute(weights, self.askable(self.workload.make_batch(seed), weights), precision)

    def _found(self, executable: Executable, seed: int, *, of_inputs: bool = True) -> dict[str, Tensor]:
        kept = executable.weights()
        executable.load(self.weights(seed))
        try:
            return executable.quantities(executable.prepare(self.batch(seed)), of_inputs=of_inputs)
        finally:
            executable.load(kept)

    def _compute(self, seed: int, precision: str) -> dict[str, Tensor]:
        return self.shared(str(seed), self.weights(seed), self.batch(seed), precision)

    def shared(self, problem: str, weights: Weights, batch: Batch, precision: str) -> dict[str, Tensor]:
        """Quantities as of `compute`, from another process of the group where one has kept it.

        Args:
            problem: name of weights and batch, the same in all processes.
            weights: fp32.
            batch: on the CPU.
            precision: as for `compute`.
        """
        compute = functools.partial(self.compute, weights, batch, precision)
        return compute() if self.kept is None else self.kept.get(problem, precision, compute)

    def true(self, weights: Weights, batch: Batch) -> dict[str, Tensor]:
        """Quantities of the truth."""
        return true_quantities(self.workload.config, self.mode, self.device, weights, batch)

    def rounded(self, weights: Weights) -> Weights:
        """Weights as dynamic quantisation rounds them."""
        return rounded_weights(weights)

    def compute(self, weights: Weights, batch: Batch, precision: str) -> dict[str, Tensor]:
        """Quantities of the truth (`precision` is "truth"), or of the reference at a precision.

        In the mode `decode`: the errors of the reference at that precision, by name.
        """
        if precision == "truth":
            return self.true(weights, batch)
        variant = dataclasses.replace(REFERENCE, precision=precision)
        # Of the weights as they are, before the reference's are rounded.
        truth = self._truth(weights, batch) if self.mode == "decode" else None
        if precision == "int8":
            variant, weights = dataclasses.replace(variant, lstm="rounded"), self.rounded(weights)
        if precision in {"bf16-weights", "bf16-split", "int8-head"}:
            variant, weights = dataclasses.replace(variant, precision="fp32"), kept_weights(weights, precision)
        executable = execute(
            self.workload, variant, self.mode, self.device, weights, stored=precision in {"bf16", "fp16"}
        )
        if precision == "int8":
            round_inputs(executable.model)
        found = executable.quantities(executable.prepare(batch), together=True)
        if truth is not None:
            return {name: torch.tensor(error) for name, error in truth.errors(found).items()}
        return found


def kept_weights(weights: Weights, precision: str) -> Weights:
    """Weights whose LSTMs' matrices are rounded to bf16, or to the sum of two bf16 numbers for `bf16-split`.

    Only the matrices are kept so; those of a head would err in directions of their own. For `int8-head` it is the
    head's matrix alone, rounded as dynamic quantisation does.
    """
    if precision == "int8-head":
        return dict(weights) | rounded_weights({"fc.weight": weights["fc.weight"]})

    def rounded(value: Tensor) -> Tensor:
        high = value.bfloat16().float()
        return high + (value - high).bfloat16().float() if precision == "bf16-split" else high

    return {
        name: rounded(value) if "weight_ih_l" in name or "weight_hh_l" in name else value
        for name, value in weights.items()
    }


def true_quantities(config: Config, mode: str, device: str, weights: Weights, batch: Batch) -> dict[str, Tensor]:
    """Everything the gate compares, by the loop in float64."""
    executable = Executable(VARIANTS["loop"], config, mode, device, weights)
    executable.model.double()
    wide = batch.to(device, torch.float64)
    if wide.expected.is_floating_point():
        wide = dataclasses.replace(wide, expected=wide.expected.double())
    return executable.quantities(wide, together=True)
