"""Facts of a case besides its speed: error, metric, memory, start, and what it takes to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import units
from bench.records.reader import RecordedRun
from bench.records.schema import Record

#: First words of the need for a compiler, from heavy to light.
AT_EVERY_START, ONCE = "a C++ compiler (at every start)", "a C++ compiler (once)"


@dataclass(frozen=True)
class Facts:
    """Facts of one case.

    Attributes:
        error: largest relative error of results and gradients; None where the gate did not say.
        drop: change of the user's metric from the baseline's, either way, as a share; None without a metric.
        memory_bytes: peak; on a GPU the allocator's.
        start_s: from nothing to the first result.
        compile_s: part of it that was spent compiling.
        needs: what a machine must have besides torch; None where that is not known.
    """

    error: float | None
    drop: float | None
    memory_bytes: float | None
    start_s: float | None
    compile_s: float | None
    needs: tuple[str, ...] | None

    @classmethod
    def of(cls, record: Record, baseline: Record | None, needs: Mapping[str, Sequence[str]]) -> Facts:
        """Facts of a record.

        Args:
            record: of the case.
            baseline: the record that the metric is compared with.
            needs: of every variant that is known, by name.
        """
        errors = [value for value in (record.parity_error, record.grad_error) if value is not None]
        cuda = record.memory_cuda_allocated_bytes
        known = record.build_s is not None and record.first_call_s is not None
        own = needs.get(record.variant.partition("#")[0])
        return cls(
            max(errors, default=None),
            _drop(record, baseline),
            record.memory_peak_bytes if cuda is None else cuda,
            (record.build_s or 0.0) + (record.first_call_s or 0.0) if known else None,
            record.compile_s,
            None if own is None else tuple(own),
        )

    @property
    def later_start_s(self) -> float | None:
        """Seconds to the first result of a later start on the machine, which finds compiled what is compiled once."""
        once = self.needs is not None and ONCE in self.needs and AT_EVERY_START not in self.needs
        if self.start_s is None or not once:
            return self.start_s
        return max(0.0, self.start_s - (self.compile_s or 0.0))

    @property
    def burden(self) -> tuple[float, ...]:
        """Order of what is cheap to own: no compiler, then few dependencies, little memory, a short start."""
        needs = self.needs or ()
        compilers = 2 * (AT_EVERY_START in needs) + (ONCE in needs)
        unknown = float("inf")
        memory = unknown if self.memory_bytes is None else self.memory_bytes
        start = unknown if self.start_s is None else self.start_s
        return (compilers, len(needs), memory, start)

    def cost(self) -> tuple[str, ...]:
        """Costs of using the variant, in words."""
        found = []
        if self.error is not None:
            found.append(f"error {units.error(self.error)}")
        if self.drop is not None:
            found.append(f"the metric changes by {units.share(self.drop)}")
        if self.memory_bytes is not None:
            found.append(f"{units.megabytes(self.memory_bytes)} of memory")
        if self.start_s is not None:
            compiling = f", {units.seconds(self.compile_s)} of it compiling" if self.compile_s else ""
            found.append(f"{units.seconds(self.start_s)} to the first result{compiling}")
        if self.needs:
            found.append(f"needs {' and '.join(self.needs)}")
        return tuple(found)


def needs_of(run: RecordedRun) -> dict[str, tuple[str, ...]]:
    """Needs of the variants as the run recorded them; empty where it did not."""
    section: Any = run.environment.get("needs") or {}
    return {str(name): tuple(map(str, needs)) for name, needs in section.items()}


def _drop(record: Record, baseline: Record | None) -> float | None:
    """Change of the metric as a share of the baseline's: whether more or less is better, only the user knows."""
    own, base = (getattr(found, "metric", None) for found in (record, baseline))
    if own is None or base is None:
        return None
    return float(abs(own - base) / abs(base) if base else abs(own - base))
