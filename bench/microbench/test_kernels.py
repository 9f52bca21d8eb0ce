"""Every LSTM of `kernels/` alone at small sizes under pytest-benchmark, with torch's own as the yardstick.

A case is named kernel-pass-size, as in `loop-forward-b16t10h16`. Outputs, states and, with the backward pass, all
gradients are compared with the equations in float64 before anything is timed, and again after. A kernel joins by a line
in `KERNELS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from bench.gate.parity import GRADIENT, Verdict, judge
from bench.microbench.gated import time_gated
from bench.timing.seat import Subject
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED
from kernels.dispatch import MODULES
from kernels.lstm import LSTM
from kernels.reference import LoopLSTM, State, lstm_cell
from seq2seq.execution.executable import backends
from seq2seq.execution.requirements import no_triton
from seq2seq.execution.variant import DTYPES
from seq2seq.execution.variants import REFERENCE

Quantities = dict[str, Tensor]
PASSES = ("forward", "backward")


class ReferenceCell(nn.LSTMCell):
    """`kernels.reference.lstm_cell` behind the parameters of `torch.nn.LSTMCell`."""

    def forward(self, x: Tensor, hx: State | None = None) -> State:
        """One step: x (batch, input_size); h and c, each (batch, hidden_size), zeros when absent."""
        zeros = x.new_zeros(x.size(0), self.hidden_size)
        hidden, cell = (zeros, zeros) if hx is None else hx
        gates_input = functional.linear(x, self.weight_ih, self.bias_ih)
        return lstm_cell(gates_input, hidden, cell, self.weight_hh, self.bias_hh)


@dataclass(frozen=True)
class Kernel:
    """One LSTM.

    Attributes:
        name: what it is called.
        build: from input_size and hidden_size to a module with the parameters of torch.nn.LSTM (or of nn.LSTMCell)
            under the same names.
        cell: whether it is one step without a time axis.
        vendor: whether torch may hand it to oneDNN or cuDNN.
        precision: key of `DTYPES`; weights, inputs and results are of that type.
        devices: where it exists.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    cell: bool = False
    vendor: bool = True
    precision: str = "fp32"
    devices: tuple[str, ...] = ("cpu", "cuda")


def _own(implementation: str, precision: str = "fp32", devices: tuple[str, ...] = ("cuda",)) -> Kernel:
    """`kernels.LSTM` by one of its implementations."""
    name = f"own-{implementation}" + (f"-{precision}" if precision != "fp32" else "")
    build = functools.partial(LSTM, batch_first=True, implementation=implementation)
    return Kernel(name, build, precision=precision, devices=devices)


#: The first of each shape is the yardstick.
KERNELS = (
    Kernel("aten", functools.partial(nn.LSTM, batch_first=True), vendor=False),
    Kernel("vendor", functools.partial(nn.LSTM, batch_first=True)),
    Kernel("vendor-fp16", functools.partial(nn.LSTM, batch_first=True), precision="fp16", devices=("cuda",)),
    Kernel("loop", LoopLSTM),
    _own("loop", devices=("cpu", "cuda")),
    _own("cpu-fused", devices=("cpu",)),
    _own("triton"),
    _own("vendor-padded", "fp16"),
    *(_own(name, "fp16") for name in MODULES),
    Kernel("aten-cell", nn.LSTMCell, cell=True),
    Kernel("reference-cell", ReferenceCell, cell=True),
)


@dataclass(frozen=True)
class Size:
    """Batch, time steps, features in, hidden size."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        """Return the problem as a part of a case's name."""
        return f"b{self.batch}t{self.steps}h{self.hidden_size}"


#: The seed's encoder, one sequence as a server gets it, and the middle of the cited sizes; a cell takes one step.
SIZES = (Size(16, 10, 5, 16), Size(1, 32, 64, 128), Size(16, 32, 64, 128))
#: On a GPU also two layers of DeepBench.
GPU_SIZES = (Size(16, 25, 512, 512), Size(64, 25, 1024, 1024))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the cases: kernel x pass x size x device."""
    usable = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = metafunc.config.getoption("--bench-device", None) or usable
    cases = [
        pytest.param(kernel.name, direction, str(size), device, id=case_id(kernel.name, direction, str(size), device))
        for kernel in KERNELS
        for direction in PASSES
        for device in [d for d in devices if d in kernel.devices] or devices[:1]
        for size in sizes_of(kernel, device)
    ]
    metafunc.parametrize(("kernel", "direction", "size", "device"), cases)


def case_id(kernel: str, direction: str, size: str, device: str) -> str:
    """A case's name: `loop-forward-b16t10h16`, on a GPU with the device."""
    return "-".join([kernel, direction, size, *([device] if device != "cpu" else [])])


def sizes_of(kernel: Kernel, device: str) -> tuple[Size, ...]:
    """The sizes of a kernel on a device: those of its shape."""
    if not kernel.cell:
        return SIZES if device == "cpu" else SIZES + GPU_SIZES
    return tuple(Size(size.batch, 1, size.input_size, size.hidden_size) for size in SIZES)


