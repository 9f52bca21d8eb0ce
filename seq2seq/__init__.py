"""Sequence-to-sequence models, the workloads they run on and the variants that execute them."""
