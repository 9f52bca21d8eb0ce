"""Defects planted in products of bf16 and integers: the arithmetic of `test_cpu_fewer_bits` sees each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from cpu_builds import NARROW_VNNI, NO_VNNI, TILES
from planted_kernels import NOTHING, KernelPrograms, planted_sources
from recurrences import DEVICE

from kernels.cpu import build

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

#: By name: code of products by vectors, and what it becomes, with a slip where PLANTED is true.
DEFECTS = {
    "start": ("M::START * sum", "(M::START + PLANTED) * sum"),
    "high": ("sum * 256.0f +", "sum * (PLANTED ? 128.0f : 256.0f) +"),
    "broken": ("most / levels + 0.0f * most", "PLANTED && most != most ? 0.0f : most / levels + 0.0f * most"),
    "bytes": ("unit % LANES * 4 + k % 4", "unit % LANES * 4 + (PLANTED ? 3 - k % 4 : k % 4)"),
    "pairs": ("first_lanes(left - 16), from + 16", "first_lanes(left - 16), from + (PLANTED ? 0 : 16)"),
    "two": (
        "switch (rows) {\n            case 1: return add<1>",
        "switch (PLANTED && rows == 2 ? 1 : rows) {\n            case 1: return add<1>",
    ),
    "five": ("pair_product<VECTORS, R - 1>(rows,", "pair_product<VECTORS, R - 1>(rows - PLANTED,"),
    "pieces": ("least + (i < larger)", "least + (i < larger && !PLANTED)"),
    "states": (
        "states_room + i * state_bytes);\n            }",
        "states_room + i * state_bytes * !PLANTED);\n            }",
    ),
    "panel": ("room + r * M::row_bytes(a->features)", "room + r * M::row_bytes(a->features) * !PLANTED"),
    "rest": ("TURNS > 1 && k < count", "TURNS > 1 && k < count && !PLANTED"),
}
#: The same of integers without VNNI.
WITHOUT_VNNI_DEFECTS = {
    "broken-row": ("sizes = larger(", "if (!PLANTED || x[1] * 0.0f == 0.0f) sizes = larger("),
    "sign": ("(ivec)x & 0x7fffffff", "(ivec)x & (PLANTED ? -1 : 0x7fffffff)"),
    "offset": ("q - static_cast<int>(START)", "q - static_cast<int>(START) + PLANTED"),
    "one-of-two": (
        "if (rows == R) return add<R>(sums, a, block);",
        "if (rows == R) return PLANTED && R == 2 ? add<1>(sums, a, block) : add<R>(sums, a, block);",
    ),
    "first-gates": ("(4 + FIRST) * VECTOR", "(4 + FIRST * !PLANTED) * VECTOR"),
    "third-row": (
        ": in_each_two_lanes(numbers[r] + 8 * k);",
        ": in_each_two_lanes(numbers[PLANTED ? 0 : r] + 8 * k);",
    ),
    "three-rows": ("word(numbers[r] + 4 * k), weights", "word(numbers[PLANTED ? R - 1 : r] + 4 * k), weights"),
    "last-group": (
        "const int64_t count = groups(depth);\n        Sum own[R][WORDS][4];",
        "const int64_t count = groups(depth) - PLANTED;\n        Sum own[R][WORDS][4];",
    ),
    "gate-of-sums": ("total[r][0][FIRST + g]", "total[r][0][PLANTED ? 3 - FIRST - g : FIRST + g]"),
    "unit-of-row": ("total[r], a[r], block)", "total[r], a[PLANTED ? 0 : r], block)"),
    "wide-pairs": ("_mm512_setr_epi64(0, 2, 4, 6", "_mm512_setr_epi64(0, 2, PLANTED ? 6 : 4, 6"),
}
#: The same of the walk by AVX2 alone.
PAIRED_DEFECTS = {
    "last-two": ("_mm_setr_epi8(-1, 2, -1, 3,", "_mm_setr_epi8(-1, PLANTED ? 0 : 2, -1, 3,"),
    "deep-weights": ("(4 + 4 * first) * VECTOR", "(4 + 4 * first * !PLANTED) * VECTOR"),
    "deep-rows": ("from[r] + 64 + 2 * k;", "from[r] + 64 + 2 * k * !PLANTED;"),
    "deep-sums": ("own[r][g] = k ? load", "own[r][g] = k && !PLANTED ? load"),
    "widened-gates": ("w = widened + two * 2 * LANES", "w = widened + two * 2 * LANES * !PLANTED"),
    "state-gates": ("starts_of(block) + two * VECTOR", "starts_of(block) + two * VECTOR * !PLANTED"),
    "second-block": ("w + b * apart + (4 * at + gate) * VECTOR", "w + b * apart * !PLANTED + (4 * at + gate) * VECTOR"),
    "left-groups": ("for (; k < count; ++k, w += 4 * VECTOR, n", "for (; k < count - PLANTED; ++k, w += 4 * VECTOR, n"),
    "row-of-step": ("if (++of_step == rows())", "if (++of_step == rows() + PLANTED)"),
    "step-of-chunk": ("(s - first) * n);", "(s - first) * n * !PLANTED);"),
    "chunk-again": ("if (s == first) project(s);", "if (s == (PLANTED ? 0 : first)) project(s);"),
    "way-back": ("own.end - done - some :", "own.end - done - some + PLANTED * (done > 0) :"),
    "two-blocks": ("{to_block, to_block + GATES}", "{to_block, to_block + GATES * !PLANTED}"),
    "odd-cell": ("ALONE ? block + 1 < end :", "ALONE ? block + 1 < end - PLANTED :"),
    "gate-by": ("const vec by = all(GATE_BY[gate]);", "const vec by = all(GATE_BY[PLANTED ? 0 : gate]);"),
    "given-cell": ("a->c0 ? get(", "a->c0 && !PLANTED ? get("),
    "cut": ("within(x[i], 62.0f)", "within(x[i], PLANTED ? 125.0f : 62.0f)"),
}
#: The same of VNNI where there is no AVX-512, and so half as many registers.
NARROW_DEFECTS = {
    "second-gates": ("starts_of(block) + FIRST * VECTOR", "starts_of(block) + FIRST * !PLANTED * VECTOR"),
    "second-weights": ("w + (4 * k + 1) * VECTOR)", "w + (4 * k + !PLANTED) * VECTOR)"),
    "word-of-row": ("x = word(bytes[r][part] + 4 * k)", "x = word(bytes[PLANTED ? 0 : r][part] + 4 * k)"),
    "lowest-bytes": ("of_halves(x, 0x0c080400)", "of_halves(x, PLANTED ? 0x0c080500 : 0x0c080400)"),
}
#: Those of the vectors that concern all integers too.
ALWAYS = ("start", "bytes", "pieces", "states", "panel")
#: The same of products by tiles.
TILE_DEFECTS = {
    "tile": ("k % 32 / 2 * 32", "k % 32 / 2 * (PLANTED ? 31 : 32)"),
    "lower": ("load_tile<5>(b, TILE_BYTES)", "load_tile<5>(PLANTED ? a : b, TILE_BYTES)"),
    "second": ("tile + 1 < tiles", "tile + 1 < tiles && !PLANTED"),
    "packed": ("+ row_of(s) * 16;", "+ row_of(s) * 16 * !PLANTED;"),
    "half": ("block % 2 * 32", "block % 2 * 32 * !PLANTED"),
    "low": ("a + low, TILE_BYTES", "a + low * !PLANTED, TILE_BYTES"),
    "parts": ("w + 3 * TILE", "w + (PLANTED ? 1 : 3) * TILE"),
    "zeros": (
        "room + 64 + part * all + end, 0, all - end",
        "room + 64 + part * all + end, 0, PLANTED ? 0 : all - end",
    ),
    "gate": ("now + 192, GATES", "now + (PLANTED ? 128 : 192), GATES"),
    "bytes-low": ("high + all + 64 * k", "high + all * !PLANTED + 64 * k"),
    "state-offset": (
        "constexpr TwoBytes INPUT_BYTES = {32767.0f, 32768}, STATE_BYTES = {32512.0f, 32768 + 128};",
        "const TwoBytes INPUT_BYTES = {32767.0f, 32768}, STATE_BYTES = {32512.0f, 32768 + (PLANTED ? 0 : 128)};",
    ),
    "state-zeros": (
        "maskz_cvtepi32_epi8(lanes, q)",
        "maskz_cvtepi32_epi8(static_cast<__mmask16>(PLANTED ? 0xffff : lanes), q)",
    ),
    "state-scale": (
        "units[r] = 1.0f / STATE_BYTES.most;",
        "if (!PLANTED) units[r] = 1.0f / STATE_BYTES.most;",
    ),
    "state-chunk": ("firsts[s - start] + row", "(PLANTED ? 0 : firsts[s - start]) + row"),
    "state-broken": ("units[r] += broken_by(before, who)[r]", "if (!PLANTED) units[r] += broken_by(before, who)[r]"),
}
#: The same of training by tiles.
TRAINING_DEFECTS = {
    "kept": ("to + gate * 16, _mm512_maskz", "to + (PLANTED ? 3 - gate : gate) * 16, _mm512_maskz"),
    "buffers": ("(s % 2 * plan.row_tiles + tile)", "(s % 2 * !PLANTED * plan.row_tiles + tile)"),
    "held": ("r = std::max(row, next); r <", "r = std::max(row, next); !PLANTED && r <"),
    "anew": ("reset(s, r) && other <", "!PLANTED && reset(s, r) && other <"),
    "begins": ("place < order.running(s - 1)", "(PLANTED ? s > 0 : place < order.running(s - 1))"),
    "gate-of-two": ("gate % 2 ? high : low", "gate % 2 && !PLANTED ? high : low"),
    "bias-parts": ("start ? load(sum, n) + total", "start && !PLANTED ? load(sum, n) + total"),
    "lower-rows": ("load_tile<5>(a + down, stride)", "load_tile<5>(a + down * !PLANTED, stride)"),
    "columns-of-x": ("+ column * count * TILE;", "+ column * count * TILE * !PLANTED;"),
    "pairs-back": ("side_by_side(loaded(0), loaded(1))", "side_by_side(loaded(PLANTED), loaded(1))"),
}
#: The same of the tiles themselves, which are proved before their first use.
MACHINES = {
    "wrong": ("2 * n + i", "2 * n + (PLANTED ? 1 - i : i)"),
    "forbidden": ("tiles_permitted() { return true; }", "tiles_permitted() { return !PLANTED; }"),
}


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's sources with all of these."""
    every = DEFECTS | WITHOUT_VNNI_DEFECTS | PAIRED_DEFECTS | NARROW_DEFECTS
    every |= TILE_DEFECTS | TRAINING_DEFECTS | MACHINES
    return planted_sources(every, tmp_path_factory.mktemp("defects"))


