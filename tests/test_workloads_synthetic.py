"""Sources of batches: windows that do not leak, lengths distributed as published, equal seeds equal batches."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from seq2seq.data.batch import Batch
from seq2seq.data.errors import DataUnavailableError
from seq2seq.data.windows import FEATURES, Series, seattle_temperatures, temperature_batch, window_starts, windows
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.workloads import synthetic

pytest.importorskip("hypothesis")
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SEEDS

from seq2seq.data.lengths import LIBRISPEECH_CHARACTERS, LIBRISPEECH_FRAMES, WMT_ENGLISH, WMT_GERMAN

#: Hours of the Seattle series: those of 2010 but one.
HOURS = 8759
#: Mean, median, 90th and 99th percentile and maximum as published for the corpora.
PUBLISHED = {
    "WMT English": (WMT_ENGLISH, 22.5, 21, 38, 48, 50),
    "WMT German": (WMT_GERMAN, 21.4, 20, 36, 47, 50),
    "LibriSpeech frames": (LIBRISPEECH_FRAMES, 717, 592, 1333, 2376, 3264),
    "LibriSpeech characters": (LIBRISPEECH_CHARACTERS, 107, 89, 204, 367, 516),
}
WORDS = Seq2SeqConfig(3, 4, 11, decoder_input_size=2, source_vocabulary=7, target_vocabulary=5)
FRAMES = Seq2SeqConfig(3, 4, 11, decoder_input_size=2, target_vocabulary=5)
VALUES = Seq2SeqConfig(3, 4, 2, decoder_input_size=5)


def counting(hours: int) -> Series:
    """A series whose value is the hour itself, and whose calendar is ten times the hour."""
    values = torch.arange(hours, dtype=torch.float64)
    return Series(values, (10 * values)[:, None].expand(-1, 4), mean=0.0, deviation=1.0)


def all_windows(series: Series, history: int, horizon: int, split: str) -> Batch:
    """Every window of a split as one batch."""
    return windows(series, torch.tensor(list(window_starts(series, history, horizon, split))), history, horizon)


def fields(batch: Batch) -> dict[str, torch.Tensor]:
    """Return what a batch holds, by name, without what is absent."""
    return {name: value for name, value in vars(batch).items() if value is not None}


def assert_equal(one: Batch, other: Batch) -> None:
    """Two batches hold the same, bit for bit."""
    assert fields(one).keys() == fields(other).keys()
    for name, value in fields(one).items():
        assert torch.equal(value, fields(other)[name]), name


sizes = given(hours=st.integers(5, 120), history=st.integers(1, 30), horizon=st.integers(1, 12))


@sizes
def test_training_never_sees_what_validation_forecasts(hours, history, horizon):
    """No training window touches an hour that validation forecasts, and every hour is put to use by one of them."""
    series = counting(hours)
    assume(series.train_hours > history + horizon and hours - series.train_hours >= horizon)
    train, validation = (all_windows(series, history, horizon, split) for split in ("train", "validation"))
    seen = {int(hour) for part in (train.source, train.target, train.expected) for hour in part[..., 0].flatten()}
    forecast = {int(hour) for hour in validation.expected.flatten()}
    assert not seen & forecast
    assert max(seen) == series.train_hours - 1
    # Validation also forecasts the first hour after training, when its history fits before that.
    assert min(forecast) == max(series.train_hours, history + 1)
    assert max(forecast) == hours - 1


@sizes
def test_windows_are_history_then_horizon(hours, history, horizon):
    """History and horizon are consecutive hours; the decoder reads the value of the hour before each it forecasts."""
    series = counting(hours)
    assume(series.train_hours > history + horizon)
    batch = all_windows(series, history, horizon, "train")
    start = batch.source[:, :1, 0]
    assert torch.equal(batch.source[..., 0], start + torch.arange(history))
    assert torch.equal(batch.expected[..., 0], start + history + torch.arange(horizon))
    assert torch.equal(batch.target[..., 0], batch.expected[..., 0] - 1)


@sizes
def test_calendar_is_that_of_the_hour(hours, history, horizon):
    """A step's calendar is its own hour's, and the decoder's that of the hour it forecasts."""
    series = counting(hours)
    assume(series.train_hours > history + horizon)
    batch = all_windows(series, history, horizon, "train")
    for column in range(1, FEATURES):
        assert torch.equal(batch.source[..., column], 10 * batch.source[..., 0])
        assert torch.equal(batch.target[..., column], 10 * batch.expected[..., 0])


def test_unknown_split_is_refused():
    """A split of another name is refused with the names there are."""
    with pytest.raises(ValueError, match="split is 'test', expected 'train' or 'validation'"):
        window_starts(counting(100), 5, 2, "test")


