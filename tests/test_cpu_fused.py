"""The fused CPU kernel against the float64 loop, at every vector width this machine can run; and its packed weights."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("hypothesis")

import torch
import torch.utils.checkpoint
from cpu_builds import LITTLE, NARROWEST, PARTS, TARGETS, built_for
from hypothesis import given
from hypothesis import strategies as st
from planted_defects import LAYER, RECURRENCE
from planted_kernels import DEFECT, NOTHING, KernelPrograms, changed_sources, planted_sources
from recurrences import DEVICE, Sizes, assert_close, errors_backward, errors_forward, recurrences
from strategies import Shape, shapes

from kernels import LSTM
from kernels.common.recurrence import LayerOptions, Problem
from kernels.cpu import build, fused, layer, packing, teams
from kernels.tools import sanitize

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the test kit puts its tensors on the GPU here")

PROBLEMS = recurrences(
    hidden=st.sampled_from([1, 5, 15, 16, 17, 33, 64, 70, 130]),
    dtypes=(torch.float32,),
    batch=st.sampled_from([1, 2, 3, 6, 7, 8, 17, 33]),
    resets=st.booleans(),
)


def _options(lstm: torch.nn.RNNBase) -> LayerOptions:
    """Options that the layers of a module share."""
    directions = 2 if lstm.bidirectional else 1
    return LayerOptions(lstm.hidden_size, directions, lstm.batch_first, "cpu-fused", torch.float32, tf32=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(sizes=PROBLEMS, save=st.booleans())
def test_forward_is_the_loop_s(target: str, threads: int, sizes: Sizes, save: bool) -> None:
    """Outputs, states and what is saved are those of the equations, whatever the vectors and the team."""
    with built_for(target, threads):
        assert_close(errors_forward(sizes, fused, save=save), torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(sizes=PROBLEMS, final=st.booleans())
def test_backward_is_the_loop_s(target: str, threads: int, sizes: Sizes, final: bool) -> None:
    """Gradients are those of the equations, whatever the vectors and the team."""
    with built_for(target, threads):
        assert_close(errors_backward(sizes, fused, final=final), torch.float32)


@pytest.mark.parametrize(
    ("batch", "hidden", "expected"),
    [(1, 64, (1, True)), (1, 256, (8, False)), (4, 128, (8, False)), (64, 64, (8, True))],
)
def test_threads_meet_only_where_a_step_is_worth_it(batch: int, hidden: int, expected: tuple[int, bool]) -> None:
    """A small step stays with one thread however many steps there are; rows are shared out without meeting."""
    with mock.patch.object(torch, "get_num_threads", return_value=8), mock.patch.object(teams, "cores", return_value=8):
        assert teams.team(teams.work(batch, 1000, hidden), batch, hidden) == expected


def test_long_sequences_hold() -> None:
    """200 steps with two threads that meet at each leave no more error than two steps do."""
    with built_for(build.NATIVE, 2):
        sizes = Sizes(batch=2, steps=200, hidden=48, lengths=(200, 77))
        assert_close(errors_forward(sizes, fused), torch.float32)
        assert_close(errors_backward(sizes, fused), torch.float32)


@pytest.mark.skipif(NARROWEST not in TARGETS or "avx" not in build.cpu_flags().split(), reason="no AVX here")
def test_avx_without_avx2_is_served() -> None:
    """Vectors of eight without the instructions that came with AVX2, as Sandy Bridge has them."""
    with built_for(f"-march=x86-64 -mavx {LITTLE}", 2):
        for sizes in (Sizes(batch=1, steps=4, hidden=19), Sizes(batch=5, steps=3, hidden=11)):
            assert_close(errors_forward(sizes, fused), torch.float32)
            assert_close(errors_backward(sizes, fused), torch.float32)


@given(shape=shapes(), batch_first=st.booleans(), state=st.booleans(), bias=st.booleans())
def test_a_whole_layer_is_torch_s(shape: Shape, batch_first: bool, state: bool, bias: bool) -> None:
    """With the projection inside, for few rows, or before, a layer gives what torch.nn.LSTM gives."""
    options = shape.options | {"num_layers": 1, "batch_first": batch_first}
    lstm = torch.nn.LSTM(**options, bias=bias)
    x, (h0, c0) = dataclasses.replace(shape, num_layers=1).tensors(torch.float32)
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        expected, (h_n, c_n) = lstm(x, (h0, c0) if state else None)
        own = lstm.all_weights
        found = fused.run(
            x,
            [tuple(parameters) for parameters in own],
            h0 if state else None,
            c0 if state else None,
            None,
            None,
            _options(lstm),
            gradients=False,
        )
    for value, truth in zip(found, (expected, h_n, c_n), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(batch=st.integers(6, 40), steps=st.integers(1, 6), features=st.integers(1, 12), hidden=st.integers(1, 40))
def test_few_features_are_projected_in_the_step(
    target: str, threads: int, batch: int, steps: int, features: int, hidden: int
) -> None:
    """Many rows of few features, which no pass before the steps projects, give what the equations in float64 give."""
    truth = LSTM(features, hidden, 2, bidirectional=True, implementation="loop").double()
    ours = LSTM(features, hidden, 2, bidirectional=True, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    generator = torch.Generator().manual_seed(batch * steps)
    x = torch.randn(steps, batch, features, generator=generator)
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
    with built_for(target, threads), torch.inference_mode():
        found, state = ours(x, None, lengths)
        expected, expected_state = truth(x.double(), None, lengths)
    for value, right in zip((found, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@given(
    batch=st.integers(1, 5),
    steps=st.integers(20, 60),
    features=st.integers(1, 20),
    hidden=st.sampled_from([1, 17, 33, 40]),
    batch_first=st.booleans(),
    masked=st.booleans(),
)
def test_long_sequences_are_projected_a_part_at_a_time(
    threads: int, batch: int, steps: int, features: int, hidden: int, batch_first: bool, masked: bool
) -> None:
    """If memory for the projection holds only a few of the steps, both directions are those of the equations."""
    truth = LSTM(features, hidden, 2, bidirectional=True, batch_first=batch_first, implementation="loop").double()
    ours = LSTM(features, hidden, 2, bidirectional=True, batch_first=batch_first, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    generator = torch.Generator().manual_seed(batch * steps)
    x = torch.randn(batch, steps, features, generator=generator)
    x = x if batch_first else x.transpose(0, 1)
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator) if masked else None
    with built_for(PARTS, threads), torch.inference_mode():
        found, state = ours(x, None, lengths)
        expected, expected_state = truth(x.double(), None, lengths)
    for value, right in zip((found, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2])
@given(
    shape=shapes(with_lengths=True), features=st.integers(1, 70), hidden=st.integers(1, 40), bias=st.booleans(),
    batch_first=st.booleans(), state=st.booleans(),
)  # fmt: skip
def test_the_gradients_of_a_layer_are_the_loop_s(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, threads: int, shape: Shape, features: int, hidden: int, bias: bool, batch_first: bool, state: bool
) -> None:
    """Gradients of input, states and every parameter are those of the equations in float64, lengths or none."""
    options = {"bidirectional": shape.bidirectional, "batch_first": batch_first, "bias": bias}
    truth = LSTM(features, hidden, **options, implementation="loop").double()
    ours = LSTM(features, hidden, **options, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    generator = torch.Generator().manual_seed(shape.seed)
    sizes = (shape.batch, shape.steps) if batch_first else (shape.steps, shape.batch)
    x = torch.randn(*sizes, features, generator=generator)
    states = [torch.randn(shape.directions, shape.batch, hidden, generator=generator) for _ in range(2)]
    weights = torch.randn(*sizes, shape.directions * hidden, generator=generator)
    lengths = None if shape.lengths is None else torch.tensor(shape.lengths)
    found = []
    with built_for(target, threads):
        for lstm, dtype in ((truth, torch.float64), (ours, torch.float32)):
            leaves = [value.to(dtype).requires_grad_() for value in ((x, *states) if state else (x,))]
            output, (h_n, c_n) = lstm(leaves[0], tuple(leaves[1:]) if state else None, lengths)
            total = (output * weights.to(dtype)).sum() + h_n.sin().sum() + c_n.square().sum()
            found.append(torch.autograd.grad(total, [*leaves, *lstm.parameters()]))
    assert [choice.implementation for choice in ours.choices] == ["cpu-fused"]
    for value, expected in zip(found[1], found[0], strict=True):
        error = (value.double() - expected).norm() / max(float(expected.norm()), 0.1 * expected.numel() ** 0.5)
        assert error < 1e-4


@pytest.mark.parametrize(("storage", "least", "most"), [("bf16", 1e-4, 5e-3), ("int8", 1e-4, 2e-2)])
def test_weights_kept_in_fewer_bits_cost_what_their_rounding_does(storage: str, least: float, most: float) -> None:
    """The error is that of weights rounded to 8 bits of mantissa, or to 255 levels a row: not none, and not more."""
    for batch in (1, 7):
        errors = errors_forward(Sizes(batch=batch, steps=20, hidden=70), fused, save=False, storage=storage)
        assert least < errors["output"] < most


def test_lengths_beyond_the_steps_reach_no_other_memory() -> None:
    """Lengths in memory that others change may become more than the steps, which then count as all of them."""
    lstm, x = LSTM(3, 5, bidirectional=True), torch.randn(4, 2, 3)
    flat = list(lstm.parameters())
    with torch.no_grad():
        context = SimpleNamespace(
            save_for_backward=lambda *saved: context.saved.extend(saved),
            set_materialize_grads=lambda _: None,
            saved=[],
        )
        layer.DifferentiableLayer.forward(context, x, None, None, None, None, _options(lstm), *flat)
        output, record = context.saved[3:5]
        room = torch.full((5, 2, 10), float("nan"))
        room[:4] = output
        given = x, None, None, room[:4], record, (2**30).to_bytes(4, sys.byteorder) * 2, None
        found = layer._gradients(torch.ones(4, 2, 10), None, None, *given, _options(lstm), [True] * 14, *flat)
    expected = torch.autograd.grad(lstm(x)[0].sum(), flat)
    torch.testing.assert_close(found[3:], expected)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_weights_stay_broken_in_fewer_bits(storage: str, broken: float) -> None:
    """int8 has no NaN: a diverged model must not come out healthy."""
    lstm = LSTM(3, 5, implementation="cpu-fused", weight_storage=storage)
    with torch.no_grad():
        lstm.weight_ih_l0[7, 1] = broken  # of unit 2's forget gate
        output = lstm(torch.zeros(1, 1, 3))[0]
    assert output.flatten().isnan().tolist() == [False, False, True, False, False]


#: Errors of a recurrence whose rows have different lengths, with resets and without.
_RECURRENCE = """
from kernels.cpu import fused
from recurrences import Sizes, errors_backward, errors_forward
errors = []
for resets in (False, True):
    sizes = Sizes(batch=3, steps=5, hidden=21, lengths=(5, 3, 0), resets=resets)
    errors += [*errors_forward(sizes, fused).values(), *errors_backward(sizes, fused).values()]
