"""The forecasting task: no leak, the way back to the series' unit, and scores that fall where they must."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from torch import nn

from seq2seq.data.errors import DataError
from seq2seq.models.base import Model
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.tasks import forecasting_task
from seq2seq.tasks.forecasting import load, restore
from seq2seq.tasks.paths import sample_paths
from seq2seq.tasks.task import DECODERS

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS


def write(path, values, frequency="h"):
    """A CSV of values from the start of 2024 on."""
    stamps = pd.date_range("2024-01-01", periods=len(values), freq=frequency)
    pd.DataFrame({"timestamp": stamps, "value": values}).to_csv(path, index=False)
    return path


def noise(steps, seed=0):
    """A day's cycle, a slow drift and noise."""
    generator = torch.Generator().manual_seed(seed)
    hours = torch.arange(steps)
    return (torch.randn(steps, generator=generator) + hours / 50 + 3 * torch.sin(hours * torch.pi / 12)).tolist()


@pytest.fixture
def hourly(tmp_path):
    """400 hours, windows 24 -> 6."""
    return load(write(tmp_path / "load.csv", noise(400)), history=24, horizon=6, samples=20)


class Repeats(Model):
    """Forecasts a constant in units of the normalised series."""

    def __init__(self, value, features=3):
        super().__init__()
        self.config = Seq2SeqConfig(features, 1, 1)
        self.value = value

    def encode(self, source, lengths=None):
        """Nothing of the source is kept."""
        del lengths
        return {"nothing": torch.zeros(1, source.size(0), 1)}

    def step(self, value, state):
        """The constant."""
        return torch.full((value.size(0), 1), self.value), state


class Sums(Model):
    """The mean of what comes next is the value before plus one, with next to no spread."""

    def __init__(self, likelihood):
        super().__init__()
        self.config = Seq2SeqConfig(3, 1, 1, likelihood=likelihood)

    def encode(self, source, lengths=None):
        """The last value that was read."""
        del lengths
        return {"last": source[None, :, -1, :1]}

    def step(self, value, state):
        """One more than the value read."""
        parameters = {
            "gaussian": [value[:, :1] + 1, torch.full_like(value[:, :1], -30)],
            "student": [torch.full_like(value[:, :1], 30), value[:, :1] + 1, torch.full_like(value[:, :1], -30)],
            "": [value[:, :1] + 1],
        }
        return torch.cat(parameters[self.config.likelihood], -1), state


@pytest.mark.parametrize("likelihood", ["", "gaussian", "student"])
def test_paths_feed_on_themselves(hourly, likelihood):
    """Each step reads what the step before it drew: adding one each time, the path climbs by one per step."""
    batch = next(hourly.batches("validation", 3, 0, 0))
    paths = sample_paths(Sums(likelihood).eval(), batch, 4, seed=0)
    assert paths.shape == (4 if likelihood else 1, 3, 6)
    expected = batch.source[:, -1, :1] + torch.arange(1, 7)
    torch.testing.assert_close(paths.mean(0), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("name", "key"), [(None, "student"), ("point", ""), ("quantile", "quantile")])
def test_the_likelihood_is_an_option(tmp_path, name, key):
    """It is that of every family's model; forecasts of points are asked for by that name."""
    task = load(write(tmp_path / "s.csv", noise(300)), history=24, horizon=6, **({"likelihood": name} if name else {}))
    for family in ("lstm", "attention", "transformer"):
        assert task.model_config(family).likelihood == key
    with pytest.raises(DataError, match="likelihood is 'cauchy', expected one of point, gaussian, student, quantile"):
        load(tmp_path / "s.csv", likelihood="cauchy")
    if key == "quantile":
        assert "straight lines are assumed" in task.notes[-1]
        with pytest.raises(ValueError, match="forecasts of gnmt are points, without likelihood 'quantile'"):
            task.model_config("gnmt")


