"""The own model of this process among workloads and variants: names, descriptions and findings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from seq2seq.execution.variant import DTYPES, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model import lstms
from seq2seq.own_model.errors import OwnModelError
from seq2seq.own_model.inspection import checked, looked_at
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.saved import saved_form
from seq2seq.own_model.source import PREFIX, digests, load, spec
from seq2seq.own_model.workload import OwnWorkload
from seq2seq.runtimes.runtime import digest_of
from seq2seq.workloads.registry import PROVIDERS
from seq2seq.workloads.workload import UnknownWorkloadError, Workload

#: What another process found of the workloads, by name; see `know`.
_known: dict[str, dict[str, Any]] = {}


def know(found: dict[str, dict[str, Any]]) -> None:
    """Take over what another process found of the workloads, so that nothing is called here before it is measured.

    Args:
        found: what `findings` gave as `checked`.
    """
    _known.update(found)


@functools.cache
def own_model() -> OwnModel:
    """The own model of this process.

    Raises:
        OwnModelError: where none was given, or it cannot be measured.
    """
    given = spec()
    if given is None:
        msg = "no model of your own was given; name it with --model FILE.py:FUNCTION"
        raise OwnModelError(msg)
    return OwnModel(given, trusted=bool(_known))


@functools.cache
def add_variants() -> tuple[str, ...]:
    """Put the variants of the user's own into the registry; returns their names.

    A function may say `make.precision = "bf16"`, so that its variant is judged by the limits of that.

    Raises:
        OwnModelError: for a name that is taken, or something that is not a function.
    """
    given = spec()
    for name, reference in (given.variants if given else {}).items():
        if name in VARIANTS:
            msg = f"--add-variant {name}: the suite has a variant of that name; give another: NAME=FILE.py:FUNCTION"
            raise OwnModelError(msg)
        make = load(reference)
        precision = getattr(make, "precision", "fp32")
        if not callable(make) or precision not in DTYPES:
            what = f"its precision is {precision!r}" if callable(make) else f"it is a {type(make).__name__}"
            msg = f"--add-variant {reference}: {what}, expected a function of the model, whose precision is one of "
            raise OwnModelError(msg + ", ".join(DTYPES))
        VARIANTS[name] = Variant(name, f"your own: {reference}", precision=precision, make=make)
    return tuple(given.variants) if given else ()


def names() -> list[str]:
    """Names of the workloads of this process's own model; empty without one."""
    return list(own_model().names) if spec() else []


def find(name: str) -> OwnWorkload:
    """The workload of a name, checked.

    Raises:
        UnknownWorkloadError: for a name that does not exist, an own model that cannot be measured, or overrides.
    """
    own = own_model()
    if name not in own.names:
        extra = "; its sizes are those of your inputs, so it takes no overrides" if "@" in name else ""
        msg = f"no workload is called {name!r}; there are {', '.join(own.names)}{extra}"
        raise UnknownWorkloadError(msg)
    return workload_of(own, name)


def workload_of(own: OwnModel, name: str) -> OwnWorkload:
    """The workload of one of an own model's names, checked when it is first asked for.

    Raises:
        OwnModelError: for whatever of it cannot be measured.
    """
    if name not in own.checked:
        inputs = own.names[name]
        found = _known.get(name)
        own.checked[name] = OwnWorkload.known(name, own, inputs, found) if found else checked(name, own, inputs)
    workload: OwnWorkload = own.checked[name]
    return workload


def entries() -> list[dict[str, Any]]:
    """Entries of the catalogue for the own model's workloads."""
    found = []
    for name in names():
        workload = find(name)
        facts = {key: getattr(workload, key) for key in ("name", "summary", "source", "data", "modes")}
        found.append(facts | {"input_set": workload.inputs.name, "weight": workload.inputs.weight})
    return found


def findings(tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Describe the own model for people and for plan.json: files, LSTMs, shares, what was held or changed.

    Args:
        tell: called with a line about each step before it begins.
    """
    own = own_model()
    sets = []
    for name in own.names:
        tell(f"checking {name}")
        workload = workload_of(own, name)
        tell(f"profiling {name}")
        looks = looked_at(workload)
        shares = {mode: look.share for mode, look in looks.items() if look.share is not None}
        with torch.inference_mode(), lstms.watched(own.uses):
            own.call(own.model, workload.make_batch(0))
        sets.append(
            {
                "workload": name,
                "input_set": workload.inputs.name,
                "weight": workload.inputs.weight,
                "lstms": own.operators.get(name, []) if own.form else [use.facts() for use in own.uses],
                "call_s": {mode: look.call_s for mode, look in looks.items()},
                "lstm_share": shares,
                "speedup_at_most": {mode: lstms.gain_limit(share) for mode, share in shares.items()},
                "checked": workload.found(),
            }
        )
    return {
        "model": own.spec.model,
        "saved": saved_form(own.spec.model),
        "parameters": sum(parameter.numel() for parameter in own.model.parameters()),
        "cells": lstms.cells(own.model),
        "unregistered": lstms.unregistered(own.model),
        "sets": sets,
        "files": digests(own.spec) | {f"{own.spec.model} (weights)": digest_of(own.model.state_dict()).hex()[:64]},
    }


# It has all that is asked of a workload.
PROVIDERS[PREFIX] = cast("Callable[[str], Workload]", find)
