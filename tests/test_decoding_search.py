"""Decoding: what is searched is found, whatever is in the batch beside it, and limits hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from kernels.reference import LoopLSTM
from seq2seq.data.tokens import BEGIN, END, PAD
from seq2seq.decoding import search as decode
from seq2seq.decoding.beams import length_penalty
from seq2seq.decoding.search import beam_search, forecast, greedy
from seq2seq.execution.cell_lstm import CellLSTM
from seq2seq.layers.likelihoods import central, distribution
from seq2seq.models.attention import AttentionConfig
from seq2seq.models.base import Model, select
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.transformer import TransformerConfig

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

#: As few tokens as there are special ones, so that every hypothesis can be tried.
TOKENS = {"source_vocabulary": 6, "target_vocabulary": 4}
#: One of every family that reads tokens.
TOKEN_MODELS = {
    "lstm": Seq2SeqConfig(3, 5, 4, **TOKENS),
    "lstm, deep": Seq2SeqConfig(3, 4, 4, num_layers=2, bidirectional=True, decoder_layers=1, **TOKENS),
    "attention": AttentionConfig(3, 4, 4, **TOKENS),
    "gnmt": GNMTConfig(3, 4, 4, num_layers=3, **TOKENS),
    "transformer": TransformerConfig(4, 4, num_layers=1, heads=2, feedforward=5, **TOKENS),
}
#: Values: one number with two known features beside it, as a value, as a distribution, and two numbers.
VALUE_MODELS = {
    "value": Seq2SeqConfig(3, 5, 1),
    "gaussian": Seq2SeqConfig(3, 5, 1, likelihood="gaussian"),
    "student": Seq2SeqConfig(3, 5, 2, likelihood="student"),
    "quantile": Seq2SeqConfig(3, 5, 2, likelihood="quantile"),
}
FAMILIES = pytest.mark.parametrize("family", TOKEN_MODELS)


def model_of(config, seed: int, lstm=LoopLSTM, scale: float = 3.0) -> Model:
    """In float64 with weights large enough that tokens differ in probability and states matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.build(lstm).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(scale / 3 * torch.randn_like(parameter))
        return model


def sources(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, (batch, 5), generator=generator), torch.randint(1, 6, (batch,), generator=generator)


