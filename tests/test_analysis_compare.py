"""Comparing runs: what changed is found, what drifted is not blamed on a case, and nothing is dropped in silence."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import ENVIRONMENT, FACTS, SPEEDUPS, changed, make_run

from bench import __main__ as command_line
from bench.analysis import compare as comparing
from bench.analysis import tables as compare_tables
from bench.analysis.compare import BY, JUDGED, CasePair, CaseVerdict, CompareOptions, Comparison
from bench.analysis.intervals import Interval
from bench.errors import UsageError
from bench.machine.core_distance import FAR_WORDS
from bench.plan.identity import CaseKey
from bench.records.raw_csv import ROUNDS
from bench.records.schema import SCHEMA_VERSION, Status

ROOT = Path(__file__).parent.parent
CRASH = (Status.CRASHED, "killed by signal 11 | in\n<b>it</b>")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Resample less: no test here is about the last digit of an interval."""
    monkeypatch.setattr("bench.analysis.intervals.RESAMPLES", 400)


def compared(base: Path, new: Path, **options: object) -> Comparison:
    """The comparison of two run folders."""
    return comparing.compare(comparing.load(base), comparing.load(new), CompareOptions(**options))


def pairs(comparison: Comparison) -> dict[str, CasePair]:
    """The pairs of a comparison of one workload, by variant."""
    assert len({pair.key for pair in comparison.pairs}) == len(comparison.pairs)
    return {pair.key.variant: pair for pair in comparison.pairs}


def two(tmp_path: Path, base: dict[str, object], new: dict[str, object]) -> tuple[Path, Path]:
    """Two made runs, of seeds of their own."""
    return make_run(tmp_path / "A", **{"seed": 1, **base}), make_run(tmp_path / "B", **{"seed": 2, **new})


def slowed(variant: str, by: float) -> dict[str, float]:
    """Speedups where a variant takes `by` times as long."""
    return {**SPEEDUPS, variant: SPEEDUPS[variant] / by}


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (1.05, 1.06, 1.07, CaseVerdict.FASTER),
        (0.93, 0.94, 0.95, CaseVerdict.SLOWER),
        (0.99, 1.0, 1.01, CaseVerdict.SAME),
        (1.005, 1.01, 1.015, CaseVerdict.SAME),
        (0.985, 0.99, 0.995, CaseVerdict.SAME),
        (0.97, 1.0, 1.03, CaseVerdict.UNCLEAR),
        (0.9, 0.95, 1.0, CaseVerdict.UNCLEAR),
        (1.0, 1.05, 1.1, CaseVerdict.UNCLEAR),
        (0.95, 0.96, 0.99, CaseVerdict.SLOWER),
    ],
)
def test_a_verdict_follows_from_the_interval(low, value, high, expected):
    """Inside the margin of 2 % it is the same, though the interval excludes 1; an end on 1 excludes nothing."""
    assert comparing.verdict(Interval(value, low, high), 0.02) is expected


@pytest.mark.parametrize("by", BY)
def test_a_run_is_as_fast_as_itself(by, tmp_path):
    """Every change is exactly 1, and nothing is faster or slower."""
    run = make_run(tmp_path / "A", noise=0.05, process_noise=0.03)
    comparison = compared(run, run, by=by)
    assert {pair.change.value for pair in comparison.pairs} == {1.0}
    assert not {pair.verdict for pair in comparison.pairs} & {CaseVerdict.FASTER, CaseVerdict.SLOWER}
    assert len(comparison.judged) == (2 if by == "speedup" else 3)


def test_unchanged_code_is_rarely_blamed(tmp_path, monkeypatch):
    """Of 24 pairs of runs of the same code, each on a machine of another speed, verdicts stay near their 5 %.

    With 4 cases each, at most 1 in 10 verdicts says that something changed, and at most 1 pair in 10 would fail.
    """
    monkeypatch.setattr("bench.analysis.intervals.RESAMPLES", 200)
    verdicts, failed = [], 0
    same = {"reference": 1.0, "onednn": 2.0, "loop": 0.5, "compile": 1.5, "torchscript": 2.5}
    for seed in range(24):
        level = {"speedups": same, "noise": 0.04, "process_noise": 0.01 * (seed % 3), "rounds": 15}
        base = make_run(tmp_path / f"{seed}A", seed=2 * seed, **level)
        new = make_run(tmp_path / f"{seed}B", seed=2 * seed + 1, drift=1 + seed / 24, **level)
        comparison = compared(base, new, threshold=0.0)
        verdicts += [pair.verdict for pair in comparison.judged]
        failed += bool(comparison.regressions)
    assert len(verdicts) == 96
    assert sum(found in {CaseVerdict.FASTER, CaseVerdict.SLOWER} for found in verdicts) <= 9
    assert failed <= 2


