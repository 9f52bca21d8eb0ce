"""The worker: a process that serves the parent's requests.

Uses `gate`, `timing` and what these use, and torch, seq2seq and kernels.
"""
