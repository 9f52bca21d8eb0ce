"""Weights of the CPU kernel in bf16 and int8: each kind of instructions computes what its arithmetic says, exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import numpy as np
import torch
from cpu_builds import KEPT, LITTLE, NARROW, NARROW_VNNI, NO_VNNI, QUICK, built_for
from hypothesis import given
from hypothesis import strategies as st
from recurrences import DEVICE, Sizes, errors_forward, recurrences
from torch import Tensor

from kernels import LSTM
from kernels.cpu import build, fused
from kernels.cpu.build import library
from kernels.cpu.packing import STORAGE, TRAINED

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

#: Errors of outputs and states against truth: the roundoff of a weight, at most, and what steps add to it.
ALLOWED = {"bf16": 1e-2, "int8": 3e-2, "w8a8": 4e-2, "split": 3e-5}
HIDDEN = st.sampled_from([1, 3, 15, 16, 17, 33, 70, 130])
#: Stands for h where inputs have 16 bits: it has 8, without VNNI 7, and 16 where the walk by tiles of bytes serves.
STATE_BITS = 8
#: Instructions that multiply in integers, with VNNI and without.
VNNI, WITHOUT_VNNI = ("amx-int8", "avx512-vnni", "avx-vnni"), ("avx512-int8", "avx2-int8")


def _rounded(row: Tensor, largest: int) -> Tensor:
    """Rows of float32 as integers times a scale per row, in float64, rounded as the kernel does it."""
    most = row.abs().amax(-1, keepdim=True)
    # Two tensors are divided, as a number over a tensor is its inverse times the number, with two roundings.
    by = (torch.full_like(most, largest) / most).where(most > 1e-30, torch.zeros(()))
    return (row * by).round().double() * (most.double() / largest)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two bf16 numbers that float32 is split into, in float64."""
    high = x.bfloat16()
    return high.double(), (x - high.float()).bfloat16().double()


def _product(x: Tensor, weight: Tensor, storage: str, bits: int, instructions: str) -> Tensor:
    """Rows times a matrix with factors rounded as the kernel does it, in float64."""
    if storage == "split":
        (high, low), (weight_high, weight_low) = _parts(x), _parts(weight)
        return (high + low) @ (weight_high + weight_low).T - low @ weight_low.T
    return _factors(x, storage, bits, instructions) @ _weights(weight, storage).T


def _weights(weight: Tensor, storage: str) -> Tensor:
    """A matrix as it is kept, in float64."""
    if storage == "bf16":
        return weight.bfloat16().double()
    most = weight.abs().amax(1, keepdim=True)
    return (weight / most.where(most > 0, torch.ones(())) * 127).round().double() * (most.double() / 127)


def _factors(x: Tensor, storage: str, bits: int, instructions: str) -> Tensor:
    """Inputs as they are multiplied, in float64."""
    if instructions.split(" ", maxsplit=1)[0] in {"avx512-bf16", "amx-bf16"}:
        return x.bfloat16().double()
    if _two_byte_state(storage, len(x), instructions) and bits == STATE_BITS:
        return _rounded(x, 32512)
    if instructions.startswith(VNNI):
        return _rounded(x, 127 if bits == STATE_BITS or storage == "w8a8" else 32767)
    if instructions in WITHOUT_VNNI:
        return _rounded(x, 64 if bits == STATE_BITS or storage == "w8a8" else _levels(x.size(-1)))
    assert instructions.endswith(("-fma", "neon", "generic"))
    return x.double()