def test_quantiles_of_a_forecast_rise(hourly):
    """The table's quantiles rise at every step, whatever an untrained head says."""
    model = hourly.model_config(likelihood="quantile").build(nn.LSTM).eval()
    table = hourly.forecast(model, samples=50).table()
    levels = table[["q05", "q10", "q50", "q90", "q95"]].to_numpy()
    assert (levels[:, 1:] >= levels[:, :-1]).all()
    assert hourly.evaluate(model, 64, "cpu")["CRPS"] > 0


def test_paths_follow_their_seed_and_leave_the_global_one(hourly):
    """Equal seeds draw equal paths, others draw others, and the caller's random state is untouched."""
    batch = next(hourly.batches("validation", 3, 0, 0))
    torch.manual_seed(0)
    model = hourly.model_config().build(nn.LSTM).eval()
    before = torch.get_rng_state()
    one = sample_paths(model, batch, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sample_paths(model, batch, 4, seed=1), one)
    assert not torch.equal(sample_paths(model, batch, 4, seed=2), one)
    assert one.std(0).min() > 0


def test_paths_follow_their_own_window(hourly):
    """A window's paths are those that it has alone: none gets the state of another."""
    model = hourly.model_config(likelihood="").build(nn.LSTM).eval()
    batch = next(hourly.batches("validation", 5, 0, 0))
    together = sample_paths(model, batch, 1, seed=0)
    alone = [sample_paths(model, part, 1, seed=0) for part in hourly.batches("validation", 1, 0, 0)][:5]
    torch.testing.assert_close(together, torch.cat(alone, 1))


@pytest.mark.parametrize("difference", [True, False])
@pytest.mark.parametrize("horizon", [6, 60])
def test_what_is_expected_leads_back_to_the_series(tmp_path, difference, horizon):
    """A path equal to what is expected is the series itself in its own unit, also beyond one season."""
    task = load(write(tmp_path / "s.csv", noise(900)), history=24, horizon=horizon, difference=difference)
    (scaled,) = task.series
    starts = task._starts(scaled, "validation")
    expected = torch.cat([batch.expected for batch in task.batches("validation", 7, 0, 0)])[..., 0]
    first = starts + task.history + task.lag
    found = scaled.in_unit(expected[None], first)[0]
    torch.testing.assert_close(found, scaled.raw.values[first[:, None] + torch.arange(horizon)], atol=1e-4, rtol=0)


def test_no_difference_is_the_seasonal_naive_forecast(tmp_path):
    """A model that forecasts no difference to the season before scores what the seasonal naive forecast does."""
    task = load(write(tmp_path / "s.csv", noise(900)), history=24, horizon=60)
    (scaled,) = task.series
    scores = task.evaluate(Repeats(-scaled.series.mean / scaled.series.deviation, task.features), 64, "cpu")
    assert scores["MASE"] == pytest.approx(scores["MASE seasonal naive"], rel=1e-4)
    assert scores["MAE"] == pytest.approx(scores["MAE seasonal naive"], rel=1e-4)
    # It is a single path, so that its CRPS is its error.
    assert scores["CRPS"] == pytest.approx(scores["MAE"], rel=1e-5)


def test_scores_tell_a_better_forecast(hourly):
    """Off by more is worse in each score; the seasonal naive forecast's stay as they are."""
    near, far = (hourly.evaluate(Repeats(value), 64, "cpu") for value in (0.0, 5.0))
    for name in ("MASE", "CRPS", "MAE"):
        assert near[name] < far[name]
        assert near[f"{name} seasonal naive"] == far[f"{name} seasonal naive"]


def test_evaluation_does_not_depend_on_the_batch(hourly):
    """Windows forecast together or one by one have the same scores, and the model is left in its mode."""
    model = hourly.model_config(likelihood="").build(nn.LSTM).train()
    many, few = hourly.evaluate(model, 64, "cpu"), hourly.evaluate(model, 5, "cpu")
    assert model.training
    assert many == pytest.approx(few, rel=1e-5)


