"""Serving: the highest load under a latency bound, by MLPerf LoadGen; `python -m bench serve`.

LoadGen runs in a process of its own that imports no torch, and asks a worker in which the variant stands behind a
batching queue. Uses `bench.run` for workers, `bench.records.serving` for what is kept, `bench.report` for the plots.
"""
