"""Evidence of what ran: by the profiler and Dynamo on real calls, and by hand-made traces where there is no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.analysis.roofline import BY_SUMS, SUMS, precisions
from bench.worker import evidence
from bench.worker.evidence import Compilation, Observation, explain, observe
from kernels.cpu import shortlist
from kernels.dispatch import Choice
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

ROOT = Path(__file__).parent.parent
FIXED = "seed@batch=2,length=3"
PACKED = "translation-small-scaled@batch=2,length=5"
NOTHING = Observation({}, {}, ())
#: Autocast through the vendor library, and through ATen, here also where the vendor library could.
AUTOCAST = {
    "vendor": VARIANTS["amp-bf16"],
    "native": dataclasses.replace(VARIANTS["amp-bf16-native"], requirements=()),
}


def seen(variant: Variant, workload_name: str = FIXED, mode: str = "inference") -> tuple[Observation, str]:
    """Return what the profiler sees of a variant here, and what is said of it; skip if it cannot run."""
    workload = find_workload(workload_name)
    reason = variant.why_not("cpu", mode, workload)
    if reason:
        pytest.skip(reason)
    executable = Executable(variant, workload.config, mode, "cpu", initial_weights(workload.config, 1))
    batch = executable.prepare(workload.make_batch(0))
    with executable.context():
        executable.call(batch)
        found = observe(lambda: executable.call(batch), "cpu")
    return found, explain(variant, workload, "cpu", found, None)


def test_the_reference_runs_in_aten():
    """No operator of oneDNN's LSTM appears, although torch would take it by default."""
    found, words = seen(VARIANTS["reference"])
    assert "aten::lstm" in found.operators
    assert "aten::mkldnn_rnn_layer" not in found.operators
    assert words == "LSTM ran in ATen"
    assert found.precisions == ("fp32",)


def test_onednn_runs_in_onednn():
    """Its operator appears once an LSTM: encoder and decoder."""
    found, words = seen(VARIANTS["onednn"])
    assert found.operators["aten::mkldnn_rnn_layer"] == 2
    assert words == "LSTM ran in oneDNN"


@pytest.mark.parametrize("name", ["onednn", "torchscript"])
def test_where_onednn_declines_a_packed_batch_it_is_told(name):
    """Sequences of different lengths are packed, which oneDNN does not take: torch says nothing, the evidence does."""
    found, words = seen(VARIANTS[name], PACKED)
    assert "aten::mkldnn_rnn_layer" not in found.operators
    assert "oneDNN declined the LSTM (it takes no packed sequences): ATen's own ran" in words


def test_where_onednn_declines_one_lstm_of_several_it_is_told():
    """Of GNMT's layers the first alone reads packed sequences: oneDNN runs the others, and the evidence says both."""
    found, words = seen(VARIANTS["onednn"], "translation-gnmt-scaled@batch=2,length=5,hidden=8")
    assert found.operators["aten::mkldnn_rnn_layer"] == 7
    assert words == "LSTM ran in oneDNN, but on packed sequences, which it does not take, in ATen"


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_packed_sequences_of_one_length_run_in_onednn(mode):
    """Torch unpacks them, so nothing is declined."""
    found, words = seen(VARIANTS["onednn"], PACKED.replace("batch=2", "batch=1"), mode=mode)
    assert "aten::_pack_padded_sequence" in found.operators
    assert words == "LSTM ran in oneDNN"


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_to_bf16_is_seen(name, mode):
    """Products ran in bf16, and nothing is said against it."""
    found, words = seen(AUTOCAST[name], mode=mode)
    assert found.precisions[0] == "bf16"
    assert "asked for" not in words


@pytest.mark.parametrize("name", AUTOCAST)
def test_what_autocast_wraps_is_not_taken_for_what_ran(name):
    """Under autocast an operator appears twice, before the cast and inside it: only the inner one multiplied."""
    assert seen(AUTOCAST[name])[0].precisions == ("bf16",)


