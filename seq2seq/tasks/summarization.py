"""Summarisation: documents and summaries of a user's TSV or JSON lines, or synthetic ones of cited lengths.

No real corpus installs from a package index. The synthetic documents are news made of templates: the reports marked as
important make up the summary, in fewer words. So there is something to learn that copying the lead does not give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from seq2seq.data.errors import optional
from seq2seq.data.options import Count, takes_options
from seq2seq.data.synthetic_news import make_news
from seq2seq.data.text_file import ENCODING
from seq2seq.data.text_pairs import read_pairs
from seq2seq.models.base import Config
from seq2seq.tasks.text import TextExample, TextTask
from seq2seq.tasks.text_models import TextSizes, text_config

SIZES = {
    "small": TextSizes(embedding=64, hidden=128, layers=1, dropout=0.0),
    # abisee/pointer-generator: embedding 128, bidirectional 256, one layer
    "full": TextSizes(embedding=128, hidden=256, layers=1, dropout=0.0),
}
#: Sentences of the lead, which is the usual baseline on news.
LEAD_SENTENCES = 3

_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[^\W_]+")


class SummarizationTask(TextTask):
    """Pairs of document and summary, judged by ROUGE; from 0 to 100."""

    name: ClassVar[str] = "summarization"
    quality: ClassVar[str] = "ROUGE-L"
    defaults: ClassVar[Mapping[str, float]] = {"batch": 32, "learning_rate": 4e-3, "steps": 1500, "patience": 0}

    def model_config(self, model: str, size: str) -> Config:
        """Sizes of a model for this vocabulary, as `seq2seq.tasks.text_models.text_config`."""
        return text_config(model, size, SIZES, self.subwords.size)

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, on words of letters and digits of any script, not stemmed.

        Raises:
            DataUnavailableError: when rouge-score is not installed.
        """
        scorers = optional("rouge_score.rouge_scorer", "ROUGE needs")
        # Its own words are made of a to z alone: a summary in Greek would score 0 against itself.
        scorer = scorers.RougeScorer(list(_ROUGE.values()), tokenizer=_Words())
        scores = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
        return {name: 100 * sum(score[key].fmeasure for score in scores) / len(scores) for name, key in _ROUGE.items()}

    def baselines(self, examples: Sequence[TextExample]) -> dict[str, float]:
        """Scores of a document's first three sentences."""
        leads = [" ".join(_SENTENCE_END.split(example.source)[:LEAD_SENTENCES]) for example in examples]
        scores = self.score(leads, [example.target for example in examples])
        return {f"{name} of the first {LEAD_SENTENCES} sentences": value for name, value in scores.items()}


@takes_options(own=("encoding", "keys"), along=("documents", "sentences"))
def load(  # noqa: PLR0913 - options of a command line
    path: Path | str | None = None,
    *,
    encoding: str = ENCODING,
    keys: str = "document,summary",
    vocabulary: int = 2000,
    max_source: Count = 400,
    max_target: Count = 100,
    documents: Count = 2000,
    sentences: Count = 32,
) -> SummarizationTask:
    """The task on a user's file, or on synthetic documents.

    Args:
        path: TSV of document<TAB>summary, or JSON lines; synthetic documents when None.
        encoding: of the file.
        keys: names of document and summary in JSON lines, with a comma between them.
        vocabulary: most tokens, for documents and summaries together.
        max_source: most tokens of a document; 400 as in See et al. 2017.
        max_target: most tokens of a summary; 100 as there.
        documents: how many synthetic ones to make.
        sentences: of a synthetic document; 32 fill the 400 tokens.

    Raises:
        DataError: when the file cannot be used.
        DataUnavailableError: when tokenizers is not installed.
        ValueError: for a size out of range.
    """
    if path is None:
        pairs, origin = make_news(documents, sentences), "synthetic news"
    else:
        document, comma, summary = keys.partition(",")
        if not (document and comma and summary):
            msg = f"keys is {keys!r}, expected two names with a comma between them, like 'document,summary'"
            raise ValueError(msg)
        pairs, origin = read_pairs(Path(path), (document, summary), encoding), str(path)
    return SummarizationTask.from_pairs(
        pairs, origin, vocabulary=vocabulary, max_source=max_source, max_target=max_target
    )


restore = SummarizationTask.from_state


class _Words:
    """Tokenizer that RougeScorer takes a text apart with."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
