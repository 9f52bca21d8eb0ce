"""Tasks to train on: batches, sizes of models that fit, and a score.

Uses `decoding`, `models` and `data`.
"""
