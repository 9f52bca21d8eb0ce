"""Kinds of hosts: machines whose figures belong in one run folder, since the same hardware and software computes there.

A kind is identified by processor model and stepping, caches, instruction sets, cores, quota and GPU, and by the
versions of the packages that compute. Clock rates do not count: they change from minute to minute on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import environment
from bench.run.resume import DRAWS_ONLY, plugin_digests
from kernels.host.cores import usable_cores

#: Facts of the machine that decide what computes. The memory's size, microcode and governor do not.
COMPUTES = (
    "architecture",
    "processor",
    "stepping",
    "caches",
    "vector_flags",
    "cores_physical",
    "cores_logical",
    "cpu_quota",
    "gpu",
)
#: Of a running system, and of an installed one, which copies of a disk image share.
MACHINE_IDS = (Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id"))
#: The code that measures and is measured.
_CODE = ("bench", "seq2seq", "kernels")
_SUFFIXES = frozenset({".py", ".toml", ".cpp", ".c", ".h"})
#: A maker's name for a model may end in its nominal clock rate: `CPU @ 2.20GHz`.
_CLOCK = re.compile(r"\s*@\s*[0-9.]+\s*[GM]Hz", re.IGNORECASE)
_NAME_LENGTH = 32


@dataclass(frozen=True)
class HostKind:
    """Hosts that are alike in all that computes.

    Attributes:
        key: readable name with a digest, which is a folder's name too.
        facts: what the hosts have in common.
        threads: CPU threads that a unit gets there unless the command line says otherwise.
    """

    key: str
    facts: Mapping[str, Any]
    threads: int

    def told(self) -> str:
        """The kind in words, for people."""
        facts = self.facts
        caches = facts.get("caches") or {}
        last = f", {list(caches)[-1]} {list(caches.values())[-1]}" if caches else ""
        quota = facts.get("cpu_quota")
        limit = f", quota {quota}" if quota not in {None, "none"} else ""
        gpu = f", {facts['gpu']}" if facts.get("gpu", "none") != "none" else ""
        return (
            f"{facts.get('processor')} ({facts.get('stepping', 'stepping unknown')}), {facts.get('usable_cores')} "
            f"cores{limit}{last}{gpu}, torch {facts.get('software', {}).get('torch')}"
        )


def kind_of(told: Mapping[str, Any]) -> HostKind:
    """The kind of a host, from what `describe` found there."""
    machine = told["machine"]
    facts = {name: machine[name] for name in COMPUTES if name in machine}
    facts["processor"] = _CLOCK.sub("", str(facts.get("processor", "unknown"))).strip()
    facts["gpu"] = gpu_models(str(facts.get("gpu", "none")))
    facts["usable_cores"] = told["usable_cores"]
    facts["software"] = {name: version for name, version in told["software"].items() if name not in DRAWS_ONLY}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", facts["processor"].lower())).strip("-")
    key = f"{name[:_NAME_LENGTH].strip('-')}-{told['usable_cores']}c-{digest}"
    return HostKind(key, facts, int(told["usable_cores"]))


def gpu_models(lines: str) -> str:
    """Name and memory of each GPU, without driver, clock and power limit, from the lines of nvidia-smi."""
    parts = [[part.strip() for part in line.split(",")] for line in lines.splitlines()]
    return "; ".join(f"{found[0]}, {found[2]}" if len(found) > 2 else found[0] for found in parts)  # noqa: PLR2004


def describe(plugins: Sequence[str]) -> dict[str, Any]:
    """Describe this host and the code on it as plain values; takes a second of one core.

    Args:
        plugins: paths of files that add variants; one that is not here has no digest.
    """
    return {
        "hostname": platform.node(),
        "machine_id": machine_id(),
        "machine": environment.machine(),
        "software": environment.software(),
        "usable_cores": usable_cores(),
        "code": code_digest(environment.ROOT),
        "commit": environment.git()["commit"],
        "plugins": list(plugin_digests(path for path in map(Path, plugins) if path.is_file()).values()),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }


def machine_id() -> str:
    """Text that no other machine has, the same in every container of one; empty where the system has none."""
    for path in MACHINE_IDS:
        with contextlib.suppress(OSError):
            if found := path.read_text(encoding="ascii").strip():
                return found
    return ""


def code_digest(root: Path) -> str:
    """SHA-256 over the files of a checkout that measure or are measured: changes that are not committed count."""
    found = hashlib.sha256()
    files = (path for room in _CODE for path in (root / room).rglob("*") if path.suffix in _SUFFIXES)
    for path in sorted(files):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()