def same(left, right) -> bool:
    """Equal tokens, and scores equal but for rounding."""
    return left.lists() == right.lists() and torch.allclose(left.scores, right.scores, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def score_of(model: Model, source: Tensor, length: int, tokens: tuple[int, ...]) -> float:
    """Log-probability of a whole hypothesis of one source, with teacher forcing and no step."""
    fed = torch.tensor([[BEGIN, *tokens[:-1]]])
    outputs = model.run(source[None, :length], fed)[0]
    return float(outputs.log_softmax(-1)[0, torch.arange(len(tokens)), torch.tensor(tokens)].sum())


def best_of_all(model: Model, source: Tensor, length: int, steps: int, alpha: float) -> tuple[list[int], float]:
    """Try every hypothesis: its tokens without the end, and its log-probability."""
    words = [token for token in range(4) if token != END]
    ended = [(*words_, END) for n in range(steps) for words_ in itertools.product(words, repeat=n)]
    scored = {tokens: score_of(model, source, length, tokens) for tokens in ended}
    best = max(ended, key=lambda tokens: scored[tokens] / length_penalty(len(tokens), alpha))
    return list(best[:-1]), scored[best]


def exhaustive_agrees(config, seed: int, alpha: float) -> bool:
    """Return whether a beam wide enough for everything finds the best of everything, for each of three sequences."""
    model = model_of(config, seed)
    source, lengths = sources(3, seed)
    found = beam_search(model, source, lengths, beam=40, length_penalty=alpha, max_steps=3)
    for row in range(3):
        tokens, score = best_of_all(model, source[row], int(lengths[row]), 3, alpha)
        if found.lists()[row] != tokens or abs(float(found.scores[row]) - score) > 1e-9:
            return False
    return True


@FAMILIES
@settings(max_examples=6)
@given(seed=SEEDS, alpha=st.sampled_from([0.0, 0.6, 2.0]))
def test_a_beam_that_holds_everything_finds_the_best_of_everything(family, seed, alpha):
    """Every hypothesis of up to three tokens, scored by teacher forcing one by one, with and without length penalty."""
    assert exhaustive_agrees(TOKEN_MODELS[family], seed, alpha)


@FAMILIES
@pytest.mark.parametrize("defect", ["not reordered", "stale", "reversed"])
def test_a_planted_defect_in_the_state_is_found_by_trying_everything(monkeypatch, family, defect):
    """States left at the places of other hypotheses, or at those of the first ones."""

    def broken(state, index):
        if defect == "not reordered":
            return select(state, torch.arange(index.size(0)) % next(iter(state.values())).size(1))
        return select(state, torch.zeros_like(index) if defect == "stale" else index.flip(0))

    monkeypatch.setattr(decode, "select", broken)
    assert not all(exhaustive_agrees(TOKEN_MODELS[family], seed, 0.6) for seed in range(16))


@FAMILIES
@given(seed=SEEDS, batch=st.integers(1, 5), alpha=st.sampled_from([0.0, 1.0]))
def test_a_beam_of_one_is_greedy(family, seed, batch, alpha):
    """Tokens, lengths and scores."""
    model, (source, lengths) = model_of(TOKEN_MODELS[family], seed), sources(batch, seed)
    assert same(
        beam_search(model, source, lengths, beam=1, length_penalty=alpha, max_steps=6),
        greedy(model, source, lengths, max_steps=6),
    )


WAYS = {
    "greedy": greedy,
    "beam": lambda *given_, **options: beam_search(*given_, beam=3, length_penalty=0.8, **options),
}


@FAMILIES
@pytest.mark.parametrize("way", ["greedy", "beam"])
@settings(max_examples=8)
@given(seed=SEEDS, batch=st.integers(2, 5))
def test_a_batch_gives_what_its_sequences_give_one_by_one(family, way, seed, batch):
    """Whatever ends when, and however long the sources are."""
    model, (source, lengths) = model_of(TOKEN_MODELS[family], seed), sources(batch, seed)
    together = WAYS[way](model, source, lengths, max_steps=7, max_ratio=2.0)
    for row in range(batch):
        length = int(lengths[row])
        alone = WAYS[way](model, source[row : row + 1, :length], max_steps=7, max_ratio=2.0)
        assert together.lists()[row] == alone.lists()[0]
        assert float(together.scores[row]) == pytest.approx(float(alone.scores[0]), rel=1e-9)


@FAMILIES
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8)
@given(seed=SEEDS, batch=st.integers(1, 5))
def test_dropping_what_is_finished_changes_nothing(family, way, seed, batch):
    """The same tokens and scores with all rows kept to the end."""
    model, (source, lengths) = model_of(TOKEN_MODELS[family], seed), sources(batch, seed)
    kept = WAYS[way](model, source, lengths, max_steps=7, max_ratio=2.5, drop=False)
    assert same(WAYS[way](model, source, lengths, max_steps=7, max_ratio=2.5), kept)


@FAMILIES
@pytest.mark.parametrize("lstm", [LoopLSTM, CellLSTM, nn.LSTM])
@torch.no_grad()
def test_a_step_leaves_its_state_alone_and_gives_what_teacher_forcing_gives(family, lstm):
    """Also where the LSTM has a step of its own, which works in place."""
    config = TOKEN_MODELS[family]
    model = config.build(lstm).double().eval()
    model.load_state_dict(model_of(config, 5).state_dict())
    source, lengths = sources(3, 5)
    fed = torch.randint(4, (3, 4), generator=torch.Generator().manual_seed(5))
    state, found = model.encode(source, lengths), []
    for step in range(4):
        before = {name: value.clone() for name, value in state.items()}
        outputs, after = model.step(fed[:, step], state)
        assert all(torch.equal(state[name], value) for name, value in before.items())
        state = after
        found.append(outputs)
    assert torch.allclose(torch.stack(found, 1), model.run(source, fed, lengths)[0], rtol=1e-9, atol=1e-11)


class Counted:
    """A model that counts the rows of its steps."""

    def __init__(self, model: Model) -> None:
        self.config, self.encode, self.model, self.rows = model.config, model.encode, model, []

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's own step."""
        self.rows.append(value.size(0))
        return self.model.step(value, state)


@pytest.mark.parametrize("way", WAYS)
def test_finished_sequences_leave_the_batch(way):
    """Each step has no more rows than hypotheses that live, and the last ones fewer than the first."""
    source, lengths = torch.zeros(4, 8, dtype=torch.int64), torch.tensor([1, 2, 4, 8])
    counted = Counted(model_of(TOKEN_MODELS["lstm"], 0))
    WAYS[way](counted, source, lengths, end=None, max_ratio=1.0)
    beam = 3 if way == "beam" else 1
    assert counted.rows == [4, 3 * beam, 2 * beam, 2 * beam, beam, beam, beam, beam]


