"""Resuming: what is recorded stays, what is missing is measured, and a folder that does not fit is left alone.

Workers play a part here; test_run_kill.py kills the real ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench.machine import environment
from bench.machine.energy import Idle
from bench.plan.cases import Case, Group, Quality, Suite
from bench.records import durable
from bench.records.block import Block, Turn
from bench.records.rounds import Round
from bench.records.samples import read_samples
from bench.records.schema import SCHEMA_VERSION, Status
from bench.run import more, quality, resume, runner, seating, second_instrument
from bench.run import planning as plan
from bench.run.clock_check import Queued
from bench.run.planning import Described, Plan
from bench.run.worker_process import WorkerError
from bench.timing import rounds as sampling

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
#: The version of the schema in a line of records.jsonl.
WRITTEN = f'"schema_version": {SCHEMA_VERSION}'.encode()
SUITE = """
name = "mine"
summary = "two groups"
budget_s = 1
interval = 0.9
processes = 2
[[select]]
workloads = ["seed@batch=2,length=3"]
variants = ["loop", "cudnn", "onednn"]
"""
#: In the order of the records: those that cannot run, what failed cold, the measured ones together.
FIRST, SECOND = ("cudnn", "onednn", "reference", "loop"), ("cudnn", "onednn", "reference", "loop")
PLANNED = sorted([("inference", name) for name in FIRST] + [("training", name) for name in SECOND])


class Played:
    """A worker that knows what the real one knows, finds `onednn` failing cold, and times what it likes.

    Attributes:
        asked: cases of each `cold` and `sit` so far.
        seeds: of each `sit`.
        ends: called before each answer to `cold` and `sit`; may raise what ends the run.
    """

    asked: list[tuple[str, ...]]
    seeds: list[int]
    now: list[float]
    ends: Any

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        """Stand still."""

    def go_on(self) -> None:
        """Go on."""

    def queued(self) -> Queued:
        """Never wait for a core."""
        return Queued(0.0, 0.0)

    def ask(self, request: str, _: float, **fields: Any):
        """Play the request."""
        if request in {"catalogue", "describe"}:
            yield from served(request, fields)
            return
        if request == "ceilings":
            yield {"event": "ceilings", "threads": 1, "flops_per_s": {"fp32": 1e9}, "bytes_per_s": {"32768": 1e9}}
            return
        if request in {"turn", "stand"}:
            if request == "turn":
                yield {"event": "turn"} | self._turn().fields()
            return
        if request == "prepare":
            return
        cases = fields["cases"] if request == "sit" else [fields["case"]]
        self.asked.append((request, cases[0]["mode"], *(case["variant"] for case in cases)))
        self.ends(request, cases[0]["mode"])
        if request == "cold":
            if cases[0]["variant"] == "onednn":
                raise WorkerError(Status.ERROR, "planted")
            found = {"build_s": 0.5, "first_call_s": 0.6, "evidence": "played"}
            yield {"event": "cold", "fields": found, "built": {}}
            return
        self.seeds.append(fields["seed"])
        for case in cases:
            yield {"event": "gate", "variant": case["variant"], "when": "before", "passed": True} | GATE

    def _turn(self) -> Turn:
        """A turn whose length says which seating it was in; the parent's clock is played as well."""
        call_s = 1.0 + len(self.seeds)
        start_s = self.now[0]
        self.now[0] += call_s
        return Turn(Block((call_s,)), 0.0, start_s, call_s, 0.0, 0.0)


#: What a gate says of what it let through.
GATE = {"reason": "", "strain": 0.1, "parity_worst": "outputs", "parity_error": 0.1, "parity_limit": 1.0}
GATE |= {"grad_error": None, "grad_limit": None}


def eight(players, *_: object):
    """Eight rounds, however long they take."""
    for number in range(8):
        yield Round(number, {name: player.turn().block for name, player in players.items()})


