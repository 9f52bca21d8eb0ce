"""Sums of the CPU kernel's products stay in registers: what the compiler made of the loops that take the time.

Whether GCC keeps them there depends on what it inlines, and that on how large the whole file is, so a change elsewhere
can double the time of a loop without changing a result.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.cpu import build, fused, packing


def _is_gcc() -> bool:
    """Return whether GCC of at least version 11 compiles: others keep values in registers by other rules."""
    try:
        words = [*build.compiler(), "-dM", "-E", "-x", "c++", "/dev/null"]
    except build.BuildError:
        return False
    text = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    found = re.search(r"#define __GNUC__ (\d+)", text)
    return "__clang__" not in text and found is not None and int(found[1]) >= 11


pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None or not _is_gcc(),
    reason="needs an x86-64, GCC 11 or newer, and objdump",
)

#: Functions that are nothing but loops of products.
PRODUCTS = re.compile(
    r"InterleavedWalk<.*>::(multiply|project_one)\(|PairedBytes<\d+>::(two_gates|one_row|widened_sums)|"
    r"Summed::add_sums<\d, |Strips::(one_strip|both_strips)<|Widened<.*>::add\(|\b(product|pair_product|outer)<"
)
MULTIPLIES = re.compile(r"vfn?madd|vpdp|vdpbf16|vpmadd")
#: Products of a loop that takes the time, of which they are a fifth or more; sixteen registers hold the sums of eight.
LEAST = 16 if "avx512f" in build.cpu_flags().split() else 8
STACK = r"-?(0x)?[0-9a-f]*\(%r[sb]p\)"
USES_STACK = re.compile(rf"vmov\w+\s+(%[xyz]mm\d+,{STACK}|{STACK},%[xyz]mm)")


def functions(binary: Path) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Names of a binary's functions, and their instructions with their addresses."""
    words = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", str(binary)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n(?=[0-9a-f]+ <.*>:\n)", text)[1:]:
        title, *lines = part.splitlines()
        found = (re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines)
        yield title.split(" ", 1)[1], [(int(match[1], 16), match[2]) for match in found if match]


def innermost_loops(body: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Instructions from the target of a jump back to the jump, where no other loop lies between."""
    places = {address: place for place, (address, _) in enumerate(body)}
    jumps = ((place, re.match(r"j\w+\s+([0-9a-f]+)", text)) for place, (_, text) in enumerate(body))
    spans = {(places.get(int(match[1], 16), place + 1), place) for place, match in jumps if match}
    loops = {(first, last) for first, last in spans if first <= last}
    for first, last in loops:
        if not any(first <= other[0] and other[1] <= last and other != (first, last) for other in loops):
            yield [text for _, text in body[first : last + 1]]


def spilled(binary: Path) -> dict[str, tuple[int, int]]:
    """By function, products of each large loop, and how often it goes to the stack for a vector, where it does."""
    found = {}
    for name, body in functions(binary):
        for loop in innermost_loops(body) if PRODUCTS.search(name) else ():
            products = sum(bool(MULTIPLIES.match(text)) for text in loop)
            trips = sum(bool(USES_STACK.match(text)) for text in loop)
            if products >= LEAST and 5 * products >= len(loop):
                found[name] = max(found.get(name, (products, 0)), (products, trips), key=lambda pair: pair[1] / pair[0])
    return found


@pytest.mark.parametrize("storage", packing.KEPT)
def test_sums_stay_in_registers(storage: str) -> None:
    """The build for this machine has no loop of products with more than one trip to the stack for eight of them."""
    if hindrance := fused.storage_hindrance(storage):
        pytest.skip(hindrance)
    found = spilled(Path(build.library(kept=packing.KEPT[storage][0])._name))
    assert found
    wide = "avx512f" in build.cpu_flags()
    assert any("Summed::add_sums<" in name for name in found) == (storage == "fp32" and wide)
    assert any("Strips::one_strip<" in name for name in found) == (storage == "fp32" and not wide)
    assert {name: pair for name, pair in found.items() if pair[1] > pair[0] / 8} == {}


@pytest.mark.parametrize("planted", [False, True])
def test_a_call_that_is_not_inlined_is_noticed(tmp_path: Path, planted: bool) -> None:
    """Where what takes sums by reference is a function of its own, they are stored in each turn of the loop."""
    source, folder = tmp_path / "one.cpp", build.SOURCE.parent
    text = (folder / "interleaved.h").read_text()
    inlined = "ALWAYS_INLINE void finish("
    assert inlined in text
    changed = text.replace(inlined, "__attribute__((noinline)) void finish(") if planted else text
    (tmp_path / "interleaved.h").write_text(changed)
    walk = "InterleavedWalk<Way<Bytes<2>, Bytes<1>>>(a, barrier, room, 0, 1).run();"
    headers = '#include "interleaved.h"\n#include "weights.h"\n'
    source.write_text(f'{headers}extern "C" void run(Forward* a, Barrier& barrier, char* room) {{ {walk} }}\n')
    target = ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"]
    words = [*build.compiler(), *build.FLAGS, *target, f"-I{tmp_path}", f"-I{folder}", str(source)]
    subprocess.run([*words, "-o", str(tmp_path / "one.so")], check=True)
    loops = spilled(tmp_path / "one.so")
    assert loops
    trips = {name: pair for name, pair in loops.items() if pair[1] > pair[0] / 8}
    assert bool(trips) == planted
