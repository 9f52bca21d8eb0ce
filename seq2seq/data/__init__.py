"""Sequences: batches, tokens, series, sound and texts, read from files or made up.

Uses torch and numpy, and no room of this package.
"""
