"""Pages of several runs: side by side with what changed, and a history with its change points."""

from __future__ import annotations

import json

import pytest
from run_folders import changed, make_run

from bench.__main__ import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six runs in a folder, in the last three of which a variant is slower."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(6):
        speedups = {"reference": 1.0, "onednn": 2.0 if number < 3 else 1.5}
        path = make_run(folder / f"run{number}", speedups=speedups, figured=True, seed=number)
        lines = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
        dated = [line | {"recorded_at": f"2026-01-0{number + 1}T00:00:00Z"} for line in lines]
        (path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dated))
    return folder


def test_a_history_names_the_run_since_which_a_case_is_slower(runs, capsys):
    """The page of a folder of runs has the change with its factor, and the run before it."""
    assert main(["report", "--history", str(runs)]) == 0
    assert "history.html" in capsys.readouterr().out
    page = (runs / "history.html").read_text()
    row = page[page.index("Change points") :]
    assert "run3 (" in row
    assert "slower, 0.7" in row
    assert "run2 (" in row


def test_runs_of_another_machine_are_left_out_of_a_history(runs, tmp_path, capsys):
    """A run that is not comparable with the latest is named with the reason; one run alone is no history."""
    make_run(tmp_path / "a", changed("machine", processor="Other CPU"), figured=True)
    make_run(tmp_path / "b", figured=True)
    assert main(["report", "--history", str(tmp_path)]) == 2
    assert "expected at least 2 run folders" in capsys.readouterr().err
    make_run(tmp_path / "c", figured=True, seed=3)
    assert main(["report", "--history", str(tmp_path)]) == 0
    assert "a is left out: processor" in (tmp_path / "history.html").read_text()
    assert runs.is_dir()


def test_runs_side_by_side_show_what_changed(runs, tmp_path):
    """Both speedups, and the verdict of the comparison with the first run."""
    out = tmp_path / "side.html"
    assert main(["report", str(runs / "run0"), str(runs / "run5"), "--out", str(out)]) == 0
    page = out.read_text()
    assert "run0 and run5" in page
    assert "slower 0.7" in page


def test_side_by_side_of_different_machines_says_so(tmp_path):
    """What keeps runs from being compared stands at the top; they are shown all the same."""
    one = make_run(tmp_path / "one", figured=True)
    other = make_run(tmp_path / "other", changed("software", torch="2.12.0"), figured=True)
    assert main(["report", str(one), str(other)]) == 0
    assert "other is not comparable with one: torch 2.13.0 against 2.12.0" in (one / "side-by-side.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--history", "a", "b"], "takes one folder"), (["a", "--out", "x.html"], "--out is for a page of several runs")],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, words, said):
    """One line, exit code 2."""
    for name in ("a", "b"):
        make_run(tmp_path / name)
    named = [str(tmp_path / word) if word in {"a", "b", "x.html"} else word for word in words]
    assert main(["report", *named]) == 2
    assert said in capsys.readouterr().err
