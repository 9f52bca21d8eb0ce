"""Time to quality: a variant that is faster a step but needs more of them shows it, and the wrong ones are refused."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from report_pages import page_text
from run_folders import make_run

from bench import __main__ as command_line
from bench.analysis.run_summary import load_run
from bench.console import Console
from bench.errors import UsageError
from bench.plan.cases import Filters, Quality, load_suite
from bench.records.folder import RunFolder
from bench.records.quality import (
    COLUMNS,
    QualityRecord,
    Trained,
    curve_distance,
    dictionary,
    figures,
    read,
    read_rounds,
    write,
)
from bench.records.schema import Status
from bench.report import plots
from bench.report import quality as reported
from bench.run import quality
from bench.run.worker_process import Settings, WorkerError

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugins" / "quality_task.py"
PART = Quality("tiny", "", ("*",), "naive", 0.5, steps=40, block=10)


def trained(variant, step_s, qualities, losses=None, why=""):
    """A variant's training of 10 steps a block."""
    rounds = [
        {
            "step": 10 * (number + 1),
            "training_s": 10 * step_s * (1 + 0.01 * (-1) ** number),
            "evaluation_s": 0.5,
            "quality": value,
            "baseline": 1.0,
            "why": why,
        }
        for number, value in enumerate(qualities)
    ]
    steps = 10 * len(qualities)
    return Trained(variant, rounds, losses or [1 / (1 + step) for step in range(steps)])


def records(*found):
    """Their records by variant."""
    made = figures(PART, "error", "cpu", 2, {one.variant: one for one in found})
    return {record.variant: record for record in made}


def test_faster_a_step_but_slower_to_quality_shows():
    """Half the time a step, three times the steps: the speedup to the target is below 1."""
    found = records(
        trained("reference", 0.2, [0.9, 0.4, 0.4, 0.4, 0.4, 0.4]), trained("half", 0.1, [0.9, 0.8, 0.7, 0.6, 0.55, 0.4])
    )
    assert found["half"].step_s == pytest.approx(0.1, rel=0.02)
    assert (found["reference"].steps_to_target, found["half"].steps_to_target) == (20, 60)
    assert found["reference"].speedup == 1
    assert found["half"].speedup == pytest.approx(4 / 6, rel=0.02)


def test_evaluations_are_not_in_the_time_to_the_target():
    """Two blocks of 2 s are 4 s, whatever their evaluations took."""
    found = records(trained("reference", 0.2, [0.9, 0.4]))["reference"]
    assert found.time_to_target_s == pytest.approx(4.0, rel=0.01)
    assert found.evaluation_s == 1.0
    assert found.time_to_target_lo_s <= found.time_to_target_s <= found.time_to_target_hi_s


def test_a_target_that_is_not_reached_has_no_time():
    """The record says so, and what was best."""
    found = records(trained("reference", 0.2, [0.9, 0.4]), trained("slow", 0.2, [0.9, 0.7]))["slow"]
    assert found.reached is False
    assert found.time_to_target_s is None
    assert found.speedup is None
    assert found.best_quality == 0.7


def test_disturbed_blocks_are_counted():
    """A share of all blocks."""
    one = trained("reference", 0.2, [0.9, 0.4])
    one.rounds[0]["why"] = "others took 1 core"
    assert records(one)["reference"].disturbed_share == 0.5


def test_what_did_not_end_well_has_no_figures():
    """Its status and reason stand alone, and it is no yardstick."""
    dead = dataclasses.replace(trained("reference", 0.2, [0.4]), fields={"status": Status.CRASHED, "reason": "died"})
    found = records(dead, trained("other", 0.2, [0.4]))
    assert found["reference"].step_s is None
    assert found["reference"].reason == "died"
    assert found["other"].speedup is None
    assert found["other"].reached


