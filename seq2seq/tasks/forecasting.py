"""The task of forecasting: real series or a user's CSV, cut into windows, held against the seasonal naive.

Here the data is read and what was not said is chosen; what is done with it is in `forecasting_task`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq2seq.probabilistic import LIKELIHOODS
from seq2seq.tasks.errors import DataError
from seq2seq.tasks.files import composed
from seq2seq.tasks.forecasting_task import ForecastingTask
from seq2seq.tasks.options import Count, declared, typed
from seq2seq.tasks.scaling import Scaled, scale
from seq2seq.tasks.series import BUILT_IN, CYCLES, Frequency, TimeSeries, built_in
from seq2seq.tasks.series_file import Columns, read_series
from seq2seq.tasks.windows import TRAIN_SHARE

#: What is forecast when nothing is named: both cities.
DEFAULT = "temperatures"
#: Seasons and windows of built-in series whose frequency alone does not say them.
PRESETS: dict[str, dict[str, Any]] = {
    "sunspots": {"season": 11, "history": 33, "horizon": 11},
}


@dataclass(frozen=True)
class Choices:
    """What may be chosen for any series.

    Attributes:
        season, history, horizon: in steps; they follow from the frequency when None.
        difference: whether to learn differences to the season before.
        samples: paths of a forecast.
        likelihood: `gaussian`, `student`, `quantile` or, for forecasts without a spread, `point`.
    """

    season: Count | None = None
    history: Count | None = None
    horizon: Count | None = None
    difference: bool = True
    samples: Count = 100
    likelihood: str | None = None


def load(path: Path | str | None = None, **options: Any) -> ForecastingTask:
    """The task on built-in series or on a user's CSV.

    Args:
        path: a name out of `BUILT_IN`, or of a CSV file; both cities' temperatures when None.
        options: fields of `Choices` and, for a file, of `series_file.Columns`; as those types, or as texts.

    Raises:
        DataError: for a file, or an option, that cannot be used.
        DataUnavailableError: when the package of a built-in series is not installed.
    """
    name = DEFAULT if path is None else str(path)
    kinds = declared(Choices)
    options = typed(options, kinds | declared(Columns), "forecasting")
    given = {key: value for key in kinds if (value := options.pop(key, None)) is not None}
    chosen = Choices(**(PRESETS.get(name, {}) | given))
    found = _read(name, options)
    frequency = found[0].frequency
    season = chosen.season or frequency.season
    # A week of hours for a day of them; two years for the next, which a week of years would not be.
    history = chosen.history or (season * (7 if 1 < season <= 31 else 2) if season > 1 else 16)  # noqa: PLR2004
    horizon = chosen.horizon or (season if season > 1 else 4)
    lag = season if chosen.difference else 0
    # The least number of values of which both splits get a window.
    least = lag + max(math.ceil((history + horizon + 1) / TRAIN_SHARE), math.ceil(horizon / (1 - TRAIN_SHARE)) + 1)
    for raw in found:
        if len(raw.values) < least:
            msg = f"{name}: the series {raw.name} has {len(raw.values)} values, expected at least {least} for windows"
            msg += f" of {history} + {horizon} steps in training and validation, with a season of {season}: give more,"
            msg += " or a smaller history, horizon or season"
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
        samples=chosen.samples,
        likelihood=_likelihood(chosen.likelihood),
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
    scales = {composed(key): scale for key, scale in state["scales"].items()}
    scaled = _scaled(name or "", found, state["season"], state["lag"], cycles, scales)
    sizes = {key: state[key] for key in ("season", "history", "horizon", "lag", "samples")}
    strange = tuple(raw.name for raw in found if raw.name not in scales)
    return ForecastingTask(name or state["source"], frequency, cycles=cycles, series=scaled, strange=strange, **sizes)


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


def _likelihood(name: object) -> str | None:
    """The key of `LIKELIHOODS` by its name among the options; None for none."""
    keys: dict[object, str | None] = {key or "point": key for key in LIKELIHOODS}
    if name is not None and name not in keys:
        msg = f"likelihood is {name!r}, expected one of {', '.join(map(str, keys))}"
        raise DataError(msg)
    return keys.get(name)
