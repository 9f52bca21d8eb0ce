"""The speech task: a corpus read whole or refused, what is heard and said kept together, error rates by hand."""

from __future__ import annotations

import json
import sys
import unicodedata

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from speech_corpora import write_corpus
from torch import nn

from seq2seq.data import tones
from seq2seq.data.audio import BANDS, RATE
from seq2seq.data.bucketing import bucketed, padding_waste
from seq2seq.data.errors import DataError, DataUnavailableError
from seq2seq.data.speech_corpus import read_corpus
from seq2seq.data.tokens import BEGIN, END, UNKNOWN
from seq2seq.models.base import IGNORE_TOKEN, Model
from seq2seq.models.ctc import CTCConfig
from seq2seq.tasks import speech
from seq2seq.tasks.task import MODELS, suited
from seq2seq.workloads.registry import find_workload


@pytest.fixture(scope="module")
def task():
    """The made-up language, 60 utterances."""
    return speech.load(count=60, longest=12)


@pytest.fixture
def folder(tmp_path):
    """A corpus of three recordings."""
    write_corpus(tmp_path / "corpus", 3, seed=0, longest=6)
    return tmp_path / "corpus"


class Reads(Model):
    """Says the texts that it is given, whatever it hears, one character a step; rows come by length of the source."""

    def __init__(self, task, texts):
        super().__init__()
        self.config = CTCConfig(1, 1, 2)
        self.task, self.texts = task, texts

    def encode(self, source, lengths=None):
        """Which row and which character comes next."""
        del lengths
        return {"row": torch.arange(source.size(0))[None], "at": torch.zeros(1, source.size(0), dtype=torch.long)}

    def step(self, value, state):
        """The next character, then `END`."""
        del value
        tokens = [
            (*self.task.encode(self.texts[row]), END, UNKNOWN, UNKNOWN)[min(at, len(self.texts[row]) + 1)]
            for row, at in zip(state["row"][0].tolist(), state["at"][0].tolist(), strict=True)
        ]
        outputs = nn.functional.one_hot(torch.tensor(tokens), self.task.vocabulary).float()
        return outputs, {"row": state["row"], "at": state["at"] + 1}


def test_what_is_said_back_has_no_errors(task):
    """A model that says what was said has no errors, in whatever batches; one wrong word counts as one."""
    said = [example.text for example in task.examples["validation"]]
    assert task.evaluate(Reads(task, said), len(said), "cpu") == {"WER": 0, "CER": 0}
    words = sum(len(text.split()) for text in said)
    wrong = ["a" if said[0] != "a" else "b", *said[1:]]
    scores = task.evaluate(Reads(task, wrong), len(said), "cpu")
    assert scores["WER"] == pytest.approx(len(said[0].split()) / words)


def test_model_that_never_ends_is_stopped(task):
    """Decoding has a limit that follows from what training has a step."""
    model = task.model_config().build(nn.LSTM)
    with torch.no_grad():
        model.fc.bias[END] = -1e9
        model.fc.bias[speech.SPECIAL] = 1e9
    scores = task.evaluate(model, 8, "cpu")
    assert scores["CER"] > 0.5
    assert model.training


def test_batch_holds_what_is_heard_and_said(task):
    """Sources, targets and expected tokens of a row belong to one recording; what is past their ends is padding."""
    for batch in task.batches("train", 7, 0, 0):
        for row in range(batch.size):
            steps, tokens = int(batch.source_lengths[row]), int(batch.target_lengths[row])
            (example,) = (
                e for e in task.examples["train"]
                if len(e.steps) == steps and torch.equal(e.steps, batch.source[row, :steps])
            )  # fmt: skip
            assert batch.target[row, :tokens].tolist() == [BEGIN, *example.tokens]
            assert batch.expected[row, :tokens].tolist() == [*example.tokens, END]
            assert (batch.expected[row, tokens:] == IGNORE_TOKEN).all()
            assert not batch.source[row, steps:].any()