@FAMILIES
@pytest.mark.parametrize("way", WAYS)
@given(seed=SEEDS, limit=st.integers(1, 5), ratio=st.sampled_from([None, 0.4, 1.0, 1.5]))
@settings(max_examples=10)
def test_limits_hold_and_nothing_follows_an_end(family, way, seed, limit, ratio):
    """The fewer of both limits, rounded up; past the end there is padding alone."""
    model, (source, lengths) = model_of(TOKEN_MODELS[family], seed), sources(4, seed)
    found = WAYS[way](model, source, lengths, max_steps=limit, max_ratio=ratio)
    most = [min(limit, math.ceil(ratio * n)) if ratio else limit for n in lengths.tolist()]
    for tokens, length, bound in zip(found.tokens.tolist(), found.lengths.tolist(), most, strict=True):
        assert 1 <= length <= bound
        assert END not in tokens[: length - 1]
        assert length == bound or tokens[length - 1] == END
        assert set(tokens[length:]) <= {PAD}


@FAMILIES
@pytest.mark.parametrize("way", WAYS)
def test_without_an_end_every_sequence_fills_its_limit(family, way):
    """The end token is one like any other."""
    model, (source, lengths) = model_of(TOKEN_MODELS[family], 3), sources(4, 3)
    found = WAYS[way](model, source, lengths, end=None, max_steps=9)
    assert found.tokens.shape == (4, 9)
    assert found.lengths.tolist() == [9] * 4
    for row in range(4):
        tokens = tuple(found.tokens[row].tolist())
        expected = score_of(model, source[row], int(lengths[row]), tokens)
        assert float(found.scores[row]) == pytest.approx(expected, rel=1e-9)


@given(seed=SEEDS)
@settings(max_examples=10)
def test_a_wider_beam_without_penalty_is_never_worse_when_it_holds_everything(seed):
    """Nothing beats the beam that holds all hypotheses."""
    model, (source, lengths) = model_of(TOKEN_MODELS["lstm"], seed), sources(3, seed)
    everything = beam_search(model, source, lengths, beam=27, end=None, max_steps=3)
    narrow = beam_search(model, source, lengths, beam=2, end=None, max_steps=3)
    assert bool((everything.scores >= narrow.scores - 1e-12).all())


def test_a_length_penalty_makes_hypotheses_longer():
    """Never shorter, and longer somewhere; by Wu et al.'s equation."""
    assert length_penalty(1, 0.7) == 1.0
    assert length_penalty(7, 1.0) == 2.0
    lengths = []
    for alpha in (0.0, 3.0):
        found = [beam_search(model_of(TOKEN_MODELS["lstm"], seed, scale=1.0), *sources(4, seed), beam=60,
                             length_penalty=alpha, max_steps=4).lengths for seed in range(5)]  # fmt: skip
        lengths.append(torch.cat(found))
    assert bool((lengths[1] >= lengths[0]).all())
    assert int(lengths[1].sum()) > int(lengths[0].sum())


