"""A whole run of an own model: records, plan, page, resume and compare are those of any run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from own_model_kit import PLAIN, written

from bench.__main__ import EXIT_NOT_OK, EXIT_OK, EXIT_USAGE, main
from bench.plan.cases import Filters, Selection, Suite, expand
from bench.records.folder import RunFolder

SUITE = """
name = "brief"
summary = "one process"
budget_s = 1.0
processes = 1
interval = 0.9

[[select]]
workloads = ["own:*"]
variants = ["reference", "torchscript"]
"""
MIX = "[('long', torch.randn(2, 7, 5), 3), ('short', torch.randn(1, 3, 5), 1)]"
VARIANTS = """
def same(model):
    return lambda *inputs: model(*inputs)

def wrong(model):
    return lambda x: (1.01 * model(x)[0], model(x)[1])

def score(output, inputs):
    return output[0].mean()
"""


@pytest.fixture(scope="module")
def run(warm_workers, tmp_path_factory) -> tuple[Path, Path]:
    """A run folder, and the model's file."""
    folder = tmp_path_factory.mktemp("own")
    code = PLAIN.replace("return torch.randn(2, 7, 5)", f"return {MIX}").replace(
        "super().__init__()", "super().__init__()", 1
    )
    path = written(folder, code + VARIANTS)
    (folder / "brief.toml").write_text(SUITE, encoding="utf-8")
    out = folder / "run"
    words = ["--model", f"{path}:build", "--metric", f"{path}:score", "--suite", str(folder / "brief.toml")]
    words += ["--add-variant", f"{path}:same", "--add-variant", f"bad={path}:wrong", "--threads", "1"]
    found = warm_workers.run("run", *words, "--out", str(out))
    assert found.returncode == EXIT_NOT_OK, found.stdout + found.stderr
    (folder / "said.txt").write_text(found.stdout, encoding="utf-8")
    return out, Path(path)


@pytest.mark.slow
def test_each_set_of_inputs_is_a_workload_with_its_weight(run):
    """Records say set and weight; the added variant that is right is measured, the wrong one refused by the gate."""
    records = {(r["workload"], r["variant"]): r for r in RunFolder(run[0]).records()}
    status = {key: record["status"] for key, record in records.items()}
    for workload, name, weight in (("own:mine/long", "long", 0.75), ("own:mine/short", "short", 0.25)):
        assert status[workload, "reference"] == status[workload, "same"] == "ok"
        assert status[workload, "bad"] == "parity-failed"
        assert status[workload, "torchscript"] in {"ok", "unavailable"}
        record = records[workload, "same"]
        assert (record["input_set"], record["weight"]) == (name, weight)
        assert record["metric"] == pytest.approx(records[workload, "reference"]["metric"])


