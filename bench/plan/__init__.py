"""The plan of a run: suites become cases, cases become groups.

Uses errors and units alone.
"""
