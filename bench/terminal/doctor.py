"""`python -m bench doctor`: check what this machine has and lacks for measuring, and say what to do."""

from __future__ import annotations

import enum
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from bench import units
from bench.console import Console
from bench.machine import energy, environment
from bench.machine.facts import known
from bench.machine.interference import SHARE
from bench.run.worker_process import ROOT, Settings, Worker, WorkerError, scratch_folder
from kernels.host.cores import cpu_quota, usable_cores

EXIT_OK, EXIT_MISSING = 0, 1
#: Name of the check for other programs that use the machine.
NOISE = "other load"
ASK_LIMIT_S, LOOK_S = 120.0, 1.0
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 2e9, 2e9
#: Packages that a suite needs, and those that add variants.
NEEDED = ("jinja2", "matplotlib", "pandas", "plotly", "pydantic", "pytest_benchmark", "vega_datasets")
PEERS = ("onnx", "onnxruntime", "openvino", "transformers")


class FactState(enum.StrEnum):
    """State of one thing that was checked.

    Only MISSING makes the exit code 1. LIMITED means fewer variants or wider intervals. BUSY passes by itself: a run
    works now too, and marks the figures that were disturbed. UNKNOWN is what the system does not say.
    """

    OK = "ok"
    LIMITED = "limited"
    BUSY = "busy"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class MachineCheck:
    """One thing that was checked.

    Attributes:
        name: of the thing.
        state: its state.
        found: what is there, in words.
        remedy: what to do; empty if nothing needs to be done.
    """

    name: str
    state: FactState
    found: str
    remedy: str = ""


def doctor() -> int:
    """Check the machine, print a table and warn if it is busy; return 1 if a run lacks something it needs, else 0."""
    console = Console()
    found = list(checks())
    rows = [[check.name, check.state.value, check.found, check.remedy] for check in found]
    console.table(["checked", "state", "found", "what to do"], rows)
    busy = [check for check in found if check.state is FactState.BUSY]
    for check in busy:
        console.say(f"warning: the machine is busy ({check.found}): figures measured now would be doubtful", "yellow")
    missing = [check.name for check in found if check.state is FactState.MISSING]
    if missing:
        console.say(f"not ready; missing: {', '.join(missing)}", "red")
        return EXIT_MISSING
    console.say("everything a run needs is available" if busy else "ready to measure", "green")
    return EXIT_OK


def checks() -> Iterator[MachineCheck]:
    """All checks, in the order of the table."""
    yield packages("packages of the suite", NEEDED, FactState.MISSING, "nox -s bench installs them")
    yield from torch_checks(ask())
    yield compiler()
    yield packages("other runtimes", PEERS, FactState.LIMITED, "pip install onnx onnxruntime openvino transformers")
    yield cores()
    yield governor(environment.machine())
    yield memory(psutil.virtual_memory().available)
    yield disk(shutil.disk_usage(ROOT).free)
    yield energy_counter()
    yield noise()


def ask() -> dict[str, Any] | str:
    """Return what a worker reports about torch, or the reason why it does not answer."""
    try:
        with scratch_folder() as folder, Worker(Settings(usable_cores()), folder / "log", folder) as worker:
            (found,) = worker.ask("catalogue", ASK_LIMIT_S)
    except WorkerError as error:
        return error.reason
    torch: dict[str, Any] = found["torch"]
    return torch


def torch_checks(told: dict[str, Any] | str) -> Iterator[MachineCheck]:
    """Check torch, oneDNN, the GPU and Triton."""
    if isinstance(told, str):
        yield MachineCheck("torch", FactState.MISSING, told, "install torch 2.11 or newer into this environment")
        return
    yield MachineCheck("torch", FactState.OK, f"{told['torch']}, {told.get('cpu_capability', 'unknown capability')}")
    onednn = str(told.get("onednn", "not built in"))
    without = onednn == "not built in"
    advice = "install a build of torch with oneDNN: onednn and amp-bf16 need it" if without else ""
    yield MachineCheck("oneDNN", FactState.LIMITED if without else FactState.OK, onednn, advice)
    gpu = told.get("gpu")
    if gpu:
        yield MachineCheck("GPU", FactState.OK, f"{gpu}, CUDA {told['cuda']}, cuDNN {told.get('cudnn', 'unknown')}")
    else:
        card = environment.machine().get("gpu", "none")
        advice = "install a CUDA build of torch" if card != "none" else "not needed to measure on the CPU"
        yield MachineCheck("GPU", FactState.LIMITED, f"torch sees none (nvidia-smi: {card})", advice)
    triton = importlib.util.find_spec("triton") is not None
    found = "installed" if triton else "not installed"
    advice = "" if triton and gpu else "Triton's kernels need a GPU"
    yield MachineCheck("Triton", FactState.OK if triton else FactState.LIMITED, found, advice)


