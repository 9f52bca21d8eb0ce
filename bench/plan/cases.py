"""Suites, cases and groups: from a TOML file to the list of what will be measured.

A suite selects workloads, variants and modes. A `Case` is one of each; a `Group` holds the cases that differ in
variant alone, which are measured together. Nothing here imports torch: names come from the catalogue that a worker
gives.
"""

from __future__ import annotations

import codecs
import fnmatch
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import UsageError, meant
from bench.plan.identity import CaseKey
from bench.plan.validation import validate

SUITES = Path(__file__).parent.parent / "suites"
#: Modes that a suite has where it names none.
PASSES = ("inference", "training")
MODES = (*PASSES, "decode")
DEVICES = ("cpu", "cuda")
REFERENCE = "reference"
#: The two names of the one variant that a pair of the self-test measures.
BASE, OTHER = "base", "other"
#: How names of workloads of checkpoints begin; a path follows.
CHECKPOINT = "checkpoint:"
#: How names of workloads of the user's own model begin.
OWN = "own:"
#: Rounds a process gives at least: below 6, order statistics do not bound a median with 95 %.
LEAST_ROUNDS = 6


@dataclass(frozen=True)
class Sweep:
    """One axis of a workload, varied by itself.

    Attributes:
        axis: `batch`, `hidden`, `length`, `layers` or `beam`.
        values: sizes it takes, one workload each.
    """

    axis: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """Workloads x variants x modes.

    Attributes:
        workloads: names, overrides allowed (`seed@batch=64`), or patterns.
        variants: names or patterns; `name#label` lists a variant again under a second name.
        modes: of `MODES`; decoding is measured only if it is asked for.
        sweeps: axes to vary one at a time; every value makes a workload of its own.
        devices: of `DEVICES`; on another one the part is left out, as if it were not there.
    """

    workloads: tuple[str, ...]
    variants: tuple[str, ...] = ("*",)
    modes: tuple[str, ...] = PASSES
    sweeps: tuple[Sweep, ...] = ()
    devices: tuple[str, ...] = DEVICES


@dataclass(frozen=True)
class Quality:
    """A task that variants are trained on until they are good enough.

    Attributes:
        task: key of `seq2seq.tasks.registry.TASKS`.
        data: name of its data.
        variants: names or patterns.
        baseline: name of the score that the target is a share of, as the task's `evaluate` has it.
        target_share: quality to be reached, as a share of the baseline's.
        steps: at most.
        block: steps between two evaluations, in which one variant has its turn.
        batch: sequences in a batch.
        size: of the model, `small` or `full`.
        samples: paths of a forecast in an evaluation.
    """

    task: str
    data: str
    variants: tuple[str, ...]
    baseline: str
    target_share: float
    steps: int = 400
    block: int = 20
    batch: int = 64
    size: str = "full"
    samples: int = 20


@dataclass(frozen=True)
class Suite:
    """A named list of what to measure, and how long.

    Attributes:
        name: what it is called.
        summary: one line for people.
        budget_s: seconds of timed rounds, shared out evenly among the groups.
        interval: half-width of the speedup's 95 % interval at which a group stops early, as a share of the speedup.
        processes: seatings, each a full set of fresh worker processes, that a group gets at least.
        case_limit_s: seconds that a case may take to build, compile and pass the gate.
        block_s: least length of a timed block, seconds; a counter of energy that moves seldom needs long ones.
        device: `cpu` or `cuda`, or empty for every device that is there; the command line may say otherwise.
        second_instrument: whether its quick cases are timed again with pytest-benchmark.
        select: the parts.
        quality: what is trained until it is good enough, after all groups.
    """

    name: str
    summary: str
    select: tuple[Selection, ...]
    budget_s: float = 120.0
    interval: float = 0.02
    processes: int = 5
    case_limit_s: float = 120.0
    block_s: float = 0.02
    device: str = ""
    second_instrument: bool = False
    quality: tuple[Quality, ...] = ()


@dataclass(frozen=True)
class Case:
    """A row of the results before it is measured: workload, variant, mode, device and number of threads."""

    workload: str
    variant: str
    mode: str
    device: str
    threads: int
    sweep_axis: str = ""
    sweep_value: int | None = None

    @property
    def executed(self) -> str:
        """Name of the variant that runs: the name without its label."""
        return executed(self.variant)

    @property
    def key(self) -> CaseKey:
        """Key that distinguishes the case from all others of its run."""
        return CaseKey(self.workload, self.mode, self.device, self.threads, self.variant)

    @property
    def group(self) -> str:
        """Name of its group: everything but the variant."""
        return str(self.key.group)


@dataclass(frozen=True)
class Group:
    """Cases that differ only in their variant; the reference comes first if it is among them."""

    name: str
    cases: tuple[Case, ...]


def suite_names() -> tuple[str, ...]:
    """Names of the suites that come with the project."""
    return tuple(sorted(path.stem for path in SUITES.glob("*.toml")))


