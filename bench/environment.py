"""What the run ran on: the machine, the software, the threads, the source tree, and the load before and after."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "triton", "numpy", "scipy", "pandas", "matplotlib", "pytest-benchmark", "onnxruntime", "openvino")
_THREAD_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_")
ROOT = Path(__file__).parent.parent
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
    """Processor, caches, governor, cores, affinity, memory and GPU."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "processor": platform.processor() or platform.machine(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "caches": _caches(),
        "governor": _read(_CPU / "cpufreq/scaling_governor") or "not told by this system",
        "gpu": _gpu(),
    }
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        facts["affinity"] = process.cpu_affinity()
    with contextlib.suppress(ImportError):
        import cpuinfo  # noqa: PLC0415 - optional

        info = cpuinfo.get_cpu_info()
        facts["processor"] = info.get("brand_raw", facts["processor"])
        facts["vector_flags"] = [
            flag for flag in info.get("flags", []) if flag.startswith(("avx", "amx", "fma", "asimd", "sve"))
        ]
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    if frequency is not None:
        facts["frequency_mhz"] = round(frequency.current)
    return facts


def software() -> dict[str, Any]:
    """Python and the packages that can change a number."""
    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def load() -> dict[str, Any]:
    """How busy the machine is now: load averages and the CPU share in use over a fifth of a second."""
    averages = [round(value, 2) for value in psutil.getloadavg()]
    return {
        "load_1_5_15_min": averages,
        "cpu_percent": psutil.cpu_percent(interval=0.2),
        "memory_available_bytes": psutil.virtual_memory().available,
    }


def git() -> dict[str, Any]:
    """Commit of the source tree, and whether it was changed since."""
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return {"commit": "not a git checkout"}
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain")
    return {"commit": commit, "dirty": bool(changed), "changed_files": len((changed or "").splitlines())}


def _gpu() -> str:
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    return _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "none"


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
    except OSError:
        return None


def _run(*command: str) -> str | None:
    """Output of a command, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
