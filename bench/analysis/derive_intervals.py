"""Count how often the intervals hold the truth: `python -m bench.analysis.derive_intervals`.

Simulates runs with a known truth, on calm and on disturbed machines, and counts how often a 95 % interval contains it.
A plain bootstrap, which takes all rounds or calls as independent, is shown for comparison. The truth is the median, or
the percentile, over all rounds of all processes that could have been run, over the whole time of a run, so it includes
the drift within the run. `bench.analysis.intervals` holds the method and its numbers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import signal, stats

from bench.analysis.intervals import CONFIDENCE, Interval, independent_ratio_interval, percentile, ratio_interval
from bench.records.rounds import LEAST_CLEAN, Floats
from kernels.host.cores import usable_cores
from kernels.host.numbers import whole
from kernels.host.output import run_command
from kernels.host.usage import Parser

#: Spread of a round's ratio, and of a call's time within its round, as a share, as measured on a calm machine.
NOISE = 0.02
CALLS = 10
#: Processes and rounds of each.
SIZES = ((1, 30), (1, 100), (2, 30), (3, 10), (3, 30), (6, 30))
TIME_SIZES = ((1, 30), (2, 30), (3, 30), (6, 30))
CALL_SIZES = ((1, 100), (3, 40), (6, 40))
#: Size at which the plain bootstrap is shown.
SHOWN = 3

#: Logarithms of ratios or of typical times: (generator, processes, rounds) -> (processes, rounds).
Draw = Callable[[np.random.Generator, int, int], Floats]


@dataclass(frozen=True)
class CoverageRow:
    """Counts behind one line of the table.

    Attributes:
        covered: share of the intervals that held the truth.
        plain: the same of a plain bootstrap; None where there is none to compare.
        half_width: mean of the intervals' half-widths, as a share.
        empty: share of the runs that got no interval, which count neither way.
    """

    covered: float
    plain: float | None
    half_width: float
    empty: float = 0.0


def calm(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Independent rounds."""
    return generator.normal(0, NOISE, (processes, rounds))


def following(generator: np.random.Generator, processes: int, rounds: int, resemblance: float) -> Floats:
    """Each round resembles the one before: autoregression of the first order."""
    noise = generator.normal(0, NOISE * np.sqrt(1 - resemblance**2), (processes, rounds + 60))
    return np.asarray(signal.lfilter([1], [1, -resemblance], noise, axis=1))[:, 60:]


