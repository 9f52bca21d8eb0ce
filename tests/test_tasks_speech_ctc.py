"""The speech task for a model without a decoder: its batches, what it leaves out, and what is heard by CTC."""

from __future__ import annotations

import itertools

import pytest
import torch
from speech_corpora import write_corpus
from test_tasks_speech import pairs
from torch import nn

from seq2seq.cli.main import main
from seq2seq.data.tokens import END, PAD
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.models.ctc import CTCModel
from seq2seq.tasks import speech
from seq2seq.tasks.task import suited


@pytest.fixture(scope="module")
def task():
    """The made-up language, 60 utterances."""
    return speech.load(count=60, longest=12)


@pytest.fixture
def folder(tmp_path):
    """A corpus of three recordings."""
    write_corpus(tmp_path / "corpus", 3, seed=0, longest=6)
    return tmp_path / "corpus"


def test_ctc_batches_have_the_transcripts_alone(task):
    """No target and no END: labels of a row are its recording's tokens, in the batches that other models train on."""
    ctc = suited(task, task.model_config("ctc"))
    for batch, other in zip(ctc.batches("train", 7, 0, 0), task.batches("train", 7, 0, 0), strict=True):
        assert batch.target is None
        assert batch.target_lengths is None
        assert torch.equal(batch.source, other.source)
        assert torch.equal(batch.decoded_lengths, other.source_lengths)
        for row in range(batch.size):
            tokens = [token for token in batch.expected[row].tolist() if token != IGNORE_TOKEN]
            assert [*tokens, END] == [token for token in other.expected[row].tolist() if token != IGNORE_TOKEN]


def test_only_a_model_without_a_decoder_gets_labels(task):
    """The task stays as it is for all others, and is suited once."""
    assert suited(task, task.model_config("attention")) is task
    ctc = suited(task, task.model_config("ctc"))
    assert suited(ctc, task.model_config("ctc")) is ctc


def test_recordings_too_short_for_ctc_are_left_out_and_counted():
    """They are not trained on, the notes say how many, and they are scored like any other."""
    # Texts of 6 and 7 letters in 3 to 10 steps; "text 11" needs a blank between its last two.
    task = speech._task(pairs(), 3, "")
    ctc = suited(task, task.model_config("ctc"))
    everything = [example for examples in task.examples.values() for example in examples]
    long = sum(
        len(example.tokens) + sum(a == b for a, b in itertools.pairwise(example.tokens)) <= len(example.steps)
        for example in everything
    )
    assert 0 < long < len(everything)
    short = len(everything) - long
    assert ctc.notes[-1].startswith(f"{short} recordings have fewer steps than CTC needs for their transcripts")
    assert sum(batch.size for split in task.examples for batch in ctc.batches(split, 4, 0, 0)) == long
    assert ctc.examples == task.examples


class Hears(CTCModel):
    """Says the texts that it is given, whatever it hears, one label a step and blanks between; rows by length."""

    def __init__(self, task, texts):
        super().__init__(task.model_config("ctc"))
        self.task, self.texts = task, texts

    def run(self, source, target=None, source_lengths=None, target_lengths=None):
        """Scores that leave no doubt."""
        del target, target_lengths
        spread = torch.full(source.shape[:2], PAD)
        for row, text in enumerate(self.texts):
            tokens = [value for token in self.task.encode(text) for value in (token, PAD)]
            if len(tokens) > int(source_lengths[row]):
                tokens = list(self.task.encode(text))
            spread[row, : len(tokens)] = torch.tensor(tokens)
        return 50 * nn.functional.one_hot(spread, self.task.vocabulary).float(), spread, spread


def test_what_a_ctc_model_hears_is_scored(task):
    """A model that is sure of what was said has no errors, one that misses a word has one."""
    said = [example.text for example in task.examples["validation"]]
    assert task.evaluate(Hears(task, said), len(said), "cpu") == {"WER": 0, "CER": 0}
    words = sum(len(text.split()) for text in said)
    wrong = ["a" if said[0] != "a" else "b", *said[1:]]
    scores = task.evaluate(Hears(task, wrong), len(said), "cpu")
    assert scores["WER"] == pytest.approx(len(said[0].split()) / words)


def test_ctc_trains_and_transcribes_from_the_command_line(folder, tmp_path, capsys):
    """A run of a few steps leaves a checkpoint that writes down WAV files, greedily and by beam search."""
    run, lines = tmp_path / "run", tmp_path / "lines.txt"
    options = ["--model", "ctc", "--steps", "2", "--batch", "2", "--threads", "1"]
    assert main(["train", "speech", "--data", str(folder), "--out", str(run), *options]) == 0
    assert "ctc of" in capsys.readouterr().out
    paths = sorted(folder.glob("*.wav"))
    lines.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    for beam in ("1", "4"):
        assert main(["translate", str(run), "--data", str(lines), "--beam", beam]) == 0
        assert len(capsys.readouterr().out.splitlines()) == len(paths)


def test_ctc_is_refused_where_nothing_is_spoken(capsys, tmp_path):
    """A task whose sources are no longer than what is said of them has no such model."""
    assert main(["train", "forecasting", "--model", "ctc", "--out", str(tmp_path / "run")]) == 2
    assert "forecasting has models lstm, attention, gnmt, transformer" in capsys.readouterr().err


def test_ctc_learns_the_language():
    """A few steps on short utterances lower the loss well below that of guessing, and most characters are heard."""
    task = speech.load(count=200, longest=3)
    config = task.model_config("ctc")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(12):
        for batch in suited(task, config).batches("train", 30, 0, epoch):
            optimizer.zero_grad()
            loss = model.loss(model(batch.source, None, batch.source_lengths), batch.expected, batch.source_lengths)
            loss.backward()
            optimizer.step()
    assert task.evaluate(model, 20, "cpu")["CER"] < 0.5
