"""Ceilings measured in a tenth of the time, for runs of tests that are about something else; low ones, but real."""

from __future__ import annotations

from bench.worker import ceilings

ceilings.SWEEPS = 1
ceilings.SLICE_S = 0.002
ceilings.LONG_S = 0.001
ceilings.LARGEST_SET = ceilings.MOST_SET = 4 * 1024**2
