"""The result row of one case, and the schema of everything a run folder holds.

`Record` is the single source of the columns of ``records.csv``: their names, order, units and meaning
are the fields below, and ``results/README.md`` is checked against them.
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
#: 3: the mode `decode`: beam, tokens a second, latency of a token.
#: 4: standing in the group, command that measures a case again; own models' set of inputs, its weight, the metric.
#: 5: energy of a sequence and of a token, power, idle power, the counter that says so; energy.csv.gz.
#: 6: ratio to the best of the group; a reason beside `ok`, where a process failed in a further seating.
SCHEMA_VERSION = 6


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
        "name of the workload, with any overrides: `seed`, `seed@batch=64`, `checkpoint:PATH@batch=8`", ""
    )
    model: str = column(
        "model family: `lstm` for the Seq2Seq of the seed, `lstm-alone` for one LSTM and nothing else", ""
    )
    variant: str = column("name of the variant", "")
    mode: str = column(
        "`inference`, `training` (forward, backward and optimizer step), or `decode` (fed with its own output)", ""
    )
    device: str = column("`cpu` or `cuda`", "")
    precision: str = column(
        "precision the variant asks for, or its runtime chooses here: `fp32`, `tf32`, `bf16`, `fp16`, `int8`", ""
    )
    threads: int = column("CPU threads the worker was given", 0)
    status: Status = column(
        "`ok`, `unavailable`, `parity-failed`, `impossible` (faster than the machine can be), `oom`, `timeout`, "
        "`crashed`, `error`",
        Status.OK,
    )
    reason: str = column(
        "why the status is not `ok`; of an `ok` case, how its process failed in a further seating, whose rounds are "
        "not in the figures; else empty",
        "",
    )

    latency_p50_s: float | None = column("median time of a single call, seconds")
    latency_p50_lo_s: float | None = column(
        "lower end of its 95 % interval (bootstrap over seatings, then rounds), seconds"
    )
    latency_p50_hi_s: float | None = column(
        "upper end of its 95 % interval (bootstrap over seatings, then rounds), seconds"
    )
    latency_p90_s: float | None = column(
        "90th percentile of single calls, seconds; empty below 36 calls, or where more are needed to bound it"
    )
    latency_p90_lo_s: float | None = column("lower end of its 95 % interval, seconds")
    latency_p90_hi_s: float | None = column("upper end of its 95 % interval, seconds")
    latency_p95_s: float | None = column(
        "95th percentile of single calls, seconds; empty below 72 calls, or where more are needed to bound it"
    )
    latency_p95_lo_s: float | None = column("lower end of its 95 % interval, seconds")
    latency_p95_hi_s: float | None = column("upper end of its 95 % interval, seconds")
    latency_p99_s: float | None = column(
        "99th percentile of single calls, seconds; empty below 368 calls, or where more are needed to bound it"
    )
    latency_p99_lo_s: float | None = column("lower end of its 95 % interval, seconds")
    latency_p99_hi_s: float | None = column("upper end of its 95 % interval, seconds")
    device_p50_s: float | None = column("median device time of a call between CUDA events, seconds; empty on CPU")
    throughput_seq_per_s: float | None = column("sequences per second at the workload's batch, median over rounds")
    throughput_steps_per_s: float | None = column(
        "time steps (tokens, frames, hours) per second, source and target together, without padding"
    )

    tokens_per_s: float | None = column(
        "tokens (or forecast steps) decoded per second, of each sequence's best hypothesis; empty but in `decode`"
    )
    token_latency_p50_s: float | None = column("median call over its decoding steps, seconds; empty but in `decode`")
    token_latency_p99_s: float | None = column(
        "99th percentile of single calls over their decoding steps, seconds; empty where `latency_p99_s` is"
    )

    speedup: float | None = column("median over rounds of time(reference) / time(this variant); 1 for `reference`")
    speedup_lo: float | None = column("lower end of its 95 % interval (bootstrap over seatings, then rounds)")
    speedup_hi: float | None = column("upper end of its 95 % interval (bootstrap over seatings, then rounds)")
    standing: str = column(
        "among the group's variants, by ratios formed inside rounds: `best`, the shortest median time; `equal`, surely "
        "within 3 % of it and not surely slower; `slower`, surely slower; `undecided`; empty where nothing was timed",
        "",
    )
    vs_best: float | None = column(
        "median over rounds of time(the variant that is `best`) / time(this variant): below 1 where this one is slower"
    )
    vs_best_lo: float | None = column("lower end of its 95 % interval (bootstrap over seatings, then rounds)")
    vs_best_hi: float | None = column(
        "upper end of its 95 % interval; `standing` follows from the two ends, not from those of the speedups"
    )
    interval_wide: bool | None = column("true when the interval missed the width the suite asked for")

    flops: int | None = column("floating-point operations that one call cannot do without, padding left out")
    least_bytes: int | None = column(
        "bytes that one call must read or write, each once: weights, inputs, results, in training the optimizer's state"
    )
    ceiling_share: float | None = column(
        "least possible time of a call on this machine (FLOPs over the rate of its fastest matrix product in the "
        "precision that ran, or bytes over its bandwidth) / median time"
    )
    bound: str = column("which of the two is longer: `compute` or `memory`", "")

    energy_per_seq_j: float | None = column(
        "energy of a sequence, joules, median over seatings: what the counter of the whole package or board counted in "
        "the timed blocks, over their sequences; with idle power and whatever else ran there"
    )
    energy_per_seq_lo_j: float | None = column("lower end of its 95 % interval (Student's t over seatings), joules")
    energy_per_seq_hi_j: float | None = column("upper end of its 95 % interval, joules")
    energy_per_token_j: float | None = column(
        "the same of a token (time step, frame, hour) without padding, in `decode` of a decoded token, joules"
    )
    power_w: float | None = column("mean power in the timed blocks by that counter, watts")
    idle_power_w: float | None = column(
        "power by that counter for a second before the groups, when nothing of the run was at work, watts"
    )
    energy: str = column("the counter: `RAPL package-0`, `NVML`; or `unavailable` and why there is no figure", "")

    memory_peak_bytes: int | None = column(
        "highest resident memory above the baseline (torch imported, nothing built), from build through "
        "first call to steady calls, in a fresh process, bytes"
    )
    memory_steady_bytes: int | None = column(
        "highest resident memory that steady calls reach above what is resident between calls, bytes"
    )
    memory_baseline_bytes: int | None = column("resident memory of the fresh process before the build, bytes")
    memory_cuda_allocated_bytes: int | None = column("peak of the CUDA allocator, allocated, bytes; empty on CPU")
    memory_cuda_reserved_bytes: int | None = column("peak of the CUDA allocator, reserved, bytes; empty on CPU")

    build_s: float | None = column("time to construct, convert or script the model, seconds")
    first_call_s: float | None = column(
        "time of the first call in a fresh process with an empty compiler cache, seconds, compiling included"
    )
    compile_s: float | None = column(
        "part of it that was spent compiling, by Dynamo and its backend, backward included, or by the C++ compiler of "
        "`cpu-fused`, seconds; the kernel is compiled once a run, and its seconds count in the first call of every "
        "case that needs it"
    )

    graphs: int | None = column("graphs that `torch.compile` captured; empty when the variant does not compile")
    graph_breaks: int | None = column("graph breaks that Dynamo counted, skipped frames not among them")
    recompiles: int | None = column("frames compiled a second time or more")
    evidence: str = column("in words, what really ran", "")
    ran_precision: str = column(
        "data types of the matrix products and LSTM operators that ran, by the profiler or the runtime itself", ""
    )
    ran_operators: str = column(
        "operators or GPU kernels that ran and how often, by the profiler or the runtime itself, heaviest first", ""
    )
    ran_threads: int | None = column("threads the math library or the runtime reported")
    omp_wait: str = column(
        "how OpenMP threads wait for work: `default` (OMP_WAIT_POLICY not set), `active`, `passive`", ""
    )

    parity_error: float | None = column(
        "relative error of the output, final state or loss nearest to its limit, all gate runs"
    )
    parity_limit: float | None = column("the limit that applied to that quantity")
    grad_error: float | None = column(
        "relative error of the gradient nearest to its limit, all gate runs; empty in inference"
    )
    grad_limit: float | None = column("the limit that applied to that gradient")
    parity_worst: str = column("the quantity that came nearest to its limit, or passed it", "")

    samples: int | None = column("samples kept: timed blocks of this variant, one a round")
    calls: int | None = column("single calls timed")
    processes: int | None = column("seatings (full sets of fresh worker processes) whose rounds are in the figures")
    disturbed: int | None = column(
        "samples kept although something else used the machine or the host moved its cores apart"
    )

    data: str = column("`real` or `synthetic`, and what it is", "")
    source: str = column("where the workload's sizes come from, and of a checkpoint the weights", "")
    batch: int | None = column("sequences in a batch")
    source_steps: int | None = column("longest source sequence, time steps")
    target_steps: int | None = column("longest target sequence, time steps; empty for an LSTM alone")
    valid_steps: int | None = column("time steps of the measured batch without padding, source and target together")
    beam: int | None = column("hypotheses of a sequence, 1 is greedy; empty but in `decode`")
    hidden_size: int | None = column("hidden size of the encoder")
    num_layers: int | None = column("layers of the encoder")
    parameters: int | None = column("trainable parameters")
    input_set: str | None = column("name of the set of inputs in the mix of an own model; empty for a single set")
    weight: float | None = column(
        "share of all calls that are calls with this set of inputs, all sets of a mix together 1; empty but for an own "
        "model"
    )
    metric: float | None = column(
        "score that the user's own metric gives this variant's output for the timed inputs; empty without one"
    )
    sweep_axis: str = column(
        "what the workload's sweep varies (`batch`, `hidden`, `length`, `layers`, `beam`); empty otherwise", ""
    )
    sweep_value: int | None = column("value of that axis")
    group: str = column("name of the group the case was measured in", "")
    repro: str = column("command that measures this case again, in a group with the reference alone", "")
    recorded_at: str = column("time the record was written, UTC", "")
    schema_version: int = column("version of this schema", SCHEMA_VERSION)

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
_OF_6 = frozenset({"vs_best", "vs_best_lo", "vs_best_hi"})
_OF_5 = _OF_6 | frozenset({
    "energy_per_seq_j", "energy_per_seq_lo_j", "energy_per_seq_hi_j", "energy_per_token_j", "power_w", "idle_power_w",
    "energy",
})  # fmt: skip
_OF_4 = _OF_5 | {"standing", "repro", "input_set", "weight", "metric"}
LACKING: dict[int, frozenset[str]] = {
    2: _OF_4 | {"tokens_per_s", "token_latency_p50_s", "token_latency_p99_s", "beam"},
    3: _OF_4,
    4: _OF_5,
    5: _OF_6,
}

#: Columns of ``samples.csv.gz``: one row a timed interval, as read off the clock.
SAMPLE_COLUMNS: dict[str, str] = {
    "workload": "as in records.csv",
    "variant": "as in records.csv",
    "mode": "as in records.csv",
    "device": "as in records.csv",
    "threads": "as in records.csv",
    "process": "number of the seating (a full set of fresh worker processes) in its group, from 0",
    "round": "number of the round in its seating, from 0",
    "position": "place of the variant in the round's order, from 0",
    "kind": "`call`: one call; `block`: many calls queued and waited for once (CUDA)",
    "calls": "calls in the interval: 1 for `call`",
    "wall_s": "wall-clock time of the interval, seconds",
    "device_s": "time between CUDA events around it, seconds; empty on CPU",
    "disturbed": "1 when something else used the machine during the round or the host moved its cores apart",
}


#: Columns of ``rounds.csv.gz``: one row a round of a seating, with what else happened on the machine meanwhile.
ROUND_COLUMNS: dict[str, str] = {
    "group": "as in records.csv",
    "process": "number of the seating (a full set of fresh worker processes) in its group, from 0",
    "round": "number of the round in its seating, from 0",
    "wall_s": "time of the round, untimed calls included, seconds",
    "waited_s": "time spent waiting for a quiet moment before it, seconds",
    "why": "what disturbed it, in words; empty when nothing did",
    "others_share": "cores that other processes kept busy, on average over at least a quarter of a second around it; "
    "empty if the system does not report it",
    "stolen_share": "cores that the hypervisor gave to others, over the same time",
    "delay_s": "time in the timed blocks of the round that the thread that waited longest was ready but had no core, "
    "seconds; empty if the system does not report it",
    "switches": "times in them that those whose turn it was had to give up a core; empty if the system does not "
    "report it",
    "load": "load average of the system over a minute",
    "frequency_mhz": "clock of the first core, if the system reports it",
    "gpu_clock_mhz": "clock of the GPU's multiprocessors; empty on CPU or without nvidia-ml-py",
    "gpu_throttled": "what held the GPU's clock back",
    "gpu_others": "other processes that computed on the GPU",
}


#: Columns of ``energy.csv.gz``: one row a timed block whose energy was counted.
ENERGY_COLUMNS: dict[str, str] = {
    **dict.fromkeys(("workload", "variant", "mode", "device", "threads"), "as in samples.csv.gz"),
    "process": "as in samples.csv.gz",
    "round": "as in samples.csv.gz",
    "calls": "calls in the block, on CUDA queued and single ones together",
    "timed_s": "wall-clock time of its calls, seconds",
    "energy_j": "energy that the counter counted from its start to its end, joules",
}


def meanings(kind: type) -> dict[str, str]:
    """Return the columns of a kind of record with their meanings."""
    return {found.name: found.metadata["meaning"] for found in dataclasses.fields(kind)}


def in_markdown(files: Mapping[str, Mapping[str, str]]) -> str:
    """Return the dictionary of columns of some files, each with its columns and their meanings, in Markdown."""
    head = "| column | meaning |\n| --- | --- |\n"
    return "\n".join(
        f"### {name}\n\n{head}" + "".join(f"| `{column}` | {meaning} |\n" for column, meaning in columns.items())
        for name, columns in files.items()
    )


def dictionary() -> str:
    """The dictionary of columns in Markdown, as in results/README.md."""
    return in_markdown(
        {
            "records.csv": meanings(Record),
            "samples.csv.gz": SAMPLE_COLUMNS,
            "rounds.csv.gz": ROUND_COLUMNS,
            "energy.csv.gz": ENERGY_COLUMNS,
        }
    )
