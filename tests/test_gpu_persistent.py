"""Kernels that share a sequence among programs: right in the interpreter and on a GPU, compiled without a spill."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import changed_module
import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels under test are written in Triton")
pytest.importorskip("hypothesis")
import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from recurrences import (  # noqa: E402
    DEVICE,
    Sizes,
    assert_close,
    errors_backward,
    errors_forward,
    interpreted,
    recurrences,
)

from kernels import dispatch  # noqa: E402
from kernels.common.recurrence import Problem, loop_forward  # noqa: E402
from kernels.gpu import grid_exchange as exchange  # noqa: E402
from kernels.gpu import persistent, persistent_configs  # noqa: E402
from kernels.gpu.persistent import PersistentConfig  # noqa: E402

ROOT = Path(__file__).parent.parent
#: Several hidden tiles, each way to wait and to sum; on a CPU every step is a launch of its own.
SHARED = [
    PersistentConfig(8, 8, 64, 1, 4, "barrier", 4),
    PersistentConfig(8, 8, 64, 2, 4, "poll", 4),
    PersistentConfig(16, 16, 32, 2, 1, "poll", 4),
    PersistentConfig(16, 8, 16, 1, 1, "launch", 4, 3),
]
#: One hidden tile: the whole sequence in one launch, with its waits, in the interpreter too.
ALONE = [PersistentConfig(8, 32, 64, 1, 4, "barrier", 4), PersistentConfig(8, 32, 64, 2, 4, "poll", 4)]
SMALL = Sizes(batch=3, steps=3, hidden=12, directions=2, lengths=(3, 1, 2))

SOME = recurrences(hidden=st.sampled_from([1, 5, 17, 40]), batch=st.sampled_from([1, 3, 9]), steps=st.integers(1, 3))


@given(sizes=SOME, config=st.sampled_from(SHARED))
@settings(max_examples=8)
def test_forward_is_right_for_any_sizes(sizes, config):
    """Outputs, final states and what is saved agree with float64, at any sizes, strides, lengths and states."""
    assert_close(errors_forward(sizes, persistent, config=config), sizes.dtype)


@given(sizes=SOME, config=st.sampled_from(SHARED), final=st.booleans())
@settings(max_examples=8)
def test_backward_is_right_for_any_sizes(sizes, config, final):
    """Gradients agree with float64, at any sizes, strides, lengths and states."""
    assert_close(errors_backward(sizes, persistent, final=final, config=config), sizes.dtype)


@pytest.mark.parametrize("config", SHARED + ALONE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_configuration_is_right_both_ways(config, dtype):
    """Every way to wait gives right results with lengths and two directions, where a random draw may miss one."""
    sizes = dataclasses.replace(SMALL, dtype=dtype)
    assert_close(errors_forward(sizes, persistent, config=config), dtype)
    assert_close(errors_backward(sizes, persistent, config=config), dtype)


def test_inference_needs_no_room_for_gates_and_cells():
    """Without gates and cells to fill, outputs and final states are right."""
    assert_close(errors_forward(SMALL, persistent, save=False), torch.float32)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_is_chosen_for_a_size_is_right(backward):
    """The configuration that is taken when none is named gives right results."""
    sizes = Sizes(batch=3, steps=2, hidden=20)
    errors = (errors_backward if backward else errors_forward)(sizes, persistent)
    assert_close(errors, torch.float32)


# Each defect: file, what stands there, what is planted.
DEFECTS = {
    "gates in another order": ("forward", "b_sum_i, b_sum_g = tl.split", "b_sum_g, b_sum_i = tl.split"),
    "stale c": ("forward", "b_h, b_c = b_h_new, b_c_new", "b_h = b_h_new"),
    "c not held past a length": ("forward", "b_c_new = tl.where(valid, b_c_new, b_c)", ""),
    "h not held past a length": ("forward", "b_h_new = tl.where(valid, b_h_new, b_h)", ""),
    "output not zero past a length": ("forward", "tl.where(valid, b_h, 0.0)", "b_h"),
    "both directions in the same order": (
        "forward",
        "tl.where(direction == 1, steps - 1 - position, position)",
        "position",
    ),
    "state of the launch before lost": ("forward", "if first > 0:", "if first > 9:"),
    "the other direction's weights": ("forward", "(direction * 4 * H", "((1 - direction) * 4 * H"),
    "gradient of i as that of f": ("backward", "+ o_grad + H, present(b_df", "+ o_grad + H, present(b_di"),
    "stale dc": ("backward", "tl.where(valid, b_dc_here * b_f, b_dc)", "tl.where(valid, b_dc_here, b_dc)"),
    "dh not held past a length": ("backward", "through = through & (after < b_length)[:, None]", "pass"),
    "c of this step for the one before": ("backward", "p_cells + before * stride", "p_cells + time * stride"),
    "gradient of the final h lost": ("backward", "b_dh = tl.load(p_grad_h_n", "b_dh = 0 * tl.load(p_grad_h_n"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_seen(defect, tmp_path, monkeypatch):
    """The comparison with float64 notices each defect that is planted in the kernels' source."""
    direction, right, wrong = DEFECTS[defect]
    kernel = f"{direction}_kernel"
    monkeypatch.setattr(
        persistent, kernel, getattr(_changed(f"persistent_{direction}", right, wrong, tmp_path), kernel)
    )
    run = errors_forward if direction == "forward" else errors_backward
    # A state passes from launch to launch only where there are many: on a GPU with `launch` alone.
    config = SHARED[3] if "launch" in defect else SHARED[0]
    with pytest.raises(AssertionError, match="limit"):
        assert_close(run(SMALL, persistent, config=config), torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wait_that_is_missing_is_seen(monkeypatch):
    """If programs go through all steps without waiting, they read what is not there yet, and that is noticed."""
    if not interpreted():
        pytest.skip("on a GPU it is a race, which may be won")
    monkeypatch.setattr(persistent, "_interpreted", lambda: False)
    # Without lengths the exchange is the output, which the kit fills with NaN.
    sizes = dataclasses.replace(SMALL, lengths=None)
    errors = errors_forward(sizes, persistent, config=dataclasses.replace(SHARED[0], sync="none"))
    with pytest.raises(AssertionError, match="output: error inf"):
        assert_close(errors, torch.float32)


@triton.jit
def _missing_kernel(p_bits, p_result, SIZE: tl.constexpr):  # noqa: N803 - compile time
    o = tl.arange(0, SIZE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    found = exchange.missing((tl.load(p_bits + o), tl.load(p_bits + 8 * SIZE + o)))
    tl.store(p_result, found.to(tl.int32))


@triton.jit
def _present_kernel(p_bits, p_result, SIZE: tl.constexpr):  # noqa: N803 - compile time
    o = tl.arange(0, SIZE)
    tl.store(p_result + o, exchange.present(tl.load(p_bits + o)))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("place", [None, 0, 7, 63, 64, 100, 127])
def test_one_element_that_has_not_arrived_is_missing(dtype, place):
    """A block counts as arrived when no element anywhere in it is absent, and every other pattern is a value."""
    bits = torch.arange(-129, -1, dtype=dtype, device=DEVICE)
    if place is not None:
        bits[place] = exchange.ABSENT.value
    result = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
    _missing_kernel[(1,)](bits, result, 8)
    assert result.item() == (place is not None)


@pytest.mark.parametrize(("bits", "float_type"), [(torch.int16, torch.float16), (torch.int32, torch.float32)])
def test_what_is_stored_is_never_absent(bits, float_type):
    """A NaN that looks absent is stored as another NaN; all else is stored as it is."""
    values = torch.tensor([-1, 0, 1, -2, torch.iinfo(bits).max, torch.iinfo(bits).min, 5, -100], dtype=bits).to(DEVICE)
    stored = torch.zeros_like(values)
    _present_kernel[(1,)](values, stored, 8)
    assert (stored != exchange.ABSENT.value).all()
    assert stored[0].view(float_type).isnan()
    assert torch.equal(stored[1:], values[1:])


SIZES = [(hidden, batch) for hidden in (1, 20, 256, 512, 768, 1024, 1536, 2048, 4096) for batch in (1, 8, 16, 64, 128)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_programs_that_wait_for_each_other_run_at_once(dtype, backward):
    """Configurations of every size: some, no two the same, at most twelve, never `poll` first, and all can run."""
    for hidden, batch in SIZES:
        for directions in (1, 2):
            problem = Problem("cpu", dtype, batch, 25, hidden, directions, saves=True)
            found = persistent.configs(problem, backward=backward)
            assert 1 <= len(found) <= 12
            assert len(set(found)) == len(found)
            assert found[0].sync != "poll"
            assert found[-1].sync == "launch" or any(config.sync == "launch" for config in found)
            for config in found:
                [launch] = persistent.launches(problem, config, backward=backward)
                assert launch.cooperative == (config.sync != "launch")
                assert launch.grid <= 132 or not launch.cooperative


def test_a_smaller_gpu_gets_fewer_programs():
    """The number of multiprocessors bounds the programs that wait for each other."""
    problem = Problem("cuda", torch.float16, 16, 25, 1024, multiprocessors=40, capability=90)
    for config in persistent.configs(problem, backward=False):
        assert config.sync == "launch" or persistent.programs(problem, config) <= 40


@pytest.mark.parametrize(
    ("message", "warned"),
    [
        (f"Triton Error [CUDA]: {persistent.NO_ROOM}", "cannot use all multiprocessors that torch reports"),
        (persistent.NOT_SUPPORTED, "starts no grid whose programs must run at the same time"),
    ],
)
def test_a_process_with_a_share_of_the_gpu_goes_step_by_step(monkeypatch, message, warned):
    """A grid that ought to run and does not: this call is made again with a launch per step, and so are later ones."""
    taken, sizes, nothing = [], Sizes(2, 3, 16), list[str]()

    def forward(args, config) -> None:
        taken.append(config.sync)
        if config.sync != "launch":
            raise RuntimeError(message)
        loop_forward(args)

    for module in (persistent, persistent_configs):
        monkeypatch.setattr(module, "FEWER", nothing)
    monkeypatch.setattr(persistent, "forward", forward)
    with pytest.warns(RuntimeWarning, match=warned):
        dispatch.forward(args := sizes.forward(), "persistent")
    assert not args.output.isnan().any()
    dispatch.forward(sizes.forward(), "persistent")
    assert taken == ["barrier", "launch", "launch"]
    dispatch.forget()


def test_other_errors_of_a_launch_are_raised(monkeypatch):
    """A fault of the kernel's own is no reason to try another configuration."""

    def forward(args, config) -> None:
        del args, config
        message = "Triton Error [CUDA]: an illegal memory access was encountered"
        raise RuntimeError(message)

    monkeypatch.setattr(persistent, "forward", forward)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        dispatch.forward(Sizes(2, 3, 16).forward(), "persistent")


def test_one_step_needs_nobody_to_wait_for():
    """A problem of one step is never given to programs that wait."""
    problem = Problem("cpu", torch.float16, 16, 1, 512)
    assert {config.sync for config in persistent.configs(problem, backward=False)} == {"launch"}


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem("cuda", torch.float64, 1, 1, 1, capability=90), "not torch.float64"),
        (Problem("cuda", torch.float16, 1, 1, 1, capability=75), "this GPU has 7.5"),
        (Problem("cuda", torch.float16, 1, 1, 1, capability=80), None),
        (Problem("cpu", torch.float32, 1, 1, 1), None),
    ],
)
def test_refuses_with_its_reason(problem, reason):
    """Problems that cannot be served are refused with what was given; all others are served."""
    refusal = persistent.refuses(problem, backward=False)
    assert refusal is None if reason is None else reason in refusal


