"""The artefact of a recommendation: written, loaded in a fresh process, gated and timed there, and only then kept."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import units
from bench.analysis.figures import speedup as speedup_of
from bench.analysis.intervals import Interval
from bench.console import Console
from bench.errors import UsageError
from bench.plan.cases import REFERENCE, Case
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
#: Seconds of rounds: where the first do not decide, the second are taken.
BUDGETS_S = (5.0, 20.0)
LIMIT_S, RECIPE_LIMIT_S = 600.0, 300.0
EXIT_OK, EXIT_REFUSED, EXIT_NOTHING, EXIT_UNCLEAR = 0, 1, 3, 5
SEED = 1


class ProofError(Exception):
    """An artefact that does not hold what the run promised; the text says what."""


class UntimedError(ProofError):
    """An artefact that is right, and whose time could not be measured."""


@dataclass(frozen=True)
class Proof:
    """Findings about an artefact in a fresh process.

    Attributes:
        error, limit: of the quantity nearest to its limit.
        speedup: over the baseline, in the same rounds.
        excess: its time over that of the variant it was made from, in the same rounds.
    """

    error: float
    limit: float
    speedup: Interval
    excess: Interval

    def text(self) -> str:
        """The findings in one line."""
        return (
            f"loaded in a fresh process: error {units.error(self.error)} (limit {units.error(self.limit)}), "
            f"{units.ratio_interval(self.speedup.value, self.speedup.low, self.speedup.high)} the baseline's speed"
        )


def write(run: RecordedRun, answer: Advice, out: Path, *, chosen: str | None = None, quiet: bool = False) -> int:
    """Write the artefact of an answer, or of a chosen variant of its group, if it holds.

    Args:
        run: that was asked.
        answer: for one group.
        out: new Python file.
        chosen: a variant to write whatever the answer is.
        quiet: print nothing but errors.

    Returns:
        The exit code of the command.

    Raises:
        UsageError: `out` exists or is not a Python file, or the chosen variant is not one that ran.
    """
    if out.suffix != ".py" or out.exists():
        what = "exists, and nothing is overwritten" if out.exists() else "does not end in .py"
        msg = f"--apply {out}: {what}; name a new Python file"
        raise UsageError(msg)
    console = Console()
    if chosen is not None and chosen not in answer.commits:
        msg = f"--variant {chosen}: it did not end ok in {answer.title}; expected one of {', '.join(answer.commits)}"
        raise UsageError(msg)
    if chosen is None and answer.verdict is not Recommendation.RECOMMENDED:
        console.say(f"nothing is written: the answer is {answer.verdict}; --variant NAME writes one of your choice")
        return EXIT_NOTHING if answer.verdict is Recommendation.NONE else EXIT_UNCLEAR
    variant = chosen or str(answer.variant)
    workload, mode, device, threads = answer.key
    try:
        source = recipe(workload, variant, mode, device)
        proof = prove(source, Case(workload, variant, mode, device, threads))
    except ProofError as error:
        print(f"error: {variant} cannot be applied: {error}; nothing is written", file=sys.stderr)
        return EXIT_UNCLEAR if isinstance(error, UntimedError) else EXIT_REFUSED
    with_proof = source.replace("makes one call.\n", f"makes one call.\n\nOf {run.path.name}; {proof.text()}.\n", 1)
    write_new({out: utf8(with_proof)})
    if not quiet:
        console.say(f"written: {out}; {proof.text()}", "bold")
    return EXIT_OK


def recipe(workload: str, variant: str, mode: str, device: str) -> str:
    """The artefact's source text.

    Raises:
        ProofError: there is none, with the reason.
    """
    words = [sys.executable, "-m", "bench.worker.artefact_recipe", workload, variant, mode, device]
    found = _ran(words, "making the recipe")
    return found.stdout


def prove(source: str, case: Case) -> Proof:
    """Load an artefact in a fresh process, gate it, time it beside its variant and the baseline, and gate it again.

    Args:
        source: its text.
        case: the one it was made from.

    Raises:
        ProofError: it does not run, is not right, or is surely slower than the variant it was made from.
    """
    with scratch_folder() as folder:
        path = folder / f"{ARTEFACT}.py"
        path.write_bytes(utf8(source))
        _ran([sys.executable, str(path)], "running it")
        names = dict.fromkeys((REFERENCE, case.variant, ARTEFACT))
        cases = tuple(dataclasses.replace(case, variant=name) for name in names)
        # The plugin finds the file by these.
        named = {"SEQ2SEQ_BENCH_ARTEFACT": str(path), "SEQ2SEQ_BENCH_ARTEFACT_OF": case.executed}
        try:
            settings = Settings(case.threads, plugins=(PLUGIN,))
            return _first_proof(settings, Place(cases, named), folder, case.variant)
        except WorkerError as error:
            raise ProofError(error.reason) from error


def _first_proof(settings: Settings, place: Place, folder: Path, variant: str) -> Proof:
    """The findings of a short measurement, or of a long one where that did not decide."""
    short, long = BUDGETS_S
    try:
        return judged(*_measured(settings, place, folder, short), variant)
    except UntimedError:
        return judged(*_measured(settings, place, folder, long), variant)


def judged(gates: list[dict[str, object]], samples: Samples, variant: str) -> Proof:
    """Findings from the events of the gate and from the rounds.

    Raises:
        UntimedError: its time has no estimate.
        ProofError: the gate refused the artefact, or it is surely slower than its variant.
    """
    own = [event for event in gates if event["variant"] == ARTEFACT]
    refused = next((event for event in own if not event["passed"]), None)
    if refused is not None:
        msg = f"its results are wrong: {refused['reason']} (gate {refused['when']} the rounds)"
        raise ProofError(msg)
    names = [name for name in dict.fromkeys((REFERENCE, variant, ARTEFACT)) if samples.times(name)]
    speedup = speedup_of(samples, REFERENCE, ARTEFACT)
    if ARTEFACT not in names or variant not in names or speedup is None:
        msg = "it, or the variant it was made from, was not timed"
        raise ProofError(msg)
    excess = chances(samples, names, Objective.P50).excess(ARTEFACT, variant)
    if not (units.estimated(excess.low, excess.high) and units.estimated(speedup.low, speedup.high)):
        msg = "its results are right, but its time could not be measured: other processes used the machine; try again"
        raise UntimedError(msg)
    if excess.low > 1 + EQUIVALENT:
        more = units.ratio_interval(excess.value, excess.low, excess.high)
        msg = f"it takes {more} the time of the variant it was made from, in the same rounds"
        raise ProofError(msg)
    worst = max(own, key=lambda event: float(str(event["strain"])))
    return Proof(float(str(worst["parity_error"])), float(str(worst["parity_limit"])), speedup, excess)


def _measured(
    settings: Settings, place: Place, folder: Path, budget_s: float
) -> tuple[list[dict[str, object]], Samples]:
    """The gate's events, and rounds in which all take turns in one process."""
    gates: list[dict[str, object]] = []

    def told(event: Event) -> None:
        if event["event"] == "gate":
            gates.append(event)

    def start(of_place: Settings) -> Worker:
        return Worker(of_place, folder / "worker.log", folder / "cache")

    with Seating([place], start, settings, LIMIT_S, told) as seating:
        seating.sit(SEED)
        taken = list(rounds(seating.players, place.cases[0].device, budget_s, SEED)) if seating.players else []
        seating.stand(SEED + 1)
    return gates, Samples([taken])


def _ran(words: list[str], doing: str) -> subprocess.CompletedProcess[str]:
    """A program that was run in a process of its own.

    Raises:
        ProofError: it failed, with its last line, or took too long.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        found = subprocess.run(  # noqa: S603 - our own module, or the file that was just written
            words,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=RECIPE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"{doing} took more than {RECIPE_LIMIT_S:g} s"
        raise ProofError(msg) from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no word of why"])[-1]
        msg = last if found.returncode == 1 and "recipe" in doing else f"{doing} failed: {last}"
        raise ProofError(msg)
    return found