def served(request: str, fields: dict[str, Any]):
    """Answers of the real worker."""
    from bench.worker import server as worker

    answers = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()):
        worker.serve(io.StringIO(json.dumps({"request": request, **fields}) + "\n"), answers)
    for event in map(json.loads, answers.getvalue().splitlines()[1:]):
        # As if it existed here, so that it has a row with the reason why it cannot run.
        for variant in event.get("variants", ()):
            variant["devices"] = ["cpu", "cuda"]
        if event["event"] != "done":
            yield event


def interrupt_training(request: str, mode: str) -> None:
    """Ctrl-C while the second group is measured."""
    if (request, mode) == ("sit", "training"):
        raise KeyboardInterrupt


def rounds_of(folder: Path, mode: str) -> list[list[Round]]:
    """The rounds that samples.csv.gz has of a mode, one list per process."""
    return read_samples(folder / "samples.csv.gz")["seed@batch=2,length=3", mode, "cpu", 1].processes


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A folder to work in and workers that play."""
    kept = {"asked": [], "seeds": [], "now": [0.0], "ends": staticmethod(lambda *_: None)}
    played = type("Here", (Played,), kept)
    monkeypatch.setattr(runner, "Worker", played)
    monkeypatch.setattr(plan, "Worker", played)
    monkeypatch.setattr(runner, "fork_servers", lambda *_: contextlib.nullcontext([]))
    monkeypatch.setattr(seating, "time", types.SimpleNamespace(perf_counter=lambda: played.now[0]))
    monkeypatch.setattr(sampling, "rounds", eight)
    monkeypatch.setattr(environment, "machine", lambda: {"processor": "played", "cores_physical": 2})
    monkeypatch.setattr(environment, "load", lambda: {"cpu_percent": 0.0})
    monkeypatch.setattr(environment, "git", lambda: {"commit": "played"})
    # Plots take seconds, and test_report.py has them.
    monkeypatch.setattr(command_line, "_show", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SUITE, encoding="utf-8")
    return played


@pytest.fixture
def interrupted(stage, tmp_path, capsys) -> Path:
    """A run that was interrupted in its second group; what was said is cleared."""
    stage.ends = staticmethod(interrupt_training)
    words = ["run", "--suite", "mine.toml", "--threads", "1", "--out", "run", "--omp-wait", "passive"]
    assert command_line.main(words) == 130
    stage.ends = staticmethod(lambda *_: None)
    stage.asked.clear()
    shown = capsys.readouterr()
    assert "interrupted; 6 of 8 cases are recorded in run" in shown.out
    assert "\nto continue: python -m bench run --resume run\n" in shown.out
    assert "python -m bench report run" in shown.out
    return tmp_path / "run"


def lines_of(run: Path) -> list[bytes]:
    """Lines of records.jsonl."""
    return (run / "records.jsonl").read_bytes().splitlines()


def cases_of(run: Path) -> list[tuple[str, str]]:
    """Mode and variant of each record, sorted."""
    return sorted((r["mode"], r["variant"]) for r in map(json.loads, lines_of(run)))


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but its lock."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != durable.LOCK}


def refused(run: Path, capsys, *words: str) -> str:
    """The one line with which a resume is refused: exit code 2, and nothing in the folder changed."""
    capsys.readouterr()
    before = content(run)
    assert command_line.main(["run", "--resume", str(run), *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert content(run) == before
    return shown.err


def test_what_is_recorded_is_not_measured_again(stage, interrupted, capsys):
    """The rest of the second group alone is asked of workers, and the run has each case once."""
    before = lines_of(interrupted)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1  # onednn failed
    assert (
        stage.asked
        == [("cold", "training", name) for name in ("reference", "loop")]
        + [("sit", "training", "reference", "loop")] * 2
    )
    assert lines_of(interrupted)[: len(before)] == before
    assert cases_of(interrupted) == PLANNED
    assert "6 of 8 cases are recorded" in capsys.readouterr().out
    assert len((interrupted / "records.csv").read_text(encoding="utf-8").splitlines()) == 9
    for mode in ("inference", "training"):
        found = rounds_of(interrupted, mode)
        assert [[r.number for r in rounds] for rounds in found] == [list(range(8))] * 2
        assert {name for rounds in found for r in rounds for name in r.blocks} == {"reference", "loop"}


def test_a_time_limit_leaves_whole_groups_for_resume(stage, tmp_path, capsys):
    """The first group is measured however short the limit, the second is left; resuming with a limit goes on."""
    words = ["run", "--suite", "mine.toml", "--threads", "1", "--out", "run", "--time-limit", "1"]
    assert command_line.main(words) == 4
    shown = capsys.readouterr().out
    assert "time limit reached; 4 of 8 cases are recorded in run" in shown
    assert shown.endswith("\nto continue: python -m bench run --resume run\n")
    assert {mode for mode, _ in cases_of(tmp_path / "run")} == {"inference"}
    assert len((tmp_path / "run" / "records.csv").read_text(encoding="utf-8").splitlines()) == 5
    stage.asked.clear()
    assert command_line.main(["run", "--resume", "run", "--time-limit", "1"]) == 1  # onednn failed
    assert {mode for _, mode, *_ in stage.asked} == {"training"}
    assert cases_of(tmp_path / "run") == PLANNED


@pytest.mark.usefixtures("stage")
def test_a_time_limit_that_is_long_enough_changes_nothing(tmp_path):
    """All is measured, and the limit is no option that a resumed run would have to repeat."""
    words = ["run", "--suite", "mine.toml", "--threads", "1", "--out", "run", "--time-limit", "600"]
    assert command_line.main(words) == 1  # onednn failed
    assert cases_of(tmp_path / "run") == PLANNED
    facts = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert "time_limit" not in facts["run"]["arguments"]


def test_a_run_resumed_when_it_is_done_measures_nothing(stage, interrupted):
    """Its files stay as they are, but for the note that it was resumed."""
    command_line.main(["run", "--resume", str(interrupted)])
    before = content(interrupted)
    stage.asked.clear()
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    after = content(interrupted)
    assert stage.asked == []
    assert {name for name in after if after[name] != before.get(name)} == {str(interrupted / "environment.json")}


@pytest.fixture
def noisy(stage, monkeypatch):
    """Turns whose lengths differ so much that no group has an answer; returns the workers that play."""
    lengths = random.Random(0)

    def turn(self: Played) -> Turn:
        call_s = lengths.uniform(0.5, 2.0)
        start_s = self.now[0]
        self.now[0] += call_s
        return Turn(Block((call_s,)), 0.0, start_s, call_s, 0.0, 0.0)

    monkeypatch.setattr(stage, "_turn", turn)
    return stage


def interrupt_at_last(*_: object) -> None:
    """Ctrl-C as soon as further rounds begin."""
    raise KeyboardInterrupt


@pytest.mark.usefixtures("noisy")
def test_a_run_interrupted_while_it_measures_longer_is_finished(monkeypatch, tmp_path, capsys):
    """All cases are recorded and groups are open: the time that is left is measured, on the devices of those groups."""
    with monkeypatch.context() as patched:
        patched.setattr(more, "measure", interrupt_at_last)
        assert command_line.main(["run", "--suite", "mine.toml", "--threads", "1", "--out", "run"]) == 130
    assert cases_of(tmp_path / "run") == PLANNED
    capsys.readouterr()
    assert command_line.main(["run", "--resume", "run"]) == 1  # onednn failed
    assert "measuring 1s longer" in capsys.readouterr().out
    assert len(rounds_of(tmp_path / "run", "inference")) > 2


def test_a_finished_run_has_no_time_left_for_open_groups(noisy, tmp_path):
    """What its parts spent on rounds counts; only `--more` measures its open groups."""
    command_line.main(["run", "--suite", "mine.toml", "--threads", "1", "--out", "run"])
    path = tmp_path / "run" / "environment.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["run"]["own_time_s"] |= {"timed rounds": 0.4, "waiting": 0.6}
    path.write_text(json.dumps(facts), encoding="utf-8")
    noisy.asked.clear()
    before = lines_of(tmp_path / "run")
    assert command_line.main(["run", "--resume", "run"]) == 1
    assert (noisy.asked, lines_of(tmp_path / "run")) == ([], before)
    assert command_line.main(["run", "--resume", "run", "--more", "10s"]) == 1
    assert {request for request, *_ in noisy.asked} == {"sit"}


def test_what_devices_use_when_idle_stays_recorded(interrupted, monkeypatch):
    """A part of a run that measures nothing erases nothing, and another part's finding stands beside the first."""
    path = interrupted / "environment.json"
    first = json.loads(path.read_text(encoding="utf-8"))["energy"]
    assert set(first) == {"cpu"}
    monkeypatch.setattr(runner.energy, "idle", lambda _: Idle("played", 7.0, 0.001))
    for _ in range(2):
        command_line.main(["run", "--resume", str(interrupted)])
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert facts["energy"] == first
    assert [part["energy"] for part in facts["resumes"]] == [
        {"cpu": {"source": "played", "power_w": 7.0, "update_s": 0.001, "reason": ""}},
        {},
    ]