sys.exit(0 if all(error < 1e-3 for error in errors) else 7)
"""


@pytest.mark.parametrize("name", [NOTHING, *RECURRENCE])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip that such kernels are known for makes an error far beyond the tolerance, or a crash of its process."""
    code = programs.run_planted(_RECURRENCE, tmp_path, "recurrence", name)
    assert code == 0 if name == NOTHING else code not in (0, 1)


#: Outputs, states and gradients of a layer each way over different lengths, from given states, against the loop's.
_LAYER = """
import torch
from kernels.lstm import LSTM
torch.manual_seed(0)
errors = []
for batch, features in ((9, 3), (2, 30)):
    truth = LSTM(features, 21, bidirectional=True, implementation="loop").double()
    ours = LSTM(features, 21, bidirectional=True, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    x, state = torch.randn(6, batch, features), (torch.randn(2, batch, 21), torch.randn(2, batch, 21))
    lengths, by = torch.tensor([6, 2, 4, 1, 6, 3, 5, 2, 0])[:batch], torch.randn(6, batch, 42)
    found = []
    for lstm, dtype in ((truth, torch.float64), (ours, torch.float32)):
        leaf, hx = x.to(dtype).requires_grad_(), tuple(value.to(dtype) for value in state)
        output, (h, c) = lstm(leaf, hx, lengths)
        total = (output * by.to(dtype)).sum() + h.sum() + c.sum()
        found.append([output, h, c, *torch.autograd.grad(total, [leaf, *lstm.parameters()])])
    for right, value in zip(*found):
        errors.append(float((value.double() - right).norm() / right.norm()))
sys.exit(0 if all(error < 1e-4 for error in errors) else 7)
"""


