"""The Transformer: torch's own layers are the yardstick, padding never counts, a step projects nothing but itself."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.gate.parity import Gate
from bench.worker.evidence import explain, observe
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.layers.likelihoods import head_loss
from seq2seq.layers.transformer_layers import MultiHeadAttention, positions
from seq2seq.models import cost as costs
from seq2seq.models.base import IGNORE_TOKEN, Extent, select
from seq2seq.models.checkpoint import from_pretrained, save_pretrained
from seq2seq.models.transformer import TABLE, TransformerConfig, TransformerSeq2Seq, rival
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import UnknownWorkloadError

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, Problem, past

SCALED = "translation-transformer-scaled"
SMALL = f"{SCALED}@batch=3,hidden=8,length=6"


@st.composite
def transformers(draw: st.DrawFn, *, with_lengths: bool | None = None) -> Problem:
    """Transformers of up to two layers: values or tokens, one head or several, with a target or without."""
    batch, source_steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    target_steps = draw(st.none() | st.integers(1, 6))
    source_vocabulary = draw(st.sampled_from([0, 7]))
    heads = draw(st.integers(1, 3))
    config = TransformerConfig(
        heads * draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        heads,
        draw(st.none() | st.integers(1, 5)),
        draw(st.none() | st.integers(1, 2)),
        source_features=draw(st.integers(1, 4)),
        target_features=None if target_steps is None else draw(st.none() | st.integers(1, 4)),
        source_vocabulary=source_vocabulary,
        target_vocabulary=source_vocabulary if target_steps is None else draw(st.sampled_from([0, 7])),
    )
    differ = draw(st.booleans()) if with_lengths is None else with_lengths

    def lengths(steps: int | None) -> tuple[int, ...] | None:
        return draw(st.tuples(*[st.integers(1, steps)] * batch)) if differ and steps else None

    return Problem(config, batch, source_steps, target_steps, lengths(source_steps), lengths(target_steps), draw(SEEDS))


def batch_of(problem: Problem, dtype: torch.dtype = torch.float64) -> Batch:
    """As `Problem.make_batch`, which asks an LSTM for the features of the target."""
    config, generator = problem.config, torch.Generator().manual_seed(problem.seed)

    def draw(steps: int, features: int, vocabulary: int) -> Tensor:
        if vocabulary:
            return torch.randint(vocabulary, (problem.batch, steps), generator=generator)
        return torch.randn(problem.batch, steps, features, dtype=dtype, generator=generator)

    source = draw(problem.source_steps, config.input_size, config.source_vocabulary)
    steps = problem.target_steps
    target = None if steps is None else draw(steps, config.target_size, config.target_vocabulary)
    decoded = steps or problem.source_steps
    expected = draw(decoded, config.output_size, config.output_size if config.target_vocabulary else 0)
    if config.target_vocabulary:
        expected[past(problem.decoded_lengths, decoded)] = IGNORE_TOKEN

    def tensor(lengths: tuple[int, ...] | None) -> Tensor | None:
        return None if lengths is None else torch.tensor(lengths)

    return Batch(source, target, tensor(problem.source_lengths), tensor(problem.target_lengths), expected)


def model_of(config: TransformerConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> TransformerSeq2Seq:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(nn.LSTM).to(dtype)


def arguments(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.source, batch.target, batch.source_lengths, batch.target_lengths


def torchs_own(model: TransformerSeq2Seq) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Layers of torch's encoder and decoder with the model's weights."""
    config = model.config
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu", "dtype": torch.float64}
    sizes = config.hidden_size, config.heads, config.feedforward_size

    def attention(target: nn.MultiheadAttention, source: MultiHeadAttention) -> None:
        target.in_proj_weight.copy_(torch.cat([source.query.weight, source.keys_values.weight]))
        target.in_proj_bias.copy_(torch.cat([source.query.bias, source.keys_values.bias]))
        target.out_proj.load_state_dict(source.output.state_dict())

    encoder = nn.ModuleList([nn.TransformerEncoderLayer(*sizes, **options) for _ in model.encoder])
    decoder = nn.ModuleList([nn.TransformerDecoderLayer(*sizes, **options) for _ in model.decoder])
    with torch.no_grad():
        for theirs, ours in zip((*encoder, *decoder), (*model.encoder, *model.decoder), strict=True):
            attention(theirs.self_attn, ours.own)
            theirs.linear1.load_state_dict(ours.feedforward.widen.state_dict())
            theirs.linear2.load_state_dict(ours.feedforward.narrow.state_dict())
            theirs.norm1.load_state_dict(ours.norm_own.state_dict())
            if hasattr(theirs, "multihead_attn"):
                attention(theirs.multihead_attn, ours.cross)
                theirs.norm2.load_state_dict(ours.norm_cross.state_dict())
                theirs.norm3.load_state_dict(ours.norm_forward.state_dict())
            else:
                theirs.norm2.load_state_dict(ours.norm_forward.state_dict())
    return encoder, decoder


