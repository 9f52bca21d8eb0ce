"""`python -m bench ab BASE NEW`: two interpreters or two revisions of this project against each other, in one run.

Every case has a seat on each side, the sides take turns, and ratios are formed inside a round. `sides` finds out what
BASE and NEW are, `measure` takes the seatings, `verdicts` judges what a run folder holds, and `command` leads the way.
"""
