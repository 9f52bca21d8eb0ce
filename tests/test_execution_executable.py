"""Executables: each variant computes what float64 says, in the settings its fields name, and leaves no trace."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from recurrences import interpreted
from torch import Tensor, nn

from bench.worker.evidence import choices_of
from kernels.dispatch import MODULES
from kernels.reference import LoopLSTM
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import LEARNING_RATE, Executable, backends, own_code
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import REFERENCE, VARIANTS
from seq2seq.models.encoder_decoder import Seq2Seq
from seq2seq.models.weights import Weights, initial_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import Workload

MODES = pytest.mark.parametrize("mode", ["inference", "training"])
TINY = "seed@batch=3,length=5,hidden=16"
#: Fixed lengths, real data with a likelihood; different lengths, tokens; attention fed with what it found, from
#: zeros and over a bridge; layer by layer; stacked steps; labels without places.
PROBLEMS = (
    TINY,
    "forecast-deepar@batch=2,length=21,hidden=6",
    "translation-small-scaled@batch=5,length=6,hidden=8",
    "speech-las-scaled@batch=3,length=20,hidden=8",
    "summarize-pg-scaled@batch=2,length=8,hidden=8",
    "translation-gnmt-scaled@batch=3,length=5,hidden=8,layers=3",
    "speech-rnnt-encoder-scaled@batch=3,length=25,hidden=8",
    "speech-ctc-scaled@batch=3,length=20,hidden=8",
)
#: Compiling takes tens of seconds a variant: one test each, on a tiny problem.
SLOW = ("compile-loop", "compile-rnn")
ON_GPU = [name for name, variant in VARIANTS.items() if name not in SLOW and "cuda" in variant.devices]
#: Largest error against float64, as the norm of the difference over the norm of truth. A wrong term is larger than
#: any of them: gates in another order give errors near 1.
LIMITS = {
    "fp32": 1e-5,
    "fp16": 1e-2,
    "bf16": 8e-2,
    "int8": 8e-2,
    "bf16-weights": 2e-2,
    "bf16-split": 1e-4,
    "int8-head": 2e-2,
}
#: Autocast on any CPU: ATen's own LSTM takes every type everywhere. The fp16 one trains through GradScaler.
SCALED = dataclasses.replace(VARIANTS["amp-fp16"], name="scaled", vendor_lstm=False, requirements=())
NATIVE = dataclasses.replace(VARIANTS["amp-bf16-native"], name="native", requirements=())
QUICK = [variant for name, variant in VARIANTS.items() if name not in SLOW and "cpu" in variant.devices]
#: kernels.LSTM, whose variants exist on GPUs alone, by its loop in torch operations.
OWN = Variant("own", "kernels.LSTM on any device", lstm="kernels", lstm_options={"implementation": "loop"})
EVERY = [*QUICK, SCALED, NATIVE, OWN]
EACH = pytest.mark.parametrize("variant", EVERY, ids=lambda variant: variant.name)


def build(variant: Variant, workload: Workload, mode: str, weights: Weights, **options: bool) -> Executable:
    """An executable on the CPU; the test is skipped where the variant says that it cannot run."""
    reason = variant.why_not("cpu", mode, workload)
    if reason:
        pytest.skip(reason)
    return Executable(variant, workload.config, mode, "cpu", weights, **options)


@functools.cache
def weights_of(workload: Workload, seed: int = 0) -> Weights:
    """Initial weights, which no test writes to."""
    return initial_weights(workload.config, seed)


@functools.cache
def truth(workload: Workload, mode: str, weights: int = 0, inputs: int = 0) -> dict[str, Tensor]:
    """Compute what torch.nn.LSTM gives in float64, by the names of `Executable.quantities`; of a seed each."""
    model = workload.config.build(nn.LSTM).double()
    model.load_state_dict({name: value.double() for name, value in weights_of(workload, weights).items()})
    batch = workload.make_batch(inputs).to("cpu", torch.float64)
    given = {"source": batch.source, "target": batch.target}
    given = {name: value for name, value in given.items() if value is not None and value.is_floating_point()}
    leaves = dict(model.named_parameters()) | {name: value.requires_grad_() for name, value in given.items()}
    result = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    loss = model.loss(result[0], batch.expected, batch.decoded_lengths)
    found = dict(zip(("outputs", "hidden", "cell"), result, strict=True)) | {"loss": loss}
    if mode == "training":
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found |= {f"grad {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def error(value: Tensor, true: Tensor) -> float:
    """Norm of the difference over the norm of truth."""
    assert value.shape == true.shape
    return float(torch.linalg.vector_norm(value.double() - true) / torch.linalg.vector_norm(true))


def assert_right(executable: Executable, workload: Workload, weights: int = 0, inputs: int = 0) -> None:
    """Everything that an executable with weights of a seed computes of a workload's batch is near truth."""
    found = executable.quantities(executable.prepare(workload.make_batch(inputs)))
    true = truth(workload, executable.mode, weights, inputs)
    assert found.keys() == true.keys()
    limit = LIMITS[executable.variant.precision]
    errors = {name: error(found[name], value) for name, value in true.items()}
    # What moves all scores of a query alike cancels in the softmax, but for what tanh bends: little is left of these.
    cancelling = ("grad attention.query", "grad attention.scale")
    assert {
        name: value for name, value in errors.items() if not value <= limit * (5 if name.startswith(cancelling) else 1)
    } == {}