@pytest.mark.parametrize("name", [NOTHING, *LAYER])
def test_a_planted_defect_of_a_layer_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """So is each slip in what a layer adds to the recurrence: projection in the step, lengths, gradients of weights."""
    code = programs.run_planted(_LAYER, tmp_path, "layer", name)
    assert code == 0 if name == NOTHING else code not in (0, 1)


def test_a_team_may_be_smaller_than_asked_for() -> None:
    """If OpenMP gives fewer threads than asked for, the same is computed."""
    asked = "torch.get_num_threads = lambda: 3\nteams.WORTH_A_THREAD = teams.WORTH_A_MEETING = 1\n"
    code = "import sys\nimport torch\nfrom kernels.cpu import teams\n" + asked + _LAYER
    more = {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | more, check=False).returncode == 0


def test_checkpointing_may_recompute_a_layer() -> None:
    """torch.utils.checkpoint gives up what a layer kept and computes it again; each is asked for once."""
    lstm = LSTM(5, 7, implementation="cpu-fused")
    x = torch.randn(4, 3, 5, requires_grad=True)
    found = []
    for run in (lstm, functools.partial(torch.utils.checkpoint.checkpoint, lstm, use_reentrant=False)):
        output, _ = run(x)
        found.append(torch.autograd.grad(output.square().sum(), [x, *lstm.parameters()]))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_an_in_place_change_is_noticed() -> None:
    """Weights changed by an optimizer, by copy_ or behind torch's back through .data are packed anew."""
    weight = torch.nn.Parameter(torch.randn(4 * 20, 20))
    before = packing.pack(weight, "forward")
    assert packing.pack(weight, "forward") is before
    with torch.no_grad():
        weight.add_(1.0)
    changed = packing.pack(weight, "forward")
    assert changed is not before
    assert not torch.equal(changed.values, before.values)
    weight.data.mul_(0.5)
    assert packing.pack(weight, "forward") is not changed


