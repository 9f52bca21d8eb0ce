"""Training of any task in any variant, into a folder from which it can be resumed.

Uses `tasks`, `execution` and what these use.
"""
