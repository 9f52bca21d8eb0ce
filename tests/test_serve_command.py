"""`python -m bench serve`: what it records of variants under load, what it refuses, and what it draws."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from pathlib import Path

import pytest
from own_model_kit import PLAIN, written
from powercap import PlantedPower
from report_pages import page_text
from run_folders import make_run

from bench.__main__ import main
from bench.analysis.run_summary import load_run
from bench.console import Console
from bench.machine import energy
from bench.records import serving
from bench.records.schema import Status
from bench.records.serving import ServingRecord
from bench.report import page
from bench.report import serving as charts
from bench.serve import command
from bench.serve.arguments import bound

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "served_variants.py"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "add --bound p99=20ms"),
        (["--bound", "p99=20ms", "--mode", "decode"], "add --batching step"),
        (["--bound", "p99=20ms", "--variant", "nothing"], "no variant matches 'nothing'"),
        (["--bound", "p99=20ms", "--variant", "onednn@batch=3"], "belong to --workload"),
        (["--bound", "p99=20ms", "--out", "served"], "has a serving.jsonl already"),
        (["--bound", "p99=20ms", "--plugin", "none.py"], "plugin none.py does not exist"),
        (["--bound", "p99=20ms", "--inputs", "mine.py:some"], "name it with --model FILE.py:FUNCTION"),
        (["--bound", "p99=20ms", "--model", "mine.py:build", "--lengths", "bucketed"], "leave it out"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, words, told):
    """What was wrong and what to do; exit code 2."""
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").mkdir()
    for name in ("records.jsonl", serving.FILE):
        (tmp_path / "served" / name).touch()
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_missing_load_generator_is_one_line(monkeypatch, capsys):
    """It names the package to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["serve", "--bound", "p99=20ms"]) == 2
    assert "pip install mlcommons-loadgen" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["20ms", "p99", "p0=1ms", "p100=1ms", "pxx=1ms", "p99=20", "p99=-1ms"])
def test_a_bound_that_is_none_is_refused(text):
    """With what was expected."""
    with pytest.raises(Exception, match=r"as p99=20ms|as 20ms"):
        bound(text)


def test_a_bound_is_a_percentile_and_a_time():
    found = bound("p99.9=1.5s")
    assert (found.percentile, found.seconds) == (99.9, 1.5)
    assert bound("p99=20ms").least_queries > 662


def test_records_come_back_as_they_were_written(tmp_path):
    """From the lines of serving.jsonl; serving.csv is a table of the same."""
    record = ServingRecord(workload="seed", variant="onednn", status=Status.ERROR, reason="planted", qps=None)
    written = serving.append(tmp_path, record)
    assert serving.read(tmp_path) == [written]
    (row,) = csv.DictReader((tmp_path / serving.TABLE).read_text().splitlines())
    assert row["reason"] == "planted"
    (tmp_path / serving.FILE).write_text('{"other": 1}\n')
    with pytest.raises(Exception, match="line 1 is not a record"):
        serving.read(tmp_path)


def test_every_column_is_documented():
    """results/columns.md says of every column what the code says."""
    assert serving.dictionary() in (ROOT / "results" / "columns.md").read_text(encoding="utf-8")


def load_test(load: float, latency_s: float, verdict: str, phase: str = "repeat 1") -> dict[str, object]:
    """A row of serving-tests.csv.gz."""
    known = {"target_qps": load, "qps": load, "verdict": verdict, "latency_bound_s": latency_s, "batch_mean": 2.0}
    return dict.fromkeys(serving.TEST_COLUMNS, "") | known | {"workload": "seed", "variant": "onednn", "phase": phase}


def test_the_plot_has_a_curve_a_variant_and_the_bound(tmp_path):
    """Invalid tests are left out, and repeats at about the same load are one place of the line."""
    serving.append(
        tmp_path, ServingRecord(workload="seed", variant="onednn", scenario="server", percentile=99, bound_s=0.02)
    )
    rows = [
        load_test(100, 0.01, "held"),
        load_test(101, 0.03, "broken"),
        load_test(200, 0.05, "broken"),
        load_test(300, 1.0, "invalid"),
    ]
    serving.append_tests(tmp_path, [*rows, load_test(5000, 3.0, "held", "offline")])
    (kind,) = charts.kinds(tmp_path)
    (chart,) = kind.charts
    (curve,) = chart.curves
    assert chart.guides == ((0.02, "bound 20.0 ms"),)
    assert [point.x for point in curve.points] == [100, 101, 200]
    assert curve.xs == (100.5, 200)
    assert curve.ys == pytest.approx((0.02, 0.05))
    # Every test is in the picture, not the curve alone.
    assert chart.y.lo <= 0.01
    assert chart.y.hi >= 0.05


