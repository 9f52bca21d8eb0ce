"""A forecasting task: windows of series, models for them, forecasts, and what these are worth.

What a model learns are the differences to the season before, as in a seasonal ARIMA: forecasting none of them is the
seasonal naive forecast, so all that is learnt is an improvement on it, and a trend does not lead out of what was seen
in training. A model with a likelihood forecasts by many sampled paths, one without by a single path of its outputs. One
with quantiles is sampled too: they are those of a step, given the step before, and not of a path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.data.series import Frequency, calendar
from seq2seq.data.text_file import composed
from seq2seq.data.windows import TRAIN_SHARE, Series, window_starts, windows
from seq2seq.layers.likelihoods import QUANTILES
from seq2seq.models.base import Config, Model
from seq2seq.tasks import scoring
from seq2seq.tasks.families import family_config
from seq2seq.tasks.forecast import Forecast
from seq2seq.tasks.paths import sample_paths
from seq2seq.tasks.scaling import Scaled
from seq2seq.tasks.sequences import evaluating
from seq2seq.tasks.task import DECODERS

#: What scores and quantiles of such a model rest on, besides what was learnt.
INTERPOLATED = (
    f"learnt are the quantiles {', '.join(map(str, QUANTILES))}: between and beyond them, as for q05, q95 and the CRPS,"
    " straight lines are assumed"
)
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
        cycles: calendar features, names out of `CYCLES`.
        series: the data; empty when restored without.
        samples: paths of a forecast in `evaluate`.
        likelihood: of the outputs of its models, a key of `LIKELIHOODS`; None for that of the family.
        strange: names of the series that training did not have; they are scaled by their own first 80 %.
        columns: fields of `series_file.Columns` that the file was read with; None for built-in series.
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
    likelihood: str | None = None
    strange: tuple[str, ...] = ()
    columns: Mapping[str, Any] | None = None

    name: ClassVar[str] = "forecasting"
    quality: ClassVar[str] = "MASE"
    higher_is_better: ClassVar[bool] = False
    #: Settings of a training that reaches a MASE well below the seasonal naive forecast's on both cities.
    learning_rate: ClassVar[float] = 5e-3
    batch: ClassVar[int] = 64
    steps: ClassVar[int] = 400

    @property
    def notes(self) -> list[str]:
        """Notes about the data for the user, one per line."""
        lines = self.changes(self.series)
        left_out = "is left out of training and scores"
        lines += [f"{one.raw.name}: {left_out}, as {one.unscored}" for one in self.series if one.error is None]
        if self.lag:
            lines.append(f"the model learns differences to the value {self.lag} {self.frequency} steps before")
        if self.likelihood == "quantile":
            lines.append(INTERPOLATED)
        return lines

    def changes(self, series: Sequence[Scaled]) -> list[str]:
        """In what series of the task differ from what was given, a line each."""
        lines = []
        for raw, found in ((scaled.raw, scaled.series) for scaled in series):
            if raw.filled:
                lines.append(
                    f"{raw.name}: {raw.filled} of {len(raw.values)} values were missing and are interpolated linearly"
                )
            if raw.averaged:
                lines.append(f"{raw.name}: {raw.averaged} rows repeat a timestamp; the values of each are averaged")
            if raw.converted:
                lines.append(f"{raw.name}: its timestamps have a time zone; they are read and shown in UTC")
            if raw.name in self.strange:
                lines.append(f"{raw.name}: was not in the training, and is scaled by its own first {TRAIN_SHARE:.0%}")
            if not found.deviation:
                what = f"differences to {self.lag} steps before" if self.lag else "values"
                where = f"its own first {TRAIN_SHARE:.0%}" if raw.name in self.strange else "the training"
                lines.append(f"{raw.name}: its {what} do not vary in {where}, and are forecast to stay as they are")
        return lines

    @property
    def features(self) -> int:
        """Features of a step: the value, and sine and cosine of each cycle."""
        return 1 + 2 * len(self.cycles)

    def model_config(self, model: str = "lstm", size: str = "small", likelihood: str | None = None) -> Config:
        """Sizes of a model for these windows.

        Args:
            model: `lstm`; `attention`, the same with Luong's general attention; `gnmt`, whose forecasts are points; or
                `transformer`, of as many parameters as `lstm`.
            size: `small`, 1 layer of 40, or `full`, the 3 layers of 40 of the workload `forecast-deepar`.
            likelihood: of the outputs, key of `LIKELIHOODS`, "" for point forecasts; None for the task's, or `student`.

        Raises:
            ValueError: for another model or size, or a likelihood of a model whose forecasts are points.
        """
        chosen = self.likelihood if likelihood is None else likelihood
        layers = {"small": 1, "full": 3}
        if model not in DECODERS or size not in layers:
            msg = f"forecasting has models {', '.join(DECODERS)} in sizes small and full, got {model!r} and {size!r}"
            raise ValueError(msg)
        if model == "gnmt" and chosen:
            msg = f"forecasts of gnmt are points, without likelihood {chosen!r}: leave it out, or name another model"
            raise ValueError(msg)
        common = {"input_size": self.features, "hidden_size": 40, "output_size": 1}
        return family_config(model, layers[size], common, {"likelihood": "student" if chosen is None else chosen})

    def batches(self, split: str, batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Windows of all series, as `Task.batches`; in training only full batches, unless there is no full one."""
        places = self._places(split)
        if split == "train":
            order = np.random.default_rng((seed, epoch)).permutation(len(places))
            places = places[torch.from_numpy(order)]
            # Batches of one size: a captured graph or a compiled model serves no other.
            places = places[: max(batch, len(places) // batch * batch)]
        for chosen in places.split(batch):
            yield self._windows(chosen)

    def evaluate(self, model: Model, batch: int, device: str) -> dict[str, float]:
        """Forecast the validation windows and compare them, and the seasonal naive forecast, with what came.

        Returns:
            Means over the series of MASE (of the median path), CRPS and MAE (in the unit of the series), and the same
            of the seasonal naive forecast; where there are several series also the MASE of each.
        """
        found = []
        with evaluating(model):
            for index, scaled in self._scored():
                starts = self._starts(scaled, "validation")
                paths = [
                    sample_paths(model, self._windows(part).to(device), self.samples)
                    for part in _places(index, starts).split(batch)
                ]
                found.append(self._scores(scaled, starts, torch.cat(paths, 1)))
        if not found:
            msg = "there is no series to evaluate on; give the task one when it is restored"
            raise ValueError(msg)
        scores = {name: math.fsum(score[name] for score in found) / len(found) for name in found[0]}
        if len(found) > 1:
            for (_, scaled), score in zip(self._scored(), found, strict=True):
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
        series = series if series is None else composed(series)
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
            title=scaled.raw.title,
        )

    def state(self) -> dict[str, Any]:
        """State that `restore` needs, as JSON: windows, calendar, and the scaling of each series."""
        return {
            "task": self.name,
            "source": self.source,
            "columns": None if self.columns is None else dict(self.columns),
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
        """Starts of a split's windows; in validation at a distance that lets them begin at every hour of a day."""
        starts = window_starts(scaled.series, self.history, self.horizon, split)
        stride = 1
        if split == "validation":
            stride = -(-len(starts) // VALIDATION_WINDOWS)
            while math.gcd(stride, self.season) > 1:
                stride += 1
        return torch.arange(starts.start, starts.stop, stride)

    def _places(self, split: str) -> Tensor:
        """All windows of a split, (windows, 2) int64: series and start."""
        return torch.cat([_places(index, self._starts(scaled, split)) for index, scaled in self._scored()])

    def _scored(self) -> list[tuple[int, Scaled]]:
        """Series to learn from and to score, with their numbers: those that a naive forecast errs in."""
        return [(index, scaled) for index, scaled in enumerate(self.series) if scaled.error is not None]

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
        if scaled.error is None:
            raise ValueError(scaled.unscored)
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


def _places(index: int, starts: Tensor) -> Tensor:
    return torch.stack([torch.full_like(starts, index), starts], 1)
