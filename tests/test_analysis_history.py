"""Histories of runs: a planted change is found at its place and nowhere else, and its cause is guessed."""

from __future__ import annotations

import copy
import csv
import io
import json

import numpy as np
import pytest
from run_folders import ENVIRONMENT, changed, make_run

from bench.__main__ import main
from bench.analysis import history_tables
from bench.analysis.causes import Cause, between, guesses
from bench.analysis.change_points import Change
from bench.analysis.history import MeasuredBy, read_history
from bench.analysis.intervals import Interval

COMMITS = ("0123456789abcdef", "fedcba9876543210")
VARIANTS = ("reference", "onednn", "loop", "cpu-fused")


def make_history(folder, levels, environments):
    """Run folders whose records have these speedups, noise included: a dict by variant for each run."""
    for number, (speedups, environment) in enumerate(zip(levels, environments, strict=True)):
        path = make_run(
            folder / f"run{number}", environment, speedups=dict.fromkeys(VARIANTS, 1.0), rounds=1, processes=1
        )
        records = path / "records.jsonl"
        lines = []
        for line in map(json.loads, records.read_text().splitlines()):
            speedup = speedups[line["variant"]]
            dated = {"recorded_at": f"2026-01-{number + 1:02d}T00:00:00Z"}
            figures = {"speedup": speedup, "speedup_lo": 0.995 * speedup, "speedup_hi": 1.005 * speedup}
            times = {
                f"latency_p50{end}_s": 1e-3 / value
                for end, value in (("", speedup), ("_lo", 1.005 * speedup), ("_hi", 0.995 * speedup))
            }
            lines.append(json.dumps(line | dated | figures | times))
        records.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def ten_runs(tmp_path_factory):
    """Ten runs; from the sixth on, of another commit, `onednn` is 5 % slower, among noise of 0.5 %."""
    folder = tmp_path_factory.mktemp("ten")
    generator = np.random.default_rng(7)
    levels = [
        {name: (0.95 if name == "onednn" and number >= 5 else 1.0) * np.exp(generator.normal(0, 0.005)) * 2
         for name in VARIANTS}
        for number in range(10)
    ]  # fmt: skip
    environments = []
    for number in range(10):
        environment = copy.deepcopy(ENVIRONMENT)
        environment["git"]["commit"] = COMMITS[number >= 5]
        environments.append(environment)
    make_history(folder, levels, environments)
    return folder


@pytest.mark.parametrize("by", list(MeasuredBy))
def test_a_planted_change_is_found_at_its_place_and_none_elsewhere(ten_runs, by):
    """Of four cases in ten runs, one changed by 5 % at the sixth: that one, there, in that direction."""
    history = read_history(ten_runs, by)
    ((series, change),) = history.changed
    assert series.key[-1] == "onednn"
    assert change.after.path.name == "run5"
    assert change.before.path.name == "run4"
    assert change.change.factor.low < 0.95 < change.change.factor.high < 1


def test_the_cause_of_a_planted_change_is_the_commit(ten_runs):
    """The commit differs and no other case moved, so the code is named first, with both commits."""
    ((_, change),) = read_history(ten_runs).changed
    assert change.guesses[0].cause is Cause.CODE
    assert "commit from 0123456789 to fedcba9876" in str(change.guesses[0])
    assert "0 of 2 other cases" in str(change.guesses[0])


def test_the_three_forms_say_the_same(ten_runs, tmp_path, capsys):
    """Text with the page, CSV and Markdown name the case, its change, and the commits."""
    page = tmp_path / "page.html"
    assert main(["history", str(ten_runs), "--out", str(page)]) == 0
    texts = [capsys.readouterr().out, page.read_text(encoding="utf-8")]
    for form in ("csv", "markdown"):
        out = tmp_path / form
        assert main(["history", str(ten_runs), "--format", form, "--out", str(out)]) == 0
        texts.append(out.read_text(encoding="utf-8"))
    for text in texts:
        assert "run5" in text
        assert "commit from 0123456789 to fedcba9876" in text.replace("\\", "")
    rows = list(csv.DictReader(io.StringIO(texts[2])))
    assert len(rows) == 30
    (row,) = [row for row in rows if row["change"]]
    assert (row["variant"], row["run"], row["guess"]) == ("onednn", "run5", "code")
    assert float(row["change"]) == pytest.approx(0.95, rel=0.01)


