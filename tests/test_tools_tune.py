"""The tuner: fair turns, wrong candidates left out, tables that survive a kill; with a clock of its own."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels import measurements as table
from kernels.common.cudnn_precision import cudnn_precision
from kernels.common.recurrence import loop_backward, loop_forward
from kernels.tools import check_work, tune, tune_work
from kernels.tools.interleave import TRIAL_ROUNDS, WARM_CALLS, Call, interleave, quartiles
from kernels.tools.problems import Sizes
from kernels.tools.process_pool import WorkOutcome
from kernels.tools.tune_work import Candidate, Job, evaluate, measure


@dataclass(frozen=True)
class Config:
    """A configuration of a kernel that does not exist."""

    tile: int


class FakeClock:
    """Time passes as the calls say: a call's `run` returns its seconds; all become slower as the clock drifts."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.blocks = drift, list[tuple[Call, int]]()

    def time(self, call: Call, count: int) -> float:
        """Seconds a call."""
        self.blocks.append((call, count))
        return call.run() * (1 + self.drift * len(self.blocks))


def takes(seconds: float, group: str = "") -> Call:
    """A call that takes so long."""
    return Call(lambda: seconds, group=group)


def test_every_round_times_every_call_once():
    """A round is a permutation, and rounds differ in order."""
    calls = {name: takes(1e-3) for name in "abcd"}
    clock = FakeClock()
    times = interleave(calls, clock, rounds=6)
    assert {len(values) for values in times.values()} == {6}
    order = [call for call, _ in clock.blocks[(WARM_CALLS + 1) * len(calls) :]]
    rounds = [order[start : start + 4] for start in range(0, 24, 4)]
    assert all({id(call) for call in one} == {id(call) for call in calls.values()} for one in rounds)
    assert len({tuple(map(id, one)) for one in rounds}) > 1


def test_drift_does_not_decide():
    """If everything becomes tenfold slower on the way, equal calls still come out within a few percent."""
    times = interleave({"a": takes(1e-3), "b": takes(1e-3)}, FakeClock(drift=0.05), rounds=101)
    a, b = quartiles(times["a"])[1], quartiles(times["b"])[1]
    assert abs(a / b - 1) < 0.05


def test_hopeless_candidates_are_dropped_within_their_group():
    """A candidate far slower than the best of its kernel is not timed on; the best of a slow kernel is."""
    calls = {"fast": takes(1e-3, "one"), "slow": takes(2e-3, "one"), "other": takes(9e-3, "two")}
    times = interleave(calls, FakeClock(), rounds=10)
    assert {name: len(values) for name, values in times.items()} == {"fast": 10, "slow": TRIAL_ROUNDS, "other": 10}


def test_blocks_last_alike():
    """Short calls run in blocks, long ones alone."""
    clock = FakeClock()
    interleave({"short": takes(1e-4), "long": takes(1.0)}, clock, rounds=1, block_s=4e-3)
    assert sorted(count for _, count in clock.blocks[-2:]) == [1, 40]


def test_what_only_first_calls_cost_does_not_count():
    """A kernel that compiles, launches plainly and captures a graph at the third call is judged by what follows."""
    costs = iter([2.0, 0.1, 1.0])
    clock = FakeClock()
    times = interleave({"graph": Call(lambda: next(costs, 1e-4))}, clock, rounds=3, block_s=4e-3)
    assert clock.blocks[-1][1] == 40
    assert times["graph"] == [1e-4] * 3


def job(**changes) -> Job:
    """Two kernels at one shape, the second configuration of the first is the faster."""
    candidates = (
        Candidate("cell", Config(1), 0.1),
        Candidate("cell", Config(2), 0.2),
        Candidate("sequence", Config(3), 0.3),
    )
    base = Job(Sizes(16, 25, 512, dtype=torch.float16), tf32=False, phase="inference", candidates=candidates, rounds=5)
    return dataclasses.replace(base, **changes)