@given(cut=st.integers(0, 40), seed=SEEDS)
def test_what_validation_forecasts_has_no_say_in_scaling_and_training(tmp_path_factory, cut, seed):
    """Other values after the training part change neither scaling nor any training batch."""
    values = noise(400, seed)
    folder = tmp_path_factory.mktemp("series")
    one = load(write(folder / "s.csv", values), history=24, horizon=6)
    first = one.lag + one.series[0].series.train_hours + cut
    changed = values[:first] + [1000 - 7 * value for value in values[first:]]
    other = load(write(folder / "s.csv", changed), history=24, horizon=6)
    assert one.state() == other.state()
    assert one.series[0].error == other.series[0].error
    for mine, theirs in zip(one.batches("train", 16, 0, 0), other.batches("train", 16, 0, 0), strict=True):
        assert all(torch.equal(value, theirs.tensors()[name]) for name, value in mine.tensors().items())


def test_a_value_of_the_training_part_has_a_say(tmp_path):
    """The test above can fail: the last training value changes scaling and batches."""
    values = noise(400)
    one = load(write(tmp_path / "s.csv", values), history=24, horizon=6)
    values[one.lag + one.series[0].series.train_hours - 1] += 100
    assert one.state() != load(write(tmp_path / "s.csv", values), history=24, horizon=6).state()


def test_an_epoch_has_each_window_once(hourly):
    """An epoch is all training windows in full batches, shuffled by seed and epoch and the same on every run."""
    (scaled,) = hourly.series
    total = len(hourly._starts(scaled, "train"))

    def rows(seed, epoch):
        return torch.cat([batch.source[:, :, 0] for batch in hourly.batches("train", 16, seed, epoch)])

    one = rows(0, 0)
    assert len(one) == total // 16 * 16
    assert len(one.unique(dim=0)) == len(one)
    assert torch.equal(rows(0, 0), one)
    assert not torch.equal(rows(0, 1), one)
    assert not torch.equal(rows(1, 0), one)


