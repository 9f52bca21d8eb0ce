"""Distance of a case from what its machine can do, and the verdict on one that is faster than that.

The least time of a call is that of its FLOPs at the rate of the fastest matrix product, or of its bytes at the rate
of the working set, whichever is longer (Williams et al. 2009). Nothing here imports torch: workers measure the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench import units
from bench.records.schema import Status

#: A case may be faster than its ceiling by this share before it is called impossible: what the best of some hundred
#: products and copies misses of the machine's own best.
MARGIN = 0.10
#: Name of a second rate of products in fp32, which a worker gives where the processor adds beside its multiplications:
#: additions can then take the place of multiplications. Only cases that do so are held against it.
BY_SUMS = "fp32 by sums"
#: What the evidence of such a case names: the instructions of `cpu-fused`.
SUMS = "avx512-sums"


@dataclass(frozen=True)
class Rates:
    """Rates of one number of threads.

    Attributes:
        flops_per_s: the fastest matrix product by precision.
        bytes_per_s: the fastest way to move bytes by working set, bytes.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: Mapping[int, float]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Rates:
        """From JSON."""
        flops, moved = data["flops_per_s"], data["bytes_per_s"]
        return cls({str(k): float(v) for k, v in flops.items()}, {int(k): float(v) for k, v in moved.items()})

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to four digits."""
        return {
            "flops_per_s": {name: float(f"{rate:.4g}") for name, rate in self.flops_per_s.items()},
            "bytes_per_s": {str(size): float(f"{rate:.4g}") for size, rate in self.bytes_per_s.items()},
        }

    def best_of(self, other: Rates) -> Rates:
        """The better of both, rate by rate."""
        return Rates(_best(self.flops_per_s, other.flops_per_s), _best(self.bytes_per_s, other.bytes_per_s))

    def product(self, precision: str) -> float | None:
        """FLOPs per second of a precision; None where it was not measured.

        Never below fp32's: where a narrow type has no fast product, its values can be multiplied as fp32. A run without
        a rate by sums has fp32's for it.
        """
        if precision == BY_SUMS and BY_SUMS not in self.flops_per_s:
            precision = "fp32"
        if precision not in self.flops_per_s:
            return None
        return max(self.flops_per_s[precision], self.flops_per_s.get("fp32", 0.0))

    def bandwidth(self, working_set: float) -> float | None:
        """Bytes per second of a working set: the best measured with one at least as large, the next smaller included.

        The next smaller one is included because part of a set that is too large for a cache still stays in it.
        """
        if not self.bytes_per_s:
            return None
        floor = max((size for size in self.bytes_per_s if size <= working_set), default=0)
        return max(rate for size, rate in self.bytes_per_s.items() if size >= floor)


@dataclass(frozen=True)
class Ceilings:
    """Limits of a device.

    Attributes:
        threads: that `rates` were measured with.
        rates: at these threads.
        one_thread: with one of them; None where there is only one, and on CUDA.
        measurements: how often all of it was measured; the best counts.
        step_s: seconds in which a GPU's programs take a step together, by what the step consists of and size; empty on
            a CPU. No case is judged by it.
    """

    threads: int
    rates: Rates
    one_thread: Rates | None = None
    measurements: int = 1
    step_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Ceilings:
        """From a worker's event or a section of environment.json."""
        one = data.get("one_thread")
        times = int(data.get("measurements", 1))
        steps = {str(name): float(step_s) for name, step_s in (data.get("step_s") or {}).items()}
        return cls(int(data["threads"]), Rates.of(data), Rates.of(one) if one else None, times, steps)

    def as_json(self) -> dict[str, Any]:
        """The section of environment.json."""
        section = {"threads": self.threads, "measurements": self.measurements, **self.rates.as_json()}
        if self.step_s:
            section["step_s"] = {name: float(f"{step_s:.4g}") for name, step_s in self.step_s.items()}
        return section if self.one_thread is None else section | {"one_thread": self.one_thread.as_json()}

    def best_of(self, other: Ceilings) -> Ceilings:
        """The better of two measurements of the same device."""
        one = self.one_thread.best_of(other.one_thread) if self.one_thread and other.one_thread else self.one_thread
        steps = {
            name: min(each.step_s[name] for each in (self, other) if name in each.step_s)
            for name in {**self.step_s, **other.step_s}
        }
        times = self.measurements + other.measurements
        return Ceilings(self.threads, self.rates.best_of(other.rates), one, times, steps)

    def product_limit(self, precision: str) -> float | None:
        """FLOPs per second that cannot be passed: no less than single threads add up to."""
        one = self.one_thread.product(precision) if self.one_thread else None
        return _largest(self.rates.product(precision), one and one * self.threads)

    def bandwidth_limit(self, working_set: float) -> float | None:
        """Bytes per second that cannot be passed; each thread has its part of the working set."""
        one = self.one_thread.bandwidth(working_set / self.threads) if self.one_thread else None
        return _largest(self.rates.bandwidth(working_set), one and one * self.threads)


