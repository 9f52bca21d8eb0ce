"""The grammar of the commands that hold runs against each other: `python -m bench compare` and `history`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels.host.numbers import share


def add_compare(command: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    add = command.add_argument
    add("base", type=Path, metavar="BASE", help="run folder that the others are held against")
    add("new", type=Path, metavar="NEW", nargs="+", help="run folders, each held against BASE")
    add(
        "--by",
        choices=("speedup", "time"),
        default="speedup",
        help="compare each case's time relative to the reference of its rounds, in which a machine that drifts "
        "cancels, or its time as it is (default: speedup)",
    )
    add_margin(command)
    add("--force", action="store_true", help="compare what is not comparable, and mark it")
    add("--format", choices=("text", "csv", "markdown"), default="text", help="markdown fits a pull request")
    add("--output", type=Path, metavar="FILE", help="new file to write to instead of the terminal")


def add_history(command: argparse.ArgumentParser) -> None:
    """Add the options of `history`."""
    add = command.add_argument
    add("dir", type=Path, metavar="FOLDER", help="folder of run folders")
    add(
        "--by",
        choices=("speedup", "time"),
        default="speedup",
        help="series of each case's time relative to the reference of its rounds, in which a machine that drifts "
        "cancels, or of its time as it is (default: speedup)",
    )
    add("--format", choices=("text", "csv", "markdown"), default="text", help="markdown fits a pull request")
    add("--output", type=Path, metavar="FILE", help="new file for csv or markdown instead of the terminal")
    add("--out", type=Path, metavar="FILE.html", help="page (default: FOLDER/history.html; only with text)")


def add_margin(command: argparse.ArgumentParser) -> None:
    """Add the options by which two sides are judged, which `ab` has too."""
    add = command.add_argument
    add(
        "--margin",
        type=share,
        default=0.02,
        metavar="PERCENT",
        help="changes whose interval lies within it are the same (default: 2%%)",
    )
    add(
        "--fail-on",
        type=_slower,
        metavar="slower:PERCENT",
        help="exit 3 when a case broke, or is estimated to be slower by more than this, as slower:3%%, and is surely "
        "slower: its interval excludes 1 with all comparisons allowed for; exit 5 when that cannot be told, because an "
        "interval neither shows nor excludes such a slowdown",
    )
    add("--allow-unclear", action="store_true", help="exit 0 instead of 5 when --fail-on could not tell")


def _slower(text: str) -> float:
    """`slower:3%` as 0.03."""
    word, colon, number = text.partition(":")
    if word != "slower" or not colon:
        msg = f"{text!r} is not slower: and a percentage, as slower:3%"
        raise argparse.ArgumentTypeError(msg)
    return share(number)
