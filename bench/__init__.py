"""The instrument: what to measure, how it is timed, checked, written and shown. `python -m bench` is its face."""
