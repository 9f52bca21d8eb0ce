"""The CPU kernel as built for this machine and for others with narrower vectors, run by a team of any size."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kernels.cpu import build, fused, inference, layer, packing, shortlist, teams

FLAGS = build.cpu_flags().split()
#: Whether AVX2 alone is not what this machine's own build has.
_NARROWER = "avx2" in FLAGS and ("avx512f" in FLAGS or "avx_vnni" in FLAGS)
#: AVX-512 without VNNI, and AVX-VNNI without AVX-512.
NO_VNNI, NARROW_VNNI = "-march=x86-64-v4", "-march=x86-64-v3 -mavxvnni"
#: Those of them that this machine runs, and that are not what its own build has.
OTHERS = [NO_VNNI] if "avx512_vnni" in FLAGS else []
OTHERS += [NARROW_VNNI] if "avx_vnni" in FLAGS and "avx512f" in FLAGS else []


def _usable(target: str) -> bool:
    return platform.machine() == "x86_64" and (target != NARROW or _NARROWER)


#: Builds for tests alone are optimised little, since compiling takes longer than all that they run.
LITTLE = "-Og"
QUICK = f"{build.NATIVE} {LITTLE}"
#: This machine's vectors, and the narrower ones that others have.
NARROW, NARROWEST = f"-march=x86-64-v3 {LITTLE}", f"-march=x86-64 {LITTLE}"
TARGETS = [build.NATIVE, *(target for target in (NARROW, NARROWEST) if _usable(target))]
#: All weights taken for more than the near caches hold, and one sequence projected beside its steps where they are
#: small and before them where they are large, on any processor.
FAR = f"{QUICK} -DNEAREST=0 -DNEAR_BYTES=0 -DFARTHEST=20000 -DBESIDE=1"
#: Builds that multiply weights in fewer bits differently; `WIDEN` leaves out integer and bf16 products.
FEWER_BITS = [*TARGETS, f"{QUICK} -DWIDEN"]
#: This machine's vectors where it has tiles too.
NO_TILES = f"{build.NATIVE} -mno-amx-tile" if "amx_tile" in FLAGS else build.NATIVE
#: Few rows at a time in products over all steps of pairs, and few steps at a time in what is projected before them.
PARTS = f"{NO_TILES} {LITTLE} -DPAIR_ROWS=6 -DPROJECTED=6000"
#: AMX's tiles in plain C++, so that their packing and blocking run on other machines. What training multiplies over all
#: steps has many parts; inference knows of none.
EMULATED_TILES = f"{build.NATIVE} -DEMULATED_TILES -DNEAR_FACTORS=1"
TILES = f"{EMULATED_TILES} {LITTLE}"
if "avx512_bf16" in build.cpu_flags():
    FEWER_BITS.append(TILES)
#: Builds with how each can keep its weights in fewer bits: split in two parts needs tiles.
KEPT = [(target, storage) for target in FEWER_BITS for storage in ("bf16", "int8")]
KEPT += [(f"{target} {LITTLE}", "int8") for target in OTHERS]
#: Inputs in 8 bits too need products of bytes: VNNI's, or those of AVX2, which have 7.
BYTE_INPUTS = [target for target in TARGETS if target != NARROWEST] if "avx2" in FLAGS else []
BYTE_INPUTS += [f"{target} {LITTLE}" for target in OTHERS]
KEPT += [(target, "w8a8") for target in BYTE_INPUTS]
_TILED = [TILES, *([build.NATIVE] if "amx_bf16" in build.cpu_flags() else [])]
KEPT += [(target, "split") for target in FEWER_BITS if target in _TILED]
#: Builds of the head: for this machine, for AVX2, for the others, and with VNNI's products in plain C++.
HEADS = [build.NATIVE]
if _NARROWER:
    HEADS.append("-march=x86-64-v3")
HEADS += OTHERS
if "avx2" in FLAGS and not {"avx512_vnni", "avx_vnni"} & set(FLAGS):
    HEADS.append("-march=x86-64-v3 -DEMULATED_VNNI")


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other workers of pytest-xdist that are in this context with the same folder, which it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _compiled_once(target: str, *, kept: int | None = None) -> ctypes.CDLL:
    """The library, compiled unless another worker of pytest-xdist is doing so, which is then waited for."""
    with one_at_a_time(build.cache_folder()):
        return build.library(target, kept=kept)


_head = shortlist.library


@contextlib.contextmanager
def head_built_for(target: str) -> Iterator[None]:
    """Run the head as built for a target."""
    with mock.patch.object(shortlist, "library", functools.partial(_head, target)):
        yield


@contextlib.contextmanager
def run_by(library: Callable[..., Any], threads: int) -> Iterator[None]:
    """Run the kernel by the library that a function like `build.library` returns, by a team, however small the problem.

    Args:
        library: takes `kept`.
        threads: of the team.
    """
    packing.forget()
    with (
        mock.patch.object(fused, "library", library),
        mock.patch.object(packing, "library", library),
        mock.patch.object(layer, "library", library),
        mock.patch.object(inference, "library", library),
        mock.patch.object(teams, "library", library),
        mock.patch.object(teams, "WORTH_A_THREAD", 1),
        mock.patch.object(teams, "WORTH_A_MEETING", 1),
        mock.patch.object(torch, "get_num_threads", return_value=threads),
        mock.patch.object(teams, "cores", return_value=threads),
    ):
        yield
    packing.forget()


@contextlib.contextmanager
def built_for(target: str, threads: int) -> Iterator[None]:
    """Run the kernel as built for a target, by a team of a size, however small the problem."""
    with run_by(functools.partial(_compiled_once, target), threads):
        yield


def assert_gives_twice(
    ours: torch.nn.Module,
    truth: torch.nn.Module,
    x: torch.Tensor,
    state: tuple[torch.Tensor, ...] | None,
    target: str,
    threads: int,
    allowed: float,
) -> None:
    """Compare a call of ours, and the same call again, with what the equations give in float64."""
    with torch.inference_mode():
        expected, states = truth(x.double(), state and tuple(value.double() for value in state))
        with built_for(target, threads):
            found = [ours(x, state) for _ in range(2)]
    for output, own in found:
        for value, right in zip((output, *own), (expected, *states), strict=True):
            torch.testing.assert_close(value.double(), right, rtol=0, atol=allowed)