def phases(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Fast and slow phases of 8 rounds on average, as far apart as two standard deviations of a round."""
    changes = generator.random((processes, rounds)) < 1 / 8
    changes[:, 0] = generator.random(processes) < 1 / 2
    return calm(generator, processes, rounds) + NOISE * (2 * (np.cumsum(changes, axis=1) % 2) - 1)


def heavy(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Student's t with 2 degrees of freedom, whose variance is infinite."""
    return NOISE * generator.standard_t(2, (processes, rounds))


def spoilt(generator: np.random.Generator, processes: int, rounds: int, least: float = -1) -> Floats:
    """A tenth of the rounds is off by a factor of up to two, in one direction or in both."""
    hit = generator.random((processes, rounds)) < 1 / 10
    noise = calm(generator, processes, rounds)
    return np.asarray(noise + hit * np.log(2) * generator.uniform(least, 1, (processes, rounds)))


def machine_drift(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """The machine slows down by 30 % gradually and then by as much suddenly; both variants of a round alike."""
    level = np.linspace(0, 0.3, rounds) + 0.3 * (np.arange(rounds) >= rounds // 2)
    noise = generator.normal(0, NOISE / np.sqrt(2), (2, processes, rounds))
    reference, variant = np.exp(level + noise)
    return np.asarray(np.log(reference / variant))


def drift(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """The ratio itself drifts within every process by four standard deviations of a round."""
    return calm(generator, processes, rounds) + NOISE * np.linspace(-2, 2, rounds)


def own_drift(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """In every process the ratio drifts in a different way."""
    slopes = generator.normal(0, 1, (processes, 1))
    return calm(generator, processes, rounds) + NOISE * slopes * np.linspace(-2, 2, rounds)


def step(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """The ratio steps up half-way by two standard deviations of a round."""
    return calm(generator, processes, rounds) + NOISE * np.where(np.arange(rounds) < rounds / 2, -1, 1)


def apart(generator: np.random.Generator, processes: int, rounds: int, times: float) -> Floats:
    """Processes have different levels, whose spread is this many times the error that rounds give to a median."""
    error = NOISE * np.sqrt(np.pi / 2 / rounds)
    return np.asarray(calm(generator, processes, rounds) + times * error * generator.normal(0, 1, (processes, 1)))


def uneven(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Processes apart, of which the later half has few clean rounds; what is missing is NaN."""
    found = apart(generator, processes, rounds, 2)
    found[processes // 2 + 1 :, LEAST_CLEAN:] = np.nan
    return found


def everything(generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Rounds that follow each other, a tenth of them spoilt, in processes that differ."""
    noise = spoilt(generator, processes, rounds) + apart(generator, processes, rounds, 3)
    return noise + following(generator, processes, rounds, 0.6)


RATIOS: dict[str, Draw] = {
    "independent": calm,
    "follow, 0.6": functools.partial(following, resemblance=0.6),
    "phases": phases,
    "heavy tails": heavy,
    "spoilt tenth": spoilt,
    "spoilt one way": functools.partial(spoilt, least=0),
    "machine drifts": machine_drift,
    "ratio drifts": drift,
    "ratio drifts, own way": own_drift,
    "ratio steps": step,
    "processes apart, 1": functools.partial(apart, times=1),
    "processes apart, 2": functools.partial(apart, times=2),
    "processes apart, 5": functools.partial(apart, times=5),
    "few clean rounds in some": uneven,
    "everything": everything,
}
#: Times of two runs that shared no rounds.
TIMES = ("independent", "follow, 0.6", "heavy tails", "processes apart, 2", "processes apart, 5", "everything")
#: What the typical time of a round does; its calls spread around it.
CALL_TIMES: dict[str, Draw] = {
    "independent calls": lambda _, processes, rounds: np.zeros((processes, rounds)),
    "rounds of their own": calm,
    "rounds follow, 0.6": RATIOS["follow, 0.6"],
    "machine drifts": drift,
    "processes apart, 2": RATIOS["processes apart, 2"],
    "processes apart, 5": RATIOS["processes apart, 5"],
}
SHARES = (0.50, 0.90, 0.95, 0.99)


def calls(draw: Draw, generator: np.random.Generator, processes: int, rounds: int) -> Floats:
    """Times of single calls, (processes, rounds, calls): one in twenty is some tenths longer, others almost normal."""
    size = (processes, rounds, CALLS)
    late = (generator.random(size) < 1 / 20) * generator.exponential(0.1, size)
    return np.exp(draw(generator, processes, rounds)[..., None] + generator.normal(0, NOISE, size) + late)


@functools.cache
def _plain_ranks(count: int, share: float) -> tuple[int, int]:
    """Ordered values between which the plain bootstrap of a percentile ends, exactly (Efron 1979)."""
    at_most = stats.binom.sf(np.ceil(count * share) - 1, count, np.arange(1, count + 1) / count)
    tail = (1 - CONFIDENCE) / 2
    return int(np.searchsorted(at_most, tail)), int(np.searchsorted(at_most, 1 - tail))


def plain_interval(values: Floats, share: float = 0.5) -> Interval:
    """The bootstrap interval of values if all are taken as independent, whose defect the table shows."""
    low, high = _plain_ranks(len(values), share)
    ordered = np.sort(values)
    return Interval(float(np.quantile(values, share)), float(ordered[low]), float(ordered[high]))


def _counted(found: Sequence[Interval | None], plain: Sequence[Interval] | None, truth: float) -> CoverageRow:
    kept = [interval for interval in found if interval]
    held = [interval.low <= truth <= interval.high for interval in kept]
    also = None if plain is None else float(np.mean([p.low <= truth <= p.high for p in plain]))
    width = float(np.mean([interval.half_width for interval in kept])) if kept else float("nan")
    return CoverageRow(float(np.mean(held)) if held else float("nan"), also, width, 1 - len(kept) / len(found))


def _generator(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(names).encode())])


def study_ratio(name: str, processes: int, rounds: int, runs: int, seed: int) -> CoverageRow:
    """Count how often the interval of a speedup holds it."""
    generator = _generator(seed, name, processes, rounds)
    # Symmetrical around 1, all but one.
    truth = 1.0 if name != "spoilt one way" else float(np.median(np.exp(RATIOS[name](generator, 1000, 2000))))
    drawn = [np.exp(RATIOS[name](generator, processes, rounds)) for _ in range(runs)]
    there = [[row[np.isfinite(row)] for row in d] for d in drawn]
    return _counted(
        [ratio_interval(rows, n) for n, rows in enumerate(there)],
        [plain_interval(np.concatenate(rows)) for rows in there],
        truth,
    )


def study_times(name: str, processes: int, rounds: int, runs: int, seed: int) -> CoverageRow:
    """Count how often the interval of a ratio of two runs' times holds it, 1.25; the later run has one process more."""
    generator = _generator(seed, "times", name, processes, rounds)
    pairs = [
        [np.exp(RATIOS[name](generator, count, rounds)) for count in (processes, processes + 1)] for _ in range(runs)
    ]
    found = [independent_ratio_interval(list(1.25 * base), list(new), n) for n, (base, new) in enumerate(pairs)]
    return _counted(found, None, 1.25)


def study_calls(name: str, share: float, processes: int, rounds: int, runs: int, seed: int) -> CoverageRow:
    """Count how often the interval of a percentile of calls holds it."""
    draw = CALL_TIMES[name]
    generator = _generator(seed, name, processes, rounds)
    error_free = calls(draw, generator, 60_000 // rounds, rounds)
    truth = float(np.quantile(error_free, share))
    drawn = [calls(draw, generator, processes, rounds) for _ in range(runs)]
    found = [percentile([list(process) for process in d], share, n) for n, d in enumerate(drawn)]
    return _counted(found, [plain_interval(d.ravel(), share) for d in drawn], truth)


Size = tuple[int, int]
Task = tuple[Callable[..., CoverageRow], tuple[object, ...]]
#: Title, sizes, the function that counts a cell, and for each line its label and the arguments of the count.
Table = tuple[str, Sequence[Size], Callable[..., CoverageRow], Sequence[tuple[str, tuple[object, ...]]]]


def _run(task: Task) -> CoverageRow:
    study, arguments = task
    return study(*arguments)


def _line(sizes: Sequence[Size], rows: Sequence[CoverageRow]) -> str:
    """Coverage and half-width at every size, then the plain bootstrap at the last one with `SHOWN` processes."""
    cells = []
    for row in rows:
        missing = f"{100 * row.empty:.0f} % none" if row.empty > 1 / 2 else f"{100 * row.covered:.1f}"
        cells.append(f"{missing:>8} {f'±{100 * row.half_width:.2f}':>6}")
    plain = [row.plain for size, row in zip(sizes, rows, strict=True) if size[0] == SHOWN][-1]
    return "".join(cells) + ("" if plain is None else f"{100 * plain:>9.1f}")


def main() -> int:
    """Print how often intervals hold the truth."""
    grammar = Parser(prog="python -m bench.analysis.derive_intervals", description=(__doc__ or "").splitlines()[0])
    grammar.add_argument(
        "--runs", type=whole(), default=1000, help="synthetic runs per cell of the table (default: 1000)"
    )
    grammar.add_argument("--seed", type=whole(0), default=0, help="seed of the runs (default: 0)")
    asked = grammar.parse_args()
    tail = (asked.runs, asked.seed)
    called = [(f"p{100 * share:.0f}, {name}", (name, share)) for share in SHARES for name in CALL_TIMES]
    tables: tuple[Table, ...] = (
        ("speedup", SIZES, study_ratio, [(name, (name,)) for name in RATIOS]),
        ("ratio of two runs", TIME_SIZES, study_times, [(name, (name,)) for name in TIMES]),
        ("percentile of calls", CALL_SIZES, study_calls, called),
    )
    print(f"% of {asked.runs} intervals that hold the truth, and their mean half-width in %, by processes x rounds\n")
    with ProcessPoolExecutor(usable_cores()) as pool:
        for title, sizes, study, lines in tables:
            heads = "".join(f"{f'{processes} x {rounds}':>15}" for processes, rounds in sizes)
            print(f"{title:<26}{heads}" + ("" if study is study_times else f"{'plain':>9}"))
            tasks: list[Task] = [(study, (*start, *size, *tail)) for _, start in lines for size in sizes]
            rows = list(pool.map(_run, tasks))
            for number, (label, _) in enumerate(lines):
                print(f"{label:<26}" + _line(sizes, rows[number * len(sizes) : (number + 1) * len(sizes)]), flush=True)
            print()
    return 0


if __name__ == "__main__":
    run_command(main)
