"""Numbers as people read them: times, sizes, ratios, and the ticks of an axis.

The terminal, the plots and the page all format through here, so that a figure reads the same wherever
it stands. Everything takes SI base units (seconds, bytes) and `None` for "not measured", which is blank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
ENERGIES = ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ"), (1e-9, "nJ"))
SIZES = ((1e9, "GB"), (1e6, "MB"))
#: Below this, two decimals of a ratio would show a single digit.
SMALL_RATIO = 0.0995
NARROW = 4
#: Sizes below this show no digit of a MB, bytes.
NO_MEMORY = 5e3
#: An interval whose ends are further apart, as a ratio, estimates nothing.
MOST_SPREAD = 10.0
NO_ESTIMATE = "no estimate"
#: Positions within a decade of a logarithmic axis, from dense to sparse.
MANTISSAS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
AMOUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
COUNTS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))


def seconds(value: float | None) -> str:
    """`0.00163` as `1.63 ms`; the argument is in seconds."""
    return _scaled(value, TIMES)


def megabytes(value: float | None) -> str:
    """`1.5e8` as `150 MB`, from 1 GB on as `1.50 GB`; the argument is in bytes, the units are decimal."""
    return "0 MB" if value is not None and 0 <= value < NO_MEMORY else _scaled(value, SIZES)


def joules(value: float | None) -> str:
    """`0.00163` as `1.63 mJ`; the argument is in joules."""
    return "0 J" if value == 0 else _scaled(value, ENERGIES)


def counted(number: int, noun: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def count(value: float | None) -> str:
    """`12345` as `12.3 k`."""
    if value is None:
        return ""
    scale, name = _unit(value, COUNTS)
    return _three_digits(scale, name, value)


def amount(value: float | None, unit: str) -> str:
    """`1.18e11` with the unit `FLOP` as `118 GFLOP`."""
    if value is None:
        return ""
    scale, prefix = _unit(value, AMOUNTS)
    return _three_digits(scale, f" {prefix}{unit}", value)


def share(value: float | None) -> str:
    """`0.0213` as `2.1 %`."""
    return "" if value is None else f"{100 * value:.2g} %"


def binary(value: int) -> str:
    """A power of two as caches are sized: `32768` as `32 KiB`."""
    power = min(3, max(0, value.bit_length() - 1) // 10)
    return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def ratio(value: float | None) -> str:
    """`1.634` as `1.63x`, and `0.0213` as `0.021x`."""
    return "" if value is None else f"{_ratio_digits(value)}x"


def estimated(lo: float | None, hi: float | None) -> bool:
    """Return whether an interval is narrow enough for its value to be shown; a value without an interval is.

    If only one end is missing, it is infinite, which a record cannot hold.
    """
    if lo is None or hi is None:
        return lo is hi
    return hi <= MOST_SPREAD * lo


def estimated_seconds(value: float | None, lo: float | None, hi: float | None) -> str:
    """A time with the interval from `lo` to `hi`, as `seconds` has it, or that it is no estimate."""
    return seconds(value) if estimated(lo, hi) else NO_ESTIMATE


def ratio_interval(value: float | None, lo: float | None, hi: float | None, digits: int | None = None) -> str:
    """`1.63x [1.60, 1.66]`; without the interval if there is none, or if it is the value itself.

    If the interval is too wide to estimate anything, the text says only that.

    Args:
        value: a ratio.
        lo: lower end of its interval.
        hi: upper end.
        digits: decimals to show; by default as many as `ratio` does.
    """
    if not estimated(lo, hi):
        return NO_ESTIMATE

    def text(number: float) -> str:
        return _ratio_digits(number) if digits is None else f"{number:.{digits}f}"

    if value is None:
        return ""
    if lo is None or hi is None or lo == value == hi:
        return f"{text(value)}x"
    return f"{text(value)}x [{text(lo)}, {text(hi)}]"


def error(value: float | None) -> str:
    """A relative error or its limit, as `1.2e-06`."""
    return "" if value is None else f"{value:.1e}"


def tick_label(unit: str) -> Callable[[float], str]:
    """The formatter of an axis in `unit`: `s`, `bytes`, `x` or an empty string for plain counts."""
    tables = {"s": TIMES, "bytes": SIZES, "": COUNTS}

    def label(value: float) -> str:
        if unit == "x":
            return f"{value:.6g}x"
        if value == 0:
            return "0"
        scale, name = _unit(value, tables[unit])
        return f"{value / scale:.6g} {name.strip()}".strip()

    return label


def linear_ticks(hi: float, most: int = 5) -> tuple[float, ...]:
    """Round positions from 0 to at most `hi` (> 0), no more than `most` + 1 of them."""
    return _multiples(0.0, hi, most + 1)


def log_ticks(lo: float, hi: float, most: int = 6) -> tuple[float, ...]:
    """Round positions within [lo, hi] (both > 0) for a logarithmic axis, no more than `most`.

    Below a factor of `NARROW`, where powers of ten would leave the axis bare, the positions are evenly spaced.
    """
    if hi / lo < NARROW:
        return _multiples(lo, hi, most)
    first, last = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    choices = [[m * 10.0**k for k in range(first, last + 1) for m in ms] for ms in MANTISSAS]
    # Strides count from 10^0, so that a ratio's 1 stays on the axis.
    choices += [[10.0**k for k in range(first, last + 1) if k % stride == 0] for stride in (2, 3, 4, 6)]
    inside = [tuple(t for t in ticks if lo <= t <= hi) for ticks in choices]
    return next((ticks for ticks in inside if len(ticks) <= most), inside[-1])


def _multiples(lo: float, hi: float, most: int) -> tuple[float, ...]:
    step_power = math.floor(math.log10(hi)) - 3
    while True:
        for mantissa in (1.0, 2.0, 5.0):
            step = mantissa * 10.0**step_power
            ticks = [round(n * step, 12) for n in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]
            if len(ticks) <= most:
                return tuple(ticks)
        step_power += 1


def _scaled(value: float | None, table: tuple[tuple[float, str], ...]) -> str:
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {table[-1][1] if table is SIZES else table[0][1]}"
    scale, name = _unit(value, table)
    return _three_digits(scale, f" {name}", value)


def _unit(value: float, table: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    # 0.9995: 999.7 ms must not print as "1000 ms".
    return next((pair for pair in table if abs(value) >= pair[0] * 0.9995), table[-1])


def _three_digits(scale: float, name: str, value: float) -> str:
    scaled = value / scale
    return f"{scaled:.{_decimals(scaled)}f}{name}"


def _decimals(value: float) -> int:
    """Decimals that show three digits of a value above 1, after rounding."""
    return sum(abs(value) < limit for limit in (9.995, 99.95))


def _ratio_digits(value: float) -> str:
    small = 0 < abs(value) < SMALL_RATIO
    return f"{value:#.2g}" if small else f"{value:.{_decimals(value)}f}"
