"""The recommendation of a run: its probabilities hold, bounds are kept, and what cannot be told is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import ENVIRONMENT, make_run

from bench.__main__ import main
from bench.analysis.run_summary import load_run
from bench.errors import UsageError
from bench.machine.interference import DISTURBED
from bench.recommend import facts as owned
from bench.recommend.answer import Recommendation, doubts, recommend
from bench.recommend.arguments import _size, time_with_unit
from bench.recommend.chances import chances
from bench.recommend.mix import MixAnswer, Regret, mixes
from bench.recommend.question import Objective, Question
from bench.recommend.words import group_text, mix_text, sentences, sure
from bench.records.block import Block
from bench.records.reader import RecordedRun, read_run
from bench.records.rounds import Round, Samples
from bench.report.words import advised

#: A run that knows what its variants need, which nothing has to be asked for.
KNOWN = ENVIRONMENT | {"needs": {"onednn": []}}
TWO = {"reference": 1.0, "onednn": 2.0, "cpu-fused": 3.0}


def made(path: Path, speedups: dict[str, float], facts: dict[str, dict] | None = None, **recipe) -> Path:
    """A run folder whose records carry figures, and for some variants other facts."""
    folder = make_run(path, KNOWN, speedups=speedups, figured=True, **recipe)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    common = {"parity_error": 1e-7, "build_s": 0.01, "first_call_s": 0.01, "memory_peak_bytes": 100_000_000}
    records = [line | common | (facts or {}).get(line["variant"], {}) for line in lines]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def answer(folder: Path, needs: dict | None = None, **asked):
    """The one answer that a run gives."""
    (found,) = recommend(read_run(folder), Question(**asked), needs)
    return found


def rounds(levels: np.ndarray, generator: np.random.Generator, count: int, noise: float) -> list[Round]:
    """Rounds of one process; what a round does to all is far larger than what tells them apart."""
    found = []
    for number in range(count):
        shared = generator.normal(0, 10 * noise)
        times = np.exp(levels + shared + generator.normal(0, noise, len(levels)))
        found.append(Round(number, {f"v{k}": Block((float(time),)) for k, time in enumerate(times)}))
    return found


def synthetic(generator: np.random.Generator, truth: np.ndarray, processes: int, apart: float) -> Samples:
    """Samples of variants whose logarithms of time are known, in processes that differ."""
    noise = 0.02
    levels = [truth + generator.normal(0, apart * noise, len(truth)) for _ in range(processes)]
    return Samples([rounds(level, generator, 15, noise) for level in levels])


@pytest.mark.parametrize(("processes", "apart"), [(3, 0.0), (4, 1.0)])
def test_the_stated_probability_is_right(processes, apart):
    """Over many runs with a known best variant, it is the recommended one as often as was stated, in bins of sureness.

    The gaps between variants are of the size of the doubt, so that every degree of sureness occurs.
    """
    generator = np.random.default_rng(7)
    stated, right = [], []
    spread = 0.02 * np.sqrt((np.pi / 2 / 15 + apart**2) / processes)
    for _ in range(250):
        truth = generator.normal(0, 4 * spread, 3)
        found = chances(synthetic(generator, truth, processes, apart), ["v0", "v1", "v2"], Objective.P50)
        stated.append(found.of_best(found.best))
        right.append(found.best == f"v{truth.argmin()}")
    stated, right = np.array(stated), np.array(right)
    assert abs(right.mean() - stated.mean()) < 0.06
    low, high = stated < 0.8, stated > 0.95
    assert low.sum() > 20
    assert high.sum() > 20
    assert right[low].mean() < right[high].mean()
    assert right[high].mean() > 0.93
    assert abs(right[low].mean() - stated[low].mean()) < 0.17


def test_probabilities_of_a_group_add_up_to_one():
    """Exactly one variant is the best of each resample."""
    samples = synthetic(np.random.default_rng(1), np.zeros(4), 3, 0.5)
    found = chances(samples, [f"v{k}" for k in range(4)], Objective.THROUGHPUT)
    assert sum(found.of_best(name) for name in found.costs) == pytest.approx(1)


def test_overlapping_intervals_do_not_hide_a_paired_difference():
    """A variant that is 2 % faster in every round is known as the best although the machine drifts by 30 %."""
    generator = np.random.default_rng(3)
    samples = Samples([rounds(np.array([0.0, -0.03]), generator, 40, 0.01) for _ in range(3)])
    times = [np.concatenate(samples.times(f"v{k}")) for k in range(2)]
    assert np.quantile(times[0], 0.25) < np.quantile(times[1], 0.75)
    assert chances(samples, ["v0", "v1"], Objective.P50).of_best("v1") > 0.99


def test_the_fastest_is_recommended_with_its_margin_over_the_next(tmp_path):
    """A variant that is far ahead is shipped; the sentence has the next one, what it saves, and what this one costs."""
    facts = {"cpu-fused": {"memory_peak_bytes": 140_000_000, "first_call_s": 5.0, "compile_s": 4.9}}
    folder = made(tmp_path / "run", TWO, facts)
    found = answer(folder, {"cpu-fused": ["a C++ compiler (once)"], "onednn": []})
    assert (found.verdict, found.variant, found.alike) == (Recommendation.RECOMMENDED, "cpu-fused", ("cpu-fused",))
    assert found.probability > 0.99
    assert found.rivals[0].excess.low < 1.5 < found.rivals[0].excess.high
    assert found.break_even.calls == pytest.approx(4.99 / (0.5e-3 - 1e-3 / 3), rel=0.05)
    assert found.break_even.later_calls == pytest.approx(0.09 / (0.5e-3 - 1e-3 / 3), rel=0.05)
    at_each_start = answer(folder, {"cpu-fused": ["a C++ compiler (at every start)"], "onednn": []})
    assert at_each_start.break_even.later_calls is None
    ((title, text),) = sentences(read_run(folder))
    assert title == "seed, inference, cpu, 1 thread"
    assert "Ship `cpu-fused`: more than 99.9 % sure to be fastest" in text
    assert "Next: `onednn`, which is 50 % slower" in text or "Next: `onednn`, which is 49 % slower" in text
    assert "takes 40.0 MB less memory" in text
    assert "4.90 s of it compiling" in text


def test_the_fastest_outside_the_error_bound_is_not_recommended(tmp_path):
    """A fast variant with a large error gives way to the next, and is named with its error."""
    folder = made(tmp_path / "run", TWO, {"cpu-fused": {"parity_error": 0.02, "grad_error": 0.5}})
    assert answer(folder).variant == "cpu-fused"
    found = answer(folder, max_error=1e-3)
    assert (found.verdict, found.variant) == (Recommendation.RECOMMENDED, "onednn")
    assert found.left_out == {"cpu-fused": "error 5.0e-01 is 500 times the bound of 1.0e-03"}
    assert answer(folder, max_error=0.6).variant == "cpu-fused"


def test_where_nothing_keeps_the_bounds_the_nearest_is_named(tmp_path, capsys):
    """No variant is fast enough: the nearest is named with what it misses, and the exit code is 3."""
    folder = made(tmp_path / "run", TWO)
    found = answer(folder, latency_bound_s=3e-4)
    assert (found.verdict, found.variant) == (Recommendation.NONE, "cpu-fused")
    assert found.misses[0].endswith("% over the bound of 300 us")
    assert main(["recommend", str(folder), "--latency-bound", "300us"]) == 3
    assert "No variant is within the bounds (p50 at most 300 us). The nearest is cpu-fused" in capsys.readouterr().out


def test_a_value_that_is_not_known_keeps_no_bound(tmp_path):
    """A variant whose memory was not measured is not taken to fit."""
    folder = made(tmp_path / "run", TWO, {"cpu-fused": {"memory_peak_bytes": None}})
    found = answer(folder, memory_bound_bytes=2e9)
    assert found.variant == "onednn"
    assert found.left_out["cpu-fused"] == "its memory is not known"


def test_two_that_cannot_be_told_apart_share_the_place_and_the_cheapest_is_named(tmp_path, capsys):
    """Two equal variants: neither is sure, both are in the set, and the one without a compiler is cheapest to own."""
    facts = {"b": {"memory_peak_bytes": 60_000_000}}
    folder = made(tmp_path / "run", {"reference": 1.0, "a": 2.0, "b": 2.0}, facts, rounds=8, noise=0.3)
    found = answer(folder, {"a": ["a C++ compiler (at every start)"], "b": []})
    assert set(found.alike) == {"a", "b"}
    assert found.verdict is Recommendation.UNCLEAR
    assert found.cheapest == "b"
    assert found.clearer is not None
    assert main(["recommend", str(folder)]) == 5
    out = capsys.readouterr().out
    title, first, *rest = out.splitlines()
    assert title == "seed, inference, cpu, 1 thread"
    assert first in {f"Unclear: {names} seems to be fastest by median latency." for names in ("a or b", "b or a")}
    assert {line.partition(":")[0] for line in rest[:2]} == {"- a", "- b"}
    assert all(" % sure, " in line for line in rest[:2])
    why = ": compared with a, it takes 40.0 MB less memory" if found.variant == "a" else ""
    assert rest[2] == f"- In the meantime: b is the cheapest of them to own{why}."
    assert found.clearer.between == found.alike
    purpose = f"- To decide between {' and '.join(found.alike)}, {found.clearer.text}"
    if found.clearer.hopeless:
        assert rest[3:] == [f"{purpose}."]
    else:
        more = f"  python -m bench run --resume {folder} --more"
        assert rest[3] == f"{purpose}:"
        assert rest[4].startswith(more)
        assert len(rest) == 5
    if found.variant == "a":
        lines = group_text(found, read_run(folder)).splitlines()
        assert lines[3].endswith("compared with `a`, it does not need a C++ compiler and takes 40.0 MB less memory.")


def test_a_difference_below_three_percent_is_no_reason_to_doubt(tmp_path):
    """Two variants that certainly differ by 1 %: one is recommended, the other is as good and may be cheaper to own."""
    speedups = {"reference": 1.0, "a": 2.02, "b": 2.0}
    folder = made(tmp_path / "run", speedups, {"a": {"first_call_s": 3.0}}, rounds=60, noise=0.005)
    found = answer(folder)
    assert (found.verdict, found.alike, found.cheapest) == (Recommendation.RECOMMENDED, ("a", "b"), "b")
    assert found.near_best > 0.99


def test_a_start_is_spread_over_the_planned_calls(tmp_path):
    """A variant with a long start wins for many calls and loses for few."""
    folder = made(tmp_path / "run", TWO, {"cpu-fused": {"first_call_s": 5.0}})
    assert answer(folder, calls=1e6).variant == "cpu-fused"
    assert answer(folder, calls=1e3).variant == "onednn"


def test_p99_needs_the_calls_that_carry_it(tmp_path):
    """Of 180 calls there is no 99th percentile: the answer is unclear and says how many rounds it takes."""
    found = answer(made(tmp_path / "few", TWO), objective=Objective.P99)
    assert (found.verdict, found.variant) == (Recommendation.UNCLEAR, None)
    assert "368" in found.left_out["cpu-fused"]
    assert found.clearer.rounds > 60
    many = answer(made(tmp_path / "many", TWO, rounds=200), objective=Objective.P99)
    assert (many.verdict, many.variant) == (Recommendation.RECOMMENDED, "cpu-fused")


@pytest.mark.parametrize(("objective", "best"), [(Objective.MEMORY, "onednn"), (Objective.COLD_START, "reference")])
def test_what_is_measured_once_has_no_probability(tmp_path, objective, best):
    """Memory and start are compared by their one value, which the answer says."""
    facts = {"onednn": {"memory_peak_bytes": 50_000_000}, "reference": {"first_call_s": 0.001}}
    found = answer(made(tmp_path / "run", TWO, facts), objective=objective)
    assert (found.verdict, found.variant, found.probability) == (Recommendation.RECOMMENDED, best, None)
    assert any("measured once" in note for note in found.notes)


def test_a_bound_that_the_interval_reaches_makes_the_answer_unclear(tmp_path):
    """A median just below the bound with an interval across it is no promise."""
    folder = made(tmp_path / "run", TWO, rounds=8, noise=0.2)
    record = next(r for r in read_run(folder).records if r.variant == "cpu-fused")
    bound = (record.latency_p50_s + record.latency_p50_hi_s) / 2
    found = answer(folder, latency_bound_s=bound)
    assert found.verdict is Recommendation.UNCLEAR
    assert any("the interval reaches" in note for note in found.notes)


@pytest.mark.parametrize("objective", [Objective.P50, Objective.MEMORY])
def test_one_that_failed_after_the_first_pass_is_not_recommended_without_a_word(tmp_path, objective):
    """Its figures are those of the processes that ended well; why another one did not stands beside them."""
    facts = {"cpu-fused": {"reason": "crashed in seating 6: planted", "memory_peak_bytes": 50_000_000}}
    folder = made(tmp_path / "run", TWO, facts)
    found = answer(folder, objective=objective)
    assert (found.verdict, found.variant) == (Recommendation.UNCLEAR, "cpu-fused")
    assert "one of its processes failed: crashed in seating 6: planted" in found.notes
    lines = sentences(read_run(folder), Question(objective))[0][1].splitlines()
    assert lines[0].startswith("Unclear: `cpu-fused` seems to ")
    assert lines[0].endswith(", but a doubt remains.")
    assert "- Doubt about `cpu-fused`: one of its processes failed: crashed in seating 6: planted." in lines
    # The same command of another variant or mode would measure something else.
    assert lines[-1] == f"  python -m bench show {folder} seed/inference/cpu-fused"


@pytest.mark.parametrize(("disturbed", "verdict"), [(0, 0), (7, 0), (8, 5), (14, 5)])
def test_a_first_place_from_disturbed_samples_is_not_shipped(tmp_path, capsys, disturbed, verdict):
    """It has no star in the run's own table either, however sure the ratios are."""
    doubt = {"samples": 16, "disturbed": disturbed}
    folder = made(tmp_path / "run", TWO, {"cpu-fused": doubt, "reference": doubt})
    assert main(["recommend", str(folder)]) == verdict
    out = capsys.readouterr().out
    said = f"- Doubt about cpu-fused: {disturbed} of its 16 samples were taken while {DISTURBED}."
    assert (said in " ".join(out.split())) is bool(verdict)
    assert ("Unclear: cpu-fused seems to be fastest" in out) is bool(verdict)


