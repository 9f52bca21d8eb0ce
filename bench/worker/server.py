"""The child process: everything that needs torch. Requests and answers are JSON, one per line, in pipes of their own.

The file descriptors of these pipes are its arguments, and its own child processes do not inherit them; everything that
is printed goes to the log. A request ends with an event `done` or `failed`. A crash here ends only this process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch

from bench.gate.audit import Audit
from bench.gate.kept import KeptQuantities

# Imported to register how own models are executed and judged.
from bench.gate.own_model import gate_for
from bench.machine import environment
from bench.machine.energy import counter_if_any
from bench.machine.facts import known
from bench.plan.cases import Case
from bench.records.schema import Status
from bench.run.worker_process import PROTOCOL, plugin_paths
from bench.timing import seat
from bench.worker import ceilings, cold
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED, gated, refuse_replaced
from bench.worker.script_sources import sources_read_once
from kernels.cpu import build
from seq2seq.data.errors import DataUnavailableError
from seq2seq.execution.executable import execute
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.base import Extent
from seq2seq.models.cost import built_parameters, cost, decoding, valid_steps
from seq2seq.own_model import catalogue as own_model
from seq2seq.own_model.workload import OwnWorkload
from seq2seq.runtimes.export import EXPORTS
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import WORKLOADS, find_workload
from seq2seq.workloads.workload import Workload

Emit = Callable[..., None]

#: Messages of a lack of memory in plain RuntimeErrors: of the CPU allocator, CUDA, Triton, cuBLAS and cuDNN.
_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def catalogue(request: dict[str, Any], emit: Emit) -> None:
    """Names of all workloads and variants, and facts about this torch."""
    del request
    workloads = [{"name": w.name, "summary": w.summary, "source": w.source, "data": w.data} for w in WORKLOADS.values()]
    variants = [
        {"name": v.name, "summary": v.summary, "devices": v.devices, "precision": v.precision, "needs": v.needs}
        | {"added": bool(v.make)}
        for v in VARIANTS.values()
    ]
    own = own_model.findings(lambda name: emit("stage", name=name)) if own_model.names() else None
    emit(
        "catalogue",
        workloads=workloads + own_model.entries(),
        variants=variants,
        torch=torch_facts(),
        software=environment.software(),
        own_model=own,
    )


def torch_facts() -> dict[str, Any]:
    """Versions and devices that only torch itself knows."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": _built_with(r"MKL-DNN v(\S+)") if torch.backends.mkldnn.is_available() else "not built in",
        "openmp": _built_with(r"OpenMP (\d+)"),
        "blas": _built_with(r"BLAS_INFO=(\w+)"),
        "compiler": _built_with(r"- ((?:GCC|Clang|MSVC) [\d.]+)"),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "none",
    }
    if torch.cuda.is_available():
        facts["cudnn"] = known(torch.backends.cudnn.version)
        facts["gpu"] = known(torch.cuda.get_device_name)
        facts["gpu_memory_bytes"] = known(
            lambda: torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        )
        facts["gpu_capability"] = known(lambda: ".".join(map(str, torch.cuda.get_device_capability())))
    return {name: value for name, value in facts.items() if value is not None}


def _built_with(pattern: str) -> str:
    """Find a fact in torch's own description of its build."""
    found = re.search(pattern, torch.__config__.show())
    return found[1] if found else "unknown"


def describe(request: dict[str, Any], emit: Emit) -> None:
    """For each case: facts of its row that are known beforehand, and why it cannot run, if it cannot.

    Args:
        request: `cases`; whether to `build` what variants need, the only way to know that it can be built; and
            `ended`, why cases cannot run of which the check ended a worker before, by place.
        emit: sends an event.
    """
    ended = request.get("ended", {})
    workloads: dict[str, dict[str, Any]] = {}
    for place, fields in enumerate(request["cases"]):
        case = Case(**fields)
        # A converter that crashes or hangs takes this process along; the parent then knows which it was.
        emit("stage", name=f"checking whether {case.variant} can run", variant=case.variant)
        if case.workload not in workloads:
            workloads[case.workload] = _facts_of(case.workload)
        facts = dict(workloads[case.workload])
        reason = facts.pop("unavailable")
        extent = facts.pop("extent", None)
        if case.mode == "decode" and extent is not None:
            extent, more = _decoded(find_workload(case.workload), extent)
            facts |= more
        variant = VARIANTS[case.executed].here()
        start = time.perf_counter()
        reason = reason or ended.get(str(place)) or _refusal(variant, case, build=request["build"])
        # What answers for another runtime converts the user's own model to know.
        converts_s = time.perf_counter() - start if variant.runtime is not None else 0.0
        facts |= {"precision": variant.precision} | _cost_of(case, variant, extent)
        facts["omp_wait"] = variant.environment.get("OMP_WAIT_POLICY", facts["omp_wait"]).lower()
        seated = {"alone": variant.alone and case.device == "cpu", "environment": dict(variant.environment)}
        compiled = {"compiles": variant.compiles_long, "builds": bool(variant.builds), "built": build.spent()}
        emit(
            "described",
            facts=facts,
            reason=reason,
            imports=cold.imports(case),
            converts_s=converts_s,
            **compiled,
            **seated,
        )


