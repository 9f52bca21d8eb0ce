"""Measure where the gate's limits come from: `python -m bench.gate.derive_tolerances`.

Runs every variant that exists on this machine, and planted defects, over random problems in both modes, and prints
how near the right ones come to being refused and the wrong ones to being let through. `bench.gate.parity` holds the
numbers that were chosen between the two, and the reasons.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from collections.abc import Iterator

import torch

from bench.gate.parity import FACTOR, TOLERANCES, Gate
from bench.gate.planted_defects import DEFECTS
from kernels.host.numbers import whole
from kernels.host.output import run_command
from kernels.host.usage import Parser
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import Workload

Rows = dict[tuple[str, str], list[tuple[float, float]]]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: Problems are drawn around these: value inputs, real data through three layers, tokens with lengths, both directions.
BASES = ("seed", "forecast-deepar", "translation-small-scaled", "speech-las-scaled", "scaling")


def problems(count: int, seed: int) -> Iterator[Workload]:
    """Random sizes of the base workloads."""
    generator = random.Random(seed)  # noqa: S311 - not a secret
    for number in range(count):
        base = BASES[number % len(BASES)]
        sizes = {
            "batch": generator.choice([1, 3, 8, 17, 64]),
            "hidden": generator.choice([5, 16, 40, 128, 256]),
            "length": generator.choice([2, 9, 32, 100, 168]),
        }
        yield find_workload(f"{base}@" + ",".join(f"{axis}={value}" for axis, value in sizes.items()))


def variants(device: str, mode: str, workload: Workload) -> list[Variant]:
    """Variants that can run, without those that would compile for minutes per problem.

    fp16 is looked at through ATen on a CPU too, where no vendor library has it.
    """
    every = [*VARIANTS.values()]
    if device == "cpu":
        native = dataclasses.replace(VARIANTS["amp-fp16"], name="amp-fp16 (ATen)", vendor_lstm=False, requirements=())
        every.append(native)
    slow = {v.name for v in every if v.compiler == "dynamo" and (v.allow_rnn or v.lstm == "loop")}
    return [v for v in every if v.name not in slow and v.why_not(device, mode, workload) is None]


def measure(count: int, seed: int, device: str) -> tuple[Rows, Rows]:
    """Errors of right variants and of defects over all problems, next to those of the reference.

    Returns:
        By name and precision: of the right variants (error / limit, error) of every quantity; of the defects the same
        of each problem, the largest over its quantities.
    """
    right: Rows = {}
    wrong: Rows = {}
    for number, workload in enumerate(problems(count, seed)):
        for mode in ("inference", "training"):
            gate = Gate(workload, mode, device)
            weights = initial_weights(workload.config, 1)
            for variant in variants(device, mode, workload):
                executable = Executable(variant, workload.config, mode, device, weights)
                checks = gate.check(executable, number).checks
                pairs = [(check.strain, check.error) for check in checks]
                right.setdefault((variant.name, executable.variant.precision), []).extend(pairs)
            for name, precision in itertools.product(DEFECTS, PRECISIONS):
                defect = Variant(name, "", lstm=name, precision=precision, autocast=True)
                if precision == "int8" and mode != "inference":
                    continue
                executable = Executable(defect, workload.config, mode, device, weights)
                verdict = gate.check(executable, number)
                largest = max(check.error for check in verdict.checks)
                wrong.setdefault((name, precision), []).append((verdict.worst.strain, largest))
    return right, wrong


def main() -> int:
    """Print what separates right from wrong."""
    grammar = Parser(prog="python -m bench.gate.derive_tolerances", description=(__doc__ or "").splitlines()[0])
    grammar.add_argument("--problems", type=whole(), default=25, help="random problems (default: 25)")
    grammar.add_argument("--seed", type=whole(0), default=0, help="seed of the problems (default: 0)")
    grammar.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default: cpu)")
    arguments = grammar.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    LSTMS.update(DEFECTS)
    right, wrong = measure(arguments.problems, arguments.seed, arguments.device)
    print(f"{'right variant':<26}{'precision':<10}{'refused':>14}{'largest error':>15}{'largest error / limit':>23}")
    for (name, precision), pairs in right.items():
        refused = f"{sum(strain > 1 for strain, _ in pairs)} of {len(pairs)}"
        strain, error = (max(column) for column in zip(*pairs, strict=True))
        print(f"{name:<26}{precision:<10}{refused:>14}{error:>15.1e}{strain:>23.2f}")
    print(f"\n{'defect':<26}{'precision':<10}{'let through':>14}{'least error':>15}{'least error / limit':>23}")
    for (name, precision), pairs in wrong.items():
        passed = f"{sum(strain <= 1 for strain, _ in pairs)} of {len(pairs)}"
        strain, error = (min(column) for column in zip(*pairs, strict=True))
        print(f"{name:<26}{precision:<10}{passed:>14}{error:>15.1e}{strain:>23.2f}")
    print(
        f"\nchosen: factor {FACTOR:g}; " + "; ".join(f"{k} {v.floor:.1e} to {v.cap:.1e}" for k, v in TOLERANCES.items())
    )
    return 0


if __name__ == "__main__":
    run_command(main)
