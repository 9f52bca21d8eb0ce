"""Rules for comparing two runs: the facts of machine, software, threads and problem that must agree.

A difference in one of them would look like a difference of the code. So the comparison is refused, and each difference
is listed with both values. Facts that matter less (governor, frequency, system) give a warning. The commit is allowed
to differ, since that is what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import units
from bench.plan import own_model
from bench.records.schema import Record

Environment = Mapping[str, Any]

#: Keys of a section of environment.json that must agree.
MACHINE = ("processor", "architecture", "vector_flags", "cores_physical", "cores_logical", "gpu")
SOFTWARE = (
    "python",
    "torch",
    "triton",
    "numpy",
    "cuda",
    "cudnn",
    "onednn",
    "blas",
    "openmp",
    "compiler",
    "cpu_capability",
    "onnxruntime",
    "openvino",
)
#: What the line of nvidia-smi says besides name and memory: it may change on one machine.
GPU_STATE = ("driver", "highest clock", "power limit")
#: Columns that say what a workload's name stood for when it was measured.
PROBLEM = (
    "precision",
    "batch",
    "source_steps",
    "target_steps",
    "hidden_size",
    "num_layers",
    "parameters",
)
#: A kernel's update changes the memory it leaves by far less, another machine by more.
MEMORY_SHARE = 0.02
#: The clock is read once, idle or not.
FREQUENCY_SHARE = 0.10
MISSING, DIRTY = "not recorded", " with uncommitted changes"
#: Set by every run from its options: threads are compared themselves, files by their content.
_OWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SEQ2SEQ_BENCH_PLUGINS", own_model.VARIABLE)


@dataclass(frozen=True)
class Difference:
    """A fact in which two runs differ, with both values as text.

    Attributes:
        what: the fact.
        base, new: its values; of two lists, what only this one has, empty if that is nothing.
        lists: whether they are lists.
    """

    what: str
    base: str
    new: str
    lists: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        """`torch 2.13.0 against 2.12.0`; of lists, `vector_flags: only in NEW: amx_bf16 amx_tile`."""
        return self.told("BASE", "NEW")

    def told(self, base_name: str, new_name: str) -> str:
        """Return the difference in words, with names for the runs."""
        if not self.lists:
            return f"{self.what} {self.base} against {self.new}"
        sides = ((base_name, self.base), (new_name, self.new))
        return f"{self.what}: {', '.join(f'only in {side}: {items}' for side, items in sides if items)}"


def threads(records: Iterable[Record]) -> tuple[int, ...]:
    """The thread counts of a run; one, unless it was put together by hand."""
    return tuple(sorted({record.threads for record in records}))


def differences(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Differences that keep two runs from being compared, judged only by their environment.json."""
    if not base or not new:
        return (Difference("environment.json", *("recorded" if side else MISSING for side in (base, new))),)
    return (*_host(base, new, MACHINE), *software(base, new), *_settings(base, new))