def run_once(executable: Executable, batch: Batch) -> object:
    """One timed unit in the executable's settings."""
    with executable.context():
        return executable.call(executable.prepare(batch))


@pytest.mark.parametrize("problem", PROBLEMS)
@EACH
def test_every_variant_computes_what_float64_says(variant, problem):
    """Outputs, final state, loss and, in training, every gradient are near those of float64, in every variant.

    Every variant has every problem, in one of its modes: they take turns, so that a variant has each of its modes in
    half of the problems, and a problem each mode in half of the variants.
    """
    workload = find_workload(problem)
    if variant.compiler == "dynamo" and workload.config.family != "lstm":
        pytest.skip("compiles for as long as all others run; test_models_attention.py has it without code generation")
    if variant.runtime == "openvino" and workload.config.family == "gnmt":
        pytest.skip("OpenVINO 2026.4 computes an LSTM with a residual connection wrongly, which the gate refuses")
    modes = [mode for mode in ("inference", "training") if not variant.why_not("cpu", mode, workload)]
    turn = EVERY.index(variant) + PROBLEMS.index(problem)
    mode = modes[turn % len(modes)] if modes else "inference"
    assert_right(build(variant, workload, mode, weights_of(workload)), workload)


@pytest.mark.slow
def test_compiled_nn_lstm_computes_what_float64_says():
    """Code that Inductor compiles is near float64, also after its weights were overwritten.

    That of the loop is held against it by gate and audit, in `test_gate_audit.py`.
    """
    workload = find_workload("seed@batch=2,length=2,hidden=4")
    executable = build(VARIANTS["compile-rnn"], workload, "inference", weights_of(workload))
    for seed in (0, 1):
        executable.load(weights_of(workload, seed))
        assert_right(executable, workload, seed, seed)


@pytest.mark.slow
def test_refusal_to_train_compiled_nn_lstm_is_real():
    """If compiled nn.LSTM is said not to train on a CPU, a training call raises; elsewhere it runs."""
    workload = find_workload("seed@batch=2,length=2,hidden=4")
    variant, batch = VARIANTS["compile-rnn"], workload.make_batch(0)
    reason = variant.why_not("cpu", "training", workload)
    executable = Executable(variant, workload.config, "training", "cpu", weights_of(workload))
    if reason is None:
        run_once(executable, batch)
    else:
        with pytest.raises(TypeError, match="mkldnn_rnn_layer"):
            run_once(executable, batch)


@pytest.mark.skipif(not interpreted(), reason="with a GPU the variants themselves run, and are tested below")
@MODES
@pytest.mark.parametrize(
    "problem", ["summarize-pg-scaled@batch=2,length=4,hidden=8", "translation-small-scaled@batch=2,length=4,hidden=8"]
)
@pytest.mark.parametrize("implementation", ["triton", *MODULES])
def test_our_kernels_compute_what_float64_says(implementation, problem, mode):
    """In Triton's interpreter: the whole model by each kernel, one direction or two, with and without lengths."""
    workload = find_workload(problem)
    variant = dataclasses.replace(OWN, lstm_options={"implementation": implementation})
    executable = build(variant, workload, mode, weights_of(workload))
    assert_right(executable, workload)
    ran = {choice.implementation for layers in choices_of(executable.model).values() for choice in layers}
    assert ran <= ({*MODULES} if implementation == "triton" else {implementation})
    assert len(ran) == 1


