"""Fine-tuning a pre-trained model: parts frozen, rates by layer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

#: By how much a layer's rate is lower than that of the layer above it (Howard & Ruder 2018, section 3.2).
RATE_FACTOR = 2.6
#: Number of a layer in the name of a parameter: of a list of layers, or within one nn.LSTM.
_LAYER = re.compile(r"\.(\d+)\.|_l(\d+)(?:_reverse)?$")


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


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Names of the parameters, layer by layer in the order in which the model defines them: what it reads with first.

    A layer is one of a list, or of the layers within an LSTM, or else a part of the model as a whole.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name, _ in model.named_parameters():
        layer = _LAYER.search(name)
        # The name before the number distinguishes encoder from decoder in models that wrap both in one part.
        part = name[: layer.start()] if layer else ".".join(name.split(".")[:-1])
        part = part.split(".weight")[0].split(".bias")[0]
        groups.setdefault((part, int(layer[1] or layer[2]) if layer else 0), []).append(name)
    return list(groups.values())


def parameter_groups(
    model: nn.Module, rate: float, *, factor: float = RATE_FACTOR, layers: Sequence[Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Parameters with a rate a layer, for a torch optimizer: the topmost gets `rate`, each below it `factor` less.

    Args:
        model: frozen parameters of it are left out; their layers keep their place.
        rate: of the topmost layer.
        factor: between neighbouring layers; 1 for one rate (Howard & Ruder 2018).
        layers: patterns of names, as for `freeze`, for each layer from the lowest up; `layer_groups` when None.

    Returns:
        Groups with `params`, `lr` and `names`, lowest layer first.

    Raises:
        PretrainedError: for a rate or factor out of range, and for a parameter in no layer or in two.
    """
    if not rate > 0 or not factor >= 1:
        msg = f"rate is {rate} and factor {factor}, expected a rate above 0 and a factor of at least 1"
        raise PretrainedError(msg)
    parameters = dict(model.named_parameters())
    if layers is None:
        chosen = layer_groups(model)
    else:
        chosen = [[n for n in parameters if any(fnmatch.fnmatchcase(n, p) for p in patterns)] for patterns in layers]
    for name in parameters:
        found = sum(name in names for names in chosen)
        if found != 1:
            msg = f"{name} is in {found} layers, expected each parameter in one"
            raise PretrainedError(msg)
    groups = []
    for depth, names in enumerate(reversed(chosen)):
        trained = [name for name in names if parameters[name].requires_grad]
        if trained:
            values = [parameters[name] for name in trained]
            groups.append({"params": values, "lr": rate / factor**depth, "names": trained})
    return groups[::-1]


def _parts(names: Sequence[str]) -> list[str]:
    """First words of dotted names, each once."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
