"""Code shared by translation and summarisation: pairs of texts become batches of tokens, and tokens texts again.

The vocabulary is one for both sides, learnt from the training split. Pairs of equal source never fall into both splits.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from seq2seq.data.batch import Batch
from seq2seq.data.bucketing import padding_note
from seq2seq.data.errors import DataError
from seq2seq.data.text_pairs import Pair, tidy
from seq2seq.data.tokens import Subwords
from seq2seq.models.base import IGNORE_TOKEN, Model
from seq2seq.tasks.sequences import batch_places, collate, evaluating, examples_of, search, texts_of

#: Share of the sources that are held back for validation.
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class TextExample:
    """A pair of texts and the tokens that are left of them after truncation."""

    source: str
    target: str
    source_tokens: list[int]
    target_tokens: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps that the encoder and the decoder make; the decoder's one more than tokens, for BEGIN or END."""
        return len(self.source_tokens), len(self.target_tokens) + 1


class TextTask(ABC):
    """Texts in, texts out: batches of tokens for training, decoding and scores for validation.

    Args:
        subwords: the vocabulary of both sides.
        max_source: most tokens of a source; what is longer is cut.
        max_target: most tokens of a target, END not counted.
        splits: pairs of `train` and `validation`; none in a task that only predicts.
        notes: remarks about the data, a line each.

    Attributes:
        notes: those, and how many texts were cut.
    """

    name: ClassVar[str]
    #: Name of the score that `evaluate` gives and that is to be improved.
    quality: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    #: What a small model trains well with here, by the names of `seq2seq.training.trainer.TrainSettings`.
    defaults: ClassVar[Mapping[str, float]]

    def __init__(
        self,
        subwords: Subwords,
        max_source: int,
        max_target: int,
        splits: dict[str, list[Pair]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        for side, limit in (("max_source", max_source), ("max_target", max_target)):
            if not isinstance(limit, int) or limit < 1:
                msg = f"{side} is {limit!r}, expected a whole number of at least 1 token"
                raise ValueError(msg)
        self.subwords = subwords
        self.max_source = max_source
        self.max_target = max_target
        self.notes = list(notes)
        self._cut = {"source": 0, "target": 0}
        self.examples: dict[str, list[TextExample]] = {
            split: [self._encode(pair) for pair in pairs] for split, pairs in (splits or {}).items()
        }
        # Validation comes in this order, in which neighbours need little padding.
        self.examples.get("validation", []).sort(key=lambda example: example.lengths)
        total = sum(len(examples) for examples in self.examples.values())
        for side, limit in (("source", max_source), ("target", max_target)):
            if self._cut[side]:
                self.notes.append(f"{self._cut[side]} of {total} {side} texts were cut to {limit} tokens")

    @abstractmethod
    def score(self, outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Scores of texts against what they should be, by name; `quality` is among them."""

    @abstractmethod
    def baselines(self, examples: Sequence[TextExample]) -> dict[str, float]:
        """Scores that are reached without a model."""

    def batches(self, split: str, batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Batches of one epoch, as `Task.batches`: each example once, those of like length together."""
        examples = self._examples(split)
        places = batch_places(split, [example.lengths for example in examples], batch, seed, epoch)
        return (collate([(examples[i].source_tokens, examples[i].target_tokens) for i in chosen]) for chosen in places)

    def evaluate(self, model: Model, batch: int, device: str) -> dict[str, float]:
        """Loss and scores of the validation split, decoded greedily, and the scores of the baselines.

        Returns:
            `loss` is the mean cross entropy (nats) of a validation token, END included.
        """
        examples = self._examples("validation")
        outputs = self.predict(model, [example.source for example in examples], batch, device)
        scores = self.score(outputs, [example.target for example in examples])
        return {**scores, "loss": self._validation_loss(model, batch, device), **self.baselines(examples)}

    def predict(self, model: Model, texts: Sequence[str], batch: int, device: str = "cpu", beam: int = 1) -> list[str]:
        """Predict a text for each text, in their order; a text longer than `max_source` is cut.

        Args:
            model: as `seq2seq.models.encoder_decoder.Seq2Seq`, on the device.
            texts: the sources.
            batch: texts in a batch.
            device: the model's.
            beam: hypotheses kept in a beam search; 1 decodes greedily.

        Raises:
            DataError: for an empty text, by its row.
            ValueError: for a batch or beam below 1.
        """
        limit = self.max_target + 1  # END is a token too
        return texts_of(
            model,
            [self._encode_source(text, row) for row, text in enumerate(texts, 1)],
            batch,
            device,
            lambda source, lengths: search(model, source, lengths, beam, max_steps=limit),
            lambda tokens: tidy(self.subwords.decode(tokens)),
        )

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Rows, from 1, of the texts of which `predict` reads only the first `max_source` tokens."""
        return [row for row, text in enumerate(texts, 1) if len(self.subwords.encode(tidy(text))) > self.max_source]

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[Pair], origin: str, *, vocabulary: int, max_source: int, max_target: int
    ) -> Self:
        """The task on pairs: what comes twice once, split by source, the vocabulary learnt from the training split.

        Args:
            pairs: all of them.
            origin: where they are from, for messages and notes.
            vocabulary: most tokens, for both sides together.
            max_source: most tokens of a source.
            max_target: most tokens of a target.

        Raises:
            DataError: when there are fewer than two different sources.
            DataUnavailableError: when tokenizers is not installed.
            ValueError: for a size out of range.
        """
        unique = list(dict.fromkeys(pairs))
        splits = split_pairs(unique, origin)
        subwords = Subwords.train((text for pair in splits["train"] for text in pair), vocabulary)
        sizes = f"{len(splits['train'])} pairs to train, {len(splits['validation'])} to validate"
        notes = [f"{origin}: {sizes}, {subwords.size} tokens"]
        if len(unique) < len(pairs):
            notes.append(f"{len(pairs) - len(unique)} of {len(pairs)} pairs came again and were left out")
        task = cls(subwords, max_source, max_target, splits, notes)
        lengths = [example.lengths for example in task.examples["train"]]
        task.notes.append(padding_note(lengths, int(cls.defaults["batch"])))
        return task

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The task of a state that `state` gave, without data: it can predict.

        Raises:
            ValueError: when the state is another task's or lacks something.
            DataUnavailableError: when tokenizers is not installed.
        """
        if state.get("task") != cls.name:
            msg = f"the state is that of the task {state.get('task')!r}, expected {cls.name!r}"
            raise ValueError(msg)
        missing = [key for key in ("tokenizer", "max_source", "max_target") if key not in state]
        if missing:
            msg = f"the state of the task {cls.name} lacks {', '.join(missing)}"
            raise ValueError(msg)
        return cls(Subwords.from_json(state["tokenizer"]), state["max_source"], state["max_target"])

    def state(self) -> dict[str, Any]:
        """State that prediction needs besides the model, as JSON can hold it; `restore` takes it."""
        return {
            "task": self.name,
            "tokenizer": self.subwords.to_json(),
            "max_source": self.max_source,
            "max_target": self.max_target,
        }

    def _examples(self, split: str) -> list[TextExample]:
        return examples_of(split, self.examples, self.name)

    def _encode(self, pair: Pair) -> TextExample:
        source, target = (self.subwords.encode(text) for text in pair)
        self._cut["source"] += len(source) > self.max_source
        self._cut["target"] += len(target) > self.max_target
        return TextExample(*pair, source[: self.max_source], target[: self.max_target])

    def _encode_source(self, text: str, row: int) -> list[int]:
        tokens = self.subwords.encode(tidy(text))[: self.max_source]
        if not tokens:
            msg = f"row {row}: the text is empty, expected at least one character that is not a blank"
            raise DataError(msg)
        return tokens

    def _validation_loss(self, model: Model, batch: int, device: str) -> float:
        total = count = 0.0
        with evaluating(model), torch.no_grad():
            for one in self.batches("validation", batch, seed=0, epoch=0):
                moved = one.to(device)
                outputs = model(moved.source, moved.target, moved.source_lengths, moved.target_lengths)
                valid = int((moved.expected != IGNORE_TOKEN).sum())
                loss = model.loss(outputs, moved.expected, moved.target_lengths)
                total += valid * float(loss)
                count += valid
        return total / count


def split_pairs(pairs: Sequence[Pair], origin: str) -> dict[str, list[Pair]]:
    """Pairs of `train` and `validation`: the sources whose hash is smallest are held back.

    So it does not matter in what order pairs come, and pairs of equal source stay together.

    Args:
        pairs: all of them.
        origin: where they are from, for messages.

    Raises:
        DataError: when there are fewer than two different sources.
    """
    sources = sorted({source for source, _ in pairs}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(sources) < 2:  # noqa: PLR2004 - one to train on, one to validate with
        msg = f"{origin}: {len(sources)} different source text, expected at least 2: one to train, one to validate"
        raise DataError(msg)
    held = set(sources[: max(1, round(VALIDATION_SHARE * len(sources)))])
    return {
        "train": [pair for pair in pairs if pair[0] not in held],
        "validation": [pair for pair in pairs if pair[0] in held],
    }
