"""A Chrome trace of one call of a case: `python -m bench.worker.chrome_trace WORKLOAD VARIANT MODE DEVICE FILE`."""

from __future__ import annotations

import os
import sys

from torch import profiler

from bench.plan.cases import executed
from bench.run.worker_process import plugin_paths
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED
from bench.worker.server import load_plugins
from kernels.host.output import run_command
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model.catalogue import add_variants
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

#: Calls before the one that is traced: what the first ones compile or convert is not part of it.
WARM = 3


def main() -> int:
    """Write the trace."""
    workload_name, variant, mode, device, path = sys.argv[1:]
    load_plugins(plugin_paths())
    add_variants()
    workload = find_workload(workload_name)
    chosen = VARIANTS[executed(variant)]
    if chosen.environment.items() - os.environ.items():
        # Libraries read these variables once, when they are loaded.
        words = [sys.executable, "-m", "bench.worker.chrome_trace", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | chosen.environment)  # noqa: S606 - our own module
    weights = starting_weights(workload, WEIGHTS_SEED)
    executable = execute(workload, chosen, mode, device, weights)
    batch = executable.prepare(workload.make_batch(TIMED_SEED))
    activities = [profiler.ProfilerActivity.CPU]
    activities += [profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with executable.context():
        for _ in range(WARM):
            executable.call(batch)
        with profiler.profile(activities=activities, record_shapes=True) as profile:
            executable.call(batch)
    profile.export_chrome_trace(path)
    return 0


if __name__ == "__main__":
    run_command(main)