@given(
    shape=st.sampled_from([(8, 3), (80, 20), (512, 128), (1200, 300)]),
    at=st.integers(0, 2**31),
    change=st.floats(0.125, 1000, width=32),
)
def test_a_change_of_one_value_behind_torch_s_back_is_noticed(shape: tuple[int, int], at: int, change: float) -> None:
    """Any one value written through .data or NumPy, which raise no version, is packed anew."""
    weight = torch.nn.Parameter(torch.randn(shape))
    before = packing.pack(weight, "forward")
    weight.detach().numpy().reshape(-1)[at % weight.numel()] += change
    after = packing.pack(weight, "forward")
    assert after is not before
    assert packing.pack(weight, "forward", whole=False) is after
    assert packing.pack(weight, "forward") is after


def test_freed_weights_are_not_taken_for_new_ones() -> None:
    """Another tensor at the address of a freed one, in the same version, gets its own packing."""
    found = []
    for value in (1.0, 2.0):
        weight = torch.full((4 * 64, 64), value)
        # All samples alike would hide it, so they are made so.
        native = packing.library()
        with mock.patch.object(native, "mark", return_value=0), mock.patch.object(native, "mark_all", return_value=0):
            found.append(packing.pack(weight, "forward").values[0].item())
        del weight
    assert found == [1.0, 2.0]


def test_two_threads_may_run_at_once() -> None:
    """Concurrent calls give what each gives alone."""
    sizes = [Sizes(batch=2, steps=40, hidden=40, seed=seed) for seed in range(4)]
    worst: dict[int, float] = {}

    def work(index: int) -> None:
        worst[index] = max(max(errors_forward(sizes[index], fused).values()) for _ in range(10))

    team = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert sorted(worst) == [0, 1, 2, 3]
    assert max(worst.values()) < 1e-5


def test_what_it_does_not_take_is_refused_with_the_reason() -> None:
    """Other devices and types are named; a machine without a compiler is told to install one."""
    assert "CPU" in str(fused.refuses(Problem("cuda", torch.float32, 1, 1, 1)))
    assert "float16" in str(fused.refuses(Problem("cpu", torch.float16, 1, 1, 1)))
    assert fused.refuses(Problem("cpu", torch.float32, 1, 1, 1)) is None


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is one clear line, and not an exception out of a subprocess."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="install a C"):
        build.library("-O1")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's first error stands in the message, and nothing is left in the cache."""
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="error"):
        build.library("-O0 -DBROKEN")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_change_in_any_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library compiled from an older header is not taken for the kernel of now."""
    monkeypatch.setattr(build, "SOURCE", changed_sources("1.9875691500e-4f", "1.9875691500e-4f", tmp_path))
    before = build._fingerprint(["g++"])
    changed_sources("1.9875691500e-4f", "1.9875691501e-4f", tmp_path)
    assert build._fingerprint(["g++"]) != before


def test_several_processes_may_build_at_once(
    once: str, compiled: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """Four that start with an empty cache all get a library that works, and leave one file."""
    code = (
        f"import os\nos.environ['CXX'] = {once!r}\n"
        "children = []\n"
        "for _ in range(4):\n"
        "    children.append(os.fork())\n"
        "    if not children[-1]:\n"
        "        os._exit(build.library('-O0').lanes() != 4)\n"
        "sys.exit(sum(os.waitpid(child, 0)[1] for child in children))\n"
    )
    assert programs.run(code, tmp_path, cache=tmp_path) == 0
    assert [path.name for path in tmp_path.glob("lstm-*")] == [compiled.name]


def test_an_unwritable_cache_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written is named, with the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="SEQ2SEQ_KERNEL_CACHE"):
        build.library("-O1 -DUNWRITABLE")


#: A compiler that gives what it made once whenever it is asked again, and takes long enough to meet others.
_ONCE = """
for out; do :; done
if [ -f "$0.so" ]; then sleep 0.2; exec cp "$0.so" "$out"; fi
compiler "$@" && cp "$out" "$0.so"
"""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A command for CXX that compiles but once."""
    script = _ONCE.replace("compiler", shlex.join(build.compiler()), 1)
    return _compiler(tmp_path_factory.mktemp("compiler") / "once", script)


