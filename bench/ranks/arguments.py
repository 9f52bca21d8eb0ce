"""The grammar of `python -m bench ranks`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from bench.run.resume import SEEDS
from kernels.host.numbers import duration, seconds, whole

SCALINGS = ("strong", "weak")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
BUCKET_MB = 25.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = command.add_argument
    several = functools.partial(add, action="append", default=[])
    add("--workload", default="seed", metavar="NAME", help="workload, overrides as seed@batch=64 (default: seed)")
    add("--variant", metavar="NAME", help="variant, eager and in fp32 (default: onednn, on GPUs cudnn)")
    add(
        "--device",
        choices=tuple(BACKENDS),
        default="cpu",
        help="cpu: gradients are exchanged by gloo; cuda: by NCCL, with a GPU for each rank (default: cpu)",
    )
    several(
        "--scaling",
        choices=SCALINGS,
        help="strong: the ranks share the workload's batch; weak: each has one of its own; can be repeated (default: "
        "both)",
    )
    several(
        "--world",
        type=whole(),
        metavar="N",
        help="ranks that take part, at most as many as torchrun started; can be repeated (default: 1, 2, 4 and so on, "
        "and all)",
    )
    several(
        "--bucket-mb",
        type=seconds,
        metavar="MB",
        help=f"size of a gradient bucket; can be repeated (default: {BUCKET_MB:g}, as in PyTorch)",
    )
    several(
        "--accumulate",
        type=whole(),
        metavar="N",
        help="micro-batches into which a rank divides its part of a step; their gradients are exchanged once; can be "
        "repeated (default: 1)",
    )
    add(
        "--rounds",
        type=whole(2),
        default=10,
        metavar="N",
        help="rounds, in each of which every way to divide the work has a turn (default: 10)",
    )
    add("--steps", type=whole(), default=5, metavar="N", help="training steps in a turn (default: 5)")
    add("--threads", type=whole(), default=1, metavar="N", help="CPU threads of each rank (default: 1)")
    add(
        "--silence",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="seconds that a collective waits for a rank; a rank that is silent for twice as long counts as hung "
        "(default: 60)",
    )
    add("--time-limit", type=duration, default=900.0, metavar="TIME", help="time for everything (default: 15min)")
    add("--exchange", type=Path, metavar="DIR", help="folder that all machines share; needed with several machines")
    several("--plugin", type=Path, metavar="FILE.py", help="as in run; can be repeated")
    add("--seed", type=whole(0, SEEDS), default=1, metavar="N", help="seed of the gate (default: 1)")
    add("--out", type=Path, metavar="DIR", help="new folder (default: results/runs/TIME-ranks)")
