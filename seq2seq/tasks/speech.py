"""The task of speech recognition: log-mel frames in, characters out, scored by word and character error rate.

The corpus is a user's folder of WAV files and transcripts; without one it is a made-up language of tones, which is
SYNTHETIC and says nothing of how well speech is recognised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from seq2seq.data import tones
from seq2seq.data.audio import BANDS, log_mel, stack
from seq2seq.data.batch import Batch
from seq2seq.data.bucketing import padding_note
from seq2seq.data.errors import DataError, optional
from seq2seq.data.options import Count, takes_options
from seq2seq.data.speech_corpus import read_corpus, read_frames
from seq2seq.data.text_file import ENCODING
from seq2seq.data.tokens import END, PAD, UNKNOWN
from seq2seq.decoding.ctc import best_path, prefix_beam_search
from seq2seq.decoding.result import Decoded
from seq2seq.models.base import IGNORE_TOKEN, Config, Model
from seq2seq.models.ctc import CTCConfig, CTCModel, steps_needed
from seq2seq.tasks.families import family_config
from seq2seq.tasks.sequences import batch_places, collate, examples_of, search, texts_of
from seq2seq.tasks.task import MODELS

#: Tokens before those of characters.
SPECIAL = 4
#: One recording out of this many is held back for validation.
HELD_BACK = 10
#: Recordings of the made-up corpus.
SYNTHETIC_COUNT = 2200
#: Largest number of tokens per step in decoding, relative to the largest in training.
MARGIN = 1.2
#: Hidden size, per direction, and layers of a CTC model; the full ones are those of the workload `speech-ctc`.
CTC_SIZES = {"small": (64, 2), "full": (320, 4)}


@dataclass(frozen=True)
class SpeechExample:
    """Recording and its transcript.

    Attributes:
        steps: (steps, features) float32, normalised and stacked frames.
        text: its transcript.
        tokens: of the transcript.
    """

    steps: Tensor
    text: str
    tokens: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps that encoder and decoder make; the decoder's one more than tokens, for BEGIN or END."""
        return len(self.steps), len(self.tokens) + 1


