"""Models with attention, GNMT and the transducer's encoder: right by hand, alone and in a batch, and step by step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.lstm import LSTM
from kernels.reference import LoopLSTM
from seq2seq.models.attention import FEEDS, AttentionConfig
from seq2seq.models.attention_layer import ATTENTIONS, Attention
from seq2seq.models.base import Config, Model, loss_of, select
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.rnnt_encoder import StackedConfig, StackedEncoder
from seq2seq.workloads.registry import find_workload

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, Problem, attentive, past, stacked

#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
BOTH = pytest.mark.parametrize("lstm", [nn.LSTM, LoopLSTM])
TOKENS = {"source_vocabulary": 7, "target_vocabulary": 7}
#: One of each form, for what need not be drawn.
FORMS = {
    "luong": AttentionConfig(3, 4, 7, num_layers=2, attention="general", scaled=True, **TOKENS),
    "luong, fed": AttentionConfig(
        3, 4, 7, bidirectional=True, decoder_layers=2, attention="general", feeds="attention", **TOKENS
    ),
    "las": AttentionConfig(
        3, 4, 7, bidirectional=True, attention="dot", feeds="context", starts_from_zeros=True, target_vocabulary=7
    ),
    "bahdanau": AttentionConfig(
        3, 4, 2, bidirectional=True, attention="bahdanau", scaled=True, attention_size=3, decoder_input_size=2
    ),
    "gnmt": GNMTConfig(3, 4, 7, num_layers=3, **TOKENS),
}
EACH = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


def model_of(problem: Problem, lstm: type[nn.RNNBase] = nn.LSTM) -> Model:
    """A model in float64 whose weights follow from the problem's seed, whatever its LSTM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        return problem.config.build(lstm).double()


def a_problem(config: Config, *, with_lengths: bool = True) -> Problem:
    """Three sequences for a model."""
    lengths = ((4, 1, 3), (2, 5, 1)) if with_lengths else (None, None)
    return Problem(config, 3, 4, 5, *lengths, seed=0)


def run(model: Model, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The model on the problem's batch."""
    batch = problem.make_batch()
    return model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)


def attended(module: Attention, kind: str, query: Tensor, memory: Tensor) -> Tensor:
    """Compute what one query (size,) finds in one memory (steps, size), term by term as the papers write it."""
    scores = []
    for step in memory:
        if kind == "bahdanau":
            vector = module.vector if module.scale is None else module.scale * module.vector / module.vector.norm()
            inside = module.query.weight @ query + module.key.weight @ step
            scores.append(vector @ torch.tanh(inside if module.query.bias is None else inside + module.query.bias))
        else:
            key = module.key.weight @ step if kind == "general" else step
            scores.append((query @ key) * (1.0 if module.scale is None else module.scale.squeeze()))
    weights = [torch.exp(score) for score in scores]
    return sum(weight * step for weight, step in zip(weights, memory, strict=True)) / sum(weights)


