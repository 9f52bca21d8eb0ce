"""The commands of `python -m seq2seq`.

Uses every other room; no other room uses it.
"""
