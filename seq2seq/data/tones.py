"""A made-up language of tones, for where no corpus of speech is installed: SYNTHETIC, and said to be so wherever used.

Each letter is the pair of tones that a telephone's keypad has for one of its 16 keys (ITU-T Q.23), a space is a pause.
Lengths follow LibriSpeech's, scaled down. It can be learnt as speech can: what is heard when must be found out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seq2seq.data.audio import RATE
from seq2seq.data.lengths import LIBRISPEECH_CHARACTERS

LOW = (697, 770, 852, 941)
HIGH = (1209, 1336, 1477, 1633)
LETTERS = "abcdefghijklmnop"
#: Shortest and longest letter or space, and the pause after a letter, in seconds.
SHORTEST_S, LONGEST_S, PAUSE_S = 0.06, 0.10, 0.02
#: Of full scale.
TONE, NOISE = 0.2, 0.01
#: Letters of the longest word.
LONGEST_WORD = 5


@dataclass(frozen=True)
class Utterance:
    """A text and its sound, (samples,) int16 at `RATE`."""

    text: str
    samples: NDArray[np.int16]


def utterances(count: int, seed: int, longest: int = 24) -> list[Utterance]:
    """Random texts and their sound; equal seeds give equal ones.

    Args:
        count: how many.
        seed: of texts, durations and noise.
        longest: characters of LibriSpeech's longest transcript after scaling.
    """
    generator = np.random.default_rng(seed)
    rank = torch.from_numpy(generator.random(count)).float()
    lengths = LIBRISPEECH_CHARACTERS.at(rank, longest).tolist()
    texts = [_text(length, generator) for length in lengths]
    return [Utterance(text, _sound(text, generator)) for text in texts]


def _text(length: int, generator: np.random.Generator) -> str:
    """Words of random letters, `length` characters with the spaces between them; no space at either end."""
    text = ""
    while len(text) < length:
        word = "".join(generator.choice(list(LETTERS), size=generator.integers(1, LONGEST_WORD + 1)))
        text += word + " "
    # Cut after a letter: a space at the end is not heard.
    text = text[:length]
    return text[:-1] + LETTERS[0] if text.endswith(" ") else text


def _sound(text: str, generator: np.random.Generator) -> NDArray[np.int16]:
    parts = [np.zeros(round(PAUSE_S * RATE))]
    for letter in text:
        seconds = generator.uniform(SHORTEST_S, LONGEST_S)
        time = np.arange(round(seconds * RATE)) / RATE
        if letter == " ":
            parts.append(np.zeros(len(time)))
            continue
        key = LETTERS.index(letter)
        loudness = TONE * generator.uniform(0.5, 1.0)
        pair = np.sin(2 * np.pi * LOW[key // 4] * time) + np.sin(2 * np.pi * HIGH[key % 4] * time)
        parts += [loudness * pair, np.zeros(round(PAUSE_S * RATE))]
    sound = np.concatenate(parts)
    sound = sound + generator.normal(scale=NOISE, size=len(sound))
    return np.round(np.clip(sound, -1, 1) * np.iinfo(np.int16).max).astype(np.int16)