@dataclass(frozen=True)
class SpeechTask:
    """Recordings and transcripts.

    Attributes:
        alphabet: characters that tokens stand for, from token `SPECIAL` on.
        mean, deviation: (bands,) float32 of the training recordings' frames, taken off and divided by.
        stacked: frames of a step.
        rate: most tokens per step in training, which bounds decoding.
        examples: of `train` and `validation`; empty when restored without.
        notes: remarks about the data, a line each.
        labels: whether batches are for a model without a decoder (CTC): no targets, and the transcripts without END.
    """

    alphabet: str
    mean: Tensor
    deviation: Tensor
    stacked: int
    rate: float
    examples: dict[str, list[SpeechExample]]
    notes: tuple[str, ...] = ()
    labels: bool = False

    name: ClassVar[str] = "speech"
    quality: ClassVar[str] = "WER"
    higher_is_better: ClassVar[bool] = False
    #: Predictions read files by name, not texts.
    reads_files: ClassVar[bool] = True
    #: Settings of a training that learns the made-up language.
    learning_rate: ClassVar[float] = 2e-3
    batch: ClassVar[int] = 32
    steps: ClassVar[int] = 1000

    @property
    def vocabulary(self) -> int:
        """Tokens, special ones included."""
        return SPECIAL + len(self.alphabet)

    def model_config(self, model: str = "lstm", size: str = "small") -> Config:
        """Sizes of a model for these recordings.

        Args:
            model: `lstm`; `attention`, in the form of Listen, Attend and Spell (Chan et al. 2016), whose decoder is fed
                with what it looked at; `gnmt`; `transformer`, of as many parameters as `lstm`; or `ctc`, an encoder
                alone, whose blank is the token `PAD`.
            size: `small`, or `full`, the sizes of the workload `speech-las`, for `ctc` those of `speech-ctc`.

        Raises:
            ValueError: for another model or size.
        """
        sizes = {"small": (64, 1, 32), "full": (256, 3, 512)}
        if model not in MODELS or size not in sizes:
            msg = f"speech has models {', '.join(MODELS)} in sizes small and full, got {model!r} and {size!r}"
            raise ValueError(msg)
        if model == "ctc":
            hidden_size, layers = CTC_SIZES[size]
            return CTCConfig(BANDS * self.stacked, hidden_size, self.vocabulary, layers, blank=PAD)
        hidden_size, layers, embedding = sizes[size]
        common: dict[str, Any] = {
            "input_size": BANDS * self.stacked,
            "hidden_size": hidden_size,
            "output_size": self.vocabulary,
            "decoder_input_size": embedding,
            "target_vocabulary": self.vocabulary,
        }
        # One decoder layer of the size of both directions of the encoder.
        lstm = {"bidirectional": True, "decoder_hidden_size": 2 * hidden_size, "decoder_layers": 1}
        return family_config(model, layers, common, lstm, feeds="context")

    def suited(self, config: Config) -> SpeechTask:
        """The task with batches for a model of these sizes.

        CTC outputs at most one character per step. Recordings that are too short for their transcript are left out of
        the batches, and the notes say how many; they are transcribed and scored like all others.
        """
        if config.decodes or self.labels:
            return self
        examples = {split: list(filter(_fits, found)) for split, found in self.examples.items()}
        short = sum(map(len, self.examples.values())) - sum(map(len, examples.values()))
        note = f"{short} recordings have fewer steps than CTC needs for their transcripts, and are not trained on"
        return dataclasses.replace(self, labels=True, notes=(*self.notes, *([note] if short else [])))

    def batches(self, split: str, batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Batches of recordings of about the same length, as `Task.batches`; each recording once in an epoch."""
        examples = list(filter(_fits, self._examples(split))) if self.labels else self._examples(split)
        for places in batch_places(split, [example.lengths for example in examples], batch, seed, epoch):
            chosen = collate([(examples[place].steps, examples[place].tokens) for place in places])
            yield _labelled(chosen) if self.labels else chosen

    def evaluate(self, model: Model, batch: int, device: str) -> dict[str, float]:
        """Transcribe the validation recordings and compare with their transcripts, as `Task.evaluate`.

        Returns:
            Word and character error rates of all recordings together, 1 being as many errors as words.

        Raises:
            DataUnavailableError: when jiwer is not installed.
        """
        jiwer = optional("jiwer", "word error rates need")
        examples = self._examples("validation")
        heard = self._decode(model, [example.steps for example in examples], batch, device)
        said = [example.text for example in examples]
        return {"WER": float(jiwer.wer(said, heard)), "CER": float(jiwer.cer(said, heard))}

    def predict(
        self, model: Model, paths: Sequence[str | Path], batch: int, device: str = "cpu", beam: int = 1
    ) -> list[str]:
        """Transcribe WAV files, in their order.

        Args:
            model: on `device`; it is in the mode afterwards that it was in before.
            paths: of the files.
            batch: recordings decoded together.
            device: `cpu` or `cuda`.
            beam: hypotheses kept in a beam search, by CTC prefixes; 1 decodes greedily, by CTC the likeliest alignment.

        Raises:
            DataError: for a file that is not a whole WAV.
        """
        return self._decode(model, [self._steps(read_frames(Path(path))) for path in paths], batch, device, beam)

    def state(self) -> dict[str, Any]:
        """State that `restore` needs, as JSON."""
        return {
            "task": self.name,
            "alphabet": self.alphabet,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "stacked": self.stacked,
            "rate": self.rate,
        }

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, one a character; `UNKNOWN` for those that training has not."""
        return tuple(self.alphabet.find(letter) + SPECIAL if letter in self.alphabet else UNKNOWN for letter in text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to `END`; special ones are left out."""
        kept = list(tokens)[: list(tokens).index(END) if END in tokens else None]
        return "".join(self.alphabet[token - SPECIAL] for token in kept if token >= SPECIAL).strip()

    def _steps(self, frames: Tensor) -> Tensor:
        return stack((frames - self.mean) / self.deviation, self.stacked)

    def _examples(self, split: str) -> list[SpeechExample]:
        return examples_of(split, self.examples, self.name)

    def _decode(self, model: Model, recordings: Sequence[Tensor], batch: int, device: str, beam: int = 1) -> list[str]:
        def heard(source: Tensor, lengths: Tensor) -> Decoded:
            return _search(model, source, lengths, beam, MARGIN * self.rate)

        return texts_of(model, recordings, batch, device, heard, self.decode)


@takes_options(own=("encoding",), along=("count", "longest"))
def load(
    path: Path | str | None = None,
    *,
    stacked: Count = 3,
    encoding: str = ENCODING,
    count: Annotated[int, Field(ge=2, description="a whole number of at least 2")] = SYNTHETIC_COUNT,
    longest: Count = 24,
) -> SpeechTask:
    """The task on a user's folder, or on the made-up language of `tones`.

    Args:
        path: folder of WAV files and transcripts (see `corpus.read_corpus`); None for the synthetic language.
        stacked: frames of 10 ms that make one step; 3 as in the workload `speech-las`.
        encoding: of the transcripts.
        count: recordings of the synthetic language.
        longest: characters of its longest transcript.

    Raises:
        DataError: for a corpus or option that cannot be used.
    """
    if path is None:
        made = tones.utterances(count, seed=0, longest=longest)
        pairs = [(log_mel(utterance.samples / 2.0**15), utterance.text) for utterance in made]
        note = f"SYNTHETIC: {count} utterances of a made-up language of tones; no speech"
    else:
        pairs = [(read_frames(recording.path), recording.text) for recording in read_corpus(Path(path), encoding)]
        if len(pairs) < 2:  # noqa: PLR2004 - one to learn from, one to validate on
            msg = f"{path} holds one recording, expected at least 2, to learn from and to validate on"
            raise DataError(msg)
        note = f"{len(pairs)} recordings from {path}"
    return _task(pairs, stacked, note)


def restore(state: dict[str, Any]) -> SpeechTask:
    """The task of a checkpoint, without recordings: it can transcribe other recordings."""
    return SpeechTask(
        alphabet=state["alphabet"],
        mean=torch.tensor(state["mean"]),
        deviation=torch.tensor(state["deviation"]),
        stacked=state["stacked"],
        rate=state["rate"],
        examples={},
    )


def _labelled(batch: Batch) -> Batch:
    """Batch for a model without a decoder: no target, and the tokens expected without END."""
    expected = batch.expected[:, :-1].masked_fill(batch.expected[:, :-1] == END, IGNORE_TOKEN)
    return Batch(batch.source, None, batch.source_lengths, None, expected)


def _fits(example: SpeechExample) -> bool:
    """Return whether a recording has the steps that CTC needs for its transcript."""
    return int(steps_needed(torch.tensor([example.tokens]))) <= len(example.steps)


def _search(model: Model, source: Tensor, lengths: Tensor, beam: int, ratio: float) -> Decoded:
    """Transcribe: token by token if the model has a decoder, from all its outputs at once if it has none."""
    if isinstance(model, CTCModel):
        with torch.no_grad():
            outputs = model(source, None, lengths)
        blank = model.config.blank
        if beam == 1:
            return best_path(outputs, lengths, blank=blank)
        return prefix_beam_search(outputs, lengths, beam=beam, blank=blank)
    return search(model, source, lengths, beam, max_ratio=ratio)


def _task(pairs: Sequence[tuple[Tensor, str]], stacked: int, note: str) -> SpeechTask:
    """Splits, alphabet and normalisation; the latter two only from the training recordings."""
    order = np.random.default_rng(0).permutation(len(pairs))
    held = max(1, len(pairs) // HELD_BACK)
    splits = {
        "train": [pairs[place] for place in sorted(order[held:])],
        # Neighbours of like length need little padding.
        "validation": sorted((pairs[place] for place in order[:held]), key=lambda pair: len(pair[0])),
    }
    heard = torch.cat([frames for frames, _ in splits["train"]])
    alphabet = "".join(sorted({letter for _, text in splits["train"] for letter in text}))
    task = SpeechTask(alphabet, heard.mean(0), heard.std(0).clamp_min(1e-3), stacked, 1.0, {}, (note,))
    examples = {
        split: [SpeechExample(task._steps(frames), text, task.encode(text)) for frames, text in chosen]  # noqa: SLF001
        for split, chosen in splits.items()
    }
    rate = max(example.lengths[1] / example.lengths[0] for example in examples["train"])
    padding = padding_note([example.lengths for example in examples["train"]], SpeechTask.batch)
    return dataclasses.replace(task, rate=rate, examples=examples, notes=(note, padding))
