"""A corpus of speech in the form in which a user's is read: WAV files and their transcripts."""

from __future__ import annotations

from pathlib import Path

from scipy.io import wavfile

from seq2seq.data.audio import RATE
from seq2seq.data.tones import utterances


def write_corpus(folder: Path, count: int, seed: int, longest: int = 24) -> None:
    """Write utterances of the language of tones as a folder of WAV files and a `transcripts.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, utterance in enumerate(utterances(count, seed, longest)):
        name = f"{number:05d}.wav"
        wavfile.write(folder / name, RATE, utterance.samples)
        lines.append(f"{name}\t{utterance.text}\n")
    (folder / "transcripts.txt").write_text("".join(lines), encoding="utf-8")