def test_what_ended_wins_against_what_was_cut_off():
    """A hypothesis that met the limit counts only where none ended."""

    class Fixed(nn.Module):
        """Gives the end a tenth at every step, the rest to one word."""

        config = TOKEN_MODELS["lstm"]

        def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
            """Nothing."""
            del lengths
            return {"none": torch.zeros(1, source.size(0), 1)}

        def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            """The same distribution."""
            return torch.tensor([0.0, 0.9, 0.0, 0.1]).log().expand(value.size(0), 4), state

    found = beam_search(Fixed(), torch.zeros(2, 1, dtype=torch.int64), beam=2, max_steps=2)
    assert found.lists() == [[], []]
    assert torch.allclose(found.scores.exp(), torch.tensor(0.1, dtype=torch.float64))
    cut = beam_search(Fixed(), torch.zeros(2, 1, dtype=torch.int64), beam=1, max_steps=2)
    assert cut.lists() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (greedy, "decoding has no limit"),
        (lambda model, source: greedy(model, source, max_steps=0), "max_steps is 0"),
        (lambda model, source: greedy(model, source, max_ratio=0.0), "max_ratio 0.0"),
        (lambda model, source: beam_search(model, source, max_steps=1, beam=0), "beam is 0"),
        (lambda model, source: beam_search(model, source, max_steps=1, beam=2, length_penalty=-1.0), "penalty -1.0"),
        (lambda model, source: forecast(model, source, torch.zeros(2, 3, 1)), "target has shape"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
    """Before anything is computed."""
    with pytest.raises(ValueError, match=words):
        call(model_of(TOKEN_MODELS["lstm"], 0), sources(2, 0)[0])


@torch.no_grad()
def by_hand(model: Model, source: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """Each step with teacher forcing on all the values so far, from the start."""
    size, likelihood = model.config.output_size, model.config.likelihood
    fed = target.clone()
    for step in range(target.size(1)):
        outputs = model.run(source, fed[:, : step + 1], lengths)[0]
        own = central(likelihood, outputs)
        if step + 1 < target.size(1):
            fed[:, step + 1, :size] = own[:, step]
    return own


@pytest.mark.parametrize("family", VALUE_MODELS)
@settings(max_examples=8)
@given(seed=SEEDS, batch=st.integers(1, 4), steps=st.integers(1, 5))
def test_a_forecast_feeds_on_itself(family, seed, batch, steps):
    """Equal to teacher forcing on its own values, whatever stands in their place in the target."""
    config = VALUE_MODELS[family]
    model, generator = model_of(config, seed, scale=1.0), torch.Generator().manual_seed(seed)
    source = torch.randn(batch, 4, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, steps, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 5, (batch,), generator=generator)
    found = forecast(model, source, target, lengths)
    assert torch.allclose(found, by_hand(model, source, target, lengths), rtol=1e-9, atol=1e-11)
    target[:, 1:, : config.output_size] = math.nan
    assert torch.equal(forecast(model, source, target, lengths), found)


@pytest.mark.parametrize("family", ["gaussian", "student"])
def test_sampled_paths_start_from_the_first_step_s_distribution(family):
    """Mean and deviation of 20,000 draws of the first step, and reproducible by their generator."""
    model = model_of(VALUE_MODELS[family], 7, scale=1.0)
    size = model.config.output_size
    source, target = torch.ones(1, 3, 3, dtype=torch.float64), torch.ones(1, 2, 3, dtype=torch.float64)

    def drawn(seed: int) -> Tensor:
        return forecast(model, source, target, samples=20_000, generator=torch.Generator().manual_seed(seed))

    paths = drawn(0)
    assert paths.shape == (20_000, 1, 2, size)
    with torch.no_grad():
        outputs = model.step(target[:, 0], model.encode(source))[0]
    expected = distribution(family, outputs)
    first = paths[:, 0, 0]
    deviation = expected.stddev[0]
    assert bool(((first.mean(0) - expected.mean[0]).abs() <= 5 * deviation / 20_000**0.5).all())
    # Quantiles, since a Student's fourth moment need not be finite: half of the draws lie inside the middle half.
    inner = (first - expected.mean[0]).abs().median(0).values
    many = expected.sample((20_000,))[:, 0]
    assert torch.allclose(inner, (many - expected.mean[0]).abs().median(0).values, rtol=0.06)
    assert torch.equal(paths, drawn(0))
    assert not torch.equal(paths, drawn(1))


def test_every_sampled_path_goes_on_from_its_own_value():
    """Paths that differ in the first value differ in the second's mean as the model says."""
    model = model_of(VALUE_MODELS["gaussian"], 3, scale=1.0)
    source, target = torch.ones(2, 3, 3, dtype=torch.float64), torch.ones(2, 3, 3, dtype=torch.float64)
    paths = forecast(model, source, target, samples=4, generator=torch.Generator().manual_seed(0))

    # The same noise, so what is left is the mean that each path itself gave.
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(8, 1, dtype=torch.float64, generator=generator) for _ in range(3)])
    for number in range(4):
        with torch.no_grad():
            fed = target.clone()
            fed[:, 1:, :1] = paths[number, :, :-1]
            found = distribution("gaussian", model.run(source, fed)[0])
        own = noise.view(3, 4, 2, 1)[:, number].transpose(0, 1)
        assert torch.allclose(paths[number], found.mean + found.stddev * own, rtol=1e-9, atol=1e-11)


def test_a_model_without_a_likelihood_has_no_samples():
    """It gives values, not distributions."""
    with pytest.raises(ValueError, match="samples of a model with likelihood ''"):
        forecast(model_of(VALUE_MODELS["value"], 0), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), samples=2)
