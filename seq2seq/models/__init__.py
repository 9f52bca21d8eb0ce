"""Model families behind one contract, one per file, and what belongs to all of them: padding, cost, checkpoints.

Uses `data`.
"""
