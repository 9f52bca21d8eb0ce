"""Tests of the suite itself: does it find a difference if there is one, and none otherwise?

Uses `run` and `analysis`; no torch.
"""
