"""Forecast with an exported model, by numpy and onnxruntime alone: python MODEL.onnx.py SERIES.csv [NAME].

It stands beside MODEL.onnx and MODEL.onnx.json, where `python -m seq2seq export` wrote it; change it as you like.
SERIES.csv has rows of timestamp,value below a header, one per step and none missing. NAME is the series of the training
that they belong to, and needed where there were several.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime


def following(first: Any, steps: int, every: dict[str, int]) -> Any:
    """Timestamps from the first one on; the last days of months stay last days."""
    if not every["months"]:
        return first + np.arange(steps) * np.timedelta64(round(every["seconds"] * 1e6), "us")
    month = first.astype("M8[M]") + np.arange(steps) * every["months"]
    time, ends = first - first.astype("M8[D]"), (month + 1).astype("M8[D]") - 1
    same_day = month.astype("M8[D]") + (first.astype("M8[D]") - first.astype("M8[M]"))
    return (ends if first.astype("M8[D]") == ends[0] else np.minimum(same_day, ends)) + time


def calendar(times: Any, cycles: list[str]) -> Any:
    """Places of timestamps within cycles, as sine and cosine of each: (steps, 2 * cycles)."""
    date, year = times.astype("M8[D]"), times.astype("M8[Y]")
    of_day = (times - date) / np.timedelta64(1, "D")
    of_year = (date - year.astype("M8[D]")) / ((year + 1).astype("M8[D]") - year.astype("M8[D]"))
    days = (year + 1).astype("M8[D]") - year.astype("M8[D]")
    share = {
        "day": of_day,
        "week": ((date.astype(int) + 3) % 7 + of_day) / 7,  # 1970-01-01 was a Thursday
        "year": of_year + of_day / days.astype(int),
    }
    circles = [wave(2 * np.pi * share[name]) for name in cycles for wave in (np.sin, np.cos)]
    return np.stack(circles, 1) if circles else np.zeros((len(times), 0))


def draw(outputs: Any, likelihood: dict[str, Any], random: np.random.Generator) -> Any:
    """Draw a value for each path, from the outputs of one step, (paths, outputs)."""
    columns = outputs.astype(float).T
    if likelihood["name"] == "point":
        return columns[0]
    if likelihood["name"] == "quantile":
        known, levels = np.sort(columns, 0), np.array(likelihood["quantiles"])
        at = random.random(known.shape[1])
        place = np.clip(np.searchsorted(levels, at) - 1, 0, len(levels) - 2)
        low, high = np.take_along_axis(known, np.stack([place, place + 1]), 0)
        return low + (at - levels[place]) * (high - low) / (levels[place + 1] - levels[place])
    location, scale = columns[-2], np.logaddexp(columns[-1], 0) + likelihood["least_scale"]
    if likelihood["name"] == "gaussian":
        return random.normal(location, scale)
    return location + scale * random.standard_t(np.logaddexp(columns[0], 0) + likelihood["least_freedom"])


def forecast(model: Path, times: Any, values: Any, name: str | None = None, samples: int = 200) -> tuple[Any, Any]:
    """Timestamps (horizon,) and sampled paths (samples, horizon) of what comes after the values."""
    facts = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(model.read_bytes())
    lag, history, horizon = facts["difference"], facts["history"], facts["horizon"]
    name = next(iter(facts["scales"])) if name is None and len(facts["scales"]) == 1 else name
    if name not in facts["scales"]:
        which = "name the series of the training after the file" if name is None else f"{name} names no series of the "
        msg = f"{which}{'training' if name else ''}; expected one of {', '.join(facts['scales'])}"
        raise ValueError(msg)
    scale = facts["scales"][name]
    if len(values) < history + lag:
        msg = f"there are {len(values)} values; expected at least {history + lag}"
        raise ValueError(msg)
    stamps = following(times[0], len(values) + horizon, facts["frequency"])
    if wrong := np.flatnonzero(stamps[: len(times)] != times).tolist():
        msg = f"{times[wrong[0]].item()} where {stamps[wrong[0]].item()} is due; expected one row per step"
        raise ValueError(msg)
    if facts["likelihood"]["name"] == "point":
        samples = 1
    stamps = stamps[-history - horizon :]
    circles = calendar(stamps, facts["cycles"])
    steps = values[lag:] - values[: len(values) - lag] if lag else values
    read = (steps[-history:] - scale["mean"]) / (scale["deviation"] or 1)
    source = np.column_stack([read, circles[:history]])
    target = np.column_stack([np.full(horizon, read[-1]), circles[history:]])
    source, target = (np.repeat(part[None], samples, 0).astype("f4") for part in (source, target))
    paths, random = np.zeros((samples, horizon)), np.random.default_rng(0)
    for step in range(horizon):
        # The decoder reads the value of the step before, and nothing of what comes after a step.
        (outputs,) = session.run(["outputs"], {"source": source, "target": target})
        paths[:, step] = draw(outputs[:, step], facts["likelihood"], random)
        target[:, step + 1 : step + 2, 0] = paths[:, step, None]
    paths = paths * scale["deviation"] + scale["mean"]
    for step in range(horizon if lag else 0):
        paths[:, step] += values[len(values) + step - lag] if step < lag else paths[:, step - lag]
    return stamps[history:], paths


def read(path: Path) -> tuple[Any, Any]:
    """Timestamps and values of a CSV, without its header."""
    times, values = [], []
    for number, row in enumerate(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()), start=1):
        if number > 1 and row:
            try:
                times.append(np.datetime64(row[0], "us"))
                values.append(float(row[1]))
            except (ValueError, IndexError) as error:
                msg = f"{path}, line {number}: {','.join(row)!r} is not timestamp,value, as 2024-02-01T05:00,12.5"
                raise ValueError(msg) from error
    return np.array(times, "M8[us]"), np.array(values)


def refuse(what: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"error: {what}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Print timestamp, and the 10 %, 50 % and 90 % quantiles of the paths."""
    if len(sys.argv) not in {2, 3}:
        refuse(f"expected a file and at most a name: python {Path(__file__).name} SERIES.csv [NAME]")
    try:
        times, values = read(Path(sys.argv[1]))
        stamps, paths = forecast(Path(__file__).with_suffix(""), times, values, sys.argv[2] if sys.argv[2:] else None)
    except (OSError, ValueError) as error:
        refuse(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error))
    for stamp, quantiles in zip(stamps, np.quantile(paths, [0.1, 0.5, 0.9], 0).T, strict=True):
        print(stamp.item().isoformat(), *(f"{value:.6g}" for value in quantiles), sep=",")


if __name__ == "__main__":
    main()
