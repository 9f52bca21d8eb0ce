"""The registry of variants: each entry is consistent data, and each that cannot run here says why in words."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
import shutil
import types
from typing import ClassVar

import pytest
import torch
from torch import nn

from kernels import dispatch
from kernels.common.recurrence import Problem
from kernels.torch_lstm import onednn_refusal
from seq2seq.execution import requirements
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import DTYPES, LSTMS, Variant
from seq2seq.execution.variants import REFERENCE, VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.runtimes.registry import RUNTIMES
from seq2seq.workloads.registry import WORKLOADS, find_workload

EACH = pytest.mark.parametrize("name", VARIANTS)
SEED = WORKLOADS["seed"]
MODES = ("inference", "training")
PLAIN = Variant("plain", "torch.nn.LSTM as it is")


@pytest.fixture
def fresh_probe():
    """Ask anew what oneDNN has, within the test and again after it."""
    probes = onednn_refusal, requirements._missing_workspace
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A machine with a GPU, as far as `why_not` can see, where Triton compiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    facts = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


class Refusing:
    """A kernel module that serves up to 512 units forward, and up to 256 backward."""

    asked: ClassVar[list[Problem]] = []

    @classmethod
    def refuses(cls, problem: Problem, *, backward: bool) -> str | None:
        """Too many units."""
        cls.asked.append(problem)
        most = 256 if backward else 512
        return f"hidden_size {problem.hidden_size}, at most {most}" if problem.hidden_size > most else None

    @classmethod
    def configs(cls, problem: Problem, *, backward: bool) -> list[str]:
        """One that is no configuration."""
        return [f"for {problem.hidden_size} units, {'backward' if backward else 'forward'}"]


@pytest.fixture
def refusing_kernels(monkeypatch):
    """All kernels refuse large sizes; what they were asked about is kept."""
    Refusing.asked.clear()
    monkeypatch.setattr(dispatch, "_module", lambda _: Refusing)
    return Refusing.asked


def assert_says_why(reason: str | None) -> None:
    """A reason is one line of several words."""
    assert reason is not None
    assert len(reason.split()) > 3, reason
    assert len(reason.splitlines()) == 1, reason


def test_registry_is_keyed_by_name():
    """A variant is found under its own name, and the reference is one of them."""
    assert all(name == variant.name for name, variant in VARIANTS.items())
    assert VARIANTS[REFERENCE.name] is REFERENCE


@EACH
def test_entry_is_consistent(name):
    """An entry names things that exist, and compile options only where they are read."""
    variant = VARIANTS[name]
    assert len(variant.summary.split()) > 2
    assert variant.lstm in LSTMS
    assert variant.precision in DTYPES
    assert variant.dtype is DTYPES[variant.precision]
    assert variant.compiler in {None, "dynamo", "torchscript"}
    assert variant.runtime in {None, *RUNTIMES}
    assert variant.runtime or not variant.runtime_options
    assert variant.devices
    assert set(variant.devices) <= {"cpu", "cuda"}
    assert variant.compiler == "dynamo" or not (variant.compile_options or variant.allow_rnn)
    inspect.signature(torch.compile).bind(nn.Identity(), **variant.compile_options)


def test_no_two_variants_are_the_same():
    """Variants differ in more than name and summary."""

    def settings(variant: Variant) -> Variant:
        return dataclasses.replace(
            variant, name="", summary="", requirements=(), compile_options={}, runtime_options={}
        )

    def options(variant: Variant) -> tuple[object, ...]:
        return (*variant.compile_options.items(), *variant.runtime_options.items())

    seen = [(settings(variant), options(variant)) for variant in VARIANTS.values()]
    assert all(one not in seen[:index] for index, one in enumerate(seen))


def test_variants_are_frozen():
    """An entry of the registry cannot be changed by who uses it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.lstm = "loop"


@pytest.mark.parametrize("lstm", LSTMS)
def test_every_lstm_has_the_parameters_of_nn_lstm(lstm):
    """All LSTMs hold the same parameters under the same names, so one state_dict serves every variant."""
    both = lstm not in {"torchrl", "flashrnn"}  # which walk forward alone
    ours, theirs = (kind(3, 5, 2, batch_first=True, bidirectional=both) for kind in (LSTMS[lstm], nn.LSTM))
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@EACH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("workload", ["seed", "translation-small"])
def test_reasons_are_sentences(name, mode, device, workload):
    """Whatever speaks against a variant is said in one line of words."""
    reason = VARIANTS[name].why_not(device, mode, WORKLOADS[workload])
    if reason is not None:
        assert_says_why(reason)