@pytest.mark.slow
def test_lstms_and_their_share_are_said_and_kept(run):
    out, path = run
    kept = json.loads((out / "plan.json").read_text(encoding="utf-8"))["own_model"]
    said = (out.parent / "said.txt").read_text(encoding="utf-8")
    assert [entry["input_set"] for entry in kept["sets"]] == ["long", "short"]
    (lstm,) = kept["sets"][0]["lstms"]
    assert (lstm["name"], lstm["input_size"], lstm["hidden_size"], lstm["batch"], lstm["steps"]) == ("lstm", 5, 8, 2, 7)
    share = kept["sets"][0]["lstm_share"]["inference"]
    assert 0 < share < 1
    assert kept["sets"][0]["speedup_at_most"]["inference"] == pytest.approx(1 / (1 - share))
    assert f"your LSTMs take {share:.0%} of a call" in said
    assert (out / "report.html").stat().st_size > 0
    assert str(path) in json.loads((out / "environment.json").read_text(encoding="utf-8"))["run"]["plugins"]


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_the_repro_line_of_a_record_measures_that_case(run, capsys):
    """It names the model, its inputs and functions, so that it can be run as it is."""
    found = next(r for r in RunFolder(run[0]).records() if (r["workload"], r["variant"]) == ("own:mine/short", "same"))
    words = shlex.split(found["repro"])
    assert words[:4] == ["python", "-m", "bench", "run"]
    assert main([*words[3:], "--dry-run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "2 cases in 1 group" in said
    assert "own:mine/short" in said
    assert "own:mine/long " not in said.rpartition("here")[2]


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_case_is_shown_with_a_command_and_a_trace_that_work(run, capsys, tmp_path):
    """The command measures that case; the trace is of the user's model, and of a variant of the user's own."""
    trace = tmp_path / "trace.json"
    assert main(["show", str(run[0]), "own:mine/short/inference/same", "--trace", str(trace)]) == EXIT_OK
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measure it again:")]
    assert "aten::lstm" in {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert main([*shlex.split(said)[6:], "--dry-run"]) == EXIT_OK
    assert "2 cases in 1 group" in capsys.readouterr().out


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_model(run, capsys, monkeypatch, tmp_path):
    """What was recorded is of the file as it was; with the file unchanged it is, from any folder."""
    monkeypatch.chdir(tmp_path)
    out, path = run
    code = path.read_text(encoding="utf-8")
    try:
        path.write_text(code + "\n# changed\n", encoding="utf-8")
        assert main(["run", "--resume", str(out)]) == EXIT_USAGE
        assert "mine.py was" in capsys.readouterr().err
    finally:
        path.write_text(code, encoding="utf-8")
    assert main(["run", "--resume", str(out), "--dry-run"]) == 0


@pytest.mark.slow
def test_such_runs_compare(run, capsys, tmp_path):
    again = shutil.copytree(run[0], tmp_path / "again")
    assert main(["compare", str(run[0]), str(again)]) == 0
    assert "own:mine/long" in capsys.readouterr().out


@pytest.mark.slow
def test_such_runs_are_reported_and_exported_again(run, tmp_path):
    assert main(["report", str(run[0])]) == 0
    assert main(["export", str(run[0]), "--out", str(tmp_path / "out.json")]) == 0
    assert "own:mine/short" in (tmp_path / "out.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("warm")
def test_a_suite_without_the_model_is_refused(tmp_path, capsys):
    """Else it would be named and not measured."""
    words = ["--model", f"{written(tmp_path, PLAIN)}:build", "--suite", "smoke", "--threads", "1", "--dry-run"]
    assert main(["run", *words]) == EXIT_USAGE
    assert "the suite smoke has no workload own:*, so --model would not be measured" in capsys.readouterr().err
    words = [*words[:2], "--workload", "seed", *words[4:]]
    assert main(["run", *words]) == EXIT_USAGE
    said = "--workload seed names no workload own:*, so --model would not be measured; leave --workload out"
    assert said in capsys.readouterr().err
    assert main(["run", "--suite", "own-model", "--threads", "1", "--dry-run"]) == EXIT_USAGE
    assert "'own:*' is a model of your own: name it with --model FILE.py:FUNCTION" in capsys.readouterr().err


def test_modes_and_added_variants_come_from_the_catalogue():
    """A model without a loss is not listed in training unless that is asked for; added variants join every group."""
    catalogue = {
        "workloads": [{"name": "own:a", "modes": ["inference"]}, {"name": "own:b", "modes": ["inference", "training"]}],
        "variants": [{"name": "reference"}, {"name": "aten"}, {"name": "mine", "added": True}],
    }
    suite = Suite("s", "", (Selection(("own:*",), ("aten",)),))
    groups = expand(suite, catalogue, Filters())
    assert [group.name for group in groups] == [
        "own:a/inference/cpu/1t",
        "own:b/inference/cpu/1t",
        "own:b/training/cpu/1t",
    ]
    assert all([case.variant for case in group.cases] == ["reference", "aten", "mine"] for group in groups)
    assert len(expand(suite, catalogue, Filters(workloads=("own:a",), modes=("training",)))) == 1