@pytest.mark.parametrize("by", BY)
def test_a_slowdown_of_five_percent_is_found(by, tmp_path):
    """With enough rounds the case is slower by 5 %, certainly so, and no other is."""
    comparison = compared(*two(tmp_path, {"rounds": 60}, {"rounds": 60, "speedups": slowed("onednn", 1.05)}), by=by)
    found = pairs(comparison)
    assert found["onednn"].verdict is CaseVerdict.SLOWER
    assert found["onednn"].holds
    assert found["onednn"].change.value == pytest.approx(1 / 1.05, rel=0.01)
    assert found["onednn"].change.low < 1 / 1.05 < found["onednn"].change.high
    assert found["loop"].verdict is CaseVerdict.SAME
    assert found["onednn"].regressed(0.03)
    assert not found["onednn"].regressed(0.08)


@pytest.mark.parametrize("by", BY)
def test_a_case_that_became_faster_is_faster(by, tmp_path):
    """A speedup that grew and a time that shrank have both a change above 1."""
    found = pairs(compared(*two(tmp_path, {}, {"speedups": slowed("onednn", 0.8)}), by=by))["onednn"]
    assert found.verdict is CaseVerdict.FASTER
    assert found.change.value == pytest.approx(1.25, rel=0.02)
    assert (found.new_value > found.base_value) is (by == "speedup")
    assert not found.regressed(0.0)


def test_a_machine_that_drifts_is_told_by_its_yardstick(tmp_path):
    """By speedup a machine half as fast again changes no verdict; the reference shows it, and is not judged."""
    comparison = compared(*two(tmp_path, {"rounds": 40}, {"rounds": 40, "drift": 1.5}), threshold=0.03)
    found = pairs(comparison)
    assert {found[name].verdict for name in ("onednn", "loop")} == {CaseVerdict.SAME}
    assert found["reference"].verdict is CaseVerdict.YARDSTICK
    assert found["reference"].change.value == pytest.approx(1 / 1.5, rel=0.01)
    assert [pair.key.variant for pair in comparison.moved] == ["reference"]
    assert not comparison.regressions
    told = compare_tables.render([comparison], "text")
    assert "the reference itself moved in 1 of 1 group" in told
    assert "1.50 times as long" in told
    assert "--by time" in told


def test_by_time_a_drift_counts(tmp_path):
    """The same runs by time: all cases are slower, the reference among them."""
    comparison = compared(*two(tmp_path, {}, {"drift": 1.5}), by="time", threshold=0.03)
    assert {pair.verdict for pair in comparison.pairs} == {CaseVerdict.SLOWER}
    assert len(comparison.regressions) == 3
    assert not comparison.moved


def test_a_yardstick_within_the_threshold_is_not_mentioned(tmp_path):
    """A reference that moved by 2 % is told in its row alone when 3 % are allowed."""
    runs = two(tmp_path, {}, {"drift": 1.02})
    assert not compared(*runs, threshold=0.03).moved
    assert compared(*runs, threshold=0.01).moved


def test_a_yardstick_that_cannot_be_told_is_not_said_to_have_moved(tmp_path):
    """A ratio of two medians whose interval holds 1 is no news of the machine."""
    runs = two(tmp_path, BUSY, {**BUSY, "drift": 1.5})
    assert not compared(*runs, threshold=0.01).moved


@pytest.mark.parametrize("side", ["BASE", "NEW"])
def test_without_a_reference_the_time_is_compared_and_marked(side, tmp_path):
    """In a run whose reference failed there is no speedup; what is compared instead is said in the case's row."""
    without = {"failed": {"reference": CRASH}}
    comparison = compared(*two(tmp_path, *((without, {}) if side == "BASE" else ({}, without))))
    found = pairs(comparison)
    assert found["reference"].verdict is (CaseVerdict.FIXED if side == "BASE" else CaseVerdict.BROKEN)
    assert found["onednn"].by == "time"
    assert found["onednn"].note == f"by time: no reference in {side}"
    assert found["onednn"].change.value == pytest.approx(1, rel=0.02)
    assert all(f"by time: no reference in {side}" in compare_tables.render([comparison], f) for f in ("text", "csv"))
    assert not comparison.means, "a mean of speedups takes no change of times in"


def test_every_case_of_either_run_is_in_the_comparison(tmp_path):
    """Broken, mended, in one run only, ok in neither: each once, with its reason."""
    base = {"failed": {"mended": CRASH, "never": CRASH}, "speedups": {**SPEEDUPS, "broken": 1.0, "gone": 1.0}}
    new = {
        "failed": {"broken": (Status.PARITY_FAILED, "off by 3e-1"), "never": CRASH, "bad": CRASH},
        "speedups": {**SPEEDUPS, "mended": 1.0, "new": 1.0},
    }
    comparison = compared(*two(tmp_path, base, new), threshold=0.03)
    found = pairs(comparison)
    assert {name: pair.verdict for name, pair in found.items() if pair.verdict not in JUDGED} == {
        "reference": CaseVerdict.YARDSTICK,
        "broken": CaseVerdict.BROKEN,
        "gone": CaseVerdict.ONLY_BASE,
        "mended": CaseVerdict.FIXED,
        "never": CaseVerdict.NEITHER,
        "new": CaseVerdict.ONLY_NEW,
        "bad": CaseVerdict.ONLY_NEW,
    }
    assert found["broken"].note == "parity-failed: off by 3e-1"
    assert found["mended"].note.startswith("was crashed: killed")
    assert found["bad"].note.startswith("crashed: killed")
    assert [pair.key.variant for pair in comparison.regressions] == ["broken"]
    for form in compare_tables.FORMATS:
        shown = compare_tables.render([comparison], form)
        assert [name for name in found if name not in shown] == []