def test_a_resumed_run_goes_on_with_its_options_and_other_seeds(stage, interrupted):
    """The options need not be said again; no seed is used twice; each part is told in environment.json."""
    began = json.loads((interrupted / "environment.json").read_text(encoding="utf-8"))
    for _ in range(2):
        command_line.main(["run", "--resume", str(interrupted)])
    facts = json.loads((interrupted / "environment.json").read_text(encoding="utf-8"))
    assert facts["run"] == began["run"]
    assert facts["run"]["arguments"]["omp_wait"] == "passive"
    assert facts["threads"]["workers"]["OMP_WAIT_POLICY"] == "passive"
    first, second = facts["resumes"]
    assert first["command"] == f"python -m bench run --resume {interrupted}"
    assert (first["recorded_before"], second["recorded_before"]) == (6, 8)
    assert set(first["load"]) == {"before", "after"}
    assert len({began["run"]["seed"], first["seed"], second["seed"]}) == 3
    # The processes of a group share its problems; another part has others.
    assert stage.seeds[::2] == stage.seeds[1::2]
    assert len(set(stage.seeds)) == 2


def test_seeds_of_parts_keep_apart(monkeypatch):
    """A seed that would run into those of an earlier part is not taken."""
    drawn = iter([7 + resume.SEED_ROOM, resume.SEEDS - 1, 7 + 2 * resume.SEED_ROOM])
    monkeypatch.setattr(resume.random, "randrange", lambda _: next(drawn))
    assert resume.new_seed([7]) == 7 + 2 * resume.SEED_ROOM


