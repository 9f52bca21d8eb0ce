"""Parts that model families are made of: padding, layers of a Transformer, heads that forecast distributions.

Uses torch alone.
"""