def _decoded(workload: Workload, extent: Extent) -> tuple[Extent, dict[str, int]]:
    """The extent of decoding a workload's batch, and what is known of it beforehand: every sequence takes all steps."""
    steps = workload.decoded_steps or 1
    facts = {"beam": workload.beam, "valid_steps": extent.source_steps + extent.sequences * steps}
    return decoding(extent, steps, workload.beam), facts


def _cost_of(case: Case, variant: Variant, extent: Extent | None) -> dict[str, int]:
    """Least FLOPs and bytes of a call; nothing where the data is missing."""
    if extent is None:
        return {}
    stored, computed = variant.stored_bytes(case.mode), variant.dtype.itemsize
    config = find_workload(case.workload).config
    return dataclasses.asdict(cost(config, extent, case.mode, stored_bytes=stored, computed_bytes=computed))


def _refusal(variant: Variant, case: Case, *, build: bool) -> str | None:
    """Reason why a variant cannot run; a requirement that itself raises refuses only its own variant."""
    try:
        return variant.why_not(case.device, case.mode, find_workload(case.workload), build=build)
    except Exception as error:  # noqa: BLE001 - requirements probe machines, and may raise anything
        return f"its requirement could not be checked: {classify(error)[1]}"


def _facts_of(name: str) -> dict[str, Any]:
    return facts_of(find_workload(name)) | {"omp_wait": os.environ.get("OMP_WAIT_POLICY", "default").lower()}


@functools.singledispatch
def facts_of(workload: Any) -> dict[str, Any]:
    """Facts of a workload's rows, with the reason why it cannot run (`unavailable`) or the `extent` of its batch."""
    config = workload.config
    facts: dict[str, Any] = {
        "model": config.family,
        "data": workload.data,
        "source": workload.source,
        "batch": workload.batch,
        "source_steps": workload.source_steps,
        "target_steps": workload.decoded_steps,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "unavailable": None,
    }
    try:
        facts["parameters"] = built_parameters(config)
        extent = Extent.of(workload.make_batch(TIMED_SEED))
        facts |= {"valid_steps": valid_steps(config, extent), "extent": extent}
    # A model that its library does not build is a ValueError too.
    except (DataUnavailableError, ValueError) as error:
        facts["unavailable"] = str(error)
    return facts


@facts_of.register(OwnWorkload)
def _(workload: OwnWorkload) -> dict[str, Any]:
    return workload.facts()


def measure_ceilings(request: dict[str, Any], emit: Emit) -> None:
    """Measure the limits of this machine."""
    emit("ceilings", **ceilings.measure(request["device"]))


def measure_steps(request: dict[str, Any], emit: Emit) -> None:
    """Measure how fast this GPU's programs can take steps together."""
    del request
    emit("steps", **ceilings.steps())


def sit(request: dict[str, Any], emit: Emit) -> None:
    """Make cases of a group ready for their turns: build, gate, warm up.

    Args:
        request: `cases`, the `seed` of the gate's problem, and whether to `audit` the timed calls too; optional are
            the least length of timed blocks (`block_s`), whether turns read the counter of `energy`, and the folder in
            which processes of the group keep `truth` and exported models for each other.
        emit: sends an event.
    """
    emit("stage", name="weights and batch")
    cases = [Case(**fields) for fields in request["cases"]]
    for case in cases:
        cold.import_needed(case)
    workload = find_workload(cases[0].workload)
    gate = gate_for(workload, cases[0].mode, cases[0].device)
    kept = Path(request["truth"]) if request.get("truth") else None
    gate.kept = KeptQuantities(kept) if kept else None
    EXPORTS.folder = kept
    weights = starting_weights(workload, WEIGHTS_SEED)
    batch = workload.make_batch(TIMED_SEED)
    audit = Audit(gate, weights, batch) if request["audit"] else None
    refuse_replaced("a plugin")
    for case in cases:
        emit("stage", name="build and gate", variant=case.variant)
        variant = VARIANTS[case.executed]
        with sources_read_once():
            executable = execute(workload, variant, case.mode, case.device, weights)
        prepared = executable.prepare(batch)
        # A timed step takes no gradients of inputs: what the first seating found of them holds for the same code.
        judged = functools.partial(gated, gate, audit, executable, prepared, of_inputs=audit is not None)
        verdict = judged(request["seed"], warm=False)
        emit("gate", variant=case.variant, when="before", **verdict)
        if not verdict["passed"]:
            continue
        subject = seat.Subject(functools.partial(executable.call, prepared), executable.context)
        emit("stage", name="warm-up", variant=case.variant)
        counter = counter_if_any(case.device) if request.get("energy") else None
        calls = seat.warm_up(subject, case.device, request.get("block_s", seat.BLOCK_S))
        seat.READY[case.variant] = seat.Ready(subject, calls, case.device, counter)
        _checks[case.variant] = functools.partial(judged, warm=True)
        refuse_replaced(case.variant)