@MODES
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernels_lstm_computes_in_low_precision(problem, precision, mode):
    """From weights stored so, and in training under autocast, it is as near to float64 as the type allows."""
    workload = find_workload(problem)
    variant = dataclasses.replace(OWN, precision=precision)
    assert_right(build(variant, workload, mode, weights_of(workload)), workload)


@MODES
@pytest.mark.parametrize("problem", ["seed@batch=2,length=2,hidden=4", "translation-small-scaled@batch=2,length=3"])
def test_torch_compile_takes_kernels_lstm_whole(problem, mode):
    """With `fullgraph`, which refuses torch.nn.LSTM, and sequences of different lengths too; the results are right."""
    workload = find_workload(problem)
    options = {**VARIANTS["triton-compile"].compile_options, "backend": "eager"}
    assert options["fullgraph"]
    variant = dataclasses.replace(OWN, compiler="dynamo", compile_options=options)
    assert_right(build(variant, workload, mode, weights_of(workload)), workload)
    refused = dataclasses.replace(variant, lstm="nn", lstm_options={})
    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_right(build(refused, workload, mode, weights_of(workload)), workload)


@MODES
def test_what_is_checked_is_what_is_timed(mode):
    """A compiled model's quantities come from the graph that its timed calls run, not from one compiled beside it."""
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        number = len(compiled)
        compiled.append(graph)

        def run(*arguments: object) -> object:
            ran.append(number)
            return graph(*arguments)

        return run

    compiled: list[torch.fx.GraphModule] = []
    workload = find_workload("seed@batch=2,length=2,hidden=4")
    variant = Variant("seen", "a compiled loop", lstm="loop", compiler="dynamo", compile_options={"backend": backend})
    executable = build(variant, workload, mode, weights_of(workload))
    run_once(executable, workload.make_batch(0))
    timed, ran[:] = set(ran), []
    assert timed
    executable.quantities(executable.prepare(workload.make_batch(0)))
    assert timed <= set(ran)


def test_scaler_steps_with_unscaled_gradients():
    """A training call in fp16 takes its step, from the gradients of the loss as it is."""
    workload = find_workload(TINY)
    weights, batch = weights_of(workload), workload.make_batch(0)
    executable = build(SCALED, workload, "training", weights)
    scale = executable.scaler.get_scale()
    assert scale > 1
    run_once(executable, batch)
    assert executable.scaler.get_scale() == scale
    true = truth(workload, "training")
    beta = executable._optimizer.defaults["betas"][0]
    for name, parameter in executable.model.named_parameters():
        # Adam's first moment after one step is (1 - beta) times the gradient.
        moment = executable._optimizer.state[parameter]["exp_avg"]
        assert error(moment / (1 - beta), true[f"grad {name}"]) < LIMITS["fp16"], name


def test_overflowing_step_is_skipped():
    """A step whose gradients overflow changes no weight and lowers the scale."""
    workload = find_workload(TINY)
    executable = build(SCALED, workload, "training", weights_of(workload))
    executable.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    run_once(executable, workload.make_batch(0))
    assert executable.scaler.get_scale() < 2.0**60
    for name, value in executable.weights().items():
        assert torch.equal(value, weights_of(workload)[name]), name


def test_scaler_is_for_fp16_training_alone():
    """Neither inference nor another precision scales its loss."""
    workload = find_workload(TINY)
    for variant, mode in ((SCALED, "inference"), (REFERENCE, "training")):
        assert not build(variant, workload, mode, weights_of(workload)).scaler.is_enabled()


@MODES
@pytest.mark.parametrize("variant", [SCALED, NATIVE], ids=["fp16", "bf16"])
def test_autocast_computes_in_its_type(variant, mode):
    """Under autocast outputs come in the low precision, while weights and their gradients stay fp32."""
    workload = find_workload(TINY)
    executable = build(variant, workload, mode, weights_of(workload))
    found = executable.quantities(executable.prepare(workload.make_batch(0)))
    assert found["outputs"].dtype == executable.variant.dtype
    assert found["loss"].dtype == torch.float32
    assert {v.dtype for v in executable.model.parameters()} == {torch.float32}
    assert {v.dtype for k, v in found.items() if k.startswith("grad ")} <= {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("mode", "stored", "wanted"),
    [("inference", None, True), ("training", None, False), ("inference", False, False), ("training", True, True)],
)
def test_weights_are_stored_low_in_inference(precision, mode, stored, wanted):
    """A low precision without autocast is that of the stored weights in inference, and of autocast in training."""
    workload = find_workload(TINY)
    variant = Variant("low", "weights in a low precision", precision=precision, vendor_lstm=False)
    executable = build(variant, workload, mode, weights_of(workload), stored=stored)
    batch = executable.prepare(workload.make_batch(0))
    kept = variant.dtype if wanted else torch.float32
    assert {parameter.dtype for parameter in executable.model.parameters()} == {kept}
    assert batch.source.dtype == kept
    assert batch.expected.dtype == torch.float32
    assert {value.dtype for value in executable.weights().values()} == {torch.float32}
    with executable.context():
        assert executable.forward(batch).outputs.dtype == variant.dtype
    assert_right(executable, workload)


