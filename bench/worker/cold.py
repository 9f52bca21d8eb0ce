"""A cold run from inside: one case in this fresh process, its first call, memory and evidence; no steady time."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import memory, own_pages
from bench.plan.cases import Case
from bench.run.cold import COMPILER
from bench.timing.clock import synchronize, time_once
from bench.worker import evidence
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED
from kernels.cpu import build
from kernels.host.cores import usable_cores
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

STEADY_CALLS = 5
#: What torch.compile imports besides, for a second, as it is called for the first time.
_BACKEND = ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx")


def prepare(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """Import what a cold run needs and belongs to no variant; a forked process gets pages of its own."""
    del emit
    import_needed(Case(**request["case"]))
    own_pages.take()


def import_needed(case: Case) -> None:
    """Import what a case needs and belongs to no variant, so that no call has to."""
    for name in imports(case):
        if name == COMPILER:
            importlib.import_module(name)


def imports(case: Case) -> list[str]:
    """Modules that a process imports for a case and that start nothing, so that a seat's parent may import them."""
    compiles = VARIANTS[case.executed].compiler == "dynamo"
    # torch's optimizers import the compiler too.
    found = [COMPILER] if compiles or case.mode == "training" else []
    found += _BACKEND if compiles else ()
    return found + (["pandas"] if find_workload(case.workload).data.startswith("real") else [])


def cold(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """One case in this fresh process: build, first call, memory, evidence; no steady-state time.

    Args:
        request: the `case`, and the seconds that each library of the C++ kernel took that it finds compiled (`built`).
        emit: sends an event.
    """
    prepare(request, emit)
    case = Case(**request["case"])
    workload = find_workload(case.workload)
    variant = VARIANTS[case.executed]
    batch = workload.make_batch(TIMED_SEED)
    weights = starting_weights(workload, WEIGHTS_SEED)
    if case.device == "cuda":
        # Creating the CUDA context takes 0.5 to 2 GB, and belongs to no variant.
        torch.zeros(1, device="cuda")
        synchronize("cuda")
        torch.cuda.reset_peak_memory_stats()
    baseline = memory.resident_bytes()
    peaks_known = memory.reset_peak()
    emit("stage", name="build")
    start = time.perf_counter()
    executable = execute(workload, variant, case.mode, case.device, weights)
    synchronize(case.device)
    build_s = time.perf_counter() - start
    prepared = executable.prepare(batch)
    emit("stage", name="first call")
    with executable.context():
        first_call_s = time_once(lambda: executable.call(prepared), case.device)
        compiled = evidence.compilation() if variant.compiler == "dynamo" else None
        emit("stage", name="steady calls")
        executable.call(prepared)
        peak = memory.peak_bytes() if peaks_known else None
        resident = memory.resident_bytes()
        memory.reset_peak()
        for _ in range(STEADY_CALLS):
            executable.call(prepared)
        synchronize(case.device)
        steady = memory.peak_bytes() if peaks_known else None
        seen = evidence.observe(lambda: executable.call(prepared), case.device, executable.runtime)
        remarks = executable.remarks(prepared)
    # What several cases need of the kernel is compiled in one of them; a user's first call waits for it in each.
    waited_s = build.saved_s(request.get("built", {}), usable_cores()) if variant.builds else 0.0
    found: dict[str, Any] = {
        "build_s": build_s,
        "first_call_s": first_call_s + waited_s,
        "memory_baseline_bytes": baseline,
        "ran_operators": seen.shown(),
        "ran_precision": " and ".join(seen.precisions),
        "ran_threads": seen.threads or torch.get_num_threads(),
        "evidence": evidence.explain(
            executable.variant, workload, case.device, seen, compiled, evidence.choices_of(executable.model)
        ),
    } | remarks
    found["evidence"] = "; ".join([found["evidence"], *executable.words()])
    if peak is not None and steady is not None:
        found["memory_peak_bytes"] = memory.above(max(peak, steady), baseline)
        found["memory_steady_bytes"] = memory.above(steady, resident)
    if case.device == "cuda":
        found["memory_cuda_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["memory_cuda_reserved_bytes"] = torch.cuda.max_memory_reserved()
    if compiled is not None:
        found |= {"graphs": compiled.graphs, "graph_breaks": compiled.breaks, "recompiles": compiled.recompiles}
        found["compile_s"] = compiled.seconds
    elif variant.builds:
        found["compile_s"] = build.spent_s() + waited_s
    emit("cold", fields=found, built=build.spent())
