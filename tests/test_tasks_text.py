"""Text tasks: splits that do not share sources, batches of tokens, limits that are reported, state that comes back."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch

from seq2seq.data.errors import DataError
from seq2seq.data.tokens import BEGIN, END, PAD
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.tasks import summarization, translation
from seq2seq.tasks.sequences import collate
from seq2seq.tasks.text import split_pairs

pytest.importorskip("hypothesis")
pytest.importorskip("tokenizers")
from hypothesis import given
from hypothesis import strategies as st
from memory_model import SURE, MemoryModel
from strategies import SEEDS

#: Sources repeat, with other targets and in full; their numbers keep them apart.
PAIRS = [(f"the {n % 60} red ferries", f"die {n % 60} roten Fähren{'!' * (n % 3)}") for n in range(100)]
LOADERS = {"translation": translation, "summarization": summarization}

sides = st.text("abc", min_size=1, max_size=2)
some_pairs = st.lists(st.tuples(sides, sides), max_size=40)
tokens = st.lists(st.integers(4, 99), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The pairs as a TSV, which both tasks read."""
    path = tmp_path_factory.mktemp("text") / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(file):
    """Translation of the pairs."""
    return translation.load(file, vocabulary=300)


def knowing(task, split="validation"):
    """A model that knows the answers of a split by heart; of several targets of a source, one."""
    pairs = [(example.source_tokens, example.target_tokens) for example in task.examples[split]]
    return MemoryModel(pairs, task.subwords.size)


@given(some_pairs)
def test_splits_share_no_source(pairs):
    """Every pair is in one split, in order, and equal sources in the same; neither split is empty."""
    if len({source for source, _ in pairs}) < 2:
        with pytest.raises(DataError, match=r"some file: [01] different source text, expected at least 2"):
            split_pairs(pairs, "some file")
        return
    splits = split_pairs(pairs, "some file")
    sources = {split: {source for source, _ in part} for split, part in splits.items()}
    assert not sources["train"] & sources["validation"]
    assert sources["train"]
    assert sources["validation"]
    assert [pair for pair in pairs if pair in splits["train"]] == splits["train"]
    assert sorted(chain(*splits.values())) == sorted(pairs)


@given(st.permutations(PAIRS))
def test_split_does_not_depend_on_the_order(pairs):
    """The same pairs in another order are split alike, a tenth of the sources for validation."""
    splits = split_pairs(pairs, "some file")
    expected = split_pairs(PAIRS, "some file")
    assert {split: sorted(part) for split, part in splits.items()} == {
        split: sorted(part) for split, part in expected.items()
    }
    assert len({source for source, _ in splits["validation"]}) == 6


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6))
def test_batches_hold_their_pairs(pairs):
    """Sources, BEGIN + target and target + END, padded with PAD, or IGNORE_TOKEN where they are expected."""
    batch = collate(pairs)
    for row, (source, target) in enumerate(pairs):
        steps, decoded = int(batch.source_lengths[row]), int(batch.target_lengths[row])
        assert batch.source[row].tolist() == source + [PAD] * (batch.source.size(1) - steps)
        assert batch.target[row].tolist() == [BEGIN, *target] + [PAD] * (batch.target.size(1) - decoded)
        assert batch.expected[row].tolist() == [*target, END] + [IGNORE_TOKEN] * (batch.target.size(1) - decoded)
        assert (steps, decoded) == (len(source), len(target) + 1)
    assert batch.source.size(1) == int(batch.source_lengths.max())
    assert batch.target.size(1) == int(batch.target_lengths.max())
    assert {value.dtype for value in batch.tensors().values()} == {torch.int64}


@given(split=st.sampled_from(["train", "validation"]), batch=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 9))
def test_an_epoch_holds_each_example_once(task, split, batch, seed, epoch):
    """The targets of an epoch's batches are those of the split, each once."""
    found = []
    for one in task.batches(split, batch, seed, epoch):
        assert one.size <= batch
        for source, steps, target, length in zip(
            one.source, one.source_lengths, one.expected, one.target_lengths, strict=True
        ):
            found.append((source[:steps].tolist(), target[: length - 1].tolist()))
    assert sorted(found) == sorted((example.source_tokens, example.target_tokens) for example in task.examples[split])


