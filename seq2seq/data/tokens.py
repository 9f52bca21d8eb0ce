"""Ids of the special tokens, the same in every vocabulary, and a vocabulary of subwords learnt from a task's own texts.

Byte-pair encoding on bytes: every text can be encoded, and decodes to the same text, whatever its characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from seq2seq.data.errors import optional

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD = 0
UNKNOWN = 1
BEGIN = 2
END = 3

_NEEDED = "tokenizers", "subword tokens need"
#: Their names in the vocabulary. In a text they are words like any other.
SPECIAL = ("<pad>", "<unknown>", "<begin>", "<end>")
#: Tokens of the smallest vocabulary: the special ones and one per byte.
SMALLEST_VOCABULARY = len(SPECIAL) + 256


class Subwords:
    """A vocabulary of subwords: text to tokens and back.

    Make one with `Subwords.train` or `Subwords.from_json`.

    Attributes:
        size: tokens in the vocabulary, special ones included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Not kept in its JSON form. Without it, "<end>" in a text would be taken for the end of it.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Subwords:
        """Learn the most frequent pieces of the texts; equal texts give equal vocabularies.

        Args:
            texts: of the training split only; otherwise validation texts would shape the tokens they are judged in.
            vocabulary: most tokens; there are fewer when the texts hold no more pairs that come twice.

        Raises:
            ValueError: when the vocabulary is smaller than `SMALLEST_VOCABULARY`.
            DataUnavailableError: when the package tokenizers is not installed.
        """
        if not isinstance(vocabulary, int) or vocabulary < SMALLEST_VOCABULARY:
            msg = f"vocabulary is {vocabulary!r}, expected at least {SMALLEST_VOCABULARY}: one per byte and 4 more"
            raise ValueError(msg)
        optional(*_NEEDED)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - optional

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> Subwords:
        """The vocabulary that `to_json` wrote.

        Raises:
            ValueError: when the text is not a vocabulary, or one with other special tokens.
            DataUnavailableError: when the package tokenizers is not installed.
        """
        library = optional(*_NEEDED)
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            msg = f"not a vocabulary ({error}), expected what Subwords.to_json wrote"
            raise ValueError(msg) from error
        found = [tokenizer.token_to_id(name) for name in SPECIAL]
        if found != [PAD, UNKNOWN, BEGIN, END]:
            msg = f"the special tokens {', '.join(SPECIAL)} have the ids {found}, expected 0 to 3"
            raise ValueError(msg)
        return cls(tokenizer)

    def to_json(self) -> str:
        """The vocabulary as one JSON string, to be kept with a model."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, special ones not among them."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones are left out, bytes that form no character come out as U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