def test_autocast_that_casts_elsewhere_is_told(monkeypatch):
    """A variant that asks for fp16 and gets bf16 is found out by the types of its products."""
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, _: real(device, torch.bfloat16))
    variant = dataclasses.replace(VARIANTS["amp-fp16"], vendor_lstm=False, requirements=())
    found, words = seen(variant)
    assert "fp16" not in found.precisions
    assert "asked for fp16, but products ran in bf16" in words


def test_autocast_that_does_nothing_is_told(monkeypatch):
    """A variant that asks for bf16 and gets fp32 is found out too."""
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, **_: real(device, dtype, enabled=False))
    _, words = seen(AUTOCAST["native"])
    assert words.endswith("asked for bf16, but products ran in fp32")


def test_the_loop_is_told_to_run_in_python():
    """No LSTM operator is called, the cell's own operators are."""
    found, words = seen(VARIANTS["loop"])
    assert not [name for name in found.operators if "lstm" in name or "rnn" in name]
    assert words == "the time loop ran in Python"


def test_torchscript_is_told():
    """Both who ran it and where its LSTM ran."""
    _, words = seen(VARIANTS["torchscript"])
    assert words.startswith("TorchScript ran it; LSTM ran in ")


def test_an_eager_lstm_of_a_plugin_is_not_said_to_be_compiled(monkeypatch):
    """If nothing compiled, there is no compiled graph for an LSTM to run in."""
    monkeypatch.setitem(LSTMS, "own", LSTMS["loop"])
    _, words = seen(Variant("own", "a loop under another name", lstm="own"))
    assert "compiled" not in words


def test_what_is_shown_is_work():
    """Views and other bookkeeping are no work, and few names are enough."""
    found, _ = seen(VARIANTS["loop"])
    names = [part.rpartition(" x")[0] for part in found.shown().split(", ")]
    assert 1 <= len(names) <= 8
    assert not {name.removeprefix("aten::") for name in names} & evidence._NOISE
    assert all(f"{name} x{found.operators[name]}" in found.shown() for name in names)


CHILD = """
import dataclasses, json, torch, torch._dynamo
from bench.worker import evidence
from seq2seq.execution.executable import Executable
from seq2seq.models.weights import initial_weights
from seq2seq.execution.variants import VARIANTS
from seq2seq.workloads.registry import find_workload
workload = find_workload("seed@batch=2,length=3")
# The backend `eager` runs what Dynamo captured as it is, without a C++ compiler: Dynamo's counts are the same.
loop = dataclasses.replace(VARIANTS["compile-loop"], compile_options={"backend": "eager"})
for variant in (VARIANTS["compile"], loop):
    torch._dynamo.utils.counters.clear()
    run = Executable(variant, workload.config, "inference", "cpu", initial_weights(workload.config, 1))
    batch = run.prepare(workload.make_batch(0))
    with run.context():
        run.call(batch)
        compiled = evidence.compilation()
        seen = evidence.observe(lambda: run.call(batch), "cpu")
    words = evidence.explain(variant, workload, "cpu", seen, compiled)
    print(json.dumps([compiled.graphs, compiled.breaks, compiled.recompiles, compiled.seconds, words]))
"""


@pytest.mark.slow
def test_what_dynamo_captured_is_told():
    """torch.compile of nn.LSTM captures nothing and is said to run eagerly; of the loop it captures one graph.

    Dynamo's counts are a whole process's, hence one of its own.
    """
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, cwd=ROOT)
    skipped, captured = map(json.loads, done.stdout.splitlines()[-2:])
    assert skipped[0] == 0
    assert skipped[4].startswith("torch.compile captured 0 graphs: the model ran eagerly; ")
    assert "inside the compiled graph" not in skipped[4]
    assert captured[:3] == [1, 0, 0]
    assert captured[3] > 0
    assert captured[4] == "torch.compile ran 1 graph, no graph break"


@pytest.mark.parametrize(
    ("compilation", "words"),
    [
        (Compilation(0, 0, 0, 0.0), "torch.compile captured 0 graphs: the model ran eagerly"),
        (Compilation(1, 0, 0, 1.0), "torch.compile ran 1 graph, no graph break"),
        (Compilation(3, 2, 0, 1.0), "torch.compile ran 3 graphs, 2 graph breaks"),
    ],
)
def test_what_was_compiled_is_told_in_words(compilation, words):
    """Graphs and breaks are counted, and their absence is said outright."""
    told = explain(VARIANTS["compile-rnn"], find_workload(FIXED), "cpu", NOTHING, compilation)
    assert told.startswith(words)