def test_training_order_follows_seed_and_epoch(task):
    """Equal seed and epoch give equal batches; others give others. Validation is always the same."""

    def sources(split, seed, epoch):
        return [batch.source.tolist() for batch in task.batches(split, 8, seed, epoch)]

    assert sources("train", 1, 2) == sources("train", 1, 2)
    assert sources("train", 1, 2) != sources("train", 2, 2)
    assert sources("train", 1, 2) != sources("train", 1, 3)
    assert sources("validation", 1, 2) == sources("validation", 3, 4)


@pytest.mark.parametrize("name", LOADERS)
def test_vocabulary_is_learnt_from_training_alone(name, tmp_path):
    """Other validation texts leave the vocabulary as it is; other training texts do not."""
    held = {source for source, _ in split_pairs(PAIRS, "pairs")["validation"]}

    def vocabulary(change):
        path = tmp_path / "changed.tsv"
        changed = [(source, "ganz anders" if change(source) else target) for source, target in PAIRS]
        path.write_text("".join(f"{source}\t{target}\n" for source, target in changed), encoding="utf-8")
        return LOADERS[name].load(path).subwords.to_json()

    same = vocabulary(lambda _: False)
    assert vocabulary(lambda source: source in held) == same
    assert vocabulary(lambda source: source not in held) != same


@pytest.mark.parametrize("name", LOADERS)
def test_long_texts_are_cut_and_reported(name, file):
    """A text beyond a limit is cut to it, and a note says how many were; nothing is said if none was."""
    unique = len(set(PAIRS))
    task = LOADERS[name].load(file, max_source=3, max_target=2)
    assert {len(example.source_tokens) for part in task.examples.values() for example in part} == {3}
    assert task.notes[-3:-1] == [
        f"{unique} of {unique} source texts were cut to 3 tokens",
        f"{unique} of {unique} target texts were cut to 2 tokens",
    ]
    assert max(batch.target.size(1) for batch in task.batches("train", 8, 0, 0)) == 3
    assert not any("cut" in note for note in LOADERS[name].load(file).notes)


def test_padding_is_reported(task):
    """The note says what share of an epoch's steps is padding, as its batches have it."""
    computed = valid = 0
    for batch in task.batches("train", 32, 0, 0):
        computed += batch.source.numel() + batch.target.numel()
        valid += int(batch.source_lengths.sum() + batch.target_lengths.sum())
    assert task.notes[-1].startswith(f"{1 - valid / computed:.0%} of the steps in batches of 32 are padding, ")


def test_repeated_pairs_are_reported(task):
    """Equal pairs are kept once, and a note says how many were left out."""
    unique = len(set(PAIRS))
    assert sum(map(len, task.examples.values())) == unique
    assert f"{100 - unique} of 100 pairs came again and were left out" in task.notes


@pytest.mark.parametrize("name", LOADERS)
def test_state_is_all_that_prediction_needs(name, file):
    """A task restored from its state, through JSON, predicts as the first, and refuses what needs data."""
    task = LOADERS[name].load(file, vocabulary=300)
    state = json.loads(json.dumps(task.state()))
    restored = LOADERS[name].restore(state)
    texts = [source for source, _ in PAIRS[:5]]
    assert restored.predict(knowing(task), texts, 2) == task.predict(knowing(task), texts, 2)
    assert restored.state() == state
    with pytest.raises(ValueError, match=f"this {name} task was restored without data and can only predict"):
        restored.batches("validation", 1, 0, 0)