def test_several_series_are_batched_together(tmp_path):
    """Windows of all series come mixed, each normalised by its own series."""
    frames = [
        pd.read_csv(write(tmp_path / "one.csv", [scale * value for value in noise(300, seed)])).assign(city=name)
        for seed, (name, scale) in enumerate({"a": 1, "b": 50}.items())
    ]
    pd.concat(frames).to_csv(tmp_path / "two.csv", index=False)
    task = load(tmp_path / "two.csv", series="city", history=24, horizon=6)
    places = task._places("train")
    assert places[:, 0].bincount().tolist() == [len(places) // 2] * 2
    chosen = places[[0, -1, 5, -7]]
    batch = task._windows(chosen)
    for row, (index, start) in enumerate(chosen.tolist()):
        expected = task.series[index].series.values[start : start + 24].float()
        assert torch.equal(batch.source[row, :, 0], expected)
    scores = task.evaluate(Repeats(0.0), 64, "cpu")
    assert scores["MASE"] == pytest.approx((scores["MASE, a"] + scores["MASE, b"]) / 2)


def test_forecast_of_the_past_has_what_came(hourly):
    """A forecast inside the series has history, horizon and observations where they belong."""
    (scaled,) = hourly.series
    found = hourly.forecast(Repeats(0.0), start=300)
    assert torch.equal(found.history, scaled.raw.values[276:300])
    assert torch.equal(found.observed, scaled.raw.values[300:306])
    assert torch.equal(found.naive, scaled.raw.values[276:282])
    assert found.timestamps[24] == scaled.raw.timestamps()[300]
    assert found.table()["observed"].tolist() == found.observed.tolist()


def test_forecast_of_the_future_starts_after_the_end(hourly):
    """Without a start the horizon lies after the last value; nothing is known of it."""
    (scaled,) = hourly.series
    found = hourly.forecast(Sums("gaussian"), samples=30)
    assert found.samples.shape == (30, 6)
    assert found.observed is None
    last = scaled.raw.timestamps()[-1]
    assert found.table()["timestamp"].tolist() == [last + pd.Timedelta(hours=step) for step in range(1, 7)]
    assert (found.quantile(0.1) <= found.quantile(0.9)).all()


def test_future_forecast_is_that_of_the_longer_series(tmp_path):
    """A forecast beyond the end is the forecast there once the values have come."""
    values = noise(400)
    long = load(write(tmp_path / "s.csv", values), history=24, horizon=6)
    short = restore(long.state(), write(tmp_path / "s.csv", values[:-6]))
    model = long.model_config().build(nn.LSTM).eval()
    future, past = short.forecast(model), long.forecast(model, start=394)
    torch.testing.assert_close(future.samples, past.samples)
    assert future.timestamps.equals(past.timestamps)


@pytest.mark.parametrize(("start", "series"), [(48, None), (395, None), (None, "other")])
def test_forecast_that_does_not_fit_is_refused(hourly, start, series):
    """A start without room before or after it, and a series that there is not, are refused."""
    with pytest.raises(ValueError, match=r"expected from 49 to 394|expected one of load"):
        hourly.forecast(Repeats(0.0), series, start)


def test_state_survives_json(hourly, tmp_path):
    """A task restored from its state as JSON prepares the same windows, from the file or from another one."""
    state = json.loads(json.dumps(hourly.state()))
    again = restore(state, tmp_path / "load.csv")
    assert again.state() == hourly.state()
    one, other = (next(task.batches("validation", 8, 0, 0)) for task in (hourly, again))
    assert torch.equal(one.source, other.source)
    assert restore(state).state() == hourly.state()
    without = restore({**state, "columns": None})
    assert without.series == ()
    with pytest.raises(ValueError, match="no series to evaluate"):
        without.evaluate(Repeats(0.0), 8, "cpu")


def test_restored_scaling_is_that_of_training(hourly, tmp_path):
    """Data that came later is scaled as the model was trained, not by its own mean."""
    later = restore(hourly.state(), write(tmp_path / "load.csv", [10 * value for value in noise(400)]))
    assert later.series[0].series.mean == hourly.series[0].series.mean
    assert later.series[0].series.deviation == hourly.series[0].series.deviation


def test_another_frequency_than_the_training_s_is_refused(hourly, tmp_path):
    """A model of hours is not asked about days."""
    with pytest.raises(DataError, match=r"the series days is daily, expected hourly as in training"):
        restore(hourly.state(), write(tmp_path / "days.csv", noise(100), "D"))


@pytest.mark.parametrize(("history", "horizon"), [(24, 6), (5, 30), (40, 1)])
def test_series_shorter_than_a_window_is_refused(tmp_path, history, horizon):
    """The least length that the error names is enough, one less is not."""
    with pytest.raises(DataError, match=r"series s has 30 values, expected at least \d+ for windows") as caught:
        load(write(tmp_path / "s.csv", noise(30)), history=history, horizon=horizon)
    assert str(caught.value).startswith(str(tmp_path / "s.csv"))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    task = load(write(tmp_path / "s.csv", noise(least)), history=history, horizon=horizon)
    assert all(list(task.batches(split, 4, 0, 0)) for split in ("train", "validation"))
    with pytest.raises(DataError):
        load(write(tmp_path / "s.csv", noise(least - 1)), history=history, horizon=horizon)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no-such.csv", {}, "no such file, expected a CSV or one of the built-in series seattle, san-francisco"),
        ("seattle", {"delimiter": ";"}, "delimiter: only for a file"),
        ("seattle", {"history": 0}, "history is 0, expected a whole number of at least 1"),
        ("seattle", {"horizon": 2.5}, "horizon is 2.5, expected a whole number"),
    ],
)
def test_bad_option_is_refused(path, options, message):
    """Data that cannot be loaded is refused with what there is."""
    with pytest.raises(DataError, match=message):
        load(path, **options)


