"""Made-up news and their summaries, for want of a real corpus that installs.

A document is a list of reports made of one template. Some of the reports in its first two thirds are marked as
important; the summary is these, in order, cut down to who did what where.
"""

from __future__ import annotations

import random

from seq2seq.data.text_pairs import Pair

_MARKS = ("Above all", "Most importantly", "In the main news", "Of all things")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_KINDS = ("old", "new", "local", "famous", "small", "private", "young", "national", "cautious", "popular")
_WHO = (
    *("council", "court", "museum", "school", "bank", "union", "company", "mayor", "police", "theatre"),
    *("hospital", "railway", "university", "newspaper", "club", "farmers", "parliament", "church"),
)
_WHERE = (
    *("Lisbon", "Bremen", "Oslo", "Turin", "Cork", "Graz", "Lyon", "Malmo", "Porto", "Ghent"),
    *("Basel", "Krakow", "Tallinn", "Split", "Seville", "Leeds", "Tartu", "Kos"),
)
_DID = (
    *("opened", "closed", "bought", "sold", "praised", "rejected", "rebuilt", "lost", "found", "promised"),
    *("delayed", "defended", "copied", "painted"),
)
_WHAT = (
    *("bridge", "budget", "archive", "garden", "contract", "harbour", "library", "statue", "tunnel", "law"),
    *("festival", "market", "ferry", "tower", "report", "school bus", "football ground", "clock"),
)


def make_news(documents: int, sentences: int, seed: int = 0) -> list[Pair]:
    """Documents and their summaries; equal arguments give equal texts.

    At 32 sentences a document has some 370 words, about as many as See et al. 2017 cut theirs to, a summary some 30.

    Args:
        documents: how many.
        sentences: of each document; a fifth of them, at least one, are important.
        seed: of the choices.

    Raises:
        ValueError: when documents or sentences is below 1.
    """
    if documents < 1 or sentences < 1:
        msg = f"documents is {documents} and sentences {sentences}, expected at least 1 each"
        raise ValueError(msg)
    choices = random.Random(seed)  # noqa: S311 - no secret
    return [_document(choices, sentences) for _ in range(documents)]


def _document(choices: random.Random, sentences: int) -> Pair:
    important = set(choices.sample(range(max(1, 2 * sentences // 3)), max(1, sentences // 5)))
    document, summary = [], []
    for place in range(sentences):
        who, where, did, what = (choices.choice(words) for words in (_WHO, _WHERE, _DID, _WHAT))
        day, kind = choices.choice(_DAYS), choices.choice(_KINDS)
        start = f"{choices.choice(_MARKS)}, on {day}" if place in important else f"On {day}"
        document.append(f"{start} the {kind} {who} of {where} {did} the {choices.choice(_KINDS)} {what}.")
        if place in important:
            summary.append(f"{who} of {where} {did} {what}.")
    return " ".join(document), " ".join(summary)
