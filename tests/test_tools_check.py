"""The check of kernels: what it must find in kernels with a defect, and a run of all of it in the interpreter."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import sys
from collections import Counter
from pathlib import Path
from subprocess import run
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, graphed_layers
from kernels.common.recurrence import loop_backward, loop_forward
from kernels.gpu.graph_cache import SIGHTINGS
from kernels.tools import check, check_work, process_pool, sanitize, tune
from kernels.tools import compile as compiling
from kernels.tools.check_work import CheckQuestion, work
from kernels.tools.problems import Sizes

ROOT = Path(__file__).parent.parent
TASK = CheckQuestion("parity", "cell", Sizes(3, 4, 5, directions=2, lengths=(0, 2, 4)), runs=5)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that is the loop, to be broken; it counts its calls."""
    fake = SimpleNamespace(calls=0, defect=None)

    def forward(args, config=None):
        del config
        fake.calls += 1
        loop_forward(args)
        if fake.defect is not None:
            fake.defect(args, fake.calls)

    def backward(args, config=None):
        del config
        fake.calls += 1
        loop_backward(args)
        if fake.defect is not None:
            fake.defect(args, fake.calls)

    fake.forward, fake.backward = forward, backward
    monkeypatch.setitem(sys.modules, "broken_kernel", fake)
    monkeypatch.setattr(check_work, "MODULES", {"cell": "broken_kernel"})
    return fake


@pytest.mark.parametrize("kind", ["parity", "repeat"])
@pytest.mark.parametrize("backward", [False, True])
def test_right_kernel_passes(kernel, kind, backward):
    assert work(dataclasses.replace(TASK, kind=kind, backward=backward)).worst < 1
    assert kernel.calls == (1 if kind == "parity" else 1 + TASK.runs)


@pytest.mark.parametrize("backward", [False, True])
def test_to_make_numbers_is_no_part_of_a_kernels_runs(kernel, monkeypatch, backward):
    """At full length that takes seconds, which would make a hang of what is only slow to ask about."""
    told = []
    monkeypatch.setattr(process_pool, "_TOLD", [lambda part: told.append((part, kernel.calls))])
    work(dataclasses.replace(TASK, kind="repeat", backward=backward))
    assert told == [("numbers", 0), ("runs", 0), ("numbers", 1), ("runs", 1)]


class CountedGraphs:
    """In the place of `graph_cache.Graphs`: a replay launches again, or leaves out what a broken graph leaves out."""

    def __init__(self, *, finds: bool = True, broken: bool = False) -> None:
        self.finds, self.broken, self.seen, self.captured, self.replayed = finds, broken, Counter(), 0, 0

    def run(self, launch, key, tensors, known=()) -> int:
        """Launch, from the third call of a key on as a replay."""
        del tensors, known
        # Whose parameters, and which pass: a key of a backward pass has settings and strides beside it.
        name = key[0] if isinstance(key, tuple) else key
        self.seen[name] += 1
        replays = self.finds and self.seen[name] > SIGHTINGS
        self.captured += replays and self.seen[name] == SIGHTINGS + 1
        self.replayed += replays
        if not (replays and self.broken):
            launch()
        return self.seen[name] - 1 if self.finds else 0

    def state(self) -> SimpleNamespace:
        """Counts."""
        return SimpleNamespace(captured=self.captured, replayed=self.replayed)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", ["right", "never", "broken"])
def test_the_modules_own_graphs_are_judged(monkeypatch, kernel, backward, case):
    """Right where they replay what launching computes; refused where they do not, and where nothing is replayed."""
    graphs = CountedGraphs(finds=case != "never", broken=case == "broken")
    kernel.refuses, kernel.configs = lambda *_, **__: None, lambda *_, **__: [None]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(check_work, "DEVICE", "cpu")
    monkeypatch.setattr(check_work.graph_cache, "state", graphs.state)
    monkeypatch.setattr(dispatch, "_module", lambda _: kernel)
    monkeypatch.setattr(graphed_layers.GraphedLayers.__init__, "__defaults__", (graphs,))
    dispatch.forget()
    task = CheckQuestion("replay", "cell", Sizes(3, 4, 5), backward=backward)
    try:
        if case == "broken":
            with pytest.raises(AssertionError, match="graph and module differ"):
                work(task)
        else:
            assert (work(task).worst <= 1) == (case == "right")
    finally:
        dispatch.forget()


def test_wrong_gate_is_found(kernel):
    """Two gates in each other's place are an error far beyond the limit, named."""
    kernel.defect = lambda args, _: args.gates.copy_(args.gates.roll(5, dims=3))
    verdict = work(TASK)
    assert (verdict.worst > 100, verdict.worst_name) == (True, "gates")