@pytest.mark.parametrize(("split", "history", "horizon"), [("train", 75, 5), ("validation", 5, 96), ("train", 200, 1)])
def test_window_that_does_not_fit_is_refused(split, history, horizon):
    """A window longer than its part is refused, not cut."""
    with pytest.raises(ValueError, match=rf"{history} \+ {horizon} hours does not fit the {split} part of 100 hours"):
        window_starts(counting(100), history, horizon, split)


def raw_temperatures() -> torch.Tensor:
    """The temperatures as the package gives them, in degrees Fahrenheit."""
    data = pytest.importorskip("vega_datasets").local_data.seattle_temps()
    return torch.tensor(data["temp"].to_numpy(), dtype=torch.float64)


def test_series_is_the_whole_year():
    """The series has all 8,759 hours of the package, in order, and no other values."""
    raw, series = raw_temperatures(), seattle_temperatures()
    assert len(raw) == HOURS
    torch.testing.assert_close(series.values * series.deviation + series.mean, raw)


def test_normalisation_uses_the_training_part_alone():
    """Mean and deviation are those of the first 80 %; the validation part has no say."""
    series, train = seattle_temperatures(), raw_temperatures()[: HOURS * 4 // 5]
    assert series.train_hours == len(train)
    assert series.mean == pytest.approx(float(train.mean()), rel=1e-12)
    assert series.deviation == pytest.approx(float(train.std()), rel=1e-12)
    assert series.mean != pytest.approx(float(raw_temperatures().mean()), rel=1e-4)


def test_calendar_goes_round():
    """Hours and days lie on circles that close after a day and a year; noon is opposite midnight, July January."""
    calendar = seattle_temperatures().calendar
    assert calendar.shape == (HOURS, 4)
    torch.testing.assert_close(calendar[:, 0] ** 2 + calendar[:, 1] ** 2, torch.ones(HOURS, dtype=torch.float64))
    torch.testing.assert_close(calendar[:, 2] ** 2 + calendar[:, 3] ** 2, torch.ones(HOURS, dtype=torch.float64))
    torch.testing.assert_close(calendar[0, :2], calendar[24, :2])
    torch.testing.assert_close(calendar[12, :2], -calendar[0, :2])
    assert float(calendar[0, 2:] @ calendar[-1, 2:]) > 0.999
    assert float(calendar[0, 2:] @ calendar[HOURS // 2, 2:]) < -0.99


@pytest.fixture
def fresh_series():
    """The series is read anew within the test, and again after it."""
    seattle_temperatures.cache_clear()
    yield
    seattle_temperatures.cache_clear()


@pytest.mark.usefixtures("fresh_series")
def test_missing_package_says_what_to_install(monkeypatch):
    """Without vega_datasets the error names the package and the command that installs it."""
    monkeypatch.setitem(sys.modules, "vega_datasets", None)
    with pytest.raises(DataUnavailableError, match=r"vega_datasets, which is not installed: pip install vega_datasets"):
        seattle_temperatures()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_temperature_batch_is_windows_of_its_split(split):
    """Each row is a window of the split asked for, in float32."""
    series = seattle_temperatures()
    batch = temperature_batch(16, 30, 6, seed=1, split=split)
    assert {value.dtype for value in fields(batch).values()} == {torch.float32}
    values = series.values.float()
    starts = window_starts(series, 30, 6, split)
    everything = torch.stack([values[start : start + 36] for start in starts])
    for row in torch.cat([batch.source[..., 0], batch.expected[..., 0]], 1):
        assert (everything == row).all(1).any()


def test_temperature_batches_follow_their_seed():
    """Equal seeds give equal batches, others give others, and the global random state has no say."""
    torch.manual_seed(0)
    one = temperature_batch(8, 24, 6, seed=1)
    torch.manual_seed(1)
    assert_equal(temperature_batch(8, 24, 6, seed=1), one)
    assert not torch.equal(temperature_batch(8, 24, 6, seed=2).source, one.source)


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_lengths_have_the_published_quantiles(corpus):
    """Over many draws median, 90th and 99th percentile and maximum are the corpus's own."""
    lengths, _, *published = PUBLISHED[corpus]
    drawn = lengths.at(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), published[-1]).double()
    found = [*drawn.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist(), float(drawn.max())]
    assert found == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_lengths_have_the_published_mean(corpus):
    """Over many draws the mean length is the corpus's own: it decides how much of a batch is padding."""
    lengths, mean, *published = PUBLISHED[corpus]
    drawn = lengths.at(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), published[-1]).double()
    assert float(drawn.mean()) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("corpus", PUBLISHED)
@given(longest=st.integers(1, 4000), probabilities=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20))
def test_lengths_rise_with_probability(corpus, longest, probabilities):
    """Lengths lie between 1 and the longest, which is reached at probability 1, and never fall as it rises."""
    drawn = PUBLISHED[corpus][0].at(torch.tensor([*sorted(probabilities), 1.0]), longest)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= 1
    assert int(drawn[-1]) == longest
    assert bool((drawn.diff() >= 0).all())


