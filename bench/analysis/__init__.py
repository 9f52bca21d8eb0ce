"""From a run's records and samples to figures: intervals, tables, comparisons.

Uses `records` and what it uses; no torch.
"""