@pytest.mark.parametrize("name", LOADERS)
def test_state_of_another_task_is_refused(name):
    """A state of another task, or one that lacks something, says so."""
    with pytest.raises(ValueError, match=f"the task 'forecasting', expected '{name}'"):
        LOADERS[name].restore({"task": "forecasting"})
    with pytest.raises(ValueError, match=f"the task None, expected '{name}'"):
        LOADERS[name].restore({})
    with pytest.raises(ValueError, match=f"state of the task {name} lacks tokenizer, max_target"):
        LOADERS[name].restore({"task": name, "max_source": 3})


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_predictions_come_in_the_order_of_their_texts(task, batch):
    """Whatever the batch and the order of lengths, each text gets its own answer, and an unknown one its own too."""
    examples = task.examples["train"]
    texts = [example.source for example in examples[::-1]]
    answers = dict(PAIRS)
    known = MemoryModel(
        [(task.subwords.encode(text), task.subwords.encode(answers[text])) for text in texts], task.subwords.size
    )
    asked = [*texts[:10], "unknown to it", *texts[10:]]
    expected = [answers.get(text, "") for text in asked]
    assert task.predict(known, asked, batch) == expected
    assert task.predict(known, [], batch) == []


def test_beams_give_what_the_model_is_sure_of(task):
    """A beam search finds the same answers as greedy decoding where the model is sure of them."""
    texts = [example.source for example in task.examples["validation"]]
    model = knowing(task)
    assert task.predict(model, texts, 4, beam=3) == task.predict(model, texts, 4)
    with pytest.raises(ValueError, match="beam is 0"):
        task.predict(model, texts, 4, beam=0)


def test_the_longest_answer_fits(file):
    """There is room for an answer of as many tokens as the longest target and for its END, and for no more."""
    task = translation.load(file, max_target=4)
    answer = list(range(10, 14))
    model = MemoryModel([(task.subwords.encode("a"), answer), (task.subwords.encode("b"), answer * 2)], 999)
    assert task.predict(model, ["a"], 1) == [task.subwords.decode(answer)]
    assert task.predict(model, ["b"], 1) == [task.subwords.decode([*answer, answer[0]])]


def test_prediction_leaves_the_mode_of_the_model(task):
    """A model comes back in training or evaluation mode as it was given."""
    for training in (True, False):
        model = knowing(task).train(training)
        task.predict(model, ["the 1 red ferries"], 1)
        task.evaluate(model, 8, "cpu")
        assert model.training is training


def test_prediction_of_an_empty_text_is_refused(task):
    """The row of the empty text is named."""
    with pytest.raises(DataError, match="row 2: the text is empty, expected at least one character"):
        task.predict(knowing(task), ["a", " \n"], 1)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_validation_loss_is_a_mean_over_tokens(task, batch):
    """Whatever the batches, it is the loss of all tokens; a model that errs on some is off by its logit there."""
    known = task.examples["validation"][:3]
    model = MemoryModel([(one.source_tokens, one.target_tokens) for one in known], task.subwords.size)
    scores = task.evaluate(model, batch, "cpu")
    steps = wrong = 0
    for example in task.examples["validation"]:
        answer = model.answers.get(tuple(example.source_tokens), [END])
        expected = [*example.target_tokens, END]
        answer = [*answer, *[END] * len(expected)][: len(expected)]
        steps += len(expected)
        wrong += sum(one != other for one, other in zip(answer, expected, strict=True))
    base = math.log1p((task.subwords.size - 1) * math.exp(-SURE))
    assert wrong > 0
    assert scores["loss"] == pytest.approx(base + SURE * wrong / steps, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_source": 0}, "max_source is 0, expected a whole number of at least 1"),
        ({"max_target": -1}, "max_target is -1, expected a whole number of at least 1"),
        ({"max_target": 1.5}, "max_target is 1.5, expected a whole number of at least 1"),
        ({"vocabulary": 3}, "vocabulary is 3, expected at least 260"),
        ({"vocabulary": "many"}, "vocabulary is 'many', expected a whole number"),
    ],
)
def test_sizes_out_of_range_are_refused(file, options, message):
    with pytest.raises(ValueError, match=message):
        translation.load(file, **options)


def test_unknown_split_and_batch_are_refused(task):
    """At the call, not when the first batch is asked for."""
    with pytest.raises(ValueError, match="split is 'test', expected 'train' or 'validation'"):
        task.batches("test", 1, 0, 0)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="batch is 0"):
            task.batches(split, 0, 0, 0)
    with pytest.raises(ValueError, match="batch is 0"):
        task.predict(knowing(task), ["a"], 0)