def test_the_distance_of_curves_is_the_gap_over_the_range():
    """Nothing against itself; a shift by a tenth of the range is a tenth; one odd batch is smoothed away."""
    curve = [1 - step / 100 for step in range(101)]
    assert curve_distance(curve, curve) == 0
    extent = (101 - 20) / 100
    assert curve_distance([value + 0.1 * extent for value in curve], curve) == pytest.approx(0.1)
    odd = list(curve)
    odd[50] += 0.2
    assert curve_distance(odd, curve) == pytest.approx(0.2 / 20 / extent)
    assert curve_distance([value * 1e6 - 5e6 for value in curve], [v * 1e6 - 5e6 for v in curve]) == 0


def test_the_distance_of_short_or_flat_curves_is_not_told():
    """Rather none than one that means nothing."""
    assert curve_distance([1.0] * 19, [1.0] * 19) is None
    assert curve_distance([1.0] * 40, [1.0] * 40) is None


def test_figures_come_again_from_the_file(tmp_path):
    """Records are read as they were written: numbers, truths, blanks and statuses."""
    dead = Trained("dead", fields={"status": Status.ERROR, "reason": "no, really"})
    found = [trained("reference", 0.2, [0.9, 0.4]), dead]
    made = list(records(*found).values())
    write(tmp_path, made, [("tiny, , full", one) for one in found])
    assert read(tmp_path) == made
    rows = read_rounds(tmp_path)
    assert [row["step"] for row in rows] == [10, 20]
    assert sum(row["training_s"] for row in rows) == pytest.approx(made[0].training_s)
    with gzip.open(tmp_path / "quality-losses.csv.gz", "rt") as file:
        assert len(file.read().splitlines()) == 21


def test_a_file_of_another_release_is_refused(tmp_path):
    """Rather than columns that are taken for others."""
    (tmp_path / "quality.csv").write_text("task,variant\na,b\n")
    with pytest.raises(ValueError, match="other columns"):
        read(tmp_path)


def test_the_dictionary_is_printed():
    """results/columns.md says of every column what the code says."""
    assert set(COLUMNS) == {field.name for field in dataclasses.fields(QualityRecord)}
    assert dictionary() in (ROOT / "results" / "columns.md").read_text(encoding="utf-8")


def test_the_suite_s_target_is_well_below_the_baseline():
    """The temperatures are to be forecast at most half as wrong as by the seasonal naive forecast."""
    (part,) = load_suite("quality").quality
    assert part.target_share <= 0.5
    assert part.baseline == "MASE seasonal naive"


@pytest.mark.parametrize(
    ("line", "words"),
    [("target_share = 1.5", "target_share is 1.5"), ("steps = 0", "count below 1"), ("stepz = 4", "stepz")],
)
def test_a_suite_with_a_bad_part_is_refused(tmp_path, line, words):
    """The line names the field."""
    path = tmp_path / "own.toml"
    own = {"target_share": "target_share = 0.5"} | {line.split()[0]: line}
    text = 'name = "own"\nsummary = "own"\n[[select]]\nworkloads = ["seed"]\n[[quality]]\ntask = "tiny"\n'
    path.write_text(text + 'data = ""\nvariants = ["*"]\nbaseline = "naive"\n' + "\n".join(own.values()))
    with pytest.raises(UsageError, match=words):
        load_suite(str(path))


@pytest.mark.parametrize(("told_s", "believed"), [(9.5, True), (2.0, False), (11.0, False), (0.0, False)])
def test_a_block_s_time_must_be_that_of_the_parent_s_clock(tmp_path, monkeypatch, told_s, believed):
    """A request that took ten seconds cannot have been two seconds of work, nor eleven."""

    class Fake:
        def ask(self, *_, **__):
            scores = {"error": 0.4, "naive": 1.0}
            times = {"training_s": told_s, "prepare_s": 0.0, "evaluation_s": 0.0}
            yield {"event": "block", "step": 10, "losses": [1.0] * 10, "scores": scores, "why": ""} | times

    stage = quality.Stage(PART, Settings(1), "cpu", 0, 1.0, tmp_path / "log", tmp_path)
    stage._workers["onednn"], stage._metric, stage.trained["onednn"] = Fake(), "error", Trained("onednn")
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("bench.run.quality.time.perf_counter", lambda: next(clock))
    stage._block("onednn", 10)
    assert (stage.trained["onednn"].steps == 10) is believed
    assert (stage.trained["onednn"].fields.get("status") is Status.PARITY_FAILED) is not believed