def test_entry_keeps_the_best_configuration_of_each_kernel():
    """Medians decide; torch's own LSTM, the products and what was left out stand beside."""
    calls = {
        "ours 0": takes(3e-3, "cell"), "ours 1": takes(2.5e-3, "cell"), "ours 2": takes(4e-3, "sequence"),
        "around": takes(5e-4), "vendor": takes(1e-3),
    }  # fmt: skip
    entry = evaluate(job(wrong=("cell Config(9): error",)), calls, FakeClock())
    assert {name: (timing.config, timing.time_s) for name, timing in entry.kernels.items()} == {
        "cell": ({"tile": 2}, 2.5e-3), "sequence": ({"tile": 3}, 4e-3),
    }  # fmt: skip
    assert (entry.around_s, entry.vendor_s, entry.vendor_float16_s) == (5e-4, 1e-3, 1e-3)
    assert (entry.key, entry.wrong) == (("inference", "float16", 16, 25, 512, 1), ("cell Config(9): error",))
    assert tune.line(entry).endswith(
        "cuDNN 1000.0, cuDNN float16 1000.0, cell 3000.0, sequence 4500.0 (products 500.0); left out: 1"
    )


class HostClock:
    """Runs every call, preparation included, and finds all of them equally fast."""

    def time(self, call: Call, count: int) -> float:
        """One second, whatever it was."""
        for _ in range(min(count, 2)):
            if call.prepare is not None:
                call.prepare()
            call.run()
        return 1.0


@pytest.fixture
def precision():
    """Put back what `measure` sets for its own process, and what was chosen meanwhile."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    dispatch.forget()
    with cudnn_precision("ieee"):
        yield
    products.fp32_precision = before
    dispatch.forget()


def kernel(**functions: Any) -> SimpleNamespace:
    """A kernel's module that serves everything, in one configuration."""
    return SimpleNamespace(refuses=lambda *_, **__: None, configs=lambda *_, **__: [Config(1)], **functions)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("phase", table.PHASES)
def test_what_is_timed_runs(monkeypatch, phase, directions):
    """Candidates, products and torch's own LSTM run in every phase, one and both ways, on tensors of the job's size."""
    fake = kernel(forward=lambda args, _: loop_forward(args), backward=lambda args, _: loop_backward(args))
    monkeypatch.setitem(sys.modules, "fake_kernel", fake)
    monkeypatch.setitem(tune_work.MODULES, "cell", "fake_kernel")
    candidate = Candidate("cell", Config(1), 0.0)
    asked = Job(Sizes(3, 4, 8, directions), tf32=False, phase=phase, candidates=(candidate,), rounds=2)
    entry = measure(asked, HostClock())
    assert (entry.key, entry.kernels["cell"].config) == ((phase, "float32", 3, 4, 8, directions), {"tile": 1})
    assert entry.vendor_s == entry.vendor_padded_s == entry.around_s == entry.kernels["cell"].module_s == 1.0
    assert entry.kernels["cell"].whole_quartiles_s(0.0) == (1.0, 1.0)


@pytest.mark.usefixtures("precision")
def test_ours_are_timed_where_torch_s_own_raises(monkeypatch):
    """A shape or type that torch's own LSTM does not take costs its figure alone, and the reason is written down."""
    fake = kernel(forward=lambda args, _: loop_forward(args))
    monkeypatch.setitem(sys.modules, "fake_kernel", fake)
    monkeypatch.setitem(tune_work.MODULES, "cell", "fake_kernel")

    def refuse(*_: object) -> None:
        msg = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
        raise RuntimeError(msg)

    monkeypatch.setattr(tune_work.nn.LSTM, "forward", refuse)
    asked = Job(Sizes(3, 4, 8), tf32=False, phase="forward", candidates=(Candidate("cell", Config(1), 0.0),), rounds=2)
    entry = measure(asked, HostClock())
    assert set(entry.kernels) == {"cell"}
    assert (entry.vendor_s, entry.vendor_float16_s, entry.vendor_padded_s) == (None, None, 1.0)
    assert entry.wrong == tuple(
        f"torch's own LSTM in {kind}: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED" for kind in ("float32", "float16")
    )


@pytest.mark.usefixtures("precision")
def test_output_that_is_not_written_at_full_size_is_not_timed(monkeypatch):
    """A kernel that is right at few steps and writes nothing at all of them is refused before any clock runs."""
    fake = SimpleNamespace(forward=lambda *_: None)
    monkeypatch.setitem(sys.modules, "fake_kernel", fake)
    monkeypatch.setitem(tune_work.MODULES, "cell", "fake_kernel")
    asked = Job(Sizes(3, 4, 8), tf32=False, phase="forward", candidates=(Candidate("cell", Config(1), 0.0),))
    with pytest.raises(RuntimeError, match="left output unwritten"):
        measure(asked, HostClock())


