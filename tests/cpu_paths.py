"""Every path of the CPU kernel once, against torch.nn.LSTM: a program, for a sanitizer to watch.

`python -m kernels sanitize -- tests/cpu_paths.py`; with the argument `overflow` it writes past a tensor
afterwards.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from kernels import LSTM
from kernels.cpu import fused, teams
from kernels.cpu.build import library
from kernels.cpu.packing import TRAINED

#: What each storage may be off by.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2}
if not fused.storage_hindrance("split"):
    ALLOWED["split"] = 1e-4
if not fused.storage_hindrance("w8a8"):
    ALLOWED["w8a8"] = 4e-2
#: Whether there are products of bf16 with gradients.
CASTS = not fused.storage_hindrance(TRAINED)


def pair(*sizes: int, storage: str = "fp32", **options: bool) -> tuple[torch.nn.LSTM, LSTM]:
    """Module of torch and ours, with the same parameters in float32."""
    theirs = torch.nn.LSTM(*sizes, **options, dtype=torch.float32)
    ours = LSTM(*sizes, **options, dtype=torch.float32, implementation="cpu-fused", weight_storage=storage)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(found: object, expected: object, allowed: float = 1e-5) -> None:
    """Compare nested results."""
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


def inference(batch: int, steps: int, features: int, hidden: int, storage: str) -> None:
    """Forward in both directions and orders, with a state, expanded input and lengths, and steps in place."""
    for batch_first in (False, True):
        theirs, ours = pair(features, hidden, 2, storage=storage, batch_first=batch_first, bidirectional=True)
        x = torch.randn(steps, 1, features, dtype=torch.float32).expand(steps, batch, features)
        x = x.transpose(0, 1) if batch_first else x
        state = torch.randn(2, 4, batch, hidden, dtype=torch.float32).unbind()
        with torch.no_grad():
            for _ in range(2):  # The second call is the short way.
                close(ours(x, state), theirs(x, state), ALLOWED[storage])
                close(ours(x.contiguous()), theirs(x), ALLOWED[storage])
            ours(x, None, torch.randint(0, steps + 1, (batch,)))
    theirs, ours = pair(features, hidden, 2, storage=storage)
    h, c = torch.randn(2, 2, batch, hidden, dtype=torch.float32).unbind()
    with torch.no_grad():
        for x in torch.randn(3, batch, features, dtype=torch.float32):
            expected, (h_n, c_n) = theirs(x[None], (h.clone(), c.clone()))
            close(ours.step(x, (h, c)), expected[0], ALLOWED[storage])
            close((h, c), (h_n, c_n), ALLOWED[storage])


def training(batch: int, steps: int, features: int, hidden: int, *, masked: bool, cast: bool = False) -> None:
    """Forward and backward, with gradients of everything; by ours under autocast to bf16 if asked for."""
    theirs, ours = pair(features, hidden, 2, bidirectional=True)
    x = torch.randn(steps, batch, features, dtype=torch.float32, requires_grad=True)
    lengths = torch.randint(0, steps + 1, (batch,)) if masked else None
    state = [torch.randn(4, batch, hidden, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    found = []
    for run in (ours,) if masked else (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast and run is ours):
            output, (h_n, c_n) = run(x, state) if lengths is None else run(x, state, lengths)
        total = output.float().sum() + h_n.float().square().sum() + c_n.float().square().sum()
        found.append(torch.autograd.grad(total, [x, *state, *run.parameters()]))
    if not masked and not cast:
        close(*found, allowed=1e-4)
    for value, expected in () if masked else zip(*found, strict=True):
        assert (value - expected).norm() <= 8e-2 * max(float(expected.norm()), 0.1 * expected.numel() ** 0.5)


def overflow() -> None:
    """Pack a matrix into a tensor that is too small for it."""
    lanes = library().lanes()
    weight = torch.randn(80, 20, dtype=torch.float32)
    packed = torch.empty(-(-20 // lanes) * lanes * 80 - 8, dtype=torch.float32)
    library(kept=0).pack_backward(weight.data_ptr(), packed.data_ptr(), 20, 20, 0)
    print("unseen")


def main() -> None:
    """Run all of them, alone and in teams, in default types in which memory would be too small too."""
    sizes = ((0, 2, 3, 4), (1, 1, 1, 1), (1, 5, 3, 20), (5, 1, 70, 33), (9, 4, 2, 17), (2, 40, 9, 40))
    for dtype, threads in ((torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 1), (torch.float16, 3)):
        torch.set_default_dtype(dtype)
        casts = CASTS and dtype is torch.float32
        with (
            mock.patch.object(teams, "WORTH_A_THREAD", 1),
            mock.patch.object(teams, "WORTH_A_MEETING", 1),
            mock.patch.object(torch, "get_num_threads", return_value=threads),
            mock.patch.object(teams, "cores", return_value=threads),
        ):
            for size in sizes:
                for storage in ALLOWED:
                    inference(*size, storage)
                for masked, cast in itertools.product((False, True), (False, True) if casts else (False,)):
                    training(*size, masked=masked, cast=cast)
    print("every path is as torch's", flush=True)


if __name__ == "__main__":
    main()
    if sys.argv[1:] == ["overflow"]:
        overflow()