def test_a_few_rounds_and_much_noise_are_unclear(tmp_path):
    """If the interval holds both, no verdict is claimed."""
    runs = two(tmp_path, {"rounds": 6, "noise": 0.1}, {"rounds": 6, "noise": 0.1, "seed": 3})
    assert {pair.verdict for pair in compared(*runs).judged} == {CaseVerdict.UNCLEAR}


def made_pair(value: float, reach: float, name: str = "a") -> CasePair:
    """A judged pair whose interval reaches `reach` to both sides, on the scale of logarithms."""
    change = Interval(value, value * math.exp(-reach), value * math.exp(reach))
    return CasePair(
        CaseKey("w", "m", "cpu", 1, name), None, None, comparing.verdict(change, 0.0), "time", 1.0, 1.0, change
    )


def test_an_interval_that_ends_on_one_has_a_chance_of_five_percent():
    """The probability read off an interval agrees with the interval."""
    assert comparing.chance(Interval(1.1, 1.0, 1.2)) == pytest.approx(0.05)
    assert comparing.chance(Interval(0.9, 0.8, 1.0)) == pytest.approx(0.05)
    assert comparing.chance(Interval(1.0, 0.9, 1.1)) == pytest.approx(1.0)
    assert comparing.chance(Interval(1.1, 1.05, 1.2)) < 0.05 < comparing.chance(Interval(1.1, 0.95, 1.2))
    assert comparing.chance(Interval(1.0, 1.0, 1.0)) == 1.0
    assert comparing.chance(Interval(0.5, 0.5, 0.5)) == 0.0


def test_what_holds_among_many_is_less_than_what_holds_alone():
    """A change just beyond its own interval holds alone, not among 40; one far beyond holds among 40 too."""
    barely, far = made_pair(0.95, 0.05, "barely"), made_pair(0.95, 0.01, "far")
    assert all(pair.holds for pair in comparing.allow_for_all([barely]))
    unchanged = [made_pair(1.0, 0.05, str(n)) for n in range(40)]
    holding = [pair.key.variant for pair in comparing.allow_for_all([barely, *unchanged, far]) if pair.holds]
    assert holding == ["far"]


def test_a_geometric_mean_is_that_of_the_changes():
    """Twice as fast and half as fast cancel; the doubt of four equal changes is half that of one."""
    mean = comparing.geometric_mean([Interval(2.0, 1.9, 2.1), Interval(0.5, 0.4, 0.6)])
    assert mean.value == pytest.approx(1.0)
    mean = comparing.geometric_mean([Interval(1.1, 1.1 / 1.04, 1.1 * 1.04)] * 4)
    assert (mean.low, mean.high) == (pytest.approx(1.1 / 1.04**0.5), pytest.approx(1.1 * 1.04**0.5))


def test_means_are_over_the_groups_of_a_variant(tmp_path):
    """One mean a variant over two workloads; the reference's is of its time."""
    workloads = ("seed", "seed@batch=2")
    comparison = compared(*two(tmp_path, {"workloads": workloads}, {"workloads": workloads, "drift": 1.2}))
    found = {(mean.variant, mean.by): mean for mean in comparison.means}
    assert set(found) == {("reference", "time"), ("onednn", "speedup"), ("loop", "speedup")}
    assert all(mean.cases == 2 for mean in found.values())
    values = [pair.change.value for pair in comparison.pairs if pair.key.variant == "loop"]
    assert found["loop", "speedup"].change.value == pytest.approx(np.sqrt(values[0] * values[1]))
    assert found["reference", "time"].change.value == pytest.approx(1 / 1.2, rel=0.01)


