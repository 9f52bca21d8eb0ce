"""`bench recommend --objective load`: its probabilities are right, and each folder gets one clear answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import ENVIRONMENT, make_run

from bench.__main__ import main
from bench.plan.own_model import VARIABLE
from bench.recommend.answer import Recommendation
from bench.recommend.load import loads, read_served, recommend_load
from bench.recommend.question import Objective, Question
from bench.records import serving
from bench.records.schema import Status
from bench.records.serving import ServingRecord, ServingTest, ends

NEEDS = {"onednn": [], "cpu-fused": ["a C++ compiler (once)"], "onnxruntime": ["onnxruntime"]}
BOUND_S = 0.02


def row(variant: str, phase: str, load: float, latency_s: float, verdict: str = "") -> dict[str, object]:
    """A row of serving-tests.csv.gz; the verdict follows from the latency unless given."""
    verdict = verdict or ("held" if latency_s <= BOUND_S else "broken")
    known = {"workload": "seed", "variant": variant, "phase": phase, "target_qps": load, "qps": load}
    known |= {"verdict": verdict, "latency_bound_s": latency_s, "batch_mean": 2.0}
    return dict.fromkeys(serving.TEST_COLUMNS, "") | known


def served(folder: Path, loads_of: dict[str, list[float]], records: dict[str, dict] | None = None) -> Path:
    """A folder of `bench serve`: of each variant the load that each repeat bore, and what else its record says."""
    folder.mkdir(exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"needs": NEEDS}))
    for variant, found in loads_of.items():
        for number, load in enumerate(found, start=1):
            serving.append_tests(
                folder,
                [row(variant, f"repeat {number}", load, 0.015), row(variant, f"repeat {number}", 1.05 * load, 0.03)],
            )
        known = {"scenario": "server", "percentile": 99.0, "bound_s": BOUND_S, "threads": 1, "device": "cpu"}
        known |= {"qps": float(np.median(found)), "repeats": len(found)} if found else {}
        more = (records or {}).get(variant, {})
        serving.append(folder, ServingRecord(**({"workload": "seed", "variant": variant} | known | more)))
    return folder


def answer(folder: Path, **asked):
    """The one answer that a folder gives."""
    question = Question(Objective.LOAD, **asked)
    (found,) = recommend_load(read_served(folder, question), question)
    return found


def test_what_bears_most_is_shipped_with_its_margin_and_needs(tmp_path, capsys):
    """Far ahead, it is recommended; the next one bears less by the planted share."""
    folder = served(
        tmp_path / "s", {"onednn": [1000, 990, 1010, 1005, 995], "cpu-fused": [2000, 1990, 2010, 2005, 1995]}
    )
    found = answer(folder)
    assert (found.verdict, found.variant, found.alike) == (Recommendation.RECOMMENDED, "cpu-fused", ("cpu-fused",))
    assert found.probability > 0.99
    assert found.rivals[0].excess.low < 2 < found.rivals[0].excess.high
    assert main(["recommend", str(folder), "--objective", "load", "--latency-bound", "20ms"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "sure to sustain the highest load under the bound (2000 queries/s)" in text
    assert "Next: onednn, which sustains 50 % less [" in text
    assert "needs a C++ compiler (once)" in text


def test_a_load_above_the_offline_rate_is_not_shipped(tmp_path):
    """However sure the searches are of it: one of the two figures is wrong, and both are told."""
    loads_of = {"onednn": [1000, 990, 1010, 1005, 995], "cpu-fused": [2000, 1990, 2010, 2005, 1995]}
    doubtful = {"offline_qps": 1100.0, "offline_qps_lo": 1050.0, "offline_qps_hi": 1150.0}
    found = answer(served(tmp_path / "s", loads_of, {"cpu-fused": doubtful}))
    assert (found.verdict, found.variant) == (Recommendation.UNCLEAR, "cpu-fused")
    assert "answers 1100 [1050, 1150] when all are there at once" in " ".join(found.notes)
    assert found.value == "~2000 queries/s"


@pytest.mark.parametrize(("share", "verdict"), [(0.4, 0), (0.5, 5), (1.0, 5)])
def test_a_first_place_from_disturbed_tests_is_not_shipped(tmp_path, capsys, share, verdict):
    """As with rounds: however far ahead it is, it is left open, and the command serves all that may win again."""
    loads_of = {"reference": [500, 510], "onednn": [1000, 990, 1010], "cpu-fused": [2000, 1990, 2010]}
    folder = served(tmp_path / "s", loads_of, {"cpu-fused": {"disturbed_share": share}})
    assert main(["recommend", str(folder), "--objective", "load"]) == verdict
    text = " ".join(capsys.readouterr().out.split())
    said = f"- Doubt about cpu-fused: something else used the machine during {100 * share:.0f} % of its tests."
    assert (said in text) is bool(verdict)
    again = "--workload seed --variant onednn --variant cpu-fused --bound p99=20ms --repeats 3"
    assert (again in text) is bool(verdict)


def test_the_only_variant_is_shipped_whatever_disturbed_its_tests(tmp_path):
    """There is nothing to choose; the doubt is told."""
    loads_of = {"cpu-fused": [2000, 1990, 2010]}
    found = answer(served(tmp_path / "s", loads_of, {"cpu-fused": {"disturbed_share": 1.0}}))
    assert (found.verdict, found.variant) == (Recommendation.RECOMMENDED, "cpu-fused")
    assert found.notes == ("something else used the machine during 100 % of its tests",)


def test_the_command_for_more_repeats_serves_in_the_same_way(tmp_path):
    """By step, by decoding, in buckets: other ways would answer another question."""
    step, buckets = {"batching": "step", "mode": "decode"}, {"lengths": "bucketed"}
    alike = {"onednn": [1000, 1200, 900], "cpu-fused": [1010, 1190, 920]}
    found = answer(served(tmp_path / "step", alike, dict.fromkeys(alike, step)), mode="decode")
    assert "--workload seed --mode decode --batching step --variant" in " ".join(found.clearer.words)
    found = answer(served(tmp_path / "buckets", alike, dict.fromkeys(alike, buckets)))
    assert "--workload seed --lengths bucketed --variant" in " ".join(found.clearer.words)


def test_those_that_cannot_be_told_apart_are_named_with_the_cheapest(tmp_path):
    """Unclear, until more repeats decide: the command for them is there."""
    folder = served(
        tmp_path / "s",
        {"onednn": [900, 1100, 1000], "onnxruntime": [950, 1150, 1020], "cpu-fused": [300, 310, 305]},
    )
    found = answer(folder)
    assert (found.verdict, set(found.alike)) == (Recommendation.UNCLEAR, {"onednn", "onnxruntime"})
    assert found.cheapest == "onednn"
    words = found.clearer.words
    assert words[words.index("--bound") + 1] == "p99=20ms"
    assert "cpu-fused" not in words
    assert int(words[-1]) > 3


def test_a_single_repeat_has_no_probability(tmp_path):
    """So nothing is recommended."""
    found = answer(served(tmp_path / "s", {"onednn": [1000], "cpu-fused": [2000]}))
    assert (found.verdict, found.variant, found.probability) == (Recommendation.UNCLEAR, "cpu-fused", None)
    assert "single repeat" in found.notes[0]
    assert found.clearer.words[-2:] == ("--repeats", "5")


def test_another_bound_than_the_measured_one_is_not_answered(tmp_path, capsys):
    """It says what was searched for, what tests saw of this one, and the command that measures it."""
    folder = served(tmp_path / "s", {"onednn": [1000, 1010], "cpu-fused": [2000, 2010]})
    assert main(["recommend", str(folder), "--objective", "load", "--latency-bound", "16ms"]) == 5
    text = " ".join(capsys.readouterr().out.split())
    assert "the search was for p99 20.0 ms, not for 16.0 ms" in text
    assert "onednn kept 16.0 ms in a test at 1010 queries/s and exceeded it in one at 1050" in text
    assert "--variant onednn --variant cpu-fused --bound p99=16ms --repeats 2" in text


def test_a_model_of_ones_own_is_measured_again_by_its_options(tmp_path):
    """Its workload's name means nothing without the file."""
    folder = served(tmp_path / "s", {"onednn": [1000], "cpu-fused": [2000]}, {})
    facts = json.loads((folder / "environment.json").read_text())
    facts["threads"]["workers"][VARIABLE] = json.dumps({"model": "/m.py:build", "inputs": "/m.py:some", "trace": ""})
    (folder / "environment.json").write_text(json.dumps(facts))
    records = (folder / serving.FILE).read_text()
    (folder / serving.FILE).write_text(records.replace('"seed"', '"own:m"'))
    words = answer(folder).clearer.words
    assert words[4:8] == ("--model", "/m.py:build", "--inputs", "/m.py:some")
    assert "--workload" not in words


