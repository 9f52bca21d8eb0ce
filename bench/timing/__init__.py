"""Rounds and the clock.

Runs in the worker; uses `records`, `plan` and `machine`, and torch.
"""