def test_series_that_repeats_itself_is_refused(tmp_path):
    """The seasonal naive forecast of an exact repetition has no error to scale with."""
    with pytest.raises(DataError, match="repeats itself every 24 steps"):
        load(write(tmp_path / "s.csv", [float(hour % 24) for hour in range(400)]), history=24, horizon=6)


@pytest.fixture
def shops(tmp_path):
    """Two series of one file: one that is busy, one that sold nothing."""
    rows = [pd.DataFrame({"shop": name, "value": values}) for name, values in (("a", noise(400)), ("b", [0.0] * 400))]
    stamps = pd.date_range("2024-01-01", periods=400, freq="h")
    table = pd.concat([one.assign(timestamp=stamps) for one in rows])
    table.to_csv(tmp_path / "shops.csv", index=False)
    return tmp_path / "shops.csv"


def test_a_series_that_never_varies_is_left_out_and_said(shops):
    """It has no error to scale with: training and scores are those of the other series alone, and a line says so."""
    task = load(shops, series="shop", history=24, horizon=6, samples=5)
    alone = load(write(shops.with_name("a.csv"), noise(400)), history=24, horizon=6, samples=5)
    model = Repeats(0.1)
    assert task.evaluate(model, 64, "cpu") == alone.evaluate(model, 64, "cpu")
    for split in ("train", "validation"):
        for one, other in zip(task.batches(split, 16, 0, 0), alone.batches(split, 16, 0, 0), strict=True):
            assert torch.equal(one.source, other.source)
    assert any(line.startswith("b: is left out of training and scores, as the training part") for line in task.notes)
    again = restore(json.loads(json.dumps(task.state())))
    found = again.forecast(model, "b", samples=5)
    assert torch.equal(found.samples, torch.zeros_like(found.samples))
    assert again.changes(again.series) == [
        "b: its differences to 24 steps before do not vary in the training, and are forecast to stay as they are"
    ]


def test_a_file_of_one_series_need_not_say_again_which(shops, tmp_path):
    """Beside --series-as the column that told the training's series apart is not looked for."""
    state = load(shops, series="shop", history=24, horizon=6).state()
    later = write(tmp_path / "later.csv", noise(100, 1))
    with pytest.raises(DataError, match="no column named 'shop'"):
        restore(state, later)
    task = restore(state, later, series_as="a")
    assert [one.raw.name for one in task.series] == ["a"]
    assert task.series[0].series.mean == state["scales"]["a"]["mean"]
    with pytest.raises(DataError, match="the training had no such series, expected one of a, b"):
        restore(state, later, series_as="c")
    with pytest.raises(DataError, match="here are 2: a, b"):
        restore(state, shops, series_as="a", series="shop")


@given(
    kind=st.sampled_from(["noise", "constant", "line", "season", "late"]),
    difference=st.booleans(),
    level=st.sampled_from([0.0, 1.0, -7.0]),
    output=st.floats(-2, 2, width=32),
)
def test_a_forecast_does_not_depend_on_the_unit(tmp_path_factory, kind, difference, level, output):
    """Series of another name in kW and in MW give the same forecast but for the unit, also where nothing varies.

    1024 for 1000, so that nothing rounds; whatever never varied in its first 80 % goes on as it was.
    """
    folder = tmp_path_factory.mktemp("units")
    hours = torch.arange(200, dtype=torch.float64)
    values = {
        "noise": torch.tensor(noise(200), dtype=torch.float64),
        "constant": torch.zeros(200),
        "line": hours,
        "season": (hours % 24).square(),
        "late": torch.where(hours < 190, 0.0, hours),
    }[kind] + level
    state = load(write(folder / "s.csv", noise(400)), history=24, horizon=6, difference=difference).state()
    forecasts = []
    for unit in (1, 1024):
        task = restore(state, write(folder / "other.csv", (values * unit).tolist()), new_series=True)
        found = task.forecast(Repeats(output, task.features), samples=3)
        forecasts.append(found.samples / unit)
    assert torch.equal(*forecasts)
    if kind == "constant" or (kind == "season" and difference):
        assert torch.equal(forecasts[0], values[-24:-18].expand(1, -1))