OTHER = {
    "processor": ("machine", "Other CPU", "processor Some CPU against Other CPU"),
    "architecture": ("machine", "aarch64", "architecture x86_64 against aarch64"),
    "vector_flags": ("machine", ["avx2", "avx512f"], "vector_flags: only in BASE: fma, only in NEW: avx512f"),
    "more vector flags": ("machine", ["avx2", "fma", "amx_bf16"], "vector_flags: only in NEW: amx_bf16"),
    "fewer vector flags": ("machine", ["avx2"], "vector_flags: only in BASE: fma"),
    "cores_physical": ("machine", 8, "cores_physical 2 against 8"),
    "cores_logical": ("machine", None, "cores_logical 4 against not recorded"),
    "memory_bytes": ("machine", 32_000_000_000, "memory 16.0 GB against 32.0 GB"),
    "affinity": ("machine", [0], "usable cores 4 against 1"),
    "gpu": ("machine", "NVIDIA H200", "gpu none against NVIDIA H200"),
    "python": ("software", "3.12.1", "python 3.11.7 against 3.12.1"),
    "torch": ("software", "2.12.0", "torch 2.13.0 against 2.12.0"),
    "triton": ("software", "3.6.0", "triton 3.7.1 against 3.6.0"),
    "numpy": ("software", "2.3.0", "numpy 2.4.0 against 2.3.0"),
    "cpu_capability": ("software", "AVX512", "cpu_capability AVX2 against AVX512"),
    "blas": ("software", "open", "blas mkl against open"),
    "cudnn": ("software", 91000, "cudnn not recorded against 91000"),
    "workers": ("threads", {"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY unset against passive"),
    "inherited": ("threads", {"KMP_BLOCKTIME": "0"}, "KMP_BLOCKTIME 1 against 0"),
}


@pytest.mark.parametrize("fact", OTHER)
def test_runs_that_differ_in_what_must_agree_are_refused(fact, tmp_path):
    """The one line names the fact with both values and says how to go on; forced, the mark names it likewise."""
    section, value, told = OTHER[fact]
    fact = "vector_flags" if fact.endswith("vector flags") else fact
    base = make_run(tmp_path / "A")
    new = make_run(tmp_path / "B", environment=changed(section, **{fact: value}))
    with pytest.raises(UsageError) as error:
        compared(base, new)
    assert told in str(error.value)
    assert str(error.value).count(told) == 1
    assert str(error.value).count(" against ") == told.count(" against ")
    assert "--force" in str(error.value)
    assert "\n" not in str(error.value)
    forced = compared(base, new, force=True)
    for form in compare_tables.FORMATS:
        shown = compare_tables.render([forced], form).replace("\\", "")
        assert told in shown
        assert "NOT COMPARABLE" in shown or form == "csv"


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("git", {"commit": "f" * 40, "dirty": True}),
        ("machine", {"governor": "powersave"}),
        ("machine", {"frequency_mhz": 1200}),
        ("machine", {"system": "Linux-6.2"}),
        ("machine", {"memory_bytes": 16_000_004_096}),
        ("software", {"matplotlib": "9"}),
        ("threads", {"workers": {}}),
        ("run", {"suite": "other", "seed": 3}),
    ],
)
def test_what_may_differ_does_not_refuse(section, values, tmp_path):
    """Another commit is what is compared; governor, clock and system are warnings with both values."""
    comparison = compared(make_run(tmp_path / "A"), make_run(tmp_path / "B", environment=changed(section, **values)))
    assert not comparison.differences
    warned = {"governor", "frequency_mhz", "system"} & set(values)
    assert len(comparison.warnings) == len(warned)
    shown = compare_tables.render([comparison], "text")
    assert all(str(values[name]) in shown for name in warned)
    if section == "git":
        assert "commit ffffffffff with uncommitted changes" in shown


@pytest.mark.parametrize("environment", [{}, {"machine": 3, "software": []}])
def test_a_run_whose_environment_nobody_knows_is_refused(environment, tmp_path):
    """A fact that was not recorded vouches for nothing."""
    base, new = make_run(tmp_path / "A"), make_run(tmp_path / "B", environment=environment)
    with pytest.raises(UsageError, match="not recorded"):
        compared(base, new)
    (new / "environment.json").unlink()
    with pytest.raises(UsageError, match="not recorded"):
        compared(new, new)


def test_a_name_that_stands_for_another_problem_is_refused(tmp_path):
    """A workload whose sizes were changed between two commits is not the same case."""
    runs = two(tmp_path, {}, {"facts": {**FACTS, "hidden_size": 32}})
    with pytest.raises(UsageError, match="seed onednn inference: hidden_size 16 against 32"):
        compared(*runs)
    assert len(compared(*runs, force=True).differences) == 3


def test_other_threads_are_refused_and_paired_by_force(tmp_path):
    """Threads are part of a case; forced, one thread is held against two, and marked."""
    runs = two(tmp_path, {}, {"threads": 2})
    with pytest.raises(UsageError, match="threads 1 against 2"):
        compared(*runs)
    forced = compared(*runs, force=True)
    assert [str(difference) for difference in forced.differences] == ["threads 1 against 2"]
    assert len(forced.judged) == 2


@pytest.mark.parametrize("force", [False, True])
def test_runs_without_a_common_case_are_refused(force, tmp_path):
    """Nothing compared is no regression only in words: a gate that compares nothing must not pass."""
    with pytest.raises(UsageError, match="no case in common"):
        compared(*two(tmp_path, {}, {"workloads": ("other",)}), force=force)