def test_the_command_line_narrows_what_is_trained():
    """Its variants replace the suite's, the reference joins, and a pattern without a hit is told at once."""
    catalogue = {"variants": [{"name": name} for name in ("reference", "onednn", "amp-bf16", "amp-fp16")]}
    (part,) = quality.narrowed([PART], catalogue, Filters())
    assert part.variants == ("reference", "onednn", "amp-bf16", "amp-fp16")
    (part,) = quality.narrowed([PART], catalogue, Filters(variants=("amp-*", "amp-bf16#again")))
    assert part.variants == ("reference", "amp-bf16", "amp-fp16")
    with pytest.raises(UsageError, match="no variant matches 'cudnn'"):
        quality.narrowed([PART], catalogue, Filters(variants=("cudnn",)))


def test_the_page_has_lines_table_and_target(tmp_path):
    """One line per variant that ended, its seconds of training across; what did not end has its reason."""
    folder = make_run(tmp_path / "run", figured=True)
    dead = Trained("loop", fields={"status": Status.ERROR, "reason": "no, really"})
    found = [trained("reference", 0.2, [0.9, 0.4]), trained("onednn", 0.1, [0.9, 0.4], why="others"), dead]
    write(folder, list(records(*found).values()), [("tiny, , full", one) for one in found])
    run = load_run(folder)
    ((chart,),) = (kind.charts for kind in reported.kinds(run))
    assert [(curve.variant, curve.ys) for curve in chart.curves] == [
        ("reference", (0.9, 0.4)),
        ("onednn", (0.9, 0.4)),
    ]
    assert chart.curves[1].xs[-1] == pytest.approx(2.0)
    assert all(point.doubtful for point in chart.curves[1].points)
    assert (0.5, "target") in chart.guides
    written = plots.write_plots(reported.kinds(run), folder / "plots")
    assert folder / "plots" / "quality.png" in written["quality"]
    html = page_text(folder)
    assert "Time to quality: error 0.5, where the seasonal naive forecast has 1" in html
    assert "error: no, really" in html


def test_a_run_without_the_stage_has_no_section(tmp_path):
    """Nothing is said of what was not asked for."""
    run = load_run(make_run(tmp_path / "run"))
    assert reported.kinds(run) == ()
    assert reported.table(run) is None


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_variants_train_side_by_side_and_the_wrong_ones_are_told(tmp_path):
    """In processes of their own: two that agree, one that the gate refuses, one that cannot, one that loses its way."""
    names = ["reference", "onednn", "wrong", "openvino", "late"]
    part = dataclasses.replace(PART, target_share=0.9, variants=tuple(names))
    settings = Settings(1, plugins=(PLUGIN,))
    found = quality.run([part], tmp_path, settings, "cpu", 5, 60.0, tmp_path / "cache", lambda _: None)
    by_name = {record.variant: record for record in found}
    assert list(by_name) == names
    reference, onednn = by_name["reference"], by_name["onednn"]
    assert reference.status is onednn.status is Status.OK
    assert reference.steps == onednn.steps
    assert reference.parity_error < reference.parity_limit
    assert onednn.curve_distance < 1e-3
    assert onednn.final_quality == pytest.approx(reference.final_quality, rel=1e-3)
    assert by_name["wrong"].status is Status.PARITY_FAILED
    assert "before the training" in by_name["wrong"].reason
    assert by_name["openvino"].status is Status.UNAVAILABLE
    assert by_name["late"].status is Status.ERROR
    assert "training loss is nan at step" in by_name["late"].reason
    assert read(tmp_path) == found
    assert quality.run([part], tmp_path, Settings(1), "cpu", 5, 60.0, tmp_path, lambda _: None) == []
    for record in found:
        assert quality.line(record).startswith(f"time to quality, {record.variant}: ")


