"""Evidence of what really ran: operators, their data types, compiled graphs, threads; and the same in words.

A variant's name says what was asked for. torch.compile may skip the model, oneDNN or cuDNN may decline an LSTM, and
autocast may cast to another type than asked, all without a word; here the profiler and Dynamo's counters are asked.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.common.cudnn_precision import lstm_precision
from kernels.cpu import shortlist
from kernels.dispatch import MODULES, VENDORS, Choice
from kernels.gpu import graph_cache
from kernels.tools.cudnn_kernels import named_persistent, once_a_step, without_torchs_own
from seq2seq.execution import tuning
from seq2seq.execution.variant import Variant
from seq2seq.runtimes.runtime import Runtime
from seq2seq.workloads.workload import Workload

#: Operators whose input type is the precision that did the work.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_rnn_layer", "_cudnn_rnn", "mkldnn_linear")
#: Those that are a whole LSTM.
_WHOLE_LSTMS = ("mkldnn_rnn_layer", "_cudnn_rnn")
#: What the profiler calls the types, and what people do.
_TYPES = {
    "float": "fp32", "double": "fp64", "c10::BFloat16": "bf16", "c10::Half": "fp16", "signed char": "int8",
}  # fmt: skip
#: Bookkeeping operators that say nothing about the work.
_NOISE = {"as_strided", "view", "transpose", "t", "empty", "select", "slice", "narrow", "detach", "expand", "reshape"}
#: How the launch of a CUDA graph is called, by the runtime and by the driver.
_GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
_SHOWN = 8

#: What each LSTM of a model that keeps choices ran in its last call: one choice per layer, by the LSTM's name.
Choices = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True)
class Compilation:
    """Dynamo's own count of what it did in this process."""

    graphs: int
    breaks: int
    recompiles: int
    seconds: float


@dataclass(frozen=True)
class Observation:
    """Findings of the profiler in one call.

    Attributes:
        operators: calls of each operator, heaviest first.
        kernels: launches of each GPU kernel, heaviest first; empty on a CPU.
        precisions: types of the matrix products and LSTM operators, most frequent first.
        lstm_precisions: types of the LSTM operators only.
        graph_launches: launches of whole CUDA graphs.
        threads: that a runtime other than torch computes with; None for torch.
        words: what such a runtime says of itself; empty for torch.
    """

    operators: dict[str, int]
    kernels: dict[str, int]
    precisions: tuple[str, ...]
    graph_launches: int = 0
    threads: int | None = None
    words: str = ""
    lstm_precisions: tuple[str, ...] = ()

    def shown(self) -> str:
        """The heaviest GPU kernels, on a CPU the heaviest operators, and how often each ran."""
        counts = self.kernels or self.operators
        named = [(name, count) for name, count in counts.items() if name.removeprefix("aten::") not in _NOISE]
        return ", ".join(f"{name} x{count}" for name, count in named[:_SHOWN])


def observe(call: Callable[[], object], device: str, runtime: Runtime | None = None) -> Observation:
    """Profile one call; a runtime other than torch, of which torch's profiler sees little, is asked itself."""
    # torch.profiler.profile, which is built on this, imports the whole compiler to ask for one of its settings: 2 s.
    use_device = "cuda" if device == "cuda" else None
    with torch.autograd.profiler.profile(use_device=use_device, use_kineto=True, record_shapes=True) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    # By a name alone: Kineto takes line ends out of a path, which the temporary folder's may have.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        profiler.export_chrome_trace("trace.json")
        events = json.loads(Path("trace.json").read_text(encoding="utf-8"))["traceEvents"]
    seen = _digest(events)
    if runtime is None:
        return seen
    ran = runtime.ran()
    return Observation(dict(ran.operators) or seen.operators, {}, ran.precisions, threads=ran.threads, words=ran.words)