@EACH
@pytest.mark.parametrize("mode", MODES)
def test_no_variant_runs_on_a_gpu_that_is_not_there(name, mode, monkeypatch):
    """Without a GPU each variant that exists on one says that there is none, the others where they exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = VARIANTS[name].why_not("cuda", mode, SEED)
    wanted = "needs an NVIDIA GPU" if "cuda" in VARIANTS[name].devices else "exists on cpu only"
    assert wanted in reason


@EACH
@pytest.mark.parametrize("mode", MODES)
def test_gpu_variants_say_so_on_a_cpu(name, mode):
    """A variant that exists on a GPU alone says so when asked for the CPU, and no other does."""
    reason = VARIANTS[name].why_not("cpu", mode, SEED)
    assert (reason == "exists on cuda only") == (VARIANTS[name].devices == ("cuda",))


@pytest.mark.parametrize("name", ["reference", "loop", "compile", "torchscript"])
@pytest.mark.parametrize("mode", MODES)
def test_some_variants_run_everywhere(name, mode):
    """Nothing speaks against the variants that need no more than torch itself."""
    assert VARIANTS[name].why_not("cpu", mode, SEED) is None


@pytest.mark.parametrize("mode", MODES)
def test_detour_around_onednn_is_for_where_it_has_no_bf16(mode):
    """On any CPU exactly one of the two variants of bf16 runs."""
    reasons = [VARIANTS[name].why_not("cpu", mode, SEED) for name in ("amp-bf16", "amp-bf16-native")]
    assert reasons.count(None) == 1


def test_custom_requirement_refuses():
    """A requirement is asked for device, mode and workload, and its reason is the variant's."""
    asked = []

    def never(*question: object) -> str:
        asked.append(question)
        return "needs a blue moon in the sky"

    variant = dataclasses.replace(PLAIN, requirements=(lambda *_: None, never))
    assert variant.why_not("cpu", "training", SEED) == "needs a blue moon in the sky"
    assert asked == [("cpu", "training", SEED)]
    assert dataclasses.replace(PLAIN, requirements=(lambda *_: None,)).why_not("cpu", "training", SEED) is None


def test_first_reason_is_given():
    """Requirements are asked in their order, after the device: what can never work is said first."""
    variant = dataclasses.replace(PLAIN, requirements=(lambda *_: "first reason", lambda *_: "second reason"))
    assert variant.why_not("cpu", "inference", SEED) == "first reason"
    assert dataclasses.replace(variant, devices=("cuda",)).why_not("cpu", "inference", SEED) == "exists on cuda only"


@pytest.mark.parametrize("name", ["compile-loop", "compile-rnn"])
def test_compiling_needs_a_compiler(name, monkeypatch):
    """Without a C++ compiler on the PATH, compiling for the CPU is refused with what to install."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    reason = VARIANTS[name].why_not("cpu", "inference", SEED)
    assert re.search(r"needs a C\+\+ compiler.*: install one", reason)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert VARIANTS[name].why_not("cpu", "inference", SEED) is None


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("name", ["compile-loop", "compile-graphs", "compile-rnn"])
def test_compiling_for_a_gpu_needs_triton(name, monkeypatch):
    """Without Triton, compiling for a GPU is refused with what to install."""
    load = builtins.__import__

    def without_triton(module: str, *arguments: object) -> object:
        if module == "triton":
            raise ImportError(module)
        return load(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_triton)
    assert "needs Triton on a GPU" in VARIANTS[name].why_not("cuda", "training", SEED)


UNMEASURED = (
    "nothing was measured on this GPU, so `auto` would be `triton` again, which never is cuDNN: run "
    "`python -m kernels tune`"
)
OURS = [name for name, variant in VARIANTS.items() if variant.lstm == "kernels" and variant.devices == ("cuda",)]


def test_what_is_called_triton_runs_our_kernels_alone():
    """Only `auto` may choose cuDNN; a variant with a kernel's name runs that kernel."""
    asked = {name: VARIANTS[name].lstm_options["implementation"] for name in OURS}
    assert {kind for name, kind in asked.items() if not name.startswith("auto")} == {"triton", *dispatch.MODULES}
    assert {kind for name, kind in asked.items() if name.startswith("auto")} == {"auto"}
    assert all(asked[f"triton-{kernel}"] == kernel for kernel in dispatch.MODULES)


