"""The Seq2Seq model: padding never counts, every option means what it says, and wrong inputs are refused in words."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from kernels.reference import LoopLSTM
from seq2seq.execution.split_lstm import SplitLSTM
from seq2seq.models.base import IGNORE_TOKEN, loss_of
from seq2seq.models.encoder_decoder import Seq2Seq, Seq2SeqConfig

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SEEDS, Problem, past, problems

#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
BOTH = pytest.mark.parametrize("lstm", [nn.LSTM, LoopLSTM])
SIZES = ("input_size", "hidden_size", "output_size", "num_layers")
OPTIONAL_SIZES = ("decoder_input_size", "decoder_hidden_size", "decoder_layers")
VOCABULARIES = ("source_vocabulary", "target_vocabulary")
SMALL = Seq2SeqConfig(3, 4, 2)
TOKENS = Seq2SeqConfig(3, 4, 7, source_vocabulary=7, target_vocabulary=7)
EVERYTHING = Seq2SeqConfig(
    input_size=3,
    hidden_size=4,
    output_size=7,
    num_layers=3,
    bidirectional=True,
    decoder_input_size=2,
    decoder_hidden_size=5,
    decoder_layers=2,
    source_vocabulary=7,
    target_vocabulary=7,
)


def model_of(problem: Problem, lstm: type[nn.RNNBase] = nn.LSTM) -> Seq2Seq:
    """A model in float64 whose weights follow from the problem's seed, whatever its LSTM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        return Seq2Seq(problem.config, lstm).double()