def _digest(events: list[dict[str, Any]]) -> Observation:
    duration: dict[str, dict[str, float]] = {"cpu_op": {}, "kernel": {}}
    count = {"cpu_op": collections.Counter[str](), "kernel": collections.Counter[str]()}
    precision: collections.Counter[str] = collections.Counter()
    of_lstms: collections.Counter[str] = collections.Counter()
    graph_launches = 0
    for event in events:
        name, category = str(event.get("name", "")), event.get("cat")
        graph_launches += category in {"cuda_runtime", "cuda_driver"} and name.startswith(_GRAPH_LAUNCHES)
        if category in duration:
            duration[category][name] = duration[category].get(name, 0.0) + float(event.get("dur", 0.0))
            count[category][name] += 1
    for event in _innermost_products(events):
        types = [_TYPES[kind] for kind in event.get("args", {}).get("Input type", []) if kind in _TYPES]
        if types:
            precision[types[0]] += 1
            if str(event["name"]).removeprefix("aten::") in _WHOLE_LSTMS:
                of_lstms[types[0]] += 1
    heaviest = {
        kind: {name: count[kind][name] for name in sorted(found, key=lambda name: -found[name])}
        for kind, found in duration.items()
    }
    precisions = tuple(name for name, _ in precision.most_common())
    lstms = tuple(name for name, _ in of_lstms.most_common())
    return Observation(heaviest["cpu_op"], heaviest["kernel"], precisions, graph_launches, lstm_precisions=lstms)


