"""Check that a call is not faster on inputs that it has seen before: then it does not do its work each time.

Such a variant is right, so no gate can see it. New inputs and seen ones are timed by turns, in the timed memory itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.timing import clock
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable

#: A variant is refused if its call is faster by this factor on inputs that it has seen.
LIMIT = 1.5
#: Pairs of a new and a seen input: at most; and how many there are when the ratio looks too high, fewer for long calls.
USUAL_PAIRS, MOST_PAIRS, FEW_PAIRS = 15, 60, 9
#: What the pairs of a fast variant may take, seconds.
PAIRS_S = 0.05
#: Calls longer than this fill the caches themselves.
BRIEF_S = 0.010
#: Untimed calls after a new input was drawn on a GPU: it idles meanwhile, and may clock down.
WAKING_CALLS = {"cuda": 3}


@dataclass(frozen=True)
class Seen:
    """Time of calls on new inputs over that on inputs seen before: the median over pairs, and its lower bound."""

    ratio: float
    least: float

    @property
    def passed(self) -> bool:
        """Return whether it may be one."""
        return self.least <= LIMIT


def compare(executable: Executable, prepared: Batch, batch: Batch, seed: int) -> Seen:
    """Time calls on new inputs and on inputs seen before, by turns.

    Before each timed call the batch is written, and a brief call is preceded by an untimed one on another new input, or
    on the seen one, so that both find the caches alike. New inputs are drawn before the seen one's turn too, and
    dropped: threads that fell asleep meanwhile make the next call of an honest variant up to 1.7 times as long. More
    pairs are taken while the ratio looks too high.

    Args:
        executable: what is timed.
        prepared: the batch that it is timed on.
        batch: its own content, on the CPU: what was seen before.
        seed: of the new inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    ready = executable.prepare(batch)

    def timed(*contents: Batch) -> float:
        for content in contents:
            prepared.overwrite(executable.prepare(content))
            spent_s = clock.time_once(lambda: executable.call(prepared), executable.device)
        return spent_s

    def drawn(count: int) -> list[Batch]:
        return [executable.prepare(batch.varied(generator)) for _ in range(count)]

    ratios: list[float] = []
    waking = (ready,) * WAKING_CALLS.get(executable.device, 0)
    with executable.context():
        usual_s = timed(ready)
        brief = usual_s < BRIEF_S
        most, each = (MOST_PAIRS, 2) if brief else (FEW_PAIRS, 1)
        wanted = max(1, min(USUAL_PAIRS, math.ceil(PAIRS_S / usual_s / 4)))
        while True:
            while len(ratios) < wanted:
                fresh_s = timed(*waking, *drawn(each))
                timed(ready)
                drawn(each)
                ratios.append(fresh_s / timed(*waking, *(ready,) * each))
            found = _seen(ratios)
            if found.ratio <= LIMIT or wanted >= most:
                return found
            wanted += USUAL_PAIRS if brief else 2


def _seen(ratios: list[float]) -> Seen:
    """Their median and the order statistic below it at 97.5 %; the least of all where there are few."""
    ordered = sorted(ratios)
    place = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return Seen(ordered[len(ordered) // 2], ordered[place])
