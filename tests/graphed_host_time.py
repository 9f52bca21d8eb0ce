"""Host time of a short LSTM training step on a GPU, measured without one: `python tests/graphed_host_time.py`.

Kernels and CUDA graphs are stand-ins that do nothing, so what is left is the Python and torch code around them: all of
what a replayed pass costs the host, less the start of the graph by CUDA. With other checkouts as arguments, each is
measured in processes in turns with the others, and all are compared with the first:

    python tests/graphed_host_time.py ../before . --turns 9
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

#: Calls of each case in a process, the shortest of which counts: nothing but interruptions makes one longer.
CALLS = 1500
#: Replays do nothing, so sizes do not matter, but tensors must be large enough for the C library to give the memory of
#: the step before back at the same addresses, without which nothing is replayed. So must its settings.
SIZES = {"input_size": 3, "hidden_size": 64, "batch_first": True}
BATCH, STEPS = 64, 5
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


class Absent:
    """A device of `kernels.gpu.graph_cache` whose replays do nothing."""

    def busy(self) -> None:
        """Return None: it never is."""

    def obstacle(self, tensors: Sequence[Any]) -> None:
        """Return None: any tensors go."""

    def place(self) -> tuple[int, int, int]:
        """Return the one place there is: device, stream and thread."""
        return 0, 0, 0

    def lane(self, others: Sequence[Any]) -> object:
        """Return anything."""
        del others
        return object()

    def capture(self, launch: Callable[[], None], lane: object) -> Callable[[], None]:
        """Return what replays the launches, which is nothing."""
        del launch, lane
        return lambda: None

    def wait(self) -> None:
        """Return at once."""


def main() -> None:
    """Measure each checkout in turns and print medians over the turns, with quartiles of the ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("checkouts", nargs="*", type=Path, default=[here], help="folders with `kernels/`; this one")
    parser.add_argument("--turns", type=int, default=5, help="processes of each checkout")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.layers)))
        return
    found: list[list[dict[str, float]]] = [[] for _ in options.checkouts]
    for _ in range(options.turns):
        for own, checkout in zip(found, options.checkouts, strict=True):
            own.append(in_a_process(checkout, options.layers))
    for case in found[0][0]:
        print(f"{case}:")
        for own, checkout in zip(found, options.checkouts, strict=True):
            ratios = [one[case] / first[case] for one, first in zip(own, found[0], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            us = statistics.median(one[case] for one in own)
            print(f"  {us:6.1f} us, {middle:.3f} [{low:.3f}, {high:.3f}] of the first  {checkout}")


def in_a_process(checkout: Path, layers: int) -> dict[str, float]:
    """What `measure` returns for a checkout, in a new process of one thread."""
    command = [sys.executable, __file__, "--in-this-process", "--layers", str(layers)]
    settings = {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"} | MEMORY
    done = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(layers: int) -> dict[str, float]:
    """Return the shortest time of each case, in microseconds."""
    from kernels import LSTM, dispatch, graphed_layers, graphed_training
    from kernels.gpu.graph_cache import Graphs

    graphs = Graphs(Absent())
    nothing = SimpleNamespace(
        refuses=lambda *_, **__: None,
        configs=lambda *_, **__: [None],
        forward=lambda *_: None,
        backward=lambda *_: None,
    )
    dispatch._module = lambda _: nothing
    graphed_layers.GraphedLayers.__init__.__defaults__ = (graphs,)
    # Memory may need long to come back.
    graphed_layers.MOST_MISSES = sys.maxsize
    found = {}
    # What is launched one by one computes its products, which small sizes keep out of the figure.
    for way, most, batch, hidden in (("launched one by one", 0, 2, 4), ("replayed", None, BATCH, SIZES["hidden_size"])):
        if most is not None:
            usual, graphed_training.MOST_BYTES = graphed_training.MOST_BYTES, most
        else:
            graphed_training.MOST_BYTES = usual
        for cast in (False, True):
            lstm = LSTM(**SIZES | {"hidden_size": hidden}, num_layers=layers, implementation="persistent")
            x = torch.randn(batch, STEPS, SIZES["input_size"])
            suffix = ", autocast to bfloat16" if cast else ""
            with torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext():
                forward, both = shortest(lstm, x, (lambda: graphs.state().replayed) if most is None else None)
            found[f"forward, {way}{suffix}"] = forward
            found[f"forward and backward, {way}{suffix}"] = both
    one = torch.ones(1, requires_grad=True)
    grad = torch.ones(1)
    times = []
    for _ in range(CALLS):
        one.grad = None
        start = time.perf_counter_ns()
        (one * 1).backward(grad)
        times.append(time.perf_counter_ns() - start)
    found["torch's own `x * 1` and its backward pass"] = min(times) / 1e3
    return found


def shortest(lstm: torch.nn.Module, x: torch.Tensor, replays: Callable[[], int] | None) -> tuple[float, float]:
    """Shortest time of a forward pass, and of one with its backward pass, in microseconds.

    Args:
        lstm: the layers.
        x: their input.
        replays: counts replays; with it, only calls count of which both passes were.
    """
    output, _ = lstm(x)
    grad, parameters = torch.ones_like(output), list(lstm.parameters())
    del output, _
    # Written to and not appended to: memory that grows would move what is allocated.
    forward, both, took = [0] * CALLS, [0] * CALLS, [2] * CALLS
    gc.collect()
    gc.disable()
    for number in range(CALLS):
        for value in parameters:
            value.grad = None
        before = replays() if replays else 0
        start = time.perf_counter_ns()
        output, state = lstm(x)
        middle = time.perf_counter_ns()
        output.backward(grad)
        end = time.perf_counter_ns()
        del output, state
        forward[number], both[number] = middle - start, end - start
        if replays:
            took[number] = replays() - before
    gc.enable()
    count = [number for number, passes in enumerate(took) if passes == 2]
    if len(count) < CALLS // 2:
        msg = f"both passes were replays in {len(count)} of {CALLS} calls: the memory did not come back"
        raise RuntimeError(msg)
    return min(forward[number] for number in count) / 1e3, min(both[number] for number in count) / 1e3


if __name__ == "__main__":
    main()
