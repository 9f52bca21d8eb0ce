"""Which implementation serves: names, refusals, tables of measurements, estimates."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recurrences import Sizes

from kernels import dispatch
from kernels import measurements as table
from kernels.common import triton_driver
from kernels.common.recurrence import Problem, loop_backward, loop_forward, on_device
from kernels.cpu import fused
from kernels.cpu.build import BuildError
from kernels.estimate import estimate_s
from kernels.gpu import persistent_configs

ROOT = Path(__file__).parent.parent
NAME = "NVIDIA H200"
H200 = Problem("cuda", torch.float16, 16, 1024, 768, capability=90, multiprocessors=132, gpu=NAME)


@dataclass(frozen=True)
class Config:
    """A configuration of a kernel that does not exist."""

    tile: int


class Fake:
    """A kernel module: serves what it is told to, and writes down what it ran."""

    def __init__(self, largest: int = 1 << 20, largest_backward: int | None = None) -> None:
        self.largest = {False: largest, True: largest if largest_backward is None else largest_backward}
        self.ran: list[tuple[str, Config]] = []

    def refuses(self, problem: Problem, *, backward: bool) -> str | None:
        """Refuse what is larger than it was told to serve."""
        largest = self.largest[backward]
        return f"H {problem.hidden_size}, at most {largest}" if problem.hidden_size > largest else None

    def configs(self, problem: Problem, *, backward: bool) -> list[Config]:
        """Three tiles, the last for wide batches alone."""
        del backward
        return [Config(16), Config(32), *([] if problem.batch < 64 else [Config(64)])]

    def forward(self, args, config=None) -> None:
        """Run the loop."""
        self.ran.append(("forward", config))
        loop_forward(args)

    def backward(self, args, config=None) -> None:
        """Run the loop."""
        self.ran.append(("backward", config))
        loop_backward(args)


@pytest.fixture(autouse=True)
def kernels(monkeypatch, tmp_path):
    """Three fakes in place of the kernels, and a folder of tables that is empty."""
    fakes = {name: Fake() for name in dispatch.MODULES}
    monkeypatch.setattr(dispatch, "_module", fakes.__getitem__)
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    dispatch.forget()
    yield fakes
    dispatch.forget()


def entry(
    phase="inference", vendor_s=None, around_s=0.0, configs=None, batch=16, hidden=768, **times
) -> table.MeasuredShape:
    """Measurements at one shape, times in seconds by implementation."""
    timings = {name: table.Timing({"tile": (configs or {}).get(name, 16)}, time) for name, time in times.items()}
    return table.MeasuredShape(phase, "float16", batch, 1024, hidden, 1, timings, around_s, vendor_s)


def measured(*entries: table.MeasuredShape) -> None:
    """Put a table of the fake GPU where dispatch looks."""
    table.write(table.path_of(NAME), table.MeasuredTable(NAME, entries, {"torch": "2.11"}))
    dispatch.forget()


@pytest.fixture
def plain_cpu(monkeypatch):
    """A CPU where Triton does not interpret."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown implementation 'fast'; known are auto, triton, cell, sequence"):
        dispatch.choose(H200, "fast")


@pytest.mark.usefixtures("plain_cpu")
def test_cpu_takes_its_own_kernel_where_that_serves():
    """On a CPU `auto` is the fused kernel in float32; else torch's own LSTM, or the loop for a compiler."""
    problem = Problem("cpu", torch.float32, 2, 3, 4)
    assert dispatch.choose(problem).implementation == "cpu-fused"
    assert dispatch.choose(problem, compiling=True).implementation == "cpu-fused"
    assert set(dispatch.choose(problem).refused) == set(dispatch.MODULES)
    problem = Problem("cpu", torch.float64, 2, 3, 4)
    assert dispatch.choose(problem).implementation == "vendor"
    assert "computes in float32" in dispatch.choose(problem).reason
    assert dispatch.choose(problem, compiling=True).implementation == "loop"