#: Hidden size, batch, type, capability, backward, masked: what comes first for it must not spill.
COMPILED = [
    *[(hidden, 16, "float16", 90, False, False) for hidden in (512, 768, 1024)],
    (1024, 16, "float16", 90, True, False),
    (512, 64, "float16", 90, True, False),
    *[(1024, 64, "float16", 90, backward, False) for backward in (False, True)],
    (768, 16, "bfloat16", 90, True, True),
    (512, 16, "tf32", 90, False, False),
    (256, 16, "float32", 90, False, False),
    (1536, 16, "float16", 90, False, True),
    (2048, 64, "float16", 90, False, False),
    (2048, 64, "float16", 90, True, False),
    (1024, 16, "float16", 80, False, False),
    (512, 16, "float16", 80, True, False),
    (1024, 16, "float16", 100, False, False),
]


@pytest.mark.slow
def test_what_comes_first_compiles_without_a_spill():
    """Ahead of time, each size's first configuration, and the first that polls, fits the chip and reads weights once.

    The first with states before the first step and without them: those are two compiled kernels.

    Weights are read before the time loop alone: what is loaded inside of it, in pieces of 16 bytes, are rows of the
    others, past the first-level cache; no load of them may be moved before the wait; and a group of them is asked for
    at once, before the first of it is used.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(COMPILED)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(built) >= 3 * len(COMPILED) - 3
    for result in built:
        assert result["stack"] == 0, result
        assert result["shared"] <= result["limit"], result
        if result["type"] != "float32":
            assert result["mma"] + result["wgmma"] > 0, result
        if result["sync"] != "launch":
            assert result["weights_in_loop"] == 0, result
            assert result["rows_in_loop"] > 0, result
            assert result["together"] >= result["group"], result
        assert "ld.global.nc" not in result["loads"], result


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu import persistent
from kernels.gpu.persistent_configs import LEAST_SHARED_BYTES, SHARED_BYTES
from kernels.common.recurrence import Problem

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def compile_first(problem, config, backward, states):
    [launch] = persistent.launches(problem, config, backward=backward)
    # As most calls are made: zeros before the first step, and no gradient of the last states.
    absent = () if states else ("p_c0", "p_grad_h_n", "p_grad_c_n") if backward else ("p_h0", "p_c0")
    signature = launch.signature | dict.fromkeys(absent, "constexpr")
    # A real launch finds pointers and strides divisible by 16.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(launch.kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(launch.kernel, signature, launch.constants | dict.fromkeys(absent), attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", problem.capability, 32)
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    return built, registers, stack

for hidden, batch, kind, capability, backward, masked in json.loads(sys.argv[1]):
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    problem = Problem("cuda", dtype, batch, 25, hidden, 1, True, masked, kind == "tf32", capability,
                      108 if capability == 80 else 132)
    found = persistent.configs(problem, backward=backward)
    poll = [(config, True) for config in found if config.sync == "poll"][:1]
    for config, states in [(found[0], True), (found[0], False), *poll]:
        built, registers, stack = compile_first(problem, config, backward, states)
        ttgir, ptx = built.asm["ttgir"], built.asm["ptx"]
        loop = ttgir[ttgir.index("scf.while"):]
        shape = f"{config.block_k}" if config.split == 1 else f"{config.split}x[0-9]+x{config.block_k // config.split}"
        block = re.compile(("tensor<[0-9]+x" if config.split == 1 else "tensor<") + shape + "x!tt.ptr")
        # A group's loads, each in 16 bytes per thread, up to what uses the first of them.
        at_once = re.split(r"st\\.shared|bar\\.sync", ptx[ptx.find("ld.global.cg"):])[0].count("ld.global.cg")
        vectors = max(1, config.block_b * config.block_k * dtype.itemsize // (16 * 32 * config.num_warps))
        grouped = config.sync == "barrier" and config.split > 1
        rows = [line for line in loop.splitlines() if "tt.load" in line and block.search(line)]
        print(json.dumps(dict(
            case=[hidden, batch, kind, capability, backward, masked, states], config=str(config), sync=config.sync,
            type=kind, registers=registers, stack=stack, shared=built.metadata.shared,
            limit=SHARED_BYTES.get(capability, LEAST_SHARED_BYTES),
            mma=ptx.count("mma.sync"), wgmma=ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
            weights_in_loop=sum("ptr<i" not in line for line in rows),
            rows_in_loop=sum("ptr<i" in line for line in rows),
            together=at_once if grouped else 0, group=config.group * vectors if grouped else 0,
            loads=sorted(set(re.findall(r"ld\\.[a-z.]*global[a-z.]*", ptx))),
        )))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("sync", ["barrier", "poll", "launch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_every_way_to_wait_is_right(dtype, sync):
    """Many tiles, many steps, lengths and two directions, compiled."""
    sizes = Sizes(16, 50, 256, 2, dtype, lengths=tuple(range(3, 51, 3)))
    for backward in (False, True):
        problem = dataclasses.replace(sizes.forward().problem, saves=True)
        found = persistent.configs(problem, backward=backward)
        config = next((config for config in found if config.sync == sync), None)
        if config is None:
            pytest.skip(f"no configuration with {sync} for {problem}")
        run = errors_backward if backward else errors_forward
        assert_close(run(sizes, persistent, config=config), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sync", ["barrier", "poll", "launch"])
def test_on_a_gpu_200_runs_give_the_same_bits(sync):
    """No sum depends on who comes first."""
    sizes = Sizes(16, 100, 512, 1, torch.float16)
    args = sizes.forward()
    config = next(config for config in persistent.configs(args.problem, backward=False) if config.sync == sync)
    loop_forward(gradients := sizes.forward())
    back = sizes.backward(gradients)
    back_config = next(config for config in persistent.configs(back.problem, backward=True) if config.sync == sync)
    first: list[torch.Tensor] = []
    for _ in range(200):
        persistent.forward(args, config)
        persistent.backward(back, back_config)
        now = [args.output, args.c_n, args.cells, back.grad_gates, back.grad_h0, back.grad_c0]
        if not first:
            first = [value.clone() for value in now]
            assert all(value.isfinite().all() for value in first)
        assert all(torch.equal(value, kept) for value, kept in zip(now, first, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_a_grid_that_does_not_fit_fails():
    """Programs that could never all run are refused at the launch, and do not hang."""
    args = Sizes(4096, 2, 512, 1, torch.float16).forward()
    with pytest.raises(RuntimeError, match="cooperative"):
        persistent.forward(args, PersistentConfig(8, 16, 512, 1, 8, "barrier", 8))


def _changed(name: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """A module of kernels/gpu with one piece of its source changed."""
    source = (ROOT / "kernels" / "gpu" / f"{name}.py").read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {name}.py"
    path = folder / f"changed_{name}.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    return changed_module.load(path, "kernels.gpu")
