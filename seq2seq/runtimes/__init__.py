"""Other runtimes that run a model instead of torch, each behind one class.

Uses `models` and `data`; a runtime's package is imported when it is asked for.
"""