@given(problem=transformers())
def test_outputs_are_those_of_torch_s_layers(problem: Problem):
    """torch.nn's encoder and decoder layers, with the same weights and masks, give the same valid outputs."""
    model, batch = model_of(problem.config, problem.seed), batch_of(problem)
    encoder, decoder = torchs_own(model)
    target = batch.source if batch.target is None else batch.target
    padding = None
    if problem.source_lengths:
        padding = past(problem.source_lengths, problem.source_steps)

    def read(read: nn.Module, embed: nn.Module, value: Tensor) -> Tensor:
        place = positions(0, value.size(1), problem.config.hidden_size, value.device)
        return read(embed(value)) * problem.config.hidden_size**0.5 + place

    memory = read(model.read_source, model.embed_source, batch.source)
    for layer in encoder:
        memory = layer(memory, src_key_padding_mask=padding)
    memory = model.encoder_norm(memory)
    x = read(model.read_target, model.embed_target, target)
    causal = torch.ones(target.size(1), target.size(1), dtype=torch.bool).triu(1)
    for layer in decoder:
        x = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
    expected = model.fc(model.decoder_norm(x))
    inside = ~past(problem.decoded_lengths, target.size(1))
    torch.testing.assert_close(model.run(*arguments(batch))[0][inside], expected[inside])


