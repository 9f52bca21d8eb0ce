"""`python -m bench ab BASE NEW`: two interpreters or two revisions of this project against each other, in one run.

Every case has a seat on each side, the sides take turns, and ratios are formed inside a round. `sides` finds out what
BASE and NEW are, `measure` takes the seatings, `verdicts` judges what a run folder holds, and `command` leads the way.
"""

#: Names of the sides, which follow a variant's name and a `#` in records.
BASE, NEW = "base", "new"
SIDES = (BASE, NEW)


def on(variant: str, side: str) -> str:
    """Name of a variant on a side."""
    return f"{variant}#{side}"
