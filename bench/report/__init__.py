"""The report of a run: plots and a page, made from a run folder alone.

Uses `analysis` and `records`; no torch, so a run can be reported on any machine.
"""