#: Gates of the ready variants for after the rounds, by variant; each takes a seed.
_checks: dict[str, Callable[[int], dict[str, Any]]] = {}


def turn(request: dict[str, Any], emit: Emit) -> None:
    """Take one turn of the variant that is ready under a name."""
    emit("turn", **seat.READY[request["name"]].turn().fields())


def stand(request: dict[str, Any], emit: Emit) -> None:
    """Gate the ready variants again, after the rounds."""
    # Whichever variant did it, all were timed by it, so all of the seat are refused.
    refuse_replaced("a variant, in the rounds,")
    for name, check in _checks.items():
        emit("stage", name="gate after the rounds", variant=name)
        emit("gate", variant=name, when="after", **check(request["seed"]))


def selftest(request: dict[str, Any], emit: Emit) -> None:
    """Serve the requests of `python -m bench selftest`; not loaded otherwise."""
    from bench.worker import selftest as probe  # noqa: PLC0415

    getattr(probe, request["part"])(request, emit)


def quality(request: dict[str, Any], emit: Emit) -> None:
    """A variant's training, block by block; not loaded otherwise."""
    from bench.worker import quality as quality_worker  # noqa: PLC0415

    quality_worker.quality(request, emit)


def serving(request: dict[str, Any], emit: Emit) -> None:
    """Serve the requests of `python -m bench serve`; not loaded otherwise."""
    from bench.worker import serving as served  # noqa: PLC0415
    from bench.worker import step_server  # noqa: F401, PLC0415 - registers itself

    served.serving(request, emit)


REQUESTS: dict[str, Callable[[dict[str, Any], Emit], None]] = {
    "catalogue": catalogue,
    "describe": describe,
    "ceilings": measure_ceilings,
    "steps": measure_steps,
    "prepare": cold.prepare,
    "cold": cold.cold,
    "sit": sit,
    "turn": turn,
    "stand": stand,
    "selftest": selftest,
    "quality": quality,
    "serving": serving,
}


def classify(error: BaseException) -> tuple[Status, str]:
    """Status and one-line reason of an exception."""
    text = " ".join(str(error).split())[:500]
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in _NO_MEMORY):
        return Status.OOM, reason
    return Status.ERROR, reason


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""

    def emit(event: str, **fields: Any) -> None:
        answers.write(json.dumps({"event": event, **fields}) + "\n")
        answers.flush()

    emit("hello", pid=os.getpid(), protocol=PROTOCOL)
    for line in requests:
        request = json.loads(line)
        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        try:
            own_model.know(request.get("own_checked", {}))
            own_model.add_variants()
            REQUESTS[request["request"]](request, emit)
        except Exception as error:  # noqa: BLE001 - whatever a variant raises becomes its record
            import traceback  # noqa: PLC0415

            traceback.print_exc()
            status, reason = classify(error)
            emit("failed", status=status, reason=reason)
        else:
            emit("done")


def load_plugins(paths: Iterable[str]) -> None:
    """Run files that add variants or workloads of their own to the registries."""
    for number, path in enumerate(paths):
        spec = importlib.util.spec_from_file_location(f"bench_plugin_{number}", path)
        if spec is None or spec.loader is None:
            msg = f"plugin {path} is not a Python file"
            raise ImportError(msg)
        module = importlib.util.module_from_spec(spec)
        # Registered before it runs, as an import does: dataclasses and pickle look their module up there.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            # For a file in UTF-16, its message names neither the file nor the cause.
            msg = f"plugin {path} is not Python in UTF-8: {type(error).__name__}: {error}"
            raise ImportError(msg) from error


def main(requests: str, answers: str) -> int:
    """Serve; the arguments are descriptors."""
    for stream in (sys.stdout, sys.stderr):
        # A log takes whatever is printed, in any language.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for descriptor in (requests, answers):
        os.set_inheritable(int(descriptor), False)
    load_plugins(plugin_paths())
    with os.fdopen(int(requests), encoding="utf-8") as asked, os.fdopen(int(answers), "w", encoding="utf-8") as told:
        serve(asked, told)
    return 0
