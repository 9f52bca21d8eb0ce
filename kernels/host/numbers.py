"""Numbers of command lines: each conversion says in one line what it expected.

Given to `add_argument` as `type`, which turns its ArgumentTypeError into the parser's error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

#: Longest whole number, in digits: what every generator of random numbers here takes as a seed.
DIGITS = 18


def whole(least: int = 1, below: int | None = None) -> Callable[[str], int]:
    """Conversion to a whole number of at least `least`, and below a limit if one is given.

    Args:
        least: smallest number that is allowed.
        below: smallest number above it that is not; 10 ** `DIGITS` when None.
    """
    most = 10**DIGITS - 1 if below is None else below - 1
    wanted = f"of at least {least}" if below is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        # Leading zeros do not count, and what is too long to be a number is not made one.
        digits = text.lstrip("0") or text[-1:]
        if len(digits) > DIGITS and digits.isdecimal():
            msg = f"{text[:DIGITS]}... has {len(digits)} digits, expected at most {DIGITS}"
            raise argparse.ArgumentTypeError(msg)
        if not (text.isascii() and text.isdecimal()) or not least <= int(digits) <= most:
            msg = f"{text!r} is not a whole number {wanted}"
            raise argparse.ArgumentTypeError(msg)
        return int(digits)

    return convert


def seconds(text: str) -> float:
    """Convert to a time: a finite number above 0."""
    value = _float(text)
    if not 0 < value < math.inf:
        msg = f"{text!r} is not a number of seconds above 0"
        raise argparse.ArgumentTypeError(msg)
    return value


def duration(text: str) -> float:
    """Convert `90s`, `3min` or plain seconds to seconds above 0."""
    number, factor = (text.removesuffix("min"), 60.0) if text.endswith("min") else (text.removesuffix("s"), 1.0)
    value = factor * _float(number)
    if not 0 < value < math.inf:
        msg = f"{text!r} is not a time above 0, as 90s or 3min"
        raise argparse.ArgumentTypeError(msg)
    return value


def share(text: str) -> float:
    """Convert a percentage to a share: `3%`, or 3, is 0.03."""
    value = _float(text.strip().removesuffix("%")) / 100
    if not 0 <= value < 1:
        msg = f"{text!r} is not a percentage from 0 to below 100, as 3%"
        raise argparse.ArgumentTypeError(msg)
    return value


def _float(text: str) -> float:
    """Return the number, or NaN, which compares as False with everything."""
    try:
        return float(text)
    except ValueError:
        return math.nan
