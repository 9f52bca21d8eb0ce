"""Summarisation: ROUGE in any script, synthetic news whose summaries follow from them, a user's TSV and JSON lines."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise

import pytest

from seq2seq.data.errors import DataUnavailableError
from seq2seq.data.synthetic_news import make_news
from seq2seq.tasks import summarization
from seq2seq.tasks.task import DECODERS

pytest.importorskip("hypothesis")
pytest.importorskip("tokenizers")
pytest.importorskip("rouge_score")
from hypothesis import given
from hypothesis import strategies as st
from memory_model import MemoryModel

MARKED = re.compile(
    r"(?:Above all|Most importantly|In the main news|Of all things), on \w+ the \w+ (\w+ of \w+ \w+) the \w+ ([\w ]+\.)"
)


@pytest.fixture(scope="module")
def news():
    """Short synthetic documents."""
    return summarization.load(documents=60, sentences=6)


@given(documents=st.integers(1, 4), sentences=st.integers(1, 40), seed=st.integers(0, 99))
def test_summaries_follow_from_their_documents(documents, sentences, seed):
    """A summary is the important reports, in order, in fewer words: nobody needs to know more than the document."""
    for document, summary in make_news(documents, sentences, seed):
        assert document.count(".") == sentences
        assert summary == " ".join(" ".join(found) for found in MARKED.findall(document))
        assert summary.count(".") == max(1, sentences // 5)


def test_news_follow_their_seed():
    """Equal seeds give equal documents, others give others; no two documents of a seed are equal."""
    assert make_news(50, 5, seed=1) == make_news(50, 5, seed=1)
    assert make_news(50, 5, seed=1) != make_news(50, 5, seed=2)
    assert len(set(make_news(50, 5))) == 50


@pytest.mark.parametrize(("documents", "sentences"), [(0, 1), (1, 0)])
def test_news_of_nothing_are_refused(documents, sentences):
    with pytest.raises(ValueError, match=f"documents is {documents} and sentences {sentences}, expected at least 1"):
        make_news(documents, sentences)


def test_synthetic_documents_have_the_cited_lengths():
    """Documents fill the 400 tokens of See et al., and what their summaries tell lies within them, below 100 tokens."""
    task = summarization.load(documents=40)
    source, target = ([one.lengths[side] for part in task.examples.values() for one in part] for side in (0, 1))
    assert sum(source) / 40 > 390
    assert max(source) == 400
    assert sum(target) / 40 > 30
    assert max(target) < 100
    for part in task.examples.values():
        for one in part:
            read = task.subwords.decode(one.source_tokens)
            assert one.target == " ".join(" ".join(found) for found in MARKED.findall(read))


def test_right_summaries_score_full(news):
    """A model that knows the validation summaries by heart scores 100 and beats the lead."""
    pairs = [(one.source_tokens, one.target_tokens) for one in news.examples["validation"]]
    scores = news.evaluate(MemoryModel(pairs, news.subwords.size), 4, "cpu")
    for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert scores[name] == pytest.approx(100)
        assert 0 < scores[f"{name} of the first 3 sentences"] < 60
    assert scores["loss"] < 1e-6


def test_wrong_summaries_score_less(news):
    """Summaries of other documents score low, and none at all scores nothing."""
    examples = news.examples["validation"]
    pairs = [(one.source_tokens, other.target_tokens) for one, other in pairwise(examples)]
    scores = news.evaluate(MemoryModel(pairs, news.subwords.size), 4, "cpu")
    assert 0 < scores["ROUGE-2"] < scores["ROUGE-L"] <= scores["ROUGE-1"] < 70
    assert news.score(["", ""], ["the court of Oslo", "Kos"]) == {"ROUGE-1": 0, "ROUGE-2": 0, "ROUGE-L": 0}


def test_rouge_of_a_hand_made_case(news):
    """Two of three words are right, one pair of neighbours: F is 2 x 2/3 x 2/4 / (2/3 + 2/4), and so on."""
    scores = news.score(["the court sleeps"], ["The court of Oslo."])
    assert scores["ROUGE-1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["ROUGE-2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 * 2 / (3 + 4))


@pytest.mark.parametrize("text", ["Δήμαρχος της Αθήνας", "Bäume für Köln", "市長 開会"])
def test_rouge_knows_all_scripts(news, text):
    """A text scores 100 against itself whatever its script."""
    assert news.score([text], [text])["ROUGE-L"] == pytest.approx(100)


def test_users_files_are_read(tmp_path):
    """TSV and JSON lines of the same pairs give the same task, under whatever keys."""
    pairs = make_news(20, 3)
    tsv, jsonl = tmp_path / "news.tsv", tmp_path / "news.jsonl"
    tsv.write_text("".join(f"{document}\t{summary}\n" for document, summary in pairs), encoding="utf-8")
    jsonl.write_text("".join(json.dumps({"text": d, "title": s}) + "\n" for d, s in pairs), encoding="utf-8")
    one, other = summarization.load(tsv), summarization.load(str(jsonl), keys="text,title")
    assert one.state() == other.state()
    assert one.examples == other.examples
    assert one.examples.keys() == {"train", "validation"}


@pytest.mark.parametrize("keys", ["", "document", "document,", ",summary"])
def test_keys_that_are_not_two_are_refused(tmp_path, keys):
    with pytest.raises(ValueError, match=f"keys is '{keys}', expected two names with a comma between them"):
        summarization.load(tmp_path / "absent.jsonl", keys=keys)


@pytest.mark.parametrize("size", summarization.SIZES)
def test_models_fit_the_vocabulary(news, size):
    """A model reads and writes the vocabulary's tokens."""
    for model in DECODERS:
        config = news.model_config(model, size)
        assert config.family == model
        assert config.source_vocabulary == config.target_vocabulary == config.output_size == news.subwords.size


def test_missing_package_says_what_to_install(news, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataUnavailableError, match="rouge-score, which is not installed: pip install rouge-score"):
        news.score(["a"], ["a"])
