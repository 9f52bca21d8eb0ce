"""Checks of a config's fields, each of which raises one line that names the field and says what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from seq2seq.layers.likelihoods import LIKELIHOODS
from seq2seq.models.family_defaults import FamilyDefaults


def check_int(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError for a size that is not an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{name} is {value!r}, expected an integer"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} is {value}, expected at least {least}"
        raise ValueError(msg)


def check_ints(config: Any, least: int, *names: str) -> None:
    """Check fields of a config as `check_int` does; None passes where it is the default."""
    for name in names:
        value = getattr(config, name)
        if value is not None or config.__dataclass_fields__[name].default is not None:
            check_int(name, value, least)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known."""
    if value not in known:
        msg = f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}"
        raise ValueError(msg)


def check_likelihood(config: FamilyDefaults) -> None:
    """Raise ValueError for an unknown likelihood, or one of tokens."""
    check_choice("likelihood", config.likelihood, LIKELIHOODS)
    if config.likelihood and config.target_vocabulary:
        msg = f"likelihood {config.likelihood!r} is for real values, but the targets are tokens: leave it out"
        raise ValueError(msg)


def check_bool(name: str, value: object) -> None:
    """Raise TypeError for a flag that is not a bool."""
    if not isinstance(value, bool):
        msg = f"{name} is {value!r}, expected True or False"
        raise TypeError(msg)


def check_probability(name: str, value: object) -> None:
    """Raise TypeError or ValueError for what is not a probability below 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        msg = f"{name} is {value!r}, expected a number"
        raise TypeError(msg)
    if not 0 <= value < 1:
        msg = f"{name} is {value}, expected a probability of at least 0 and below 1"
        raise ValueError(msg)