def _innermost_products(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Products that hold no other: an autocast wrapper shows the types before the cast, the one inside those after."""
    products = [
        e for e in events if e.get("cat") == "cpu_op" and str(e.get("name")).removeprefix("aten::") in _PRODUCTS
    ]
    products.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    for event, following in itertools.zip_longest(products, products[1:]):
        inside = following and following["tid"] == event["tid"] and following["ts"] < event["ts"] + event["dur"]
        if not inside:
            yield event


def compilation() -> Compilation:
    """Counts of Dynamo's work in this process so far."""
    from torch._dynamo import utils  # noqa: PLC0415 - slow to import, and only of use where something compiled

    metrics = utils.get_compilation_metrics()
    recompiles = sum(
        1 for m in metrics if m.compile_id and not m.compile_id.endswith("/0") and m.entire_frame_compile_time_s
    )
    # The backward graph is compiled on its own, when it is first needed.
    seconds = sum(
        (m.entire_frame_compile_time_s or 0.0) + 1e-6 * (getattr(m, "backward_cumulative_compile_time_us", None) or 0)
        for m in metrics
    )
    return Compilation(
        int(utils.counters["stats"]["unique_graphs"]),
        int(sum(utils.counters["graph_break"].values())),
        recompiles,
        float(seconds),
    )


def choices_of(model: nn.Module) -> Choices:
    """Kernels that the LSTMs of a model ran in their last call, for those that keep it, as `kernels.LSTM` does."""
    return {name: module.choices for name, module in model.named_modules() if hasattr(module, "choices")}


def explain(  # noqa: C901 - a part after the other
    variant: Variant,
    workload: Workload,
    device: str,
    seen: Observation,
    compiled: Compilation | None,
    choices: Choices | None = None,
) -> str:
    """Describe what ran; says so where it differs from what the variant's name promises."""
    parts = []
    if compiled is not None:
        parts.append(_compile_words(compiled))
    if variant.compiler == "torchscript":
        parts.append("TorchScript ran it")
    parts += _who_ran(variant, workload, device, seen, compiled, choices)
    if seen.graph_launches:
        parts.append(f"a call launched {seen.graph_launches} CUDA graph{'s' if seen.graph_launches > 1 else ''}")
    if device == "cuda" and choices:
        parts += [*_config_words(choices), *_graph_words(graph_cache.state())]
    if variant.torch_tf32 and device == "cuda":
        parts.append(_tf32_words())
    if variant.reuses_outputs:
        parts.append("the next call overwrites its outputs")
    kept = variant.lstm_options.get("weight_storage")
    by = {choice.instructions for layers in (choices or {}).values() for choice in layers if choice.instructions}
    if by and not kept:
        parts.append(f"multiplied by {' and '.join(sorted(by))}")
    if kept:
        # Products of bytes without VNNI have room for 7 bits of an input.
        inputs = 7 if any(name.endswith("-int8") for name in by) else 8
        what = f"weights in int8, inputs in {inputs} bits" if kept == "w8a8" else f"weights kept in {kept}"
        parts.append(f"{what}, multiplied by {' and '.join(sorted(by)) or 'unknown instructions'}")
    if variant.head == "shortlist":
        parts.append(f"head in int8 ({shortlist.instructions()}), the largest outputs once more in fp32")
    if variant.environment:
        parts.append(tuning.in_force(variant.environment))
    asked = "fp32" if kept or variant.precision in {"tf32", "int8-head"} else variant.precision
    if seen.precisions and asked not in seen.precisions:
        parts.append(f"asked for {variant.precision}, but products ran in {' and '.join(seen.precisions)}")
    elif seen.lstm_precisions and asked not in seen.lstm_precisions:
        # Products around the LSTM may be in the type that was asked for while the LSTM is not.
        parts.append(f"asked for {variant.precision}, but the LSTM ran in {' and '.join(seen.lstm_precisions)}")
    return "; ".join(parts)


def _who_ran(
    variant: Variant,
    workload: Workload,
    device: str,
    seen: Observation,
    compiled: Compilation | None,
    choices: Choices | None,
) -> list[str]:
    """Describe what ran the LSTM: another runtime in its own words, a loop, our kernels by their choices, or torch."""
    if seen.words:
        return [seen.words]
    if not workload.config.stacks and workload.config.family != "own":
        return [_attention_words(seen)]
    # A saved program of the user's has LSTMs as operators, unless its exporter took them apart.
    if not workload.config.stacks and not _LSTMS & seen.operators.keys() and not (compiled and compiled.graphs):
        return ["the program ran its operators, none of them an LSTM"]
    if variant.lstm == "loop":
        return [] if compiled and compiled.graphs else ["the time loop ran in Python"]
    torchs_own = _lstm_words(variant, workload, device, seen, compiled)
    return list(_choice_words(choices, torchs_own)) if choices else [torchs_own]


#: Operators by which an LSTM of torch is known.
_LSTMS = {"aten::lstm", "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::lstm_cell"}


def _compile_words(compiled: Compilation) -> str:
    if compiled.graphs == 0:
        return "torch.compile captured 0 graphs: the model ran eagerly"
    breaks = f"{compiled.breaks} graph breaks" if compiled.breaks else "no graph break"
    return f"torch.compile ran {compiled.graphs} graph{'s' if compiled.graphs > 1 else ''}, {breaks}"


def _lstm_words(
    variant: Variant, workload: Workload, device: str, seen: Observation, compiled: Compilation | None
) -> str:
    """Name the library that ran nn.LSTM, by its operator."""
    if "aten::mkldnn_rnn_layer" in seen.operators:
        # torch itself unpacks sequences of one length; ATen's own cell is known by the gate that it computes in place.
        packed = {"aten::_pack_padded_sequence", "aten::sigmoid_"} <= seen.operators.keys()
        return f"LSTM ran in oneDNN{', but on packed sequences, which it does not take, in ATen' if packed else ''}"
    if "aten::_cudnn_rnn" in seen.operators:
        return f"LSTM ran in cuDNN, {_cudnn_words(seen.kernels, workload)}"
    if cells := seen.operators.get("aten::lstm_cell"):
        return f"a loop in Python called the LSTM cell {cells} times"
    if "aten::lstm" not in seen.operators:
        return "LSTM ran inside the compiled graph" if compiled and compiled.graphs else "the variant's own LSTM ran"
    if not variant.vendor_lstm:
        return "LSTM ran in ATen"
    library = "cuDNN" if device == "cuda" else "oneDNN"
    packed = device == "cpu" and (workload.has_lengths or workload.config.resets)
    why = " (it takes no packed sequences)" if packed else ""
    return f"{library} declined the LSTM{why}: ATen's own ran"


def _cudnn_words(kernels: Mapping[str, int], workload: Workload) -> str:
    """Say whether cuDNN ran persistent kernels, by their name or, whatever they are called, by their launches."""
    if named_persistent(kernels):
        return "persistent kernels"
    # Heaviest first.
    shown = "".join(f": {name[:80]}" for name in itertools.islice(without_torchs_own(kernels), 1))
    steps = min(workload.source_steps, workload.target_steps or workload.source_steps)
    if not once_a_step(kernels, steps):
        return f"all steps in one launch, as no kernel ran once a step{shown}"
    # Not that there are none: a decoder that loops over its steps launches even a persistent kernel once a step.
    return f"no persistent kernels recognised{shown}"


def _attention_words(seen: Observation) -> str:
    """Name torch's attention kernels that ran, by their operators."""
    found = [name.removeprefix("aten::") for name in seen.operators if name.startswith("aten::_scaled_dot_product_")]
    forward = [f"{name} x{seen.operators[f'aten::{name}']}" for name in found if not name.endswith("_backward")]
    return f"no LSTM; attention ran in {', '.join(forward)}" if forward else "no LSTM; attention ran as plain products"


def _choice_words(choices: Choices, torchs_own: str) -> Iterator[str]:
    """Describe which kernel `kernels.LSTM` ran where, why if it was free to choose, and which kernels declined.

    Args:
        choices: one per layer, by the LSTM's name; none of an LSTM that ran inside a compiled graph.
        torchs_own: where torch's own LSTM ran, in words, should it have been chosen.
    """
    places: dict[tuple[str, str], list[str]] = {}
    declined: dict[str, str] = {}
    for name, layers in choices.items():
        kinds = {(choice.implementation, choice.reason) for choice in layers}
        for number, choice in enumerate(layers[:1] if len(kinds) == 1 else layers):
            place = name if len(kinds) == 1 else f"{name} layer {number}"
            free = not choice.reason.startswith("asked for")
            places.setdefault((choice.implementation, choice.reason if free else ""), []).append(place)
            if free:
                declined |= {kernel: why for kernel, why in choice.refused.items() if kernel in MODULES}
    if not places:
        yield "kernels.LSTM ran inside the compiled graph"
    for (implementation, reason), names in places.items():
        what = f"({', '.join(names)}{f'; {reason}' if reason else ''})"
        if implementation in VENDORS:
            how = "" if implementation == "vendor" else " on padded sizes"
            yield f"kernels.LSTM chose torch's own{how} {what}: {torchs_own}"
        else:
            yield f"LSTM ran in kernels.LSTM: {implementation} {what}"
    for why in dict.fromkeys(choice.detour for layers in choices.values() for choice in layers if choice.detour):
        yield f"no native entry to the CPU kernel here, so its calls go through Python: {' '.join(why.split())}"
    for why in dict.fromkeys(declined.values()):
        yield f"{', '.join(kernel for kernel in declined if declined[kernel] == why)} declined: {why}"


def _config_words(choices: Choices) -> Iterator[str]:
    """Describe the configurations that kernels took forward, each once: which way of exchanging h is one of them."""
    configs = (choice.config for layers in choices.values() for choice in layers if choice.config is not None)
    for config in dict.fromkeys(configs):
        yield f"configuration {config}"


def _graph_words(state: graph_cache.ReplayCounts) -> Iterator[str]:
    """Describe what became of the calls that could be CUDA graphs of ours, in this process so far."""
    if not (state.replayed or state.plain):
        return
    plain = sum(state.plain.values())
    why = f" ({', '.join(f'{reason} x{count}' for reason, count in sorted(state.plain.items()))})" if plain else ""
    yield (
        f"graphs of kernels.LSTM: {state.captured} captured, {state.evicted} dropped, {state.replayed} calls replayed, "
        f"{plain} launched plainly{why}"
    )


def _tf32_words() -> str:
    """Default of torch for TF32."""
    products_in: Any = torch.backends.cuda.matmul
    lstm, products = ("on" if value == "tf32" else "off" for value in (lstm_precision(), products_in.fp32_precision))
    return f"TF32 as torch has it: {lstm} in cuDNN's LSTM, {products} in products"
