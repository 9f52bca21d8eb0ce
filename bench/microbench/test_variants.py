"""Every variant at small sizes under pytest-benchmark: `nox -s microbench -- -k "seed and training"`.

A case is named workload-mode-variant, as in `seed-inference-onednn`. It passes the gate before it is timed and again
after, or it has no figure; what really ran is in `extra_info`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gate.parity import Gate
from bench.microbench.gated import time_gated
from bench.plan.cases import PASSES, Case
from bench.run.second_instrument import WORKLOAD, case_id
from bench.timing.seat import Subject
from bench.worker import evidence
from bench.worker.evidence import Compilation
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

#: Short names and what they stand for. `packed` has sequences of different lengths; `bidirectional` has layers between
#: encoder and decoder.
WORKLOADS = {
    WORKLOAD: WORKLOAD,
    "packed": "translation-small-scaled@batch=4,length=6",
    "bidirectional": "summarize-pg-scaled@batch=2,length=8",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the cases here, when plugins have added theirs."""
    cases = [
        pytest.param(
            workload,
            mode,
            variant.name,
            device,
            id=case_id(workload, mode, variant.name, device),
            marks=[pytest.mark.quick] if workload == WORKLOAD and not variant.compiles_long else [],
        )
        for workload in WORKLOADS
        for mode in PASSES
        for variant in VARIANTS.values()
        for device in devices_of(variant, metafunc.config.getoption("--bench-device", None) or usable_devices())
    ]
    metafunc.parametrize(("workload", "mode", "variant", "device"), cases)


def usable_devices() -> list[str]:
    """The CPU, and CUDA where torch sees a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def devices_of(variant: Variant, devices: list[str]) -> Iterator[str]:
    """Devices to list a variant on: those it exists on, or else one, to be skipped with its reason."""
    here = [device for device in devices if device in variant.devices]
    yield from here or devices[:1]


def test_variant(
    workload: str, mode: str, variant: str, device: str, benchmark: BenchmarkFixture, gate_seed: int
) -> None:
    """A forward pass, or a whole training step."""
    case = Case(WORKLOADS[workload], variant, mode, device, torch.get_num_threads())
    problem, chosen = find_workload(case.workload), VARIANTS[variant]
    reason = chosen.why_not(device, mode, problem)
    if reason:
        pytest.skip(reason)
    benchmark.group = case.group
    executable = Executable(chosen, problem.config, mode, device, starting_weights(problem, WEIGHTS_SEED))
    call = functools.partial(executable.call, executable.prepare(problem.make_batch(TIMED_SEED)))
    compiled = compiled_by_first_call(chosen, Subject(call, executable.context))
    seen = time_gated(
        benchmark,
        Subject(call, executable.context),
        device,
        functools.partial(gate_of(case.workload, mode, device).check, executable),
        gate_seed,
        executable.runtime,
    )
    benchmark.extra_info |= {"workload": case.workload, "mode": mode, "variant": variant}
    benchmark.extra_info["precision"] = executable.variant.precision
    benchmark.extra_info["evidence"] = evidence.explain(
        executable.variant, problem, device, seen, compiled, evidence.choices_of(executable.model)
    )
    if compiled is not None:
        benchmark.extra_info |= {"graphs": compiled.graphs, "graph_breaks": compiled.breaks}


@functools.cache
def gate_of(workload: str, mode: str, device: str) -> Gate:
    """One gate a group, which computes truth once for all its variants."""
    return Gate(find_workload(workload), mode, device)


def compiled_by_first_call(variant: Variant, subject: Subject) -> Compilation | None:
    """Make the first call, and say what Dynamo did in it; None for what does not go through Dynamo."""
    if variant.compiler != "dynamo":
        return None
    before = evidence.compilation()
    with subject.context():
        subject.call()
    after = evidence.compilation()
    return Compilation(
        after.graphs - before.graphs,
        after.breaks - before.breaks,
        after.recompiles - before.recompiles,
        after.seconds - before.seconds,
    )