CLOCK = itertools.count(step=1000)


def event(name: str, category: str, duration: float, *types: str) -> dict[str, object]:
    """An event of a Chrome trace, after all earlier ones, on one thread."""
    place = {"ph": "X", "pid": 1, "tid": 1, "ts": next(CLOCK), "dur": duration}
    return place | {"name": name, "cat": category, "args": {"Input type": list(types)}}


CUDA_TRACE = [
    {"ph": "M", "name": "process_name"},
    event("aten::lstm", "cpu_op", 90, "float", "", "GenericList"),
    event("aten::_cudnn_rnn", "cpu_op", 80, "float", "GenericList"),
    event("aten::_cudnn_rnn", "cpu_op", 80, "float", "GenericList"),
    event("aten::empty", "cpu_op", 900),
    event("aten::addmm", "cpu_op", 10, "float", "float", "float"),
    event("cudaLaunchKernel", "cuda_runtime", 500),
    event("Memcpy HtoD", "gpu_memcpy", 700),
    event("RNN_blockPersist_fp_LSTM", "kernel", 50),
    event("RNN_blockPersist_fp_LSTM", "kernel", 40),
    event("ampere_sgemm_128x64_tn", "kernel", 60),
]


def test_a_trace_with_cuda_kernels_names_the_kernels():
    """Kernels come by the time they took, with their launches; what the host did is not shown instead."""
    found = evidence._digest(CUDA_TRACE)
    assert list(found.kernels.items()) == [("RNN_blockPersist_fp_LSTM", 2), ("ampere_sgemm_128x64_tn", 1)]
    assert found.shown() == "RNN_blockPersist_fp_LSTM x2, ampere_sgemm_128x64_tn x1"
    assert found.operators["aten::_cudnn_rnn"] == 2
    assert "cudaLaunchKernel" not in found.operators
    assert found.precisions == ("fp32",)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (CUDA_TRACE, "LSTM ran in cuDNN, persistent kernels"),
        (
            [*(e for e in CUDA_TRACE if "ersist" not in str(e["name"])), *(event("gemm", "kernel", 90),) * 3],
            "LSTM ran in cuDNN, no persistent kernels recognised: gemm",
        ),
        (
            [
                *(e for e in CUDA_TRACE if "ersist" not in str(e["name"])),
                event("smallH", "kernel", 500),
                *(event("smallH of one step", "kernel", 90),) * 3,
            ],
            "LSTM ran in cuDNN, no persistent kernels recognised: smallH",
        ),
        (
            [
                *(e for e in CUDA_TRACE if "ersist" not in str(e["name"])),
                *(event("smallH", "kernel", 90),) * 2,
                *(event("void at::native::copy", "kernel", 90),) * 9,
            ],
            "LSTM ran in cuDNN, all steps in one launch, as no kernel ran once a step: smallH",
        ),
        (
            [e for e in CUDA_TRACE if "cudnn" not in str(e["name"])],
            "cuDNN declined the LSTM: ATen's own ran",
        ),
    ],
    ids=["persistent", "not persistent", "a decoder in a loop", "by launches", "declined"],
)
def test_what_cudnn_did_is_told(trace, words):
    """Return whether it took the LSTM, and with which kind of kernels."""
    variant, workload = VARIANTS["cudnn"], find_workload(FIXED)
    assert explain(variant, workload, "cuda", evidence._digest(trace), None) == words


