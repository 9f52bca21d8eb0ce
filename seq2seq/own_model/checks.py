"""Requirements of an own model: the same call gives the same result, and inputs are not changed.

Each check calls the user's eager model a few times and refuses in one line that names what was found.
"""

from __future__ import annotations

import inspect
import pickle
import random
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seq2seq.own_model import leaves
from seq2seq.own_model.errors import OwnModelError, is_users
from seq2seq.own_model.inputs import PATH, Given

#: Attributes of every module that are torch's own, or that are looked at under other names.
_TORCHS = set(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_is_full_backward_hook"}
OUTPUT = "output"
#: Most calls that are compared with the first, and the seconds after which fewer are enough if nothing is drawn.
_CALLS, _ENOUGH_S = 16, 1.0


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The leaves of a result by path.

    Raises:
        OwnModelError: for one that cannot be compared.
    """
    try:
        return leaves.comparable(result, OUTPUT)
    except TypeError as error:
        msg = f"{error}, which cannot be compared; return tensors, numbers or strings, in tuples, dicts or dataclasses"
        raise OwnModelError(msg) from error


def check_calls(call: Callable[[Given], Any], model: nn.Module, given: Given, mode: str) -> frozenset[str]:
    """Refuse a model that does not give the same for the same call, or that changes its inputs.

    Args:
        call: one call of the model with inputs.
        model: itself, whose state is watched.
        given: the inputs.
        mode: what the call is, in words: `in eval mode`.

    Returns:
        Paths of the outputs that share memory with inputs or weights: nothing computes them.

    Raises:
        OwnModelError: naming what was found.
    """
    own = given.copy()
    before = dict(leaves.flatten(own.copy().value, PATH))
    # The first call may fill caches, of positions for example; those are not state.
    result = call(own)
    if change := _changed(before, dict(leaves.flatten(own.value, PATH))):
        msg = f"the model {change} in place; work on a copy"
        raise OwnModelError(msg)
    outputs = _compared(result)
    if broken := next((name for name, value in outputs.items() if _holds_nan(value)), ""):
        whose = next((name for name, value in own.tensors().items() if _holds_nan(value) or value.isinf().any()), "")
        why = f"; {whose} holds NaN or infinite values itself" if whose else ""
        msg = f"{broken} holds NaN with the inputs given{why}, so nothing can be compared; give inputs that the model "
        raise OwnModelError(msg + "takes")
    _check_repeats(lambda: outputs_of(call(own)), model, mode)
    return _aliases(result, own, model)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say what a call does to its inputs, by the first leaf that is another one afterwards; empty for nothing."""
    for name in {**before, **after}:
        if name not in after:
            return f"takes {name} out of its inputs"
        if name not in before:
            return f"adds {name} to its inputs"
        one, two = before[name], after[name]
        watched = isinstance(one, (Tensor, np.ndarray, *leaves.PLAIN))
        if watched and not _same(one, two):
            return f"changes its input {name}"
    return ""


def _compared(result: Any) -> dict[str, Tensor]:
    """The leaves of a result by path.

    Raises:
        OwnModelError: for a result in which nothing is computed that variants could be compared by.
    """
    found = outputs_of(result)
    if not any(isinstance(leaf, Tensor) or leaves.is_number(leaf) for _, leaf in leaves.flatten(result, OUTPUT)):
        what = ", ".join(found) or f"output is an empty {type(result).__name__}"
        msg = f"the model returns neither tensors nor numbers, so nothing can be compared: {what}; return what it "
        raise OwnModelError(msg + "computes")
    return found


def _holds_nan(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isnan().any())


def _check_repeats(call: Callable[[], Mapping[str, Tensor]], model: nn.Module, mode: str) -> None:
    """Refuse a model whose result is another one for the same call.

    Two calls show state and noise. A coin thrown in a call often falls alike twice, so it is called more often.

    Raises:
        OwnModelError: naming what was found.
    """
    first = _copied(call())
    state, drawn = _state(model), _generators()
    found = call()
    after, moved = _state(model), [name for name, value in _generators().items() if not _same(value, drawn[name])]
    changed = [name for name in after if name not in state or not _same(after[name], state[name])]
    end_s = time.perf_counter() + _ENOUGH_S
    for left in reversed(range(_CALLS)):
        if differs := next((name for name in {**first, **found} if not _alike(first, found, name)), ""):
            # State that is kept makes the next call differ; only without it are random numbers the reason.
            if changed:
                raise OwnModelError(_keeps(changed[0], differs))
            msg = f"{differs} differs at each call {mode} with the same inputs: {_random(call, moved)}"
            raise OwnModelError(msg)
        if changed or not left or (not moved and time.perf_counter() > end_s):
            break
        found = call()
    # What training changes of buffers, as the means of a batch norm, is not part of the result.
    if changed and mode != TRAINING:
        raise OwnModelError(_keeps(changed[0], ""))


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def _generators() -> dict[str, Any]:
    """State of the generators that models draw from, by what they are called."""
    return {
        "torch's generator": torch.default_generator.get_state(),
        "Python's generator": random.getstate(),
        "NumPy's generator": pickle.dumps(np.random.get_state(legacy=False)),  # noqa: NPY002 - that of models
    }


#: How a call in training is named in messages.
TRAINING, EVALUATION = "in training mode", "in eval mode"


def _keeps(name: str, differs: str) -> str:
    effect = f", and {differs} depends on it" if differs else ""
    return (
        f"the model keeps state between calls: {name} changes at each call{effect}; take the state as an argument and "
        "return it, and give it with the inputs"
    )


def _alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str) -> bool:
    return name in first and name in second and _same(first[name], second[name])