def by_hand(model: Seq2Seq, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One unpadded pair, (1, steps, ...) each, through plain torch.nn.LSTMs as the documentation of Seq2Seq says."""
    config = model.config
    encoder = nn.LSTM(
        config.input_size, config.hidden_size, config.num_layers, batch_first=True, bidirectional=config.bidirectional
    ).double()
    decoder_hidden = config.decoder_hidden_size or config.hidden_size
    decoder = nn.LSTM(
        config.decoder_input_size or config.input_size,
        decoder_hidden,
        config.decoder_layers or config.num_layers,
        batch_first=True,
    ).double()
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    if config.source_vocabulary:
        source = model.embed_source.weight[source]
    if config.target_vocabulary:
        target = model.embed_target.weight[target]
    _, states = encoder(source)
    start = []
    for state, bridge in zip(states, (model.bridge_hidden, model.bridge_cell), strict=True):
        directions = 2 if config.bidirectional else 1
        # nn.LSTM gives layer 0 forward, layer 0 backward, layer 1 forward, ...
        layers = [torch.cat(list(state[layer : layer + directions]), -1) for layer in range(0, len(state), directions)]
        topmost = torch.stack(layers[len(layers) - decoder.num_layers :])
        wanted = config.bidirectional or decoder_hidden != config.hidden_size
        start.append(topmost @ bridge.weight.T + bridge.bias if wanted else topmost)
    outputs, (hidden, cell) = decoder(target, (start[0], start[1]))
    return outputs @ model.fc.weight.T + model.fc.bias, hidden, cell


@BOTH
@given(problem=problems())
@example(problem=Problem(SMALL, 1, 1, None, None, None, 0))
@example(problem=Problem(EVERYTHING, 3, 4, 5, (4, 1, 2), (1, 5, 3), 0))
def test_batch_equals_each_sequence_alone(lstm, problem):
    """Outputs and final state of a sequence in a batch are those of plain LSTMs on that sequence alone, unpadded."""
    model, batch = model_of(problem, lstm), problem.make_batch()
    outputs, hidden, cell = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    target = batch.source if batch.target is None else batch.target
    encoded = problem.source_lengths or (problem.source_steps,) * problem.batch
    for row, (read, decoded) in enumerate(zip(encoded, problem.decoded_lengths, strict=True)):
        expected = by_hand(model, batch.source[row : row + 1, :read], target[row : row + 1, :decoded])
        found = outputs[row : row + 1, :decoded], hidden[:, row : row + 1], cell[:, row : row + 1]
        torch.testing.assert_close(found, expected, **CLOSE)


@BOTH
@pytest.mark.parametrize("filler", [1e30, math.inf, math.nan])
@given(problem=problems(with_lengths=True))
def test_padding_never_counts(lstm, filler, problem):
    """Values in the padding change no output, state, loss or gradient, not even if they are NaN."""
    model, clean = model_of(problem, lstm), problem.make_batch()
    dirty = problem.make_batch()
    places = [(dirty.source, past(problem.source_lengths, problem.source_steps))]
    if dirty.target is not None:
        places.append((dirty.target, past(problem.target_lengths, problem.target_steps)))
    for value, outside in places:
        # Any other token is as good as any other value.
        value[outside] = filler if value.is_floating_point() else 6 - value[outside]
    found = []
    for batch in (clean, dirty):
        model.zero_grad()
        inputs = [v for v in (batch.source, batch.target) if v is not None and v.is_floating_point()]
        for value in inputs:
            value.requires_grad_()
        run = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        loss_of(run[0], batch.expected, torch.tensor(problem.decoded_lengths)).backward()
        gradients = [leaf.grad for leaf in (*model.parameters(), *inputs)]
        found.append((*run, *(g for g in gradients if g is not None)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@BOTH
@given(problem=problems(with_lengths=True))
def test_outputs_past_the_end_are_those_of_a_zero_state(lstm, problem):
    """Past a target's length the output is the head's bias."""
    model, batch = model_of(problem, lstm), problem.make_batch()
    outputs = model(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    outside = outputs[past(problem.decoded_lengths, outputs.size(1))]
    torch.testing.assert_close(outside, model.fc.bias.expand_as(outside), **CLOSE)


@BOTH
@given(problem=problems())
def test_decoding_step_by_step_equals_the_whole(lstm, problem):
    """`step` fed one step at a time with the state it gave ends where one call over all steps does."""
    model, batch = model_of(problem, lstm), problem.make_batch()
    target = batch.source if batch.target is None else batch.target
    start = model.encode(batch.source, batch.source_lengths)
    state, outputs = start, []
    for step in range(target.size(1)):
        output, state = model.step(target[:, step], state)
        outputs.append(output)
    torch.testing.assert_close((torch.stack(outputs, 1), state), model.decode(target, start), **CLOSE)


@BOTH
def test_without_target_the_source_is_decoded(lstm):
    """As in the seed, `model(x)` feeds x to the decoder too, with x's lengths; so `target` alone changes the result."""
    problem = Problem(SMALL, 3, 5, None, (5, 2, 4), None, 0)
    model, batch = model_of(problem, lstm), problem.make_batch()
    x, lengths = batch.source, batch.source_lengths
    assert torch.equal(model(x), model(x, x))
    assert torch.equal(model(x, None, lengths), model(x, x, lengths, lengths))
    torch.testing.assert_close(model(x, None, lengths, torch.tensor([5, 5, 5])), model(x, x, lengths), **CLOSE)
    assert not torch.equal(model(x), model(x, x + 1))


def test_outputs_are_those_of_run():
    """Calling the model gives the first field of `run`."""
    problem = Problem(EVERYTHING, 2, 3, 4, (3, 1), (2, 4), 0)
    model, batch = model_of(problem), problem.make_batch()
    arguments = batch.source, batch.target, batch.source_lengths, batch.target_lengths
    assert torch.equal(model(*arguments), model.run(*arguments)[0])


@given(problem=problems())
def test_one_state_dict_serves_every_lstm(problem):
    """The model's weights have the same names and shapes whatever its LSTM, and give the same outputs."""
    batch = problem.make_batch()
    first = model_of(problem)
    expected = first(batch.source, batch.target)
    for lstm in (LoopLSTM, SplitLSTM):
        other = Seq2Seq(problem.config, lstm).double()
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close(other(batch.source, batch.target), expected, **CLOSE)


@BOTH
@pytest.mark.parametrize(
    ("layers", "decoder_layers", "random"), [(1, 1, False), (2, 1, True), (2, 2, True)], ids=["none", "encoder", "both"]
)
def test_dropout_acts_between_layers_in_training_alone(lstm, layers, decoder_layers, random):
    """Two training passes differ where there are layers to drop between; inference is as without dropout."""
    config = Seq2SeqConfig(3, 8, 2, num_layers=layers, decoder_layers=decoder_layers, dropout=0.5)
    with warnings.catch_warnings():
        # torch warns of dropout that it cannot apply; the model must not ask for it.
        warnings.simplefilter("error")
        model = Seq2Seq(config, lstm)
    x = torch.randn(4, 5, 3)
    assert torch.equal(model(x), model(x)) is not random
    plain = Seq2Seq(dataclasses.replace(config, dropout=0.0), lstm)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain(x))


