"""Defects planted in products of bf16 and integers: the arithmetic of `test_cpu_fewer_bits` sees each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from cpu_builds import EMULATED_TILES, NARROW_VNNI, NO_TILES, NO_VNNI
from planted_defects import NARROW, PAIRED, TILE, TRAINING, VECTORS, WITHOUT_VNNI
from planted_kernels import NOTHING, KernelPrograms
from recurrences import DEVICE

from kernels.cpu import build

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

#: Those of the vectors that concern all integers too.
ALWAYS = ("start", "bytes", "pieces", "states", "panel")


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

cases = []
for storage in ("bf16", "int8", *(() if fused.storage_hindrance("split") else ("split",))):
    for batch in (1, 2, 3, 4, 5, 6, 7, 13, 21, 45):
        for features, hidden in ((7, 21), (70, 35), (300, 35)):
            lstm = _made(features, hidden, storage)
            x, h, c = torch.randn(batch, features), torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
            # What is rounded at the middle between two integers differs by one now and then; 8 bits show it.
            coarse = storage == "int8" and not _two_byte_state(storage, batch, fused.instructions(storage))
            steps = torch.randn(1 if coarse else 20, batch, features)
            cases.append((lstm, x, h, c, steps, torch.randn(3, batch, features)))
# Every storage and kind of walk early: by one sequence, few and many, of more features than a step has units.
cases.sort(key=lambda case: case[1].shape not in {(1, 70), (5, 70), (45, 300)})
for lstm, x, h, c, steps, spoilt in cases:
    batch, instructions = len(x), fused.instructions(lstm.weight_storage)
    expected = _step(lstm, x, h[0], c[0], instructions)[0]
    with torch.inference_mode():
        check(lstm(x[None], (h, c))[0][0], expected)
        # As the first of many steps, and by the walk for sequences that may end.
        check(lstm(x.repeat(12, 1, 1), (h, c))[0][0], expected)
        check(lstm(x.repeat(2, 1, 1), (h, c), lengths=2 - torch.arange(batch) % 2)[0][0], expected)
        walked = lstm(steps, (h, c))[0]
        h_t, c_t = h[0], c[0]
        for t in range(len(steps)):
            h_t = walked[t - 1] if t else h_t
            h_t, c_t = _step(lstm, steps[t], h_t, c_t, instructions, given=not t)
        check(walked[-1], h_t)
        c[0, 0, 1] = float("nan")  # of one unit, and of all from the next step on
        if not lstm(spoilt, (h, c))[0][1:, 0].isnan().all():
            sys.exit(8)
        spoilt[0, 0, 1] = float("nan")
        if not lstm(spoilt)[0][:, 0].isnan().all():
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
            for storage in ("int8", "w8a8"):
                check(target=build.library.__defaults__[0], batch=batch, parts=[3, 40, 30], features=300, hidden=hidden,
                      threads=1, reverse=reverse, seed=0, storage=storage)
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
    [(False, NOTHING), *((False, name) for name in VECTORS), *((True, name) for name in TILE)],
)
def test_a_planted_defect_is_seen(tiles: bool, name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip that packing, rounding and sharing out rows are prone to is far beyond the roundoff of float32.

    A slip of the tiles may also be refused by the check that comes before their first use.
    """
    if not {"avx512_bf16", "avx512_vnni"} <= set(build.cpu_flags().split()):
        pytest.skip("these products need AVX512-BF16 and AVX512-VNNI")
    target = EMULATED_TILES if tiles else NO_TILES
    code = programs.run_planted(_REFUSED + _PROBE, tmp_path, "fewer bits", name, target)
    assert code == 0 if name == NOTHING else code not in {0, 1}


#: Builds that multiply integers otherwise: flags of a processor that runs each, and its defects. AVX-512 shares
#: its code with AVX2, so these are the ones that its width concerns.
_OTHER_BUILDS = {
    "-march=x86-64-v3": (
        ("avx2",),
        (*ALWAYS, *(name for name in WITHOUT_VNNI if name != "wide-pairs"), *PAIRED),
    ),
    NO_VNNI: (("avx512bw", "avx512dq"), ("third-row", "three-rows", "gate-of-sums", "wide-pairs")),
    NARROW_VNNI: (("avx_vnni",), tuple(NARROW)),
}


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in build.cpu_flags(), reason="tiles are emulated with AVX512-BF16 beside them")
@pytest.mark.parametrize("name", [NOTHING, *TRAINING])
def test_a_defect_planted_in_training_by_tiles_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """So is each slip of the two walks and of the products over all steps, whose rows are taken in parts."""
    code = programs.run_planted(_TRAINING, tmp_path, "fewer bits", name, EMULATED_TILES)
    assert code == 0 if name == NOTHING else code == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name"),
    [(target, name) for target, (_, names) in _OTHER_BUILDS.items() for name in (NOTHING, *names)],
)
def test_a_defect_planted_in_other_products_of_integers_is_seen(
    target: str, name: str, tmp_path: Path, programs: KernelPrograms
) -> None:
    """So is each slip of the integers without VNNI, and by VNNI without AVX-512."""
    if not set(_OTHER_BUILDS[target][0]) <= set(build.cpu_flags().split()):
        pytest.skip("these products need another processor")
    probe = _PROBE + _PARTS if target == "-march=x86-64-v3" else _PROBE
    code = programs.run_planted(probe, tmp_path, "fewer bits", name, target)
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
    name: str, instructions: str, tmp_path: Path, programs: KernelPrograms
) -> None:
    """Vectors run, are right and say why where tiles multiply wrongly or the system refuses them."""
    code = f"\nif fused.instructions('bf16') != {instructions!r}:\n    sys.exit(9)\n"
    right = 6 if "failed" in instructions else 0
    assert programs.run_planted(_PROBE + code + _REFUSED, tmp_path, "fewer bits", name, EMULATED_TILES) == right