def _same(one: Any, two: Any) -> bool:
    """Return whether two leaves are equal, a NaN equal to a NaN: missing values stand for themselves."""
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        return torch.equal(one, two) or bool(((one == two) | (one.isnan() & two.isnan())).all())
    if type(one) is not type(two):
        return False
    return bool(one == two) or bool(one != one and two != two)  # noqa: PLR0124 - a NaN


def _state(model: nn.Module) -> dict[str, Any]:
    """Buffers, and all attributes that hold tensors or plain values, by name, tensors copied."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        kept = dict(module.named_buffers(recurse=False))
        kept |= {name: value for name, value in vars(module).items() if name not in _TORCHS}
        for name, value in kept.items():
            path = f"{prefix}.{name}" if prefix else name
            for leaf_path, leaf in leaves.flatten(value, path):
                if isinstance(leaf, Tensor):
                    found[leaf_path] = leaf.detach().clone()
                elif isinstance(leaf, leaves.PLAIN):
                    found[leaf_path] = leaf
    return found


def _aliases(result: Any, given: Given, model: nn.Module) -> frozenset[str]:
    theirs = {_memory(value) for value in (*given.tensors().values(), *model.parameters(), *model.buffers())}
    found = leaves.tensors(result, OUTPUT)
    aliased = frozenset(name for name, value in found.items() if value.numel() and _memory(value) in theirs)
    if found and aliased == found.keys():
        msg = f"{next(iter(found))} is an input or a weight itself, and nothing else is returned: nothing is computed"
        raise OwnModelError(msg)
    return aliased


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class _RandomOps(TorchDispatchMode):
    """Finds the first operator that draws random numbers, and the user's line that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # By the generator's state: torch marks every LSTM as one that may draw.
        before = torch.default_generator.get_state()
        result = function(*args, **(kwargs or {}))
        if not self.found and not torch.equal(before, torch.default_generator.get_state()):
            frames = [frame for frame in traceback.extract_stack() if is_users(frame.filename)]
            place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            self.found = f"{function.overloadpacket}{place} draws random numbers"
        return result


def _random(call: Callable[[], object], moved: list[str]) -> str:
    """Reason why the result of a call is not that of the same call before, and what to do.

    Args:
        call: the call.
        moved: generators that it draws from.
    """
    with _RandomOps() as seen:
        call()
    if seen.found:
        return f"{seen.found}; switch it off outside of training (`self.training`), or draw with the inputs"
    if moved:
        return f"it draws random numbers from {moved[0]}; switch that off, or take them as an input"
    msg = "it depends on something outside of the model, such as a global variable, the clock or a generator of its own"
    return f"{msg}; take it as an input"


def without_dropout(model: nn.Module) -> list[str]:
    """Set every dropout of a model to 0, since variants draw different numbers; returns what was changed, in words."""
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:  # noqa: SLF001 - their common base
            changed.append(f"{name} {module.p:g}")
            module.p = 0.0
        elif isinstance(module, nn.RNNBase) and module.dropout:
            changed.append(f"{name} {module.dropout:g}")
            module.dropout = 0.0
    return changed


def check_loads(build: Callable[[], nn.Module], model: nn.Module, reference: str) -> None:
    """Refuse a function that builds another model at each call, and one that is not in float32.

    Raises:
        OwnModelError: naming the first weight that differs.
    """
    if lazy := next((name for name, value in model.named_parameters() if nn.parameter.is_lazy(value)), ""):
        msg = f"{reference}: the weight {lazy} has no size yet; call the model once where it is built"
        raise OwnModelError(msg)
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            msg = (
                f"{reference}: the weight {name} is {str(value.dtype).removeprefix('torch.')}, expected float32; build "
            )
            raise OwnModelError(msg + "the model in float32, since the variants choose the precision")
    again = build().state_dict()
    state = model.state_dict()
    differs = next((n for n in {**state, **again} if not _alike(state, again, n)), None)
    if differs is not None:
        msg = f"{reference} builds another model at each call, though the generators of torch, random and numpy start "
        msg += f"alike: {differs} differs; load the weights from a file, or draw them from torch's generator"
        raise OwnModelError(msg)


def bind(model: nn.Module, given: Given) -> None:
    """Refuse inputs that do not fit the parameters of the model's forward.

    Raises:
        OwnModelError: naming what is missing or too much.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*given.args, **given.kwargs)
    except TypeError as error:
        msg = f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        raise OwnModelError(msg) from error
