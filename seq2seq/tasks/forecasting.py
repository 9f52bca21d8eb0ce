"""The task of forecasting: real series or a user's CSV, cut into windows, held against the seasonal naive.

What a model learns are the differences to the season before, as in a seasonal ARIMA: forecasting none of them is the
seasonal naive forecast, so all that is learnt is an improvement on it, and a trend does not lead out of what was seen
in training. A model with a likelihood forecasts by many sampled paths, one without by a single path of its outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from seq2seq.contract import Config, Model
from seq2seq.model import Seq2SeqConfig
from seq2seq.tasks import scoring
from seq2seq.tasks.batch import Batch
from seq2seq.tasks.errors import DataError
from seq2seq.tasks.forecast import Forecast
from seq2seq.tasks.paths import sample_paths
from seq2seq.tasks.scaling import Scaled, scale
from seq2seq.tasks.series import BUILT_IN, CYCLES, Frequency, TimeSeries, built_in, calendar
from seq2seq.tasks.series_file import Columns, read_series
from seq2seq.tasks.task import MODELS
from seq2seq.tasks.windows import TRAIN_SHARE, Series, window_starts, windows

#: What is forecast when nothing is named: both cities.
DEFAULT = "temperatures"
#: Seasons and windows of built-in series whose frequency alone does not say them.
PRESETS: dict[str, dict[str, Any]] = {
    "sunspots": {"season": 11, "history": 33, "horizon": 11},
}
#: Validation windows of a series that are evaluated: a day's hours all start some, and it stays quick.
VALIDATION_WINDOWS = 256


@dataclass(frozen=True)
class ForecastingTask:
    """Windows of one or several series of one frequency.

    Attributes:
        source: what the series came from, a name or a path.
        frequency: of all series.
        season: steps of the season that the naive forecast repeats.
        history, horizon: steps of encoder and decoder.
        lag: steps that differences reach back, the season or 0.
        cycles: what the calendar tells of, names out of `CYCLES`.
        series: the data; empty when restored without.
        samples: paths of a forecast in `evaluate`.
        strange: names of the series that training did not have; they are scaled by their own first 80 %.
    """

    source: str
    frequency: Frequency
    season: int
    history: int
    horizon: int
    lag: int
    cycles: tuple[str, ...]
    series: tuple[Scaled, ...]
    samples: int = 100
    strange: tuple[str, ...] = ()

    name: ClassVar[str] = "forecasting"
    quality: ClassVar[str] = "MASE"
    higher_is_better: ClassVar[bool] = False
    #: Settings of a training that reaches a MASE well below the seasonal naive forecast's on both cities.
    learning_rate: ClassVar[float] = 5e-3
    batch: ClassVar[int] = 64
    steps: ClassVar[int] = 400

    @property
    def notes(self) -> list[str]:
        """What to tell about the data, a line each."""
        lines = self.changes(self.series)
        if self.lag:
            lines.append(f"the model learns differences to the value {self.lag} {self.frequency} steps before")
        return lines

    def changes(self, series: Sequence[Scaled]) -> list[str]:
        """In what series of the task differ from what was given, a line each."""
        lines = []
        for raw in (scaled.raw for scaled in series):
            if raw.filled:
                lines.append(
                    f"{raw.name}: {raw.filled} of {len(raw.values)} values were missing and are interpolated linearly"
                )
            if raw.converted:
                lines.append(f"{raw.name}: its timestamps have a time zone and are taken, and told, in UTC")
            if raw.name in self.strange:
                lines.append(f"{raw.name}: was not in the training, and is scaled by its own first {TRAIN_SHARE:.0%}")
        return lines

    @property
    def features(self) -> int:
        """Features of a step: the value, and sine and cosine of each cycle."""
        return 1 + 2 * len(self.cycles)

    def model_config(self, model: str = "lstm", size: str = "small", likelihood: str = "student") -> Config:
        """Sizes of a model for these windows.

        Args:
            model: `lstm`; `attention`, the same with Luong's general attention; `gnmt`, whose forecasts are points; or
                `transformer`, of as many parameters as `lstm`.
            size: `small`, 1 layer of 40, or `full`, the 3 layers of 40 of the workload `forecast-deepar`.
            likelihood: of the outputs, `gaussian`, `student` or "" for point forecasts.

        Raises:
            ValueError: for another model or size.
        """
        layers = {"small": 1, "full": 3}
        if model not in MODELS or size not in layers:
            msg = f"forecasting has models {', '.join(MODELS)} in sizes small and full, got {model!r} and {size!r}"
            raise ValueError(msg)
        common: dict[str, Any] = {
            "input_size": self.features,
            "hidden_size": 40,
            "output_size": 1,
            "num_layers": layers[size],
        }
        if model == "attention":
            from seq2seq.attention import AttentionConfig  # noqa: PLC0415 - each family when it is asked for

            return AttentionConfig(**common, likelihood=likelihood)
        if model == "gnmt":
            from seq2seq.gnmt import LEAST_LAYERS, GNMTConfig  # noqa: PLC0415

            return GNMTConfig(**(common | {"num_layers": max(layers[size], LEAST_LAYERS)}))
        config = Seq2SeqConfig(**common, likelihood=likelihood)
        if model == "transformer":
            from seq2seq.transformer import rival  # noqa: PLC0415

            return rival(config)
        return config

    def batches(self, split: str, batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Windows of all series; in training all full batches of an epoch, shuffled, in validation each in order.

        Args:
            split: `train` or `validation`.
            batch: windows in a batch; in validation the last may be smaller.
            seed: of the order in training.
            epoch: from 0; each has another order, the same on every run.

        Raises:
            ValueError: for an unknown split.
        """
        places = self._places(split)
        if split == "train":
            order = np.random.default_rng((seed, epoch)).permutation(len(places))
            places = places[torch.from_numpy(order)]
            # Batches of one size: a captured graph or a compiled model serves no other.
            places = places[: max(batch, len(places) // batch * batch)]
        for chosen in places.split(batch):
            yield self._windows(chosen)

    def evaluate(self, model: Model, batch: int, device: str) -> dict[str, float]:
        """Forecast the validation windows and hold them against what came, and so the seasonal naive forecast.

        Args:
            model: on `device`; it is in the mode afterwards that it was in before.
            batch: windows forecast together, each with all its paths.
            device: `cpu` or `cuda`.

        Returns:
            Means over the series of MASE (of the median path), CRPS and MAE (in the unit of the series), and the same
            of the seasonal naive forecast; where there are several series also the MASE of each.
        """
        training, found = model.training, []
        model.eval()
        try:
            for index, scaled in enumerate(self.series):
                starts = self._starts(scaled, "validation")
                paths = [
                    sample_paths(model, self._windows(part).to(device), self.samples)
                    for part in _places(index, starts).split(batch)
                ]
                found.append(self._scores(scaled, starts, torch.cat(paths, 1)))
        finally:
            model.train(training)
        if not found:
            msg = "there is no series to evaluate on; give the task one when it is restored"
            raise ValueError(msg)
        scores = {name: math.fsum(score[name] for score in found) / len(found) for name in found[0]}
        if len(found) > 1:
            for scaled, score in zip(self.series, found, strict=True):
                for name in ("MASE", "MASE seasonal naive"):
                    scores[f"{name}, {scaled.raw.name}"] = score[name]
        return scores

    def forecast(
        self, model: Model, series: str | None = None, start: int | None = None, samples: int = 100, device: str = "cpu"
    ) -> Forecast:
        """Forecast one horizon.

        Args:
            model: in evaluation mode, on `device`.
            series: name of one of the task's; the first when None.
            start: step of the series that the forecast starts at; None for what comes after its end.
            samples: paths.
            device: `cpu` or `cuda`.

        Raises:
            ValueError: for a series that there is not, or a start without room for history before or horizon after.
        """
        names = [scaled.raw.name for scaled in self.series]
        if not names or (series is not None and series not in names):
            msg = f"there is no series {series or ''!r}, expected one of {', '.join(names) or '(none was given)'}"
            raise ValueError(msg)
        scaled = self.series[names.index(series) if series is not None else 0]
        total, earliest = len(scaled.raw.values), self.lag + self.history + 1
        future = start is None
        start = total if start is None else start
        if not earliest <= start <= (total if future else total - self.horizon):
            msg = f"start is step {start} of {names[0] if series is None else series}, which has {total}; expected from"
            msg += f" {earliest} to {total - self.horizon}, or none for what comes after its end"
            raise ValueError(msg)
        # The future has a calendar but no values yet.
        extended = self._extended(scaled) if future else scaled.series
        window = windows(extended, torch.tensor([start - self.history - self.lag]), self.history, self.horizon)
        paths = sample_paths(model, window.to(device), samples)
        before = scaled.raw.values[start - self.history : start]
        return Forecast(
            series=scaled.raw.name,
            unit=scaled.raw.unit,
            timestamps=scaled.raw.timestamps(self.horizon)[start - self.history : start + self.horizon],
            history=before,
            samples=scaled.in_unit(paths, torch.tensor([start]))[:, 0],
            naive=scoring.seasonal_naive(scaled.raw.values[:start], self.season, self.horizon),
            observed=None if future else scaled.raw.values[start : start + self.horizon],
        )

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON: windows, calendar, and the scaling of each series."""
        return {
            "task": self.name,
            "source": self.source,
            "frequency": dataclasses.asdict(self.frequency),
            "season": self.season,
            "history": self.history,
            "horizon": self.horizon,
            "lag": self.lag,
            "cycles": list(self.cycles),
            "samples": self.samples,
            "scales": {s.raw.name: {"mean": s.series.mean, "deviation": s.series.deviation} for s in self.series},
        }

    def _starts(self, scaled: Scaled, split: str) -> Tensor:
        """Starts of a split's windows; in validation every so many, so that each hour of a day starts about as many."""
        starts = window_starts(scaled.series, self.history, self.horizon, split)
        stride = 1
        if split == "validation":
            stride = -(-len(starts) // VALIDATION_WINDOWS)
            while math.gcd(stride, self.season) > 1:
                stride += 1
        return torch.arange(starts.start, starts.stop, stride)

    def _places(self, split: str) -> Tensor:
        """All windows of a split, (windows, 2) int64: series and start."""
        return torch.cat([_places(index, self._starts(scaled, split)) for index, scaled in enumerate(self.series)])

    def _windows(self, places: Tensor) -> Batch:
        """A batch of windows in the given order."""
        parts, order = [], []
        for index, scaled in enumerate(self.series):
            mine = (places[:, 0] == index).nonzero()[:, 0]
            if len(mine):
                parts.append(windows(scaled.series, places[mine, 1], self.history, self.horizon))
                order.append(mine)
        if len(parts) == 1:
            return parts[0]
        back = torch.cat(order).argsort()
        tensors = {name: torch.cat([part.tensors()[name] for part in parts])[back] for name in parts[0].tensors()}
        return dataclasses.replace(parts[0], **tensors)

    def _scores(self, scaled: Scaled, starts: Tensor, paths: Tensor) -> dict[str, float]:
        first = starts + self.history + self.lag
        samples = scaled.in_unit(paths, first)
        steps = first[:, None] + torch.arange(self.horizon)
        observed, values = scaled.raw.values[steps], scaled.raw.values
        naive = torch.stack([scoring.seasonal_naive(values[:at], self.season, self.horizon) for at in first.tolist()])
        train = values[: self.lag + scaled.series.train_hours]
        deviation = scoring.seasonal_naive_deviation(train, self.season, self.horizon)
        median = samples.quantile(0.5, 0)
        return {
            "MASE": scoring.mase(median, observed, scaled.error),
            "MASE seasonal naive": scoring.mase(naive, observed, scaled.error),
            "CRPS": float(scoring.crps_of_samples(samples, observed).mean()),
            "CRPS seasonal naive": float(scoring.crps_of_gaussian(naive, deviation, observed).mean()),
            "MAE": float((median - observed).abs().mean()),
            "MAE seasonal naive": float((naive - observed).abs().mean()),
        }

    def _extended(self, scaled: Scaled) -> Series:
        """The series with a horizon of unknown values after its end."""
        values = torch.cat([scaled.series.values, torch.zeros(self.horizon, dtype=torch.float64)])
        circles = calendar(scaled.raw.timestamps(self.horizon)[self.lag :], self.cycles)
        return dataclasses.replace(scaled.series, values=values, calendar=circles)


def load(path: Path | str | None = None, **options: Any) -> ForecastingTask:
    """The task on built-in series or on a user's CSV.

    Args:
        path: a name out of `BUILT_IN`, or of a CSV file; both cities' temperatures when None.
        options: `season`, `history`, `horizon` in steps, which follow from the frequency when not given;
            `difference`, whether to learn differences to the season before; `samples`, paths of a forecast; and, for a
            file, the fields of `series_file.Columns`.

    Raises:
        DataError: for a file, or an option, that cannot be used.
        DataUnavailableError: when the package of a built-in series is not installed.
    """
    name = DEFAULT if path is None else str(path)
    own = ("season", "history", "horizon", "difference", "samples")
    chosen = PRESETS.get(name, {}) | {key: options.pop(key) for key in own if options.get(key) is not None}
    found = _read(name, options)
    frequency = found[0].frequency
    season = _count(chosen, "season", frequency.season)
    # A week of hours for a day of them; two years for the next, which a week of years would not be.
    history = _count(chosen, "history", season * (7 if 1 < season <= 31 else 2) if season > 1 else 16)  # noqa: PLR2004
    horizon = _count(chosen, "horizon", season if season > 1 else 4)
    lag = season if chosen.get("difference", True) else 0
    # The least number of values of which both splits get a window.
    least = lag + max(math.ceil((history + horizon + 1) / TRAIN_SHARE), math.ceil(horizon / (1 - TRAIN_SHARE)) + 1)
    for raw in found:
        if len(raw.values) < least:
            msg = f"{name}: the series {raw.name} has {len(raw.values)} values, expected at least {least} for windows"
            msg += f" of {history} + {horizon} steps in training and validation: give more, or a smaller history"
            raise DataError(msg)
    # A cycle that training sees less than twice would lead validation to places that were never seen.
    seen = min(len(raw.values) for raw in found) * TRAIN_SHARE * frequency.step_s
    cycles = tuple(cycle for cycle in frequency.cycles if seen >= 2 * CYCLES[cycle])
    return ForecastingTask(
        source=name,
        frequency=frequency,
        season=season,
        history=history,
        horizon=horizon,
        lag=lag,
        cycles=cycles,
        series=_scaled(name, found, season, lag, cycles),
        samples=_count(chosen, "samples", 100),
    )


def restore(state: dict[str, Any], path: Path | str | None = None, **options: Any) -> ForecastingTask:
    """The task of a checkpoint, its windows and scaling as in training.

    Args:
        state: from `ForecastingTask.state`.
        path: series to forecast, as for `load`; those of the training when None and they are built in, otherwise none.
            A series of another name than those of the training is scaled by its own first 80 %.
        options: fields of `series_file.Columns`, for a file.

    Raises:
        DataError: for a file that cannot be used, or of another frequency than the training's.
    """
    name = str(path) if path is not None else state["source"] if state["source"] in BUILT_IN else None
    frequency, cycles = Frequency(**state["frequency"]), tuple(state["cycles"])
    found = _read(name, options) if name is not None else []
    least = state["lag"] + state["history"] + 1
    for raw in found:
        if raw.frequency != frequency:
            msg = f"{name}: the series {raw.name} is {raw.frequency}, expected {frequency} as in training"
            raise DataError(msg)
        if len(raw.values) < least:
            msg = f"{name}: the series {raw.name} has {len(raw.values)} values, expected at least {least} to read"
            raise DataError(msg)
    scaled = _scaled(name or "", found, state["season"], state["lag"], cycles, state["scales"])
    sizes = {key: state[key] for key in ("season", "history", "horizon", "lag", "samples")}
    strange = tuple(raw.name for raw in found if raw.name not in state["scales"])
    return ForecastingTask(name or state["source"], frequency, cycles=cycles, series=scaled, strange=strange, **sizes)


def _places(index: int, starts: Tensor) -> Tensor:
    return torch.stack([torch.full_like(starts, index), starts], 1)


def _scaled(
    name: str,
    found: Sequence[TimeSeries],
    season: int,
    lag: int,
    cycles: tuple[str, ...],
    given: Mapping[str, dict[str, float]] | None = None,
) -> tuple[Scaled, ...]:
    try:
        return tuple(scale(raw, season, lag, cycles, (given or {}).get(raw.name)) for raw in found)
    except DataError as error:
        msg = f"{name}: {error}"
        raise DataError(msg) from error


def _read(name: str, options: dict[str, Any]) -> list[TimeSeries]:
    if name in BUILT_IN:
        if options:
            msg = f"{', '.join(options)}: only for a file, but {name} is a built-in series"
            raise DataError(msg)
        return built_in(name)
    path = Path(name)
    if not path.exists():
        msg = f"{path}: there is no such file, expected a CSV or one of the built-in series {', '.join(BUILT_IN)}"
        raise DataError(msg)
    found = read_series(path, Columns.of(options))
    for raw in found[1:]:
        if raw.frequency != found[0].frequency:
            msg = f"{path}: the series {raw.name} is {raw.frequency}, but {found[0].name} {found[0].frequency}; "
            msg += "expected one frequency in a file"
            raise DataError(msg)
    return found


def _count(options: dict[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        msg = f"{name} is {value!r}, expected a whole number of at least 1"
        raise DataError(msg)
    return value