def test_kernel(
    kernel: str, direction: str, size: str, device: str, benchmark: BenchmarkFixture, gate_seed: int
) -> None:
    """A forward pass without gradients, or forward and backward."""
    chosen = next(found for found in KERNELS if found.name == kernel)
    if device not in chosen.devices:
        pytest.skip(f"exists on {' and '.join(chosen.devices)} only")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; this torch sees none (torch.cuda.is_available() is false)")
    chosen_size = next(s for s in sizes_of(chosen, device) if str(s) == size)
    problem = KernelProblem(chosen, chosen_size, direction == "backward", device)
    if reason := problem.refusal():
        pytest.skip(reason)
    benchmark.group = f"{'cell' if chosen.cell else 'lstm'}/{size}/{direction}/{device}"
    time_gated(
        benchmark,
        Subject(problem.call(TIMED_SEED), problem.context),
        device,
        problem.check,
        gate_seed,
    )
    facts = {"kernel": kernel, "direction": direction, "size": size, "precision": chosen.precision}
    benchmark.extra_info |= facts | {"chose": [c.implementation for c in getattr(problem.module, "choices", ())]}


@dataclass
class KernelProblem:
    """A kernel at one size, in one direction, on one device.

    Attributes:
        module: the kernel, built.
    """

    kernel: Kernel
    size: Size
    backward: bool
    device: str
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = self._module(self.kernel.build, DTYPES[self.kernel.precision])

    def refusal(self) -> str | None:
        """Reason why a kernel of ours does not take this size here; None for all others."""
        if not isinstance(self.module, LSTM) or self.module.implementation == "loop":
            return None
        try:
            self.module.explain(self.size.batch, self.size.steps, training=self.backward)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return no_triton("kernels.LSTM") if self.device == "cuda" else None

    def _module(self, build: Callable[[int, int], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
        """A module on the device, with the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(WEIGHTS_SEED)
            twin = nn.LSTMCell if self.kernel.cell else nn.LSTM
            weights = twin(self.size.input_size, self.size.hidden_size).state_dict()
        module = build(self.size.input_size, self.size.hidden_size)
        module.load_state_dict(weights)
        return module.to(self.device, dtype)

    @contextlib.contextmanager
    def context(self, *, vendor: bool | None = None) -> Iterator[None]:
        """Set which library torch may use, exact products on a GPU, and no gradients for a mere forward pass."""
        allowed = self.kernel.vendor if vendor is None else vendor
        settings = dataclasses.replace(REFERENCE, vendor_lstm=allowed)
        with backends(settings, self.device), torch.inference_mode(not self.backward):
            yield

    def inputs(self, seed: int) -> Tensor:
        """Features of a seed: (batch, steps, input_size), for a cell (batch, input_size)."""
        shape = [self.size.batch, self.size.steps, self.size.input_size]
        if self.kernel.cell:
            del shape[1]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        # Rounded once, so that every precision reads the same values.
        return values.to(self.device, DTYPES[self.kernel.precision])

    def call(self, seed: int) -> Callable[[], object]:
        """The timed unit on the inputs of a seed."""
        x = self.inputs(seed).requires_grad_(self.backward)
        leaves = [x, *self.module.parameters()]

        def once() -> object:
            found = results(self.module, x)
            return torch.autograd.grad(total(found), leaves) if self.backward else found

        return once

    def check(self, seed: int) -> Verdict:
        """Compare it with the equations in float64; the yardstick is ATen's LSTM in float32."""
        first = next(k for k in KERNELS if k.cell == self.kernel.cell)
        found = self._quantities(self.module, seed, self.kernel.vendor)
        precision = self.kernel.precision
        expected = self._quantities(self._module(first.build, DTYPES[precision]), seed, vendor=False)
        reference = ReferenceCell if self.kernel.cell else LoopLSTM
        truth = self._quantities(self._module(reference, torch.float64), seed, vendor=False)
        return judge(found, truth, expected, precision, terms=self.size.batch * self.size.steps)

    def _quantities(self, module: nn.Module, seed: int, vendor: bool) -> Quantities:
        """Outputs, states and gradients of one module, by name."""
        parameters = dict(module.named_parameters())
        x = self.inputs(seed).to(next(iter(parameters.values())).dtype).requires_grad_(self.backward)
        leaves = {"input": x, **parameters}
        with self.context(vendor=vendor):
            found = results(module, x)
            if self.backward:
                gradients = torch.autograd.grad(total(found), list(leaves.values()))
                found |= {GRADIENT + name: value for name, value in zip(leaves, gradients, strict=True)}
        return {name: value.detach().clone() for name, value in found.items()}


def results(module: nn.Module, x: Tensor) -> Quantities:
    """Output, final h and c by name; a cell has no output apart from h."""
    first, second = module(x)
    if isinstance(second, Tensor):
        return {"hidden": first, "cell": second}
    return {"outputs": first, "hidden": second[0], "cell": second[1]}


def total(found: Quantities) -> Tensor:
    """A scalar in which no two results weigh alike, so that exchanged gradients show."""
    # Summed in full precision: half of it holds no sum of this many.
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in found.values()]
    return torch.stack([weight * value.square().sum() for weight, value in enumerate(wide, 1)]).sum()