def test_without_a_compiler_a_cpu_takes_torchs_own_lstm(monkeypatch):
    """If the fused kernel cannot be built, `auto` goes to torch's own and says what is missing."""

    def unbuildable(**_):
        message = "install a C++ compiler"
        raise BuildError(message)

    monkeypatch.setattr(fused, "library", unbuildable)
    choice = dispatch.choose(Problem("cpu", torch.float32, 2, 3, 4))
    assert choice.implementation == "vendor"
    assert "install a C++ compiler" in choice.reason


def test_auto_does_not_interpret(monkeypatch):
    """Interpreted kernels are for tests: `auto` on a CPU never takes one, compiling or not."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = Problem("cpu", torch.float32, 2, 3, 4)
    assert dispatch.choose(problem).implementation == "cpu-fused"
    assert dispatch.choose(problem, compiling=True).implementation == "cpu-fused"
    assert dispatch.choose(problem, "cell").implementation == "cell"


@pytest.mark.usefixtures("plain_cpu")
def test_kernel_asked_for_on_a_cpu_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match=r"'cell' cannot serve: a Triton kernel needs an NVIDIA GPU.*use 'auto' or"):
        dispatch.choose(Problem("cpu", torch.float32, 2, 3, 4), "cell")


def test_refusal_states_the_kernels_reason(kernels):
    """A requested kernel that refuses raises with its own sentence, and names one that serves."""
    kernels["sequence"].largest[False] = 256
    with pytest.raises(ValueError, match=r"'sequence' cannot serve: H 768, at most 256; use 'auto' or 'cell' or 'pers"):
        dispatch.choose(H200, "sequence")
    refused = dict(dispatch.choose(H200).refused)
    assert "CPU" in refused.pop(dispatch.CPU)
    assert refused == {"sequence": "H 768, at most 256"}


def test_kernel_without_the_backward_pass_is_refused_before_training(kernels):
    """A kernel that can only run forward serves inference, and is refused if a backward pass will follow."""
    kernels["sequence"].largest[True] = 256
    assert dispatch.choose(H200, "sequence").implementation == "sequence"
    with pytest.raises(ValueError, match="H 768, at most 256"):
        dispatch.choose(dataclasses.replace(H200, saves=True), "sequence")


def test_training_without_any_backward_kernel_is_torchs_own(kernels):
    for fake in kernels.values():
        fake.largest[True] = 1
    choice = dispatch.choose(dataclasses.replace(H200, saves=True))
    assert (choice.implementation, "backward pass" in choice.reason) == ("vendor", True)


def test_float64_is_torchs_own_or_the_loop():
    problem = dataclasses.replace(H200, dtype=torch.float64)
    assert dispatch.choose(problem).implementation == "vendor"
    assert dispatch.choose(problem, compiling=True).implementation == "loop"
    with pytest.raises(ValueError, match="float64"):
        dispatch.choose(problem, "persistent")


def test_vendor_cannot_be_traced():
    with pytest.raises(ValueError, match="cannot be traced"):
        dispatch.choose(H200, "vendor", compiling=True)


def test_without_triton_the_reason_says_so():
    """Without Triton a CPU works, and a kernel that is asked for is refused with that reason."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "from kernels import dispatch\n"
        "from kernels.common.recurrence import Problem\n"
        "print(dispatch.choose(Problem('cpu', torch.float32, 2, 3, 4)).implementation)\n"
        "print(dispatch.choose(Problem('cuda', torch.float16, 2, 3, 4, capability=90)).refused['cell'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["cpu-fused", "Triton is not installed (pip install triton)"]


