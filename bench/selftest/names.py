"""The parts of the self-test by name, and how they work.

Each part uses the workers, rounds and statistics of a real run, with three differences: workers stay for many pairs,
nothing passes a gate, and rounds continue until the time is over instead of stopping when the interval is narrow. Only
`carryover` has seatings and gates as a run has. Each prints a table, writes a CSV and a plot, and says whether it met
its target.
The part inside the worker is `bench.worker.selftest`.
"""

#: The parts by name, in a line for people.
PARTS = {
    "null": "a variant against itself: error of the ratio, coverage of the interval",
    "power": "planted slowdowns of 1, 2, 3 and 5 %: how many are found, and false alarms",
    "instrument": "torch.utils.benchmark, pytest-benchmark and pyperf's way on the same calls",
    "neighbour": "a busy neighbour: whether it is noticed, and what OpenMP's way of waiting costs",
    "carryover": "how much each variant, and each planted bad neighbour, slows down the next one",
}
#: Parts that run unless others are named.
STANDARD = ("null", "power", "instrument")
