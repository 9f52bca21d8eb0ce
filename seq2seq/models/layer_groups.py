"""Fine-tuning a pre-trained model: which of its parameters train, chosen by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn


class PretrainedError(ValueError):
    """A model that cannot be loaded or fine-tuned as asked; the message is one line."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep parameters from training, and let all others train.

    Args:
        model: any.
        patterns: of parameters' names, with * and ? as in file names: `encoder.*`, `embed_*`.

    Returns:
        Names of the frozen parameters.

    Raises:
        PretrainedError: for a pattern that no name fits, and when nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(names, patterns)
    frozen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        msg = f"{', '.join(map(repr, patterns))} would freeze all parameters, and leave nothing to train"
        raise PretrainedError(msg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def check_patterns(names: Sequence[str], patterns: Iterable[str]) -> None:
    """Raise PretrainedError for a pattern that none of the parameters' names fits."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            msg = f"no parameter's name fits {pattern!r}; names begin with {', '.join(_parts(names))}"
            raise PretrainedError(msg)


def _parts(names: Sequence[str]) -> list[str]:
    """First words of dotted names, each once."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