@pytest.mark.usefixtures("pretended_gpu", "refusing_kernels")
@pytest.mark.parametrize("name", OURS)
def test_our_kernels_are_not_measured_in_the_interpreter(name, monkeypatch):
    """If Triton interprets, the time would be that of the interpreter."""
    assert VARIANTS[name].why_not("cuda", "inference", SEED) == (UNMEASURED if name.startswith("auto") else None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = VARIANTS[name].why_not("cuda", "inference", SEED)
    assert reason == "Triton's interpreter is switched on (TRITON_INTERPRET=1): unset it to measure kernels"


@pytest.mark.usefixtures("pretended_gpu", "refusing_kernels")
@pytest.mark.parametrize("name", ["auto", "auto-fp16"])
def test_auto_is_a_variant_of_its_own_once_the_gpu_is_measured(name, monkeypatch):
    """Without a table it never is cuDNN, so it would be `triton` under another name."""
    assert VARIANTS[name].why_not("cuda", "inference", SEED) == UNMEASURED
    monkeypatch.setattr(dispatch, "_auto", lambda *_, **__: ("vendor", "measured: planted"))
    dispatch.forget()
    assert VARIANTS[name].why_not("cuda", "inference", SEED) is None


@pytest.mark.usefixtures("pretended_gpu", "refusing_kernels")
@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("triton")])
def test_a_kernel_s_refusal_is_the_variant_s_reason(name):
    """For the LSTM that it refuses, with its own words; for training also where it has no backward pass."""
    large, middle = find_workload("scaling@hidden=1024"), find_workload("scaling@hidden=512")
    reason = VARIANTS[name].why_not("cuda", "inference", large)
    assert reason.startswith("encoder: ")
    assert "hidden_size 1024, at most 512" in reason
    assert VARIANTS[name].why_not("cuda", "inference", middle) is None
    assert "hidden_size 512, at most 256" in VARIANTS[name].why_not("cuda", "training", middle)


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    ("name", "dtype", "tf32"), [("triton-tf32", torch.float32, True), ("triton-fp16", torch.float16, False)]
)
def test_kernels_are_asked_about_every_lstm_of_the_workload(name, dtype, tf32, refusing_kernels):
    """Its sizes, type and GPU, whether sequences differ in length, and that a decoder that is fed runs step by step."""
    assert VARIANTS[name].why_not("cuda", "inference", find_workload("speech-las@batch=6")) is None
    common = {"saves": False, "tf32": tf32, "capability": 90, "multiprocessors": 132, "gpu": "NVIDIA H200"}
    encoder = Problem("cuda", dtype, 6, 800, 256, directions=2, masked=True, **common)
    decoder = Problem("cuda", dtype, 6, 1, 512, directions=1, masked=False, **common)
    assert list(dict.fromkeys(refusing_kernels)) == [encoder, decoder]


@pytest.mark.usefixtures("pretended_gpu")
def test_fairest_cudnn_takes_no_packed_sequences():
    """The variant of cuDNN's fast algorithm is refused exactly where sequences, or episodes, differ in length."""
    for name, workload in WORKLOADS.items():
        reason = VARIANTS["cudnn-fair"].why_not("cuda", "inference", workload)
        if not workload.config.stacks:
            assert "no LSTM" in reason
        elif name.startswith(("translation", "speech", "rl")):
            assert "takes no packed sequences" in reason
        else:
            assert reason is None, name


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(("name", "serves"), [("triton-cell", True), ("triton-persistent", False), ("triton", True)])
def test_kernels_are_asked_about_resets(name, serves):
    """A kernel that cannot reset refuses episodes that begin in the middle, and the fastest is one that can."""
    reason = VARIANTS[name].why_not("cuda", "training", WORKLOADS["rl-impala"])
    assert (reason is None) == serves, reason
    assert serves or "reset" in str(reason)


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("name", ["onednn", "amp-bf16", "amp-fp16"])
def test_without_onednn_its_variants_say_so(name, monkeypatch):
    """A torch built without oneDNN is named as the reason."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert VARIANTS[name].why_not("cpu", "inference", SEED) == "this torch is built without oneDNN"


@pytest.mark.usefixtures("fresh_probe")
def test_without_onednn_its_operator_is_not_asked(monkeypatch):
    """In a torch built without oneDNN, whose operator raises, nothing speaks against compiling nn.LSTM to train."""

    def missing(*_: object) -> None:
        msg = "mkldnn_rnn_layer: ATen not compiled with MKLDNN support"
        raise RuntimeError(msg)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.aten, "mkldnn_rnn_layer", missing)
    assert VARIANTS["compile-rnn"].why_not("cpu", "training", SEED) is None


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("name", ["onednn", "amp-bf16", "amp-fp16"])
@pytest.mark.parametrize("mode", MODES)
def test_refusals_of_onednn_are_real(name, mode):
    """A variant refused for what oneDNN lacks raises that when it is run all the same; one not refused runs."""
    workload = find_workload("seed@batch=2,length=3,hidden=16")
    reason = VARIANTS[name].why_not("cpu", mode, workload)
    executable = Executable(VARIANTS[name], workload.config, mode, "cpu", initial_weights(workload.config, 0))
    batch = executable.prepare(workload.make_batch(0))
    if reason is None:
        executable.quantities(batch)
    else:
        with pytest.raises(RuntimeError, match=re.escape(reason.rpartition(": ")[2])):
            executable.quantities(batch)


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("mode", MODES)
def test_asking_does_not_depend_on_the_settings_around(mode):
    """The answer is the same inside another variant's settings, where oneDNN is off or gradients are."""
    plain = VARIANTS["amp-fp16"].why_not("cpu", mode, SEED)
    onednn_refusal.cache_clear()
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        assert VARIANTS["amp-fp16"].why_not("cpu", mode, SEED) == plain


@pytest.mark.usefixtures("fresh_probe")
def test_asking_draws_no_random_numbers():
    """Asking whether a variant runs leaves the global random state as it was."""
    before = torch.get_rng_state()
    for variant in VARIANTS.values():
        variant.why_not("cpu", "training", SEED)
    assert torch.equal(torch.get_rng_state(), before)