def load_suite(name: str) -> Suite:
    """The suite of a name, or of a TOML file.

    Raises:
        UsageError: for an unknown name, or a file that cannot be read or does not fit `Suite`.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            msg = f"no suite {name!r}; expected the path of a file that exists"
        else:
            msg = f"no suite {name!r}, and not the name of a .toml file; {meant(name, suite_names())}"
        raise UsageError(msg)
    try:
        data = tomllib.loads(_text(path.read_bytes()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"suite file {path} cannot be read: {error}"
        raise UsageError(msg) from error
    suite = validate(Suite, data, f"suite file {path}")
    _check(suite, path)
    return suite


def _text(raw: bytes) -> str:
    """The text of a TOML file: UTF-8, or what its byte order mark says, with any line ends."""
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if utf16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def overridden(suite: Suite, arguments: Mapping[str, Any]) -> Suite:
    """A suite with what the command line's options replace of it.

    Args:
        suite: as loaded.
        arguments: the options by name; one that is missing was not given.
    """
    if arguments.get("budget"):
        suite = replace(suite, budget_s=arguments["budget"])
    if arguments.get("block"):
        suite = replace(suite, block_s=arguments["block"])
    if arguments.get("no_second_instrument"):
        suite = replace(suite, second_instrument=False)
    return suite


def _check(suite: Suite, path: Path) -> None:
    """Check ranges that a type cannot express."""
    problems = [
        (0 < suite.budget_s < math.inf, f"budget_s is {suite.budget_s}, expected seconds above 0"),
        (0 < suite.interval < 1, f"interval is {suite.interval}, expected a share between 0 and 1"),
        (suite.processes >= 1, f"processes is {suite.processes}, expected at least 1"),
        (0 < suite.case_limit_s < math.inf, f"case_limit_s is {suite.case_limit_s}, expected seconds above 0"),
        (0 < suite.block_s < math.inf, f"block_s is {suite.block_s}, expected seconds above 0"),
        (suite.device in {"", *DEVICES}, f"device is {suite.device!r}, expected cpu or cuda, or none for both"),
        (bool(suite.select), "there is no [[select]] part, expected at least one"),
    ]
    for part in suite.select:
        unknown = set(part.modes) - set(MODES)
        advice = "; ".join(f"no mode {mode!r}, {meant(mode, MODES)}" for mode in sorted(unknown))
        problems.append((not unknown, advice))
        elsewhere = set(part.devices) - set(DEVICES)
        problems.append((not elsewhere, f"device {', '.join(sorted(elsewhere))} does not exist, expected cpu or cuda"))
        filled = bool(part.workloads and part.variants and part.modes and part.devices)
        problems.append((filled, "a [[select]] part is empty"))
    for trained in suite.quality:
        counts = min(trained.steps, trained.block, trained.batch, trained.samples)
        share = trained.target_share
        problems.append((counts >= 1, "a [[quality]] part has a count below 1"))
        problems.append((0 < share < 1, f"target_share is {share}, expected above 0 and below 1"))
        problems.append((bool(trained.variants), "a [[quality]] part has no variants"))
    for fine, message in problems:
        if not fine:
            msg = f"suite file {path}: {message}"
            raise UsageError(msg)


def split_name(workload: str) -> tuple[str, str]:
    """The name of a workload and its overrides; those of a checkpoint follow the last @, with no / after it."""
    if not workload.startswith(CHECKPOINT):
        name, _, overrides = workload.partition("@")
        return name, overrides
    name, _, overrides = workload.rpartition("@")
    return (name, overrides) if name and "/" not in overrides else (workload, "")


def match(patterns: Iterable[str], names: Sequence[str], what: str) -> list[str]:
    """Names that the patterns select, in the order of the patterns, each once.

    A pattern with `@` (overrides) or `#` (label) is taken as a name: only the part before is looked up. A workload of a
    checkpoint is a name as it is; whether there is one, the worker finds out.

    Raises:
        UsageError: for a pattern that selects nothing, or an empty label.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        if pattern.endswith("#"):
            msg = f"{what} {pattern!r} has an empty label; expected a name after #, or no #"
            raise UsageError(msg)
        if pattern.startswith(CHECKPOINT) and what == "workload":
            chosen[pattern] = None
            continue
        base = pattern.partition("@")[0].partition("#")[0]
        hits = [name for name in names if fnmatch.fnmatchcase(name, base)]
        if not hits and base.startswith(OWN) and not any(name.startswith(OWN) for name in names):
            msg = f"{pattern!r} is a model of your own: name it with --model FILE.py:FUNCTION"
            raise UsageError(msg)
        if not hits:
            advice = f"name each on its own: --{what} A --{what} B" if "," in base else meant(base.strip("*?"), names)
            msg = f"no {what} matches {pattern!r}; {advice}"
            raise UsageError(msg)
        suffix = pattern[len(base) :]
        chosen.update(dict.fromkeys(hit + suffix for hit in hits))
    return list(chosen)


@dataclass(frozen=True)
class Filters:
    """Filters of the command line that narrow a suite down; empty means no narrowing."""

    workloads: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    threads: int = 1
    device: str | None = None