@pytest.fixture
def cuda_in_use(monkeypatch):
    """A process that uses CUDA, where Triton has not looked for its driver yet."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("_active", "_default"):
        monkeypatch.setattr(triton.runtime.driver, name, None)
    triton_driver._driver_error.cache_clear()
    yield sys.modules["triton.runtime.driver"]
    triton_driver._driver_error.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler. Please specify"), "RuntimeError: Failed to find C compiler"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "CalledProcessError: Command"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "ImportError: libcuda"),
    ],
)
def test_where_triton_cannot_launch_auto_takes_torchs_own(cuda_in_use, monkeypatch, error, said):
    """Without a compiler or the headers of Python cuDNN runs, and what is missing is said before any call fails."""

    def fail():
        raise error

    monkeypatch.setattr(cuda_in_use, "_create_driver", fail)
    found = dispatch.choose(H200)
    assert found.implementation == "vendor"
    assert set(found.refused) >= set(dispatch.MODULES)
    assert f"needs a C compiler and Python's headers (apt-get install gcc python3-dev): {said}" in found.refused["cell"]
    with pytest.raises(ValueError, match="Triton cannot launch here"):
        dispatch.choose(H200, "persistent")


def test_where_triton_launches_kernels_are_chosen(cuda_in_use, monkeypatch):
    """Its driver is asked for what a launch asks."""
    monkeypatch.setattr(cuda_in_use, "_create_driver", lambda: SimpleNamespace(get_current_target=lambda: "sm_90"))
    assert dispatch.choose(H200).implementation in dispatch.MODULES


def test_amds_gpus_are_not_taken_for_nvidias(monkeypatch):
    """Both are `cuda` to torch, and a capability of 9.0 is one of AMD's too."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = dispatch.choose(H200)
    assert (found.implementation, found.refused["cell"]) == ("vendor", triton_driver.NOT_NVIDIA)


def test_nothing_measured_is_said():
    """Without a table the choice is an estimate and calls itself one."""
    assert dispatch.choose(H200).reason == f"by estimate: nothing was measured on {NAME}"
    measured(entry(cell=1e-3))
    other = dataclasses.replace(H200, dtype=torch.bfloat16)
    assert dispatch.choose(other).reason == f"by estimate: nothing was measured near this shape in bfloat16 on {NAME}"


@pytest.mark.parametrize(
    ("hidden", "batch", "expected"),
    [(64, 16, "sequence"), (40, 64, "sequence"), (128, 1024, "sequence"), (1024, 64, "persistent"),
     (512, 16, "persistent"), (160, 16, "persistent"), (4096, 128, "cell")],
)  # fmt: skip
def test_estimate_follows_what_fits_on_chip(hidden, batch, expected):
    """One program's weights, then all programs' weights, then neither."""
    problem = dataclasses.replace(H200, hidden_size=hidden, batch=batch)
    assert dispatch.choose(problem).implementation == expected


@pytest.mark.parametrize(
    ("hidden", "batch", "dtype", "expected"),
    [(1024, 64, torch.float16, "cell"), (768, 16, torch.float16, "persistent"), (1024, 16, torch.float32, "cell")],
)  # fmt: skip
def test_backward_is_estimated_by_the_configuration_that_would_run(hidden, batch, dtype, expected):
    """If persistent would read its weights anew at every step, the estimate does not take them for resident."""
    problem = dataclasses.replace(H200, hidden_size=hidden, batch=batch, dtype=dtype, saves=True)
    first = persistent_configs.configs(problem, backward=True)[0]
    assert estimate_s(problem, "persistent", backward=True) == pytest.approx(
        problem.steps * persistent_configs.step_us(problem, first, backward=True) * 1e-6
    )
    times = {name: estimate_s(problem, name, backward=True) for name in dispatch.MODULES}
    assert min(times, key=times.__getitem__) == expected


def test_a_kernel_without_an_estimate_is_not_chosen_by_one(monkeypatch):
    """A new kernel is one module and one line; until it is measured, `auto` takes another."""
    name, _ = dispatch._auto(H200, {dispatch.CPU: "a GPU"}, {}, backward=False, device="")
    monkeypatch.setattr(dispatch, "MODULES", {"newest": "kernels.gpu.newest", **dispatch.MODULES})
    assert estimate_s(H200, "newest", backward=False) == math.inf
    assert dispatch._auto(H200, {dispatch.CPU: "a GPU"}, {}, backward=False, device="")[0] == name


