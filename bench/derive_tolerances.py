"""Where the gate's numbers come from: `python -m bench.derive_tolerances`.

Runs every variant that exists on this machine, and planted defects, over random problems in both modes, and prints
what separates them: how much larger the error of a right variant gets than the reference's, how large it gets at all,
and how small the error of a wrong one. `bench.parity` holds the numbers that were chosen between the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import sys
import warnings
from collections.abc import Iterator

import torch

from bench.defects import DEFECTS
from bench.parity import FACTOR, ROUNDOFF, TOLERANCES, Gate, limit_for
from seq2seq.execution import Executable, initial_weights
from seq2seq.variants import LSTMS, VARIANTS, Variant
from seq2seq.workloads import Workload, find_workload

Rows = dict[tuple[str, str], list[tuple[float, float]]]

PRECISIONS = ("fp32", "fp16", "bf16")
FACTORS = (2, 3, 4, 8)
#: Problems are drawn around these: value inputs, real data through three layers, tokens with lengths, both directions.
BASES = ("seed", "forecast-deepar", "translation-small-scaled", "speech-las-scaled", "scaling")


def problems(count: int, seed: int) -> Iterator[Workload]:
    """Random sizes of the base workloads."""
    generator = random.Random(seed)  # noqa: S311 - not a secret
    for number in range(count):
        base = BASES[number % len(BASES)]
        sizes = {
            "batch": generator.choice([1, 3, 8, 17]),
            "hidden": generator.choice([5, 16, 40, 128, 256]),
            "length": generator.choice([2, 9, 32, 100]),
        }
        yield find_workload(f"{base}@" + ",".join(f"{axis}={value}" for axis, value in sizes.items()))


def variants(device: str, mode: str, workload: Workload) -> list[Variant]:
    """Those that can run, without the ones whose compilation would take minutes a problem.

    fp16 is looked at through ATen on a CPU too, where no vendor library has it.
    """
    every = [*VARIANTS.values()]
    if device == "cpu":
        native = dataclasses.replace(VARIANTS["amp-fp16"], name="amp-fp16 (ATen)", vendor_lstm=False, requirements=())
        every.append(native)
    slow = {v.name for v in every if v.compiler == "dynamo" and (v.allow_rnn or v.lstm == "loop")}
    return [v for v in every if v.name not in slow and v.why_not(device, mode, workload) is None]


def measure(count: int, seed: int, device: str) -> tuple[Rows, Rows]:
    """Errors of right variants and of defects over all problems, with the reference's beside them.

    Returns:
        Errors of the right variants with the reference's at the same precision, one pair a quantity, by name and
        precision; and for the defects pairs of 1 or 0, whether the gate let it through, and the largest error.
    """
    right: Rows = {}
    wrong: Rows = {}
    for number, workload in enumerate(problems(count, seed)):
        for mode in ("inference", "training"):
            gate = Gate(workload, mode, device)
            weights = initial_weights(workload.config, 1)
            for variant in variants(device, mode, workload):
                executable = Executable(variant, workload.config, mode, device, weights)
                pairs = gate.errors(executable, number)
                right.setdefault((variant.name, variant.precision), []).extend(pairs.values())
            for name, precision in itertools.product(DEFECTS, PRECISIONS):
                defect = Variant(name, "", lstm=name, precision=precision, autocast=True)
                executable = Executable(defect, workload.config, mode, device, weights)
                verdict = gate.check(executable, number)
                largest = max(check.error for check in verdict.checks)
                wrong.setdefault((name, precision), []).append((float(verdict.passed), largest))
    return right, wrong


def main() -> int:
    """Print what separates right from wrong."""
    grammar = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    grammar.add_argument("--problems", type=int, default=25, help="how many problems (default: 25)")
    grammar.add_argument("--seed", type=int, default=0)
    grammar.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = grammar.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    LSTMS.update(DEFECTS)
    right, wrong = measure(arguments.problems, arguments.seed, arguments.device)
    print(
        f"{'right variant':<18}{'precision':<10}{'refused':>14}{'largest error':>15}"
        "   floor needed, in roundoffs, at factor"
    )
    print(" " * 60 + "".join(f"{factor:>8}" for factor in FACTORS))
    for (name, precision), pairs in right.items():
        needed = [
            max((error for error, own in pairs if error > factor * own), default=0.0) / ROUNDOFF[precision]
            for factor in FACTORS
        ]
        refused = f"{sum(error > limit_for(own, precision) for error, own in pairs)} of {len(pairs)}"
        print(
            f"{name:<18}{precision:<10}{refused:>14}{max(pairs)[0]:>15.2e}"
            + " " * 3
            + "".join(f"{n:>8.1f}" for n in needed)
        )
    print(f"\n{'defect':<26}{'precision':<10}{'let through':>12}{'largest error, least seen':>28}")
    for (name, precision), pairs in wrong.items():
        passed = f"{sum(p for p, _ in pairs):.0f} of {len(pairs)}"
        print(f"{name:<26}{precision:<10}{passed:>12}{min(error for _, error in pairs):>28.2e}")
    print(
        f"\nchosen: factor {FACTOR:g}; " + "; ".join(f"{k} {v.floor:.1e} to {v.cap:.1e}" for k, v in TOLERANCES.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