def test_every_column_of_the_csv_is_documented(ten_runs):
    """The dictionary of columns has each of them."""
    from test_docs import PAGES

    section = PAGES["results/columns.md"].split("## Columns of a history", 1)[1].split("\n## ", 1)[0]
    header = history_tables.table_csv(read_history(ten_runs)).splitlines()[0].split(",")
    assert [name for name in header if f"`{name}`" not in section] == []


def made_change(chance: float = 1e-9) -> Change:
    return Change(3, Interval(0.9, 0.89, 0.91), chance)


@pytest.mark.parametrize(
    ("after", "others", "chance", "causes"),
    [
        (changed("git", commit=COMMITS[1]), (0, 3), 1e-9, [Cause.CODE]),
        (changed("software", torch="2.14.1"), (3, 3), 1e-9, [Cause.SOFTWARE, Cause.MACHINE]),
        (changed("machine", microcode="0x2"), (3, 3), 1e-9, [Cause.MACHINE]),
        (ENVIRONMENT, (3, 3), 1e-9, [Cause.MACHINE, Cause.NOISE]),
        (ENVIRONMENT, (0, 3), 5e-3, [Cause.NOISE]),
        (changed("git", commit=COMMITS[1]), (0, 3), 5e-3, [Cause.CODE, Cause.NOISE]),
        (changed("software", onnxruntime="1.32"), (0, 3), 1e-9, [Cause.NOISE]),
    ],
)
def test_causes_are_sorted_by_what_speaks_for_them(after, others, chance, causes):
    """What differs, and whether the other cases moved too, decide; a runtime explains its own variants alone."""
    before = changed("machine", microcode="0x1")
    if "microcode" not in after["machine"]:
        after = copy.deepcopy(after)
        after["machine"]["microcode"] = "0x1"
    found = guesses(between(before, after), made_change(chance), "onednn", others, doubtful=False)
    assert [guess.cause for guess in found] == causes


def test_a_new_driver_stays_in_a_history_and_is_told(tmp_path):
    """Runs before and after an update of the GPU's driver are of one machine; another GPU is another one."""
    gpus = ["Some GPU, 550.1, 80 GB, 1980 MHz, 700 W"] * 3 + ["Some GPU, 560.2, 80 GB, 1980 MHz, 700 W"] * 3
    levels = [dict.fromkeys(VARIANTS, 2.0 if number < 3 else 1.8) for number in range(6)]
    make_history(tmp_path, levels, [changed("machine", gpu=gpu) for gpu in gpus])
    history = read_history(tmp_path)
    assert len(history.runs) == 6
    assert {str(c.guesses[0]).partition(" (")[0] for _, c in history.changed} == {"machine"}
    assert all("GPU driver from 550.1 to 560.2" in history_tables.differs(c) for _, c in history.changed)
    # It is recorded now, so it is the latest, and what is of another machine is left out.
    make_run(tmp_path / "other", changed("machine", gpu="Other GPU, 560.2, 80 GB, 1980 MHz, 700 W"))
    assert main(["history", str(tmp_path)]) == 2


def test_what_is_left_out_is_told_by_the_names_of_the_runs(tmp_path):
    """Of two long lists of vector flags, what one run alone has, and which run that is."""
    more = changed("machine", vector_flags=["avx2", "fma", "amx_bf16"])
    make_history(tmp_path, [dict.fromkeys(VARIANTS, 2.0)] * 3, [more, ENVIRONMENT, ENVIRONMENT])
    (line,) = read_history(tmp_path).left_out
    oldest = line.partition(" ")[0]
    assert line == f"{oldest} is left out: vector_flags: only in {oldest}: amx_bf16."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "is not a folder"),
        (["."], "expected at least 2 run folders"),
        ([".", "--format", "csv", "--out", "there"], "nothing is overwritten"),
        ([".", "--out", "mine.csv"], "add --format csv"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, words, told):
    """What was wrong and what was expected; exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert main(["history", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
