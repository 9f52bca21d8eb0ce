"""A forecaster that was exported is used with numpy and onnxruntime alone, and forecasts what `predict` forecasts."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from alone import ALONE

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")
pytest.importorskip("hypothesis")
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st

from seq2seq.cli.main import main
from seq2seq.data.series import Frequency, calendar
from seq2seq.deployment import deployed_forecast
from seq2seq.layers.likelihoods import LIKELIHOODS, draw
from seq2seq.models.checkpoint import save_pretrained
from seq2seq.tasks.forecasting import load, restore


def write(path, frequency="h", steps=300, start="2024-02-01"):
    """A CSV of waves and noise."""
    stamps = pd.date_range(start, periods=steps, freq=frequency)
    waves = 50 + 9 * np.sin(np.arange(steps) * np.pi / 12) + np.random.default_rng(0).normal(size=steps)
    pd.DataFrame({"timestamp": stamps, "value": waves}).to_csv(path, index=False)
    return path


def exported(folder, data, model="lstm", **options):
    """An untrained forecaster of a CSV as a checkpoint, and the same exported; the path of the ONNX file."""
    task = load(data, history=20, horizon=7, **options)
    torch.manual_seed(0)
    found = task.model_config(model).build(torch.nn.LSTM).eval()
    save_pretrained(found, folder / "run", {"name": task.name, "state": task.state()})
    out = folder / "model.onnx"
    assert main(["export", str(folder / "run"), "--format", "onnx", "--out", str(out)]) == 0
    return out


def run_alone(model, data, *words):
    """Return the ended process of the program beside a model."""
    return subprocess.run(
        [sys.executable, "-c", ALONE, f"{model}.py", str(data), *words],
        capture_output=True, text=True, check=False, timeout=60, cwd=model.parent,
    )  # fmt: skip


def forecast_alone(model, data, *words):
    """Return what the program beside a model prints, as timestamps and quantiles."""
    done = run_alone(model, data, *words)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], float)


def predicted(folder, capsys, data, samples=200):
    """The same of `predict`."""
    capsys.readouterr()
    assert main(["predict", str(folder / "run"), "--data", str(data), "--samples", str(samples)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    stamps = [pd.Timestamp(row["timestamp"]).isoformat() for row in rows]
    return stamps, np.array([[row[name] for name in ("q10", "q50", "q90")] for row in rows], float)


@pytest.mark.parametrize("options", [{}, {"difference": False}, {"season": 4}], ids=["season", "values", "short"])
@pytest.mark.parametrize("model", ["lstm", "attention", "gnmt", "transformer"])
def test_points_are_those_of_predict(tmp_path, capsys, model, options):
    """Step by step from its own values, back in the series' unit: the very numbers, beyond one season too."""
    data = write(tmp_path / "load.csv")
    out = exported(tmp_path, data, model, likelihood="point", **options)
    stamps, found = forecast_alone(out, data)
    expected = predicted(tmp_path, capsys, data)
    assert stamps == expected[0]
    np.testing.assert_allclose(found, expected[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("frequency", "start"), [("100ms", "2024-02-01"), ("15min", "2023-12-30"), ("D", "2023-06-01"),
                             ("W", "2020-01-05"), ("MS", "2003-01-01"),
                             ("ME", "2003-01-31"), ("QS", "1950-01-01"), ("YS", "1800-01-01")]
)  # fmt: skip
def test_every_frequency_has_its_calendar(tmp_path, capsys, frequency, start):
    """Days, weeks and years as features, and the timestamps that come, from tenths of a second to years."""
    data = write(tmp_path / "load.csv", frequency, 120 if frequency != "15min" else 500, start)
    out = exported(tmp_path, data, likelihood="point", season=3)
    stamps, found = forecast_alone(out, data, "load")
    expected = predicted(tmp_path, capsys, data)
    assert stamps == expected[0]
    np.testing.assert_allclose(found, expected[1], rtol=1e-4)


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name])
def test_quantiles_are_those_of_predict(tmp_path, capsys, likelihood):
    """Sampled by another generator: equal up to what 4,000 paths leave open, as the program is written beside it."""
    data = write(tmp_path / "load.csv")
    out = exported(tmp_path, data, likelihood=likelihood)
    rows = list(csv.reader(data.read_text().splitlines()))[1:]
    times, values = np.array([row[0] for row in rows], "M8[s]"), np.array([row[1] for row in rows], float)
    _, paths = deployed_forecast.forecast(out, times, values, samples=4000)
    expected = predicted(tmp_path, capsys, data, 4000)[1]
    # A quantile's standard error is sqrt(q (1 - q) / n) over the density, which these paths say.
    for level, wanted in zip((0.1, 0.5, 0.9), expected.T, strict=True):
        error = 5 * (2 * level * (1 - level) / 4000) ** 0.5
        low, high = np.quantile(paths, [max(level - error, 0), min(level + error, 1)], 0)
        assert ((low <= wanted) & (wanted <= high)).all()
    stamps, found = forecast_alone(out, data)
    assert len(stamps) == 7
    assert (np.diff(found) >= 0).all()
    assert paths.min() < found.min()
    assert found.max() < paths.max()


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        (range(300), (), "name the series of the training after the file; expected one of east, west"),
        (range(300), ("north",), "north names no series of the training; expected one of east, west"),
        (range(43), ("west",), "there are 43 values; expected at least 44"),
        ([*range(100), *range(101, 300)], ("west",), "2024-02-05 05:00:00 where 2024-02-05 04:00:00 is due"),
    ],
    ids=["several", "stranger", "short", "gap"],
)
def test_what_would_forecast_something_else_is_refused(tmp_path, rows, words, said):
    """Nothing is scaled by another series' scale, and nothing is read as if it were regular: one line says so."""
    one = pd.read_csv(write(tmp_path / "one.csv"))
    two = pd.concat([one.assign(name="east"), one.assign(name="west", value=1000 * one["value"])])
    two.to_csv(tmp_path / "two.csv", index=False)
    out = exported(tmp_path, tmp_path / "two.csv", series="name")
    one.iloc[list(rows)].to_csv(tmp_path / "one.csv", index=False)
    done = run_alone(out, tmp_path / "one.csv", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (None, (), "no.csv: No such file or directory"),
        (b"timestamp,value\n2024-02-01,x\n", (), "line 2: '2024-02-01,x' is not timestamp,value"),
        (b"timestamp,value\n2024-02-01\n", (), "line 2: '2024-02-01' is not timestamp,value"),
        (b"timestamp,value\n01.02.2024,3\n", (), "line 2: '01.02.2024,3' is not timestamp,value"),
        (b"\xff", (), "can't decode"),
        (b"timestamp,value\n", (), "there are 0 values"),
        (b"timestamp,value\n", ("value", "east"), "expected a file and at most a name"),
    ],
)
def test_what_is_no_series_is_one_line(tmp_path, content, words, said):
    """A file that is missing, empty or of other columns, and a call with too many words."""
    out = exported(tmp_path, write(tmp_path / "one.csv"))
    data = tmp_path / "no.csv"
    if content is not None:
        data.write_bytes(content)
    done = run_alone(out, data, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@given(outputs=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_step_is_drawn_from_the_model_s_distribution(outputs):
    """Mean quantiles of 20,000 draws are those of this project's own draws, for each likelihood."""
    for name, size in LIKELIHOODS.items():
        if not name:
            continue
        rows = torch.tensor(outputs[:size]).expand(20_000, size)
        ours = draw(name, rows, torch.Generator().manual_seed(0)).numpy()[:, 0]
        likelihood = {"name": name, "least_scale": 1e-3, "least_freedom": 2.01, "quantiles": [0.1, 0.5, 0.9]}
        found = deployed_forecast.draw(rows.numpy(), likelihood, np.random.default_rng(0))
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):
            error = 5 * (2 * level * (1 - level) / 20_000) ** 0.5
            low, high = np.quantile(ours, [max(level - error, 0), min(level + error, 1)])
            assert low - 1e-6 <= np.quantile(found, level) <= high + 1e-6


@given(
    start=st.datetimes(pd.Timestamp("1970-01-01"), pd.Timestamp("2100-01-01")).map(
        lambda at: at.replace(microsecond=0)
    ),
    frequency=st.one_of(
        st.sampled_from([1, 3, 12]).map(lambda months: Frequency(months=months)),
        st.integers(1, 10**6).map(lambda seconds: Frequency(seconds=seconds)),
        st.integers(1, 10**7).map(lambda microseconds: Frequency(seconds=microseconds / 10**6)),
    ),
)
def test_timestamps_and_calendar_are_this_project_s(start, frequency):
    """From any moment on, by any step, the same timestamps and the same places in their cycles."""
    start = start.replace(microsecond=0)
    expected = frequency.following(pd.Timestamp(start), 30)
    every = {"months": frequency.months, "seconds": frequency.seconds}
    found = deployed_forecast.following(np.datetime64(start, "s"), 30, every)
    assert found.tolist() == expected.to_pydatetime().tolist()
    cycles = ["day", "week", "year"]
    np.testing.assert_allclose(deployed_forecast.calendar(found, cycles), calendar(expected, cycles).numpy(), atol=1e-9)


def test_the_file_itself_says_how_it_is_used(tmp_path):
    """Metadata and the JSON beside it are the same: names and order of inputs, scaling, differences, likelihood."""
    data = write(tmp_path / "load.csv")
    out = exported(tmp_path, data)
    facts = json.loads((tmp_path / "model.onnx.json").read_text())
    session = onnxruntime.InferenceSession(out)
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in metadata.items()} == facts
    assert {one.name: one.shape[2] for one in session.get_inputs()} == {
        name: one["shape"][2] for name, one in facts["inputs"].items()
    }
    assert [one.name for one in session.get_outputs()] == list(facts["outputs"])
    assert len(facts["features"]) == facts["inputs"]["source"]["shape"][2]
    assert facts["features"][:3] == [
        "(x[t] - x[t - 24] - mean) / deviation", "sin(2 pi share of the day)", "cos(2 pi share of the day)"
    ]  # fmt: skip
    assert (facts["history"], facts["horizon"], facts["difference"]) == (20, 7, 24)
    assert list(facts["likelihood"]["outputs"]) == ["freedom", "location", "scale"]
    task = restore(json.loads((tmp_path / "run" / "config.json").read_text())["task"]["state"])
    assert facts["scales"]["load"]["mean"] == task.series[0].series.mean
    assert str(tmp_path) not in (tmp_path / "model.onnx.json").read_text()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json", "model.onnx.py"])
def test_nothing_beside_it_is_overwritten(tmp_path, capsys, name):
    """Any of the three files that is there is refused, and none of the others is written."""
    data = write(tmp_path / "load.csv")
    exported(tmp_path, data)
    for path in tmp_path.glob("model.*"):
        path.unlink()
    (tmp_path / name).write_text("mine")
    words = ["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "model.onnx")]
    assert main(words) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.glob("model.*")] == ["mine"]
