"""Code shared by the tests here: the gate around pytest-benchmark's timing, and the facts that go with its figures.

The timing is entirely pytest-benchmark's: its loop, its rounds, its statistics. That makes it a second instrument for
what `bench/timing/seat.py` measures, although both read the same system clock and warm up in the same way. As
everywhere here, only correct variants are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gate.parity import Verdict
from bench.timing.clock import synchronize
from bench.timing.seat import Subject, warm_up
from bench.worker import evidence
from bench.worker.evidence import Observation
from bench.worker.gating import verdict_fields
from seq2seq.runtimes.runtime import Runtime


def time_gated(
    benchmark: BenchmarkFixture,
    subject: Subject,
    device: str,
    check: Callable[[int], Verdict],
    seed: int,
    runtime: Runtime | None = None,
) -> Observation:
    """Gate, warm up, time with pytest-benchmark, gate again on another seed; then look at what ran.

    Parity goes into `extra_info`, the worst of both gates.

    Args:
        benchmark: pytest-benchmark's fixture.
        subject: what is timed; its context is entered once around all rounds.
        device: `cpu` or `cuda`; on CUDA each call is waited for inside the timed function.
        check: the gate, given a seed.
        seed: of the first gate; the second takes the next one.
        runtime: what runs in torch's place, if anything does.

    Returns:
        What the profiler saw. It looks last, so that profiling cannot slow what is timed.

    Raises:
        pytest.fail.Exception: the gate refused before or after.
    """
    before = accepted(check(seed), "before the timing")
    if benchmark.enabled:
        warm_up(subject, device)
    with subject.context():
        benchmark(waited_for(subject.call, device))
    after = accepted(check(seed + 1), "after the timing")
    fields = verdict_fields(Verdict(before.checks + after.checks))
    names = ("parity_error", "parity_limit", "grad_error", "grad_limit", "parity_worst")
    benchmark.extra_info |= {name: fields[name] for name in names} | {"gate_seed": seed}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device}
    with subject.context():
        seen = evidence.observe(subject.call, device, runtime)
    benchmark.extra_info |= {"ran_precision": " and ".join(seen.precisions), "ran_operators": seen.shown()}
    return seen


def accepted(verdict: Verdict, when: str) -> Verdict:
    """The verdict, if the gate lets it through; otherwise the test fails with the refused quantities."""
    if not verdict.passed:
        pytest.fail(f"{verdict.describe()} (gate {when})", pytrace=False)
    return verdict


def waited_for(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call itself on a CPU; on CUDA a call that waits for the device."""
    if device == "cpu":
        return call

    def synchronised() -> object:
        result = call()
        synchronize(device)
        return result

    return synchronised
