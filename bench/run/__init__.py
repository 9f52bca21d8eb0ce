"""A run seen from the parent: its plan, its workers, its order, its resumption.

Uses `analysis`, `records` and what these use; no torch.
"""