def test_where_nothing_meets_the_bound_the_nearest_is_named(tmp_path, capsys):
    """With how much it misses it by."""
    folder = served(tmp_path / "s", {"onednn": [], "cpu-fused": []})
    alone = "single-stream"
    serving.append_tests(folder, [row("onednn", alone, 5, 0.05, "held"), row("cpu-fused", "search", 7, 0.03)])
    assert main(["recommend", str(folder), "--objective", "load"]) == 3
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "No variant is within the bounds (p99 at most 20.0 ms). The nearest is cpu-fused: p99 30.0 ms is 50 % over"
        in text
    )
    assert "50 % over the bound of 20.0 ms, even at 7 queries/s" in text


def test_tests_that_loadgen_lets_not_count_give_no_answer(tmp_path):
    """An invalid test says nothing of the bound, however quick its queries were."""
    reason = "no valid test even at 7 queries per second: LoadGen: not satisfied: Min queries"
    folder = served(tmp_path / "s", {"onednn": []}, {"onednn": {"reason": reason}})
    serving.append_tests(folder, [row("onednn", "search", 7, 0.001, "invalid")])
    found = answer(folder)
    assert (found.verdict, found.variant) == (Recommendation.UNCLEAR, None)
    assert found.left_out == {"onednn": reason}