class HangError(Exception):
    """A part of the work, by name, that never ends."""


class InlinePool:
    """Does the work in this process."""

    def __init__(self, work, **_) -> None:
        self.work = work

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def run(self, items):
        """Outcomes in order; an item whose work raises is an error."""
        for item in items:
            try:
                yield WorkOutcome(item, "ok", self.work(item))
            except HangError as error:
                yield WorkOutcome(item, "hang", reason="no answer within 20 s", at=str(error))
            except RuntimeError as error:
                yield WorkOutcome(item, "error", reason=str(error))


@pytest.fixture
def racing():
    """Tiles of the candidates that do not give the same bits each time."""
    return set()


@pytest.fixture
def gpu(monkeypatch, racing):
    """A GPU by name alone: two candidates a phase, the second wrong; times by the batch."""

    def tasks(sizes, *, tf32, most):
        assert most > 1
        for backward, save in tune.PHASES.values():
            for tile in (1, 2):
                yield check_work.CheckQuestion("parity", "cell", sizes, backward, save, tf32, config=Config(tile))

    def work(task):
        if task.kind == "repeat" and task.config.tile in racing:
            msg = f"run 7 of {task.runs}: 1 of 3 elements of h_n differ from the first run"
            raise RuntimeError(msg)
        return check_work.CheckResult(worst=7.0 if task.config.tile == 2 else 0.5, text="gates 1e0")

    def measure(one: Job) -> table.MeasuredShape:
        calls = {f"ours {number}": takes(1e-3, "cell") for number in range(len(one.candidates))}
        return evaluate(one, calls | {"around": takes(1e-4), "vendor": takes(2e-3)}, FakeClock())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "children", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    facts = dict.fromkeys(tune.DEPENDS, "1")
    for name, value in (("Pool", InlinePool), ("_tasks", tasks), ("measure", measure), ("_facts", lambda _: facts)):
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(check_work, "work", work)
    return monkeypatch


def run(path, *arguments: str) -> int:
    """Tune with two shapes of one type."""
    return tune.main(["--out", str(path), "--type", "float16", *arguments])


def test_wrong_candidates_are_never_chosen(gpu, tmp_path, capsys):
    """A candidate that is not right is told, is written down, and is not timed."""
    gpu.setattr(tune, "QUICK", ((16, 16, 10, 1),))
    assert run(tmp_path / "t.json") == 0
    entries = table.read(tmp_path / "t.json").entries
    assert {entry.phase for entry in entries} == set(table.PHASES)
    for entry in entries:
        assert entry.kernels["cell"].config == {"tile": 1}
        assert entry.wrong == ("cell Config(tile=2): gates 1e0",)
    assert capsys.readouterr().out.count("LEFT OUT") == 3


def test_a_candidate_that_moves_is_never_chosen(gpu, racing, tmp_path, capsys):
    """A kernel that gives other bits in one of many full runs is left out, though each was right by itself."""
    gpu.setattr(tune, "QUICK", ((16, 16, 10, 1),))
    racing.add(1)
    assert run(tmp_path / "t.json") == 0
    for entry in table.read(tmp_path / "t.json").entries:
        assert not entry.kernels
        assert f"cell Config(tile=1): run 7 of {tune.REPEATS}: 1 of 3" in entry.wrong[1]
    assert capsys.readouterr().out.count("run 7 of") == 3