def cells(line: str) -> list[str]:
    """Cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.replace("\\|", "&").strip("|").split("|")]


def test_markdown_keeps_its_columns_whatever_a_reason_holds(tmp_path):
    """Bars, line ends and tags of a reason stay in their cell; the unchanged are folded away."""
    new = {"speedups": slowed("onednn", 1.3), "failed": {"loop": CRASH}}
    shown = compare_tables.render([compared(*two(tmp_path, {}, new), threshold=0.03)], "markdown")
    lines = shown.splitlines()
    assert lines[0].startswith("**NEW ")
    assert "1 broken, 1 slower, 1 yardstick; 2 regressions" in lines[0]
    blocks = [block.splitlines() for block in shown.split("\n\n") if block.startswith("| ")]
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(cells(line)) for line in block}) == 1
    assert "\\<b\\>" in shown
    folded = shown[shown.index("<details>") : shown.index("</details>")]
    assert "yardstick" in folded
    assert "onednn" not in folded


def test_csv_has_a_row_a_case_and_new_with_every_digit(tmp_path):
    """Rows are read back with their figures; nothing but the table is in it."""
    base, slow = two(tmp_path, {}, {"speedups": slowed("onednn", 1.3)})
    found = [compared(base, slow, threshold=0.03), compared(base, base, threshold=0.03)]
    rows = list(csv.DictReader(io.StringIO(compare_tables.render(found, "csv"))))
    assert len(rows) == 6
    row = next(row for row in rows if row["new_run"] == str(slow) and row["variant"] == "onednn")
    pair = pairs(found[0])["onednn"]
    assert (float(row["change"]), float(row["change_lo"])) == (pair.change.value, pair.change.low)
    assert (row["verdict"], row["regression"], row["holds_among_all"]) == ("slower", "True", "True")
    assert sum(row["regression"] == "True" for row in rows) == 1
    assert {row["verdict"] for row in rows if row["variant"] == "reference"} == {"yardstick"}


def test_several_runs_stand_side_by_side(tmp_path):
    """Each NEW has its own change and verdict under its folder's name; a case of one run alone is told below."""
    base, slow = two(tmp_path, {}, {"speedups": {**slowed("onednn", 1.3), "extra": 1.0}})
    table = compare_tables.cases([compared(base, slow), compared(base, base)])
    assert table.columns == [
        *("workload", "mode", "variant", "BASE A", "NEW1 B", "change", "verdict", "NEW2 A", "change", "verdict"),
    ]
    rows = {row[2]: row for row in table.rows}
    assert rows["onednn"][6].startswith("slower")
    assert rows["onednn"][9] in {"same", "unclear"}
    assert "extra" not in rows
    assert "1 case only in NEW1: seed inference extra" in compare_tables.render(
        [compared(base, slow), compared(base, base)], "text"
    )


def test_a_doubtful_figure_is_marked(tmp_path):
    """The mark of a run's own table stays on the figure that is compared."""
    base, new = two(tmp_path, {}, {"disturbed_share": 1.0, "figured": True})
    table = compare_tables.cases([compared(base, new)])
    assert all(row[3].startswith("~") is False and row[4].startswith("~") for row in table.rows)


def test_cores_that_were_far_apart_in_one_run_are_no_change(tmp_path):
    """All rounds in that state tell what variants are to each other, and not what they would be on near cores."""
    base, new = two(tmp_path, {}, {"speedups": slowed("onednn", 1.005), "disturbed_share": 1.0})
    shared = pairs(compared(base, new))["onednn"].change
    rows = [
        ["seed/inference/cpu/1t", process, number, 1, 0, f"{FAR_WORDS} 550 ns, 175 at best in this run", *[""] * 9]
        for process in range(3)
        for number in range(20)
    ]
    ROUNDS.append(new, rows)
    (samples,) = comparing.load(new).samples.values()
    assert samples.stretch("onednn") == 1.0
    assert pairs(compared(base, new))["onednn"].change == shared


