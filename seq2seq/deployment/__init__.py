"""Models as files that run without this project.

Uses `runtimes`, `tasks` and what these use.
"""
