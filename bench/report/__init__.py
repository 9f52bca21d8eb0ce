"""The report of a run: plots and a page, made from nothing but a run folder.

Uses `analysis` and `records`; no torch, so a run can be reported on any machine.
"""