@pytest.mark.parametrize("cut", [1, 2, 400, 3000, -1])
def test_a_torn_append_is_set_aside_and_the_group_measured_again(stage, interrupted, capsys, cut):
    """Wherever the first group's append was cut: nothing that was written is gone, each case is there once."""
    path = interrupted / "records.jsonl"
    lines = lines_of(interrupted)[:4]
    start, end = len(b"\n".join(lines[:2])) + 1, len(b"\n".join(lines)) + 1
    torn = path.read_bytes()[: start + cut if cut > 0 else end + cut]
    path.write_bytes(torn)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    shown = capsys.readouterr().out
    assert "the last line of records.jsonl was torn; it is in" in shown
    aside = (interrupted / "records.torn.jsonl").read_bytes()
    assert torn[start:] == aside
    assert lines_of(interrupted)[:2] == lines[:2]
    assert cases_of(interrupted) == PLANNED
    assert ("sit", "inference", "reference", "loop") in stage.asked
    assert ("cold", "inference", "onednn") not in stage.asked
    found = rounds_of(interrupted, "inference")
    assert [[r.number for r in rounds] for rounds in found] == [list(range(8))] * 2


def test_torn_samples_are_mended(interrupted):
    """Samples cut in the middle, before their records were written: the group's are there once in the end."""
    command_line.main(["run", "--resume", str(interrupted)])
    path = interrupted / "samples.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    (interrupted / "records.jsonl").write_bytes(b"\n".join(lines_of(interrupted)[:6]) + b"\n")
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    for mode in ("inference", "training"):
        found = rounds_of(interrupted, mode)
        assert [[r.number for r in rounds] for rounds in found] == [list(range(8))] * 2


