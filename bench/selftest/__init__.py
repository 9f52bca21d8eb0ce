"""Tests of the suite itself: does it find a difference where there is one, and none where there is none?

Uses `run` and `analysis`; no torch.
"""
