"""Work of `kernels.tools.check` in a child process: one kernel, one configuration, one kind of question."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.recurrence import Problem, loop_forward
from ..dispatch import MODULES
from ..gpu import graph_cache
from .problems import DEVICE, GRADIENTS, OUTPUTS, Sizes, configured, errors_backward, errors_forward, limit
from .process_pool import at

#: Parts of a question, each with the time limit: to make its numbers takes seconds at full length, and is no kernel's
#: fault.
NUMBERS, RUNS = "numbers", "runs"


@dataclass(frozen=True)
class CheckQuestion:
    """One question.

    Attributes:
        kind: `parity`, `repeat`, `streams`, `threads`, `graph` or `replay`.
        final: whether h_n and c_n have gradients.
        config: of the kernel's module; None for its first.
        runs: how often a run is repeated.
        beside: what runs on the second of two streams; the same again when None.
    """

    kind: str
    implementation: str
    sizes: Sizes
    backward: bool = False
    save: bool = True
    tf32: bool = False
    final: bool = True
    config: Any = None
    runs: int = 200
    beside: CheckQuestion | None = None


@dataclass(frozen=True)
class CheckResult:
    """The answer: the worst error over what is allowed, so at most 1 when right, and what it was the error of."""

    worst: float = 0.0
    worst_name: str = ""
    text: str = ""


def work(task: CheckQuestion) -> CheckResult:
    """Answer one question.

    Raises:
        AssertionError: when a repeated run gave other bits.
    """
    kinds = {
        "parity": _parity, "repeat": _repeat, "streams": _streams, "threads": _threads, "graph": _graph,
        "replay": _replay,
    }  # fmt: skip
    return kinds[task.kind](task)


def _parity(task: CheckQuestion) -> CheckResult:
    at(NUMBERS)
    module = _Told(importlib.import_module(MODULES[task.implementation]))
    if task.backward:
        errors = errors_backward(task.sizes, module, final=task.final, tf32=task.tf32, config=task.config)
    else:
        errors = errors_forward(task.sizes, module, save=task.save, tf32=task.tf32, config=task.config)
    ratios = {name: error / limit(name, task.sizes.dtype, tf32=task.tf32) for name, error in errors.items()}
    name = max(ratios, key=lambda name: ratios[name])
    text = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    return CheckResult(ratios[name], name, f"errors: {text}")


class _Told:
    """A kernel's module whose runs are a part of their own."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def forward(self, *args: Any, **options: Any) -> None:
        """Run it."""
        at(RUNS)
        self._module.forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> None:
        """Run it."""
        at(RUNS)
        self._module.backward(*args, **options)


class _Run:
    """A kernel's run that can be repeated: tensors of its own, the same numbers every time."""

    def __init__(self, task: CheckQuestion) -> None:
        at(NUMBERS)
        module = importlib.import_module(MODULES[task.implementation])
        self.args: Any = task.sizes.forward(save=task.save, tf32=task.tf32)
        if task.backward:
            loop_forward(self.args)
            self.args = task.sizes.backward(self.args, final=task.final)
        call = module.backward if task.backward else module.forward
        self.call: Callable[[], None] = lambda: call(self.args, task.config)
        self.names = GRADIENTS if task.backward else OUTPUTS[: 5 if task.save else 3]
        at(RUNS)

    def __call__(self) -> dict[str, Tensor]:
        """Run into outputs full of NaN; copies of them."""
        for name in self.names:
            getattr(self.args, name).fill_(float("nan"))
        self.call()
        return {name: getattr(self.args, name).clone() for name in self.names}


def _repeat(task: CheckQuestion) -> CheckResult:
    """Check that a run gives the same bits twice, also beside a busy stream: an error that moves is a race."""
    verdict = _parity(task)
    run = _Run(task)
    first = run()
    noise = _Noise() if torch.cuda.is_available() else None
    differing = []
    for number in range(1, task.runs):
        if noise is not None and number % 2:
            noise.start()
        # Counted on the device: waiting for each count would take longer than the runs, and would space them out.
        differing.append(_differing(first, run()))
    counts = torch.stack(differing).cpu() if differing else torch.zeros(0, len(first), dtype=torch.int64, device="cpu")
    for number, name in counts.nonzero().tolist()[:1]:
        _refuse(f"run {number + 2} of {task.runs}", first, name, int(counts[number, name]))
    return verdict


class _Noise:
    """Matrix products on another stream, so that a kernel's programs start in another order than without them."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.matrix = torch.randn(1024, 1024, device="cuda")

    def start(self) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(4):
                torch.mm(self.matrix, self.matrix)


def _streams(task: CheckQuestion) -> CheckResult:
    """Two streams at once give what each gives alone."""
    runs = [_Run(task), _Run(task.beside or task)]
    expected = [run() for run in runs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for number in range(max(task.runs // 10, 1)):
        results = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run())
        torch.cuda.synchronize()
        for alone, result in zip(expected, results, strict=True):
            _same(alone, result, f"two streams, round {number + 1}")
    return CheckResult()


def _threads(task: CheckQuestion) -> CheckResult:
    """Two threads, each with a stream, give what one gives alone."""
    expected, runs = _Run(task)(), [_Run(task), _Run(task)]
    torch.cuda.synchronize()
    faults: list[BaseException] = []

    def repeat(run: _Run) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for number in range(max(task.runs // 10, 1)):
                    result = run()
                    torch.cuda.current_stream().synchronize()
                    _same(expected, result, f"two threads, round {number + 1}")
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that is waited for
            faults.append(error)

    threads = [threading.Thread(target=repeat, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fault in faults:
        raise fault
    return CheckResult()


def _configured(task: CheckQuestion) -> AbstractContextManager[None]:
    """Have `kernels.dispatch` take the task's configuration for its phase."""

    def asked(_: Problem, implementation: str, backward: bool) -> Any:
        return task.config if (implementation, backward) == (task.implementation, task.backward) else None

    return configured(asked)