def test_the_page_and_the_recommendation_agree_on_a_disturbed_leader(tmp_path):
    """Both leave it open where most samples were disturbed; with fewer, ratios inside rounds decide in both."""
    for disturbed, verdict in ((14, "unclear"), (3, "recommended")):
        doubt = {"samples": 16, "disturbed": disturbed, "standing": "best"}
        others = {name: {"standing": "slower"} for name in ("reference", "onednn")}
        (said,) = advised(load_run(made(tmp_path / verdict, TWO, {"cpu-fused": doubt} | others)))
        assert said.verdict == verdict
        assert said.text.startswith("No clear winner: `cpu-fused` leads") is (verdict == "unclear")
        assert ("Round by round, `cpu-fused` is more than 99.9 % sure to be first." in said.text) is (disturbed == 3)


def test_an_order_that_is_certain_without_the_disturbed_rounds_is_recommended(tmp_path):
    """The page gives such a leader its star; what depends on how much faster it is stays as doubtful as before."""
    doubt = {"samples": 16, "disturbed": 14, "standing": "best", "certain": True}
    others = {name: {"standing": "slower"} for name in ("reference", "onednn")}
    folder = made(tmp_path / "run", TWO, {"cpu-fused": doubt} | others)
    (said,) = advised(load_run(folder))
    assert (said.verdict, said.text.startswith("`cpu-fused` is fastest")) == ("recommended", True)
    assert "The exact speedup is doubtful: 14 of 16 samples" in said.text
    assert any("14 of its 16 samples" in note for note in answer(folder).notes)
    for asked in ({"objective": Objective.P99}, {"calls": 1000}):
        assert answer(folder, **asked).verdict is Recommendation.UNCLEAR, asked
    best = next(record for record in load_run(folder).records if record.variant == "cpu-fused")
    assert [doubts(best, Question(), once=False, ordered=ordered)[0].unsure for ordered in (True, False)] == [
        False,
        True,
    ]


