"""Resuming a run: what it leaves in its folder so that it can be finished, and what must still be the same then.

`plan.json` holds the suite as it was and the cases that it gave; `environment.json` the options, the machine and the
software. Figures of one run are compared with each other, so a resumed run must be on the same machine and libraries.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.plan import own_model
from bench.plan.cases import Case, Suite, load_suite, overridden
from bench.plan.identity import CaseKey
from bench.plan.validation import validate
from bench.records import durable
from bench.records.folder import RunFolder
from bench.run.worker_process import PLUGINS

#: Gates and rounds count on from a run's seed; two parts of a run start at least so far apart.
SEED_ROOM = 100_000
SEEDS = 2**31
#: What of the machine and the software may change the figures. Packages that only draw are left out.
_MACHINE = ("architecture", "processor", "cores_physical", "cores_logical", "affinity", "cpu_quota", "gpu")
_THREADS = ("workers", "inherited")
DRAWS_ONLY = frozenset({"pandas", "matplotlib", "pytest-benchmark"})
#: Options that say how to run, not what: nothing of them is kept.
PASSING = frozenset({"command", "resume", "dry_run", "out", "time_limit", "more", "quiet", "json"})


@dataclass(frozen=True)
class Begun:
    """A run that was begun.

    Attributes:
        folder: where.
        facts: its environment.json.
        suite: what it measures, as it was then.
        cases: the cases that the suite gave.
        words: its options, as command-line words.
    """

    folder: RunFolder
    facts: dict[str, Any]
    suite: Suite
    cases: tuple[Case, ...]
    words: tuple[str, ...]

    @property
    def suite_word(self) -> str:
        """Value of `--suite`."""
        return str(self.facts["run"]["arguments"].get("suite", self.suite.name))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the parts so far."""
        return [part["seed"] for part in self._parts]

    @property
    def spent_s(self) -> float:
        """Seconds of rounds in the parts so far; a part that was killed left no account of its time."""
        accounts = [part.get("own_time_s") or {} for part in self._parts]
        return sum(float(account.get(kind, 0.0)) for account in accounts for kind in ("timed rounds", "waiting"))

    @property
    def _parts(self) -> list[dict[str, Any]]:
        return [self.facts["run"], *self.facts.get("resumes", [])]


def kept_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run as plain values that hold from any folder, for environment.json."""
    kept = {name: value for name, value in arguments.items() if name not in PASSING}
    if str(kept.get("suite")).endswith(".toml"):
        kept["suite"] = Path(kept["suite"])
    return {name: _plain(value) for name, value in kept.items()}


def given_options(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the options that a command line gave, but those in `PASSING` that go with `--resume`."""
    given = [name for name, value in arguments.items() if value is not None and value is not False and value != []]
    return [name for name in given if name not in PASSING - {"out"}]


def begun(path: Path) -> Begun:
    """The run that was begun in a folder.

    Raises:
        UsageError: when there is none, or its files are not as a run writes them.
    """
    if not path.is_dir():
        msg = f"{path} is not a folder; --resume takes the folder of a run that was interrupted"
        raise UsageError(msg)
    if not (path / "environment.json").is_file():
        unused = all(map(durable.is_bookkeeping, path.iterdir()))
        advice = f"start one with --out {path}" if unused else "name the folder of a run, or start a new one"
        msg = f"{path} holds no run that was begun (environment.json is missing); {advice}"
        raise UsageError(msg)
    facts, plan = _read(path / "environment.json"), _read(path / "plan.json")
    if isinstance(run := facts.get("run"), dict) and "hosts" in run:
        sweep = shlex.quote(str(path.resolve().parents[2]))
        msg = f"{path} was put together by a sweep; finish that: python -m bench sweep --resume {sweep}"
        raise UsageError(msg)
    try:
        words = tuple(_words(facts["run"]["arguments"]))
        cases = tuple(validate(Case, case, f"{path / 'plan.json'}: cases") for case in plan["cases"])
        found = Begun(RunFolder(path), facts, validate(Suite, plan["suite"], str(path / "plan.json")), cases, words)
        _ = found.seeds, found.spent_s, found.facts["run"]["suite"]
        for section in (facts["machine"], facts["software"], *(facts["threads"][kind] for kind in _THREADS)):
            section.items()
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{path} was not written by this release ({type(error).__name__}: {error}); resume it with its own"
        raise UsageError(msg) from error
    return found


