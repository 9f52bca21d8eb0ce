"""The artefact of a recommendation: written, loaded in a fresh process, gated and timed there, and only then kept."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import units
from bench.analysis.figures import speedup as speedup_of
from bench.analysis.intervals import Interval
from bench.console import Console
from bench.errors import UsageError
from bench.plan import own_model
from bench.plan.cases import OWN, REFERENCE, Case
from bench.recommend.answer import Advice, Recommendation
from bench.recommend.chances import chances
from bench.recommend.question import EQUIVALENT, Objective
from bench.records.reader import RecordedRun
from bench.records.rounds import Samples
from bench.run.seating import Place, Seating
from bench.run.worker_process import ROOT, Event, Settings, Worker, WorkerError, scratch_folder
from bench.timing.rounds import rounds
from kernels.host.output import utf8, write_new

PLUGIN = Path(__file__).parent.parent / "worker" / "artefact_plugin.py"
ARTEFACT = "artefact"
#: The line of an artefact's source that gives way to its proof.
PROOF = "(not proven)"
#: Seconds of rounds: where the first do not decide, the second are taken.
BUDGETS_S = (5.0, 20.0)
LIMIT_S, RECIPE_LIMIT_S = 600.0, 300.0
EXIT_OK, EXIT_REFUSED, EXIT_NOTHING, EXIT_UNCLEAR = 0, 1, 3, 5
SEED = 1


@dataclass(frozen=True)
class Recipe:
    """An artefact before it is proven.

    Attributes:
        source: its text.
        alone: whether the variant takes its turns in a process of its own.
        environment: variables that its process must be started with.
    """

    source: str
    alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class ProofError(Exception):
    """An artefact that does not hold what the run promised; the text says what."""


class UntimedError(ProofError):
    """An artefact that is right, and whose time could not be measured."""


class SlowerError(ProofError):
    """An artefact that is right, and slower than the variant it was made from."""


@dataclass(frozen=True)
class Proof:
    """Findings about an artefact in a fresh process.

    Attributes:
        error, limit: of the quantity nearest to its limit.
        speedup: over the baseline, in the same rounds; None where nothing of torch runs the model.
        excess: its time over that of the variant it was made from, in the same rounds.
    """

    error: float
    limit: float
    speedup: Interval | None
    excess: Interval

    def text(self) -> str:
        """The findings in one line."""
        than = f"{_ratio(self.excess)} the time of the variant it was made from"
        if self.speedup is not None:
            than = f"{_ratio(self.speedup)} the baseline's speed"
        return f"loaded in a fresh process: error {units.error(self.error)} (limit {units.error(self.limit)}), {than}"


def _ratio(found: Interval) -> str:
    return units.ratio_interval(found.value, found.low, found.high)


def write(
    run: RecordedRun,
    answer: Advice,
    out: Path,
    *,
    chosen: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Write the artefact of an answer, or of a chosen variant of its group, if it holds.

    Args:
        run: that was asked.
        answer: for one group.
        out: Python file, a new one unless `overwrite`.
        chosen: a variant to write whatever the answer is.
        overwrite: whether to replace a file that is there, once the new one is proven.
        quiet: print nothing but errors.

    Returns:
        The exit code of the command.

    Raises:
        UsageError: `out` exists, has no folder or is not a Python file, the chosen variant is not one that ran, or a
            file of the user's own model is gone.
    """
    own = own_model.given(run.environment) if answer.key[0].startswith(OWN) else None
    # A link is followed: what the artefact names is found from where it really lies.
    out = Path(os.path.realpath(out))
    if reason := refusal(out, overwrite=overwrite, theirs=own_model.files(own) if own else ()):
        msg = f"--apply {out}: {reason}"
        raise UsageError(msg)
    console = Console()
    if chosen is not None and chosen not in answer.commits:
        msg = (
            f"--variant {chosen}: it has no `ok` result in {answer.title}; expected one of {', '.join(answer.commits)}"
        )
        raise UsageError(msg)
    if chosen is None and answer.verdict is not Recommendation.RECOMMENDED:
        console.say(
            f"nothing is written: the answer is {answer.verdict}; --variant NAME writes a variant of your choice"
        )
        return EXIT_NOTHING if answer.verdict is Recommendation.NONE else EXIT_UNCLEAR
    case = Case(answer.key[0], chosen or str(answer.variant), *answer.key[1:])
    for path in own_model.missing(own) if own else ():
        msg = f"--apply: {path}, which {run.path} measured, no longer exists; put it back, or measure again"
        raise UsageError(msg)
    try:
        found = recipe(case, out, own)
        proof = prove(found, case, out, own, baseline=REFERENCE in answer.commits)
        if chosen is None:
            refuse_slower(proof)
    except ProofError as error:
        print(f"error: {case.variant} cannot be applied: {error}; nothing is written", file=sys.stderr)
        return EXIT_UNCLEAR if isinstance(error, UntimedError) else EXIT_REFUSED
    with_proof = utf8(found.source.replace(PROOF, f"\nOf {run.path.name}; {proof.text()}.", 1))
    if overwrite:
        with _aside(out, with_proof) as aside:
            if out.exists():
                shutil.copymode(out, aside)
            aside.replace(out)
    else:
        write_new({out: with_proof})
    if not quiet:
        console.say(f"written: {out}; {proof.text()}", "bold")
    return EXIT_OK