def packages(name: str, wanted: tuple[str, ...], state: FactState, remedy: str) -> MachineCheck:
    """Check that packages can be imported."""
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        return MachineCheck(name, state, f"{', '.join(missing)} not installed", remedy)
    return MachineCheck(name, FactState.OK, "all installed")


def compiler() -> MachineCheck:
    """Check for a C++ compiler, which cpu-fused and torch.compile need."""
    names = ("cl",) if sys.platform == "win32" else ("g++", "clang++")
    there = next((path for name in names if (path := shutil.which(name))), None)
    if there:
        return MachineCheck("C++ compiler", FactState.OK, there)
    remedy = "install g++ or clang++ (apt-get install g++): cpu-fused and torch.compile need one"
    return MachineCheck("C++ compiler", FactState.LIMITED, f"none of {', '.join(names)} is on the PATH", remedy)


def cores() -> MachineCheck:
    """Check the cores that affinity and quota leave."""
    usable, there, quota = usable_cores(), psutil.cpu_count() or 1, known(cpu_quota)
    found = f"{usable} of {there} cores usable" + (f", quota {quota:g}" if quota else ", no quota")
    if quota and quota < there:
        advice = "a quota stops threads that spin: use --threads no larger than the quota, or remove the quota"
        return MachineCheck("cores", FactState.LIMITED, found, advice)
    return MachineCheck("cores", FactState.OK, found)


def governor(machine: dict[str, Any]) -> MachineCheck:
    """Check the governor of the clock frequency."""
    found = str(machine.get("governor", environment.UNKNOWN))
    if found == environment.UNKNOWN:
        return MachineCheck("governor", FactState.UNKNOWN, "this system does not say")
    if found in {"powersave", "ondemand", "conservative", "schedutil"}:
        return MachineCheck(
            "governor", FactState.LIMITED, found, "for a steady clock: cpupower frequency-set -g performance"
        )
    return MachineCheck("governor", FactState.OK, found)


def memory(available: float) -> MachineCheck:
    """Check the free memory."""
    enough = available >= LEAST_MEMORY_BYTES
    advice = "" if enough else "stop other programs: a worker with several variants takes 1 to 2 GB"
    return MachineCheck(
        "memory", FactState.OK if enough else FactState.MISSING, f"{units.megabytes(available)} available", advice
    )


def disk(free: float) -> MachineCheck:
    """Check the disk space for results and caches."""
    enough = free >= LEAST_DISK_BYTES
    advice = "" if enough else "free some space: compiler caches and results take a few hundred MB"
    return MachineCheck("disk", FactState.OK if enough else FactState.LIMITED, f"{units.megabytes(free)} free", advice)


def energy_counter() -> MachineCheck:
    """Check for a counter of the processor's energy that can be read."""
    try:
        found = energy.counter("cpu")
    except energy.EnergyUnavailableError as error:
        return MachineCheck("energy", FactState.LIMITED, str(error), "runs report no CPU energy")
    return MachineCheck("energy", FactState.OK, found.name)


def noise() -> MachineCheck:
    """Check what else is using the machine at this moment."""
    before, own = psutil.cpu_times(), psutil.Process().cpu_times()
    psutil.cpu_percent(interval=LOOK_S)
    after, own_after = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = (after.idle - before.idle) + getattr(after, "iowait", 0.0) - getattr(before, "iowait", 0.0)
    all_s = sum(after[:8]) - sum(before[:8])
    own_s = own_after.user + own_after.system - own.user - own.system
    cores_there = psutil.cpu_count() or 1
    busy = max(0.0, (all_s - idle - own_s) / max(all_s, 1e-9) * cores_there)
    return judged_noise(busy, getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0))


def judged_noise(busy: float, stolen_s: float) -> MachineCheck:
    """Judge the cores that other programs use, and the time that the hypervisor took."""
    found = f"other programs use {busy:.2f} cores" + (f"; the hypervisor took {stolen_s:.2f} s" if stolen_s > 0 else "")
    if busy > SHARE:
        advice = (
            "wait, or stop other programs (see top): a run repeats disturbed rounds, and marks figures it has to doubt"
        )
        return MachineCheck(NOISE, FactState.BUSY, found, advice)
    return MachineCheck(NOISE, FactState.OK, found)