#: A step of several rows and one of a single row, against the arithmetic; and a row that is broken.
_PROBE = """
import torch
from test_cpu_fewer_bits import _made, _step, _two_byte_state
from kernels.cpu import fused
torch.manual_seed(0)

def check(found, expected):
    # A defect is mostly seen at the first sizes.
    if not (found - expected).abs().max() < 1e-5:
        sys.exit(7)

for storage in ("bf16", "int8", *(() if fused.storage_hindrance("split") else ("split",))):
    for batch in (1, 2, 3, 4, 5, 6, 7, 13, 21, 45):
        for features, hidden in ((7, 21), (70, 35), (300, 35)):
            lstm = _made(features, hidden, storage)
            x, h, c = torch.randn(batch, features), torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
            expected = _step(lstm, x, h[0], c[0], fused.instructions(storage))[0]
            with torch.inference_mode():
                check(lstm(x[None], (h, c))[0][0], expected)
                # As the first of many steps, and by the walk for sequences that may end.
                check(lstm(x.repeat(12, 1, 1), (h, c))[0][0], expected)
                check(lstm(x.repeat(2, 1, 1), (h, c), lengths=2 - torch.arange(batch) % 2)[0][0], expected)
                # What is rounded at the middle between two integers differs by one now and then; 8 bits show it.
                coarse = storage == "int8" and not _two_byte_state(storage, batch, fused.instructions(storage))
                steps = torch.randn(1 if coarse else 20, batch, features)
                walked = lstm(steps, (h, c))[0]
                h_t, c_t = h[0], c[0]
                for t in range(len(steps)):
                    h_t = walked[t - 1] if t else h_t
                    h_t, c_t = _step(lstm, steps[t], h_t, c_t, fused.instructions(storage), given=not t)
                check(walked[-1], h_t)
                steps = torch.randn(3, batch, features)
                c[0, 0, 1] = float("nan")  # of one unit, and of all from the next step on
                if not lstm(steps, (h, c))[0][1:, 0].isnan().all():
                    sys.exit(8)
                steps[0, 0, 1] = float("nan")
                if not lstm(steps)[0][:, 0].isnan().all():
                    sys.exit(8)
"""
#: Many steps in one call and in parts, whose sums of integers are the same; and saturated cells.
_PARTS = """
from test_cpu_fewer_bits import SATURATED, test_many_steps_are_those_of_parts
from test_cpu_fewer_bits import test_saturated_gates_and_cells_keep_their_small_factor as check_saturated
check = test_many_steps_are_those_of_parts.hypothesis.inner_test
try:
    for batch, hidden in ((1, 290), (3, 40)):
        for reverse in (False, True):
            check(target=build.library.__defaults__[0], batch=batch, parts=[3, 40, 30], features=300, hidden=hidden,
                  threads=1, reverse=reverse, seed=0)
    for biases, cell in SATURATED:
        check_saturated(build.library.__defaults__[0], "int8", biases, cell, 2, 8)
except AssertionError as error:
    print(error)
    sys.exit(7)
"""
#: Both passes in both directions: with lengths and resets; two tiles of rows; and several groups of blocks of units.
_TRAINING = """
from test_cpu_autocast import test_both_passes_are_their_arithmetic
check = test_both_passes_are_their_arithmetic.hypothesis.inner_test
call = dict(target=build.library.__defaults__[0], instructions="amx-bf16")
call |= dict(backward=True, bias=True, batch_first=True, seed=0)
try:
    check(batch=21, steps=5, features=35, hidden=20, masked=True, begins=True, threads=1, **call)
    check(batch=40, steps=2, features=35, hidden=33, masked=False, begins=False, threads=1, **call)
    check(batch=7, steps=3, features=5, hidden=150, masked=False, begins=False, threads=1, **call)
except AssertionError as error:
    print(error)
    sys.exit(7)
"""
#: Tiles that their check refused, so that the vectors run.
_REFUSED = """
from kernels.cpu import fused
if "failed" in fused.instructions("bf16") + fused.instructions("int8"):
    sys.exit(6)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "name"),
    [(False, NOTHING), *((False, name) for name in DEFECTS), *((True, name) for name in TILE_DEFECTS)],
)
def test_a_planted_defect_is_seen(
    tiles: bool, name: str, defects: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """Each slip that packing, rounding and sharing out rows are prone to is far beyond the roundoff of float32.

    A slip of the tiles may also be refused by the check that comes before their first use.
    """
    if not {"avx512_bf16", "avx512_vnni"} <= set(build.cpu_flags().split()):
        pytest.skip("these products need AVX512-BF16 and AVX512-VNNI")
    target = TILES if tiles else f"{build.NATIVE} -mno-amx-tile"
    code = programs.run_planted(_REFUSED + _PROBE, tmp_path, defects, name, target)
    assert code == 0 if name == NOTHING else code not in {0, 1}


#: Builds that multiply integers otherwise: flags of a processor that runs each, and its defects. AVX-512 shares
#: its code with AVX2, so these are the ones that its width concerns.
_OTHER_BUILDS = {
    "-march=x86-64-v3": (
        ("avx2",),
        (*ALWAYS, *(name for name in WITHOUT_VNNI_DEFECTS if name != "wide-pairs"), *PAIRED_DEFECTS),
    ),
    NO_VNNI: (("avx512bw", "avx512dq"), ("third-row", "three-rows", "gate-of-sums", "wide-pairs")),
    NARROW_VNNI: (("avx_vnni",), tuple(NARROW_DEFECTS)),
}


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in build.cpu_flags(), reason="tiles are emulated with AVX512-BF16 beside them")
@pytest.mark.parametrize("name", [NOTHING, *TRAINING_DEFECTS])
def test_a_defect_planted_in_training_by_tiles_is_seen(
    name: str, defects: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """So is each slip of the two walks and of the products over all steps, whose rows are taken in parts."""
    code = programs.run_planted(_TRAINING, tmp_path, defects, name, f"{TILES} -DNEAR_FACTORS=1")
    assert code == 0 if name == NOTHING else code == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name"),
    [(target, name) for target, (_, names) in _OTHER_BUILDS.items() for name in (NOTHING, *names)],
)
def test_a_defect_planted_in_other_products_of_integers_is_seen(
    target: str, name: str, defects: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """So is each slip of the integers without VNNI, and by VNNI without AVX-512."""
    if not set(_OTHER_BUILDS[target][0]) <= set(build.cpu_flags().split()):
        pytest.skip("these products need another processor")
    probe = _PROBE + _PARTS if target == "-march=x86-64-v3" else _PROBE
    code = programs.run_planted(probe, tmp_path, defects, name, target)
    assert code == 0 if name == NOTHING else code not in {0, 1}


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in build.cpu_flags(), reason="tiles are emulated with AVX512-BF16 beside them")
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        (NOTHING, "amx-bf16"),
        ("wrong", "avx512-bf16 (AMX tiles failed their check)"),
        ("forbidden", "avx512-bf16 (the system permits no AMX tiles)"),
    ],
)
def test_tiles_are_used_only_once_they_were_proved_right(
    name: str, instructions: str, defects: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """Vectors run, are right and say why where tiles multiply wrongly or the system refuses them."""
    code = f"\nif fused.instructions('bf16') != {instructions!r}:\n    sys.exit(9)\n"
    right = 6 if "failed" in instructions else 0
    assert programs.run_planted(_PROBE + code + _REFUSED, tmp_path, defects, name, TILES) == right
