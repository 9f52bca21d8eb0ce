"""Gradients of a fed decoder by one native call: those of float64, on every build; and who is not served."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
from unittest import mock

import pytest
import torch
from cpu_builds import TARGETS
from planted_decoder_defects import DEFECTS
from planted_kernels import NOTHING
from torch import Tensor

from kernels.cpu import build, decoder, decoder_training, fused
from kernels.cpu.packing import TRAINED
from seq2seq.layers.padding import valid_mask
from seq2seq.models.attention import AttentionConfig, AttentionSeq2Seq

pytest.importorskip("hypothesis")
from fed_decoders import (
    CLOSE_BACK,
    KINDS,
    LUONG,
    Found,
    decoder_built_for,
    fed_configs,
    model_of,
    planted_decoder,
    problem,
    uninitialised_is_nan,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(build.missing() is not None, reason="there is no C++ compiler"),
]
#: What a decoder returns, whose gradients may be there or not.
RESULTS = ("outputs", "hidden", "cell", "fed")


@dataclasses.dataclass(frozen=True)
class Given:
    """Target, the state that decoding starts from, and the lengths, in float64; and gradients of the results."""

    target: Tensor
    state: dict[str, Tensor]
    lengths: Tensor | None
    grads: dict[str, Tensor]

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of all numbers, which need gradients."""
        numbers = {"target": self.target} | {n: v for n, v in self.state.items() if v.is_floating_point()}
        return {name: value.to(dtype, copy=True).requires_grad_() for name, value in numbers.items()}


