"""Inspects an own model before anything is measured, by calling it on the user's inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from seq2seq.own_model import checks, lstms, operators
from seq2seq.own_model.errors import OwnModelError, told
from seq2seq.own_model.inputs import Given, InputSet, held, staying
from seq2seq.own_model.lstms import CallLook
from seq2seq.own_model.model import OwnModel, returned_loss
from seq2seq.own_model.onnx_file import OnnxModel
from seq2seq.own_model.saved import Form
from seq2seq.own_model.workload import OwnConfig, OwnWorkload, batch_of


def checked(name: str, own: OwnModel, inputs: InputSet) -> OwnWorkload:
    """The workload of a set, after the checks and with what they found."""
    given = batch_of(inputs, 0)
    call = functools.partial(own.call, own.model)
    with torch.inference_mode():
        try:
            checks.bind(own.model, given)
            aliased = checks.check_calls(call, own.model, given, checks.EVALUATION)
        except OwnModelError as error:
            msg = f"{error}{inputs.doubt}"
            raise OwnModelError(msg) from error
        with lstms.watched(own.uses):
            result = call(given)
        if own.metric is not None:
            own.score_of(result, given)
    if own.form is not None:
        return _checked_program(name, own, inputs, aliased)
    used = [use for use in own.uses if use.calls]
    if not used:
        msg = f"none of the LSTMs of {type(own.model).__name__} runs with the inputs given: {own.uses[0].name}"
        raise OwnModelError(msg)
    busiest = max(used, key=lambda use: use.steps)
    if not busiest.steps:
        read = f"{busiest.name or '(the model itself)'} reads {busiest.batch} sequences of {busiest.longest} steps"
        msg = f"with the inputs given, the LSTM {read}, so nothing can be measured; give inputs that are not empty"
        raise OwnModelError(msg)
    parameters = sum(parameter.numel() for parameter in own.model.parameters() if parameter.requires_grad)
    found = OwnWorkload(
        name,
        own,
        inputs,
        OwnConfig(tuple(use.stack for use in used), parameters),
        used[0].batch,
        used[0].longest,
        busiest.steps,
        any(use.packed for use in used),
        held(given),
        aliased,
    )
    if torch.cuda.is_available():
        found = dataclasses.replace(found, stays=staying(inputs, "cuda"))
    found = dataclasses.replace(found, held=found.held | _untakable(call, given, found.held))
    untrained, notes = _training(own, given)
    return dataclasses.replace(found, narrow=_narrow(own, given), untrained=untrained, notes=notes)


def _checked_program(name: str, own: OwnModel, inputs: InputSet, aliased: frozenset[str]) -> OwnWorkload:
    """The workload of a saved program: its LSTMs are the operators of a call, and it is not trained."""
    given = batch_of(inputs, 0)
    call = functools.partial(own.call, own.model)
    with torch.inference_mode():
        nodes = own.model.lstms() if isinstance(own.model, OnnxModel) else None
        found = operators.found_operators(lambda: call(given)) if nodes is None else nodes
    own.operators[name] = found
    shape = next((leaf.shape for leaf in given.tensors().values() if leaf.dim()), torch.Size((1,)))
    first = next((entry for entry in found if entry["batch"]), {"batch": shape[0], "steps": [*shape, 1][1]})
    return OwnWorkload(
        name,
        own,
        inputs,
        OwnConfig((), sum(parameter.numel() for parameter in own.model.parameters())),
        first["batch"],
        first["steps"],
        max((entry["batch"] * entry["steps"] for entry in found if entry["batch"]), default=shape.numel()),
        any(entry["packed"] for entry in found),
        held(given) | _untakable(call, given, held(given)),
        aliased,
        narrow=_narrow(own, given),
        untrained=f"{own.form} has the mode it was saved in and is not trained",
    )


def _untakable(call: Callable[[Given], Any], given: Given, fixed: frozenset[str]) -> frozenset[str]:
    """Inputs that the model does not take with other content than the user's: it raises, or gives infinite results."""
    every = frozenset(given.tensors())
    refused = set()
    with torch.inference_mode():
        usual = checks.outputs_of(call(given)).keys()
        for name in every - fixed:
            alone = dataclasses.replace(given, held=every - {name}).varied(torch.Generator().manual_seed(1))
            try:
                outputs = checks.outputs_of(call(alone))
            except OwnModelError:
                refused.add(name)
                continue
            broken = any(value.is_floating_point() and bool(value.isnan().any()) for value in outputs.values())
            if broken or outputs.keys() - usual:
                refused.add(name)
    return frozenset(refused)


def _narrow(own: OwnModel, given: Given) -> str:
    """Reason why the model does not run in float64, or empty."""
    model = own.fresh().eval().double()
    try:
        with torch.inference_mode():
            result = own.call(model, given.to("cpu", torch.float64))
    except OwnModelError as error:
        return str(error)
    for name, value in checks.outputs_of(result).items():
        if value.dtype in {torch.float32, torch.float16, torch.bfloat16}:
            return f"{name} is still {str(value.dtype).removeprefix('torch.')}: the model casts inside"
    return ""


def _training(own: OwnModel, given: Given) -> tuple[str, str]:
    """Reason why the model cannot be trained here, or empty; and what was changed for it, in words."""
    model = own.fresh().train()
    changed = checks.without_dropout(model)
    notes = f"dropout set to 0 ({', '.join(changed)}): variants draw different numbers" if changed else ""
    if own.loss is None:
        try:
            found = returned_loss(own.call(model, given.copy()))
        except OwnModelError as error:
            return str(error), ""
        if found is None or not found.requires_grad:
            return "no loss: give --loss FILE.py:FUNCTION, or a model that returns one under the name loss", ""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return "no weight of the model requires a gradient", ""

    def step(inputs: Given) -> Any:
        model.zero_grad(set_to_none=True)
        result = own.call(model, inputs)
        loss = own.loss_of(result, inputs)
        if not bool(loss.isfinite()):
            msg = f"the loss is {float(loss)} with the inputs given, so nothing can be trained"
            raise OwnModelError(msg)
        with told(f"the backward pass of {own.spec.model}"):
            loss.backward()
        return {"loss": loss.detach(), "outputs": result}

    try:
        checks.check_calls(step, model, given, checks.TRAINING)
    except OwnModelError as error:
        # Who gives a loss wants it trained.
        if own.loss is not None:
            msg = f"{error}; without --loss, inference alone is measured"
            raise OwnModelError(msg) from error
        return str(error), ""
    return "", notes


def looked_at(workload: OwnWorkload) -> dict[str, CallLook]:
    """Time of a call and the share of it that the LSTMs take, by mode, measured here and now."""
    own, given = workload.own, workload.make_batch(0)
    if own.form is not None:
        # Only the truth runs an ONNX file in torch, and no variant.
        if own.form is Form.ONNX:
            return {}
        with torch.inference_mode():
            return {"inference": operators.operator_look(lambda: own.call(own.model, given))}
    args, kwargs = given.args, given.kwargs
    with torch.inference_mode(), told(f"calling the model of {own.spec.model}"):
        found = {"inference": lstms.look(lambda: own.model(*args, **kwargs), own.uses)}
    if not workload.untrained:
        model = own.fresh().train()
        checks.without_dropout(model)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            own.loss_of(own.call(model, given), given).backward()

        found["training"] = lstms.training_look(step, lstms.find(model))
    return found
