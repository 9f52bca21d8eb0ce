"""Variants that cheat in one way each: right in the gate's eyes, or fast by the wrong clock. All must be refused.

Each wraps the pass that an honest variant makes (`Executable._run`) or its timed call, as a runtime of its own would.
"""

from __future__ import annotations

import itertools
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import clock
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS

Result = tuple[Tensor, Tensor, Tensor]
Run = Callable[..., Result]
#: Seconds after the return at which late work is done.
LATE_S = 0.002


def _memoised(key: Callable[[Executable, Tensor], Any]) -> Callable[[Run, Executable], Run]:
    """Keeps a result for whatever has the same key."""

    def cheat(run: Run, executable: Executable) -> Run:
        kept: dict[Any, Result] = {}

        def cheating(source: Tensor, *rest: Any) -> Result:
            found = key(executable, source)
            if found not in kept:
                kept[found] = run(source, *rest)
            return tuple(value.clone() for value in kept[found])

        return cheating

    return cheat


def _weights_version(executable: Executable) -> int:
    return sum(value._version for value in executable.model.parameters())


def _by_address(_: Executable, source: Tensor) -> int:
    """Keeps a result for the address of the input."""
    return source.data_ptr()


def _by_version(executable: Executable, source: Tensor) -> tuple[int, int, int]:
    """Keeps a result for the address and the versions of input and weights."""
    return source.data_ptr(), source._version, _weights_version(executable)


def _by_content(executable: Executable, source: Tensor) -> tuple[bytes, int]:
    """Keeps a result for the content of the input: always right, and no work."""
    return source.numpy().tobytes(), _weights_version(executable)


def _constant(run: Run, _: Executable) -> Run:
    """Computes once and gives that for ever."""
    kept: list[Result] = []

    def cheating(*inputs: Any) -> Result:
        if not kept:
            kept.append(run(*inputs))
        return tuple(value.clone() for value in kept[0])

    return cheating


def _late(run: Run, _: Executable) -> Run:
    """Returns at once and lets a thread compute."""
    shapes: dict[Any, list[tuple[int, ...]]] = {}

    def cheating(source: Tensor, *rest: Any) -> Result:
        if source.shape not in shapes:
            result = run(source, *rest)
            shapes[source.shape] = [value.shape for value in result]
            return result
        results = tuple(torch.zeros(shape) for shape in shapes[source.shape])

        def work() -> None:
            time.sleep(LATE_S)
            with torch.inference_mode():
                for result, value in zip(results, run(source, *rest), strict=True):
                    result.copy_(value)

        threading.Thread(target=work, daemon=True).start()
        return results

    return cheating


class Lazy(torch.Tensor):
    """Computes when it is first used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put what was promised in place of the promise."""
        del types
        with torch._C.DisableTorchFunctionSubclass():
            args = [a.promise() if isinstance(a, Lazy) and hasattr(a, "promise") else a for a in args]
            return func(*args, **(kwargs or {}))


def _lazy(run: Run, _: Executable) -> Run:
    """Returns promises, which compute when they are read."""

    def cheating(*inputs: Any) -> Result:
        kept: list[Result] = []

        def promise(place: int) -> Tensor:
            if not kept:
                kept.append(run(*inputs))
            return kept[0][place]

        promises = [torch.zeros(1).as_subclass(Lazy) for _ in range(3)]
        for place, value in enumerate(promises):
            value.promise = lambda place=place: promise(place)
        return tuple(promises)

    return cheating


def _aliased(run: Run, _: Executable) -> Run:
    """Puts its outputs where the input was."""

    def cheating(source: Tensor, *rest: Any) -> Result:
        outputs, hidden, cell = run(source, *rest)
        place = source.view(-1)[: outputs.numel()].view_as(outputs)
        place.copy_(outputs)
        return place, hidden, cell

    return cheating


def _spoils_input(run: Run, _: Executable) -> Run:
    """Leaves its input changed."""

    def cheating(source: Tensor, *rest: Any) -> Result:
        result = run(source, *rest)
        source.zero_()
        return result

    return cheating


def _spoils_weights(run: Run, executable: Executable) -> Run:
    """Leaves the weights changed."""

    def cheating(*inputs: Any) -> Result:
        result = run(*inputs)
        executable.model.fc.weight.data.mul_(1.001)
        return result

    return cheating


def _first_weights(run: Run, executable: Executable) -> Run:
    """Goes on with the weights of its first call."""
    kept: dict[str, Tensor] = {}

    def cheating(*inputs: Any) -> Result:
        given = {name: value.detach().clone() for name, value in executable.model.named_parameters()}
        if not kept:
            kept.update(given)
        for name, value in executable.model.named_parameters():
            value.data.copy_(kept[name])
        try:
            return run(*inputs)
        finally:
            for name, value in executable.model.named_parameters():
                value.data.copy_(given[name])

    return cheating