def test_a_run_that_was_killed_at_its_start_may_begin_again(interrupted, capsys):
    """Before environment.json there is nothing to resume, which is said, and the folder may be used if it is empty."""
    (interrupted / "environment.json").unlink()
    assert "name the folder of a run" in refused(interrupted, capsys)
    new = interrupted.parent / "new"
    new.mkdir()
    (new / durable.LOCK).write_text("12\n")
    (new / ".plan.json.12.new").write_text("{")
    assert f"start one with --out {new}" in refused(new, capsys)
    assert command_line.main(["run", "--suite", "mine.toml", "--threads", "1", "--out", str(new)]) == 1
    assert cases_of(new) == PLANNED


BROKEN = {
    "a line in the middle": (lambda lines: [lines[0], b'{"workload": "se', *lines[2:]], "line 2 is not a record"),
    "an empty line in the middle": (lambda lines: [lines[0], b"", *lines[2:]], "line 2 is not a record"),
    "a line that is not an object": (lambda lines: [b"[1]", *lines[1:]], "line 1 is not a record"),
    "bytes that are not text": (lambda lines: [lines[0], b"\xff\xfe", *lines[2:]], "line 2 is not a record"),
    "another schema": (
        lambda lines: [*lines[:2], lines[2].replace(WRITTEN, b'"schema_version": 99'), *lines[3:]],
        f"line 3 has schema_version 99, this release writes {SCHEMA_VERSION}",
    ),
    "another column": (lambda lines: [lines[0].replace(b'"data"', b'"date"'), *lines[1:]], "line 1 has other columns"),
    "a record twice": (lambda lines: [*lines, lines[0]], "is recorded twice"),
    "another run's record": (
        lambda lines: [lines[0].replace(b'"variant": "cudnn"', b'"variant": "else"'), *lines[1:]],
        "is not a case of the run",
    ),
}


@pytest.mark.parametrize("problem", BROKEN)
@pytest.mark.usefixtures("stage")
def test_records_that_cannot_be_trusted_are_refused(problem, interrupted, capsys):
    """One line that names the file and the line, and nothing is changed."""
    change, said = BROKEN[problem]
    (interrupted / "records.jsonl").write_bytes(b"\n".join(change(lines_of(interrupted))) + b"\n")
    line = refused(interrupted, capsys)
    assert said in line
    assert "records.jsonl" in line


def test_samples_that_are_gone_are_told(interrupted, capsys):
    """A record without its samples could not be computed again."""
    (interrupted / "samples.csv.gz").unlink()
    before = content(interrupted)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 2
    assert "samples.csv.gz has no values of" in capsys.readouterr().err
    assert content(interrupted) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "quick"], "mine.toml, not of quick"),
        (["--threads", "2"], "leave out --threads"),
        (["--out", "other", "--budget", "3", "--seed", "0"], "leave out --budget, --seed, --out"),
        (["--omp-wait", "default", "--variant", "loop"], "leave out --variant, --omp-wait"),
    ],
)
def test_options_that_say_otherwise_are_refused(words, said, interrupted, capsys):
    """A run folder of another suite, and options that would make it another run, by their names."""
    assert said in refused(interrupted, capsys, *words)


def test_the_same_suite_may_be_said_again(interrupted):
    """It says nothing new."""
    assert command_line.main(["run", "--resume", str(interrupted), "--suite", "mine.toml"]) == 1
    assert cases_of(interrupted) == PLANNED


