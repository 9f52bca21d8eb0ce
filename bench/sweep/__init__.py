"""Sweep over machines: the groups of a suite, pulled by the nodes of a Ray cluster; `python -m bench sweep`.

Only `bench.sweep.cluster` imports ray; all else drives whatever answers to `bench.sweep.pulling.Executor`. Uses
`bench.run` to measure, `bench.records` for what is kept, and `bench.report` for the pages. Nothing here imports torch.
"""