def hardware(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Differences by which two runs are of two machines, or of one with other settings; software is left aside."""
    if not base or not new:
        return differences(base, new)
    gpu = _differing("gpu", *(", ".join(_gpu(_section(side, "machine"))[0]) for side in (base, new)))
    same = tuple(key for key in MACHINE if key != "gpu")
    return (*_host(base, new, same), *_present([gpu]), *_settings(base, new))


def software(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Packages and libraries that have other versions."""
    sides = _section(base, "software"), _section(new, "software")
    return _present(_differing(key, sides[0].get(key), sides[1].get(key)) for key in SOFTWARE)


def state(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Differences of one machine from day to day: system, microcode, driver, governor, clock.

    What a release did not record may have been anything, and is no difference.
    """
    sides = _section(base, "machine"), _section(new, "machine")
    found = [_differing(key, sides[0].get(key), sides[1].get(key)) for key in ("system", "governor")]
    if all("microcode" in side for side in sides):
        found.append(_differing("microcode", *(side["microcode"] for side in sides)))
    found += [
        _differing(f"GPU {what}", old, new)
        for what, old, new in zip(GPU_STATE, *(_gpu(side)[1] for side in sides), strict=True)
    ]
    clocks = [side.get("frequency_mhz") for side in sides]
    if not _near(clocks[0], clocks[1], FREQUENCY_SHARE):
        found.append(_differing("frequency (MHz)", *clocks))
    return _present(found)


def _host(base: Environment, new: Environment, keys: Iterable[str]) -> tuple[Difference, ...]:
    """Differences in facts of the machine, and in what of it could be used."""
    sides = _section(base, "machine"), _section(new, "machine")
    found = [_differing(key, sides[0].get(key), sides[1].get(key)) for key in keys]
    found += [_quota(base, new), _memory(base, new), _differing("usable cores", _usable(base), _usable(new))]
    return _present(found)


def _settings(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Variables about threads that differ."""
    sides = _variables(base), _variables(new)
    names = sorted({*sides[0], *sides[1]})
    return _present(_differing(name, *(side.get(name, "unset") for side in sides)) for name in names)


def problem_differences(base: Record, new: Record) -> tuple[Difference, ...]:
    """Differences that keep two records of one identity from being compared: their names stood for other problems."""
    name = f"{base.workload} {base.variant} {base.mode}:"
    return _present(_differing(f"{name} {key}", getattr(base, key), getattr(new, key)) for key in PROBLEM)


def warnings(base: Environment, new: Environment) -> tuple[str, ...]:
    """Differences that may matter, and do not keep two runs from being compared."""
    gpu = {f"GPU {what}" for what in GPU_STATE}
    return tuple(str(difference) for difference in state(base, new) if difference.what not in gpu)


def plugins(base: Environment, new: Environment) -> tuple[str, ...]:
    """Differences between the plugins of two runs, which can be the cause of a change.

    Files are compared by content, so a plugin that was only moved is the same. Runs of releases that did not record
    plugins can have had any.
    """
    return tuple(map(str, _plugins(base, new)))


def code(base: Environment, new: Environment) -> tuple[Difference, ...]:
    """Differences of what was measured: commit and plugins; with uncommitted changes it may have been anything."""
    sides = [_commit(side) for side in (base, new)]
    changed = sides[0] != sides[1] or DIRTY in sides[1]
    return (*([Difference("commit", *sides)] if changed else ()), *_plugins(base, new))


def _plugins(base: Environment, new: Environment) -> tuple[Difference, ...]:
    runs = _section(base, "run"), _section(new, "run")
    if not all("plugins" in run for run in runs):
        return ()
    sides = [_section(run, "plugins") for run in runs]
    base_only, new_only = (
        _named({path: digest for path, digest in side.items() if digest not in other.values()})
        for side, other in (sides, sides[::-1])
    )
    names = sorted({*base_only, *new_only})
    return tuple(
        Difference(f"plugin {name}", base_only.get(name, "none"), new_only.get(name, "none")) for name in names
    )


def _named(digests: Mapping[str, Any]) -> dict[str, str]:
    """Short digests by the name of their file."""
    found: dict[str, list[str]] = {}
    for path, digest in digests.items():
        found.setdefault(Path(path).name, []).append(str(digest)[:10])
    return {name: " and ".join(shorts) for name, shorts in found.items()}


def source(environment: Environment) -> str:
    """Describe what a run measured, as `commit 1a2b3c4 with uncommitted changes, plugin mine.py 5e6f7a8b9c`."""
    plugged = _named(_section(_section(environment, "run"), "plugins"))
    named = (f"plugin {name} {digest}" for name, digest in plugged.items())
    return ", ".join([f"commit {_commit(environment)}", *named])


def _commit(environment: Environment) -> str:
    git = _section(environment, "git")
    name = str(git.get("commit", MISSING))
    short = name[:10] if " " not in name else name
    return f"{short}{DIRTY if git.get('dirty') else ''}"


def _section(environment: Environment, name: str) -> Mapping[str, Any]:
    found = environment.get(name)
    return found if isinstance(found, Mapping) else {}


def _present(found: Iterable[Difference | None]) -> tuple[Difference, ...]:
    return tuple(difference for difference in found if difference)


def _gpu(machine: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the GPU by name and memory, and its state as in `GPU_STATE`, from the line of nvidia-smi."""
    parts = [part.strip() for part in str(machine.get("gpu", "none")).split(",")]
    if len(parts) != 2 + len(GPU_STATE):
        return (str(machine.get("gpu", "none")),), ("none",) * len(GPU_STATE)
    name, driver, memory, clock, limit = parts
    return (name, memory), (driver, clock, limit)


def _differing(what: str, base: Any, new: Any) -> Difference | None:
    if base == new:
        return None
    if isinstance(base, list) and isinstance(new, list):
        # Of two long lists, only what one has and the other lacks is news.
        base, new = ([item for item in mine if item not in theirs] for mine, theirs in ((base, new), (new, base)))
        only = (" ".join(map(str, items)) for items in (base, new))
        return Difference(what, *only, lists=True) if base or new else None
    return Difference(what, _text(base), _text(new))


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def _quota(base: Environment, new: Environment) -> Difference | None:
    """Another share of the cores given to the container; runs of releases that did not record it may have had any."""
    sides = [_section(side, "machine") for side in (base, new)]
    if not all("cpu_quota" in side for side in sides):
        return None
    return _differing("CPU quota", *(side["cpu_quota"] for side in sides))


def _memory(base: Environment, new: Environment) -> Difference | None:
    sizes = [_section(side, "machine").get("memory_bytes") for side in (base, new)]
    if _near(sizes[0], sizes[1], MEMORY_SHARE):
        return None
    return Difference(
        "memory", *(units.megabytes(size) if isinstance(size, int | float) else _text(size) for size in sizes)
    )


def _near(base: Any, new: Any, share: float) -> bool:
    """Return whether two figures agree within a share of the larger one; so do two that were not recorded."""
    if isinstance(base, int | float) and isinstance(new, int | float):
        return abs(base - new) <= share * max(base, new)
    return bool(base == new)


def _usable(environment: Environment) -> int | None:
    affinity = _section(environment, "machine").get("affinity")
    return len(affinity) if isinstance(affinity, list) else None


def _variables(environment: Environment) -> dict[str, str]:
    """Variables about threads as the workers saw them: their own over inherited ones."""
    found = _section(environment, "threads")
    merged = {**_section(found, "inherited"), **_section(found, "workers")}
    return {name: value for name, value in merged.items() if name not in _OWN_VARIABLES}