def test_the_only_variant_is_shipped_whatever_disturbed_it(tmp_path):
    """There is nothing else to ship, so a doubtful time leaves nothing open."""
    folder = made(tmp_path / "run", {"reference": 1.0}, {"reference": {"samples": 16, "disturbed": 14}})
    found = answer(folder)
    assert found.verdict is Recommendation.RECOMMENDED
    assert any("14 of its 16 samples" in note for note in found.notes)


def test_a_variant_that_is_not_the_fastest_is_not_among_those_that_seem_to_be(tmp_path):
    """One that wins in no resample is listed, with the reason: it may be as good as the best."""
    folder = made(tmp_path / "run", {"reference": 1.0, "a": 2.02, "b": 2.0}, rounds=60, noise=0.005)
    found = answer(folder)
    open_ = dataclasses.replace(found, verdict=Recommendation.UNCLEAR, notes=("planted",))
    assert found.rivals[0].probability == 0
    lines = group_text(open_, read_run(folder)).splitlines()
    assert lines[0] == "Unclear: `a` seems to be fastest by median latency, but a doubt remains."
    assert lines[2].startswith("- `b`: hardly fastest by median latency, but perhaps within 3 % of it, 1.1 % slower")


def test_nothing_that_ran_is_unclear_and_not_an_error(tmp_path):
    """A group without a case that ended ok has an answer."""
    folder = made(tmp_path / "run", TWO)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    broken = [record | {"status": "crashed", "reason": "signal 11"} for record in records]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in broken))
    found = answer(folder)
    assert (found.verdict, found.variant) == (Recommendation.UNCLEAR, None)
    assert sentences(read_run(folder))[0][1].startswith(
        "Unclear: no variant ran and passed its gate.\n"
        "- Left out: `reference`, `onednn`, `cpu-fused` (crashed: signal 11)."
    )