def test_autocast_never_stores_low():
    """A variant of autocast keeps fp32 weights in inference too."""
    workload = find_workload(TINY)
    executable = build(NATIVE, workload, "inference", weights_of(workload))
    assert {parameter.dtype for parameter in executable.model.parameters()} == {torch.float32}


@MODES
@EACH
def test_loaded_weights_are_used_by_the_next_call(variant, mode):
    """`load` overwrites the weights in place, and the next call computes with them, compiled or not."""
    workload = find_workload(TINY)
    executable = build(variant, workload, mode, weights_of(workload))
    places = [parameter.data_ptr() for parameter in executable.model.parameters()]
    run_once(executable, workload.make_batch(0))
    run_once(executable, workload.make_batch(0))
    executable.load(weights_of(workload, 1))
    assert [parameter.data_ptr() for parameter in executable.model.parameters()] == places
    for key, value in executable.weights().items():
        assert torch.equal(value, weights_of(workload, 1)[key]), key
    assert_right(executable, workload, weights=1)


@EACH
def test_training_calls_train(variant):
    """A training call changes every weight and, repeated on one batch, lowers the loss."""
    workload = find_workload(TINY)
    weights = weights_of(workload)
    executable = build(variant, workload, "training", weights)
    losses = [float(run_once(executable, workload.make_batch(0)).detach()) for _ in range(30)]
    assert losses[-1] < losses[0]
    for key, value in executable.weights().items():
        assert not torch.equal(value, weights[key]), key


def test_training_call_is_one_step_of_adam():
    """A training call does what a user's own training step does, call after call: no gradient is left over."""
    workload = find_workload(TINY)
    batch = workload.make_batch(0)
    executable = build(REFERENCE, workload, "training", weights_of(workload))
    model = Seq2Seq(workload.config)
    model.load_state_dict(weights_of(workload))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch.source), batch.expected)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(run_once(executable, batch), loss)
    for name, value in executable.weights().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


@EACH
def test_inference_calls_change_nothing(variant):
    """Inference calls leave the weights as they are, and give the same each time."""
    workload = find_workload(TINY)
    executable = build(variant, workload, "inference", weights_of(workload))
    first, second = (run_once(executable, workload.make_batch(0)).outputs for _ in range(2))
    assert torch.equal(first, second)
    assert first.is_inference()
    for key, value in executable.weights().items():
        assert torch.equal(value, weights_of(workload)[key]), key


def test_quantities_leave_no_gradient_behind():
    """Quantities asked for twice are the same: gradients of the first do not add to the second."""
    workload = find_workload(TINY)
    executable = build(REFERENCE, workload, "training", weights_of(workload))
    batch = executable.prepare(workload.make_batch(0))
    first, second = executable.quantities(batch), executable.quantities(batch)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("requires", [False, True])
@MODES
def test_quantities_leave_the_batch_alone(mode, requires):
    """A batch takes gradients after `quantities` exactly when it did before, and has those it had before."""
    workload = find_workload("scaling@batch=2,length=3,hidden=4")
    executable = build(REFERENCE, workload, mode, weights_of(workload))
    batch = executable.prepare(workload.make_batch(0))
    for value in (batch.source, batch.target):
        value.requires_grad_(requires)
        value.grad = torch.ones_like(value) if requires else None
    executable.quantities(batch)
    for value in (batch.source, batch.target):
        assert value.requires_grad is requires
        assert (value.grad is not None) is requires
        assert not requires or torch.equal(value.grad, torch.ones_like(value))


def test_quantities_leave_the_batch_alone_after_a_failure():
    """A batch that the model refuses takes no gradients afterwards."""
    workload = find_workload(TINY)
    executable = build(REFERENCE, workload, "training", weights_of(workload))
    batch = dataclasses.replace(workload.make_batch(0), source=torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match="source has 4 features"):
        executable.quantities(batch)
    assert not batch.source.requires_grad
    assert batch.source.grad is None


