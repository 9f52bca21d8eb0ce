"""What a command line needs of the system that it runs on: cores, arguments, output.

Uses the standard library alone, so that importing it costs nothing.
"""
