"""Expected time of a group: what its parts take besides the timed rounds, and what they take of a model's own calls.

A short call drowns in what a case costs anyway. Of a long one per run makes far more calls than the rounds need: cold
runs, warm-up, gates before and after each seating. How many is counted here; how long one takes is known of the user's
own model, which was looked at before (`seq2seq.own_model.inspection`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.plan.cases import LEAST_ROUNDS, Case

#: Seconds that the parts of a run take besides the timed rounds: a fresh worker's start, the start of a group's seats,
#: a case's cold run, the build, gates and warm-up of a case in a seat, a compilation by torch, cold and cached, one of
#: our kernel for CPUs, the ceilings.
START_S, SEAT_S, COLD_S, READY_S = 2.0, 0.4, 0.8, 0.5
COMPILE_S, CACHED_S, BUILD_S, CEILINGS_S = 30.0, 7.0, 10.0, 5.0
#: Of a start, a cold run and a case in a seat on a GPU, where each process makes a context, loads cuDNN and compiles
#: Triton's launchers. Estimates: no run on a GPU has shown them yet.
GPU_START_S, GPU_COLD_S, GPU_READY_S = 8.0, 12.0, 4.0
#: Calls of a cold run (first, second, five steady ones, one under the profiler, the metric) and of a warm-up.
COLD_CALLS, WARM_CALLS = 10, 3
#: Calls of both gates of a case in a seat, by mode. The first seating audits the timed calls too: two problems in one
#: memory before and after, in inference also other memory and inputs that were not seen before. Of training, its gate
#: makes two passes where inputs are real, that of a further seating one; of a language model of 2 x 650 both gates of
#: two passes took 3.9, with the audit 9.8 calls.
AUDITED_CALLS = {"inference": 16, "training": 10}
GATED_CALLS = {"inference": 2, "training": 2}
#: Problems whose truth the first seating computes and a further one, in each process of its own.
AUDITED_TRUTHS, GATED_TRUTHS = 3, 2
#: A truth in float64 over a call; on a processor with AVX-512 a language model of 2 x 650 took 2.5 to 3.5.
TRUTH_CALLS = 3
#: Conversions of a model for another runtime, each for weights that are not those before, of which a process keeps
#: three: in the cold run, in the first seating, in a further one.
COLD_CONVERSIONS, AUDITED_CONVERSIONS, GATED_CONVERSIONS = 1, 3, 3
#: A turn has a call at least before its timed block and one in it.
TURN_CALLS, TURN_S = 2, 0.03


class Expected(Protocol):
    """Facts of a case that decide how long it takes."""

    @property
    def case(self) -> Case:
        """The case."""

    @property
    def compiles(self) -> bool:
        """Return whether torch.compile has long to compile."""

    @property
    def alone(self) -> bool:
        """Return whether it takes its turns in a process of its own."""

    @property
    def converts_s(self) -> float:
        """Seconds that converting the model for its runtime takes."""


@dataclass(frozen=True)
class GroupTime:
    """Expected seconds of the parts of a group.

    Attributes:
        cold_s: of its cold runs.
        ready_s: of making its variants ready in all seatings, gates before and after.
        rounds_s: of its rounds.
    """

    cold_s: float
    ready_s: float
    rounds_s: float

    @property
    def total_s(self) -> float:
        """All of them."""
        return self.cold_s + self.ready_s + self.rounds_s


def group_time(cases: Sequence[Expected], call_s: float, budget_s: float, seatings: int) -> GroupTime:
    """Return a rough guess of how long the cases of a group take.

    Each variant is taken to be as fast as the user's own model as it is: which ones are faster, the run is to show.

    Args:
        cases: that will run, at least one.
        call_s: seconds of a call; 0 where it is not known, and then it counts as short.
        budget_s: seconds of the group's rounds.
        seatings: that the group gets.
    """
    mode, on_gpu = cases[0].case.mode, cases[0].case.device == "cuda"
    start_s, one_cold_s, one_ready_s = (GPU_START_S, GPU_COLD_S, GPU_READY_S) if on_gpu else (SEAT_S, COLD_S, READY_S)
    compiling = sum(found.compiles for found in cases)
    converts_s = sum(found.converts_s for found in cases)
    further = seatings - 1
    cold_s = len(cases) * (one_cold_s + COLD_CALLS * call_s) + compiling * COMPILE_S + COLD_CONVERSIONS * converts_s
    ready_s = seatings * (start_s + len(cases) * (one_ready_s + WARM_CALLS * call_s) + compiling * CACHED_S)
    audited, gated = (
        AUDITED_CALLS.get(mode, AUDITED_CALLS["inference"]),
        GATED_CALLS.get(mode, GATED_CALLS["inference"]),
    )
    ready_s += len(cases) * call_s * (audited + further * gated)
    ready_s += converts_s * (AUDITED_CONVERSIONS + further * GATED_CONVERSIONS)
    ready_s += call_s * _truths(cases) * (AUDITED_TRUTHS + further * GATED_TRUTHS)
    return GroupTime(cold_s, ready_s, _rounds_s(len(cases) * (TURN_S + TURN_CALLS * call_s), budget_s, seatings))


def _truths(cases: Sequence[Expected]) -> float:
    """Calls that one problem's truth takes in all processes of a seating."""
    apart = sum(found.alone for found in cases)
    return TRUTH_CALLS * (apart + (apart < len(cases)))


def _rounds_s(round_s: float, budget_s: float, seatings: int) -> float:
    """Return the seconds of all rounds: the budget, or what the least rounds take (`bench.timing.rounds`)."""
    left_s = budget_s
    for number in range(seatings):
        slice_s = max(0.0, left_s / (seatings - number))
        enough = max(LEAST_ROUNDS, math.ceil(slice_s / round_s))
        left_s -= max(2, min(enough, math.ceil(2 * slice_s / round_s))) * round_s
    return budget_s - left_s