def test_quantities_are_copies():
    """Tensors that `quantities` gave stay as they were, also if a model writes each result over the one before."""
    workload = find_workload(TINY)
    executable = build(REFERENCE, workload, "inference", weights_of(workload))
    batch, memory = executable.prepare(workload.make_batch(0)), []

    def captured(*arguments: Tensor | None) -> list[Tensor]:
        result = executable.model.run(*arguments)
        memory[:] = [kept.copy_(new) for kept, new in zip(memory or result, result, strict=True)]
        return memory

    executable._run = captured
    found = executable.quantities(batch)
    kept = {name: value.clone() for name, value in found.items()}
    executable.load(weights_of(workload, 1))
    assert not torch.equal(executable.quantities(batch)["outputs"], kept["outputs"])
    for name, value in found.items():
        assert torch.equal(value, kept[name]), name


def padded_source(expected_in_padding: float) -> tuple[Workload, Batch]:
    """A batch whose decoder reads the source and whose second sequence ends early, and its workload."""
    workload = find_workload("seed@batch=2,length=4")
    batch = dataclasses.replace(workload.make_batch(0), source_lengths=torch.tensor([4, 2]))
    batch.expected[1, 2:] = expected_in_padding
    return workload, batch


@MODES
def test_quantities_leave_out_padding_where_the_source_is_decoded(mode):
    """If the decoder reads the source, expected values past the source's length have no part in any quantity."""
    found = []
    for value in (0.0, 1000.0):
        workload, batch = padded_source(value)
        found.append(build(REFERENCE, workload, mode, weights_of(workload)).quantities(batch))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_training_leaves_out_padding_where_the_source_is_decoded():
    """If the decoder reads the source, a training call does not learn expected values past the source's length."""
    losses = []
    for value in (0.0, 1000.0):
        workload, batch = padded_source(value)
        losses.append(run_once(build(REFERENCE, workload, "training", weights_of(workload)), batch))
    assert torch.equal(*losses)


class PlannedError(Exception):
    """Raised on purpose."""


def settings() -> tuple[object, ...]:
    """Return whether oneDNN and cuDNN are on, and what fp32 products and cuDNN's fp32 LSTM compute in."""
    return (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
    )


def fail_inside(variant: Variant, device: str) -> None:
    """Raise within the settings of a variant, after a look at them."""
    before = settings()
    with backends(variant, device):
        if device == "cuda":
            wanted = "tf32" if variant.precision == "tf32" else "ieee"
            precisions = before[2:] if variant.torch_tf32 else (wanted, wanted)
            assert settings() == (before[0], variant.vendor_lstm, *precisions)
        else:
            assert settings() == (variant.vendor_lstm, *before[1:])
        raise PlannedError


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vendor", [False, True])
@pytest.mark.parametrize(("precision", "left"), [("fp32", False), ("tf32", False), ("tf32", True)])
def test_settings_hold_inside_and_are_put_back(enabled, device, vendor, precision, left, monkeypatch):
    """Inside, the vendor's library and TF32 are as the variant says; an exception later all is as the user had it."""
    monkeypatch.setattr(torch.backends.cudnn if device == "cuda" else torch.backends.mkldnn, "enabled", enabled)
    before = settings()
    assert before[device == "cuda"] is enabled
    with pytest.raises(PlannedError):
        fail_inside(
            Variant("any", "any variant at all", vendor_lstm=vendor, precision=precision, torch_tf32=left), device
        )
    assert settings() == before


@pytest.mark.parametrize("allow", [False, True])
def test_allow_rnn_holds_inside_alone(allow):
    """Dynamo may trace nn.LSTM inside the settings of a variant that says so, and nowhere else."""
    workload = find_workload(TINY)
    variant = dataclasses.replace(REFERENCE, allow_rnn=allow)
    executable = build(variant, workload, "inference", weights_of(workload))
    before = torch._dynamo.config.allow_rnn
    with executable.context():
        assert torch._dynamo.config.allow_rnn is (allow or before)
        assert torch.is_inference_mode_enabled()
    assert torch._dynamo.config.allow_rnn is before
    assert not torch.is_inference_mode_enabled()


