"""Variants, which are ways to execute a model, and a model made ready in one of them.

Uses `workloads`, `runtimes`, `decoding`, `models`, `data` and the kernels.
"""