@given(problem=transformers(with_lengths=True))
def test_padding_never_counts(problem: Problem):
    """Whatever stands past the lengths, NaN or a token that does not exist, results and gradients are the same."""
    model, batch = model_of(problem.config, problem.seed), batch_of(problem)
    spoiled = batch.copy()
    for value, lengths in ((spoiled.source, problem.source_lengths), (spoiled.target, problem.target_lengths)):
        if value is not None:
            value[past(lengths, value.size(1))] = float("nan") if value.is_floating_point() else 10**6
    found = []
    for one in (batch, spoiled):
        model.zero_grad()
        results = model.run(*arguments(one))
        sum(result.square().sum() for result in results).backward()
        found.append([*results, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@given(problem=transformers(with_lengths=True))
def test_a_batch_gives_what_its_sequences_give_alone(problem: Problem):
    """Each sequence cut to its own length and run without lengths gives the same outputs and state."""
    model, batch = model_of(problem.config, problem.seed), batch_of(problem)
    whole = model.run(*arguments(batch))
    for place in range(problem.batch):
        source = batch.source[place : place + 1, : problem.source_lengths[place]]
        steps = problem.decoded_lengths[place]
        target = None if batch.target is None else batch.target[place : place + 1, :steps]
        alone = model.run(source, target)
        torch.testing.assert_close(whole[0][place : place + 1, :steps], alone[0])
        torch.testing.assert_close(whole[1][:, place], alone[1][:, 0])
        torch.testing.assert_close(whole[2][:, place], alone[2][:, 0])


def test_outputs_past_the_end_are_those_of_a_zero_state():
    """As those of the LSTM models: the head's bias alone."""
    model = model_of(TransformerConfig(4, 2, 1, 2))
    outputs = model(torch.randn(2, 3, 1, dtype=torch.float64), None, torch.tensor([1, 3]))
    assert torch.equal(outputs[0, 1:], model.fc.bias.expand(2, 2))


@given(problem=transformers())
def test_steps_give_what_run_gives(problem: Problem):
    """Feeding a target step by step, the state reordered on the way, equals teacher forcing."""
    model, batch = model_of(problem.config, problem.seed), batch_of(problem)
    target = batch.source if batch.target is None else batch.target
    expected = model.run(*arguments(batch))[0]
    order = torch.arange(problem.batch - 1, -1, -1)
    state = select(model.encode(batch.source, batch.source_lengths), order)
    inside = ~past(problem.decoded_lengths, target.size(1))
    for place in range(target.size(1)):
        kept = {name: value.clone() for name, value in state.items()}
        outputs, after = model.step(target[order, place], state)
        assert all(torch.equal(value, kept[name]) for name, value in state.items())
        valid = inside[order, place]
        torch.testing.assert_close(outputs[valid], expected[order, place][valid])
        assert all(value.size(1) == problem.batch for value in after.values())
        state = after


def test_a_step_computes_nothing_again():
    """A further step costs what attention to one more key and value does, and no product of an earlier step or source.

    The whole of a step is that of one sequence of one step, but for the source's projections, which `encode` did.
    """
    config = TransformerConfig(16, 5, 2, 4, source_vocabulary=7, target_vocabulary=5)
    model = model_of(config).eval()
    source, token = torch.randint(7, (3, 9)), torch.randint(5, (3,))
    flops = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        state = model.encode(source)
        for _ in range(6):
            with FlopCounterMode(display=False) as counter:
                _, state = model.step(token, state)
            flops.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model.run(source, token[:, None])
        whole = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model.encode(source)
    pair = 2 * 4 * config.hidden_size * 3
    assert [later - earlier for earlier, later in pairwise(flops)] == [pair] * 5
    assert flops[0] == whole - counter.get_total_flops()


def test_beyond_the_table_positions_go_on():
    """A sequence longer than the positions that are kept gets the ones that a longer table would have."""
    model = model_of(TransformerConfig(4, 1, 1, 2))
    torch.testing.assert_close(
        positions(0, 2 * TABLE, 4, torch.device("cpu"))[TABLE:], positions(TABLE, TABLE, 4, torch.device("cpu"))
    )
    source = torch.randn(1, 7, 1, dtype=torch.float64)
    expected = model.run(source)
    model.table = model.table[:3]
    for one, other in zip(expected, model.run(source), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=3)
@given(problem=transformers())
def test_torchscript_gives_the_same(problem: Problem):
    """Scripted, run, encode and step give what they give eagerly."""
    model, batch = model_of(problem.config, problem.seed), batch_of(problem)
    target = batch.source if batch.target is None else batch.target
    scripted = torch.jit.script(model)
    for one, other in zip(model.run(*arguments(batch)), scripted.run(*arguments(batch)), strict=True):
        torch.testing.assert_close(one, other)
    ours, theirs = (m.step(target[:, 0], m.encode(batch.source, batch.source_lengths)) for m in (model, scripted))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()


def test_dropout_is_the_same_code_and_acts_in_training_alone():
    model = model_of(TransformerConfig(8, 1, 1, 2, dropout=0.5))
    source = torch.randn(2, 3, 1, dtype=torch.float64)
    assert not torch.equal(model(source), model(source))
    model.eval()
    assert torch.equal(model(source), model(source))
    plain = model_of(TransformerConfig(8, 1, 1, 2))
    assert torch.equal(plain.train()(source), plain.eval()(source))


def test_a_likelihood_s_head_has_its_parameters_and_its_loss():
    model = model_of(TransformerConfig(4, 2, 1, 2, source_features=2, likelihood="gaussian"))
    source, expected = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 2).double()
    outputs = model(source)
    assert outputs.shape == (2, 3, 4)
    assert torch.equal(model.loss(outputs, expected), head_loss("gaussian", outputs, expected))


def test_a_checkpoint_brings_it_back(tmp_path):
    pytest.importorskip("safetensors")
    model = model_of(TransformerConfig(4, 2, 1, 2), dtype=torch.float32).eval()
    save_pretrained(model, tmp_path / "model")
    source = torch.randn(2, 3, 1)
    assert torch.equal(from_pretrained(tmp_path / "model").model(source), model(source))


@settings(max_examples=10)
@given(problem=transformers(with_lengths=False))
def test_least_products_are_torch_s_count_less_what_the_causal_mask_spares(problem: Problem):
    """Forward and backward, as torch counts them where attention runs as plain products."""
    config, batch = problem.config, batch_of(problem, torch.float32)
    model, extent = model_of(config, problem.seed, torch.float32), Extent.of(batch)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            outputs = model.run(*arguments(batch))[0]
        with FlopCounterMode(display=False) as backward:
            model.loss(outputs, batch.expected).backward()
    steps = extent.target_steps // problem.batch
    spared = config.layers[1] * problem.batch * steps * (steps - 1) // 2 * 4 * config.hidden_size
    assert costs.forward_products(config, extent) == forward.get_total_flops() - spared
    assert costs.backward_products(config, extent) == backward.get_total_flops() - 2 * spared


@given(problem=transformers(with_lengths=True))
def test_padding_is_no_work(problem: Problem):
    """A batch needs what its sequences need alone."""
    batch = batch_of(problem)
    alone = []
    for place in range(problem.batch):
        source = batch.source[place : place + 1, : problem.source_lengths[place]]
        target = None if batch.target is None else batch.target[place : place + 1, : problem.decoded_lengths[place]]
        alone.append(Extent.of(Batch(source, target, None, None, source)))
    for backward in (False, True):
        products = [problem.config.dense_products(extent, backward=backward) for extent in alone]
        assert problem.config.dense_products(Extent.of(batch), backward=backward) == sum(products)


@given(problem=transformers())
def test_parameters_and_state_are_the_model_s(problem: Problem):
    """Every weight and every value that is given back beside the outputs is counted once."""
    model, batch = model_of(problem.config), batch_of(problem)
    assert costs.parameters(problem.config) == sum(value.numel() for value in model.parameters())
    state = model.run(*arguments(batch))[1:]
    assert problem.config.state_values(Extent.of(batch)) == sum(value.numel() for value in state)


@pytest.mark.parametrize("name", ["forecast-deepar", "translation-small", "summarize-pg", "translation-small-scaled"])
def test_a_rival_is_as_large(name):
    """Within a tenth of the LSTM model's parameters, on the same data."""
    config = find_workload(name).config
    found = rival(config)
    assert costs.parameters(found) == pytest.approx(costs.parameters(config), rel=0.1)
    for size in ("output_size", "source_vocabulary", "target_vocabulary", "num_layers"):
        assert getattr(found, size) == getattr(config, size)


def test_the_scaled_workload_is_as_large_as_the_lstm_s():
    ours, theirs = (costs.parameters(find_workload(name).config) for name in (SCALED, "translation-small-scaled"))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_the_workload_reads_what_translation_small_reads():
    ours, theirs = (find_workload(name).make_batch(0) for name in ("translation-transformer", "translation-small"))
    assert all(torch.equal(value, theirs.tensors()[name]) for name, value in ours.tensors().items())


def test_overrides_change_the_sizes_or_say_why_not():
    config = find_workload(f"{SCALED}@hidden=32,layers=3").config
    assert (config.hidden_size, config.layers) == (32, (3, 3))
    with pytest.raises(UnknownWorkloadError, match="multiple of the 4 heads"):
        find_workload(f"{SCALED}@hidden=30")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 10, "heads": 4}, "multiple of the 4 heads"),
        ({"heads": 0}, "heads is 0"),
        ({"feedforward": 0}, "feedforward is 0"),
        ({"likelihood": "cauchy"}, "likelihood is 'cauchy'"),
        ({"likelihood": "gaussian", "target_vocabulary": 5}, "targets are tokens"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**{"hidden_size": 8, "output_size": 1} | sizes)


