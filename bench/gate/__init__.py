"""The gate: nothing is timed unless it is right.

Runs in the worker; uses `timing`, and torch and seq2seq.
"""