def test_an_epoch_has_each_recording_once(task):
    """Each recording comes once an epoch, in an order of seed and epoch that is the same on every run."""

    def epoch(seed, number):
        return [batch.source.sum((1, 2)).tolist() for batch in task.batches("train", 7, seed, number)]

    rows = sorted(value for batch in epoch(0, 0) for value in batch)
    assert len(rows) == len(task.examples["train"])
    assert sorted(value for batch in epoch(0, 1) for value in batch) == pytest.approx(rows, rel=1e-4, abs=1e-2)
    assert epoch(0, 0) == epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_buckets_waste_less_than_chance():
    """Batches of like length have less than half the padding of random ones."""
    lengths = [example.lengths for example in speech.load(count=300).examples["train"]]
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    chance = [order[at : at + 16] for at in range(0, len(order), 16)]
    like = bucketed(lengths, 16, 0, 0)
    assert padding_waste(lengths, like) < 0.5 * padding_waste(lengths, chance)


def test_normalisation_and_alphabet_are_those_of_training(task):
    """Frames of the training recordings have mean 0 and deviation 1 in every band, letters come from them alone."""
    steps = torch.cat([example.steps for example in task.examples["train"]]).view(-1, BANDS)
    # Stacking repeats some last frames, so not exactly.
    assert float(steps.mean(0).abs().max()) < 0.1
    assert float((steps.std(0) - 1).abs().max()) < 0.1
    assert set(task.alphabet) == {letter for e in task.examples["train"] for letter in e.text}


def pairs(count=20):
    """Frames, and texts that are all different."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(9 + place, BANDS, generator=generator), f"text {place}") for place in range(count)]


def test_no_recording_is_in_both_splits():
    """A tenth is held back; what is validated on was not learnt from, and nothing is lost."""
    task = speech._task(pairs(), 3, "")
    texts = {split: {example.text for example in examples} for split, examples in task.examples.items()}
    assert len(texts["validation"]) == 2
    assert not texts["train"] & texts["validation"]
    assert texts["train"] | texts["validation"] == {text for _, text in pairs()}


def test_validation_has_no_say_in_what_is_kept():
    """Other sounds and letters in the recordings held back change neither normalisation, alphabet nor limits."""
    given = pairs()
    task = speech._task(given, 3, "")
    held = {example.text for example in task.examples["validation"]}
    changed = [(100 + 5 * frames, "long " * 50 + "ü") if text in held else (frames, text) for frames, text in given]
    assert speech._task(changed, 3, "").state() == task.state()
    learnt = [(100 + 5 * frames, text) if text not in held else (frames, text) for frames, text in given]
    assert speech._task(learnt, 3, "").state() != task.state()


def test_text_survives_its_tokens(task):
    """Tokens lead back to the text; what training has not is unknown, and what follows END is not said."""
    assert task.decode([BEGIN, *task.encode("ab c"), END, *task.encode("d")]) == "ab c"
    assert task.encode("aäb")[1] == UNKNOWN
    assert task.decode(task.encode("aäb")) == "ab"


def test_state_survives_json(task, folder):
    """A task restored from JSON hears and says the same, and has no recordings."""
    again = speech.restore(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    model = task.model_config().build(nn.LSTM)
    paths = sorted(folder.glob("*.wav"))
    assert again.predict(model, paths, 8) == task.predict(model, paths, 8)
    with pytest.raises(ValueError, match="restored without data"):
        next(again.batches("train", 2, 0, 0))


def test_transcripts_come_in_the_order_of_their_files(task, folder):
    """Files decoded by length come back in the order asked for, and alike alone or together."""
    model = task.model_config().build(nn.LSTM)
    paths = sorted(folder.glob("*.wav"))
    together = task.predict(model, paths, 8)
    assert task.predict(model, paths[::-1], 8) == together[::-1]
    assert [task.predict(model, [str(path)], 1)[0] for path in paths] == together


def test_folder_is_the_corpus_that_was_written(folder):
    """WAV files and transcripts are read as what they were made from."""
    made = tones.utterances(3, seed=0, longest=6)
    assert [recording.text for recording in read_corpus(folder)] == [utterance.text for utterance in made]
    task = speech.load(folder)
    assert sum(len(examples) for examples in task.examples.values()) == 3
    assert task.notes[0] == f"3 recordings from {folder}"


def test_transcripts_may_stand_beside_their_sound(folder):
    """A text file of the same name does as well, in a folder within too; case and blanks are evened out."""
    (folder / "transcripts.txt").unlink()
    (folder / "within").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.wav"))):
        path.rename(folder / "within" / path.name)
        (folder / "within" / path.name).with_suffix(".txt").write_text(f"Text \n  {number}\n", encoding="utf-8")
    assert [recording.text for recording in read_corpus(folder)] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("table", [True, False])
def test_a_name_and_a_text_of_either_normal_form_are_the_same(folder, form, table):
    """Archives come with names whose accents stand apart, and transcripts of other systems."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (folder / "00000.wav").rename(folder / unicodedata.normalize(form, "ä.WAV"))
    if table:
        rows = f"00001\tx\r00002.wav\tx\r{unicodedata.normalize(other, 'ä')}\t{unicodedata.normalize(form, 'ÖL')}\r"
        (folder / "transcripts.txt").write_bytes(rows.encode("utf-16"))
    else:
        (folder / "transcripts.txt").unlink()
        for name, text in (("00001", "x"), ("00002", "x"), ("ä", "ÖL")):
            (folder / unicodedata.normalize(other, f"{name}.txt")).write_text(unicodedata.normalize(form, text))
    assert [recording.text for recording in read_corpus(folder)] == ["x", "x", "öl"]


