"""The suite held against itself: does it find a difference where there is one, and none where there is none?

Each part runs in the same workers, rounds and statistics as a real run, prints a table, writes a CSV and a plot, and
says whether it met its target. `probe` is the part inside the worker, the only one that imports torch.
"""
