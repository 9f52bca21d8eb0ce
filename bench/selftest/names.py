"""The parts of the self-test by name, and how they work.

Each part runs in workers, rounds and statistics as a real run does, but for three things: workers stay for many pairs,
nothing is gated, and rounds go on to the end of their time instead of stopping when the interval is narrow. `carryover`
alone is seated and gated as a run is. Each prints a table, writes a CSV and a plot, and says whether it met its target.
The part inside the worker is `bench.worker.selftest`.
"""

#: The parts by name, in a line for people.
PARTS = {
    "null": "a variant against itself: error of the ratio, coverage of the interval",
    "power": "planted slowdowns of 1, 2, 3 and 5 %: how many are found, and false alarms",
    "instrument": "torch.utils.benchmark, pytest-benchmark and pyperf's way on the same calls",
    "neighbour": "a busy neighbour: is it noticed, what does OpenMP's waiting cost",
    "carryover": "what each variant costs the one that has the next turn, planted bad neighbours among them",
}
#: Parts that run unless others are named.
STANDARD = ("null", "power", "instrument")