ASKED = Choice("persistent", "asked for", {})
FREE = Choice("persistent", "by estimate", {"sequence": "hidden_size 512, at most 256", "vendor": "not asked for"})
CHOSEN = Choice("vendor", "measured", {"cell": "no bf16", "sequence": "no bf16"})


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"encoder": (ASKED, ASKED), "decoder": (ASKED,)}, "LSTM ran in kernels.LSTM: persistent (encoder, decoder)"),
        (
            {"lstm": (FREE,)},
            "LSTM ran in kernels.LSTM: persistent (lstm; by estimate); sequence declined: hidden_size 512, at most 256",
        ),
        (
            {"encoder": (CHOSEN,), "decoder": (ASKED,)},
            (
                "kernels.LSTM chose torch's own (encoder; measured): LSTM ran in cuDNN, persistent kernels; "
                "LSTM ran in kernels.LSTM: persistent (decoder); cell, sequence declined: no bf16"
            ),
        ),
        (
            {"encoder": (ASKED, Choice("cell", "asked for", {}))},
            "LSTM ran in kernels.LSTM: persistent (encoder layer 0); LSTM ran in kernels.LSTM: cell (encoder layer 1)",
        ),
        ({"encoder": (), "decoder": ()}, "kernels.LSTM ran inside the compiled graph"),
    ],
    ids=["asked for", "free", "torch's own", "by layer", "compiled"],
)
def test_what_kernels_lstm_chose_is_told(monkeypatch, choices, words):
    """Which kernel ran for which LSTM; where it was free to choose also why, and which kernels declined."""
    monkeypatch.setattr(evidence.graph_cache, "state", lambda: evidence.graph_cache.ReplayCounts(0, 0, 0, 0, {}))
    variant, workload = VARIANTS["triton"], find_workload(FIXED)
    assert explain(variant, workload, "cuda", evidence._digest(CUDA_TRACE), None, choices) == words


def test_choices_are_read_off_the_model():
    """Those of `kernels.LSTM`'s last call, by the name of each LSTM; a model without has none."""
    workload = find_workload(PACKED)
    variant = Variant("own", "the loop of kernels.LSTM", lstm="kernels", lstm_options={"implementation": "loop"})
    found = {}
    for kind in (variant, VARIANTS["reference"]):
        executable = Executable(kind, workload.config, "inference", "cpu", initial_weights(workload.config, 1))
        with executable.context():
            executable.call(executable.prepare(workload.make_batch(0)))
        found[kind.name] = evidence.choices_of(executable.model)
    assert {name: [c.implementation for c in layers] for name, layers in found["own"].items()} == {
        "encoder": ["loop", "loop"],
        "decoder": ["loop", "loop"],
    }
    assert found["reference"] == {}
    words = explain(variant, workload, "cpu", NOTHING, None, found["own"])
    assert words == "LSTM ran in kernels.LSTM: loop (encoder, decoder)"


@pytest.mark.parametrize(
    ("launches", "words"), [(1, "a call launched 1 CUDA graph"), (2, "a call launched 2 CUDA graphs")]
)
def test_cuda_graphs_are_told(launches, words):
    """Whoever launches them, since what runs in a graph was recorded before."""
    events = [*CUDA_TRACE, *(event("cudaGraphLaunch", "cuda_runtime", 5) for _ in range(launches))]
    found = evidence._digest(events)
    assert found.graph_launches == launches
    assert explain(VARIANTS["cudnn"], find_workload(FIXED), "cuda", found, None).endswith(words)
    assert "graph" not in explain(VARIANTS["cudnn"], find_workload(FIXED), "cuda", evidence._digest(CUDA_TRACE), None)


def test_what_torch_does_about_tf32_is_told():
    """If a variant leaves it alone, the settings are as they are, and nobody has touched them here."""
    told = explain(VARIANTS["cudnn-default"], find_workload(FIXED), "cuda", evidence._digest(CUDA_TRACE), None)
    assert told.endswith("TF32 as torch has it: on in cuDNN's LSTM, off in products")


def test_the_head_s_instructions_are_told():
    """Those that the build multiplies by."""
    workload = "translation-small-scaled@batch=2,length=5"
    _, words = seen(VARIANTS["cpu-fused-head"], workload, "decode")
    assert f"head in int8 ({shortlist.instructions()}), the largest outputs once more in fp32" in words