def test_a_variant_with_one_repeat_keeps_no_answer_from_those_with_several(tmp_path):
    """It is left out, with what it bore."""
    found = answer(served(tmp_path / "s", {"cpu-fused": [2000, 2005, 1995], "onednn": [700]}))
    assert (found.variant, found.verdict) == ("cpu-fused", Recommendation.RECOMMENDED)
    assert found.left_out["onednn"] == "700 queries/s in a single repeat"


@pytest.mark.parametrize(("load", "verdict"), [(3000, Recommendation.UNCLEAR), (500, Recommendation.RECOMMENDED)])
def test_a_search_that_ended_without_a_limit_may_be_the_best(tmp_path, load, verdict):
    """Where it held the bound at as much as the best bears, it is not known that the best is one."""
    folder = served(tmp_path / "s", {"cpu-fused": [2000, 2005, 1995], "onednn": []}, {"onednn": {"reason": "all held"}})
    serving.append_tests(folder, [row("onednn", "repeat 1", load, 0.01)])
    found = answer(folder)
    assert (found.variant, found.verdict) == ("cpu-fused", verdict)
    assert ("`onednn` held the bound at 3000 queries/s" in " ".join(found.notes)) == (load == 3000)


def test_a_variant_that_the_gate_refused_is_left_out(tmp_path):
    """However much it bore; and one with too large an error too."""
    wrong = {"status": Status.PARITY_FAILED, "reason": "planted"}
    folder = served(
        tmp_path / "s",
        {"onednn": [900, 910], "cpu-fused": [5000, 5010], "onnxruntime": [7000, 7010]},
        {"cpu-fused": wrong, "onnxruntime": {"parity_error": 0.1}, "onednn": {"parity_error": 1e-7}},
    )
    found = answer(folder, max_error=1e-3)
    assert found.variant == "onednn"
    assert "parity-failed" in found.left_out["cpu-fused"]
    assert "error 1.0e-01 is 100 times" in found.left_out["onnxruntime"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--objective", "load"], "python -m bench serve --out {} --bound p99=20ms --workload seed --variant onednn"),
        (["--objective", "load", "--latency-bound", "5ms"], "--bound p99=5ms"),
    ],
)
def test_a_plain_run_says_which_command_serves_it(tmp_path, capsys, words, told):
    """In one line; exit code 2."""
    folder = make_run(tmp_path / "run", speedups={"reference": 1.0, "onednn": 2.0})
    assert main(["recommend", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert told.format(folder) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workload", "other"], "has no serving records of other"),
        (["--calls", "100"], "leave it out"),
        (["--apply", "new.py"], "leave --objective out"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, words, told):
    """What was wrong and what to do; exit code 2."""
    folder = served(tmp_path / "s", {"onednn": [900, 910]})
    assert main(["recommend", str(folder), "--objective", "load", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_folder_that_was_only_served_says_how_to_ask_it(tmp_path, capsys):
    """The other objectives look at rounds, of which it has none."""
    folder = served(tmp_path / "s", {"onednn": [900, 910]})
    assert main(["recommend", str(folder)]) == 2
    assert f"python -m bench recommend {folder} --objective load" in capsys.readouterr().err


def test_another_scenario_is_refused(tmp_path, capsys):
    """Offline has no bound."""
    folder = served(tmp_path / "s", {"onednn": [900, 910]}, {"onednn": {"scenario": "offline"}})
    assert main(["recommend", str(folder), "--objective", "load"]) == 2
    assert "served in the scenario offline" in capsys.readouterr().err


def found_in(variant: str, lows: np.ndarray, step: float) -> list[ServingTest]:
    """The tests at the two ends of each repeat."""
    return [
        ServingTest("seed", variant, f"repeat {number}", load, verdict, 0.01, 1.0, "")
        for number, low in enumerate(lows, start=1)
        for load, verdict in ((low, "held"), (low * step, "broken"))
    ]


@pytest.mark.parametrize("repeats", [3, 5])
def test_the_stated_probability_is_right(repeats):
    """Over many servings of variants with a known best one, it bears most as often as was stated, in bins."""
    generator = np.random.default_rng(5)
    noise, step = 0.1, 1.06
    stated, right = [], []
    for _ in range(400):
        truth = generator.normal(0, 0.1, 2)
        drawn = []
        for place, level in enumerate(truth):
            bore = np.exp(level + generator.normal(0, noise, repeats))
            # The search stops at a load somewhere in the step below what is borne.
            drawn.append(loads(found_in(f"v{place}", bore / step ** generator.random(repeats), step), 400))
        best = int(np.median(drawn[1]) > np.median(drawn[0]))
        stated.append(float(np.mean(drawn[best] >= drawn[1 - best])))
        right.append(best == truth.argmax())
    stated, right = np.array(stated), np.array(right)
    assert abs(right.mean() - stated.mean()) < 0.08
    assert right[stated > 0.95].mean() > 0.93
    assert abs(right[stated < 0.8].mean() - stated[stated < 0.8].mean()) < 0.12


def test_a_repeat_ends_between_the_load_that_held_and_the_one_that_broke():
    """One whose limit is an invalid test, or that held everywhere, has no end."""
    tests = found_in("v", np.array([100.0]), 1.1)
    tests += [
        ServingTest("seed", "v", "repeat 1", load, v, 0.01, 1.0, "") for load, v in ((90, "held"), (200, "broken"))
    ]
    tests += [
        ServingTest("seed", "v", "repeat 2", load, v, 0.01, 1.0, "") for load, v in ((90, "held"), (95, "invalid"))
    ]
    tests += [ServingTest("seed", "v", "repeat 3", 90, "held", 0.01, 1.0, "")]
    assert ends(tests) == {1: (100.0, pytest.approx(110.0))}
