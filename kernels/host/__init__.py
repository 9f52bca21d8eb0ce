"""Helpers of every command line: cores, arguments, output.

Uses the standard library alone, so that importing it costs nothing.
"""