def test_inputs_that_do_not_fit_are_refused():
    model = model_of(TransformerConfig(4, 1, 1, 2))
    for source, target, words in (
        (torch.zeros(2, 3), None, "2 dimensions"),
        (torch.zeros(2, 3, 1), torch.zeros(1, 3, 1), "source has batch 2 but target has 1"),
        (torch.zeros(2, 3, 2), None, "2 features, expected 1"),
    ):
        with pytest.raises(ValueError, match=words):
            model(source.double(), target)


@pytest.mark.parametrize("mode", ["inference", "training", "decode"])
@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.compiler != "dynamo"])
def test_variants_pass_the_gate_or_say_that_there_is_no_lstm(name, mode):
    """Every variant that exists on a CPU is right, or is another one again."""
    workload, variant = find_workload(SMALL), VARIANTS[name].here()
    if reason := variant.why_not("cpu", mode, workload):
        assert re.search("no LSTM|only$|inference only|needs|runs whole passes|only for the mode decode", reason)
        return
    gate = Gate(workload, mode, "cpu")
    executable = Executable(variant, workload.config, mode, "cpu", initial_weights(workload.config, 0))
    verdict = gate.check(executable, 1)
    assert verdict.passed, verdict.describe()


def test_only_what_says_something_beside_the_lstm_is_left():
    """By fields alone: an LSTM's kernel is the reference again, a compiled loop the compiled model, and so on."""
    workload = find_workload(SMALL)

    def reason(variant: Variant) -> str | None:
        mode = "decode" if variant.captures_step else "inference"
        return dataclasses.replace(variant, devices=("cpu",), requirements=()).why_not("cpu", mode, workload)

    left = {name for name, variant in VARIANTS.items() if reason(variant) is None}
    assert left >= {"reference", "compile", "compile-graphs", "amp-bf16", "amp-fp16", "tf32", "torchscript"}
    assert left >= {"int8-dynamic", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-default"}
    for name in (
        "loop",
        "onednn",
        "cpu-fused",
        "cpu-fused-int8",
        "cudnn",
        "cudnn-default",
        "lstmcell",
        "triton",
        "auto",
    ):
        assert reason(VARIANTS[name]) == "the model has no LSTM, so this would be `reference` again"
    for name in ("compile-rnn", "compile-loop", "triton-compile"):
        assert reason(VARIANTS[name]) == "the model has no LSTM, so this would be `compile` again"
    assert reason(VARIANTS["triton-fp16"]) == "the model has no LSTM, so this would be `cudnn-fp16` again"
    assert "its state grows" in reason(VARIANTS["cudnn-step-graph"])
    assert all(reason(variant) or name in left for name, variant in VARIANTS.items())


def test_with_an_lstm_none_of_them_is_another_again():
    workload = find_workload("seed")
    assert any(variant.lstm != "nn" for variant in VARIANTS.values())
    for variant in VARIANTS.values():
        plain = dataclasses.replace(variant, devices=("cpu",), requirements=())
        assert "no LSTM" not in (plain.why_not("cpu", "inference", workload) or "")


def test_the_gate_refuses_attention_that_looks_ahead(monkeypatch):
    """A decoder without its causal mask is refused."""
    workload = find_workload(SMALL)
    gate = Gate(workload, "inference", "cpu")
    weights = initial_weights(workload.config, 0)
    executable = Executable(VARIANTS["reference"], workload.config, "inference", "cpu", weights)
    assert gate.check(executable, 1).passed
    forward = MultiHeadAttention.forward
    monkeypatch.setattr(MultiHeadAttention, "forward", lambda *inputs: forward(*inputs[:-1], False))
    assert not gate.check(executable, 1).passed


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_evidence_names_the_attention_that_ran(backend):
    workload, variant = find_workload(SMALL), VARIANTS["reference"]
    executable = Executable(variant, workload.config, "inference", "cpu", initial_weights(workload.config, 0))
    batch = executable.prepare(workload.make_batch(0))
    with executable.context(), sdpa_kernel(backend):
        seen = observe(lambda: executable.call(batch), "cpu")
    words = explain(variant, workload, "cpu", seen, None)
    assert words.startswith("no LSTM; attention ran in _scaled_dot_product_")
    assert ("attention_math" in words) is (backend is SDPBackend.MATH)