@pytest.fixture(scope="module")
def lanes(once: str) -> str:
    """A program that ends with the lanes of a library of its own."""
    return f"import os\nos.environ['CXX'] = {once!r}\nsys.exit(build.library('-O0').lanes())\n"


@pytest.fixture(scope="module")
def compiled(lanes: str, programs: KernelPrograms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in a cache."""
    folder = tmp_path_factory.mktemp("compiled")
    assert programs.run(lanes, folder, cache=folder) == 4
    (path,) = folder.glob("lstm-*")
    return path


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_a_damaged_library_is_built_anew(
    damage: str, compiled: Path, lanes: str, tmp_path: Path, programs: KernelPrograms
) -> None:
    """A library damaged by a power cut, or another in its place, is never loaded: that could kill the process."""
    content = compiled.read_bytes()
    path = tmp_path / compiled.name
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "other": content[::-1]}[damage])
    assert programs.run(lanes, tmp_path, cache=tmp_path) == 4
    assert [one.read_bytes() for one in tmp_path.glob("lstm-*")] == [content]


def test_a_cache_may_be_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative cache is a folder, also where its libraries' names have none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", ".")
    assert build.library("-O0 -DRELATIVE").lanes() == 4
    assert len(list(tmp_path.glob("*.so"))) == 1


def _compiler(path: Path, script: str) -> str:
    """A command for CXX that runs a script of the shell and notes each call, but for the version, in `calls`."""
    path.mkdir()
    command = path / "c++"
    calls = f"[ \"$1\" = --version ] && exit 0\necho >> '{path / 'calls'}'\n"
    command.write_text(f"#!/bin/sh\n{calls}{script}\n", encoding="utf-8")
    command.chmod(0o755)
    return f"'{command}'"


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 3", "ended with 3"), ("exit 0", "wrote nothing"), ('for out; do :; done; echo no > "$out"', "loaded")],
)
def test_a_failing_compiler_is_asked_once(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of each new shape asks whether the kernel can run; none but the first waits for the compiler."""
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", _compiler(tmp_path / "with a space", script))
    for _ in range(3):
        with pytest.raises(build.BuildError, match=said):
            build.library(f"-O1 -DFAILS={said.split(maxsplit=1)[0]}")
    assert (tmp_path / "with a space" / "calls").read_text(encoding="utf-8") == "\n"


@pytest.mark.parametrize("command", ["g++ 'unfinished", "/dev/null"])
def test_what_is_no_compiler_is_refused(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX that is no command is one clear line."""
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match=r"not a command|not on the PATH"):
        build.library(f"-O1 -DNONE={len(command)}")


_STEP, _PROJECTION = "if (!a->by_rows", "if (shared"
_WAIT = ") barrier.wait(thread, threads);"
#: What has each thread wait for the others, which `PLANTED` takes away.
BARRIERS = {
    "step": (_STEP + _WAIT, f"{_STEP} && !PLANTED{_WAIT}"),
    "projection": (_PROJECTION + _WAIT, f"{_PROJECTION} && !PLANTED{_WAIT}"),
}


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that checks for races, built once: a barrier is taken away as it runs."""
    folder = tmp_path_factory.mktemp("races")
    return sanitize.build(sanitize.RACES, folder / "check", planted_sources(BARRIERS, folder))


@pytest.mark.slow
def test_sanitizers_find_nothing(races: Path, tmp_path: Path) -> None:
    """No access out of bounds, no undefined behaviour and no data race over odd sizes and teams."""
    others = sanitize.CHECKS.keys() - {sanitize.RACES}
    for program in (*(sanitize.build(name, tmp_path / name) for name in others), races):
        passed, said = sanitize.run(program)
        assert passed, said


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BARRIERS)), ids=BARRIERS)
def test_a_missing_barrier_is_a_data_race(number: int, races: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer sees threads that do not wait for each other, so its silence means something."""
    monkeypatch.setenv(DEFECT, str(number))
    passed, said = sanitize.run(races)
    assert not passed
    assert "data race" in said
