"""The result row of one case, and the schema of everything a run folder holds.

`Record` is the single source of the columns of ``records.csv``: their names, order, units and meaning
are the fields below, and ``results/columns.md`` is checked against them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.plan.identity import CaseKey

#: History of the schema.
#: 1: first version.
#: 2: how OpenMP waited; FLOPs, bytes and share of the machine's ceiling; rounds.csv.gz.
#: 3: the mode `decode`: beam, tokens per second, latency of a token.
#: 4: standing in the group, command that measures a case again; own models' set of inputs, its weight, the metric.
#: 5: energy of a sequence and of a token, power, idle power, the counter that says so; energy.csv.gz.
#: 6: ratio to the best of the group; a reason with `ok`, if a process failed in a further seating.
#: 7: whether the best of a group is certain in each state of the machine.
SCHEMA_VERSION = 7


class Status(enum.StrEnum):
    """Status with which a case ended."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    PARITY_FAILED = "parity-failed"
    IMPOSSIBLE = "impossible"
    OOM = "oom"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    ERROR = "error"


def column(meaning: str, default: Any = None) -> Any:
    """A record field with its meaning, as printed in the dictionary of columns."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Record:
    """One row of ``records.csv``: one case, what ran, what it took, and how sure that is.

    An empty cell means "not measured" or "the samples cannot carry this figure", never zero.
    """

    workload: str = column(
        "The name of the workload with any overrides, such as `seed`, `seed@batch=64` or `checkpoint:PATH@batch=8`.",
        "",
    )
    model: str = column(
        "The model family, such as `lstm` for the Seq2Seq of the workload `seed`, or `lstm-alone` for one LSTM and "
        "nothing else.",
        "",
    )
    variant: str = column("The name of the variant.", "")
    mode: str = column(
        "The mode: `inference`, `training` (forward pass, backward pass and optimizer step) or `decode` (the model "
        "is fed its own output).",
        "",
    )
    device: str = column("The device that the case ran on: `cpu` or `cuda`.", "")
    precision: str = column(
        "The precision that the variant asks for, or that its runtime chooses here: `fp32`, `tf32`, `bf16`, `fp16` "
        "or `int8`.",
        "",
    )
    threads: int = column("The number of CPU threads that the worker was given.", 0)
    status: Status = column(
        "How the case ended: `ok`, `unavailable`, `parity-failed`, `impossible` (faster than the machine can be), "
        "`oom`, `timeout`, `crashed` or `error`.",
        Status.OK,
    )
    reason: str = column(
        "Why the status is not ok. For an ok case, how its process failed in a later seating, whose rounds are not "
        "in the figures. Otherwise empty.",
        "",
    )

    latency_p50_s: float | None = column("The median time of a single call, in seconds.")
    latency_p50_lo_s: float | None = column(
        "Lower end of the 95 % interval of `latency_p50_s` (bootstrap over seatings, then rounds), in seconds."
    )
    latency_p50_hi_s: float | None = column(
        "Upper end of the 95 % interval of `latency_p50_s` (bootstrap over seatings, then rounds), in seconds."
    )
    latency_p90_s: float | None = column(
        "The 90th percentile of the times of single calls, in seconds. Empty with fewer than 36 calls, or where more "
        "are needed to bound it."
    )
    latency_p90_lo_s: float | None = column("Lower end of the 95 % interval of `latency_p90_s`, in seconds.")
    latency_p90_hi_s: float | None = column("Upper end of the 95 % interval of `latency_p90_s`, in seconds.")
    latency_p95_s: float | None = column(
        "The 95th percentile of the times of single calls, in seconds. Empty with fewer than 72 calls, or where more "
        "are needed to bound it."
    )
    latency_p95_lo_s: float | None = column("Lower end of the 95 % interval of `latency_p95_s`, in seconds.")
    latency_p95_hi_s: float | None = column("Upper end of the 95 % interval of `latency_p95_s`, in seconds.")
    latency_p99_s: float | None = column(
        "The 99th percentile of the times of single calls, in seconds. Empty with fewer than 368 calls, or where "
        "more are needed to bound it."
    )
    latency_p99_lo_s: float | None = column("Lower end of the 95 % interval of `latency_p99_s`, in seconds.")
    latency_p99_hi_s: float | None = column("Upper end of the 95 % interval of `latency_p99_s`, in seconds.")
    device_p50_s: float | None = column(
        "The median device time of a call between two CUDA events, in seconds. Empty on a CPU."
    )
    throughput_seq_per_s: float | None = column(
        "Sequences per second at the workload's batch, as the median over rounds."
    )
    throughput_steps_per_s: float | None = column(
        "Time steps (tokens, frames or hours) per second, of source and target together, without padding."
    )

    tokens_per_s: float | None = column(
        "Decoded tokens (or forecast steps) per second, counted in the best hypothesis of each sequence. Empty "
        "except in `decode`."
    )
    token_latency_p50_s: float | None = column(
        "The median time of a call divided by its number of decoding steps, in seconds. Empty except in `decode`."
    )
    token_latency_p99_s: float | None = column(
        "The 99th percentile of the times of single calls divided by their number of decoding steps, in seconds. "
        "Empty where `latency_p99_s` is."
    )

    speedup: float | None = column(
        "The median over rounds of time(reference) / time(this variant), a ratio: 1 for `reference`, above 1 where "
        "this variant is faster."
    )
    speedup_lo: float | None = column(
        "Lower end of the 95 % interval of `speedup` (bootstrap over seatings, then rounds), a ratio."
    )
    speedup_hi: float | None = column(
        "Upper end of the 95 % interval of `speedup` (bootstrap over seatings, then rounds), a ratio."
    )
    standing: str = column(
        "The variant's place in its group, by ratios formed inside rounds: `best` has the shortest median time; "
        "`equal` is certainly within 3 % of it and not certainly slower; `slower` is certainly slower; otherwise "
        "`undecided`. Empty where nothing was timed.",
        "",
    )
    vs_best: float | None = column(
        "The median over rounds of time(the variant whose standing is `best`) / time(this variant), a ratio: below 1 "
        "where this variant is slower."
    )
    vs_best_lo: float | None = column(
        "Lower end of the 95 % interval of `vs_best` (bootstrap over seatings, then rounds), a ratio."
    )
    vs_best_hi: float | None = column(
        "Upper end of the 95 % interval of `vs_best`, a ratio. `standing` follows from these two ends, not from "
        "those of the speedups."
    )
    certain: bool | None = column(
        "For the `best`: whether all others are certainly slower, in undisturbed rounds and in those that only far "
        "cores disturbed, as far as there are six of a kind. Empty for the others."
    )
    interval_wide: bool | None = column("True if the interval of the speedup is wider than the suite asked for.")

    flops: int | None = column("The number of floating-point operations that one call needs at least, without padding.")
    least_bytes: int | None = column(
        "The bytes that one call must read or write, each counted once: weights, inputs, results and, in training, "
        "the state of the optimizer."
    )
    ceiling_share: float | None = column(
        "The least possible time of a call on this machine divided by the median time, a share. The least time is "
        "the longer of FLOPs over the rate of the fastest matrix product in the precision that ran, and bytes over "
        "the memory bandwidth."
    )
    bound: str = column("Which of these two times is the longer: `compute` or `memory`.", "")

    energy_per_seq_j: float | None = column(
        "The energy of a sequence in joules, as the median over seatings: what the counter of the whole package or "
        "board counted in the timed blocks, divided by their sequences. It includes idle power and everything else "
        "that ran there."
    )
    energy_per_seq_lo_j: float | None = column(
        "Lower end of the 95 % interval of `energy_per_seq_j` (Student's t over seatings), in joules."
    )
    energy_per_seq_hi_j: float | None = column(
        "Upper end of the 95 % interval of `energy_per_seq_j` (Student's t over seatings), in joules."
    )
    energy_per_token_j: float | None = column(
        "The energy of a token (time step, frame or hour, without padding; in `decode` a decoded token), in joules."
    )
    power_w: float | None = column("The mean power in the timed blocks by that counter, in watts.")
    idle_power_w: float | None = column(
        "The power by that counter during one second before the groups, when nothing of the run was working, in watts."
    )
    energy: str = column(
        "The name of the counter, such as `RAPL package-0` or `NVML`; or `unavailable` and the reason why there is "
        "no figure.",
        "",
    )

    memory_peak_bytes: int | None = column(
        "The highest resident memory above the baseline (torch imported, nothing built) in a fresh process, from the "
        "build through the first call to steady calls, in bytes."
    )
    memory_steady_bytes: int | None = column(
        "The highest resident memory during steady calls, above what is resident between calls, in bytes."
    )
    memory_baseline_bytes: int | None = column("The resident memory of the fresh process before the build, in bytes.")
    memory_cuda_allocated_bytes: int | None = column(
        "The peak of the memory that the CUDA allocator had allocated, in bytes. Empty on a CPU."
    )
    memory_cuda_reserved_bytes: int | None = column(
        "The peak of the memory that the CUDA allocator had reserved, in bytes. Empty on a CPU."
    )

    build_s: float | None = column("The time to construct, convert or script the model, in seconds.")
    first_call_s: float | None = column(
        "The time of the first call in a fresh process with an empty compiler cache, compiling included, in seconds."
    )
    compile_s: float | None = column(
        "The part of `first_call_s` that was spent compiling, by Dynamo and its backend (backward pass included) or "
        "by the C++ compiler of `cpu-fused`, in seconds. The C++ kernel is compiled once a run, and its seconds "
        "count in the first call of every case that needs it."
    )

    graphs: int | None = column(
        "The number of graphs that `torch.compile` captured. Empty if the variant does not compile."
    )
    graph_breaks: int | None = column("The number of graph breaks that Dynamo counted, without skipped frames.")
    recompiles: int | None = column("The number of frames that were compiled a second time or more.")
    evidence: str = column("What really ran, in words.", "")
    ran_precision: str = column(
        "The data types of the matrix products and LSTM operators that ran, as the profiler or the runtime reports "
        "them.",
        "",
    )
    ran_operators: str = column(
        "The operators or GPU kernels that ran and how often each, heaviest first, as the profiler or the runtime "
        "reports them.",
        "",
    )
    ran_threads: int | None = column("The number of threads that the math library or the runtime reported.")
    omp_wait: str = column(
        "How OpenMP threads wait for work: `default` (OMP_WAIT_POLICY is not set), `active` or `passive`.",
        "",
    )

    parity_error: float | None = column(
        "The relative error of the output, final state or loss that came nearest to its limit in any run of the gate."
    )
    parity_limit: float | None = column("The limit that applied to `parity_error`.")
    grad_error: float | None = column(
        "The relative error of the gradient that came nearest to its limit in any run of the gate. Empty in inference."
    )
    grad_limit: float | None = column("The limit that applied to `grad_error`.")
    parity_worst: str = column("The quantity that came nearest to its limit, or exceeded it.", "")

    samples: int | None = column("The number of samples that were kept: timed blocks of this variant, one per round.")
    calls: int | None = column("The number of single calls that were timed.")
    processes: int | None = column(
        "The number of seatings (full sets of fresh worker processes) whose rounds are in the figures."
    )
    disturbed: int | None = column(
        "The number of samples that were kept although something else used the machine or the host moved its cores "
        "apart."
    )

    data: str = column("Whether the data is `real` or `synthetic`, and what it is.", "")
    source: str = column("Where the workload's sizes come from and, for a checkpoint, its weights.", "")
    batch: int | None = column("The number of sequences in a batch.")
    source_steps: int | None = column("The length of the longest source sequence, in time steps.")
    target_steps: int | None = column(
        "The length of the longest target sequence, in time steps. Empty for an LSTM alone."
    )
    valid_steps: int | None = column(
        "The time steps of the measured batch, source and target together, without padding."
    )
    beam: int | None = column("The number of hypotheses of a sequence; 1 is greedy decoding. Empty except in `decode`.")
    hidden_size: int | None = column("The hidden size of the encoder, in units.")
    num_layers: int | None = column("The number of layers of the encoder.")
    parameters: int | None = column("The number of trainable parameters.")
    input_set: str | None = column(
        "The name of this set of inputs in the mix of a model of your own. Empty if there is a single set."
    )
    weight: float | None = column(
        "The share of all calls that use this set of inputs; the shares of a mix add up to 1. Empty except for a "
        "model of your own."
    )
    metric: float | None = column(
        "The score that your own metric gives this variant's output for the timed inputs. Empty without a metric."
    )
    sweep_axis: str = column(
        "What the sweep of the workload varies: `batch`, `hidden`, `length`, `layers` or `beam`. Otherwise empty.",
        "",
    )
    sweep_value: int | None = column("The value on that axis.")
    group: str = column("The name of the group in which the case was measured.", "")
    repro: str = column("The command that measures this case again, in a group with only the reference.", "")
    recorded_at: str = column("The time at which the record was written, in UTC.", "")
    schema_version: int = column("The version of this schema.", SCHEMA_VERSION)

    @property
    def key(self) -> CaseKey:
        """Key that distinguishes the record's case from all others of its run."""
        return CaseKey(self.workload, self.mode, self.device, self.threads, self.variant)

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values, in column order."""
        return dataclasses.asdict(self)


COLUMNS = tuple(f.name for f in dataclasses.fields(Record))
#: A record of nothing: what a column holds that an older version lacks.
EMPTY = {f.name: "" if f.default == "" else None for f in dataclasses.fields(Record)}
#: Older versions that are still read, and the columns that they lack, which are empty then.
_OF_7 = frozenset({"certain"})
_OF_6 = _OF_7 | {"vs_best", "vs_best_lo", "vs_best_hi"}
_ENERGY = ("energy_per_seq_j", "energy_per_seq_lo_j", "energy_per_seq_hi_j", "energy_per_token_j")
_OF_5 = _OF_6 | {*_ENERGY, "power_w", "idle_power_w", "energy"}
_OF_4 = _OF_5 | {"standing", "repro", "input_set", "weight", "metric"}
LACKING: dict[int, frozenset[str]] = {
    2: _OF_4 | {"tokens_per_s", "token_latency_p50_s", "token_latency_p99_s", "beam"},
    3: _OF_4,
    4: _OF_5,
    5: _OF_6,
    6: _OF_7,
}

#: Columns of ``samples.csv.gz``: one row a timed interval, as read off the clock.
SAMPLE_COLUMNS: dict[str, str] = {
    "workload": "As in records.csv.",
    "variant": "As in records.csv.",
    "mode": "As in records.csv.",
    "device": "As in records.csv.",
    "threads": "As in records.csv.",
    "process": "The number of the seating (a full set of fresh worker processes) in its group, from 0.",
    "round": "The number of the round in its seating, from 0.",
    "position": "The place of the variant in the order of the round, from 0.",
    "kind": "What the interval holds: `call` is one call, `block` is many calls queued and waited for once (CUDA).",
    "calls": "The number of calls in the interval; 1 for `call`.",
    "wall_s": "The wall-clock time of the interval, in seconds.",
    "device_s": "The time between CUDA events around the interval, in seconds. Empty on a CPU.",
    "disturbed": "1 if something else used the machine in the round, or the host moved its cores apart; else 0.",
}


#: Columns of ``rounds.csv.gz``: one row per round of a seating, with what else happened on the machine meanwhile.
ROUND_COLUMNS: dict[str, str] = {
    "group": "As in records.csv.",
    "process": "The number of the seating (a full set of fresh worker processes) in its group, from 0.",
    "round": "The number of the round in its seating, from 0.",
    "wall_s": "The time of the round, including calls that are not timed, in seconds.",
    "waited_s": "The time spent waiting for a quiet moment before the round, in seconds.",
    "why": "What disturbed the round, in words. Empty if nothing did.",
    "others_share": "The number of cores that other processes kept busy, on average over at least a quarter of a "
    "second around the round. Empty if the system does not report it.",
    "stolen_share": "The number of cores that the hypervisor gave to others, on average over the same time.",
    "delay_s": "The time in the timed blocks of the round during which the thread that waited longest was ready but "
    "had no core, in seconds. Empty if the system does not report it.",
    "switches": "How often their threads had to give up a core in those blocks. Empty if the system does not report "
    "it.",
    "load": "The load average of the system over one minute, in runnable threads.",
    "frequency_mhz": "The clock rate of the first core, in MHz. Empty if the system does not report it.",
    "gpu_clock_mhz": "The clock rate of the GPU's multiprocessors, in MHz. Empty on a CPU or without nvidia-ml-py.",
    "gpu_throttled": "What held the clock rate of the GPU back. Empty if nothing did.",
    "gpu_others": "The number of other processes that computed on the GPU.",
}


#: Columns of ``energy.csv.gz``: one row a timed block whose energy was counted.
ENERGY_COLUMNS: dict[str, str] = {
    **dict.fromkeys(("workload", "variant", "mode", "device", "threads"), "As in samples.csv.gz."),
    "process": "As in samples.csv.gz.",
    "round": "As in samples.csv.gz.",
    "calls": "The number of calls in the block, on CUDA queued and single ones together.",
    "timed_s": "The wall-clock time of the calls of the block, in seconds.",
    "energy_j": "The energy that the counter counted from the start of the block to its end, in joules.",
}


def meanings(kind: type) -> dict[str, str]:
    """Return the columns of a kind of record with their meanings."""
    return {found.name: found.metadata["meaning"] for found in dataclasses.fields(kind)}


def in_markdown(files: Mapping[str, Mapping[str, str]]) -> str:
    """Return the dictionary of columns of some files, each with its columns and their meanings, in Markdown."""
    head = "| column | meaning |\n| --- | --- |\n"
    return "\n".join(
        f"## {name}\n\n{head}" + "".join(f"| `{column}` | {meaning} |\n" for column, meaning in columns.items())
        for name, columns in files.items()
    )


def dictionary() -> str:
    """The dictionary of columns in Markdown, as in results/columns.md."""
    raw = {"samples.csv.gz": SAMPLE_COLUMNS, "rounds.csv.gz": ROUND_COLUMNS, "energy.csv.gz": ENERGY_COLUMNS}
    return in_markdown({"records.csv": meanings(Record), **raw})
