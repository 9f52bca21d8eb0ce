"""The commands of `python -m kernels`: check, tune, compile, sanitize, limits, export-c.

They use every other room here, and nothing else imports them.
"""
