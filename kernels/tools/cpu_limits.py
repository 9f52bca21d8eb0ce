"""Print the least time in which a CPU can run an LSTM layer: `python -m kernels limits [RUN]`.

A call can be no faster than its multiplications at the peak rate of the machine's matrix products, nor than its bytes
at the bandwidth of the caches that hold its recurrent weights. Both rates come from a run of `python -m bench`, which
measures them; without one the table has only bytes and FLOPs. The initial state is taken as given: where it is zero,
the first step needs no recurrent weights, and a call of a single step half of the bytes and FLOPs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..host.output import run_command
from ..host.usage import PACKAGE, Parser, part_of

EXPECTED = "the folder of a run of python -m bench on a CPU, or its environment.json"


@dataclass(frozen=True)
class LayerCall:
    """A call of one layer in one direction, with as many features as hidden units.

    Attributes:
        mode: `inference` or `training` (forward and backward; the optimizer is left out).
        weight_bytes: of a kept weight: 4, 2 or 1.
    """

    mode: str
    batch: int
    steps: int
    hidden: int
    weight_bytes: int = 4

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products: two forward, and twice as many again for gradients."""
        forward = 2 * self.batch * self.steps * 4 * self.hidden * 2 * self.hidden
        return forward * (3 if self.mode == "training" else 1)

    @property
    def recurrent(self) -> int:
        """Bytes of the recurrent weights as they are kept: what stays in a cache from step to step, or does not."""
        return 4 * self.hidden * self.hidden * self.weight_bytes

    @property
    def bytes(self) -> int:
        """Bytes that must come to the cores: recurrent weights once a step, everything else once for each use.

        Backward the recurrent weights are read once a step again. In training gates and cells are written and read,
        their gradients written and read for three products, input and output read once more.
        """
        numbers = self.batch * self.steps * self.hidden
        forward = self.recurrent * (self.steps + 1) + 4 * 2 * numbers
        if self.mode != "training":
            return forward
        return forward + self.recurrent * (self.steps + 1) + 4 * numbers * (2 * 4 + 2 + 4 * 4 + 3)

    def __str__(self) -> str:
        """Short name."""
        kept = {4: "", 2: ", 16-bit weights", 1: ", 8-bit weights"}[self.weight_bytes]
        return f"{self.mode} B{self.batch} T{self.steps} H{self.hidden}{kept}"


CASES = (
    *(LayerCall("inference", 1, 50, hidden) for hidden in (64, 128, 256, 512, 1024)),
    *(LayerCall("inference", 1, 50, hidden, size) for hidden in (512, 1024) for size in (2, 1)),
    *(LayerCall("inference", batch, 50, hidden) for batch in (4, 8) for hidden in (128, 256)),
    *(LayerCall("inference", 16, 50, hidden) for hidden in (128, 512)),
    *(LayerCall("inference", 1, 1, hidden) for hidden in (256, 1024)),
    LayerCall("inference", 1, 1, 1024, 2),
    *(LayerCall("training", 16, 50, hidden) for hidden in (32, 64, 128, 256, 512)),
    *(LayerCall("training", 1, 50, hidden) for hidden in (256, 512)),
)


def bandwidth(rates: Mapping[str, float], working_set: int) -> float:
    """Bytes per second where this many bytes are gone over again and again, as a limit that cannot be beaten.

    It is the best of all sets at least as large, since a measurement may have been held up, and of the next smaller
    one, since part of a set that is too large for a cache still stays in it.
    """
    floor = max((int(size) for size in rates if int(size) <= working_set), default=0)
    return max(rate for size, rate in rates.items() if int(size) >= floor)


def table(ceilings: Mapping[str, Any] | None) -> str:
    """A Markdown table, a line per case; times in microseconds, a dash where no rate is known.

    Args:
        ceilings: `flops_per_s` by precision and `bytes_per_s` by working set; None when they were not measured.
    """
    lines = [
        "| case | bytes | FLOPs | limit by bandwidth (us) | limit by peak (us) |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        by_bytes = by_peak = "-"
        if ceilings is not None:
            by_bytes = f"{case.bytes / bandwidth(ceilings['bytes_per_s'], case.recurrent) * 1e6:.1f}"
            rates = ceilings["flops_per_s"]
            # By sums where the run has such a rate: bench/worker/ceilings.py.
            usable = {4: ("fp32", "fp32 by sums"), 2: ("fp32", "fp32 by sums", "bf16")}.get(case.weight_bytes)
            # No run measures the rate of products of bytes, which is above all of these.
            if usable:
                by_peak = f"{case.flops / max(rates.get(name, 0.0) for name in usable) * 1e6:.1f}"
        lines.append(f"| {case} | {case.bytes / 1e6:.2f} M | {case.flops / 1e6:.1f} M | {by_bytes} | {by_peak} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 2 when the file has no ceilings of a CPU."""
    parser = Parser(prog=f"python -m {PACKAGE} limits", description=__doc__)
    parser.add_argument(
        "environment",
        metavar="RUN",
        nargs="?",
        type=Path,
        help="folder of a run, or its environment.json: has the rates",
    )
    options = parser.parse_args(arguments)
    ceilings, said = None, ""
    if options.environment is not None:
        file = options.environment
        file = file / "environment.json" if file.is_dir() else file
        try:
            ceilings = json.loads(file.read_text(encoding="utf-8"))["ceilings"]["cpu"]
            said = f"On {ceilings['threads']} thread{'s' * (ceilings['threads'] != 1)}, by {file}.\n\n"
            said += table(ceilings)
        except OSError as error:
            print(f"error: {file}: {error.strerror}; expected {EXPECTED}", file=sys.stderr)
            return 2
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            print(f"error: {file} has no ceilings of a CPU; expected {EXPECTED}", file=sys.stderr)
            return 2
    print(said or table(None))
    return 0


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} limits"))
