"""The suite held against itself: does it find a difference where there is one, and none where there is none?

Each part runs in the same workers, rounds and statistics as a real run, prints a table, writes a CSV and a plot, and
says whether it met its target. `probe` is the part inside the worker, the only one that imports torch.
"""

#: The parts by name, in a line for people.
PARTS = {
    "null": "a variant against itself: error of the ratio, coverage of the interval",
    "power": "planted slowdowns of 1, 2, 3 and 5 %: how many are found, and false alarms",
    "instrument": "torch.utils.benchmark, pytest-benchmark and pyperf's way on the same calls",
    "neighbour": "a busy neighbour: is it noticed, what does OpenMP's waiting cost",
}
#: Parts that run unless others are named.
STANDARD = ("null", "power", "instrument")
