"""Model families behind one contract, one a file, and what belongs to all of them: padding, cost, checkpoints.

Uses `data`.
"""