def test_estimates_grow_with_the_work():
    """More steps, more rows, wider types and the backward pass never cost less."""
    for name in ("cell", "sequence", "persistent"):
        for backward in (False, True):
            base = estimate_s(H200, name, backward=backward)
            for change in ({"steps": 2048}, {"batch": 128}, {"dtype": torch.float32}, {"hidden_size": 1024}):
                assert estimate_s(dataclasses.replace(H200, **change), name, backward=backward) >= base
        assert estimate_s(H200, name, backward=True) > estimate_s(H200, name, backward=False)


def test_table_beats_the_estimate():
    """If something was measured, the fastest of it is taken, and the reason gives the time."""
    measured(entry(cell=2e-3, sequence=1e-3, persistent=3e-3))
    choice = dispatch.choose(H200)
    assert choice.implementation == "sequence"
    assert choice.reason == f"measured on {NAME} at B16 H768 T1024 float16, inference: sequence 1000 us"


def test_nearest_shape_decides():
    measured(entry(hidden=512, cell=1e-3, sequence=2e-3), entry(hidden=1024, cell=2e-3, sequence=1e-3))
    assert dispatch.choose(dataclasses.replace(H200, hidden_size=500)).implementation == "cell"
    assert dispatch.choose(dataclasses.replace(H200, hidden_size=1100)).implementation == "sequence"


def test_far_shapes_say_nothing():
    """A measurement at H 768 is no figure for H 64."""
    measured(entry(cell=1e-3))
    assert "nothing was measured near" in dispatch.choose(dataclasses.replace(H200, hidden_size=64)).reason


def test_fastest_that_refuses_is_passed_over(kernels):
    kernels["sequence"].largest[False] = 700
    measured(entry(cell=2e-3, sequence=1e-3, persistent=3e-3))
    assert dispatch.choose(H200).implementation == "cell"


def test_vendor_is_taken_where_it_was_faster():
    """Products count on our side, since torch's own LSTM has them inside; the reason gives both times."""
    measured(entry(cell=1e-3, around_s=5e-4, vendor_s=1.2e-3))
    choice = dispatch.choose(H200)
    assert choice.implementation == "vendor"
    assert "cell 1500 us, torch's own LSTM 1200 us" in choice.reason
    compiled = dispatch.choose(H200, compiling=True)
    assert (compiled.implementation, "cannot be called here" in compiled.reason) == ("cell", True)
    measured(entry(cell=1e-3, around_s=1e-4, vendor_s=1.2e-3))
    assert dispatch.choose(H200).implementation == "cell"


def test_torchs_own_on_padded_sizes_is_a_candidate():
    """`auto` takes it where it was the fastest, but not for lengths, which it does not take."""
    shape = dataclasses.replace(entry(cell=1e-3, around_s=5e-4, vendor_s=1.4e-3), vendor_padded_s=1.1e-3)
    measured(shape)
    choice = dispatch.choose(H200)
    assert choice.implementation == "vendor-padded"
    assert "cell 1500 us, torch's own LSTM on padded sizes 1100 us" in choice.reason
    assert dispatch.choose(dataclasses.replace(H200, masked=True)).implementation == "vendor"
    measured(dataclasses.replace(shape, vendor_padded_s=2e-3))
    assert dispatch.choose(H200).implementation == "vendor"


def test_the_module_as_it_is_called_is_compared_where_it_was_timed():
    """At few steps the host decides: a kernel that wins by itself may lose as a module."""
    shape = entry(cell=1e-3, vendor_s=1.2e-3)
    measured(shape)
    assert dispatch.choose(H200).implementation == "cell"
    slow = {"cell": dataclasses.replace(shape.kernels["cell"], module_s=1.3e-3)}
    measured(dataclasses.replace(shape, kernels=slow))
    assert dispatch.choose(H200).implementation == "vendor"