def _graph(task: CheckQuestion) -> CheckResult:
    """A CUDA graph of the whole module gives what the module gives, on other input than it was captured with."""
    with _configured(task):
        return _graph_of_module(task)


def _module(task: CheckQuestion, layers: int = 1) -> Any:
    """The module of a task's sizes, which reads 64 features."""
    sizes = {"bidirectional": task.sizes.directions > 1, "implementation": task.implementation}
    lstm = importlib.import_module("..lstm", __package__).LSTM
    return lstm(64, task.sizes.hidden, layers, **sizes).to(DEVICE, task.sizes.dtype)


def _graph_of_module(task: CheckQuestion) -> CheckResult:
    module = _module(task)
    shape = (task.sizes.steps, task.sizes.batch, 64)
    x, other = (
        torch.randn(shape, device="cuda", dtype=task.sizes.dtype, requires_grad=task.backward) for _ in range(2)
    )

    if task.backward:
        eager = _results(module, other, task)
        graphed = torch.cuda.make_graphed_callables(module, (x,))
        _close(eager, _results(module, other, task, graphed), task)
        return CheckResult()
    module.eval()
    with torch.no_grad():
        eager = _results(module, other, task)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(x)[0]
        # Twice, since counters that are not reset between replays fail the second time.
        for value in (x.clone(), other):
            x.copy_(value)
            output.fill_(float("nan"))
            graph.replay()
    _close({"output": eager["output"]}, {"output": output}, task)
    return CheckResult()


def _replay(task: CheckQuestion) -> CheckResult:
    """The module's own graphs give what launching gives, on other input and weights in the same memory."""
    with _configured(task):
        module = _module(task, layers=2).train(task.backward)
        twin, shape = copy.deepcopy(module), (task.sizes.steps, task.sizes.batch, 64)
        # Each in memory of its own that stays in use, so no graph is found for it; and nothing stays in use later.
        inputs = [_input(shape, task) for _ in range(graph_cache.SIGHTINGS + 6)]
        expected = [_shrunk_results(twin, value, task) for value in inputs]
        x, before = _input(shape, task), graph_cache.state()
        for value, right in zip(inputs, expected, strict=True):
            with torch.no_grad():
                x.copy_(value)
            _close(right, _shrunk_results(module, x, task), task)
        after = graph_cache.state()
    passes = 2 if task.backward else 1
    if after.captured < before.captured + passes or after.replayed < before.replayed + passes + 1:
        return CheckResult(text="the same memory never came back, so nothing was replayed", worst=2.0)
    return CheckResult()


def _input(shape: tuple[int, ...], task: CheckQuestion) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=task.sizes.dtype, requires_grad=task.backward)


def _shrunk_results(module: Any, value: Tensor, task: CheckQuestion) -> dict[str, Tensor]:
    """Results with weights that were changed in place just before."""
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.9)
        if not task.backward:
            return _results(module, value, task)
    return _results(module, value, task)


def _results(
    module: Any, value: Tensor, task: CheckQuestion, function: Callable[[Tensor], Any] | None = None
) -> dict[str, Tensor]:
    """Outputs of a module, or where the task is a backward pass all gradients, in memory of their own.

    Args:
        module: it has the parameters.
        value: its input.
        task: for which pass.
        function: what is called; the module when None.
    """
    output, (h_n, c_n) = (function or module)(value)
    if not task.backward:
        return {name: v.clone() for name, v in (("output", output), ("h_n", h_n), ("c_n", c_n))}
    gradients = torch.autograd.grad(output.float().square().sum(), [value, *module.parameters()])
    return {str(number): gradient.clone() for number, gradient in enumerate(gradients)}


def _close(expected: dict[str, Tensor], got: dict[str, Tensor], task: CheckQuestion) -> None:
    """Equal but for the order in which a library adds."""
    for name, value in expected.items():
        error = ((value.double() - got[name].double()).norm() / value.double().norm()).item()
        if not error <= limit("grad_gates", task.sizes.dtype):
            msg = f"graph and module differ in {name} by {error:.2e}"
            raise AssertionError(msg)


def _same(expected: dict[str, Tensor], got: dict[str, Tensor], when: str) -> None:
    counts = _differing(expected, got).tolist()
    for index, count in enumerate(counts):
        if count:
            _refuse(when, expected, index, count)


def _differing(expected: dict[str, Tensor], got: dict[str, Tensor]) -> Tensor:
    """Number of elements of each result that differ, NaN from everything: (results,) int64, where the results are."""
    return torch.stack([(value != got[name]).sum() for name, value in expected.items()])


def _refuse(when: str, expected: dict[str, Tensor], index: int, count: int) -> None:
    name = list(expected)[index]
    msg = f"{when}: {count} of {expected[name].numel()} elements of {name} differ from the first run"
    raise AssertionError(msg)