def test_a_suite_file_that_changed_is_told_and_not_taken(interrupted, capsys):
    """The run goes on with the suite as it was, also when the file is gone."""
    (interrupted.parent / "mine.toml").write_text(SUITE.replace('"loop", ', ""), encoding="utf-8")
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    assert "has changed; the run continues with the suite as it was" in capsys.readouterr().out
    assert cases_of(interrupted) == PLANNED
    (interrupted.parent / "mine.toml").unlink()
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    assert "has changed; the run continues" in capsys.readouterr().out


def test_another_machine_is_refused(interrupted, capsys, monkeypatch):
    """Figures of two machines do not stand in one run."""
    monkeypatch.setattr(environment, "machine", lambda: {"processor": "another", "cores_physical": 2})
    run_and_see(interrupted, capsys, "machine: processor was played, is another")


def test_a_quota_that_was_not_recorded_forbids_nothing(interrupted, monkeypatch):
    """A run that an earlier release began may be finished on the machine it began on."""
    now = {"processor": "played", "cores_physical": 2, "cpu_quota": "none"}
    monkeypatch.setattr(environment, "machine", lambda: now)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    assert cases_of(interrupted) == PLANNED


def test_another_release_of_a_library_is_refused(interrupted, capsys, monkeypatch):
    """Nor those of two releases of what computes; one that only draws may differ."""
    real = environment.software
    monkeypatch.setattr(environment, "software", lambda: real() | {"numpy": "9.9"})
    run_and_see(interrupted, capsys, "is 9.9")
    monkeypatch.setattr(environment, "software", lambda: real() | {"matplotlib": "9.9"})
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1


def test_other_settings_of_openmp_are_refused(interrupted, capsys, monkeypatch):
    """Workers inherit them."""
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    run_and_see(interrupted, capsys, "OMP_DYNAMIC was None, is TRUE")


