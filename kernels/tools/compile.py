"""Compile the kernels without a GPU and report the resources they use: `python -m kernels compile`.

It finds what a GPU would refuse, or would run slowly without a message: shared memory or registers beyond what an
architecture has (Triton's compiler does not refuse), registers spilled to memory, products that do not reach the tensor
cores, and programs that must run at the same time and cannot. The exit status is 1 if anything of this is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.recurrence import Problem
from ..dispatch import MODULES
from ..host.numbers import whole
from ..host.output import run_command, write_whole
from ..host.usage import PACKAGE, Parser, part_of
from .process_pool import Pool

#: The page of the notebook that has the table.
PAGE = Path(__file__).parents[2] / "docs" / "notebook" / "gpu-compiled.md"
MARKS = ("<!-- resources: written by python -m kernels compile --quick --write -->", "<!-- end of resources -->")
TYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
HIDDEN = (16, 40, 64, 128, 256, 512, 768, 1024, 1536, 2048)
BATCH = (1, 16, 64, 128)
#: Type, batch and hidden size of the quick form, which the page shows.
QUICK = (("float16", 16, 64), ("float16", 16, 256), ("float16", 64, 1024), ("tf32", 64, 256))
#: Steps are not part of a compiled kernel; not a multiple of 16, which is one case of Triton's specialisation.
STEPS = 100


@dataclass(frozen=True)
class Architecture:
    """Resources of a GPU; numbers from NVIDIA's CUDA programming guide and the products' data sheets.

    Attributes:
        shared_bytes: shared memory that one block can have; each block takes 1 KB more of its multiprocessor.
        multiprocessors: of the product that it is known by (A100, H200, B200; RTX 3090, 4090, 5090).
        registers, threads, most: of a multiprocessor; `most` blocks.
    """

    shared_bytes: int
    multiprocessors: int
    registers: int = 65536
    threads: int = 2048
    most: int = 32

    def blocks(self, registers: int, threads: int, shared: int) -> int:
        """Blocks that one multiprocessor runs at the same time; registers are handed out by 256 a warp."""
        warps = threads // 32
        by_registers = self.registers // (max(-(-registers * 32 // 256) * 256, 256) * warps)
        return min(by_registers, self.threads // threads, self.most, (self.shared_bytes + 1024) // (shared + 1024))


MOST_REGISTERS = 255  # of a thread
ARCHITECTURES = {
    80: Architecture(166_912, 108),
    86: Architecture(101_376, 82, threads=1536, most=16),
    89: Architecture(101_376, 128, threads=1536, most=24),
    90: Architecture(232_448, 132),
    100: Architecture(232_448, 148),
    120: Architecture(101_376, 170, threads=1536, most=24),
}
USUAL = (80, 90, 100)


@dataclass(frozen=True)
class Item:
    """One launch of one configuration at one problem: the `index`-th that `launches` names."""

    arch: int
    implementation: str
    problem: Problem
    config: Any
    backward: bool
    index: int


@dataclass(frozen=True)
class Compiled:
    """Resources of one launch; memory in bytes, registers per thread, stack per thread (where spilled registers go).

    `index` counts the launches of one configuration: a first step may differ from the others.
    """

    arch: int
    implementation: str
    kernel: str
    index: int
    phase: str
    dtype: str
    batch: int
    hidden_size: int
    directions: int
    masked: bool
    config: str
    grid: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    products: str
    faults: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Compile and report; 0 when all fits, 1 when not, 2 when it cannot run here."""
    options = _options(arguments)
    # An interpreted kernel cannot be compiled. Kernels are defined when their modules are imported, later.
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton") is None:
        print("compile: Triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    items = list(_items(options))
    found: list[Compiled] = []
    failed = 0
    for item, compiled, reason in _run(items, options.jobs):
        if compiled is None:
            failed += 1
            print(f"FAILED sm_{item.arch} {item.implementation} {item.problem} {item.config}: {reason}", flush=True)
            continue
        found.append(compiled)
        for fault in compiled.faults:
            failed += 1
            print(f"FAULT {_row(compiled)}: {fault}", flush=True)
    found.sort(key=items_order)
    if options.out is not None:
        write_whole(options.out, json.dumps([dataclasses.asdict(one) for one in found], indent=1).encode())
    if options.table:
        print(table(found))
    if options.write:
        write(table(found))
    print(f"{len(found)} kernels compiled for {', '.join(f'sm_{arch}' for arch in options.arch)}, {failed} faults")
    return 1 if failed or not found else 0


def items_order(one: Compiled) -> tuple[Any, ...]:
    """Sort key of a kernel in the table."""
    phases = ("inference", "forward", "backward")
    return (
        one.arch, list(MODULES).index(one.implementation), phases.index(one.phase), one.dtype, one.hidden_size,
        one.batch, one.directions, one.config, one.index,
    )  # fmt: skip


def table(found: list[Compiled]) -> str:
    """A Markdown table, a line per kernel."""
    head = (
        "| arch | implementation | phase | type | B | H | configuration | launch | grid | warps | registers | stack "
        "| shared | products |\n|---|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---|"
    )
    return "\n".join([head, *map(_row, found)])


def write(text: str, path: Path = PAGE) -> None:
    """Put a table between the marks of the page.

    Raises:
        ValueError: when the marks are not there.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = (content.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        msg = f"{path} has no place for the table; put these two lines into it: {' '.join(MARKS)}"
        raise ValueError(msg)
    said = f"Compiled by Triton {_version()} without a GPU; bytes, registers per thread."
    path.write_text(f"{content[:begin]}{MARKS[0]}\n{said}\n\n{text}\n{content[end:]}", encoding="utf-8")


def _row(one: Compiled) -> str:
    return (
        f"| sm_{one.arch} | {one.implementation} | {one.phase} | {one.dtype} | {one.batch} | {one.hidden_size} "
        f"| {one.config} | {one.index + 1} | {one.grid} | {one.num_warps} | {one.registers} | {one.stack_bytes} "
        f"| {one.shared_bytes} | {one.products} |"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {PACKAGE} compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=list(ARCHITECTURES),
        help="compute capabilities (default: 80 90 100; 90 with --quick)",
    )
    parser.add_argument(
        "--kernel", action="append", nargs="+", choices=list(MODULES), help="kernels to compile (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="few problems, the first configuration of each")
    parser.add_argument("--first", action="store_true", help="only the first configuration of every problem")
    parser.add_argument("--jobs", type=whole(), default=1, help="number of compilers to run at the same time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--write", action="store_true", help="write the table into docs/notebook/gpu-compiled.md")
    options = parser.parse_args(arguments)
    parser.refuse_unwritable(options.out)
    options.arch = options.arch or ([90] if options.quick else list(USUAL))
    options.kernel = list(itertools.chain.from_iterable(options.kernel or [MODULES]))
    return options


def _problems(arch: int, *, quick: bool) -> Iterator[tuple[Problem, bool]]:
    """Problems and whether the backward pass is meant."""
    shapes = QUICK if quick else tuple(itertools.product(TYPES, BATCH, HIDDEN))
    for (kind, batch, hidden), (saves, backward) in itertools.product(
        shapes, ((False, False), (True, False), (True, True))
    ):
        dtype, tf32 = TYPES[kind]
        multiprocessors = ARCHITECTURES[arch].multiprocessors
        problem = Problem("cuda", dtype, batch, STEPS, hidden, 1, saves, False, tf32, arch, multiprocessors)
        yield problem, backward
        if not quick and batch == 64:  # noqa: PLR2004 - lengths and both directions once a size
            yield dataclasses.replace(problem, directions=2, masked=True), backward


def _items(options: argparse.Namespace) -> Iterator[Item]:
    """Every launch that differs from those before it once it is compiled."""
    seen = set()
    for arch in options.arch:
        for name, (problem, backward) in itertools.product(options.kernel, _problems(arch, quick=options.quick)):
            module = importlib.import_module(MODULES[name])
            if module.refuses(problem, backward=backward) is not None:
                continue
            for config in module.configs(problem, backward=backward)[: 1 if options.quick or options.first else None]:
                for index, launch in enumerate(module.launches(problem, config, backward=backward)):
                    signature, constants, attributes = specialise(launch, problem)
                    key = repr((arch, launch.kernel.__module__, launch.kernel.__name__, signature, constants,
                                attributes, launch.num_warps, launch.num_stages, launch.cooperative))  # fmt: skip
                    # A grid that has to run at the same time is a question of its own.
                    key += str(launch.grid) if launch.cooperative else ""
                    if key not in seen:
                        seen.add(key)
                        yield Item(arch, name, problem, config, backward, index)


def _run(items: list[Item], jobs: int) -> Iterator[tuple[Item, Compiled | None, str]]:
    if jobs > 1:
        with Pool(compile_item, jobs=jobs, timeout_s=600) as pool:
            for outcome in pool.run(items):
                yield outcome.item, outcome.value, outcome.reason
        return
    for item in items:
        try:
            compiled = compile_item(item)
        except Exception as error:  # noqa: BLE001 - what a compiler says about one kernel is a line of the report
            yield item, None, " ".join(f"{type(error).__name__}: {error}".split())[:400]
        else:
            yield item, compiled, ""


def specialise(launch: Any, problem: Problem) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton derives them from the arguments of a real launch.

    Pointers from torch are multiples of 16; integers of 1 become constants; integers that are multiples of 16 say so.
    Strides are multiples of the hidden size, those of gates of four times it.
    """
    hidden = problem.hidden_size
    known = {"batch": problem.batch, "steps": problem.steps, "hidden": hidden, "hidden_size": hidden}
    signature, constants, attributes = dict(launch.signature), dict(launch.constants), {}
    divisible = [["tt.divisibility", 16]]
    for position, parameter in enumerate(launch.kernel.params):
        name, kind = parameter.name, signature[parameter.name]
        value = known.get(name, hidden * (4 if re.search(r"input|gates", name) else 1) if "stride" in name else 3)
        if kind.startswith("*"):
            attributes[position,] = divisible
        elif kind != "constexpr" and not parameter.do_not_specialize:
            if value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[position,] = divisible
    return signature, constants, attributes


def compile_item(item: Item) -> Compiled:
    """Compile one launch and compare it with its architecture."""
    import triton  # noqa: PLC0415 - only here: the rest of this file is read without it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    module = importlib.import_module(MODULES[item.implementation])
    launch = module.launches(item.problem, item.config, backward=item.backward)[item.index]
    signature, constants, attributes = specialise(launch, item.problem)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.cooperative:
        options["launch_cooperative_grid"] = True
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", item.arch, 32), options=options)
    registers, stack = _usage(kernel.asm["cubin"])
    problem = item.problem
    kind = next(name for name, pair in TYPES.items() if pair == (problem.dtype, problem.tf32))
    compiled = Compiled(
        arch=item.arch,
        implementation=item.implementation,
        kernel=launch.kernel.__name__,
        index=item.index,
        phase="backward" if item.backward else "forward" if problem.saves else "inference",
        dtype=kind,
        batch=problem.batch,
        hidden_size=problem.hidden_size,
        directions=problem.directions,
        masked=problem.masked,
        config=", ".join(f"{name} {value}" for name, value in dataclasses.asdict(item.config).items()),
        grid=launch.grid,
        num_warps=launch.num_warps,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        products=_products(kernel.asm["ptx"]),
        faults=(),
    )
    allowed = getattr(module, "STACK_BYTES", 0)
    return dataclasses.replace(compiled, faults=faults(compiled, cooperative=launch.cooperative, stack_bytes=allowed))


def faults(one: Compiled, *, cooperative: bool, stack_bytes: int = 0) -> tuple[str, ...]:
    """Faults that an architecture would refuse or punish.

    Args:
        one: what was compiled.
        cooperative: whether all programs must run at the same time.
        stack_bytes: stack per thread that the kernel's module permits if half of the registers are free; it is then not
            a sign of too few registers.
    """
    arch, threads = ARCHITECTURES[one.arch], 32 * one.num_warps
    found = []
    if one.shared_bytes > arch.shared_bytes:
        found.append(f"{one.shared_bytes} bytes of shared memory, sm_{one.arch} has {arch.shared_bytes} a block")
    if one.registers * threads > arch.registers:
        found.append(f"{one.registers} registers in {threads} threads, sm_{one.arch} has {arch.registers} a block")
    permitted = stack_bytes if one.registers <= MOST_REGISTERS // 2 else 0
    if one.stack_bytes > permitted:
        found.append(f"{one.stack_bytes} bytes of stack per thread (spilled registers), permitted are {permitted}")
    if cooperative and not found:
        resident = arch.multiprocessors * arch.blocks(one.registers, threads, one.shared_bytes)
        if one.grid > resident:
            found.append(f"{one.grid} programs must run at the same time, {resident} can on sm_{one.arch}")
    return tuple(found)


def _products(ptx: str) -> str:
    """By which instructions matrices are multiplied."""
    names = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
    return " ".join(short for long, short in names.items() if re.search(rf"(?<![\w.]){re.escape(long)}", ptx)) or "none"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as the tool that comes with Triton reads them.

    Raises:
        RuntimeError: when it says nothing of them.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(  # noqa: S603 - Triton's own tool
            [_tool(), "-res-usage", file.name], capture_output=True, text=True, check=False
        )
    match = re.search(r"REG:(\d+)\s+STACK:(\d+)", said.stdout)
    if match is None:
        msg = f"cuobjdump did not state registers: {said.stderr.strip() or said.stdout.strip()}"
        raise RuntimeError(msg)
    return int(match[1]), int(match[2])


@functools.lru_cache(maxsize=1)
def _tool() -> str:
    import triton  # noqa: PLC0415

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _version() -> str:
    import triton  # noqa: PLC0415

    return str(triton.__version__)


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} compile"))
