"""Environment of a run: the machine, the software, the threads, the source tree, and the load before and after."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from bench.machine.facts import known
from kernels.host.cores import cpu_quota

PACKAGES = ("torch", "triton", "numpy", "scipy", "pandas", "matplotlib", "pytest-benchmark", "onnxruntime", "openvino")
#: Governor of a system that has none, or does not say.
UNKNOWN = "unknown on this system"
_THREAD_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_")
ROOT = Path(__file__).parent.parent.parent
_CPU = Path("/sys/devices/system/cpu/cpu0")


def describe(torch_facts: dict[str, Any], worker_environment: dict[str, str]) -> dict[str, Any]:
    """Everything about the machine and the software, as nested plain values.

    Args:
        torch_facts: what a worker found out from torch itself.
        worker_environment: variables set for the workers.
    """
    return {
        "machine": machine(),
        "software": software() | torch_facts,
        "threads": {
            "workers": worker_environment,
            "inherited": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_THREAD_VARIABLES)},
        },
        "git": git(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, caches, governor, cores, affinity, quota, memory and GPU; what cannot be had is left out."""
    cpu: dict[str, Any] = known(_cpu_info) or {}
    facts: dict[str, Any] = {
        "system": known(platform.platform),
        "architecture": known(platform.machine),
        "processor": cpu.get("brand_raw") or known(platform.processor) or known(platform.machine) or "unknown",
        "stepping": _stepping(cpu),
        "vector_flags": _vector_flags(cpu.get("flags")),
        "cores_physical": known(lambda: psutil.cpu_count(logical=False)),
        "cores_logical": known(psutil.cpu_count),
        "affinity": known(lambda: psutil.Process().cpu_affinity()),
        # In a word, since runs with and without a limit differ, and None would be left out as what is not known.
        "cpu_quota": known(lambda: cpu_quota() or "none"),
        "memory_bytes": known(lambda: psutil.virtual_memory().total),
        "frequency_mhz": known(lambda: round(psutil.cpu_freq().current)),
        "caches": known(_caches),
        "microcode": known(_microcode),
        "governor": _read(_CPU / "cpufreq/scaling_governor") or UNKNOWN,
        "gpu": _gpu(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _cpu_info() -> dict[str, Any]:
    import cpuinfo  # noqa: PLC0415 - optional

    return dict(cpuinfo.get_cpu_info())


def _stepping(cpu: dict[str, Any]) -> str | None:
    """Family, model and stepping of a processor in its maker's numbers; None where they are not known."""
    numbers = [f"{name} {cpu[name]}" for name in ("family", "model", "stepping") if cpu.get(name) is not None]
    return ", ".join(numbers) or None


def _vector_flags(flags: Any) -> list[str] | None:
    """Flags of a processor that name vector instructions; None if no flags are known."""
    if not isinstance(flags, list):
        return None
    return [flag for flag in flags if str(flag).startswith(("avx", "amx", "fma", "asimd", "sve"))]


def software() -> dict[str, Any]:
    """Python and the packages that can change a number."""
    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
        else:
            # Broken metadata has none, or raises.
            versions[name] = known(lambda found=found: found.version) or "unknown to its metadata"  # type: ignore[misc]
    return versions


def load() -> dict[str, Any]:
    """Measure how busy the machine is: load averages, the CPU share in use over a fifth of a second, free memory."""
    facts = {
        "load_1_5_15_min": known(lambda: [round(value, 2) for value in psutil.getloadavg()]),
        "cpu_percent": known(lambda: psutil.cpu_percent(interval=0.2)),
        "memory_available_bytes": known(lambda: psutil.virtual_memory().available),
    }
    return {name: value for name, value in facts.items() if value is not None}


def git(root: Path | None = None) -> dict[str, Any]:
    """Commit of a source tree, ours by default, and whether it was changed since."""
    root = root or ROOT
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    if not commit:
        return {"commit": "not a git checkout"}
    changed = _run("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": bool(changed), "changed_files": len((changed or "").splitlines())}


def _gpu() -> str:
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    return _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "none"


def _microcode() -> str | None:
    """Revision of the processor's microcode (Linux)."""
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("microcode")), None)


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(_CPU.glob("cache/index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level} {(kind or '').lower()}".strip()] = size
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _run(*command: str) -> str | None:
    """Output of a command, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
