"""A run folder is read alike by all commands, whatever moment the run was killed at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import ENVIRONMENT, make_run

from bench import __main__ as command_line
from bench.analysis import compare as comparing
from bench.analysis.run_summary import load_run
from bench.console import Console
from bench.errors import UsageError
from bench.machine.core_distance import FAR_WORDS
from bench.machine.interference import REASONS, Interference
from bench.records.folder import RunFolder
from bench.records.raw_csv import ROUNDS
from bench.records.reader import read_beside, read_records, read_run
from bench.records.rounds import Round
from bench.records.schema import Status
from bench.report import words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made run of two groups, one case of which failed."""
    path = tmp_path_factory.mktemp("made") / "run"
    return make_run(path, workloads=("seed", "seed@batch=2"), failed={"loop": (Status.CRASHED, "signal 11")})


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.2, 1), table=st.sampled_from(["stale", "missing", "of another run"]))
def test_all_readers_see_the_same_records_of_a_killed_run(share, table, made, tmp_path_factory):
    """Whole lines count and a torn one does not; what records.csv holds changes nothing."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(made, folder)
    path = folder / "records.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: max(int(share * len(content)), content.index(b"\n") + 1)])
    if table == "missing":
        (folder / "records.csv").unlink()
    elif table == "of another run":
        (folder / "records.csv").write_text("workload\nother\n" * 3)
    expected = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    for found in (read_records(folder), load_run(folder).records, comparing.load(folder).records):
        assert [record.as_dict() for record in found] == expected
    resumed = RunFolder(folder).records()
    assert resumed == expected


def test_a_report_makes_the_table_anew_whatever_it_holds(tmp_path, capsys):
    """A table with as many rows as there are records may be that of another run all the same."""
    folder = make_run(tmp_path / "run")
    right = (folder / "records.csv").read_bytes()
    (folder / "records.csv").write_bytes(right.replace(b"onednn", b"others"))
    assert command_line.main(["report", str(folder)]) == 0
    assert (folder / "records.csv").read_bytes() == right
    capsys.readouterr()


def test_compare_and_export_need_no_table(tmp_path, capsys):
    """After a kill no report has made one."""
    folders = [make_run(tmp_path / name) for name in "AB"]
    for folder in folders:
        (folder / "records.csv").unlink()
    assert command_line.main(["compare", *map(str, folders)]) == 0
    assert "only in" not in capsys.readouterr().out
    assert command_line.main(["export", str(folders[0])]) == 0
    assert "3 cases" in capsys.readouterr().out


def test_a_run_that_recorded_nothing_yet_says_how_to_finish_it(tmp_path, capsys):
    """A folder that was begun is told from one that is no run."""
    folder = make_run(tmp_path / "run", speedups={"reference": 1.0})
    (folder / "plan.json").write_text("{}")
    (folder / "records.jsonl").write_bytes(b'{"workload": "se')
    for command in ("report", "export"):
        assert command_line.main([command, str(folder)]) == 2
        shown = capsys.readouterr().err
        assert f"records.jsonl holds no record; finish the run: python -m bench run --resume {folder}" in shown
        assert shown.count("\n") == 1


def test_advice_can_be_copied_where_a_folder_has_a_space(tmp_path, capsys):
    """A path with a space is quoted, as the shell needs it."""
    folder = make_run(tmp_path / "my run", speedups={"reference": 1.0})
    (folder / "plan.json").write_text("{}")
    (folder / "records.jsonl").write_bytes(b"")
    assert command_line.main(["report", str(folder)]) == 2
    assert f"--resume '{folder}'" in capsys.readouterr().err


def test_a_folder_of_ranks_says_what_it_holds(tmp_path, capsys):
    """It is no run, and its table can be read."""
    (tmp_path / "ranks.jsonl").write_text("{}\n")
    assert command_line.main(["show", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        f"what bench ranks measured: see {tmp_path}/ranks.csv and plots beside it\n"
    )


@pytest.mark.parametrize(
    "section",
    [{"threads": 3}, {"threads": {"workers": []}}, {"run": {"arguments": {"plugin": True}}}, {"run": {"arguments": 1}}],
)
def test_an_environment_that_was_edited_is_no_traceback(tmp_path, capsys, section):
    """Settings of a case are left out of its command where the file does not say them as a run does."""
    folder = make_run(tmp_path / "run", {**ENVIRONMENT, **section})
    assert command_line.main(["show", str(folder), "seed/inference/onednn"]) == 0
    assert "measure it again: " in capsys.readouterr().out
    assert command_line.main(["run", "--resume", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_case_that_was_recorded_again_counts_once(tmp_path):
    """The last record holds, and how many there were before is known."""
    folder = make_run(tmp_path / "run")
    last = read_records(folder)[-1]
    RunFolder(folder).append(last)
    run = read_run(folder)
    assert len(run.records) == len(read_records(folder)) - 1
    assert run.superseded == 1


def rounds_file(path: Path, *rounds: tuple[float, float, str]) -> Path:
    """A folder whose rounds.csv.gz has rounds of a length, a share of others and a reason."""
    made = [
        Round(n, {}, wall_s=wall_s, beside=Interference(why=why, others_share=others))
        for n, (wall_s, others, why) in enumerate(rounds)
    ]
    ROUNDS.append(path, (found.row("seed/inference/cpu/1t", 0) for found in made))
    return path


def test_what_used_the_machine_is_told_in_one_line(tmp_path):
    """Averaged over the time of the rounds, with the largest share and how many rounds were disturbed."""
    found = read_beside(rounds_file(tmp_path, (3.0, 0.5, ""), (1.0, 1.5, "others took 1.50 cores")))
    assert found is not None
    assert (found.rounds, found.disturbed, found.others, found.most) == (2, 1, 0.75, 1.5)
    assert words.beside(found, 2) == (
        "1 of 2 rounds were disturbed and are left out wherever enough others remain (rounds.csv.gz has the reason for "
        "each); other programs used 0.75 of 2 cores on average while rounds were timed, at most 1.50"
    )


def test_rounds_that_only_far_cores_disturbed_are_counted_apart(tmp_path):
    """Otherwise half of the rounds are disturbed where other programs used next to nothing."""
    far = f"{FAR_WORDS} 600 ns, 230 at best in this run"
    both = f"{far}{REASONS}others took 1.50 cores"
    found = read_beside(rounds_file(tmp_path, (1.0, 0.0, ""), (1.0, 0.0, far), (1.0, 1.5, both)))
    assert found is not None
    assert (found.disturbed, found.far) == (2, 1)
    assert words.beside(found, 2).startswith(
        "2 of 3 rounds were disturbed (1 only because the host moved the cores apart) and are left out"
    )


def test_a_quiet_machine_is_told_too(tmp_path):
    """A line that is missing would say nothing."""
    found = read_beside(rounds_file(tmp_path, (1.0, 0.02, ""), (1.0, 0.04, "")))
    assert found is not None
    assert found.quiet
    assert words.beside(found, None) == (
        "the machine was quiet: other programs used 0.03 cores on average while rounds were timed, at most 0.04"
    )


@pytest.mark.parametrize("marked", [False, True])
def test_a_run_ends_with_its_marks_explained_and_who_used_the_machine(tmp_path, capsys, marked):
    """Below the table stand a line for each mark that is in it, and one line about the machine."""
    folder = make_run(tmp_path / "run", figured=True, disturbed_share=float(marked))
    rounds_file(folder, (1.0, 0.95, "others took 0.95 cores"))
    command_line._show(Console(), RunFolder(folder))
    lines = capsys.readouterr().out.splitlines()
    table_end = max(number for number, line in enumerate(lines) if "onednn" in line)
    legend = {line.split("  ")[0]: number for number, line in enumerate(lines) if number > table_end}
    assert "vs best" in legend
    assert ("~" in legend) == any("~" in line for line in lines[: table_end + 1]) == marked
    assert sum("each); other programs used 0.95 of " in line for line in lines) == 1


@pytest.mark.parametrize("recorded", [0, 3])
def test_advice_after_an_interruption_leads_to_something(recorded, tmp_path, capsys):
    """A report of nothing is not offered, finishing the run is."""
    folder = make_run(tmp_path / "run")
    if not recorded:
        (folder / "records.jsonl").unlink()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    runner = SimpleNamespace(
        folder=RunFolder(folder), console=Console(), run=interrupted, plan=SimpleNamespace(cases=[None] * 4)
    )
    assert command_line._measure(runner, "run") == 130
    out = capsys.readouterr().out
    assert f"to continue: python -m bench run --resume {folder}" in out
    assert ("python -m bench report" in out) is bool(recorded)
    assert ("3 of 4 cases are recorded in" if recorded else "no case is recorded yet") in out


def test_without_rounds_nothing_is_told(tmp_path):
    """Nothing was measured, so nothing is known."""
    assert read_beside(tmp_path) is None


def test_a_damaged_file_of_rounds_is_one_line(tmp_path):
    """It names the file."""
    rounds_file(tmp_path, (1.0, 0.0, ""))
    path = tmp_path / ROUNDS.name
    path.write_bytes(path.read_bytes() + b"not gzip")
    with pytest.raises(UsageError, match=r"rounds\.csv\.gz is damaged from byte"):
        read_beside(tmp_path)
