"""Racing: what it calls decided is so, however often it looks, and rounds go to those that need them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from bench.analysis import racing
from bench.analysis.intervals import Interval
from bench.machine.core_distance import FAR_WORDS
from bench.machine.interference import REASONS, Interference
from bench.recommend.clearer import clearer
from bench.records.block import Block
from bench.records.rounds import Round, Samples
from bench.records.schema import Record, Status
from bench.run.group import placed
from bench.run.more import duration

REFERENCE = "reference"
FAR = Interference(why=f"{FAR_WORDS} 600 ns, 230 at best in this run")
OTHERS = Interference(why="others used 0.5 cores")


def drawn(generator, truth, number, off, noise=0.03):
    """A round: times by variant around their truth, with the noise that they share and that of their own."""
    shared = generator.normal(0, 0.05)
    blocks = {
        name: Block((seconds * math.exp(shared + off[name] + generator.normal(0, noise)),))
        for name, seconds in truth.items()
    }
    return Round(number, blocks)


def raced(seed, truth, seatings=3, most=64, apart=0.0):
    """A group measured as a run measures it: its samples, and how many rounds each variant had."""
    generator = np.random.default_rng(seed)
    done: list[list[Round]] = []
    counts = dict.fromkeys(truth, 0)
    for seating in range(6):
        rounds: list[Round] = []
        off = {name: generator.normal(0, apart) for name in truth}

        def needing(found):
            samples = Samples([*done, list(found)])
            return racing.players(racing.standing(samples, truth, REFERENCE, 0.05, racing.CARE), truth, REFERENCE)

        race = racing.Race(truth, needing)
        going = dict(truth)
        while going and len(rounds) < most:
            rounds.append(drawn(generator, going, len(rounds), off))
            for name in going:
                counts[name] += 1
            going = {name: truth[name] for name in truth if name in race(rounds)}
        done.append(rounds)
        found = racing.standing(Samples(done), truth, REFERENCE, 0.05, racing.CARE)
        if seating + 1 >= seatings and not racing.players(found, truth, REFERENCE):
            break
    return Samples(done), counts


TRUTHS = {
    "one is fastest": {REFERENCE: 1.0, "fast": 0.5, "next": 0.55, "slow": 0.9},
    "two are equal": {REFERENCE: 1.0, "fast": 0.5, "next": 0.5, "slow": 0.9},
    "at the margin": {REFERENCE: 1.0, "fast": 0.5, "next": 0.5 / (1 - racing.MARGIN), "slow": 0.9},
}


@pytest.mark.parametrize("apart", [0.0, 0.01])
@pytest.mark.parametrize("name", TRUTHS)
def test_what_is_called_decided_is_so(name, apart):
    """Over many runs, what is called certainly slower is slower, and what is called equal is within the margin."""
    truth = TRUTHS[name]
    wrong = called = 0
    for seed in range(10):
        samples, _ = raced(seed, truth, apart=apart)
        found = racing.standing(samples, truth, REFERENCE, 0.05, racing.CARE)
        for variant in found.against:
            ratio = truth[found.best] / truth[variant]
            if variant in found.slower:
                called += 1
                wrong += ratio >= 1
            elif variant in found.equal:
                called += 1
                # At the margin itself either side may be called; beyond it by more than rounding is wrong.
                wrong += abs(math.log(ratio)) > -math.log(1 - racing.MARGIN) + 1e-9
    # Of some 25 calls at 99 % each, more than one wrong hardly comes by chance.
    assert called >= 20
    assert wrong <= 1


def test_rounds_go_to_the_undecided():
    """Who is clearly slower rests after the first rounds of a seating; rivals and the reference go on."""
    truth = {REFERENCE: 1.0, "fast": 0.5, "next": 0.507, "slow": 0.9}
    _, counts = raced(1, truth)
    assert counts["fast"] == counts["next"] == counts[REFERENCE]
    assert counts["slow"] < counts["fast"] / 2
    assert counts["slow"] >= 3 * racing.FIRST_ROUNDS


def test_a_clear_answer_ends_early():
    """Where everything is told at the first look, a seating has no more than its first rounds."""
    samples, _ = raced(2, {REFERENCE: 1.0, "fast": 0.5, "slow": 0.8}, most=1000)
    assert sum(len(rounds) for rounds in samples.processes) <= 3 * 4 * racing.FIRST_ROUNDS


def test_looks_are_at_doublings_of_clean_rounds():
    """Disturbed rounds bring no look nearer, and nobody is dropped between two looks."""
    asked = []

    def needing(rounds):
        asked.append(len(rounds))
        return frozenset({"a"})

    race = racing.Race({"a", "b"}, needing)
    rounds = []
    for number in range(80):
        bad = Interference(why="planted") if number < 5 else Interference()
        rounds.append(Round(number, {"a": Block((1.0,)), "b": Block((1.0,))}, beside=bad))
        race(rounds)
    assert asked == [5 + racing.FIRST_ROUNDS * 2**power for power in range(4)]


def test_a_seating_that_begins_disturbed_ends():
    """After six rounds or a second without a clean one nobody goes on; one clean round is enough to go on."""
    race = racing.Race({"a", "b"}, lambda _: frozenset({"a"}), replaceable=True)
    spoilt = [Round(number, {}, beside=Interference(why="far")) for number in range(6)]
    assert set(race(spoilt[:5])) == {"a", "b"}
    assert not race(spoilt)
    assert set(race([Round(0, {}), *spoilt[1:]])) == {"a", "b"}
    slow = [dataclasses.replace(found, wall_s=racing.SPOILT_S / 2) for found in spoilt]
    assert set(race(slow[:2])) == {"a", "b"}
    assert not race(slow[:3])
    assert set(racing.Race({"a", "b"}, lambda _: frozenset({"a"}))(spoilt)) == {"a", "b"}


def test_far_cores_alone_end_no_seating():
    """That may last all day, and another seating costs a start and gates; one other disturbance changes nothing."""
    race = racing.Race({"a", "b"}, lambda _: frozenset({"a"}), replaceable=True)
    far = [Round(number, {}, beside=FAR, wall_s=racing.SPOILT_S) for number in range(8)]
    assert set(race(far)) == {"a", "b"}
    assert set(race([*far, Round(8, {}, beside=OTHERS)])) == {"a", "b"}
    assert not race([dataclasses.replace(found, beside=OTHERS) for found in far])


def test_variants_whose_rounds_were_disturbed_need_more():
    """However narrow the intervals, an answer that rests on disturbed rounds does not stand."""
    spoilt = [
        Round(number, {REFERENCE: Block((2.0,)), "a": Block((1.0,))}, beside=Interference(why="far"))
        for number in range(8)
    ]
    found = racing.standing(Samples([spoilt] * 3), (REFERENCE, "a"), REFERENCE, 0.05)
    assert (found.slower, found.wide, found.disturbed) == ({REFERENCE}, set(), {REFERENCE, "a"})
    assert racing.players(found, (REFERENCE, "a"), REFERENCE) == {REFERENCE, "a"}


def in_states(*taken, processes=3):
    """Rounds in each of some states: how many a process has, what disturbed them, and how much faster `a` is there."""
    generator = np.random.default_rng(3)
    found = [
        [
            Round(number, {REFERENCE: Block((faster,)), "a": Block((math.exp(generator.normal(0, 0.02)),))}, beside=why)
            for count, why, faster in taken
            for number in range(count)
        ]
        for _ in range(processes)
    ]
    return Samples(found)


@pytest.mark.parametrize(
    ("taken", "certain"),
    [
        ([(8, FAR, 2.0)], True),
        ([(8, FAR, 1.001)], False),
        ([(8, Interference(), 2.0)], True),
        # The order turns with the state, and then what most rounds say does not decide.
        ([(8, FAR, 2.0), (3, Interference(), 0.5)], False),
        ([(3, FAR, 0.5), (8, Interference(), 2.0)], False),
        ([(8, FAR, 2.0), (4, Interference(), 1.5)], True),
        # A state with fewer than six rounds was hardly seen; one with fewer than three in each process is not known.
        ([(8, FAR, 2.0), (1, Interference(), 0.5)], True),
        ([(8, FAR, 2.0), (2, Interference(), 2.0)], False),
        ([(1, FAR, 2.0), (1, Interference(), 2.0), (8, OTHERS, 2.0)], False),
        # What other programs do to a round may be another thing to each variant, but it may leave the figures open.
        ([(8, FAR, 2.0), (8, OTHERS, 1.5)], True),
        ([(8, FAR, 2.0), (8, OTHERS, 0.5)], False),
        ([(8, OTHERS, 2.0)], False),
        ([(8, Interference(why=f"{FAR.why}{REASONS}{OTHERS.why}"), 2.0)], False),
    ],
)
def test_an_order_is_certain_where_it_holds_in_each_state_of_the_machine(taken, certain):
    """Far cores are a state like any other; what else disturbed a round takes it out."""
    samples = in_states(*taken)
    assert racing.certain(samples, racing.standing(samples, ("a", REFERENCE), REFERENCE, 0.05)) is certain


def test_an_order_is_not_certain_by_one_process_of_several():
    """Differences of processes show in two or more; one or two rounds of a state say too little of a process."""
    one = in_states((8, FAR, 2.0), processes=1).processes
    others = in_states((2, FAR, 2.0), (8, OTHERS, 2.0), processes=2).processes
    for processes, certain in ((one, True), ([*one, *others], False), ([*one, *one, *others], True)):
        samples = Samples(processes)
        assert racing.certain(samples, racing.standing(samples, ("a", REFERENCE), REFERENCE, 0.05)) is certain


def test_an_order_that_is_open_is_not_certain():
    """By the figures, or since there is nothing to compare with, whatever the rounds of one state say."""
    samples = in_states((8, FAR, 2.0))
    found = racing.standing(samples, ("a", REFERENCE), REFERENCE, 0.05)
    assert not racing.certain(samples, dataclasses.replace(found, slower=frozenset(), undecided=frozenset({REFERENCE})))
    assert not racing.certain(samples, racing.standing(samples, ("a",), REFERENCE, 0.05))


def test_the_record_of_the_fastest_says_whether_it_is_certain():
    """It rests on disturbed rounds alone here; the others' say nothing."""
    cases = [dataclasses.replace(Record(), variant=name, status=Status.OK) for name in (REFERENCE, "a")]
    for taken, certain in (([(8, FAR, 2.0)], True), ([(8, OTHERS, 2.0)], False)):
        found = placed(cases, in_states(*taken), 0.05)
        assert [(r.standing, r.certain) for r in found] == [("slower", None), ("best", certain)]