def refuse_slower(proof: Proof) -> None:
    """Refuse a recommended artefact that is certainly slower than the baseline.

    Raises:
        ProofError: with its speed.
    """
    if proof.speedup is not None and proof.speedup.high * (1 + EQUIVALENT) < 1:
        msg = f"here and now it has {_ratio(proof.speedup)} the baseline's speed, unlike in the run; measure again"
        raise ProofError(msg)


def refusal(out: Path, *, overwrite: bool, theirs: Collection[str] = ()) -> str | None:
    """Reason why an artefact cannot be written to a path, or None.

    Args:
        out: the path, without links.
        overwrite: whether a file that is there may be replaced.
        theirs: files that the artefact is made from, which are never replaced.
    """
    if out.suffix != ".py" or out.is_dir():
        return "is a folder; name a Python file" if out.is_dir() else "does not end in .py; name a Python file"
    if not out.parent.is_dir():
        return f"there is no folder {out.parent}; make it, or name another"
    if any(out == Path(os.path.realpath(path)) for path in theirs):
        return "the run measured what this file defines, and the artefact needs it; name another file"
    if out.exists() and not overwrite:
        return "exists, and nothing is overwritten without --overwrite; name a new Python file"
    if _is_library(out.stem):
        return f"run as a program it would hide the module {out.stem} from its own imports; choose another name"
    return None