def expand(suite: Suite, catalogue: dict[str, Any], filters: Filters) -> list[Group]:
    """The groups of a suite, narrowed by the filters.

    A workload or variant named on the command line replaces the suite's list, so that anything can be measured
    without a suite of its own. Speedups need the reference, so it joins every group.

    A device that was not asked for is left out where it is not there, and so are a suite's variants on a device that
    they do not exist on (`elsewhere` names them). What the command line names is never left out.

    Args:
        suite: what to expand.
        catalogue: names that exist, and what torch sees: `{"workloads": [{"name": ...}], "variants": [{"name": ...,
            "devices": [...]}], "torch": {"gpu": ...}}`.
        filters: what the command line said.

    Raises:
        UsageError: for a pattern that selects nothing.
    """
    devices = _devices(suite, catalogue, filters)
    parts = [(device, part) for device in devices for part in suite.select if device in part.devices]
    if not parts:
        names = " and ".join(devices)
        msg = f"the suite {suite.name} has nothing for {names}; give another --device or another --suite"
        raise UsageError(msg)
    if filters.workloads:
        # With a workload of the user's own, the other parts would only repeat it.
        parts = [next(found for found in parts if found[0] == device) for device in dict.fromkeys(d for d, _ in parts)]
    groups: dict[str, dict[str, Case]] = {}
    for device, part in parts:
        _expand(groups, part, device, catalogue, filters)
    return [Group(name, tuple(cases.values())) for name, cases in groups.items()]


def elsewhere(suite: Suite, catalogue: dict[str, Any], filters: Filters) -> dict[str, list[str]]:
    """Variants that a suite names and that are left out on each device, since they do not exist on it."""
    found: dict[str, list[str]] = {}
    for device in _devices(suite, catalogue, filters):
        names = [name for part in suite.select if device in part.devices for name in _absent(part, device, catalogue)]
        if names and not filters.variants:
            found[device] = list(dict.fromkeys(names))
    return found


def _devices(suite: Suite, catalogue: dict[str, Any], filters: Filters) -> tuple[str, ...]:
    """The devices to measure on: what was named, or those that are there."""
    named = filters.device or suite.device
    here = DEVICES if "gpu" in catalogue.get("torch", {}) else DEVICES[:1]
    return (named,) if named else here


def _absent(part: Selection, device: str, catalogue: dict[str, Any]) -> list[str]:
    """Variants of a part that do not exist on a device."""
    devices = {entry["name"]: entry.get("devices", DEVICES) for entry in catalogue["variants"]}
    return [name for name in match(part.variants, list(devices), "variant") if device not in devices[executed(name)]]


def executed(variant: str) -> str:
    """Name of the variant that runs under a name that may have a label."""
    return variant.partition("#")[0]


def _expand(
    groups: dict[str, dict[str, Case]], part: Selection, device: str, catalogue: dict[str, Any], filters: Filters
) -> None:
    """Add the cases of a part on a device to the groups."""
    workload_names = [entry["name"] for entry in catalogue["workloads"]]
    variant_names = [entry["name"] for entry in catalogue["variants"]]
    absent = [] if filters.variants else _absent(part, device, catalogue)
    # Modes that a workload supports, if it lists them; a mode that was asked for by name is tried anyway.
    modes = {} if filters.modes else {w["name"]: w["modes"] for w in catalogue["workloads"] if "modes" in w}
    narrowed = replace(
        part,
        workloads=filters.workloads or part.workloads,
        variants=filters.variants or part.variants,
        modes=filters.modes or part.modes,
        sweeps=() if filters.workloads else part.sweeps,
    )
    variants = [name for name in match(narrowed.variants, variant_names, "variant") if name not in absent]
    added = [entry["name"] for entry in catalogue["variants"] if entry.get("added")]
    variants += [name for name in added if name not in variants]
    if REFERENCE in variant_names and REFERENCE not in variants:
        variants.insert(0, REFERENCE)
    variants.sort(key=lambda name: name != REFERENCE)
    for workload, axis, value in _workloads(narrowed, workload_names):
        for mode in (mode for mode in narrowed.modes if mode in modes.get(workload, MODES)):
            for variant in variants:
                case = Case(workload, variant, mode, device, filters.threads, axis, value)
                cases = groups.setdefault(case.group, {})
                # A workload listed by name may also be a value of a sweep: one case, which keeps the sweep's axis.
                if variant not in cases or not cases[variant].sweep_axis:
                    cases[variant] = case


def _workloads(part: Selection, names: Sequence[str]) -> Iterable[tuple[str, str, int | None]]:
    """Workload names of a part with the axis and value of their sweep."""
    for workload in match(part.workloads, names, "workload"):
        if not part.sweeps:
            yield workload, "", None
        for sweep in part.sweeps:
            for value in sweep.values:
                joint = "," if split_name(workload)[1] else "@"
                yield f"{workload}{joint}{sweep.axis}={value}", sweep.axis, value
