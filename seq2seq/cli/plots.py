"""Plots of what was trained: its curve, its forecasts against the truth, and what it looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from torch import Tensor, nn

from kernels.host.output import write_whole
from seq2seq.data.tokens import BEGIN, END
from seq2seq.models.base import Model

BLUE, ORANGE, INK, GREY = "#0072b2", "#d55e00", "#22262b", "#8a8f98"
DPI = 130
#: Ticks of a forecast by their unit, year to second; where a larger unit begins, that is shown instead. The year itself
#: is shown once, above the panel: matplotlib would show that of the last tick, which may lie beyond the data.
TICKS = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%S.%f"]
FIRST_TICKS = ["", "%Y", "%d %b", "%d %b", "%H:%M", "%H:%M"]
#: The history shown before a forecast, in horizons: more would leave no room for what is to be seen.
SHOWN_HISTORY = 2


def curve(rows: Sequence[Mapping[str, str]], path: Path, loss: str) -> None:
    """Loss of each step, its mean over the latest steps, and the validation losses.

    Args:
        rows: of curve.csv.
        path: of the PNG, which is replaced.
        loss: what is learnt to be small, with its unit.
    """
    figure = _figure(8, 4)
    axes = figure.subplots()
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    validations = [(int(row["step"]), float(row["validation_loss"])) for row in rows if row["validation_loss"]]
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color=BLUE, alpha=0.25, lw=0.8)
        axes.plot(steps, _smoothed(values), color=BLUE, lw=1.6, label="training, mean of the latest steps")
    if validations:
        axes.plot(*zip(*validations, strict=True), color=ORANGE, marker="o", ms=4, lw=1.6, label="validation")
    axes.set(xlabel="step", ylabel=loss)
    axes.legend(frameon=False)
    _plain(axes)
    write_whole(path, _png(figure))


def forecasts(found: Sequence[Any]) -> bytes:
    """A PNG with one panel a forecast: history, median, intervals, seasonal naive, and what came.

    Args:
        found: `seq2seq.tasks.forecast.Forecast`s.
    """
    figure = _figure(9, 3.2 * len(found) + 0.4)
    panels = figure.subplots(len(found), squeeze=False)[:, 0]
    for axes, forecast in zip(panels, found, strict=True):
        horizon = forecast.samples.size(-1)
        shown = min(len(forecast.history), SHOWN_HISTORY * horizon)
        stamps = forecast.timestamps[len(forecast.history) - shown :]
        after = stamps[shown:]
        axes.plot(stamps[:shown], forecast.history[-shown:], color=INK, lw=1.2, label="history")
        if len(forecast.samples) > 1:
            for low, high, opacity in ((0.05, 0.95, 0.18), (0.25, 0.75, 0.32)):
                ends = forecast.quantile(low), forecast.quantile(high)
                label = f"{high - low:.0%} interval".replace("%", " %")
                axes.fill_between(after, *ends, color=BLUE, alpha=opacity, lw=0, label=label)
        axes.plot(after, forecast.quantile(0.5), color=BLUE, lw=1.8, label="forecast, median")
        axes.plot(after, forecast.naive, color=GREY, lw=1.2, ls="--", label="seasonal naive")
        if forecast.observed is not None:
            axes.plot(after, forecast.observed, color=ORANGE, lw=1.6, label="what came")
        axes.axvline(after[0], color=GREY, lw=0.8, ls=":")
        axes.set_title(forecast.title or forecast.series, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        axes.set_title(f"{stamps[0]:%Y-%m-%d} to {stamps[-1]:%Y-%m-%d}", loc="right", fontsize=9, color=GREY)
        axes.set_ylabel(forecast.unit, parse_math=False)
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(
            ConciseDateFormatter(locator, formats=TICKS, zero_formats=FIRST_TICKS, show_offset=False)
        )
        _plain(axes)
    panels[-1].set(xlabel="time")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    return _png(figure)


def attention(model: Model, subwords: Any, source: str, output: str, max_source: int) -> bytes:
    """A PNG of what each token of an output looked at in the source.

    Args:
        model: one that `looks`, in evaluation mode.
        subwords: the vocabulary of both, with `encode` and `decode`.
        source: a text.
        output: what the model made of it.
        max_source: tokens of the source that the model read at most.
    """
    read, written = subwords.encode(source)[:max_source], [*subwords.encode(output), END]
    device = next(model.parameters()).device
    weights = attention_weights(
        model, torch.tensor([read], device=device), torch.tensor([[BEGIN, *written[:-1]]], device=device)
    )[0]
    figure = _figure(1.6 + 0.38 * len(read), 1.4 + 0.3 * len(written))
    axes = figure.subplots()
    image = axes.imshow(weights[:, : len(read)], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    source_names, output_names = ([_shown(subwords, token) for token in tokens] for tokens in (read, written[:-1]))
    axes.set_xticks(range(len(read)), source_names, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(written)), [*output_names, "(end)"], parse_math=False)
    axes.set(xlabel="source", ylabel="output")
    figure.colorbar(image, label="share of attention")
    return _png(figure)


def _shown(subwords: Any, token: int) -> str:
    """A token as a label: blanks, and what is not text alone, as a dot."""
    return str(subwords.decode([token])).strip() or "·"


def looks(model: nn.Module) -> bool:
    """Return whether a model has an attention whose weights can be seen."""
    return _attention(model) is not None


def attention_weights(model: Model, source: Tensor, target: Tensor) -> Tensor:
    """Attention weights of each decoder step, (batch, target steps, source steps), on the CPU.

    Args:
        model: one that `looks`, in evaluation mode.
        source: (batch, source steps) tokens without padding.
        target: (batch, target steps) tokens that the decoder reads.

    Raises:
        ValueError: for a model without attention.
    """
    module = _attention(model)
    if module is None:
        msg = "the model has no attention to show"
        raise ValueError(msg)
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        queries, _memory, keys = inputs[:3]
        seen.append(torch.softmax(module.scores(queries, keys).float(), -1))

    handle = module.register_forward_hook(look)
    try:
        with torch.inference_mode():
            model(source, target)
    finally:
        handle.remove()
    return torch.cat(seen, 1).cpu()


def _attention(model: nn.Module) -> Any:
    """The first module that scores queries against keys."""
    return next((module for module in model.modules() if callable(getattr(module, "scores", None))), None)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of the latest fiftieth of the values, at least of five."""
    width = max(5, len(values) // 50)
    return [sum(part := values[max(0, end - width) : end]) / len(part) for end in range(1, len(values) + 1)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea")
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