def test_nobody_is_judged_who_has_no_round():
    """Without rounds of everybody there is no standing, and all go on."""
    samples = Samples([[Round(n, {REFERENCE: Block((1.0,))}) for n in range(8)]])
    assert racing.standing(samples, [REFERENCE, "a"], REFERENCE, 0.05) is None
    assert racing.players(None, [REFERENCE, "a"], REFERENCE) == {REFERENCE, "a"}


def test_without_a_reference_times_decide():
    """A group whose reference dropped out is raced by times against its best."""
    samples = Samples(
        [[Round(n, {"a": Block((0.5 + 0.001 * (n % 3),)), "b": Block((1.0,))}) for n in range(16)] for _ in range(3)]
    )
    found = racing.standing(samples, ["a", "b"], REFERENCE, 0.05)
    assert found is not None
    assert found.best == "a"
    assert found.slower == {"b"}


@pytest.mark.parametrize("noise", [0.05, 0.2, 1.0])
def test_a_recommendation_advises_the_time_that_the_run_s_last_lines_advise(noise):
    """Of one undecided rival, both estimate the same further seconds, in the same words."""
    generator, truth = np.random.default_rng(1), {REFERENCE: 1.0, "fast": 0.5, "next": 0.505}
    rounds = [[drawn(generator, truth, n, dict.fromkeys(truth, 0.0), noise) for n in range(12)] for _ in range(3)]
    samples, names = Samples(rounds), list(truth)
    found = racing.standing(samples, names, REFERENCE, interval=10.0)
    rival = found.against["next" if found.best == "fast" else "fast"]
    excess = Interval(1 / rival.value, 1 / rival.high, 1 / rival.low)
    by_the_run = racing.further_s(samples, names, racing.missing_factor(found, 10.0))
    by_advice = clearer(excess, samples, names)
    assert found.undecided == {"next" if found.best == "fast" else "fast"}
    assert by_advice.seconds == pytest.approx(by_the_run)
    assert racing.LEAST_S <= by_the_run <= racing.MOST_S
    assert by_advice.hopeless or f"about {duration(by_the_run)} longer" in by_advice.text


def test_what_is_missing_grows_with_the_doubt():
    """The advised factor is 1 where all is told, and the square of how far the doubt exceeds what must be seen."""
    generator = np.random.default_rng(0)
    factors = []
    for noise in (0.02, 0.05, 0.1):
        truth = {REFERENCE: 1.0, "fast": 0.5, "next": 0.505}
        rounds = [[drawn(generator, truth, n, dict.fromkeys(truth, 0.0), noise) for n in range(12)] for _ in range(3)]
        factors.append(racing.missing_factor(racing.standing(Samples(rounds), truth, REFERENCE, 0.05), 0.05))
    assert all(low < high for low, high in itertools.pairwise(factors))
    assert factors[-1] > 4