def test_many_variants_with_one_reason_are_one_line(tmp_path):
    """As in a run for a GPU on a machine without one; a second reason names the variants of each."""
    folder = made(tmp_path / "run", dict.fromkeys(("reference", *"abcdefg"), 1.0))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for reason, told in ("no GPU", "all 8 variants (unavailable: no GPU)"), ("no lamp", "`g` (unavailable: no lamp)"):
        records = [record | {"status": "unavailable", "reason": "no GPU"} for record in records]
        records[-1]["reason"] = reason
        (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert f"- Left out: {told}." in sentences(read_run(folder))[0][1].splitlines()


def test_a_mix_weighs_its_input_sets(tmp_path):
    """The least expected time wins, and its worst regret is told."""
    answer_ = MixAnswer("lm, inference, cpu: mix of 2 input sets", {"short": 0.9, "long": 0.1}, "a", 1e-3, 0.97, 0.99,
                        {"a": Regret("long", 0.5, "b"), "b": Regret("short", 0.1, "a")})  # fmt: skip
    text = mix_text(answer_)
    assert "Ship `a`: shortest expected time over the mix (1.00 ms a call, 97 % sure)" in text
    assert "at worst it is 50 % slower than `b`, in long" in text
    assert "`b` loses least in its worst set: 10 % to the fastest there." in text
    assert mixes(read_run(made(tmp_path / "run", TWO)), Question()) == ()


def mixed(folder: Path, short: dict[str, float], long: dict[str, float], facts: dict | None = None) -> RecordedRun:
    """A run of two input sets, the first of which are 90 % of the calls; facts are those of variants in the second."""
    common = read_run(made(folder / "a", short, workloads=("own:m/short",)))
    rare = read_run(made(folder / "b", long, facts, workloads=("own:m/long",), seed=1))
    records = [
        dataclasses.replace(record, input_set=name, weight=weight)
        for run, name, weight in ((common, "short", 0.9), (rare, "long", 0.1))
        for record in run.records
    ]
    return RecordedRun(folder, tuple(records), 0, {**common.samples, **rare.samples}, {})


def test_the_choice_over_a_mix_has_the_least_expected_time(tmp_path):
    """What is best in the rare set loses to what is best in the common one, and its regret is in the other."""
    both = mixed(tmp_path, {"reference": 1.0, "a": 2.0, "b": 1.8}, {"reference": 1.0, "a": 1.0, "b": 2.0})
    (found,) = mixes(both, Question())
    assert found.title == "own:m, inference, cpu: mix of 2 input sets"
    # Expected: a 0.9/2 + 0.1/1 = 0.55, b 0.9/1.8 + 0.1/2 = 0.55: as good as each other.
    assert found.near_best > 0.9
    assert found.regrets["a"].input_set == "long"
    assert found.regrets["a"].share == pytest.approx(1.0, abs=0.1)
    assert found.regrets["b"].share == pytest.approx(0.11, abs=0.05)
    alike = tuple(dataclasses.replace(record, weight=0.5) for record in both.records)
    (even,) = mixes(dataclasses.replace(both, records=alike), Question())
    assert (even.variant, even.unclear) == ("b", False)
    assert even.probability > 0.99


def test_one_that_failed_later_in_a_set_of_a_mix_is_not_shipped_without_a_word(tmp_path):
    """A row with a reason is doubtful over a mix as it is alone, whichever set it failed in."""
    sure_, doubtful = (
        mixes(mixed(tmp_path / name, TWO, TWO, {"cpu-fused": facts}), Question())[0]
        for name, facts in (("a", {}), ("b", {"reason": "crashed in seating 6: planted"}))
    )
    assert (sure_.variant, sure_.unclear, sure_.notes) == ("cpu-fused", False, ())
    assert (doubtful.variant, doubtful.unclear) == ("cpu-fused", True)
    assert mix_text(doubtful).startswith("Unclear: `cpu-fused` seems to have the shortest expected time over the mix (")
    assert "- Doubt: in long, one of its processes failed: crashed in seating 6: planted.\n" in mix_text(doubtful)


def test_bounds_and_starts_count_over_a_mix(tmp_path):
    """The metric is compared with the baseline's of its set, and each set's calls pay for its own first call."""
    metrics = {"reference": {"metric": 1.0}, "onednn": {"metric": 1.001}, "cpu-fused": {"metric": 1.2}}
    run = mixed(tmp_path, TWO, TWO, metrics)
    run = dataclasses.replace(run, records=tuple(dataclasses.replace(r, metric=r.metric or 1.0) for r in run.records))
    (bounded,) = mixes(run, Question(max_drop=0.005))
    assert (bounded.variant, bounded.unclear) == ("onednn", False)
    (free,) = mixes(run, Question())
    (started,) = mixes(run, Question(calls=100))
    assert started.expected_s == pytest.approx(free.expected_s + 2 * 0.02 / 100)
    assert mixes(run, Question(objective=Objective.MEMORY)) == ()
    (nowhere,) = mixes(run, Question(latency_bound_s=1e-9))
    text = mix_text(nowhere)
    assert text == "Unclear: no variant ran within the bounds in short and long (short 90 %, long 10 %)."


def test_needs_come_from_the_run(tmp_path):
    """What a variant needs is read from the run's own environment."""
    environment = ENVIRONMENT | {"needs": {"cpu-fused": ["a C++ compiler (once)"]}}
    folder = make_run(tmp_path / "run", environment, speedups=TWO, figured=True)
    assert owned.needs_of(read_run(folder)) == {"cpu-fused": ("a C++ compiler (once)",)}


def test_words_for_compilers_are_those_of_the_registry():
    """The order of what is cheap to own knows the words that the variants use."""
    from seq2seq.execution.variants import VARIANTS

    assert owned.AT_EVERY_START in VARIANTS["compile-loop"].needs
    assert owned.ONCE in VARIANTS["cpu-fused"].needs
    assert VARIANTS["onednn"].needs == ()
    assert "the package onnxruntime" in VARIANTS["onnxruntime"].needs


def test_json_has_one_object_with_finite_numbers(tmp_path, capsys):
    """The JSON can be read by any program, and has what the sentence has."""
    folder = made(tmp_path / "run", TWO, {"cpu-fused": {"memory_peak_bytes": None}})
    assert main(["recommend", str(folder), "--json", "--memory-bound", "1MB"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["answers"][0]["verdict"] == "none"
    assert found["answers"][0]["text"].startswith("No variant is within the bounds")
    assert main(["recommend", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["probability"] > 0.9


@pytest.mark.parametrize(
    "words",
    [["--latency-bound", "20"], ["--memory-bound", "2XB"], ["--max-drop", "3"], ["--calls", "0"], ["--mode", "decode"],
     ["--workload", "sed"], ["--max-drop", "3%"], ["--objective", "p98"]],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words):
    """Wrong bounds, and names that the run does not have, are refused before anything is computed."""
    folder = made(tmp_path / "run", TWO)
    try:
        code = main(["recommend", str(folder), *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "error:" in capsys.readouterr().err


def test_a_misspelled_objective_gets_the_near_name(tmp_path, capsys):
    """And not the name of a class."""
    with pytest.raises(SystemExit) as end:
        main(["recommend", str(tmp_path), "--objective", "latency-p9"])
    assert end.value.code == 2
    assert "invalid choice 'latency-p9'; did you mean 'latency-p99'" in capsys.readouterr().err


def test_a_mode_that_the_run_has_not_is_refused(tmp_path):
    """The message names what the run has."""
    with pytest.raises(UsageError, match="it has seed in inference"):
        recommend(read_run(made(tmp_path / "run", TWO)), Question(mode="training"))


@given(st.floats(1e-3, 1e3), st.sampled_from(["s", "ms", "us"]))
def test_times_carry_their_unit(value, unit):
    """A bound reads as what was meant."""
    assert time_with_unit(f"{value}{unit}") == pytest.approx(value * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit])
    assert _size(f"{value} GB") == pytest.approx(value * 1e9)


def test_sureness_claims_no_more_than_the_resamples():
    """A thousand resamples tell no certainty."""
    assert sure(1.0) == "more than 99.9 % sure"
    assert sure(0.94) == "94 % sure"