def operations(executable: Executable, workload: Workload) -> set[str]:
    """Names of the operations that one call runs, after a first one."""
    run_once(executable, workload.make_batch(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_once(executable, workload.make_batch(0))
    return {event.key for event in profile.key_averages()}


@MODES
@EACH
def test_vendor_library_runs_where_the_variant_says(variant, mode):
    """OneDNN runs nn.LSTM in the variants that let it, and nothing in those that do not."""
    workload = find_workload(TINY)
    executable = build(variant, workload, mode, weights_of(workload))
    ran = operations(executable, workload)
    vendor = {operation for operation in ran if "mkldnn" in operation}
    if executable.variant.vendor_lstm and executable.variant.lstm == "nn" and executable.runtime is None:
        assert "aten::mkldnn_rnn_layer" in vendor
        assert (mode == "inference") == ("aten::mkldnn_rnn_layer_backward" not in vendor)
    elif not executable.variant.vendor_lstm:
        assert not vendor
    else:
        assert not any("rnn" in operation for operation in vendor)


@MODES
@pytest.mark.parametrize(
    ("variant", "vendor"), [(REFERENCE, False), (VARIANTS["onednn"], True)], ids=["reference", "default"]
)
def test_reference_runs_without_onednn(variant, vendor, mode):
    """No operation of the reference is oneDNN's, which runs the LSTM that a CPU user gets by default."""
    workload = find_workload(TINY)
    ran = operations(build(variant, workload, mode, weights_of(workload)), workload)
    assert any("mkldnn" in operation for operation in ran) is vendor
    assert any("lstm" in operation for operation in ran)


def test_compiled_methods_share_no_code():
    """Each compiled variant has a code object of its own, so none checks or uses up what Dynamo keeps for another."""
    model = Seq2Seq(find_workload(TINY).config, LoopLSTM)
    one, other = own_code(model.run), own_code(model.run)
    assert len({id(method.__func__.__code__) for method in (one, other, model.run)}) == 3
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(one(x), model.run(x))


def test_initial_weights_follow_their_seed():
    """Equal seeds give equal weights, others give others, under the names and shapes of the model."""
    config = find_workload("speech-las-scaled").config
    one, again, other = initial_weights(config, 0), initial_weights(config, 0), initial_weights(config, 1)
    shapes = {name: parameter.shape for name, parameter in config.build(nn.LSTM).named_parameters()}
    assert {name: value.shape for name, value in one.items()} == shapes
    for name, value in one.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
        assert not value.requires_grad, name


def test_initial_weights_draw_no_random_numbers():
    """Asking for initial weights leaves the global random state as it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    initial_weights(find_workload(TINY).config, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_initial_weights_draw_no_random_numbers_on_a_gpu():
    """Asking for initial weights leaves the GPU's random state as it was too."""
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    initial_weights(find_workload(TINY).config, 0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@MODES
@EACH
def test_executables_share_no_weights(variant, mode):
    """Executables of one dictionary of weights share memory neither with it nor with each other, nor do the copies."""
    workload = find_workload(TINY)
    weights = initial_weights(workload.config, 0)
    one, other = (build(variant, workload, mode, weights) for _ in range(2))
    owners = [weights.values(), one.model.parameters(), other.model.parameters(), one.weights().values()]
    places = [{value.untyped_storage().data_ptr() for value in owner} for owner in owners]
    assert len(set().union(*places)) == sum(len(place) for place in places)
    one.load(weights_of(workload, 1))
    for key, value in initial_weights(workload.config, 0).items():
        assert torch.equal(weights[key], value), key
        assert torch.equal(other.weights()[key], value), key


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_every_variant_computes_what_float64_says_on_a_gpu(name, problem, mode):
    """On a GPU too, outputs, final state, loss and gradients are near those of float64 on the CPU."""
    workload = find_workload(problem)
    variant, weights, batch = VARIANTS[name], weights_of(workload), workload.make_batch(0)
    reason = variant.why_not("cuda", mode, workload)
    if reason:
        pytest.skip(reason)
    executable = Executable(variant, workload.config, mode, "cuda", weights)
    found = executable.quantities(executable.prepare(batch))
    # cuDNN takes fp16 under autocast to bf16 too; TF32 has fp16's ten bits.
    limit = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 8e-2}[variant.precision]
    for key, true in truth(workload, mode).items():
        value = error(found[key].cpu(), true)
        assert math.isfinite(value), key
        assert value <= limit, key


def test_an_unknown_mode_is_refused():
    """A mistyped mode does not train in silence."""
    workload = find_workload("seed")
    with pytest.raises(ValueError, match="expected one of inference, training"):
        Executable(VARIANTS["reference"], workload.config, "trainning", "cpu", initial_weights(workload.config, 0))
