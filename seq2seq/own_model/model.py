"""The user's model and functions, built once a process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seq2seq.own_model import checks, lstms
from seq2seq.own_model.errors import OwnModelError, told
from seq2seq.own_model.inputs import Given, input_sets
from seq2seq.own_model.saved import form_of, saved_form, saved_inputs
from seq2seq.own_model.source import INPUTS, LOSS, METRIC, PREFIX, Spec, builder, load, names_function, parts


class OwnModel:
    """The user's model and functions, built once a process and checked.

    Args:
        given: what the command line says.
        trusted: whether another process has seen that it builds the same model each time.

    Raises:
        OwnModelError: for whatever of it cannot be measured.
    """

    def __init__(self, given: Spec, *, trusted: bool = False) -> None:
        self.spec = given
        self.build = builder(given.model)
        self.model = self.build().eval()
        #: Form of a saved program, which has no modules; None for a model with code.
        self.form = form_of(self.model)
        self.uses = [] if self.form else lstms.find(self.model)
        if self.form and given.loss:
            msg = (
                f"{given.model} is {self.form}, which has the mode it was saved in and is not trained; leave --loss "
                "out, or give the model's code: --model FILE.py:FUNCTION"
            )
            raise OwnModelError(msg)
        if not trusted:
            checks.check_loads(self.build, self.model, given.model)
        place, _ = parts(given.model)
        self.inputs_name = given.inputs or f"{place}:{INPUTS}"
        saved = saved_form(given.model)
        function: Any
        if saved and not given.inputs:
            self.inputs_name, function = f"the inputs in {place}", saved_inputs(Path(place), saved)
        else:
            function = load(self.inputs_name, INPUTS, option="" if given.inputs else "--inputs")
        if not callable(function):
            msg = f"{self.inputs_name} is a {type(function).__name__}, expected a function that returns the inputs"
            raise OwnModelError(msg)
        self.sets = input_sets(function, self.inputs_name, given.trace, self.model.forward)
        self.names = {f"{PREFIX}{given.label}" + (f"/{found.name}" if found.name else ""): found for found in self.sets}
        self.loss = self._function(given.loss, LOSS)
        self.metric = self._function(given.metric, METRIC)
        #: Workloads that were checked, by name.
        self.checked: dict[str, Any] = {}
        #: LSTM operators of a call of a saved program, by name of the workload.
        self.operators: dict[str, list[dict[str, Any]]] = {}
        #: Why a variant cannot execute the model, by names of workload (empty where it does not matter) and variant.
        self.refused: dict[tuple[str, str], str | None] = {}

    def _function(self, reference: str, default: str) -> Callable[[Any, Any], Any] | None:
        if not reference:
            return None
        option = "" if names_function(reference) else f"--{default}"
        found: Callable[[Any, Any], Any] = load(reference, default, option)
        try:
            inspect.signature(found).bind(None, None)
        except TypeError as error:
            msg = f"{reference} must take two arguments, the model's output and the inputs: {error}"
            raise OwnModelError(msg) from error
        except ValueError:
            pass
        return found

    def fresh(self) -> nn.Module:
        """Another copy of the model, with the same weights."""
        model = self.build()
        model.load_state_dict(self.model.state_dict())
        return model

    def call(self, model: nn.Module, given: Given) -> Any:
        """One call of a copy of the model; what the user's code raises is reported in one line."""
        with told(f"calling the model of {self.spec.model}"):
            return model(*given.args, **given.kwargs)

    def loss_of(self, result: Any, given: Given) -> Tensor:
        """The loss of a call: by the user's function, or the one that the model returns.

        Raises:
            OwnModelError: for what is not a loss.
        """
        if self.loss is not None:
            with told(f"{self.spec.loss}"):
                loss = self.loss(result, given.value)
            whose = f"{self.spec.loss} returned"
        else:
            loss, whose = returned_loss(result), "the model's own loss is"
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            kind = f"a {type(loss).__name__}"
            if isinstance(loss, Tensor):
                kind = f"a tensor of shape {tuple(loss.shape)}, {str(loss.dtype).removeprefix('torch.')}"
            several = "; return the sum of the losses" if isinstance(loss, (tuple, list, dict)) else ""
            msg = f"{whose} {kind}, expected one floating-point number as a tensor{several}"
            raise OwnModelError(msg)
        return loss.reshape(())

    def score_of(self, result: Any, given: Given) -> float:
        """The score of a call by the user's metric.

        Raises:
            OwnModelError: for what is not a finite number.
        """
        assert self.metric is not None  # noqa: S101 - asked before
        with told(f"{self.spec.metric}"):
            score = self.metric(result, given.value)
        try:
            found = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError, RuntimeError):
            found = math.nan
        if not math.isfinite(found):
            msg = f"{self.spec.metric} returned {_kind(score)}, expected one finite number"
            raise OwnModelError(msg)
        return found


def _kind(value: Any) -> str:
    """Name what a function returned in place of a number."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{float(value)}" if isinstance(value, (Tensor, float)) else f"a {type(value).__name__}"


def returned_loss(result: Any) -> Tensor | None:
    """The loss that a model returns: its output itself, or what its output has under the name `loss`."""
    if isinstance(result, Tensor):
        return result if result.dim() == 0 else None
    found = result.get("loss") if hasattr(result, "get") else getattr(result, "loss", None)
    return found if isinstance(found, Tensor) else None