def test_kill_loses_nothing_and_a_second_call_goes_on(gpu, tmp_path):
    """Measurements before a kill are in the file, and are not repeated."""
    gpu.setattr(tune, "QUICK", ((16, 16, 10, 1), (16, 32, 10, 1)))
    measure, seen = tune.measure, []

    def killed(one):
        if one.sizes.hidden == 32:
            raise KeyboardInterrupt
        return measure(one)

    gpu.setattr(tune, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t.json")
    assert {entry.hidden_size for entry in table.read(tmp_path / "t.json").entries} == {16}
    gpu.setattr(tune, "measure", lambda one: seen.append(one.sizes.hidden) or measure(one))
    run(tmp_path / "t.json")
    assert set(seen) == {32}
    assert {entry.hidden_size for entry in table.read(tmp_path / "t.json").entries} == {16, 32}


@pytest.mark.parametrize(
    ("broken", "kept"),
    [
        ("ours 0", {"persistent": {"tile": 1}}),
        ("vendor", {"cell": {"tile": 1}, "persistent": {"tile": 1}}),
        ("module cell", {"cell": {"tile": 1}, "persistent": {"tile": 1}}),
        ("around", {}),
        ("", {}),
    ],
)
def test_what_hangs_while_it_is_timed_is_left_out_alone(gpu, tmp_path, capsys, broken, kept):
    """It is tried once a phase; all other parts are timed, unless nothing can be told without it."""
    gpu.setattr(tune, "QUICK", ((16, 16, 10, 1),))
    tasks, measure, tried = tune._tasks, tune.measure, []

    def both(sizes, *, tf32, most):
        for task in tasks(sizes, tf32=tf32, most=most):
            yield from (task, dataclasses.replace(task, implementation="persistent"))

    def hang(one):
        parts = [f"ours {number}" for number, _ in enumerate(one.candidates)] + ["around", "vendor", "module cell", ""]
        there = broken in parts and broken not in one.left_out and (broken[:4] != "ours" or len(one.candidates) > 1)
        tried.append(there)
        if there:
            raise HangError(broken)
        return measure(one)

    gpu.setattr(tune, "_tasks", both)
    gpu.setattr(tune, "measure", hang)
    run(tmp_path / "t.json")
    entries = table.read(tmp_path / "t.json").entries
    assert [{name: one.config for name, one in entry.kernels.items()} for entry in entries] == [kept] * (3 * bool(kept))
    assert sum(tried) == 3
    out = capsys.readouterr().out
    assert out.count("no answer within 20 s") == (3 if not kept else 6)
    for entry in entries:
        (text,) = [text for text in entry.wrong if "no answer" in text]
        assert text.startswith("cell Config(tile=1): no answer" if broken == "ours 0" else f"{broken}: no answer")


def test_the_time_limit_stops_between_shapes(gpu, tmp_path, capsys):
    gpu.setattr(tune, "QUICK", ((16, 16, 10, 1), (16, 32, 10, 1)))
    run(tmp_path / "t.json", "--time-limit", "1e-9")
    assert "2 shapes are left" in capsys.readouterr().out


def test_figures_of_other_kernels_are_not_kept(tmp_path):
    """A change of versions or of the kernels empties the table; another GPU's table is not overwritten."""
    path, facts = tmp_path / "t.json", dict.fromkeys(tune.DEPENDS, "1")
    entry = evaluate(job(candidates=()), {"around": takes(1.0), "vendor": takes(1.0)}, FakeClock())
    table.write(path, table.MeasuredTable("one", (entry,), facts))
    assert tune.start(path, "one", facts, again=False).entries == (entry,)
    assert tune.start(path, "one", facts, again=True).entries == ()
    for name in tune.DEPENDS:
        assert tune.start(path, "one", facts | {name: "2"}, again=False).entries == ()
    with pytest.raises(ValueError, match="give another --out"):
        tune.start(path, "other", facts, again=False)


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--device", "cpu"], "needs --out"), (["--device", "cuda"], "sees no GPU")]
)
def test_the_interpreter_s_times_are_not_for_auto(arguments, said, monkeypatch, capsys):
    """Without a file of its own the table would be looked up as any GPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_table_of_another_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    """It is not overwritten, and the line says how to keep both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "table.json"
    table.write(path, table.MeasuredTable("some GPU"))
    before = path.read_bytes()
    assert tune.main(["--device", "cpu", "--out", str(path)]) == 2
    said = "is of some GPU, and here is Triton's interpreter; give another --out"
    assert capsys.readouterr().err == f"error: {path} {said}\n"
    assert path.read_bytes() == before


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_shapes_begin_with_the_quick_ones():
    """Every type of the quick shapes comes before any other shape, and no shape comes twice."""
    plan = list(tune._plan(tune._options(["--shapes", "all"])))
    quick = list(tune._plan(tune._options([])))
    assert plan[: len(quick)] == quick
    assert len(set(plan)) == len(plan) > len(quick)


def test_facts_name_what_figures_depend_on():
    """Every fact by which old figures are refused is written down, the kernels' sources among them."""
    pytest.importorskip("triton")
    facts = tune._facts("abc")
    assert set(tune.DEPENDS) <= set(facts)
    assert (facts["commit"], len(facts["kernels"])) == ("abc", 12)
