"""The pytest-benchmark surface: `pytest bench/microbench --benchmark-only`.

Uses `worker`, `gate` and what these use.
"""