def test_the_page_of_a_run_shows_what_was_served_there(tmp_path):
    """The plot with its table, where a run's folder has records of serving; nothing of it where it has none."""
    run = make_run(tmp_path / "run", figured=True)
    assert "Latency against load" not in page_text(run)
    record = ServingRecord(workload="seed", variant="onednn", scenario="server", percentile=99, bound_s=0.02, qps=150.0)
    serving.append(run, record)
    serving.append_tests(run, [load_test(100, 0.01, "held"), load_test(200, 0.05, "broken")])
    html = page_text(run)
    assert "Latency against load" in html
    assert "150" in html[html.index("Latency against load") :]
    assert "serving" in {kind.name for kind in page.all_kinds(load_run(run))}


def test_the_table_has_energy_where_it_was_counted_and_says_what_to_distrust(capsys, monkeypatch):
    """No column of energy without a figure; a load above the offline rate has a line of its own."""
    monkeypatch.setenv("COLUMNS", "250")
    record = ServingRecord(workload="seed", variant="onednn", scenario="server", qps=150.0, offline_qps=160.0)
    command.show(Console(), [record])
    plain = capsys.readouterr().out
    assert "energy" not in plain
    assert "~" not in plain
    command.show(Console(), [dataclasses.replace(record, energy_per_query_j=0.15, offline_qps=100.0)])
    told = " ".join(capsys.readouterr().out.split())
    assert "150 mJ" in told
    assert "~ onednn on seed seems to sustain 150 queries/s, but answers 100 when all are there at once" in told


def test_a_figure_without_an_interval_has_none():
    """And no figure is told as such."""
    assert serving.load_text(ServingRecord()) == "no figure"
    assert serving.load_text(ServingRecord(qps=1234.5)) == "1234"
    assert serving.load_text(ServingRecord(qps=100.0, qps_lo=90.0, qps_hi=120.0)) == "100 [90, 120]"


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_model_of_ones_own_is_served(tmp_path, capsys):
    """By its file; one whose result depends on the whole batch is refused in one line, and nothing is written."""
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    mine, out = written(tmp_path, PLAIN), tmp_path / "out"
    words = ["serve", "--model", f"{mine}:build", "--bound", "p90=25ms", "--budget", "1", "--repeats", "1"]
    words += ["--variant", "onednn", "--threads", "1", "--seed", "1", "--out", str(out)]
    assert main(words) == 0
    found = {record.variant: record for record in serving.read(out)}
    assert set(found) == {"reference", "onednn"}
    for record in found.values():
        assert (record.workload, record.status) == ("own:mine", Status.OK)
        assert record.batched_error <= record.batched_limit
    capsys.readouterr()
    coupled = written(tmp_path, PLAIN.replace("return self.head(y), state", "return self.head(y), y.mean()"), "coupled")
    words[words.index(f"{mine}:build")], words[-1] = f"{coupled}:build", str(tmp_path / "refused")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "output[1] (shape ()) is not made of the results of single sequences" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "refused").exists()


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_planted_variants_are_found_out_under_load(tmp_path, capsys, monkeypatch):
    """One breaks the bound, one dies under load, in one queries touch each other; the reference has a figure.

    The bound needs few queries and short tests, and is wide for the reference on a busy machine.
    """
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    out = tmp_path / "out"
    words = ["serve", "--workload", "seed@batch=4", "--bound", "p90=25ms", "--budget", "1", "--repeats", "1"]
    words += ["--largest-batch", "3", "--plugin", str(PLUGIN), "--threads", "1", "--out", str(out), "--seed", "1"]
    for name in ("sleepy", "dying", "leaking"):
        words += ["--variant", name]
    # A counter of energy in this process, which measures idle power, and in the workers.
    cap, counted = tmp_path / "cap", tmp_path / "counted.py"
    counted.write_text(
        f"from pathlib import Path\nfrom bench.machine import energy\nenergy.POWERCAP = Path({str(cap)!r})\n"
    )
    monkeypatch.setattr(energy, "POWERCAP", cap)
    with PlantedPower(cap, 50.0):
        assert main([*words, "--plugin", str(counted)]) == 1
    found = {record.variant: record for record in serving.read(out)}
    assert found["reference"].status is Status.OK
    assert found["reference"].qps > 0
    assert found["reference"].loadgen == "VALID"
    assert found["reference"].latency_bound_s <= 0.025
    assert found["reference"].latency_ours_s == pytest.approx(found["reference"].latency_bound_s, rel=0.02)
    assert found["reference"].batched_error <= found["reference"].batched_limit
    assert (found["reference"].energy, found["reference"].power_w) == ("RAPL package-0", pytest.approx(50.0, rel=0.1))
    assert found["reference"].energy_per_query_j == pytest.approx(50.0 / found["reference"].qps, rel=0.3)
    assert found["reference"].idle_power_w == pytest.approx(50.0, rel=0.1)
    assert found["sleepy"].qps is None
    assert "the bound does not hold even for one query after the other" in found["sleepy"].reason
    assert found["dying"].status is Status.CRASHED
    assert found["leaking"].status is Status.PARITY_FAILED
    assert "another result in a batch than alone" in found["leaking"].reason
    assert (out / "plots" / "serving.png").exists()
    assert "no figure" in capsys.readouterr().out
    summaries = [path.read_text() for path in (out / "loadgen").glob("reference-*.txt")]
    assert any("Result is : VALID" in text for text in summaries)
