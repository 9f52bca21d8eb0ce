"""What is to be measured: suites become cases, cases become groups.

Uses errors and units alone.
"""
