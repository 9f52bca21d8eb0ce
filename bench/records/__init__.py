"""What a run folder holds, written so that it survives, and the one reader of it.

Uses `plan` and `machine`.
"""
