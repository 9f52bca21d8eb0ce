"""Named, citable problems: a model's sizes, a batch, lengths and their source.

Uses `models` and `data`.
"""