def test_dropout_reaches_both_lstms():
    """Encoder and decoder each drop with the configured probability, where they have layers to drop between."""
    model = Seq2Seq(Seq2SeqConfig(3, 4, 2, num_layers=3, decoder_layers=2, dropout=0.25))
    assert (model.encoder.dropout, model.decoder.dropout) == (0.25, 0.25)
    model = Seq2Seq(Seq2SeqConfig(3, 4, 2, num_layers=3, decoder_layers=1, dropout=0.25))
    assert (model.encoder.dropout, model.decoder.dropout) == (0.25, 0.0)


def test_config_is_frozen():
    """Sizes cannot change under a model that was built for them."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.hidden_size = 8


@pytest.mark.parametrize("name", [*SIZES, *OPTIONAL_SIZES])
@pytest.mark.parametrize("value", [0, -1])
def test_config_refuses_sizes_below_one(name, value):
    """A size or count below one is refused by name, with the value and what was expected."""
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        dataclasses.replace(SMALL, **{name: value})


@pytest.mark.parametrize("name", VOCABULARIES)
def test_config_refuses_negative_vocabularies(name):
    """Zero tokens means real values; fewer is refused."""
    with pytest.raises(ValueError, match=f"{name} is -1, expected at least 0"):
        dataclasses.replace(SMALL, **{name: -1})


@pytest.mark.parametrize("name", [*SIZES, *OPTIONAL_SIZES, *VOCABULARIES])
@pytest.mark.parametrize("value", [2.0, "2", True])
def test_config_refuses_sizes_that_are_no_integers(name, value):
    """A size that is no integer is refused by name, a boolean among them."""
    with pytest.raises(TypeError, match=f"{name} is {value!r}, expected an integer"):
        dataclasses.replace(SMALL, **{name: value})


@pytest.mark.parametrize("name", [*SIZES, *VOCABULARIES])
def test_config_refuses_absent_sizes(name):
    """Only what has a default of None may be None."""
    with pytest.raises(TypeError, match=f"{name} is None, expected an integer"):
        dataclasses.replace(SMALL, **{name: None})


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan])
def test_config_refuses_dropout_that_is_no_probability(value):
    """Dropout lies from 0 to below 1: at 1 nothing would be learned."""
    with pytest.raises(ValueError, match=f"dropout is {value}, expected a probability of at least 0 and below 1"):
        dataclasses.replace(SMALL, dropout=value)


@pytest.mark.parametrize("value", ["0.5", None])
def test_config_refuses_dropout_that_is_no_number(value):
    """Dropout of another type is refused by name, not by a failing comparison."""
    with pytest.raises(TypeError, match=f"dropout is {value!r}, expected"):
        dataclasses.replace(SMALL, dropout=value)


@pytest.mark.parametrize("value", ["no", 2, None])
def test_config_refuses_bidirectional_that_is_no_boolean(value):
    """A word that happens to be true is refused by name."""
    with pytest.raises(TypeError, match=f"bidirectional is {value!r}, expected"):
        dataclasses.replace(SMALL, bidirectional=value)


def test_config_refuses_more_decoder_than_encoder_layers():
    """Each decoder layer starts from an encoder layer's state, so there can be no more of them."""
    with pytest.raises(ValueError, match=r"decoder_layers is 3 but the encoder has 2.*at most as many"):
        Seq2SeqConfig(3, 4, 2, num_layers=2, decoder_layers=3)