def _is_library(name: str) -> bool:
    """Return whether a module of this name is Python's, installed, or this project's."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or name in sys.stdlib_module_names:
        return found is not None
    origin = Path(found.origin or ROOT)
    return origin.is_relative_to(ROOT) or bool({"site-packages", "dist-packages"} & set(origin.parts))


@contextmanager
def _aside(out: Path, content: bytes) -> Iterator[Path]:
    """A hidden file next to another, so that relative paths hold there too; removed unless it was moved."""
    path = out.with_name(f".{os.getpid()}.{out.name}")
    write_new({path: content})
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def recipe(case: Case, out: Path, own: Mapping[str, Any] | None = None) -> Recipe:
    """The artefact, unproven.

    Args:
        case: to make it from.
        out: where the file will be.
        own: what the run's command line said of the user's own model; None for a workload of the suite's.

    Raises:
        ProofError: there is none, with the reason.
    """
    words = [case.workload, case.variant, case.mode, case.device]
    program = "artefact_recipe"
    variables = {}
    if own is not None:
        words += [str(case.threads), str(out.resolve())]
        program, variables = "own_artefact_recipe", {own_model.VARIABLE: json.dumps(own)}
    found = _ran([sys.executable, "-m", f"bench.worker.{program}", *words], "making the recipe", variables)
    made: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return Recipe(made["source"], made["alone"], made["environment"])


def prove(
    recipe: Recipe, case: Case, out: Path, own: Mapping[str, Any] | None = None, *, baseline: bool = True
) -> Proof:
    """Load an artefact in a fresh process, gate it, time it with its variant and the baseline, and gate it again.

    Args:
        recipe: the artefact.
        case: the one it was made from.
        out: where the file will be; for the proof it is written beside that.
        own: as for `recipe`.
        baseline: whether the baseline ran, so that there is something to be faster than.

    Raises:
        ProofError: it does not run, is not right, or is certainly slower than the variant it was made from.
    """
    with scratch_folder() as folder, _aside(out, utf8(recipe.source)) as path:
        _ran([sys.executable, str(path)], "running it", recipe.environment)
        names = [*([REFERENCE] if baseline else []), case.variant, ARTEFACT]
        cases = {name: dataclasses.replace(case, variant=name) for name in names}
        if own is None:
            # The plugin finds the file by these.
            named = {"SEQ2SEQ_BENCH_ARTEFACT": str(path), "SEQ2SEQ_BENCH_ARTEFACT_OF": case.executed}
            settings = Settings(case.threads, plugins=(PLUGIN,), environment=tuple(named.items()))
        else:
            added = own["variants"] | {ARTEFACT: f"{path.resolve()}:apply"}
            settings = Settings(case.threads, own_model=json.dumps({**own, "variants": added}))
        if recipe.alone:
            # The baseline of a run has no such variables.
            seats = [Place((found,), recipe.environment if name != REFERENCE else {}) for name, found in cases.items()]
        else:
            seats = [Place(tuple(cases.values()))]
        try:
            return _first_proof(settings, seats, folder, case.variant, baseline=baseline)
        except WorkerError as error:
            raise ProofError(error.reason) from error


def _first_proof(settings: Settings, seats: list[Place], folder: Path, variant: str, *, baseline: bool) -> Proof:
    """The findings of a short measurement, or of a long one where that did not decide."""
    short, long = BUDGETS_S
    try:
        return judged(*_measured(settings, seats, folder, short), variant, baseline=baseline)
    except (UntimedError, SlowerError):
        # A busy minute can slow one of two equal ways in every round of a short measurement.
        return judged(*_measured(settings, seats, folder, long), variant, baseline=baseline)


def judged(gates: list[dict[str, object]], samples: Samples, variant: str, *, baseline: bool = True) -> Proof:
    """Findings from the events of the gate and from the rounds.

    Raises:
        UntimedError: its time has no estimate.
        SlowerError: it is certainly slower than its variant.
        ProofError: the gate refused the artefact, or it was not timed.
    """
    own = [event for event in gates if event["variant"] == ARTEFACT]
    refused = next((event for event in own if not event["passed"]), None)
    if refused is not None:
        msg = f"its results are wrong: {refused['reason']} (gate {refused['when']} the rounds)"
        raise ProofError(msg)
    names = [name for name in dict.fromkeys((REFERENCE, variant, ARTEFACT)) if samples.times(name)]
    speedup = speedup_of(samples, REFERENCE, ARTEFACT) if baseline else None
    if ARTEFACT not in names or variant not in names or (baseline and speedup is None):
        msg = "it, or the variant it was made from, was not timed"
        raise ProofError(msg)
    excess = chances(samples, names, Objective.P50).excess(ARTEFACT, variant)
    known = [found for found in (excess, speedup) if found is not None]
    if not all(units.estimated(found.low, found.high) for found in known):
        msg = "its results are right, but its time could not be measured: other processes used the machine; try again"
        raise UntimedError(msg)
    if excess.low > 1 + EQUIVALENT:
        msg = f"it takes {_ratio(excess)} the time of the variant it was made from, in the same rounds"
        raise SlowerError(msg)
    worst = max(own, key=lambda event: float(str(event["strain"])))
    return Proof(float(str(worst["parity_error"])), float(str(worst["parity_limit"])), speedup, excess)


def _measured(
    settings: Settings, seats: list[Place], folder: Path, budget_s: float
) -> tuple[list[dict[str, object]], Samples]:
    """The gate's events, and rounds in which all take turns."""
    gates: list[dict[str, object]] = []

    def told(event: Event) -> None:
        if event["event"] == "gate":
            gates.append(event)

    def start(of_place: Settings) -> Worker:
        return Worker(of_place, folder / "worker.log", folder / "cache")

    with Seating(seats, start, settings, LIMIT_S, told) as seating:
        seating.sit(SEED)
        taken = list(rounds(seating.players, seats[0].cases[0].device, budget_s, SEED)) if seating.players else []
        seating.stand(SEED + 1)
    return gates, Samples([taken])


def _ran(words: list[str], doing: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A program that was run in a process of its own.

    Raises:
        ProofError: it failed, with its last line, or took too long.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        found = subprocess.run(  # noqa: S603 - our own module, or the file that was just written
            words,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | dict(variables),
            capture_output=True,
            text=True,
            timeout=RECIPE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"{doing} took more than {RECIPE_LIMIT_S:g} s"
        raise ProofError(msg) from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        msg = last if found.returncode == 1 and "recipe" in doing else f"{doing} failed: {last}"
        raise ProofError(msg)
    return found
