"""Contents of a run folder, written so that they survive a crash, and the one reader of them.

Uses `plan` and `machine`.
"""