def test_the_choice_names_the_configuration(kernels):
    """On a GPU it is the one that dispatch takes; on a CPU there is none."""
    choice = dispatch.choose(H200, "cell")
    assert choice.config == kernels["cell"].configs(H200, backward=False)[0]
    assert dispatch.choose(dataclasses.replace(H200, device="cpu", dtype=torch.float64), "loop").config is None


def test_training_compares_both_passes():
    """A kernel that loses forward and wins more backward is taken for training."""
    training = dataclasses.replace(H200, saves=True)
    measured(entry("forward", cell=2e-3, vendor_s=1e-3), entry("backward", cell=5e-3, sequence=3e-3, vendor_s=6e-3))
    choice = dispatch.choose(training)
    assert choice.implementation == "cell"
    assert "cell 5000 us, torch's own LSTM 7000 us" in choice.reason
    measured(entry("forward", cell=2e-3, vendor_s=1e-3), entry("backward", cell=5e-3, vendor_s=5e-3))
    assert dispatch.choose(training).implementation == "vendor"


def test_configuration_comes_from_the_table_where_it_fits():
    """The measured configuration if this problem has it among its candidates, else the kernel's first."""
    measured(entry(batch=64, cell=1e-3, configs={"cell": 64}))
    wide = dataclasses.replace(H200, batch=64)
    assert dispatch.choose_config(wide, "cell", backward=False) == Config(64)
    assert dispatch.choose_config(H200, "cell", backward=False) == Config(16)
    assert dispatch.choose_config(wide, "cell", backward=True) == Config(16)


@pytest.mark.parametrize("content", ["{}", "no json", '{"schema": 99, "device": "x", "facts": {}, "entries": []}'])
def test_broken_table_is_named(tmp_path, content):
    """A file that is no table raises with its name and what to do, and is not taken for an empty one."""
    path = tmp_path / "nvidia-h200.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is not a table.*kernels tune --out"):
        table.read(path)


def test_table_survives_the_disk(tmp_path):
    path = tmp_path / "a" / "t.json"
    written = table.MeasuredTable(NAME, (entry(cell=1e-3, vendor_s=2.0, around_s=3.0),), {"torch": "2.11"})
    table.write(path, written)
    assert table.read(path) == written
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == table.SCHEMA
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("plain_cpu")
def test_auto_runs_as_a_recurrence(kernels):
    """Inside the operator `auto` on a CPU is the loop: torch's own LSTM is no recurrence."""
    args = Sizes(2, 3, 4).forward()
    args = dataclasses.replace(args, **{
        field.name: value.cpu() for field in dataclasses.fields(args)
        if isinstance(value := getattr(args, field.name), torch.Tensor)
    })  # fmt: skip
    dispatch.forward(args, "auto")
    assert args.output.isfinite().all()
    with pytest.raises(ValueError, match=r"kernels\.LSTM\(implementation='vendor'\)"):
        dispatch.forward(args, "vendor")
    assert all(not fake.ran for fake in kernels.values())


def test_named_kernel_runs_with_its_configuration(kernels, monkeypatch):
    """Forward and backward go to the module of the name, with the configuration that was chosen for the pass."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sizes = Sizes(2, 3, 4)
    args = sizes.forward()
    dispatch.forward(args, "cell")
    dispatch.backward(sizes.backward(args), "persistent")
    assert kernels["cell"].ran == [("forward", Config(16))]
    assert kernels["persistent"].ran == [("backward", Config(16))]


def test_no_steps_hand_the_state_on(kernels, monkeypatch):
    """A recurrence of no steps launches nothing and returns its initial state."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = Sizes(2, 0, 4).forward()
    dispatch.forward(args, "cell")
    assert torch.equal(args.h_n, args.h0)
    assert kernels["cell"].ran == []