@pytest.mark.parametrize(
    ("names", "words"),
    [((SUMS,), SUMS), (("avx512-fma", SUMS), f"avx512-fma and {SUMS}"), (("avx2-fma",), "avx2-fma")],
)
def test_the_instructions_of_fp32_are_told(names, words):
    """By their choices, all that multiplied; the ceiling of what took sums is another."""
    choices = {"encoder": [Choice("cpu-fused", "asked for", {}, name) for name in names]}
    told = explain(VARIANTS["cpu-fused"], find_workload(FIXED), "cpu", NOTHING, None, choices)
    assert told == f"LSTM ran in kernels.LSTM: cpu-fused (encoder); multiplied by {words}"
    assert (precisions({"precision": "fp32", "evidence": told}) == (BY_SUMS,)) == (SUMS in names)


def test_types_are_counted_by_product():
    """The most frequent type of matrix products comes first; other operators' types are no one's precision."""
    found = evidence._digest(
        [
            event("aten::mm", "cpu_op", 1, "c10::Half", "c10::Half"),
            event("aten::addmm", "cpu_op", 1, "", "c10::BFloat16"),
            event("aten::mkldnn_rnn_layer", "cpu_op", 1, "c10::BFloat16"),
            event("aten::add", "cpu_op", 1, "double", "double"),
        ]
    )
    assert found.precisions == ("bf16", "fp16")


def test_tf32_asks_for_fp32_products():
    """Its tensors are fp32 all the while, so that is no deviation."""
    found = evidence._digest(CUDA_TRACE)
    assert "asked for" not in explain(VARIANTS["tf32"], find_workload(FIXED), "cuda", found, None)


def test_compile_time_holds_the_backward_graph(monkeypatch):
    """Time that Dynamo spends on the backward graph, compiled when it is first needed, counts as compiling."""
    forward = types.SimpleNamespace(compile_id="0/0", entire_frame_compile_time_s=2.0)
    backward = types.SimpleNamespace(
        compile_id="0/0", entire_frame_compile_time_s=None, backward_cumulative_compile_time_us=3_000_000
    )
    utils = pytest.importorskip("torch._dynamo.utils")
    monkeypatch.setattr(utils, "get_compilation_metrics", lambda: [forward, backward])
    assert evidence.compilation().seconds == 5.0


def test_a_gpu_s_kernels_are_asked_for(monkeypatch):
    """Without Kineto, torch's profiler leaves the GPU's activities out without a word."""
    asked: list[dict[str, Any]] = []
    real = torch.autograd.profiler.profile

    def profile(**options: Any):
        asked.append(options)
        return real(**(options | {"use_device": None}))

    monkeypatch.setattr(torch.autograd.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    evidence.observe(lambda: torch.ones(3) + 1, "cuda")
    assert (asked[0]["use_device"], asked[0]["use_kineto"]) == ("cuda", True)


def test_configuration_and_graphs_are_said_on_a_gpu(monkeypatch):
    """Afterwards one can tell barrier from poll, and whether calls were replayed: each configuration is named once."""
    counts = evidence.graph_cache.ReplayCounts(3, 40, 1, 2, {"its memory was not seen often enough": 6})
    monkeypatch.setattr(evidence.graph_cache, "state", lambda: counts)
    choice = dataclasses.replace(ASKED, config="Config(sync='poll')")
    words = explain(VARIANTS["triton-fp16"], find_workload(FIXED), "cuda", NOTHING, None, {"encoder": (choice, choice)})
    assert words.count("configuration Config(sync='poll')") == 1
    assert (
        "graphs of kernels.LSTM: 3 captured, 1 dropped, 40 calls replayed, 6 launched plainly "
        "(its memory was not seen often enough x6)"
    ) in words


def test_the_lstms_own_type_is_judged_beside_other_products():
    """On a GPU autocast runs the LSTM in fp16 whatever was asked for, while the head's product is in bf16."""
    mixed = Observation({"aten::_cudnn_rnn": 1}, {}, ("bf16", "fp16"), lstm_precisions=("fp16",))
    words = explain(VARIANTS["amp-bf16"], find_workload(FIXED), "cuda", mixed, None)
    assert words.endswith("asked for bf16, but the LSTM ran in fp16")
    right = dataclasses.replace(mixed, lstm_precisions=("bf16",))
    assert "asked for" not in explain(VARIANTS["amp-bf16"], find_workload(FIXED), "cuda", right, None)
