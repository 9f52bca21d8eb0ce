"""Run folders without a run: written by the code that writes real ones, from times that were drawn.

Every variant's time is what the test says, times a noise of each round and one of each process.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.analysis.figures import figures
from bench.machine.interference import Interference
from bench.plan.cases import REFERENCE, Case
from bench.records.block import Block
from bench.records.folder import RunFolder
from bench.records.rounds import Round, Samples
from bench.records.schema import Record, Status

#: Seconds of the reference; the other variants' are over their speedups.
REFERENCE_S = 1e-3
SPEEDUPS = {REFERENCE: 1.0, "onednn": 2.0, "loop": 0.5}
FACTS = {"batch": 16, "source_steps": 10, "target_steps": 10, "valid_steps": 320, "hidden_size": 16, "num_layers": 1}
ENVIRONMENT: dict[str, Any] = {
    "machine": {
        "system": "Linux-6.1",
        "architecture": "x86_64",
        "processor": "Some CPU",
        "vector_flags": ["avx2", "fma"],
        "cores_physical": 2,
        "cores_logical": 4,
        "memory_bytes": 16_000_000_000,
        "affinity": [0, 1, 2, 3],
        "governor": "performance",
        "frequency_mhz": 3000,
        "gpu": "none",
    },
    "software": {
        "python": "3.11.7",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "numpy": "2.4.0",
        "cpu_capability": "AVX2",
        "onednn": "3.12.0",
        "openmp": "201511",
        "blas": "mkl",
        "compiler": "GCC 13.3",
        "cuda": "none",
    },
    "threads": {"workers": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, "inherited": {"KMP_BLOCKTIME": "1"}},
    "git": {"commit": "0123456789abcdef", "dirty": False, "changed_files": 0},
    "run": {"suite": "made"},
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a made-up run.

    Attributes:
        speedups: of each variant; 0 and the variant is in no round.
        precisions: of variants that are not in fp32.
        failed: variants that did not end ok, with status and reason.
        drift: how much longer everything took, as on a busier machine.
        noise, process_noise: standard deviations of the logarithm, of a round and of a process.
        queued: whether blocks are queued, as on a GPU.
        figured: whether records carry their figures, which take longer than all the rest.
    """

    speedups: Mapping[str, float] = field(default_factory=lambda: dict(SPEEDUPS))
    precisions: Mapping[str, str] = field(default_factory=dict)
    workloads: tuple[str, ...] = ("seed",)
    failed: Mapping[str, tuple[Status, str]] = field(default_factory=dict)
    rounds: int = 20
    processes: int = 3
    drift: float = 1.0
    noise: float = 0.01
    process_noise: float = 0.0
    disturbed_share: float = 0.0
    queued: bool = False
    threads: int = 1
    seed: int = 0
    figured: bool = False
    facts: Mapping[str, Any] = field(default_factory=lambda: dict(FACTS))


def make_run(path: Path, environment: Mapping[str, Any] | None = None, **recipe: Any) -> Path:
    """Write the run folder of a recipe, and of an environment (`ENVIRONMENT` unless given); returns its path."""
    made = Recipe(**recipe)
    generator = np.random.default_rng(made.seed)
    folder = RunFolder.create(path, "made")
    for workload in made.workloads:
        samples = Samples([_process(made, generator) for _ in range(made.processes)])
        for variant in [*made.speedups, *(name for name in made.failed if name not in made.speedups)]:
            _write_case(folder, made, Case(workload, variant, "inference", "cpu", made.threads), samples)
    folder.write_json("environment.json", dict(ENVIRONMENT if environment is None else environment))
    folder.write_table()
    return folder.path


def changed(section: str, **values: Any) -> dict[str, Any]:
    """`ENVIRONMENT` with other values in a section; None takes a key away."""
    found = copy.deepcopy(ENVIRONMENT)
    found[section] |= values
    found[section] = {name: value for name, value in found[section].items() if value is not None}
    return found


def _process(made: Recipe, generator: np.random.Generator) -> list[Round]:
    level = {name: np.exp(generator.normal(0, made.process_noise)) for name in made.speedups}
    rounds = []
    for number in range(made.rounds):
        blocks = {}
        for variant in generator.permutation([name for name in made.speedups if name not in made.failed]):
            typical_s = REFERENCE_S * made.drift / made.speedups[variant] * level[variant]
            typical_s *= np.exp(generator.normal(0, made.noise))
            calls_s = (typical_s * 0.98, typical_s, typical_s * 1.3)
            blocks[str(variant)] = Block(calls_s, *((10, 10 * typical_s, 9 * typical_s) if made.queued else ()))
        beside = Interference(why="made up" if generator.random() < made.disturbed_share else "")
        rounds.append(Round(number, blocks, beside=beside))
    return rounds


def _write_case(folder: RunFolder, made: Recipe, case: Case, samples: Samples) -> None:
    """As the runner ends a case: samples first, then the record."""
    common = {name: getattr(case, name) for name in ("workload", "variant", "mode", "device", "threads", "group")}
    record = Record(**common, precision=made.precisions.get(case.variant, "fp32"), **made.facts)
    if case.variant in made.failed:
        status, reason = made.failed[case.variant]
        folder.append(dataclasses.replace(record, status=status, reason=reason))
        return
    for process, rounds in enumerate(samples.processes):
        folder.append_samples(samples.rows(case, process, rounds))
    timing = figures(case, samples, REFERENCE, 0.05, dict(made.facts)) if made.figured else {}
    folder.append(dataclasses.replace(record, **timing))