def test_lookup_is_kept(monkeypatch):
    """The second question for a problem asks no module."""
    dispatch.choose(H200)
    dispatch.choose_config(H200, "cell", backward=False)
    monkeypatch.setattr(dispatch, "_module", lambda name: pytest.fail(f"{name} was asked again"))
    assert dispatch.choose(dataclasses.replace(H200)).implementation == "persistent"
    assert dispatch.choose_config(H200, "cell", backward=False) == Config(16)


@pytest.mark.parametrize("name", dispatch.MODULES)
def test_modules_have_the_interface(name):
    """Every kernel module brings what dispatch, the compiler and the tuner call."""
    pytest.importorskip("triton")
    module = importlib.import_module(dispatch.MODULES[name])
    missing = [f for f in ("refuses", "configs", "forward", "backward", "launches") if not hasattr(module, f)]
    assert missing == []
    problem = dataclasses.replace(H200, hidden_size=64)
    for backward in (False, True):
        if module.refuses(problem, backward=backward) is None:
            assert module.configs(problem, backward=backward)


def test_tables_in_the_repository_can_be_read():
    """Every measured table that is delivered is of this schema and under its GPU's name."""
    for path in (ROOT / "kernels" / "measured").glob("*.json"):
        assert table.path_of(table.read(path).device).name == path.name


def test_the_table_is_that_of_the_tensors_gpu(monkeypatch):
    """With tensors on the second of two GPUs, its table decides: the choice and the configuration, not the first's."""
    names = ["NVIDIA GeForce GTX 1080", NAME]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    facts = [SimpleNamespace(major=6, minor=1, multi_processor_count=20)]
    facts.append(SimpleNamespace(major=9, minor=0, multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    measured(entry(cell=2e-3, sequence=1e-3, persistent=3e-3, configs={"sequence": 32}))
    bare = dataclasses.replace(H200, gpu="", capability=0, multiprocessors=0)
    problem = on_device(bare, torch.device("cuda", 1))
    assert problem == H200
    assert dispatch.choose(problem).reason.startswith(f"measured on {NAME}")
    assert dispatch.choose_config(problem, "sequence", backward=False) == Config(32)
    first = on_device(bare, torch.device("cuda", 0))
    assert dispatch.choose(first).reason == f"by estimate: nothing was measured on {names[0]}"
    assert on_device(bare, torch.device("cuda")) == first


def test_triton_is_never_torchs_own():
    """If torch's own LSTM was measured to be faster, `auto` takes it and `triton` the fastest of the kernels."""
    measured(entry(vendor_s=1e-3, cell=3e-3, sequence=2e-3, persistent=4e-3))
    assert dispatch.choose(H200).implementation == "vendor"
    choice = dispatch.choose(H200, "triton")
    assert (choice.implementation, choice.refused["vendor"]) == ("sequence", "only Triton kernels were asked for")


@pytest.mark.parametrize("backward", [False, True])
def test_triton_is_refused_with_every_kernels_reason(kernels, backward):
    """Nothing falls back in silence: where no kernel serves, or none the backward pass, each says why."""
    for fake in kernels.values():
        fake.largest[backward] = 1
    with pytest.raises(ValueError, match=r"no Triton kernel serves: cell: H 768, at most 1; sequence: H 768.*persist"):
        dispatch.choose(dataclasses.replace(H200, saves=True), "triton")


def test_triton_on_a_cpu_is_for_the_interpreter(monkeypatch):
    """There the first kernel that serves runs; without the interpreter each says that it needs a GPU."""
    problem = Problem("cpu", torch.float32, 2, 3, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(problem, "triton").implementation == "cell"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="no Triton kernel serves: cell: a Triton kernel needs an NVIDIA GPU"):
        dispatch.choose(problem, "triton")
