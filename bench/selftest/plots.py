"""Plots of the self-test, one per part, from the rows of its CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.selftest.null import TARGET_MORE, TARGET_ONE

SIZE = (8.0, 4.5)
_SEEN, _TARGET, _DOUBT = "#1f5fa8", "#b3261e", "#8a8a8a"


def draw(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Write the plot of a part as PNG."""
    mpl.use("Agg")
    figure = Figure(figsize=SIZE, layout="constrained")
    _DRAW[name](figure, pd.DataFrame(rows))
    figure.savefig(path, dpi=130)


def _null(figure: Figure, rows: pd.DataFrame) -> None:
    """Every pair with its interval, in the order of the ratios."""
    kinds = _by_threads(rows)
    for axes, (threads, part) in zip(_row(figure, len(kinds)), kinds, strict=True):
        ordered = part.sort_values("ratio").reset_index(drop=True)
        off = 100 * (ordered[["ratio_lo", "ratio", "ratio_hi"]] - 1)
        place = np.arange(len(off))
        held = (off["ratio_lo"] <= 0) & (off["ratio_hi"] >= 0)
        for chosen, colour, label in ((held, _SEEN, "holds 0"), (~held, _TARGET, "does not")):
            axes.vlines(place[chosen], off["ratio_lo"][chosen], off["ratio_hi"][chosen], colour, lw=1.2, label=label)
        axes.plot(place, off["ratio"], ".", color="black", ms=4)
        target = 100 * (TARGET_ONE if threads == 1 else TARGET_MORE)
        axes.axhspan(-target, target, color=_SEEN, alpha=0.12, lw=0)
        axes.axhline(0, color="black", lw=0.6)
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", loc="left")
        axes.set_xticks([])
        axes.set_xlabel(f"{len(off)} pairs, in the order of their ratios")
        axes.set_ylabel("ratio - 1, %")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, title="95 % interval")
    figure.suptitle("A variant against itself: shaded is the target for 9 of 10 pairs", x=0.01, ha="left")


def _power(figure: Figure, rows: pd.DataFrame) -> None:
    """The change that was found, by the change that was planted."""
    kinds = _by_threads(rows)
    for axes, (threads, part) in zip(_row(figure, len(kinds)), kinds, strict=True):
        shares = sorted(part["planted"].unique())
        for place, share in enumerate(shares):
            found = 100 * (1 / part.loc[part["planted"] == share, "ratio"] - 1)
            jitter = np.linspace(-0.25, 0.25, len(found))
            axes.plot(place + jitter, found, ".", color=_SEEN, ms=4)
            axes.hlines(100 * share, place - 0.35, place + 0.35, _TARGET, lw=1.5)
        axes.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", loc="left")
        axes.set_xlabel("slowdown planted")
        axes.set_ylabel("slowdown found, %")
    figure.suptitle("Planted slowdowns (lines) and what each pair found (points)", x=0.01, ha="left")


def _instrument(figure: Figure, rows: pd.DataFrame) -> None:
    """Each instrument's ratios of a variant with itself."""
    (axes,) = _row(figure, 1)
    names = list(dict.fromkeys(rows["instrument"]))[::-1]
    for place, name in enumerate(names):
        off = 100 * (rows.loc[rows["instrument"] == name, "ratio"] - 1)
        axes.plot(off, place + np.linspace(-0.2, 0.2, len(off)), ".", color=_SEEN, ms=5)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="black", lw=0.6)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xticks([-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10], ["-10", "-3", "-1", "-0.5", "0", "0.5", "1", "3", "10"])
    axes.minorticks_off()
    axes.set_xlabel("ratio - 1 of a variant with itself, % (linear within 1 %)")
    axes.set_title("The same calls, the same processes, six figures", loc="left")


def _neighbour(figure: Figure, rows: pd.DataFrame) -> None:
    """Time of a call in each setting, and how much of a neighbour was noticed."""
    (axes,) = _row(figure, 1)
    settings = list(dict.fromkeys(zip(rows["threads"], rows["omp_wait"], rows["neighbour"], strict=True)))
    for place, (threads, policy, busy) in enumerate(settings):
        chosen = (rows["threads"] == threads) & (rows["omp_wait"] == policy) & (rows["neighbour"] == busy)
        calls = 1e3 * rows.loc[chosen, "call_s"]
        axes.plot(np.full(len(calls), place), calls, "o", color=_DOUBT if busy else _SEEN, ms=5)
    labels = [f"{t} thread{'s' if t > 1 else ''}\n{p}\n{'busy' if b else 'quiet'}" for t, p, b in settings]
    axes.set_xticks(range(len(settings)), labels, fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("median time of a call, ms")
    axes.set_title("Threads, OpenMP's way of waiting, and a neighbour on one core", loc="left")


def _carryover(figure: Figure, rows: pd.DataFrame) -> None:
    """The change of each variant's time by each predecessor, as a matrix."""
    kinds = _by_threads(rows)
    figure.set_size_inches(SIZE[0] * len(kinds), SIZE[1] * 1.4)
    for axes, (threads, part) in zip(_row(figure, len(kinds)), kinds, strict=True):
        named = part.assign(after=part["after"].fillna("").replace("", "all but the planted"))
        table = named.pivot_table(index="after", columns="before", values="change", sort=False)
        values = 100 * (table.to_numpy(float) - 1)
        axes.imshow(values, cmap="RdBu_r", vmin=-5, vmax=5, aspect="auto")
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            colour = "white" if abs(value) > 3 else "black"  # noqa: PLR2004 - dark cells
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(table.columns)), list(table.columns), rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(table.index)), list(table.index), fontsize=8)
        axes.grid(visible=False)
        axes.set_xlabel("who had the turn before")
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", loc="left")
    figure.suptitle("Time after a predecessor over time after others, % more (colour ends at 5 %)", x=0.01, ha="left")


def _by_threads(rows: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    return [(int(threads), rows[rows["threads"] == threads]) for threads in dict.fromkeys(rows["threads"])]


def _row(figure: Figure, count: int) -> list[Axes]:
    axes: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", lw=0.3)
    return axes


_DRAW = {"null": _null, "power": _power, "instrument": _instrument, "neighbour": _neighbour, "carryover": _carryover}