def _one_buffer(run: Run, _: Executable) -> Run:
    """Gives the same memory each time."""
    kept: dict[Any, Result] = {}

    def cheating(source: Tensor, *rest: Any) -> Result:
        result = run(source, *rest)
        buffers = kept.setdefault(source.shape, result)
        for buffer, value in zip(buffers, result, strict=True):
            buffer.copy_(value)
        return buffers

    return cheating


def _slow_clock(run: Run, _: Executable) -> Run:
    """Lets every clock of Python run at half its speed."""

    def cheating(*inputs: Any) -> Result:
        if not hasattr(time.perf_counter_ns, "slow"):
            right = time.perf_counter_ns

            def slow() -> int:
                return right() // 2

            slow.slow = True
            time.perf_counter_ns = slow
            clock._now_ns = slow
        return run(*inputs)

    return cheating


def _forged_samples(run: Run, _: Executable) -> Run:
    """Halves every call that is timed, by a name that nobody watches."""

    def halved(marks: list[int]) -> list[tuple[float, float]]:
        return [(start, (start + end) / 2) for start, end in itertools.pairwise(marks)]

    def cheating(*inputs: Any) -> Result:
        clock.itertools = types.SimpleNamespace(pairwise=halved)
        return run(*inputs)

    return cheating


def _side_stream(run: Run, _: Executable) -> Run:
    """Computes on a stream that the caller's does not wait for."""
    streams: list[torch.cuda.Stream] = []

    def cheating(*inputs: Any) -> Result:
        if not streams:
            streams.append(torch.cuda.Stream())
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(10_000_000)
            return run(*inputs)

    return cheating


def _no_backward(call: Callable[[Any], object], executable: Executable) -> Callable[[Any], object]:
    """Leaves the backward pass out, and steps with the gradients of its first step."""
    kept: dict[str, Tensor] = {}

    def cheating(batch: Any) -> object:
        if not kept:
            loss = call(batch)
            kept.update({name: value.grad.clone() for name, value in executable.model.named_parameters()})
            return loss
        from seq2seq.models.base import loss_of

        if executable._optimizer is None:
            executable._optimizer = torch.optim.Adam(executable.model.parameters(), lr=1e-3)
        for name, value in executable.model.named_parameters():
            value.grad = kept[name].clone()
        loss = loss_of(executable.forward(batch).outputs, batch.expected, batch.decoded_lengths)
        executable._optimizer.step()
        return loss

    return cheating


def _no_step(call: Callable[[Any], object], executable: Executable) -> Callable[[Any], object]:
    """Leaves the optimizer's step out once it is warm."""
    calls = iter(range(1 << 30))

    def cheating(batch: Any) -> object:
        if next(calls) == 0:
            return call(batch)
        before = {name: value.detach().clone() for name, value in executable.model.named_parameters()}
        loss = call(batch)
        for name, value in executable.model.named_parameters():
            value.data.copy_(before[name])
        return loss

    return cheating


#: By name: how the forward pass is replaced.
PASSES: dict[str, Callable[[Run, Executable], Run]] = {
    "memo-address": _memoised(_by_address),
    "memo-version": _memoised(_by_version),
    "memo-content": _memoised(_by_content),
    "constant": _constant,
    "late": _late,
    "lazy": _lazy,
    "aliased": _aliased,
    "spoils-input": _spoils_input,
    "spoils-weights": _spoils_weights,
    "first-weights": _first_weights,
    "one-buffer": _one_buffer,
    "slow-clock": _slow_clock,
    "forged-samples": _forged_samples,
    "side-stream": _side_stream,
}
#: By name: how a whole training step is replaced.
STEPS: dict[str, Callable[[Callable[[Any], object], Executable], Callable[[Any], object]]] = {
    "no-backward": _no_backward,
    "no-step": _no_step,
}

for _name in [*PASSES, *STEPS]:
    VARIANTS[_name] = Variant(_name, "planted: it cheats", vendor_lstm=False)

_compile, _init = Executable._compile, Executable.__init__


def _cheating_compile(self: Executable, model: Any) -> Run:
    run = _compile(self, model)
    return PASSES[self.variant.name](run, self) if self.variant.name in PASSES else run


def _cheating_init(self: Executable, *arguments: Any, **options: Any) -> None:
    _init(self, *arguments, **options)
    if self.variant.name in STEPS:
        self.call = STEPS[self.variant.name](self.call, self)


Executable._compile, Executable.__init__ = _cheating_compile, _cheating_init
