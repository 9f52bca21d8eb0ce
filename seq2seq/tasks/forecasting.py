"""The task of forecasting: real series or a user's CSV, cut into windows, compared with the seasonal naive.

This module reads the data and chooses what the user left open; `forecasting_task` works with it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq2seq.data.errors import DataError
from seq2seq.data.options import Count, declared, typed
from seq2seq.data.series import BUILT_IN, CYCLES, Frequency, TimeSeries, built_in
from seq2seq.data.series_file import Columns, read_series
from seq2seq.data.text_file import composed
from seq2seq.data.windows import TRAIN_SHARE
from seq2seq.layers.likelihoods import LIKELIHOODS
from seq2seq.tasks.forecasting_task import ForecastingTask
from seq2seq.tasks.scaling import scale

#: Series that are forecast unless others are named: both cities.
DEFAULT = "temperatures"
#: Seasons and windows of built-in series for which the frequency does not determine them.
PRESETS: dict[str, dict[str, Any]] = {
    "sunspots": {"season": 11, "history": 33, "horizon": 11},
}


@dataclass(frozen=True)
class Choices:
    """Options for any series.

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


def load(path: Path | str | None = None, /, **options: Any) -> ForecastingTask:
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
    # A cycle that training covers less than twice would give validation calendar features that training never had.
    seen = min(len(raw.values) for raw in found) * TRAIN_SHARE * frequency.step_s
    cycles = tuple(cycle for cycle in frequency.cycles if seen >= 2 * CYCLES[cycle])
    series = tuple(scale(raw, season, lag, cycles) for raw in found)
    if all(scaled.error is None for scaled in series):
        msg = f"{name}: the series {series[0].raw.name}: {series[0].unscored}"
        raise DataError(msg)
    return ForecastingTask(
        source=_kept_path(name),
        frequency=frequency,
        season=season,
        history=history,
        horizon=horizon,
        lag=lag,
        cycles=cycles,
        series=series,
        columns=None if name in BUILT_IN else options,
        samples=chosen.samples,
        likelihood=_likelihood(chosen.likelihood),
    )


def restore(
    state: dict[str, Any],
    path: Path | str | None = None,
    /,
    *,
    series_as: str | None = None,
    new_series: bool = False,
    **options: Any,
) -> ForecastingTask:
    """The task of a checkpoint, its windows and scaling as in training.

    Args:
        state: from `ForecastingTask.state`.
        path: series to forecast, as for `load`; those of the training when None.
        series_as: name of the training's series that the file holds; the column that named series then is not
            looked for.
        new_series: whether the series of the file are others than the training's, whatever their names.
        options: fields of `series_file.Columns`, for a file; the others are as in training.

    Raises:
        DataError: for a file that cannot be used, of another frequency than the training's, or of whose series nothing
            says which it is.
    """
    kept = dict(state.get("columns") or {})
    if series_as is not None:
        # A file of one series needs no column that says which.
        kept.pop("series", None)
    name = _trained_on(state) if path is None else str(path)
    if name is not None and name not in BUILT_IN:
        options = kept | options
    frequency, cycles = Frequency(**state["frequency"]), tuple(state["cycles"])
    scales = {composed(key): scale for key, scale in state["scales"].items()}
    found = _read(name, options) if name is not None else []
    least = state["lag"] + state["history"] + 1
    for raw in found:
        if raw.frequency != frequency:
            msg = f"{name}: the series {raw.name} is {raw.frequency}, expected {frequency} as in training"
            raise DataError(msg)
        if len(raw.values) < least:
            msg = f"{name}: the series {raw.name} has {len(raw.values)} values, expected at least {least} to read"
            raise DataError(msg)
    if new_series:
        scales = {}
    elif series_as is not None:
        found = [_known_as(composed(series_as), found, scales, name)]
    elif name is not None and name not in BUILT_IN and not options.get("series") and found[0].name not in scales:
        msg = f"{name}: nothing says which series it is, as a file's name does not: give --series-as "
        msg += f"{' or --series-as '.join(map(shlex.quote, scales))} if it is one of the training, else --new-series, "
        raise DataError(msg + f"which scales it by its own first {TRAIN_SHARE:.0%}")
    season, lag = state["season"], state["lag"]
    sizes = {key: state[key] for key in ("season", "history", "horizon", "lag", "samples")}
    return ForecastingTask(
        state["source"] if path is None else _kept_path(name or ""),
        frequency,
        cycles=cycles,
        series=tuple(scale(raw, season, lag, cycles, scales.get(raw.name)) for raw in found),
        strange=tuple(raw.name for raw in found if raw.name not in scales),
        columns=None if name in BUILT_IN else options,
        **sizes,
    )


def _trained_on(state: dict[str, Any]) -> str | None:
    """The name of built-in series, or the file, that a model was trained on; None where an earlier release kept none.

    Raises:
        DataError: when the file is no longer there.
    """
    if state["source"] in BUILT_IN:
        return str(state["source"])
    if state.get("columns") is None:
        return None
    name = os.fsdecode(state["source"].encode("utf-8", "surrogateescape"))
    if not Path(name).exists():
        msg = f"{name}: the training's file is no longer there; name the series to forecast with --data"
        raise DataError(msg)
    return name


def _kept_path(name: str) -> str:
    """A source as it is stored: the absolute path of a file, with surrogates for bytes that are not UTF-8."""
    if name in BUILT_IN:
        return name
    return str(Path(name).absolute()).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _known_as(name: str, found: Sequence[TimeSeries], scales: Mapping[str, Any], path: str | None) -> TimeSeries:
    """The one series that was found, under the name that it has in the training."""
    if name not in scales:
        msg = f"--series-as {name}: the training had no such series, expected one of {', '.join(scales)}"
        raise DataError(msg)
    if len(found) != 1:
        names = ", ".join(raw.name for raw in found)
        msg = f"{path}: --series-as says which one a series is, but here are {len(found)}: {names or 'none'}"
        raise DataError(msg)
    return dataclasses.replace(found[0], name=name)


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