@given(
    kind=st.sampled_from(ATTENTIONS),
    scaled=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    seed=SEEDS,
)
def test_attention_is_the_papers(kind, scaled, sizes, shape, seed):
    """Each kind, scaled or not, finds for every query what its equation says of the valid steps."""
    torch.manual_seed(seed)
    query_size, memory_size, size = sizes
    memory_size = query_size if kind == "dot" else memory_size
    module = Attention(kind, query_size, memory_size, size, scaled=scaled).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    batch, asked, steps = shape
    queries = torch.randn(batch, asked, query_size).double()
    memory = torch.randn(batch, steps, memory_size).double()
    lengths = torch.randint(1, steps + 1, (batch,))
    found = module(queries, memory, module.key(memory), torch.arange(steps) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        for place in range(asked):
            expected = attended(module, kind, queries[row, place], memory[row, :length])
            torch.testing.assert_close(found[row, place], expected, **CLOSE)


@BOTH
@given(problem=attentive())
def test_batch_equals_each_sequence_alone(lstm, problem):
    """Outputs and final state of a sequence in a batch are those of the sequence alone, unpadded."""
    model, batch = model_of(problem, lstm), problem.make_batch()
    plain = model_of(problem, nn.LSTM)
    outputs, hidden, cell = run(model, problem)
    target = batch.source if batch.target is None else batch.target
    read = problem.source_lengths or (problem.source_steps,) * problem.batch
    for row, (source_steps, steps) in enumerate(zip(read, problem.decoded_lengths, strict=True)):
        alone = plain.run(batch.source[row : row + 1, :source_steps], target[row : row + 1, :steps])
        found = outputs[row : row + 1, :steps], hidden[:, row : row + 1], cell[:, row : row + 1]
        torch.testing.assert_close(found, alone, **CLOSE)
    outside = outputs[past(problem.decoded_lengths, outputs.size(1))]
    torch.testing.assert_close(outside, model.fc.bias.expand_as(outside), **CLOSE)


@BOTH
@pytest.mark.parametrize("filler", [1e30, math.nan])
@given(problem=attentive(with_lengths=True) | stacked(with_lengths=True))
def test_padding_never_counts(lstm, filler, problem):
    """Values in the padding change no output, state, loss or gradient, not even if they are NaN."""
    model, found = model_of(problem, lstm), []
    for value in (None, filler):
        batch = problem.make_batch()
        places = [(batch.source, past(problem.source_lengths, problem.source_steps))]
        if batch.target is not None:
            places.append((batch.target, past(problem.target_lengths, problem.target_steps)))
        for steps, outside in places if value is not None else ():
            # Any other token is as good as any other value.
            steps[outside] = value if steps.is_floating_point() else 6 - steps[outside]
        inputs = [v for v in (batch.source, batch.target) if v is not None and v.is_floating_point()]
        for leaf in inputs:
            leaf.requires_grad_()
        model.zero_grad()
        results = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        loss_of(results[0], batch.expected, torch.tensor(problem.decoded_lengths)).backward()
        gradients = [leaf.grad for leaf in (*model.parameters(), *inputs)]
        found.append((*results, *(gradient for gradient in gradients if gradient is not None)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@BOTH
@given(problem=attentive())
def test_decoding_step_by_step_equals_the_whole(lstm, problem):
    """`step` gives what `run` gives for the same steps, and leaves the state that it was given as it was."""
    model, batch = model_of(problem, lstm), problem.make_batch()
    target = batch.source if batch.target is None else batch.target
    state, outputs = model.encode(batch.source, batch.source_lengths), []
    for step in range(target.size(1)):
        before = {name: value.clone() for name, value in state.items()}
        output, after = model.step(target[:, step], state)
        assert state.keys() == after.keys()
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        outputs.append(output)
        state = after
    whole, hidden, _ = model.run(batch.source, target, batch.source_lengths, None)
    torch.testing.assert_close((torch.stack(outputs, 1), state["hidden"]), (whole, hidden), **CLOSE)


@EACH
def test_a_state_is_reordered_by_its_second_dimension(config):
    """Decoding goes on with chosen sequences, one of them twice, as if each had been alone."""
    problem = a_problem(config)
    model, batch = model_of(problem), problem.make_batch()
    outputs, state = model.step(batch.target[:, 0], model.encode(batch.source, batch.source_lengths))
    index = torch.tensor([2, 0, 2])
    _, state = model.step(batch.target[:, 1], state)
    expected = model.step(batch.target[:, 2], state)[0][index]
    torch.testing.assert_close(model.step(batch.target[index, 2], select(state, index))[0], expected, **CLOSE)
    assert outputs.shape == (3, config.head_size)


def gradients(model: Model, problem: Problem) -> dict[str, Tensor]:
    """Of the loss, by name of the weight."""
    batch = problem.make_batch()
    model.loss(run(model, problem)[0], batch.expected, batch.decoded_lengths).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@EACH
def test_gradients_are_differences(config):
    """Of one value of every weight, against the loss a little to either side; every weight has one."""
    problem = a_problem(config)
    model, batch = model_of(problem), problem.make_batch()
    found = gradients(model, problem)
    for name, parameter in model.named_parameters():
        gradient = found[name].flatten()
        place = int(gradient.abs().argmax())
        assert gradient[place] != 0, name
        losses = []
        for shift in (1e-5, -2e-5):
            parameter.data.view(-1)[place] += shift
            losses.append(model.loss(run(model, problem)[0], batch.expected, batch.decoded_lengths).item())
        parameter.data.view(-1)[place] += 1e-5
        assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-8), name


@EACH
def test_one_state_dict_serves_every_lstm(config):
    """The weights have the same names whatever the LSTM, and give the same results and gradients."""
    problem = a_problem(config)
    first = model_of(problem)
    expected = run(first, problem), gradients(first, problem)
    for lstm in (LoopLSTM, LSTM):
        other = config.build(lstm).double()
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close((run(other, problem), gradients(other, problem)), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "with_lengths"),
    [("luong, fed", True), ("las", True), ("bahdanau", False), ("gnmt", True)],
)
def test_torchscript_computes_the_same(name, with_lengths):
    """The scripted model gives the model's own results in all its methods."""
    problem = a_problem(FORMS[name], with_lengths=with_lengths)
    model, batch = model_of(problem), problem.make_batch()
    scripted = torch.jit.script(model)
    arguments = batch.source, batch.target, batch.source_lengths, batch.target_lengths
    torch.testing.assert_close(scripted.run(*arguments), model.run(*arguments), **CLOSE)
    state = model.encode(batch.source, batch.source_lengths)
    torch.testing.assert_close(scripted.encode(batch.source, batch.source_lengths), state, **CLOSE)
    torch.testing.assert_close(scripted.step(batch.target[:, 0], state), model.step(batch.target[:, 0], state), **CLOSE)


@pytest.mark.parametrize("name", ["las", "gnmt"])
def test_torch_compile_takes_it_whole(name):
    """With an LSTM that Dynamo can see, `run` is one graph; the backend runs it as it was captured."""
    problem = Problem(FORMS[name], 2, 3, 2, (3, 1), (1, 2), seed=0)
    model = model_of(problem, LSTM)
    torch._dynamo.reset()
    compiled, batch = torch.compile(model.run, backend="eager", fullgraph=True), problem.make_batch()
    arguments = batch.source, batch.target, batch.source_lengths, batch.target_lengths
    torch.testing.assert_close(compiled(*arguments), model.run(*arguments), **CLOSE)


def test_what_is_fed_is_what_was_found():
    """By hand: fed with context, a step reads [input; context before]; fed with attention, what it gave the head."""
    for feeds in FEEDS[1:]:
        config = dataclasses.replace(FORMS["luong, fed"], feeds=feeds, decoder_layers=None)
        problem = a_problem(config, with_lengths=False)
        model, batch = model_of(problem), problem.make_batch()
        state = model.encode(batch.source)
        memory, fed, outputs = state["memory"][0], state["fed"][0], []
        hidden, cell = state["hidden"], state["cell"]
        assert not fed.any()
        for tokens in batch.target.unbind(1):
            x = torch.cat([model.embed_target.weight[tokens], fed], -1)
            found, (hidden, cell) = model.decoder.lstm(x[:, None], (hidden, cell))
            context = model.attention(found, memory, model.attention.key(memory), None)
            given = torch.tanh(torch.cat([context, found], -1) @ model.combine.weight.T)
            fed = (given if feeds == "attention" else context)[:, 0]
            outputs.append(functional.linear(given, model.fc.weight, model.fc.bias)[:, 0])
        torch.testing.assert_close(run(model, problem)[0], torch.stack(outputs, 1), **CLOSE)


def test_decoder_layers_may_start_from_a_direction_each():
    """As many decoder layers as encoder layers and directions get the encoder's states as they are, with no bridge."""
    problem = a_problem(FORMS["luong, fed"])
    model, batch = model_of(problem), problem.make_batch()
    state = model.encode(batch.source[:1])
    _, (hidden, cell) = model.encoder.lstm(model.embed_source(batch.source[:1]))
    torch.testing.assert_close((state["hidden"], state["cell"]), (hidden, cell), **CLOSE)
    assert not any(name.startswith("bridge") for name, _ in model.named_parameters())


def test_gnmt_by_hand():
    """One pair through plain LSTMs: both ways first, residuals from the third layer, context to every further layer."""
    problem = Problem(dataclasses.replace(FORMS["gnmt"], num_layers=4), 1, 4, 3, None, None, 0)
    model, batch = model_of(problem), problem.make_batch()
    x = model.embed_source.weight[batch.source]
    for layer, reader in enumerate(model.encoder):
        x = reader.lstm(x)[0] + (x if layer > 1 else 0)
    memory, y = x, model.embed_target.weight[batch.target]
    y = model.decoder[0].lstm(y)[0]
    context = model.attention(y, memory, model.attention.key(memory), None)
    for layer, reader in enumerate(model.decoder):
        if layer:
            y = reader.lstm(torch.cat([y, context], -1))[0] + (y if layer > 1 else 0)
    assert model.encoder[0].lstm.bidirectional
    torch.testing.assert_close(run(model, problem)[0], y @ model.fc.weight.T + model.fc.bias, **CLOSE)


@given(problem=stacked(with_lengths=True))
def test_a_stacked_encoder_by_hand(problem):
    """Each sequence alone: the lower LSTM's steps, with zeros to fill the last stack, are read by the upper."""
    config: StackedConfig = problem.config
    model, batch = StackedEncoder(config).double(), problem.make_batch()
    outputs, lower_end, upper_end = model.run(batch.source, None, batch.source_lengths)
    for row, length in enumerate(problem.source_lengths):
        lower, _ = model.lower(batch.source[row : row + 1, :length])
        rows = list(lower[0]) + [torch.zeros(config.hidden_size).double()] * (-length % config.stack)
        pieces = [torch.cat(rows[place : place + config.stack]) for place in range(0, len(rows), config.stack)]
        upper, _ = model.upper(torch.stack(pieces)[None])
        torch.testing.assert_close(outputs[row, :length], upper.reshape(-1, config.output_size)[:length], **CLOSE)
        torch.testing.assert_close((lower_end[0, row], upper_end[0, row]), (lower[0, -1], upper[0, -1]), **CLOSE)
        assert not outputs[row, length:].any()


def test_a_distribution_has_its_likelihood_for_a_loss():
    """A head of two values an output is judged as a Gaussian, as that of the Seq2Seq without attention."""
    config = dataclasses.replace(FORMS["bahdanau"], likelihood="gaussian")
    problem = a_problem(config)
    model, batch = model_of(problem), problem.make_batch()
    outputs = run(model, problem)[0]
    assert outputs.shape == (3, 5, 4)
    location, scale = outputs[0, :2].chunk(2, -1)
    one = dataclasses.replace(batch, expected=batch.expected[:1])
    found = model.loss(outputs[:1], one.expected, torch.tensor([2]))
    expected = torch.distributions.Normal(location, functional.softplus(scale) + 1e-3).log_prob(batch.expected[0, :2])
    torch.testing.assert_close(found, -expected.mean(), **CLOSE)


def test_the_head_may_be_two_layers_with_biases():
    """As in Listen, Attend and Spell: tanh of a layer with bias, then a layer; its bias is among the weights."""
    config = dataclasses.replace(FORMS["luong"], combine_bias=True)
    model = model_of(a_problem(config))
    assert config.dense_parameters == FORMS["luong"].dense_parameters + config.decoder_size
    found, context = torch.randn(2, 3, config.decoder_size).double(), torch.randn(2, 3, config.memory_size).double()
    both = torch.cat([context, found], -1)
    expected = torch.tanh(both @ model.combine.weight.T + model.combine.bias)
    torch.testing.assert_close(model._combined(found, context), expected, **CLOSE)
    assert find_workload("speech-las").config.combine_bias


REFUSED = {
    "attention": ({"attention": "cosine"}, "attention is 'cosine', expected one of 'dot', 'general', 'bahdanau'"),
    "feeds": ({"feeds": "all"}, "feeds is 'all', expected one of '', 'attention', 'context'"),
    "size": ({"attention_size": 3}, "attention_size is for bahdanau, but attention is 'general'"),
    "dot": ({"attention": "dot", "bidirectional": True, "decoder_hidden_size": 4}, "dot compares equal sizes"),
    "layers": ({"decoder_layers": 3}, "decoder_layers is 3 but the encoder has 2"),
    "both ways": ({"bidirectional": True, "decoder_layers": 3}, "decoder_layers is 3 but the encoder has 2"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_refuses_what_cannot_be(changed, message):
    """A wrong name or size is refused in words."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FORMS["luong"], **changed)


def test_an_encoder_alone_refuses_a_target():
    """A target would be left out without a word."""
    model = StackedConfig(3, 4).build(nn.LSTM)
    with pytest.raises(ValueError, match="an encoder takes a source and nothing else"):
        model.run(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


@EACH
def test_inputs_that_do_not_fit_are_refused(config):
    """As the Seq2Seq refuses them: by name, with what was expected."""
    problem = a_problem(config)
    model, batch = model_of(problem), problem.make_batch()
    with pytest.raises(ValueError, match="source has batch 3 but target has 2"):
        model.run(batch.source, batch.target[:2])
    with pytest.raises(ValueError, match="source_lengths must lie between 1 and the 4 steps"):
        model.run(batch.source, batch.target, torch.tensor([5, 1, 1]))