def test_cases_that_are_not_those_of_the_beginning_are_refused(interrupted, capsys):
    """The suite gives another list than it gave then, as with another release of this project."""
    plan = json.loads((interrupted / "plan.json").read_text(encoding="utf-8"))
    plan["cases"].append(plan["cases"][-1] | {"variant": "gone"})
    (interrupted / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    run_and_see(interrupted, capsys, "gone is only in the run")


@pytest.mark.usefixtures("stage")
def test_a_plugin_that_changed_is_refused(tmp_path, capsys):
    """Its variants may be others under the same names."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("")
    words = ["run", "--suite", "mine.toml", "--threads", "1", "--out", "run", "--plugin", "plugin.py"]
    assert command_line.main(words) == 1
    plugin.write_text("1\n")
    run_and_see(tmp_path / "run", capsys, f"plugin {plugin} was ")


def run_and_see(run: Path, capsys, said: str) -> None:
    """Resuming is refused with these words."""
    assert said in refused(run, capsys)


@pytest.mark.parametrize("kind", ["missing", "a file", "no run", "no json", "no arguments", "no plan"])
@pytest.mark.usefixtures("stage")
def test_what_is_no_interrupted_run_is_told(kind, interrupted, capsys):
    """One line that names the folder."""
    match kind:
        case "missing":
            shutil.rmtree(interrupted)
        case "a file":
            shutil.rmtree(interrupted)
            interrupted.write_text("")
        case "no run":
            (interrupted / "environment.json").unlink()
        case "no json":
            (interrupted / "environment.json").write_text("{")
        case "no arguments":
            (interrupted / "environment.json").write_text('{"run": {}}')
        case "no plan":
            (interrupted / "plan.json").unlink()
    assert str(interrupted) in refused(interrupted, capsys)


def test_a_second_writer_is_refused(interrupted, capsys):
    """It is told who writes, at once; reading is allowed."""
    with durable.locked(interrupted):
        assert f"is being written by process {os.getpid()}" in refused(interrupted, capsys)
        assert command_line.main(["run", "--resume", str(interrupted), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert sum(line.split()[-1:] == ["recorded"] for line in shown.splitlines()) == 6


def test_a_dry_run_of_a_resume_changes_nothing(stage, interrupted):
    """It says what is recorded and what would run."""
    (interrupted / "records.jsonl").write_bytes((interrupted / "records.jsonl").read_bytes() + b'{"torn')
    before = content(interrupted)
    assert command_line.main(["run", "--resume", str(interrupted), "--dry-run"]) == 0
    assert content(interrupted) == before
    assert stage.asked == []


@pytest.mark.parametrize("name", ["records.jsonl", "samples.csv.gz", "records.csv", "environment.json"])
def test_a_full_disk_is_one_line_and_costs_no_record(name, interrupted, capsys, monkeypatch):
    """Whichever file does not fit: it is named, what is recorded stays, and with room the run can be resumed."""
    before = lines_of(interrupted)
    write, refused_before = durable._write, []

    def full(handle: int, data: bytes) -> None:
        if refused_before or name in str(Path(f"/proc/self/fd/{handle}").readlink()):
            refused_before.append(name)
            write(handle, data[:7])
            raise OSError(28, "No space left on device")
        write(handle, data)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file is written")
    monkeypatch.setattr(durable, "_write", full)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert f"{interrupted / name}: No space left on device" in shown.err
    recorded = 8 if name == "records.csv" else 6
    assert f"{recorded} of 8 cases are recorded in {interrupted}" in shown.err
    assert f"python -m bench run --resume {interrupted}" in shown.err
    assert lines_of(interrupted)[:6] == before
    assert not [path for path in interrupted.iterdir() if path.name.endswith(".new")]
    monkeypatch.setattr(durable, "_write", write)
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    assert cases_of(interrupted) == PLANNED
    assert not (interrupted / "records.torn.jsonl").exists()


@pytest.fixture
def disk(tmp_path):
    """A disk of 24 KiB, and how to mount it otherwise."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)  # noqa: S607

    try:
        mount("size=24k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only the superuser may mount a disk")
    yield folder, mount
    subprocess.run(["umount", folder], check=True)  # noqa: S607


@pytest.mark.usefixtures("stage")
def test_a_disk_that_is_really_full_or_read_only(disk, capsys):
    """The system's own refusals: one line each, nothing lost, and with room the run is finished."""
    folder, mount = disk
    assert command_line.main(["run", "--suite", "mine.toml", "--threads", "1", "--out", str(folder / "run")]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert f"{folder / 'run'}/" in shown.err
    assert "No space left on device" in shown.err
    before = lines_of(folder / "run")
    assert f"{len(before)} of 8 cases are recorded" in shown.err
    assert 0 < len(before) < 8
    mount("remount,ro,size=24k")
    assert "cannot be written: Read-only file system" in refused(folder / "run", capsys)
    mount("remount,rw,size=1m")
    assert command_line.main(["run", "--resume", str(folder / "run")]) == 1
    assert lines_of(folder / "run")[: len(before)] == before
    assert cases_of(folder / "run") == PLANNED


def test_a_folder_that_became_read_only_is_told(interrupted, capsys, monkeypatch):
    """Before anything is measured, in the system's words."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(durable.os, "open", refuse)
    assert "cannot be written: Read-only file system" in refused(interrupted, capsys)


def test_sigterm_ends_a_run_like_ctrl_c(stage, interrupted, capsys):
    """Exit code 143, and how to go on."""
    stage.ends = staticmethod(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert command_line.main(["run", "--resume", str(interrupted)]) == 143
    assert f"to continue: python -m bench run --resume {interrupted}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_can_be_reported(interrupted):
    """The table that the killed run could not write is made of its records, a torn line left out."""
    (interrupted / "records.csv").unlink()
    records = interrupted / "records.jsonl"
    records.write_bytes(records.read_bytes() + b'{"workload"')
    before = records.read_bytes()
    assert command_line.main(["report", str(interrupted)]) == 0
    assert len((interrupted / "records.csv").read_text(encoding="utf-8").splitlines()) == 7
    assert (interrupted / "report.html").is_file()
    assert records.read_bytes() == before


QUALITY = """
[[quality]]
task = "tiny"
data = ""
variants = ["*"]
baseline = "naive"
target_share = 0.5
"""


def test_a_narrowed_training_is_resumed_as_it_was(stage, tmp_path, capsys, monkeypatch):
    """The suite is what it was: --variant narrows its trainings then and now, and a changed budget is told."""
    asked = []
    monkeypatch.setattr(quality, "run", lambda parts, *_: asked.append([part.variants for part in parts]) or [])
    suite = tmp_path / "mine.toml"
    suite.write_text(SUITE + QUALITY, encoding="utf-8")
    stage.ends = staticmethod(interrupt_training)
    words = ["run", "--suite", "mine.toml", "--threads", "1", "--out", "run", "--variant", "loop", "--budget", "1.5"]
    assert command_line.main(words) == 130
    stage.ends = staticmethod(lambda *_: None)
    capsys.readouterr()
    assert command_line.main(["run", "--resume", "run"]) == 0
    assert "has changed; the run continues" not in capsys.readouterr().out
    assert asked == [[("reference", "loop")]]
    suite.write_text(SUITE.replace("budget_s = 1", "budget_s = 7") + QUALITY, encoding="utf-8")
    assert command_line.main(["run", "--resume", "run"]) == 0
    # The command line said how long.
    assert "has changed; the run continues" not in capsys.readouterr().out
    suite.write_text(SUITE + QUALITY.replace('"*"', '"loop"'), encoding="utf-8")
    assert command_line.main(["run", "--resume", "run"]) == 0
    assert "has changed; the run continues" in capsys.readouterr().out


def test_a_budget_that_the_suite_no_longer_has_is_told(interrupted, tmp_path, capsys):
    """If the command line gave none, the suite's is part of it."""
    (tmp_path / "mine.toml").write_text(SUITE.replace("budget_s = 1", "budget_s = 7"), encoding="utf-8")
    assert command_line.main(["run", "--resume", str(interrupted)]) == 1
    assert "has changed; the run continues" in capsys.readouterr().out


def test_the_expected_time_of_a_resumed_run_leaves_out_what_is_done(tmp_path, monkeypatch):
    """Recorded groups and their ceilings, figures of the second instrument and trainings that lie in the folder."""
    case = Case("seed", "reference", "inference", "cpu", 1)
    described = (Described(case, {}, None),)
    trained = (Quality("tiny", "", ("reference",), "naive", 0.5),)
    suite = Suite("made", "", (), second_instrument=True)
    made = Plan(suite, ((Group("g", (case,)), described),), {}, {}, trained)
    key = frozenset({case.key})
    whole, without_groups = made.expected_s(), made.expected_s(key, tmp_path)
    assert whole - without_groups == pytest.approx(made.group_expected_s(described) + plan.START_S + plan.CEILINGS_S)
    (tmp_path / second_instrument.FILE).write_text('{"benchmarks": []}')
    without_second = made.expected_s(key, tmp_path)
    assert without_groups - without_second == pytest.approx(second_instrument.expected_s(1))
    monkeypatch.setattr(quality, "done", lambda _: True)
    assert made.expected_s(key, tmp_path) == pytest.approx(plan.START_S)


def test_a_time_limit_covers_the_second_instrument(stage, tmp_path, capsys, monkeypatch):
    """It is not begun where it would pass the limit; resumed, a run gets on, even if it is all that is left."""
    del stage
    asked = []
    monkeypatch.setattr(second_instrument, "run", lambda cases, *_: asked.append(len(cases)) or [])
    text = SUITE.replace("budget_s", "second_instrument = true\nbudget_s").replace("seed@batch=2,length=3", "seed")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    words = [
        "run",
        "--suite",
        "mine.toml",
        "--threads",
        "1",
        "--out",
        "run",
        "--variant",
        "loop",
        "--mode",
        "inference",
    ]
    assert command_line.main([*words, "--time-limit", "1"]) == 4
    assert "time limit reached; 2 of 2 cases are recorded" in capsys.readouterr().out
    assert asked == []
    assert command_line.main(["run", "--resume", "run", "--time-limit", "0.1"]) == 0
    assert asked == [2]