def check(run: Begun, cases: Iterable[Case], facts: Mapping[str, Any]) -> None:
    """Refuse to continue if the figures could not be compared with those recorded.

    Args:
        run: as it was begun.
        cases: what the suite gives now.
        facts: machine, software, threads and plugins now.

    Raises:
        UsageError: naming the first thing that differs.
    """
    now = list(cases)
    if now != list(run.cases):
        differs = next((c for c in (*run.cases, *now) if (c in run.cases) != (c in now)), now[0])
        where = "the run" if differs in run.cases else "what the suite gives now"
        msg = f"the case {differs.group} {differs.variant} is only in {where}"
        raise UsageError(_refusal(run, msg))
    then = run.facts
    # Earlier releases did not record the quota.
    machine = {"cpu_quota": facts["machine"].get("cpu_quota")} | then["machine"]
    pairs = [(f"machine: {n}", machine.get(n), facts["machine"].get(n)) for n in _MACHINE]
    names = dict.fromkeys((*then["software"], *facts["software"]))
    pairs += [(n, then["software"].get(n), facts["software"].get(n)) for n in names if n not in DRAWS_ONLY]
    for kind in _THREADS:
        old, new = then["threads"][kind], facts["threads"][kind]
        # The user's files are compared with each other by their content.
        files = {PLUGINS, own_model.VARIABLE}
        pairs += [(n, old.get(n), new.get(n)) for n in dict.fromkeys((*old, *new)) if n not in files]
    old, new = then["run"].get("plugins", {}), facts["plugins"]
    pairs += [(f"plugin {n}", old.get(n), new.get(n)) for n in dict.fromkeys((*old, *new))]
    for name, before, after in pairs:
        if before != after:
            raise UsageError(_refusal(run, f"{name} was {before}, is {after}"))


def remarks(run: Begun, commit: str) -> list[str]:
    """Differences from the beginning that do not forbid continuing, one per line."""
    said = []
    try:
        same = overridden(load_suite(run.suite_word), run.facts["run"].get("arguments", {})) == run.suite
    except UsageError:
        same = False
    if not same:
        said.append(f"the suite {run.suite_word} has changed; the run continues with the suite as it was")
    if commit != (before := run.facts.get("git", {}).get("commit", commit)):
        said.append(f"the run began with commit {before[:12]} of this project and continues with {commit[:12]}")
    return said


def recorded(run: Begun) -> frozenset[CaseKey]:
    """The cases that stay recorded: all but the measured ones of a group that was not recorded as a whole.

    A group is measured together and recorded in one piece. Where that piece was torn, the speedups of what is missing
    could not be compared in the same rounds, so the group is measured again.

    Raises:
        UsageError: when the records are broken, or are not those of the run's cases, each once.
    """
    found: dict[CaseKey, dict[str, Any]] = {}
    planned = {case.key for case in run.cases}
    for values in run.folder.records():
        key = CaseKey.read(values)
        if key not in planned or key in found:
            what = "is recorded twice" if key in found else "is recorded, but is not a case of the run"
            msg = f"{run.folder.records_path}: {key} {what}; nothing was changed"
            raise UsageError(msg)
        found[key] = values
    torn = {case.group for case in run.cases if case.key not in found}
    return frozenset(key for key, values in found.items() if values["group"] not in torn or not _was_measured(values))


def plugin_digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each plugin, by its full name."""
    return {str(path.resolve()): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def new_seed(used: Iterable[int] = ()) -> int:
    """A seed whose successors are none of those of earlier parts of the run."""
    taken = list(used)
    while True:
        seed = random.randrange(SEEDS)  # noqa: S311 - not a secret
        if all(SEED_ROOM < (seed - other) % SEEDS < SEEDS - SEED_ROOM for other in taken):
            return seed


def _was_measured(values: Mapping[str, Any]) -> bool:
    """Return whether a case came through its cold run, which finds this figure, and so joined its group's rounds."""
    return values["first_call_s"] is not None


def _refusal(run: Begun, what: str) -> str:
    return f"{run.folder.path} cannot be resumed, since {what}; nothing was changed: begin a new run"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); the run cannot be resumed"
        raise UsageError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds {type(found).__name__}, expected an object; the run cannot be resumed"
        raise UsageError(msg)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value.resolve()) if isinstance(value, Path) else value


def _words(options: Mapping[str, Any]) -> Iterable[str]:
    """Options as command-line words, so that the command line's own grammar checks and reads them."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, list):
            yield from (f"{option}={entry}" for entry in value)
        elif value is not None and value is not False:
            yield f"{option}={value}"