def gate(when: str = "before", *, passed: bool = True) -> dict[str, object]:
    """The event of a gate."""
    limits = {"parity_error": 1e-6, "parity_limit": 1e-4, "grad_error": None, "grad_limit": None}
    return {"event": "gate", "when": when, "passed": passed, "reason": "" if passed else "outputs: wrong"} | limits


class Played:
    """A worker of the stage that plays its variant's part, by name, and says who else is alive at each block."""

    alive: ClassVar[list[str]] = []
    beside: ClassVar[list[set[str]]] = []

    def __init__(self, *_: object) -> None:
        self.name, self.step = "", 0

    def __enter__(self):
        self.alive.append("")
        return self

    def __exit__(self, *_: object) -> None:
        self.alive.remove(self.name)

    def ask(self, _: str, __: float, action: str, variant: str = "", steps: int = 0, **___: object):
        """Play the request."""
        if action == "begin":
            self.name = variant
            self.alive[self.alive.index("")] = variant
            yield {"event": "described", "metric": "error", "reason": "not here" if variant == "elsewhere" else ""}
            if variant != "elsewhere":
                yield gate(passed=variant != "wrong")
            return
        if action == "end":
            yield gate("after", passed=self.name != "wrong-late")
            return
        self.beside.append(set(self.alive))
        self.step += steps
        if self.name == "dies" and self.step > PART.block:
            raise WorkerError(Status.CRASHED, "planted")
        times = {"prepare_s": 0.0, "training_s": 1e-9, "evaluation_s": 0.0}
        scores = {"error": 0.9, "naive": 1.0}
        yield {"event": "block", "step": self.step, "losses": [1.0] * steps, "scores": scores, "why": ""} | times


def test_only_those_that_still_train_are_alive(tmp_path, monkeypatch):
    """A process that is unavailable, refused or dead stands beside nobody's steps, and each is ended once."""
    monkeypatch.setattr(quality, "Worker", Played)
    names = ["reference", "elsewhere", "wrong", "dies", "wrong-late"]
    stage = quality.Stage(PART, Settings(1), "cpu", 5, 1.0, tmp_path / "log", tmp_path)
    found = {record.variant: record.status for record in stage.run(names, lambda _: None)}
    assert found == {
        "reference": Status.OK,
        "elsewhere": Status.UNAVAILABLE,
        "wrong": Status.PARITY_FAILED,
        "dies": Status.CRASHED,
        "wrong-late": Status.PARITY_FAILED,
    }
    training = {"reference", "dies", "wrong-late"}
    assert all(alive <= training for alive in Played.beside)
    assert Played.beside[0] == training
    assert Played.beside[-1] == training - {"dies"}
    assert Played.alive == []


def test_what_ends_the_stage_ends_its_processes(tmp_path, monkeypatch):
    """Ctrl-C in the middle leaves none alive."""
    monkeypatch.setattr(quality, "Worker", Played)
    stage = quality.Stage(PART, Settings(1), "cpu", 5, 1.0, tmp_path / "log", tmp_path)

    def interrupt(text: str) -> None:
        if "step" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(["reference", "wrong-late"], interrupt)
    assert Played.alive == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(Status.OK, 0), (Status.UNAVAILABLE, 0), (Status.PARITY_FAILED, 1), (Status.CRASHED, 1), (Status.ERROR, 1)],
)
def test_a_run_ends_with_1_where_a_training_did_not_end_well(tmp_path, monkeypatch, status, code):
    """The exit code speaks of the trainings too."""
    monkeypatch.setattr(command_line, "_show", lambda *_: None)
    monkeypatch.setattr(command_line, "_show_open", lambda *_: None)
    folder = RunFolder(make_run(tmp_path / "run"))
    one = trained("onednn", 0.2, [0.4])
    one.fields |= {} if status is Status.OK else {"status": status, "reason": "planted"}
    write(folder.path, list(records(trained("reference", 0.2, [0.4]), one).values()), [])
    played = SimpleNamespace(folder=folder, console=Console(), unfinished=False, run=lambda *_: None)
    assert command_line._measure(played, "command") == code