@pytest.mark.parametrize("name", ["grad_gates", "grad_h0", "grad_c0"])
def test_element_that_was_not_written_is_found(kernel, name):
    """One NaN left of those that filled the outputs is an infinite error."""
    kernel.defect = lambda args, _: getattr(args, name).view(-1)[-1:].fill_(float("nan"))
    assert work(dataclasses.replace(TASK, backward=True)).worst == float("inf")


def test_moving_error_is_found(kernel):
    """One bit in one run of many, within all limits, is a race."""

    def race(args, number):
        if number == 4:
            args.h_n.view(-1)[2] *= 1 + 2**-22

    kernel.defect = race
    with pytest.raises(AssertionError, match=r"run 3 of 5: 1 of 30 elements of h_n differ"):
        work(dataclasses.replace(TASK, kind="repeat"))


def test_random_recurrences_reach_every_feature():
    """Among a few hundred there is every combination of lengths, states, directions and memory order."""
    import random

    generator = random.Random(0)
    drawn = [check._random(generator, small=False) for _ in range(300)]
    features = {(one.lengths is None, one.state, one.directions, one.batch_first) for one in drawn}
    assert len(features) == 16
    assert any(one.lengths and 0 in one.lengths for one in drawn)


def test_each_kernel_is_tried_for_races_and_graphs():
    """Among the sizes at which runs are repeated there are some that each kernel takes, in both directions of time."""
    tasks = list(check._special(list(check.MODULES), 5, small=False))
    for name in check.MODULES:
        for backward in (False, True):
            kinds = {one.kind for one in tasks if (one.implementation, one.backward) == (name, backward)}
            assert kinds == {"repeat", "streams", "threads", "graph", "replay"}


def test_every_exchange_is_tried_on_streams_in_threads_and_in_a_graph():
    """Both ways in which programs wait for each other within a launch are, not the first choice alone."""
    tasks = [one for one in check._special(list(check.MODULES), 5, small=False) if one.implementation == "persistent"]
    for kind in ("repeat", "streams", "threads", "graph", "replay"):
        assert {one.config.sync for one in tasks if one.kind == kind} == {"barrier", "poll", "launch"}
    beside = [one for one in tasks if one.beside is not None]
    assert {one.config.sync for one in beside} >= {"barrier", "poll"}
    assert all(one.beside.sizes.hidden != one.sizes.hidden for one in beside)


def test_what_can_hang_comes_first():
    """The first turn repeats both exchanges at the size at which most programs wait, and begins with them in turns."""
    first = list(itertools.islice(check._special(list(check.MODULES), 5, small=False), check.SPECIAL_A_TURN))
    assert {one.implementation for one in first} == {"persistent"}
    assert {one.sizes.hidden for one in first[:4]} == {768}
    assert {one.config.sync for one in first[:3]} == {"barrier", "poll", "launch"}


def test_a_graph_runs_the_configuration_that_was_asked_for():
    """Within it dispatch takes the task's own, in its phase alone."""
    task = dataclasses.replace(TASK, config="asked for")
    problem = TASK.sizes.problem()
    usual = dispatch.choose_config
    with check_work._configured(task):
        assert dispatch.choose_config(problem, "cell", backward=False) == "asked for"
        assert dispatch.choose_config(problem, "cell", backward=True) != "asked for"
    assert dispatch.choose_config is usual


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's way, which a visible GPU forbids")
def test_whole_check_runs_in_the_interpreter(tmp_path):
    """All kernels are right at tiny sizes; lines go to the CSV file, the table comes last, then how to go on."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "kernels", "check", "--device", "cpu", "--runs", "2", "--time-limit"]
    for seconds in ("8", "90"):
        # On a busy machine the shorter time ends before each kernel had its turn.
        folder = tmp_path / seconds
        done = run([*command, seconds, "--out", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.stdout.startswith("no check ended within 8 s; raise --time-limit"):
            assert done.returncode == 1
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        with (folder / "check.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if len({(row["implementation"], row["phase"]) for row in rows}) == 3 * len(check.MODULES):
            break
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["implementation"] for row in rows} == {"cell", "sequence", "persistent"}
    assert {row["phase"] for row in rows} == {"inference", "forward", "backward"}
    assert done.stdout.splitlines()[0].startswith("| kind | kernel |")
    assert "--sanitize" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (check.main, ["--device", "cpu", "--time-limit", "nan"]),
        (check.main, ["--device", "cpu", "--timeout", "0"]),
        (tune.main, ["--timeout", "0"]),
        (sanitize.main, ["nonsense"]),
        (check.main, ["--device", "cpu", "--out", f"{__file__}/new"]),
        (tune.main, ["--device", "cpu", "--out", f"{__file__}/new"]),
        (compiling.main, ["--out", f"{__file__}/new.json"]),
    ],
)
def test_wrong_usage_is_told_and_nothing_runs(command, arguments, capsys):
    """A limit that is no time, and an argument that there is not, end with status 2 and a line that quotes them."""
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
