"""The machine: its facts, its load, its memory, and who else used it.

Uses no other room.
"""