@pytest.mark.parametrize("config", [WORDS, FRAMES, VALUES], ids=["words", "frames", "values"])
@given(seed=SEEDS)
def test_random_batches_follow_their_seed(config, seed):
    """Equal seeds give equal batches, others give others, and the global random state has no say."""
    arguments = config, 4, 6, 5
    lengths = WMT_GERMAN, WMT_ENGLISH
    one = synthetic.random_batch(*arguments, seed, *lengths)
    torch.rand(1)
    assert_equal(synthetic.random_batch(*arguments, seed, *lengths), one)
    other = synthetic.random_batch(*arguments, seed + 1, *lengths)
    assert not torch.equal(other.source, one.source)
    assert not torch.equal(other.expected, one.expected)


@given(seed=SEEDS)
def test_tokens_are_within_their_vocabulary(seed):
    """Each of source, target and expected tokens keeps to its own vocabulary and uses all of it."""
    batch = synthetic.random_batch(WORDS, 40, 20, 20, seed)
    for value, size in ((batch.source, 7), (batch.target, 5), (batch.expected, 11)):
        assert value.dtype == torch.int64
        assert value.unique().tolist() == list(range(size))


@pytest.mark.parametrize("config", [WORDS, FRAMES], ids=["words", "frames"])
@given(seed=SEEDS)
def test_expected_tokens_end_with_their_sequence(config, seed):
    """`IGNORE_TOKEN` stands past each target's length and nowhere else."""
    batch = synthetic.random_batch(config, 8, 9, 7, seed, WMT_GERMAN, WMT_ENGLISH)
    outside = torch.arange(7) >= batch.target_lengths[:, None]
    assert torch.equal(batch.expected == IGNORE_TOKEN, outside)


def test_values_are_standard_normal():
    """Real values have mean 0 and deviation 1, in sources, targets and what is expected."""
    batch = synthetic.random_batch(VALUES, 100, 30, 20, 0)
    assert [tuple(v.shape) for v in fields(batch).values()] == [(100, 30, 3), (100, 20, 5), (100, 20, 2)]
    for value in fields(batch).values():
        assert float(value.mean()) == pytest.approx(0, abs=0.05)
        assert float(value.std()) == pytest.approx(1, abs=0.05)


def test_long_sources_go_with_long_targets():
    """Both lengths of a pair are read off at one probability, so they rise together."""
    lengths = WMT_GERMAN, WMT_ENGLISH
    batch = synthetic.random_batch(VALUES, 50, 50, 50, 0, *lengths)
    order = batch.source_lengths.argsort(stable=True)
    pairs = sorted(zip(batch.source_lengths.tolist(), batch.target_lengths.tolist(), strict=True))
    assert [target for _, target in pairs] == sorted(batch.target_lengths.tolist())
    assert batch.source_lengths[order[0]] < batch.source_lengths[order[-1]]


def test_without_target_there_are_no_target_lengths():
    """A batch whose decoder reads the source has neither target nor target lengths, and expects one output a step."""
    batch = synthetic.random_batch(VALUES, 4, 6, None, 0, WMT_GERMAN)
    assert batch.target is None
    assert batch.target_lengths is None
    assert batch.source_lengths is not None
    assert batch.expected.shape == (4, 6, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_casts_what_the_model_reads(dtype):
    """Real-valued inputs are cast; tokens, lengths and what outputs are compared with stay as they are."""
    batch = synthetic.random_batch(VALUES, 4, 6, 5, 0, WMT_GERMAN, WMT_ENGLISH)
    moved = batch.to("cpu", dtype)
    assert torch.equal(moved.source, batch.source.to(dtype))
    assert torch.equal(moved.target, batch.target.to(dtype))
    assert moved.expected.dtype == torch.float32
    assert torch.equal(moved.expected, batch.expected)
    assert torch.equal(moved.source_lengths, batch.source_lengths)
    assert torch.equal(moved.target_lengths, batch.target_lengths)
    words = synthetic.random_batch(WORDS, 4, 6, 5, 0)
    assert_equal(words.to("cpu", dtype), words)


def test_to_leaves_lengths_on_the_cpu():
    """Everything moves but the lengths, which packing reads on the CPU."""
    batch = synthetic.random_batch(FRAMES, 4, 6, 5, 0, WMT_GERMAN, WMT_ENGLISH)
    places = {name: value.device.type for name, value in fields(batch.to("meta")).items()}
    assert places == {
        "source": "meta",
        "target": "meta",
        "source_lengths": "cpu",
        "target_lengths": "cpu",
        "expected": "meta",
    }


def test_to_keeps_the_absent_absent():
    """A batch without target or lengths moves as it is."""
    moved = Batch(torch.zeros(1, 2, 3), None, None, None, torch.full((1, 2, 1), math.pi)).to("cpu", torch.float16)
    assert fields(moved).keys() == {"source", "expected"}
