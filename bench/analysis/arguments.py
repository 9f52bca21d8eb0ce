"""Options of the commands that compare runs: `python -m bench compare` and `history`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels.host.numbers import share


def add_compare(command: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    add = command.add_argument
    add("base", type=Path, metavar="BASE", help="run folder to compare with")
    add("new", type=Path, metavar="NEW", nargs="+", help="run folders, each compared with BASE")
    add(
        "--by",
        choices=("speedup", "time"),
        default="speedup",
        help="speedup compares each case's time relative to the reference of its rounds, so that drift of the machine "
        "cancels; time compares the times themselves (default: speedup)",
    )
    add_margin(command)
    add("--force", action="store_true", help="compare runs that are not comparable, and mark the result")
    add("--format", choices=("text", "csv", "markdown"), default="text", help="markdown suits a pull request")
    add("--out", type=Path, metavar="FILE", help="new file to write to instead of the terminal")


def add_history(command: argparse.ArgumentParser) -> None:
    """Add the options of `history`."""
    add = command.add_argument
    add("dir", type=Path, metavar="FOLDER", help="folder of run folders")
    add(
        "--by",
        choices=("speedup", "time"),
        default="speedup",
        help="speedup: each case's time relative to the reference of its rounds, so that drift of the machine cancels; "
        "time: its time as it is (default: speedup)",
    )
    add("--format", choices=("text", "csv", "markdown"), default="text", help="markdown suits a pull request")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="with text: page (default: FOLDER/history.html); with csv or markdown: new file instead of the terminal",
    )


def add_margin(command: argparse.ArgumentParser) -> None:
    """Add the options for judging two sides, which `ab` has too."""
    add = command.add_argument
    add(
        "--margin",
        type=share,
        default=0.02,
        metavar="PERCENT",
        help="a change is called same if its interval lies within this (default: 2%%)",
    )
    add(
        "--fail-on",
        type=_slower,
        metavar="slower:PERCENT",
        help="for example slower:3%%: exit 3 if a case broke, or is slower by an estimated 3%% or more and certainly "
        "slower (its interval excludes 1, corrected for all comparisons); exit 5 if an interval neither shows nor "
        "excludes such a slowdown",
    )
    add("--allow-unclear", action="store_true", help="exit 0 instead of 5 when --fail-on could not tell")


def _slower(text: str) -> float:
    """`slower:3%` as 0.03."""
    word, colon, number = text.partition(":")
    if word != "slower" or not colon:
        msg = f"{text!r} is not slower:PERCENT, such as slower:3%"
        raise argparse.ArgumentTypeError(msg)
    return share(number)