def drawn(
    config: AttentionConfig, batch: int, steps: int, seed: int, *, differ: bool, masked: bool, results: set[str]
) -> Given:
    """A problem; where sequences differ the target is NaN past its end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    memory_steps, states = 1 + seed % 6, (config.depth, batch, config.decoder_size)
    target = normal(batch, steps, config.target_size)
    state = {
        "hidden": normal(*states), "cell": normal(*states), "fed": normal(1, batch, config.fed_size),
        "memory": normal(1, batch, memory_steps, config.memory_size),
    }  # fmt: skip
    if config.attention != "dot":
        keys = config.attention_size or config.decoder_size
        state["keys"] = normal(1, batch, memory_steps, keys)
    if masked:
        state["mask"] = torch.rand(1, batch, memory_steps, generator=generator) < 0.6
        state["mask"][..., seed % memory_steps] = True
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator) if differ else None
    if lengths is not None:
        target = target.masked_fill(~valid_mask(target, lengths)[..., None], math.nan)
    shapes = {"outputs": (batch, steps, 3), "hidden": states, "cell": states, "fed": (1, batch, config.fed_size)}
    return Given(target, state, lengths, {name: normal(*shapes[name]) for name in RESULTS if name in results})


def gradients(model: AttentionSeq2Seq, given: Given, dtype: torch.dtype) -> Found:
    """Results of decoding, and gradients of everything that a decoder reads, zero where there are none."""
    leaves = given.leaves(dtype)
    others = {name: value for name, value in given.state.items() if name not in leaves}
    state = others | {name: value for name, value in leaves.items() if name != "target"}
    outputs, after = model.decode(leaves["target"], state, given.lengths)
    found = {"outputs": outputs} | {name: after[name] for name in RESULTS[1:]}
    loss = sum((found[name] * grad.to(dtype)).sum() for name, grad in given.grads.items())
    read = leaves | {name: value for name, value in model.named_parameters() if not name.startswith("encoder")}
    grads = torch.autograd.grad(loss, list(read.values()), allow_unused=True)
    of_read = zip(read.items(), grads, strict=True)
    found |= {f"grad {name}": torch.zeros_like(v) if grad is None else grad for (name, v), grad in of_read}
    return {name: value.detach() for name, value in found.items()}


def in_float64(model: AttentionSeq2Seq, given: Given) -> Found:
    """The same by the model's own loop with torch's LSTM."""
    exact = model.config.build(torch.nn.LSTM).double()
    exact.load_state_dict(model.state_dict())
    return gradients(exact, given, torch.float64)


def trained(config: AttentionConfig, seed: int) -> AttentionSeq2Seq:
    """A model as it is trained, with biases that are not zero."""
    model = model_of(config, seed).train()
    if config.attention == "bahdanau" and config.scaled:
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.uniform_(model.attention.query.bias, -0.5, 0.5, generator=generator)
    return model


def error_of(config: AttentionConfig, given_: Given, seed: int) -> float:
    """Largest error of the native calls, which must have run."""
    model = trained(config, seed)
    watched = mock.patch.object(decoder_training, "run", wraps=decoder_training.run)
    with uninitialised_is_nan(), watched as ran:
        found = gradients(model, given_, torch.float32)
    assert ran.call_count == 1
    assert "and one back" in model.decoder.lstm.choices[0].reason
    return worst(found, in_float64(model, given_))


@pytest.mark.parametrize("target", TARGETS)
@given(
    config=fed_configs(), batch=st.integers(1, 14), steps=st.integers(1, 5), threads=st.integers(1, 3),
    differ=st.booleans(), masked=st.booleans(), results=st.sets(st.sampled_from(RESULTS), min_size=1), seed=SEEDS,
)  # fmt: skip
def test_all_gradients_are_those_of_float64(  # noqa: PLR0913, PLR0917 - what is drawn
    target, config, batch, steps, threads, differ, masked, results, seed
):
    """Of every kind of attention and feeding, with and without padding, in memory that was NaN before."""
    given_ = drawn(config, batch, steps, seed, differ=differ, masked=masked, results=results)
    with decoder_built_for(target, threads):
        assert error_of(config, given_, seed) < CLOSE_BACK


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The decoder with all of these, of which none is chosen yet."""
    defects = {name: (right, instead) for name, (right, instead, _) in DEFECTS.items()}
    return planted_decoder(defects, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", [NOTHING, *DEFECTS])
def test_a_defect_in_native_code_is_caught(name, changed, monkeypatch):
    """Without a defect the comparison passes; each defect is far beyond what it allows, or no number."""
    monkeypatch.setattr(decoder, "library", lambda: changed)
    ctypes.c_int.in_dll(changed, "planted_defect").value = [*DEFECTS, NOTHING].index(name)
    for kind in KINDS if name == NOTHING else [DEFECTS[name][2]]:
        given_ = drawn(KINDS[kind], 8, 5, 11, differ=True, masked=True, results=set(RESULTS))
        error = error_of(KINDS[kind], given_, 11)
        assert error < CLOSE_BACK if name == NOTHING else not error < 30 * CLOSE_BACK


def test_a_training_step_is_that_of_the_models_own_loop():
    """With encoder, head and loss, whose gradients come of the native call's."""
    found = []
    for native in (True, False):
        model, (source, target, read, lengths) = trained(LUONG, 3), problem(LUONG, 4, 6, 3, differ=True)
        run = model.run if native else lambda *given_, m=model: by_own_loop_of(m, given_)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = run(source, target, read, lengths)[0]
            outputs.square().sum().backward()
            optimizer.step()
        found.append(dict(model.state_dict()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def by_own_loop_of(model: AttentionSeq2Seq, given_: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What `run` returns without the native call."""
    fused = vars(model).pop("_step_by_step")
    try:
        return model.run(*given_)
    finally:
        vars(model)["_step_by_step"] = fused


def test_gradients_of_gradients_are_refused():
    """There are none, and nothing computes others in their place."""
    model, (source, target, *_) = trained(LUONG, 1), problem(LUONG, 3, 4, 1, differ=False)
    outputs = model.run(source, target)[0]
    first = torch.autograd.grad(outputs.sum(), model.combine.weight, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        first.square().sum().backward()


def test_only_the_gradients_that_are_needed_are_computed():
    """Frozen parameters have none, and the others are the same."""
    found = []
    for frozen in (False, True):
        model, (source, target, *_) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=False)
        for name in ("combine.weight", "attention.vector", "decoder.lstm.bias_ih_l0", "decoder.lstm.weight_hh_l0"):
            model.get_parameter(name).requires_grad_(not frozen)
        model.run(source, target)[0].sum().backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    missing = {name for name, grad in found[1].items() if grad is None}
    assert missing == {"combine.weight", "attention.vector", "decoder.lstm.bias_ih_l0", "decoder.lstm.weight_hh_l0"}
    for name, grad in found[1].items():
        assert grad is None or torch.equal(grad, found[0][name]), name


def test_a_graph_may_be_walked_twice_and_batched():
    """Nothing that was kept is written, and batched gradients run one after the other."""
    model, (source, target, *_) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=False)
    outputs, weight = model.run(source, target)[0], model.combine.weight
    first, again = (torch.autograd.grad(outputs.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    each = torch.stack([torch.ones_like(outputs), 2 * torch.ones_like(outputs)])
    batched = torch.autograd.grad(outputs, weight, each, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([first, 2 * first]), rtol=1e-5, atol=1e-6)


def test_a_changed_tensor_is_noticed():
    """What the way back reads must be what the way forward read."""
    model, (source, target, *_) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=False)
    outputs = model.run(source, target)[0]
    with torch.no_grad():
        model.combine.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


@pytest.mark.parametrize("buffer", ["mask", torch.int32, torch.int64], ids=str)
def test_mask_and_lengths_may_be_used_again(buffer):
    """The way back reads what they were in the forward pass: as in the model's own loop."""
    found = []
    for changes in (False, True):
        model, (source, target, read, ends) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=True)
        state, ends = model.encode(source, read), ends.to(buffer if buffer != "mask" else torch.int64)
        outputs = model.decode(target, state, ends)[0]
        assert "and one back" in model.decoder.lstm.choices[0].reason
        if changes:
            (state["mask"] if buffer == "mask" else ends).zero_()
        outputs.square().sum().backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_a_hook_of_saved_tensors_may_not_change_their_form():
    """Native code would read past the end of what is smaller."""
    model, (source, target, *_) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v[..., :1] if v.dim() == 1 else v):
        decoded = model.decode(target, model.encode(source))[1]["fed"]
    with pytest.raises(RuntimeError, match="a hook of saved tensors was given"):
        decoded.sum().backward()


#: What is done to a model so that no native call trains it, and what the choices say then.
UNSERVED = {
    "autocast": (None, "autocast"),
    "a hook": (lambda model: model.combine.register_forward_hook(lambda *_: None), "hooks"),
    "a hook of the way back": (lambda model: model.combine.register_full_backward_hook(lambda *_: None), "hooks"),
    "scores": (
        lambda model: setattr(model.attention, "scores", lambda _, keys: keys.sum(-1)[:, None]),
        "its own scores",
    ),
    "a look": (lambda model: setattr(model, "_look", lambda _, state: state["memory"][0, :, :1]), "its own _look"),
    "weights in int8": (lambda model: setattr(model.decoder.lstm, "weight_storage", "int8"), "fp32"),
    "float64": (lambda model: model.double(), "fp32"),
}


@pytest.mark.parametrize("why", UNSERVED)
def test_who_is_not_served_is_trained_by_the_models_own_loop(why):
    """And its choices say why."""
    if why == "autocast" and fused.storage_hindrance(TRAINED):
        pytest.skip("without products of bf16 the kernel refuses autocast by name, whatever the decoder")
    change, word = UNSERVED[why]
    config = dataclasses.replace(KINDS["general"])
    model, (source, target, *_) = trained(config, 2), problem(config, 3, 4, 2, differ=False)
    for module in model.modules():
        if hasattr(module, "implementation") and why in {"autocast", "float64"}:
            module.implementation = "cpu-fused" if why == "autocast" else "auto"
    if change:
        change(model)
    if why == "float64":
        source, target = source.double(), target.double()
    with contextlib.ExitStack() as stack:
        if why == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(mock.patch.object(decoder_training, "run", side_effect=AssertionError("it ran")))
        if why == "weights in int8":
            with pytest.raises(RuntimeError, match="have no gradients"):
                model.run(source, target)
            return
        outputs = model.run(source, target)[0]
    outputs.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    reason = model.decoder.lstm.choices[0].reason
    assert reason.startswith("a step at a time: ")
    assert word in reason


def test_dropout_of_one_layer_does_not_act():
    """It is between layers, so the native call trains such a model."""
    model, (source, target, *_) = trained(LUONG, 2), problem(LUONG, 3, 4, 2, differ=False)
    model.decoder.lstm.dropout = 0.3
    with mock.patch.object(decoder_training, "run", wraps=decoder_training.run) as ran:
        model.run(source, target)
    assert ran.call_count == 1
