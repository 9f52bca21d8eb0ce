"""Translation: scores that know right from wrong, baselines, sizes of models, and a user's file."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from seq2seq.data.errors import DataUnavailableError
from seq2seq.tasks import translation
from seq2seq.tasks.task import DECODERS

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")
from memory_model import MemoryModel


@pytest.fixture(scope="module", params=["de", "fr"])
def catalogues(request):
    """The task on Django's catalogues."""
    pytest.importorskip("django")
    return translation.load(language=request.param)


def test_right_translations_score_full(catalogues):
    """A model that knows all uncut validation pairs by heart scores 100 in both, with next to no loss."""
    whole = [example for example in catalogues.examples["validation"] if example.lengths < (64, 64)]
    catalogues.examples["validation"], before = whole, catalogues.examples["validation"]
    known = {tuple(one.source_tokens): one.target_tokens for one in whole}
    # Of a source with several translations the model knows one.
    catalogues.examples["validation"] = [one for one in whole if known[tuple(one.source_tokens)] == one.target_tokens]
    try:
        scores = catalogues.evaluate(MemoryModel(list(known.items()), catalogues.subwords.size), 16, "cpu")
    finally:
        catalogues.examples["validation"] = before
    assert scores["BLEU"] == pytest.approx(100)
    assert scores["chrF"] == pytest.approx(100)
    assert scores["loss"] < 1e-6


def test_wrong_translations_score_below_the_source(catalogues):
    """A model that answers each source with the translation of another scores worse than copying the source."""
    examples = catalogues.examples["validation"]
    shifted = [
        (one.source_tokens, other.target_tokens)
        for one, other in zip(examples, examples[20:] + examples[:20], strict=True)
    ]
    scores = catalogues.evaluate(MemoryModel(shifted, catalogues.subwords.size), 16, "cpu")
    assert 0 < scores["BLEU of the source copied"] < 60
    assert scores["BLEU"] < 0.5 * scores["BLEU of the source copied"]
    assert scores["chrF"] < 0.5 * scores["chrF of the source copied"]
    assert scores["loss"] > 10


def test_a_tenth_of_the_sources_is_held_back(catalogues):
    """Hundreds of pairs to train on; no validation source among their sources."""
    train, validation = ({one.source for one in catalogues.examples[split]} for split in ("train", "validation"))
    assert not train & validation
    assert len(validation) == round(0.1 * (len(train) + len(validation)))
    assert len(train) > 600
    assert catalogues.subwords.size == 2000
    assert catalogues.notes[0].startswith("English-")


@pytest.mark.parametrize("model", DECODERS)
@pytest.mark.parametrize("size", translation.SIZES)
def test_models_fit_the_vocabulary(catalogues, model, size):
    """Every family reads and writes the vocabulary's tokens."""
    config = catalogues.model_config(model, size)
    assert config.family == model
    assert config.source_vocabulary == config.target_vocabulary == config.output_size == catalogues.subwords.size


@pytest.mark.parametrize("catalogues", ["de"], indirect=True)
@pytest.mark.parametrize("name", DECODERS)
def test_models_begin_by_guessing_and_learn(catalogues, name):
    """The loss on a batch is that of guessing at first, and falls; what is decoded is text, whatever the family."""
    torch.manual_seed(0)
    batch = next(catalogues.batches("train", 8, 0, 0))
    model = catalogues.model_config(name, "small").build(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        outputs = model(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        loss = model.loss(outputs, batch.expected, batch.target_lengths)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.8 * math.log(catalogues.subwords.size) < losses[0] < 1.3 * math.log(catalogues.subwords.size)
    assert losses[-1] < 0.9 * losses[0]
    assert len(catalogues.predict(model, ["Monday", "Delete %(name)s?"], 2)) == 2


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("gru", "small", "model is 'gru', expected one of lstm, attention, gnmt, transformer"),
        ("lstm", "huge", "size is 'huge', expected one of small, full"),
    ],
)
def test_unknown_models_and_sizes_are_refused(catalogues, model, size, message):
    with pytest.raises(ValueError, match=message):
        catalogues.model_config(model, size)


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language is 'xx', expected one of de, fr"):
        translation.load(language="xx")


def test_missing_package_says_what_to_install(catalogues, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(DataUnavailableError, match="sacrebleu, which is not installed: pip install sacrebleu"):
        catalogues.score(["a"], ["a"])