def test_made_up_corpus_says_so(task):
    """Nobody is told of speech where there is none."""
    assert task.notes[0].startswith("SYNTHETIC: 60 utterances")


def test_padding_is_reported(task):
    """The note says what share of an epoch's steps is padding, as its batches have it."""
    computed = valid = 0
    for batch in task.batches("train", task.batch, 0, 0):
        computed += batch.source.size(0) * batch.source.size(1) + batch.target.numel()
        valid += int(batch.source_lengths.sum() + batch.target_lengths.sum())
    assert task.notes[1].startswith(f"{1 - valid / computed:.0%} of the steps in batches of 32 are padding, ")


def test_letters_sound_apart():
    """A letter's frames hold its two tones of the keypad and no other's."""
    utterance = tones.Utterance("f", tones._sound("f", np.random.default_rng(0)))
    middle = utterance.samples[len(utterance.samples) // 2 - 400 :][:800]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(800)))
    strength = {f: spectrum[round(f * 800 / RATE)] for f in (*tones.LOW, *tones.HIGH)}
    loudest = sorted(strength, key=strength.get)[-2:]
    assert sorted(loudest) == [tones.LOW[1], tones.HIGH[1]]


def test_made_up_texts_follow_their_seed():
    """Equal seeds make equal utterances; no text starts or ends with a space, which nobody hears."""
    one, same, other = (tones.utterances(40, seed) for seed in (0, 0, 1))
    assert all(a.text == b.text and np.array_equal(a.samples, b.samples) for a, b in zip(one, same, strict=True))
    assert [a.text for a in one] != [a.text for a in other]
    assert all(a.text == a.text.strip() and "  " not in a.text and a.text for a in one)


def add(name, content):
    """Something that writes a further file into a corpus."""
    return lambda folder: (folder / name).write_bytes(content)


def add_row(row):
    """Something that adds a row to the transcripts."""

    def change(folder):
        with (folder / "transcripts.txt").open("ab") as file:
            file.write(row)

    return change


def tiny(folder):
    """A recording of 10 ms."""
    wavfile.write(folder / "00000.wav", RATE, np.zeros(160, dtype=np.int16))


def halve(folder):
    """Cuts a recording short."""
    path = folder / "00001.wav"
    path.write_bytes(path.read_bytes()[:-1000])


def no_sound(folder):
    """Takes the sound away."""
    for path in folder.glob("*.wav"):
        path.unlink()


#: What is done to a good corpus, and what the one line then says.
BAD = {
    "transcript without WAV": (add_row(b"more.wav\thello\n"), "txt, row 4: there is no WAV file 'more.wav'"),
    "WAV without transcript": (add("z.wav", b"x"), "z.wav: has no transcript, expected a row in transcripts.txt"),
    "a column too few": (add_row(b"00001.wav hello\n"), "txt, row 4: has 1 column, expected file<TAB>text"),
    "twice": (add_row(b"00001\thello\n"), "txt, row 4: '00001' has a transcript already"),
    "encoding": (add_row(b"00001.wav\t\xe4\n"), "txt, row 4: byte 0xe4 is not utf-8"),
    "nothing said": (add("transcripts.txt", b"00000.wav\t \n"), "txt, row 1: the transcript of '00000.wav' is empty"),
    "empty": (add("transcripts.txt", b""), "transcripts.txt: is empty"),
    "cut short": (halve, "00001.wav: is not a whole WAV file"),
    "too short": (tiny, "00000.wav: lasts 0.010 s, expected at least one window of 0.025 s"),
    "no sound": (no_sound, "corpus: holds no WAV files"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_corpus_is_refused_in_one_line(folder, case):
    """Errors are one line that names the file, the row if there is one, and the cause."""
    change, message = BAD[case]
    change(folder)
    with pytest.raises(DataError) as caught:
        speech.load(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("00000.txt", "00001.wav: has no transcript"), ("lost.txt", "lost.txt: has no WAV file")]
)
def test_text_and_sound_of_one_name_need_each_other(folder, name, message):
    """Beside each other, a WAV without a text is refused, and a text without a WAV."""
    (folder / "transcripts.txt").unlink()
    if name == "lost.txt":
        for path in folder.glob("*.wav"):
            path.with_suffix(".txt").write_text("hello", encoding="utf-8")
    (folder / name).write_text("hello", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_corpus(folder)


def test_what_is_no_folder_is_refused(tmp_path):
    """A corpus is a folder."""
    with pytest.raises(DataError, match=": not a folder, expected one with WAV files and transcripts"):
        speech.load(tmp_path / "none")


def test_one_recording_is_too_few(tmp_path):
    """There must be one to learn from and one to validate on."""
    write_corpus(tmp_path / "one", 1, seed=0)
    with pytest.raises(DataError, match="holds one recording, expected at least 2"):
        speech.load(tmp_path / "one")


@pytest.mark.parametrize("options", [{"stacked": 0}, {"count": 1}, {"longest": 2.5}])
def test_bad_option_is_refused(options):
    """A count that cannot be is refused by name."""
    with pytest.raises(DataError, match=f"{next(iter(options))} is .*, expected a whole number of at least"):
        speech.load(**options)


def test_missing_package_says_what_to_install(monkeypatch, task):
    """Without jiwer, scores say which package is missing, and how to install it."""
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(DataUnavailableError, match="jiwer, which is not installed: pip install jiwer"):
        task.evaluate(task.model_config().build(nn.LSTM), 8, "cpu")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_reads_and_writes(task, folder, model):
    """A model of each family reads the batches, has a loss, and writes characters of the alphabet."""
    config = task.model_config(model, "small")
    module, batch = config.build(nn.LSTM), next(suited(task, config).batches("train", 4, 0, 0))
    outputs = module(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    assert torch.isfinite(module.loss(outputs, batch.expected, batch.decoded_lengths))
    (text,) = task.predict(module, sorted(folder.glob("*.wav"))[:1], 1, beam=2)
    assert set(text) <= set(task.alphabet)


def test_full_size_is_the_workload_s(task):
    """The full size is that of the workload speech-las but for the vocabulary."""
    config, cited = task.model_config("attention", "full"), find_workload("speech-las").config
    for name in ("input_size", "hidden_size", "num_layers", "decoder_input_size", "decoder_size", "depth", "feeds"):
        assert getattr(config, name) == getattr(cited, name)
    config, cited = task.model_config("ctc", "full"), find_workload("speech-ctc").config
    for name in ("hidden_size", "num_layers", "bidirectional"):
        assert getattr(config, name) == getattr(cited, name)


@pytest.mark.parametrize(("model", "size"), [("rnn", "small"), ("lstm", "huge")])
def test_other_models_are_refused(task, model, size):
    """A model or size that there is not is refused with what there is."""
    with pytest.raises(ValueError, match=f"has models lstm, .* got {model!r} and {size!r}"):
        task.model_config(model, size)


def test_training_learns_the_language():
    """A few steps on short utterances lower the loss well below that of guessing letters by how often they come."""
    task = speech.load(count=200, longest=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model_config().build(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for epoch in range(8):
        for batch in task.batches("train", 30, 0, epoch):
            optimizer.zero_grad()
            outputs = model(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
            loss = model.loss(outputs, batch.expected, batch.target_lengths)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    counts = torch.tensor([t for e in task.examples["train"] for t in (*e.tokens, END)]).bincount().double()
    share = counts[counts > 0] / counts.sum()
    guessing = float(-(share * share.log()).sum())
    assert np.mean(losses[-6:]) < 0.7 * guessing