@dataclass(frozen=True)
class Work:
    """Work and time of a case.

    Attributes:
        flops, least_bytes: of one call.
        call_s: its median time, seconds.
        precisions: data types of its products.
    """

    flops: float
    least_bytes: float
    call_s: float
    precisions: tuple[str, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Work | None:
        """From the fields of a record; None where one that is needed is missing."""
        flops, moved, rate = (fields.get(name) for name in ("flops", "least_bytes", "throughput_seq_per_s"))
        if not flops or not moved or not rate:
            return None
        return cls(flops, moved, fields["batch"] / rate, precisions(fields))

    def product(self, rate: Callable[[str], float | None]) -> float | None:
        """The highest rate among its precisions; None where one was not measured."""
        rates = [rate(name) for name in self.precisions]
        return max(rates) if all(rates) and rates else None  # type: ignore[type-var]


#: Precisions of products in kernels of ours that are faster than any of fp32; the profiler sees only other products.
UNSEEN = frozenset({"int8", "int8-head"})


def precisions(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Data types of the products that ran; what was asked for where the profiler saw none, or could not see it.

    The profiler calls TF32 what its inputs are, fp32. Where the evidence says that additions took the place of
    multiplications in fp32, that is a precision of its own, since its products may be faster.
    """
    asked = fields.get("precision") or "fp32"
    ran = tuple(filter(None, str(fields.get("ran_precision") or "").split(" and ")))
    if ran and asked in UNSEEN and asked not in ran:
        ran = (*ran, asked)
    fp32 = "tf32" if asked == "tf32" else BY_SUMS if SUMS in str(fields.get("evidence") or "") else "fp32"
    return tuple(fp32 if name == "fp32" else name for name in ran or (asked,))


def precision_words(asked: str, ran: str) -> str:
    """Say which precision ran, where the profiler may have seen only products beside those of our kernels.

    Args:
        asked: the precision that the variant asks for.
        ran: data types of the products that the profiler or the runtime reported; empty for none.
    """
    if not ran or asked in ran.split(" and ") or (asked, ran) == ("tf32", "fp32"):
        return ran if asked in ran.split(" and ") else asked
    return f"asked for {asked}; products that the profiler sees ran in {ran}" if asked else ran


@dataclass
class Judge:
    """Holds the ceilings of a run's devices and holds cases against them.

    Attributes:
        measure: asks a fresh worker for the ceilings of a device; None when that failed.
        found: the best of all measurements by device.
    """

    measure: Callable[[str], Ceilings | None]
    found: dict[str, Ceilings] = field(default_factory=dict)

    def look(self, device: str) -> None:
        """Measure a device, once more if it was measured before; the best counts."""
        seen = self.measure(device)
        if seen is not None:
            self.found[device] = self.found[device].best_of(seen) if device in self.found else seen

    def judge(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Judge a timed case: `ceiling_share` and `bound`, or the status `impossible` and its reason.

        A machine's speed drifts, so before a case is condemned its ceilings are measured again, right then.

        Args:
            fields: of its record.
        """
        work, device = Work.of(fields), str(fields.get("device"))
        if work is None or device not in self.found:
            return {}
        if faster(least(work, self.found[device].rates), work):
            self.look(device)
        reason = excess(work, self.found[device])
        return {"status": Status.IMPOSSIBLE, "reason": reason} if reason else share(work, self.found[device])

    def as_json(self) -> dict[str, Any]:
        """The section `ceilings` of environment.json."""
        return {device: ceilings.as_json() for device, ceilings in self.found.items()}


@dataclass(frozen=True)
class Least:
    """Least seconds of a call for its products and for its bytes; 0 where the rate is not known."""

    products_s: float
    bytes_s: float


def least(work: Work, rates: Rates) -> Least:
    """Least time at rates that were measured."""
    return Least(*_times(work, work.product(rates.product), rates.bandwidth(work.least_bytes)))


def faster(bound: Least, work: Work) -> bool:
    """Return whether a case took less than that, by more than the margin."""
    return max(bound.products_s, bound.bytes_s) > (1 + MARGIN) * work.call_s


def share(work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """`ceiling_share` and `bound`; empty where the ceiling is not known.

    If a case is faster than the limit measured with several threads, but slower than the limit of one thread times
    their number, then the measurement with several threads was disturbed, and the ceiling is unknown.
    """
    found = least(work, ceilings.rates)
    if not found.products_s or not found.bytes_s or faster(found, work):
        return {}
    bound = "compute" if found.products_s >= found.bytes_s else "memory"
    return {"ceiling_share": max(found.products_s, found.bytes_s) / work.call_s, "bound": bound}


def excess(work: Work, ceilings: Ceilings) -> str:
    """In words, by how much a case is faster than its machine can be; empty when it is not."""
    product, bandwidth = work.product(ceilings.product_limit), ceilings.bandwidth_limit(work.least_bytes)
    found = Least(*_times(work, product, bandwidth))
    if not faster(found, work):
        return ""
    if found.products_s >= found.bytes_s:
        what, unit, amount, rate = f"{' and '.join(work.precisions)} products allow", "FLOP", work.flops, product
    else:
        what, unit, amount, rate = "bandwidth allows", "B", work.least_bytes, bandwidth
    times = max(found.products_s, found.bytes_s) / work.call_s
    rated = units.amount(amount / work.call_s, unit)
    reached = f"{units.amount(amount, unit)} in {units.seconds(work.call_s)} is {rated}/s"
    most = f"the most in {ceilings.measurements} measurements is {units.amount(rate, unit)}/s"
    return f"{times:.1f}x faster than this machine's {what}: {reached}, {most}"


def _times(work: Work, product: float | None, bandwidth: float | None) -> tuple[float, float]:
    return work.flops / product if product else 0.0, work.least_bytes / bandwidth if bandwidth else 0.0


def _best(mine: Mapping[Any, float], theirs: Mapping[Any, float]) -> dict[Any, float]:
    return {key: max(mine.get(key, 0.0), theirs.get(key, 0.0)) for key in (*mine, *theirs)}


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value), default=None)
