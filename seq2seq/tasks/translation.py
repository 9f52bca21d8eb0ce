"""Translation: English to German or French from Django's message catalogues, or pairs of a user's own TSV file.

The catalogues hold the messages of a web framework: short, full of placeholders and technical terms, few. A model
learns them by heart and does not learn the language from them; the scores on validation say how little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from seq2seq.data.catalogues import LANGUAGES, catalogue_pairs
from seq2seq.data.errors import optional
from seq2seq.data.options import Count, takes_options
from seq2seq.data.text_file import ENCODING
from seq2seq.data.text_pairs import read_pairs
from seq2seq.models.base import Config
from seq2seq.tasks.text import TextExample, TextTask
from seq2seq.tasks.text_models import TextSizes, text_config

SIZES = {
    "small": TextSizes(embedding=96, hidden=192, layers=1, dropout=0.1),
    # bentrevett/pytorch-seq2seq notebook 1: 2 layers x 512, embedding 256, dropout 0.5
    "full": TextSizes(embedding=256, hidden=512, layers=2, dropout=0.5),
}


class TranslationTask(TextTask):
    """Pairs of sentences, judged by sacreBLEU and chrF; both from 0 to 100."""

    name: ClassVar[str] = "translation"
    quality: ClassVar[str] = "BLEU"
    defaults: ClassVar[Mapping[str, float]] = {"batch": 32, "learning_rate": 3e-3, "steps": 1200, "patience": 0}

    def model_config(self, model: str, size: str) -> Config:
        """Sizes of a model for this vocabulary, as `seq2seq.tasks.text_models.text_config`."""
        return text_config(model, size, SIZES, self.subwords.size)

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """BLEU and chrF of the whole corpus, with sacreBLEU's defaults.

        Raises:
            DataUnavailableError: when sacrebleu is not installed.
        """
        sacrebleu = optional("sacrebleu", "BLEU needs")
        return {
            "BLEU": float(sacrebleu.corpus_bleu(outputs, [references]).score),
            "chrF": float(sacrebleu.corpus_chrf(outputs, [references]).score),
        }

    def baselines(self, examples: Sequence[TextExample]) -> dict[str, float]:
        """Scores of handing the source back: names and placeholders are the same in both languages."""
        copied = self.score([example.source for example in examples], [example.target for example in examples])
        return {f"{name} of the source copied": value for name, value in copied.items()}


@takes_options(own=("encoding",), along=("language",))
def load(
    path: Path | str | None = None,
    *,
    encoding: str = ENCODING,
    language: str = "de",
    vocabulary: int = 2000,
    max_source: Count = 64,
    max_target: Count = 64,
) -> TranslationTask:
    """The task on the catalogues, or on a user's file.

    Args:
        path: TSV of source<TAB>target, or JSON lines with `source` and `target`; the catalogues when None.
        encoding: of the file.
        language: of the catalogues, `de` or `fr`.
        vocabulary: most tokens, for both languages together.
        max_source: most tokens of a source.
        max_target: most tokens of a target.

    Raises:
        DataError: when the file cannot be used.
        DataUnavailableError: when Django or tokenizers is needed and not installed.
        ValueError: for another language, or a size out of range.
    """
    if path is None:
        if language not in LANGUAGES:
            msg = f"language is {language!r}, expected one of {', '.join(LANGUAGES)}"
            raise ValueError(msg)
        pairs, origin = list(catalogue_pairs(language)), f"English-{LANGUAGES[language]} catalogues of Django"
    else:
        pairs, origin = read_pairs(Path(path), ("source", "target"), encoding), str(path)
    return TranslationTask.from_pairs(
        pairs, origin, vocabulary=vocabulary, max_source=max_source, max_target=max_target
    )


restore = TranslationTask.from_state
