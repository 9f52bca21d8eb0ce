"""`python -m bench recommend`: the recommendation in the terminal or as JSON, and on request as an artefact."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from bench.console import Console
from bench.errors import UsageError
from bench.plan import own_model
from bench.recommend import apply, words
from bench.recommend.answer import Advice, Recommendation, recommend
from bench.recommend.arguments import question
from bench.recommend.facts import needs_of
from bench.recommend.load import read_served, recommend_load
from bench.recommend.mix import MixAnswer, mixes
from bench.recommend.question import Objective
from bench.records.reader import RecordedRun, read_run
from bench.run.worker_process import Settings, Worker, WorkerError, scratch_folder

EXIT_RECOMMENDED, EXIT_REFUSED, EXIT_NOTHING, EXIT_UNCLEAR = 0, 1, 3, 5
ASK_LIMIT_S = 120.0


def command(arguments: argparse.Namespace) -> int:
    """Recommend, print, and write the artefact if asked to.

    Returns:
        0 if every group has a recommendation; 3 if in some group no variant is within the bounds; 5 if some group is
        unclear; 1 if an artefact does not reach what the run measured.

    Raises:
        UsageError: bad input.
    """
    if arguments.overwrite and arguments.apply is None:
        msg = "--overwrite lets --apply replace a file, but --apply is missing; add --apply OUT.py"
        raise UsageError(msg)
    if arguments.variant is not None and arguments.apply is None:
        msg = "--variant names the variant that --apply writes, but --apply is missing; add --apply OUT.py"
        raise UsageError(msg)
    asked = question(arguments)
    mixed: tuple[MixAnswer, ...] = ()
    if asked.objective is Objective.LOAD:
        if arguments.apply is not None:
            msg = "--apply times a variant as the rounds of a run did, which --objective load does not look at; leave "
            raise UsageError(msg + "--objective out, and name the variant with --variant")
        served = read_served(arguments.dir, asked)
        run = served.run
        answers = recommend_load(served, asked, needs_of(run) or ask_needs())
    else:
        run = read_run(arguments.dir)
        answers, mixed = recommend(run, asked, needs_of(run) or ask_needs()), mixes(run, asked)
    if arguments.apply is not None and len(answers) != 1:
        titles = "; ".join(answer.title for answer in answers)
        msg = f"--apply writes one variant, and {run.path} has {len(answers)} groups ({titles}); choose one with "
        raise UsageError(msg + "--workload and --mode")
    if arguments.json:
        print(json.dumps(as_json(run, answers, mixed), allow_nan=False))
    else:
        show(run, answers, mixed)
    if arguments.apply is not None:
        return apply.write(
            run,
            answers[0],
            arguments.apply,
            chosen=arguments.variant,
            overwrite=arguments.overwrite,
            quiet=arguments.json,
        )
    verdicts = {answer.verdict for answer in answers}
    if Recommendation.NONE in verdicts:
        return EXIT_NOTHING
    unclear = Recommendation.UNCLEAR in verdicts or any(found.unclear for found in mixed)
    return EXIT_UNCLEAR if unclear else EXIT_RECOMMENDED


def show(run: RecordedRun, answers: tuple[Advice, ...], mixed: tuple[MixAnswer, ...]) -> None:
    """Print the answers, one block of lines per group."""
    console = Console()
    found = [(answer.title, words.group_text(answer, run), answer.verdict) for answer in answers]
    found += [
        (mix.title, words.mix_text(mix), Recommendation.UNCLEAR if mix.unclear else Recommendation.RECOMMENDED)
        for mix in mixed
    ]
    colours = {Recommendation.RECOMMENDED: "green", Recommendation.UNCLEAR: "yellow", Recommendation.NONE: "red"}
    for number, (title, text, verdict) in enumerate(found):
        if number:
            console.say("")
        console.say(title, f"bold {colours[verdict]}")
        console.say(text.replace("`", ""))


def as_json(run: RecordedRun, answers: tuple[Advice, ...], mixed: tuple[MixAnswer, ...]) -> dict[str, Any]:
    """Return all findings as JSON values."""
    return {
        "run": str(run.path),
        "answers": [_answer_json(answer, run) for answer in answers],
        "mixes": [dataclasses.asdict(mix) | {"unclear": mix.unclear, "text": words.mix_text(mix)} for mix in mixed],
    }


def _answer_json(answer: Advice, run: RecordedRun) -> dict[str, Any]:
    workload, mode, device, threads = answer.key
    found = dataclasses.asdict(answer)
    del found["key"], found["question"], found["commits"]
    advice = answer.clearer
    more = None
    if advice is not None:
        more = dataclasses.asdict(advice) | {"advice": advice.text, "command": advice.command(run.path)}
    shown: dict[str, Any] = _finite({
        "workload": workload,
        "mode": mode,
        "device": device,
        "threads": threads,
        "lstm_share": own_model.share_of(run.environment, workload, mode),
        "objective": answer.question.objective.value,
        "bounds": answer.question.bounds,
        **found,
        "variants": {name: dataclasses.asdict(facts) for name, facts in answer.commits.items()},
        "clearer": more,
        "text": words.group_text(answer, run),
    })  # fmt: skip
    return shown


def _finite(value: Any) -> Any:
    """Return the value with None for every number that JSON cannot hold, such as infinity."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ask_needs() -> dict[str, tuple[str, ...]]:
    """Needs of the suite's variants, from a fresh worker: a run of an earlier release does not record them."""
    try:
        with scratch_folder() as folder, Worker(Settings(1), folder / "needs.log", folder) as worker:
            (found,) = worker.ask("catalogue", ASK_LIMIT_S)
    except WorkerError as error:
        Console().say(f"the requirements of the variants are not known: {error.reason}", "yellow")
        return {}
    return {entry["name"]: tuple(entry["needs"]) for entry in found["variants"]}
