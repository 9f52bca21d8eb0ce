"""From a model to outputs: search, beams, CTC, and decoding that repeats the same number of steps.

Uses `models` and `data`.
"""
