"""Figures over ranks: efficiency inside rounds, and a straggler that the whole step cannot show."""

from __future__ import annotations

import numpy as np
import pytest

from bench.ranks.command import culprit, recorded, resumption
from bench.ranks.figures import Division, efficiency, straggler, turns
from bench.ranks.keeper import RankEnd, RankReport
from bench.records.schema import Status
from bench.report.ranks import kinds


def way(world, scaling="weak"):
    """One way to divide the work."""
    return {"world": world, "scaling": scaling, "bucket_mb": 25.0, "accumulate": 1}


def went_on(world, error=0.0, **more):
    """Event of a rank whose training continues from a checkpoint."""
    times = {"save_s": 0.01, "resume_s": 0.02, "checkpoint_bytes": 1000}
    return {"event": "resumed", **way(world), **times, "resume_error": error, "resume_limit": 2e-6, **more}


def told(world, slow_rank=None, factor=1.0, scaling="weak", rounds=8, step_s=0.01, seed=0):
    """Events of ranks whose collectives make all steps as long as the slowest's compute time plus 2 ms."""
    generator = np.random.default_rng(seed)
    events = []
    for number in range(rounds):
        drift = np.exp(generator.normal(0, 0.3))
        compute = [
            step_s * drift * (factor if rank == slow_rank else 1.0) * np.exp(generator.normal(0, 0.02))
            for rank in range(world)
        ]
        for rank in range(world):
            times = {"compute_s": [compute[rank]], "total_s": [max(compute) + 0.002 * drift]}
            events.append({"event": "steps", **way(world, scaling), "round": number, "rank": rank, **times})
    return events


@pytest.mark.parametrize(("world", "slow_rank"), [(2, 0), (2, 1), (4, 2)])
def test_a_planted_straggler_is_found_and_named(world, slow_rank):
    """A rank that computes 30 % longer, though all steps take the same time."""
    (rounds,) = turns(told(world, slow_rank, 1.3)).values()
    found = straggler(rounds)
    assert found.rank == slow_rank
    assert found.named
    assert found.ratio.low < 1.3 < found.ratio.high * 1.02
    totals = {total for by_rank in rounds.values() for _, total in by_rank.values()}
    assert len(totals) == len(rounds)


def test_even_ranks_have_no_straggler():
    """In 40 trainings without one, none is named."""
    for seed in range(40):
        (rounds,) = turns(told(4, seed=seed)).values()
        assert not straggler(rounds).named
    (rounds,) = turns(told(1)).values()
    assert straggler(rounds) is None


def test_efficiency_is_formed_inside_rounds():
    """A machine that drifts by 30 % from round to round cancels; weak counts time, strong time and ranks."""
    one, two = told(1, seed=1), told(2, seed=1)
    for event in two:
        same = next(e for e in one if e["round"] == event["round"])
        event["total_s"] = [1.25 * same["total_s"][0]]
    found = efficiency(turns(one + two), Division(2, "weak", 25.0))
    assert found.value == pytest.approx(0.8)
    assert found.high - found.low < 1e-6
    strong = [e | {"scaling": "strong"} for e in one + two]
    assert efficiency(turns(strong), Division(2, "strong", 25.0)).value == pytest.approx(0.4)
    assert efficiency(turns(two), Division(2, "weak", 25.0)) is None


def report(rank, ended, reason=""):
    return RankReport(rank, ended, reason, "round 3")


@pytest.mark.parametrize(
    ("reports", "rank"),
    [
        ([report(0, RankEnd.FAILED, "RuntimeError: Connection closed by peer"), report(1, RankEnd.DIED)], 1),
        ([report(0, RankEnd.FAILED, "RuntimeError: Timed out"), report(1, RankEnd.HUNG)], 1),
        ([report(0, RankEnd.FAILED, "gloo: Connection reset"), report(1, RankEnd.FAILED, "ValueError: planted")], 1),
        ([report(0, RankEnd.UNAVAILABLE, "x"), report(1, RankEnd.UNAVAILABLE, "x")], 0),
        ([report(0, RankEnd.DONE), report(1, RankEnd.DONE)], None),
    ],
)
def test_the_rank_that_began_it_is_told(reports, rank):
    """Those that fail because another one is gone are not the culprit."""
    found = culprit(reports)
    assert (None if found is None else found.rank) == rank


class Asked:
    """What a command line asked for."""

    workload, variant, threads, device = "seed", "onednn", 1, "cpu"


def test_wrong_or_missing_gradients_give_no_figure():
    """A record without a gate that passed has a status and no times."""
    division = Division(2, "weak", 25.0)
    gate = {"event": "gate", **way(2), "passed": False, "reason": "planted", "batch": 32}
    gate |= {"grad_error": 1.0, "grad_limit": 1e-6}
    for events in (told(2), [*told(2), gate]):
        (record,) = recorded(Asked(), [division], [RankReport(0, RankEnd.DONE, events=events)])
        assert record.status is Status.PARITY_FAILED
        assert record.step_s is None
    good = [*told(1), *told(2), gate | {"passed": True}, gate | {"passed": True, "world": 1}, went_on(1), went_on(2)]
    divisions = [Division(1, "weak", 25.0), division]
    records = recorded(Asked(), divisions, [RankReport(0, RankEnd.DONE, events=good)])
    assert [record.status for record in records] == [Status.OK, Status.OK]
    assert records[1].straggler is None
    ((chart,),) = (kind.charts for kind in kinds(records))
    assert [point.x for point in chart.curves[0].points] == [1, 2]


@pytest.mark.parametrize("told_of", [[], [went_on(2, 1e-3)], [went_on(2), went_on(2, float("nan"))]])
def test_a_training_that_goes_on_otherwise_from_its_checkpoint_gives_no_figure(told_of):
    """Nor one of which no rank said how it went on; the worst rank counts."""
    gate = {"event": "gate", **way(2), "passed": True, "batch": 32, "grad_error": 0.0, "grad_limit": 1e-6}
    events = [*told(1), *told(2), gate, *told_of]
    (record,) = recorded(Asked(), [Division(2, "weak", 25.0)], [RankReport(0, RankEnd.DONE, events=events)])
    assert (record.status, record.step_s) == (Status.PARITY_FAILED, None)
    assert "checkpoint" in record.reason


def test_a_checkpoint_s_times_are_those_of_its_writer_and_of_the_slowest_rank():
    """Rank 0 alone writes; all must have it before any can train."""
    events = [went_on(2, 1e-9), went_on(2, 1e-8, save_s=None, resume_s=0.5)]
    found = resumption(events, Division(2, "weak", 25.0))
    assert found == {"save_s": 0.01, "resume_s": 0.5, "checkpoint_bytes": 1000, "resume_error": 1e-8,
                     "resume_limit": 2e-6}  # fmt: skip