X = torch.zeros(2, 3, 3)
WORDS = torch.zeros(2, 3, dtype=torch.int64)
#: What the model is built for, what it is given, and what it must say.
REFUSED = {
    "source of two dimensions": (SMALL, {"source": X[0]}, ValueError, r"source has 2 .*\(batch, steps, 3\)"),
    "target of four dimensions": (SMALL, {"target": X[None]}, ValueError, r"target has 4 .*\(batch, steps, 3\)"),
    "source features": (SMALL, {"source": X[..., :2]}, ValueError, "source has 2 features, expected 3"),
    "target features": (SMALL, {"target": X[..., :1]}, ValueError, "target has 1 features, expected 3"),
    "source of integers": (SMALL, {"source": X.long()}, TypeError, "source has dtype .*, expected a floating-point"),
    "target of complex": (SMALL, {"target": X.cfloat()}, TypeError, "target has dtype .*, expected a floating-point"),
    "no sequences": (SMALL, {"source": X[:0]}, ValueError, "source is empty, expected at least one sequence"),
    "no steps": (SMALL, {"target": X[:, :0]}, ValueError, "target is empty, .*at least one step"),
    "batches differ": (SMALL, {"target": X[:1]}, ValueError, "source has batch 2 but target has 1"),
    "tokens of three dimensions": (TOKENS, {"source": X.long()}, ValueError, r"source has 3 .*\(batch, steps\) tokens"),
    "tokens of one dimension": (TOKENS, {"target": WORDS[0]}, ValueError, r"target has 1 .*\(batch, steps\) tokens"),
    "tokens that are floats": (TOKENS, {"source": WORDS.float()}, TypeError, "source has dtype .*, expected int64"),
    "tokens of int32": (TOKENS, {"target": WORDS.int()}, TypeError, "target has dtype .*, expected int64"),
    "no tokens": (TOKENS, {"source": WORDS[:, :0]}, ValueError, "source is empty"),
} | {
    f"{name}, {what}": (SMALL, {name: lengths}, kind, f"{name} {message}")
    for name, (what, lengths, kind, message) in itertools.product(
        ("source_lengths", "target_lengths"),
        (
            ("one for two", torch.tensor([3]), ValueError, r"must have one length per sequence, .*= \(2,\)"),
            ("a table", torch.tensor([[3], [3]]), ValueError, r"must have one length per sequence, .*= \(2,\)"),
            ("a number", torch.tensor(3), ValueError, r"must have one length per sequence, .*= \(2,\)"),
            ("int32", torch.tensor([3, 3]).int(), TypeError, "has dtype .*, expected int64"),
            ("floats", torch.tensor([3.0, 3.0]), TypeError, "has dtype .*, expected int64"),
            ("zero", torch.tensor([3, 0]), ValueError, "must lie between 1 and the 3 steps"),
            ("too long", torch.tensor([4, 3]), ValueError, "must lie between 1 and the 3 steps"),
            ("elsewhere", torch.tensor([3, 3], device="meta"), ValueError, "must be on the CPU"),
        ),
    )
}