def main(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line."""
    try:
        code = command_line.main(["compare", *map(str, words)])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_exit_codes_tell_a_regression(tmp_path, capsys):
    """0 without --fail-on or within it, 3 beyond it."""
    base, slow = two(tmp_path, {}, {"speedups": slowed("onednn", 1.1)})
    assert main(capsys, base, slow)[0] == 0
    assert main(capsys, base, slow, "--fail-on", "slower:20%")[0] == 0
    code, out, err = main(capsys, base, slow, "--fail-on", "slower:3%")
    assert (code, err) == (3, "")
    assert "1 regression" in out
    again = shutil.copytree(base, tmp_path / "again")
    assert main(capsys, base, again, slow, "--fail-on", "slower:3%")[0] == 3
    assert main(capsys, slow, base, "--fail-on", "slower:3%")[0] == 0


def test_a_run_is_not_compared_with_itself(tmp_path, capsys, monkeypatch):
    """It would come out as the same throughout, whatever was meant."""
    base, slow = two(tmp_path, {}, {})
    monkeypatch.chdir(base)
    for words in ((base, "."), (base, slow, base)):
        code, out, err = main(capsys, *words)
        assert (code, out) == (2, "")
        assert err == f"error: {base} is the base and a run to compare with it; name two runs\n"


#: A busy machine: few rounds, and processes that differ by far.
BUSY = {"rounds": 6, "noise": 0.3, "process_noise": 0.8, "disturbed_share": 1.0, "figured": True}
QUIET = {"rounds": 40}


@pytest.mark.parametrize(
    ("slowdown", "level", "code"), [(3.0, BUSY, 5), (1.0, BUSY, 5), (3.0, QUIET, 3), (1.0, QUIET, 0), (1.4, QUIET, 3)]
)
def test_a_gate_does_not_pass_on_what_it_cannot_tell(slowdown, level, code, tmp_path, capsys):
    """Wide intervals end with 5 whether the case is three times slower or not; narrow ones tell, with 3 or 0."""
    runs = two(tmp_path, level, {**level, "speedups": slowed("onednn", slowdown)})
    ended, out, _ = main(capsys, *runs, "--fail-on", "slower:3%")
    assert ended == code
    assert ("could not tell" in out) is (code == 5)
    if code == 5:
        line = next(line for line in out.splitlines() if "neither shown nor excluded for" in line)
        assert "seed inference onednn" in line
        assert "something else used the machine" in line
        assert "measure again on a quiet machine, with a larger --budget" in line
    assert main(capsys, *runs, "--fail-on", "slower:3%", "--allow-unclear")[0] == (code if code == 3 else 0)
    shown = [compare_tables.render([compared(*runs, threshold=0.03)], form) for form in compare_tables.FORMATS]
    assert all(("no regression" in text) is (code == 0) for text in shown if not text.startswith("base_run"))
    told = {row["variant"]: row["could_not_tell"] for row in csv.DictReader(io.StringIO(shown[1]))}
    assert (told["onednn"] == "True") is (code == 5)


def test_a_regression_wins_over_what_cannot_be_told(tmp_path, capsys):
    """A broken case ends with 3 beside one that is unclear; with several runs the worst outcome counts."""
    broken = {"failed": {"loop": (Status.PARITY_FAILED, "off")}}
    base, new = two(tmp_path, BUSY, {**BUSY, **broken})
    unclear = make_run(tmp_path / "C", **{**BUSY, "seed": 3})
    assert main(capsys, base, new, "--fail-on", "slower:3%")[0] == 3
    assert main(capsys, base, new, "--fail-on", "slower:3%", "--allow-unclear")[0] == 3
    again = shutil.copytree(base, tmp_path / "again")
    assert main(capsys, base, again, unclear, "--fail-on", "slower:3%")[0] == 5
    assert main(capsys, base, unclear, new, "--fail-on", "slower:3%")[0] == 3


@pytest.mark.parametrize(
    ("low", "value", "high", "holds", "unclear"),
    [
        (0.98, 1.0, 1.03, False, False),  # ends before the threshold
        (0.96, 1.0, 1.04, False, True),
        (0.96, 1.05, 1.2, False, True),
        (1.01, 1.05, 1.2, True, False),  # faster
        (0.5, 0.6, 0.7, True, False),  # a regression
        (0.5, 0.6, 0.7, False, True),  # one that does not hold among all
        (0.95, 0.975, 0.99, True, True),  # certainly slower, and by more or less than the threshold
        (0.975, 0.98, 0.99, True, False),  # certainly slower, by less
        (0.001, 0.552, 4.325, False, True),
    ],
)
def test_what_can_be_told_follows_from_the_interval(low, value, high, holds, unclear):
    """Of a threshold of 3 %, a case is open unless a slowdown beyond it is found or excluded."""
    change = Interval(value, low, high)
    key, judged = CaseKey("seed", "inference", "cpu", 1, "loop"), comparing.verdict(change, 0.02)
    pair = CasePair(key, None, None, judged, "speedup", change=change, holds=holds)
    assert pair.unclear(0.03) is unclear


def test_within_the_margin_nothing_is_open(tmp_path):
    """A change that the user calls the same is the same, however low the threshold."""
    base = make_run(tmp_path / "A", rounds=60)
    assert not compared(base, base, threshold=0.0).unclear


def test_a_case_that_new_has_not_measured_yet_is_open(tmp_path, capsys):
    """A run that was cut short passes no gate, and the line says how to finish it; one that never had it may."""
    base, new = two(tmp_path, QUIET, {**QUIET, "speedups": {"reference": 1.0, "onednn": 2.0}})
    assert main(capsys, base, new, "--fail-on", "slower:3%")[0] == 0
    cases = [{"workload": "seed", "mode": "inference", "device": "cpu", "threads": 1, "variant": v} for v in SPEEDUPS]
    (new / "plan.json").write_text(json.dumps({"cases": cases}))
    code, out, _ = main(capsys, base, new, "--fail-on", "slower:3%")
    assert code == 5
    assert f"seed inference loop is yet to be measured; finish that run: python -m bench run --resume {new}" in out
    assert main(capsys, base, new)[0] == 0


def test_a_gate_that_judges_nothing_does_not_pass(tmp_path, capsys):
    """Runs that share their yardstick alone tell nothing of any variant."""
    alone = {"speedups": {"reference": 1.0}}
    code, out, _ = main(capsys, *two(tmp_path, alone, alone), "--fail-on", "slower:3%")
    assert code == 5
    assert "no case was measured in both runs and judged" in out


def test_runs_of_different_suites_show_what_they_share(tmp_path):
    """Cases of one run alone are counted by how they ended, a few names listed, and CSV has every row."""
    many = {f"v{number}": 1.0 for number in range(12)}
    failed = {f"off{number}": (Status.UNAVAILABLE, "no GPU") for number in range(20)}
    comparison = compared(*two(tmp_path, {}, {"speedups": {**SPEEDUPS, **many}, "failed": failed}))
    assert len(compare_tables.cases([comparison]).rows) == 3
    for form in ("text", "markdown"):
        shown = compare_tables.render([comparison], form)
        assert "32 cases only in NEW (20 unavailable): seed inference v0, " in shown
        assert "and 27 more; --format csv lists all" in shown
        assert "v11" not in shown
    assert "v11" in compare_tables.render([comparison], "csv")


def test_an_interval_that_estimates_nothing_is_not_printed_as_one(tmp_path):
    """Eighteen orders of magnitude are no figure; the digits are in the CSV."""
    change = Interval(1.107, 1e-9, 1e10)
    assert compare_tables._change(change) == "no estimate"
    assert compare_tables._change(Interval(1.107, 1.0, 1.2)) == "1.107x [1.000, 1.200]"
    runs = two(tmp_path, BUSY, {**BUSY, "process_noise": 2.0})
    rows = compare_tables.cases([compared(*runs)]).rows
    assert any("no estimate" in cell for row in rows for cell in row)


PLUGINS = {
    "changed": ({"/a/mine.py": "1" * 64}, {"/a/mine.py": "2" * 64}, "plugin mine.py 1111111111 against 2222222222"),
    "moved and changed": ({"/a/mine.py": "1" * 64}, {"/b/mine.py": "2" * 64}, "plugin mine.py 1111111111 against 222"),
    "only in NEW": ({}, {"/a/mine.py": "2" * 64}, "plugin mine.py none against 2222222222"),
    "only in BASE": ({"/a/mine.py": "1" * 64}, {}, "plugin mine.py 1111111111 against none"),
    "the same": ({"/a/mine.py": "1" * 64}, {"/a/mine.py": "1" * 64}, None),
    "moved": ({"/a/mine.py": "1" * 64}, {"/b/mine.py": "1" * 64}, None),
    "not recorded": (None, {"/a/mine.py": "1" * 64}, None),
}


@pytest.mark.parametrize("how", PLUGINS)
def test_a_plugin_that_changed_is_named(how, tmp_path):
    """The change under test may be in it: told with both digests in every format, and no reason to refuse."""
    base, new, told = PLUGINS[how]
    runs = [
        make_run(tmp_path / name, environment=changed("run", plugins=plugins))
        for name, plugins in (("A", base), ("B", new))
    ]
    comparison = compared(*runs)
    assert len(comparison.plugins) == (told is not None)
    for form in compare_tables.FORMATS:
        shown = compare_tables.render([comparison], form)
        assert told is None or told in shown
    if new:
        (digest,) = new.values()
        assert f"commit 0123456789, plugin mine.py {digest[:10]}" in compare_tables.render([comparison], "text")


@pytest.mark.parametrize(
    ("base", "new", "told"),
    [
        ({"cpu_quota": 1.5}, {"cpu_quota": 2.0}, "CPU quota 1.5 against 2.0"),
        ({"cpu_quota": "none"}, {"cpu_quota": 2.0}, "CPU quota none against 2.0"),
        ({"cpu_quota": 2.0}, {"cpu_quota": 2.0}, ""),
        ({}, {"cpu_quota": 2.0}, ""),
        ({}, {}, ""),
    ],
)
def test_another_quota_of_a_container_is_refused_where_it_is_known(base, new, told, tmp_path):
    """Half the cores is another machine; a run that did not record its quota may have had any."""
    machine = ENVIRONMENT["machine"]
    runs = [
        make_run(tmp_path / name, environment={**ENVIRONMENT, "machine": {**machine, **quota}})
        for name, quota in (("A", base), ("B", new))
    ]
    if told:
        with pytest.raises(UsageError, match=told):
            compared(*runs)
    else:
        assert not compared(*runs).differences


def test_a_broken_case_is_a_regression(tmp_path, capsys):
    """A variant that fails its gate is not faster than any threshold."""
    base, new = two(tmp_path, {}, {"failed": {"onednn": (Status.PARITY_FAILED, "off")}})
    code, out, _ = main(capsys, base, new, "--fail-on", "slower:50%")
    assert code == 3
    assert "broken (parity-failed: off)" in out
    assert main(capsys, base, new)[0] == 0


WRONG = {
    "no NEW": (["A"], "NEW"),
    "margin in words": (["A", "B", "--margin", "little"], "'little'"),
    "margin below 0": (["A", "B", "--margin=-1%"], "'-1%'"),
    "margin of all": (["A", "B", "--margin", "100%"], "'100%'"),
    "threshold without word": (["A", "B", "--fail-on", "3%"], "'3%'"),
    "threshold of faster": (["A", "B", "--fail-on", "faster:3%"], "'faster:3%'"),
    "threshold in words": (["A", "B", "--fail-on", "slower:nan"], "'nan'"),
    "unknown format": (["A", "B", "--format", "html"], "'html'"),
    "unknown measure": (["A", "B", "--by", "memory"], "'memory'"),
    "no such folder": (["A", "C"], "C is not a folder"),
    "a file": (["A", "A/records.csv"], "is not a folder"),
    "unclear allowed for nothing": (["A", "B", "--allow-unclear"], "--fail-on"),
    "an output that is there": (["A", "B", "--out", "taken"], "taken exists"),
    "an output in no folder": (["A", "B", "--out", "none/out.md"], "none/out.md cannot be written"),
}


@pytest.mark.parametrize("problem", WRONG)
def test_wrong_usage_is_one_line(problem, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that names what was wrong, nothing on standard output, nothing overwritten."""
    monkeypatch.chdir(tmp_path)
    two(tmp_path, {}, {})
    (tmp_path / "taken").write_text("mine")
    words, named = WRONG[problem]
    code, out, err = main(capsys, *words)
    assert (code, out) == (2, "")
    assert named in err.splitlines()[-1]
    assert "error: " in err.splitlines()[-1]
    assert (tmp_path / "taken").read_text() == "mine"


def edited(name: str, old: str, new: str):
    """A change of a text file of a run."""
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


DAMAGE = {
    "no records": lambda run: (run / "records.jsonl").unlink(),
    "records of another kind": lambda run: (run / "records.jsonl").write_bytes(b"\x00\xff\xfe\n{}\n"),
    "another version": edited("records.jsonl", f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 1'),
    "a word for a number": edited("records.jsonl", '"threads": 1', '"threads": "one"'),
    "no samples": lambda run: (run / "samples.csv.gz").unlink(),
    "a tenth of the samples": lambda run: (run / "samples.csv.gz").write_bytes(
        (run / "samples.csv.gz").read_bytes()[:300]
    ),
    "environment that is not JSON": lambda run: (run / "environment.json").write_text("{"),
    "environment that is a list": lambda run: (run / "environment.json").write_text("[1]"),
    "samples of another run": edited("records.jsonl", "onednn", "oneDNN"),
    "plan that is not JSON": lambda run: (run / "plan.json").write_text("{"),
    "plan without names": lambda run: (run / "plan.json").write_text('{"cases": [{"mode": 1}]}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(damage, tmp_path, capsys):
    """Exit code 2 and the path, whatever is wrong in the folder."""
    base, new = two(tmp_path, {}, {})
    DAMAGE[damage](new)
    code, out, err = main(capsys, base, new)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(new) in err


@pytest.mark.parametrize("form", compare_tables.FORMATS)
def test_an_output_file_holds_what_the_terminal_would_show(form, tmp_path, capsys):
    """The lead is still said; the file is written once."""
    runs = two(tmp_path, {}, {})
    _, shown, _ = main(capsys, *runs, "--format", form)
    code, out, _ = main(capsys, *runs, "--format", form, "--out", tmp_path / "out")
    assert code == 0
    assert [line.rstrip() for line in shown.splitlines()] == (tmp_path / "out").read_text().splitlines()
    assert "written: " in out
    assert main(capsys, *runs, "--out", tmp_path / "out")[0] == 2


def test_defaults_of_the_command_line_are_those_of_the_code():
    """The program does what --help says."""
    found = command_line.parser().parse_args(["compare", "A", "B"])
    assert CompareOptions(found.by, found.margin, found.fail_on, found.force) == CompareOptions()


@pytest.mark.slow
def test_the_real_command_line_compares(tmp_path):
    """From outside: exit code 3, the table, and no torch imported."""
    base, slow = two(tmp_path, {}, {"speedups": slowed("onednn", 1.2)})
    spy = "import sys; from bench.__main__ import main; code = main(sys.argv[1:])"
    spy += "; print('torch' in sys.modules); sys.exit(code)"
    words = ["compare", str(base), str(slow), "--fail-on", "slower:3%"]
    done = subprocess.run(
        [sys.executable, "-c", spy, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines()[-1] == "False"
    assert "slower !" in done.stdout
    assert json.loads((base / "environment.json").read_text()) == ENVIRONMENT