def _levels(depth: int) -> int:
    """Largest integer of an input without VNNI: sums of `depth` products with weights stay in 32 bits."""
    return min(32767, (2**31 - 1) // (127 * depth))


def _two_byte_state(storage: str, batch: int, instructions: str) -> bool:
    """Whether the walk by tiles of bytes serves a call, whose h has two bytes a number."""
    return storage == "int8" and instructions == "amx-int8" and batch >= 4  # `LEAST` of byte_tiles.h


def _step(
    lstm: LSTM, x: Tensor, h: Tensor, c: Tensor, instructions: str, *, given: bool = True
) -> tuple[Tensor, Tensor]:
    """One step of one layer by the equations, with factors rounded as the kernel does it and nothing else.

    A state that is not given but the kernel's own has a fixed scale where it has two bytes a number.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (value.detach() for value in lstm.parameters())
    storage = lstm.weight_storage
    gates = _product(x, weight_ih, storage, 16, instructions) + bias_ih + bias_hh
    if not given and _two_byte_state(storage, len(x), instructions):
        gates = gates + (h * 32512).round().double() / 32512 @ _weights(weight_hh, storage).T
    else:
        gates = gates + _product(h, weight_hh, storage, STATE_BITS, instructions)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _made(features: int, hidden: int, storage: str, layers: int = 1, **options: bool) -> LSTM:
    return LSTM(features, hidden, layers, implementation="cpu-fused", weight_storage=storage, **options)


def _instructions(target: str, storage: str) -> str:
    with built_for(target, 1):
        return fused.instructions(storage)


@pytest.mark.parametrize(("target", "storage"), KEPT)
@given(
    batch=st.integers(1, 14), features=st.integers(1, 40), hidden=HIDDEN, threads=st.integers(1, 3),
    size=st.sampled_from([1.0, 100.0, 1e-3]), steps=st.sampled_from([1, 2, 12]), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_step_is_its_arithmetic(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, storage: str, batch: int, features: int, hidden: int, threads: int, size: float, steps: int, seed: int
) -> None:
    """From any state, of any size, a step errs by the rounding of its factors alone: sums are right to float32.

    So does the first of several.
    """
    torch.manual_seed(seed)
    lstm = _made(features, hidden, storage)
    x, h, c = size * torch.randn(batch, features), size * torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
    expected, cell = _step(lstm, x, h[0], c[0], _instructions(target, storage))
    with built_for(target, threads), torch.inference_mode():
        output = lstm(x.repeat(steps, 1, 1), (h, c))[0][0]
        found = lstm.step(x, (h, c))
    # Of gates as large as these sums of float32 err by so much.
    allowed = max(2e-6, 3e-7 * size * hidden**0.5)
    for value, truth in ((output, expected), (found, expected), (h[0], expected), (c[0], cell)):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize(("target", "storage"), KEPT)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(sizes=recurrences(hidden=HIDDEN, dtypes=(torch.float32,), batch=st.integers(1, 20), resets=st.booleans()))
def test_a_recurrence_errs_by_its_rounding(target: str, storage: str, threads: int, sizes: Sizes) -> None:
    """Over steps, lengths, directions and memory orders, in memory filled with NaN, errors stay those of rounding."""
    with built_for(target, threads):
        errors = errors_forward(sizes, fused, save=False, storage=storage)
    assert max(errors.values()) < ALLOWED[storage], errors


@pytest.mark.parametrize(("target", "storage"), KEPT)
@given(
    batch=st.integers(1, 9), steps=st.integers(1, 60), features=st.integers(1, 40), hidden=HIDDEN,
    threads=st.integers(1, 3), batch_first=st.booleans(), masked=st.booleans(),
)  # fmt: skip
def test_layers_err_by_their_rounding(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, storage: str, batch: int, steps: int, features: int, hidden: int, threads: int, batch_first: bool,
    masked: bool,
) -> None:  # fmt: skip
    """Two layers of two directions with their projections, in panels or in each step, are those of the equations."""
    torch.manual_seed(batch * steps)
    truth = LSTM(features, hidden, 2, bidirectional=True, batch_first=batch_first, implementation="loop").double()
    ours = _made(features, hidden, storage, 2, bidirectional=True, batch_first=batch_first)
    ours.load_state_dict(truth.state_dict())
    x = torch.randn((batch, steps, features) if batch_first else (steps, batch, features))
    lengths = torch.randint(0, steps + 1, (batch,)) if masked else None
    with built_for(target, threads), torch.inference_mode():
        found, state = ours(x, None, lengths)
        expected, expected_state = truth(x.double(), None, lengths)
    # Both factors of each product are rounded, to 2 ** -9 of themselves: of many inputs the sum is off by more.
    widest = float((x.abs().flatten(0, 1) @ ours.weight_ih_l0.detach().abs().t()).max())
    allowed = max(ALLOWED[storage], (2**-16 if storage == "split" else 2**-8) * widest)
    for value, right in zip((found, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=0, atol=allowed)


INT8 = [(target, storage) for target, storage in KEPT if storage in {"int8", "w8a8"}]


@pytest.mark.parametrize(("target", "storage"), INT8)
@pytest.mark.parametrize("batch", [1, 2, 3, 13])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sums_of_integers_neither_saturate_nor_overflow(
    target: str, storage: str, batch: int, sign: float
) -> None:
    """60,000 products of the largest factors of one sign are exact: sums of bytes stay below 2**31."""
    features = 60_000
    lstm = _made(features, 4, storage)
    with built_for(target, 1), torch.inference_mode():
        for weight in (lstm.weight_ih_l0, lstm.bias_ih_l0, lstm.bias_hh_l0):
            weight.zero_()
        lstm.weight_ih_l0[8:12] = 1 / features  # gate g
        output, (_, c) = lstm(torch.full((1, batch, features), sign))
    truth = 0.5 * torch.tanh(torch.tensor(sign, dtype=torch.float64))
    torch.testing.assert_close(c.double().flatten(), truth.expand(4 * batch), rtol=1e-6, atol=0)
    assert output.isfinite().all()


@pytest.mark.parametrize(("target", "storage"), INT8)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_products_of_a_state_do_not_saturate(target: str, storage: str, batch: int, sign: float) -> None:
    """A state and weights all at their largest give the exact sum, in whatever integers pairs of products are added."""
    hidden = 512
    lstm = _made(1, hidden, storage)
    with built_for(target, 1), torch.inference_mode():
        for weight in lstm.parameters():
            weight.zero_()
        lstm.weight_hh_l0[2 * hidden : 3 * hidden] = 1 / hidden  # gate g
        lstm.weight_hh_l0[2 * hidden : 3 * hidden : 2] *= -1
        h, c = torch.full((1, batch, hidden), sign), torch.zeros(1, batch, hidden)
        _, (_, c) = lstm(torch.zeros(1, batch, 1), (h, c))
    truth = 0.5 * torch.tanh(torch.tensor(sign, dtype=torch.float64)) * torch.tensor([-1.0, 1.0]).double()
    torch.testing.assert_close(c.double().flatten(), truth.repeat(batch * hidden // 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("target", "storage"), INT8)
@given(
    batch=st.integers(1, 13), depth=st.integers(1, 700), hidden=HIDDEN, recurrent=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_sums_of_integers_are_exact(
    target: str, storage: str, batch: int, depth: int, hidden: int, recurrent: bool, seed: int
) -> None:
    """Factors that are integers times a power of two have no rounding, so their sums are NumPy's to the last unit."""
    instructions = _instructions(target, storage)
    depth = hidden if recurrent else depth
    state, wide = (127, 32767) if instructions.startswith(VNNI) else (64, _levels(depth))
    most = state if recurrent or storage == "w8a8" else wide
    draw = np.random.default_rng(seed)
    weights, rows = draw.integers(-127, 128, (hidden, depth)), draw.integers(-most, most + 1, (batch, depth))
    # Largest values that are just what they are rounded to, and sums that float32 holds.
    weights[:, 0], rows[:, 0] = 127, most * draw.choice([-1, 1], batch)
    rows[:, 1:] *= draw.random((batch, depth - 1)) < 2**24 / (127 * most * depth)
    sums = rows @ weights.T
    unit = 2.0**-5  # of a sum, in a gate
    lstm = _made(1 if recurrent else depth, hidden, storage)
    x, zeros = torch.from_numpy(rows).float(), torch.zeros(1, batch, hidden)
    with built_for(target, 1), torch.inference_mode():
        for weight in lstm.parameters():
            weight.zero_()
        matrix = lstm.weight_hh_l0 if recurrent else lstm.weight_ih_l0
        matrix[2 * hidden : 3 * hidden] = torch.from_numpy(weights).float() * unit
        for row in range(batch):
            # What the biases leave of the gate is what its sum is off by.
            lstm.bias_ih_l0[2 * hidden : 3 * hidden] = torch.from_numpy(-sums[row]).float() * unit
            h, c = zeros.clone(), zeros.clone()
            _, (_, c) = lstm(torch.zeros(1, batch, 1), (x[None], c)) if recurrent else lstm(x[None], (h, c))
            off = np.arctanh(2 * c[0, row].double().numpy()) / unit
            assert np.abs(off).max() < 0.5 * max(1.0, np.abs(sums).max() / 2**21)


@pytest.mark.parametrize(("target", "storage"), INT8)
@given(
    batch=st.integers(1, 9), parts=st.lists(st.integers(1, 40), min_size=2, max_size=4), features=st.integers(1, 600),
    hidden=st.sampled_from([1, 7, 8, 9, 40, 290]), threads=st.integers(1, 3), reverse=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_many_steps_are_those_of_parts(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str,
    storage: str,
    batch: int,
    parts: list[int],
    features: int,
    hidden: int,
    threads: int,
    reverse: bool,
    seed: int,
) -> None:
    """Sums of integers are exact, so it does not matter how many steps are projected together, and in which order."""
    if _instructions(target, storage) not in WITHOUT_VNNI:
        pytest.skip("these round a state differently in its first step, or multiply floats")
    torch.manual_seed(seed)
    lstm = _made(features, hidden, storage, bidirectional=True)
    side = slice(hidden, None) if reverse else slice(hidden)
    x, state = torch.randn(sum(parts), batch, features), torch.randn(2, 2, batch, hidden) / 2
    with built_for(target, threads), torch.inference_mode():
        whole, last = lstm(x, (state[0], state[1]))
        pieces = list(x.split(parts))
        found, h, c = [], state[0], state[1]
        for piece in reversed(pieces) if reverse else pieces:
            output, (h, c) = lstm(piece, (h, c))
            found.append(output[..., side])
    joined = torch.cat(found[::-1] if reverse else found)
    # A number between two integers may be rounded to the other one, where one step has another cell.
    allowed = 0.0 if min(parts) > 1 or batch > 1 else 2e-2
    torch.testing.assert_close(joined, whole[..., side], rtol=0, atol=allowed)
    torch.testing.assert_close(h[int(reverse)], last[0][int(reverse)], rtol=0, atol=allowed)
    torch.testing.assert_close(c[int(reverse)], last[1][int(reverse)], rtol=0, atol=4 * allowed)


def test_more_columns_than_integers_hold_are_refused() -> None:
    """What might overflow says so instead."""
    if not fused.instructions("int8").startswith(VNNI + WITHOUT_VNNI):
        pytest.skip("float32 sums have no such limit")
    lstm = _made(65_537, 1, "int8")
    with torch.no_grad(), pytest.raises(RuntimeError, match="at most 65536 columns, these have 65537; use"):
        lstm(torch.zeros(1, 1, 65_537))


@pytest.mark.parametrize(("target", "storage"), KEPT)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "state", "cell"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_row_stays_broken_and_alone(
    target: str, storage: str, broken: float, where: str, threads: int
) -> None:
    """Integers have no NaN: a sequence with one does not come out healthy, nor does it touch its neighbours."""
    torch.manual_seed(0)
    lstm, x, state = _made(5, 20, storage), torch.randn(3, 4, 5), torch.randn(2, 1, 4, 20)
    with built_for(target, threads), torch.inference_mode():
        healthy = lstm(x, (state[0], state[1]))[0]
        if where == "input":
            x[1, 2, 3] = broken
        else:
            state[int(where == "cell"), 0, 2, 7] = broken
        output = lstm(x, (state[0], state[1]))[0]
    others = torch.tensor([0, 1, 3])
    assert torch.equal(output[:, others], healthy[:, others])
    assert not torch.equal(output[1:, 2], healthy[1:, 2])
    if broken != broken:  # noqa: PLR0124 - NaN
        assert output[1:, 2].isnan().all()


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_an_infinite_input_saturates_gates_and_spoils_nothing(trained: bool, batch: int) -> None:
    """Units that fill up the last block have weights of zero, whose product with infinity must not reach the others."""
    lstm = LSTM(1, 20, implementation="cpu-fused", weight_storage="fp32" if trained else "bf16")
    x = torch.tensor([torch.inf, 0.5, -torch.inf, 0.5]).repeat_interleave(batch).view(4, batch, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=trained), torch.set_grad_enabled(trained):
        if trained and fused.storage_hindrance(TRAINED):
            pytest.skip("no products of bf16 with gradients here")
        output, _ = lstm(x)
    assert output.isfinite().all()
    if trained:
        # Of h alone: the gradient of a weight that multiplies infinity is none.
        (gradient,) = torch.autograd.grad(output.float().sum(), lstm.bias_hh_l0)
        assert gradient.isfinite().all()


#: Biases of i, f, g and o, and a cell that is given: one factor far beyond saturation, the other small yet not zero.
SATURATED = [((-2.2, 5.0, -50.0, 3.0), 0.0), ((-2.2, 5.0, 50.0, 3.0), 0.0), ((0.0, 30.0, 0.0, -2.5), -60.0)]
SATURATED += [((0.0, 30.0, 0.0, -2.5), 60.0), ((-80.0, -80.0, -80.0, -80.0), 1.0), ((80.0, 80.0, 80.0, 80.0), -80.0)]


@pytest.mark.parametrize(("target", "storage"), KEPT)
@pytest.mark.parametrize(("biases", "cell"), SATURATED)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 8), (2, 8), (13, 20)])
def test_saturated_gates_and_cells_keep_their_small_factor(
    target: str, storage: str, biases: tuple[float, ...], cell: float, batch: int, hidden: int
) -> None:
    """A quotient of exponentials must not overflow before it is taken: i * tanh(g) of a large g is -i, not 0."""
    lstm = _made(3, hidden, storage)
    with torch.no_grad():
        for value in lstm.parameters():
            value.zero_()
        lstm.bias_ih_l0.copy_(torch.tensor(biases).repeat_interleave(hidden))
    state = torch.zeros(1, batch, hidden), torch.full((1, batch, hidden), cell)
    with built_for(target, 1), torch.inference_mode():
        output, (_, c_n) = lstm(torch.randn(3, batch, 3), state)
    i, f, g, o = torch.tensor(biases, dtype=torch.float64)
    c = torch.tensor(cell, dtype=torch.float64)
    for step in range(3):
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        expected = (o.sigmoid() * c.tanh()).expand(batch, hidden)
        torch.testing.assert_close(output[step].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(c_n[0].double(), c.expand(batch, hidden), rtol=1e-5, atol=1e-6)


@given(value=st.sampled_from([0.0, 1e-38, 1e-30, 3e38]), batch=st.integers(1, 4))
def test_rows_of_extreme_values_make_finite_results(value: float, batch: int) -> None:
    """A row of zeros, of the least and of the largest numbers has a scale that is a number."""
    for storage in ("bf16", "int8", *(name for name in ("split", "w8a8") if not fused.storage_hindrance(name))):
        lstm = _made(5, 20, storage)
        with torch.inference_mode():
            lstm.weight_ih_l0.clamp_(-0.1, 0.1)
            output = lstm(torch.full((2, batch, 5), value))[0]
        assert output.isfinite().all()


@pytest.mark.parametrize(("storage", "missing"), [("split", "AMX tiles"), ("w8a8", "products of bytes (AVX2, ")])
def test_weights_that_cannot_be_kept_so_here_say_why(storage: str, missing: str) -> None:
    """Without tiles or integers nothing else runs in their place: a call raises, and says what is missing."""
    lstm = _made(3, 4, storage)
    with built_for(f"{QUICK} -DWIDEN", 1), torch.inference_mode():
        expected = f"weight_storage='{storage}' cannot be used here: .*{re.escape(missing)}.*; use 'fp32'"
        with pytest.raises(RuntimeError, match=expected):
            lstm(torch.zeros(1, 1, 3))
        assert missing in str(fused.storage_hindrance(storage))
        assert fused.storage_hindrance("bf16") is None


def test_the_instructions_are_those_of_the_processor() -> None:
    """What runs is named, by what the processor has; a build without them names what it falls back to."""
    flags = build.cpu_flags().split()
    if not {"avx2", "fma"} <= set(flags):
        pytest.skip("no AVX2 here")
    plain = "avx512-fma" if "avx512f" in flags else "avx2-fma"
    wanted = {
        "fp32": plain,
        "bf16": "amx-bf16" if "amx_bf16" in flags else "avx512-bf16" if "avx512_bf16" in flags else plain,
        "int8": "amx-int8" if "amx_int8" in flags
        else "avx512-vnni" if "avx512_vnni" in flags
        else "avx512-int8" if "avx512bw" in flags
        else plain if "avx512f" in flags
        else "avx-vnni" if "avx_vnni" in flags
        else "avx2-int8",
    }  # fmt: skip
    for storage, expected in wanted.items():
        lstm = _made(3, 4, storage)
        with torch.inference_mode():
            lstm(torch.zeros(1, 1, 3))
        assert [choice.instructions for choice in lstm.choices] == [expected]
        assert lstm.explain(1, 1, training=False).instructions == expected
        assert _instructions(f"{QUICK} -DWIDEN", storage) == plain
        narrow = "avx2-int8" if storage == "int8" else "avx2-fma"
        assert _instructions(NARROW, storage) == narrow
    assert _instructions(NARROW, "w8a8") == "avx2-int8"
    others = {NO_VNNI: "avx512-int8", NARROW_VNNI: "avx-vnni"}
    for target, expected in others.items():
        if (f"{target} {LITTLE}", "int8") in KEPT:
            assert _instructions(f"{target} {LITTLE}", "int8") == expected
    assert LSTM(3, 4, implementation="loop").explain(1, 1).instructions == ""


@pytest.mark.skipif(not shutil.which("g++"), reason="GCC's flags")
def test_the_instructions_of_tiles_compile_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a machine with AMX the compiler and its assembler take the code, and it has its instructions.

    GCC names the source before inline code, which AMX needs: a checkout may have any name a folder may have, and a line
    end in it must not reach the assembler.
    """
    folder = tmp_path / "ä check:out\nhere"
    shutil.copytree(build.SOURCE.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "SOURCE", folder / build.SOURCE.name)
    command = ["g++", *build.FLAGS, "-Og", "-march=sapphirerapids", "-save-temps=obj", build.SOURCE.name]
    assert build._compile(command, tmp_path, "lstm-named").stat().st_size > 0
    (assembly,) = tmp_path.glob("lstm-named*.s")
    text = assembly.read_text(encoding="utf-8")
    assert all(name in text for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "syscall"))


def test_packed_weights_have_the_bytes_that_they_say() -> None:
    """int8 weights are a quarter of float32's bytes and bf16 half, but for padding, starts and float32's summary."""
    hidden, depth = 256, 512
    summed, half, quarter = (library(kept=kept).packed_bytes(hidden, depth, kept) for kept in range(3))
    full = 16 * hidden * depth
    assert summed - full in {0, 4 * (depth + 16 + 4 * hidden)}
    assert half == full // 2
    assert full // 4 <= quarter <= full // 4 + 16 * hidden
    if not library().hindrance(STORAGE["split"][0]):
        assert library(kept=STORAGE["split"][0]).packed_bytes(hidden, depth, STORAGE["split"][0]) == full


def test_weights_of_another_part_are_an_error_and_no_crash() -> None:
    """Whoever asks a part of the kernel for weights that it does not have is told so."""
    with pytest.raises(RuntimeError, match="another part"):
        library(kept=STORAGE["fp32"][0]).packed_bytes(16, 16, STORAGE["int8"][0])