@BOTH
@pytest.mark.parametrize(("config", "changed", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_forward_refuses(lstm, config, changed, kind, message):
    """A wrong input is refused by name, with what it is and what was expected."""
    right = WORDS if config is TOKENS else X
    model = Seq2Seq(config, lstm)
    model(right, right)
    with pytest.raises(kind, match=message):
        model(**{"source": right, "target": right} | changed)


@given(batch=st.integers(1, 4), steps=st.integers(1, 5), features=st.integers(1, 3), seed=SEEDS, data=st.data())
def test_loss_of_values_is_the_mean_over_valid_steps(batch, steps, features, seed, data):
    """For real values the loss is the squared error's mean over what is inside the sequences."""
    torch.manual_seed(seed)
    outputs, expected = torch.randn(2, batch, steps, features, dtype=torch.float64).unbind()
    lengths = data.draw(st.tuples(*[st.integers(1, steps)] * batch))
    errors = [
        (float(outputs[row, step, feature]) - float(expected[row, step, feature])) ** 2
        for row, length in enumerate(lengths)
        for step in range(length)
        for feature in range(features)
    ]
    found = loss_of(outputs, expected, torch.tensor(lengths))
    assert float(found) == pytest.approx(math.fsum(errors) / len(errors), rel=1e-12)
    full = torch.full((batch,), steps)
    torch.testing.assert_close(loss_of(outputs, expected), loss_of(outputs, expected, full), **CLOSE)


@given(batch=st.integers(1, 4), steps=st.integers(1, 5), words=st.integers(1, 5), seed=SEEDS, data=st.data())
def test_loss_of_tokens_is_the_mean_over_valid_steps(batch, steps, words, seed, data):
    """For tokens the loss is the mean of -log of the probability given to the right one, padding left out."""
    torch.manual_seed(seed)
    outputs = torch.randn(batch, steps, words, dtype=torch.float64)
    expected = torch.randint(words, (batch, steps))
    lengths = data.draw(st.tuples(*[st.integers(1, steps)] * batch))
    expected[past(lengths, steps)] = IGNORE_TOKEN
    errors = []
    for row, length in enumerate(lengths):
        for step in range(length):
            powers = [math.exp(float(value)) for value in outputs[row, step]]
            errors.append(-math.log(powers[int(expected[row, step])] / math.fsum(powers)))
    wanted = pytest.approx(math.fsum(errors) / len(errors), rel=1e-9, abs=1e-12)
    assert float(loss_of(outputs, expected)) == wanted
    assert float(loss_of(outputs, expected, torch.tensor(lengths))) == wanted


@pytest.mark.parametrize("where", ["outputs", "expected"])
@pytest.mark.parametrize("filler", [1e30, math.inf, math.nan])
def test_loss_of_values_ignores_padding(where, filler):
    """Values past the end change neither the loss nor its gradient, not even if they are NaN."""
    torch.manual_seed(0)
    lengths, found = (4, 1, 2), []
    clean = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    for value in (0.0, filler):
        outputs, expected = clean.clone().unbind()
        (outputs if where == "outputs" else expected)[past(lengths, 4)] = value
        outputs.requires_grad_()
        loss = loss_of(outputs, expected, torch.tensor(lengths))
        found.append((loss, *torch.autograd.grad(loss, outputs)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not found[1][1][past(lengths, 4)].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["values", "tokens"])
def test_loss_is_taken_in_full_precision(dtype, kind):
    """Neither the loss nor what outputs are compared with is rounded to the outputs' low precision."""
    outputs = torch.zeros(1, 200, 3, dtype=dtype)
    if kind == "values":
        loss, exact = loss_of(outputs, torch.full((1, 200, 3), 1 / 3)), 1 / 9
    else:
        loss, exact = loss_of(outputs, torch.ones(1, 200, dtype=torch.int64)), math.log(3)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("config", [SMALL, EVERYTHING], ids=["small", "everything"])
def test_torchscript_computes_the_same(config, with_lengths):
    """The scripted model gives the model's own results in all its methods."""
    lengths = ((4, 1, 3), (2, 4, 1)) if with_lengths else (None, None)
    problem = Problem(config, 3, 4, 4, *lengths, seed=0)
    model, batch = model_of(problem), problem.make_batch()
    scripted = torch.jit.script(model)
    arguments = batch.source, batch.target, batch.source_lengths, batch.target_lengths
    torch.testing.assert_close(scripted.run(*arguments), model.run(*arguments), **CLOSE)
    torch.testing.assert_close(scripted(*arguments), model(*arguments), **CLOSE)
    state = model.encode(batch.source, batch.source_lengths)
    torch.testing.assert_close(scripted.encode(batch.source, batch.source_lengths), state, **CLOSE)
    torch.testing.assert_close(scripted.step(batch.target[:, 0], state), model.step(batch.target[:, 0], state), **CLOSE)
    decoded = model.decode(batch.target, state, batch.target_lengths)
    torch.testing.assert_close(scripted.decode(batch.target, state, batch.target_lengths), decoded, **CLOSE)


def test_torchscript_refuses_as_the_model_does():
    """A scripted model says the same of a wrong input."""
    scripted = torch.jit.script(Seq2Seq(SMALL))
    with pytest.raises(torch.jit.Error, match="source has 2 features, expected 3"):
        scripted(X[..., :2])
    with pytest.raises(torch.jit.Error, match="source_lengths must lie between 1 and the 3 steps"):
        scripted(X, None, torch.tensor([4, 1]))


def gradients_of(model: Seq2Seq, run: object, problem: Problem) -> tuple[Tensor, ...]:
    """Results of `run` and the gradients of all of the model's weights."""
    batch = problem.make_batch(torch.float32)
    model.zero_grad()
    result = run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    loss_of(result[0], batch.expected, batch.target_lengths).backward()
    return (*result, *(parameter.grad.clone() for parameter in model.parameters()))


@pytest.mark.parametrize("lengths", [(None, None), ((3, 1), (1, 2))], ids=["full", "lengths"])
def test_traced_loop_computes_the_same(lengths):
    """torch.compile takes `run` on the loop whole and gives its results and gradients, with and without lengths.

    As it was captured; code that Inductor generates for it is held against float64 in `test_gate_audit.py`.
    """
    problem = Problem(EVERYTHING, 2, 3, 2, *lengths, seed=0)
    model = model_of(problem, LoopLSTM).float()
    torch._dynamo.reset()
    compiled = torch.compile(model.run, backend="eager", fullgraph=True)
    found, expected = gradients_of(model, compiled, problem), gradients_of(model, model.run, problem)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