def test_straight_line_is_forecast(tmp_path):
    """A line differs by the same in every season; that is no division by zero."""
    task = load(write(tmp_path / "s.csv", [float(hour) for hour in range(400)]), history=24, horizon=6)
    assert task.evaluate(Repeats(0.0), 64, "cpu")["MASE"] == pytest.approx(0, abs=1e-6)


def test_defaults_follow_the_frequency():
    """Both cities are the default, a week of hours for a day; a year of hours tells nothing of a year's cycle."""
    pytest.importorskip("vega_datasets")
    task = load()
    assert [scaled.raw.name for scaled in task.series] == ["seattle", "san-francisco"]
    assert (task.history, task.horizon, task.season, task.lag) == (168, 24, 24, 24)
    assert task.cycles == ("day", "week")
    assert "seattle: 1 of 8760 values were missing and are interpolated linearly" in task.notes


@pytest.mark.parametrize("most", [256, 220, 60])
def test_validation_windows_start_at_every_hour(monkeypatch, most):
    """However many windows are left out, those that are evaluated start at every hour of the day."""
    pytest.importorskip("vega_datasets")
    monkeypatch.setattr(forecasting_task, "VALIDATION_WINDOWS", most)
    task = load("seattle")
    starts = task._starts(task.series[0], "validation")
    assert most / 2 < len(starts) <= most
    assert (starts % 24).unique().tolist() == list(range(24))


@pytest.mark.parametrize(("name", "sizes"), [("co2", (104, 52, 52)), ("sunspots", (33, 11, 11))])
def test_other_series_have_windows_that_fit(name, sizes):
    """Two years of weeks for the next; three cycles of the sun for the next."""
    pytest.importorskip("statsmodels.datasets")
    task = load(name)
    assert (task.history, task.horizon, task.season) == sizes
    assert next(task.batches("train", 4, 0, 0)).source.shape == (4, sizes[0], task.features)


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("model", DECODERS)
def test_every_model_fits_the_windows(hourly, model, size):
    """A model of each family and size reads the batches, has a loss, and forecasts; all but GNMT's by samples."""
    module = hourly.model_config(model, size).build(nn.LSTM)
    batch = next(hourly.batches("train", 4, 0, 0))
    assert torch.isfinite(module.loss(module(batch.source, batch.target), batch.expected))
    found = hourly.forecast(module.eval(), samples=3)
    assert found.samples.shape == (1 if model == "gnmt" else 3, 6)
    assert torch.isfinite(found.samples).all()


@pytest.mark.parametrize(("model", "size"), [("rnn", "small"), ("lstm", "huge")])
def test_other_models_are_refused(hourly, model, size):
    """A model or size that there is not is refused with what there is."""
    with pytest.raises(ValueError, match=f"has models lstm, .* got {model!r} and {size!r}"):
        hourly.model_config(model, size)


def test_training_beats_the_seasonal_naive_forecast():
    """Forty steps on both cities already score below the seasonal naive forecast on each of them."""
    pytest.importorskip("vega_datasets")
    task = load(history=72, samples=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model_config("lstm", "small").build(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batches = task.batches("train", 32, 0, 0)
    for _ in range(40):
        batch = next(batches)
        optimizer.zero_grad()
        model.loss(model(batch.source, batch.target), batch.expected).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    scores = task.evaluate(model, 256, "cpu")
    for city in ("seattle", "san-francisco"):
        assert scores[f"MASE, {city}"] < 0.8 * scores[f"MASE seasonal naive, {city}"]
    assert scores["CRPS"] < 0.8 * scores["CRPS seasonal naive"]
