"""`replace_lstm`: put kernels.LSTM in place of every torch.nn.LSTM of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .lstm import LSTM
from .lstm_arguments import check_options


@dataclass(frozen=True)
class Replaced:
    """Result of `replace_lstm`.

    Attributes:
        model: the model; another object than was given only where that itself was a `torch.nn.LSTM`.
        swapped: names of the modules that are a `kernels.LSTM` now, every name of a shared one.
        kept: names of modules that look like an LSTM and were left alone, with the reason.
    """

    model: nn.Module
    swapped: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        """A table of names and what became of them."""
        rows = [(name, f"now {__package__}.LSTM") for name in self.swapped] + list(self.kept.items())
        if not rows:
            return "the model has no LSTM"
        width = max(len(_shown(name)) for name, _ in rows)
        return "\n".join(f"{_shown(name):{width}}  {text}" for name, text in rows)


def replace_lstm(
    model: nn.Module, implementation: str = "auto", *, fp32_precision: str | None = None, weight_storage: str = "fp32"
) -> Replaced:
    """Swap every `torch.nn.LSTM` inside a model, in place, for a `kernels.LSTM` with the same parameters.

    An optimizer that holds the parameters still holds them afterwards. Also carried over: training mode,
    `requires_grad`, hooks (their handles still remove them), attributes set on the module, and sharing: what was one
    module in several places is one module still. Not carried over: `module.compile()`, and references to the old
    module that are not registered as submodules, as in a plain list; `isinstance(m, nn.LSTM)` becomes false.

    Args:
        model: any module. An `nn.LSTM` has no place in which it could be swapped: take `.model` of the result.
        implementation: as for `kernels.LSTM`.
        fp32_precision: as for `kernels.LSTM`.
        weight_storage: as for `kernels.LSTM`; other than `fp32` it needs `implementation="cpu-fused"`.

    Returns:
        What was swapped, and what was not and why; as text, a table.

    Raises:
        ValueError: for an unknown implementation, precision or storage.
    """
    check_options(implementation, fp32_precision, 0, weight_storage)
    swapped: list[str] = []
    kept: dict[str, str] = {}
    made: dict[nn.Module, LSTM] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        reason = _refusal(module, implementation)
        if reason is not None:
            kept[name] = reason
        if reason is not None or type(module) is not nn.LSTM:
            continue
        if module not in made:
            made[module] = _twin(module, implementation, fp32_precision, weight_storage)
        swapped.append(name)
        if name:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent)._modules[own] = made[module]  # noqa: SLF001 - a setter may do more than set
        else:
            model = made[module]
    return Replaced(model, tuple(swapped), kept)


def _refusal(module: nn.Module, implementation: str) -> str | None:  # noqa: PLR0911 - one a reason
    """Reason why something that looks like an LSTM is left alone; None for what can be swapped, and for all else."""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") == "LSTM"
        return "is compiled by TorchScript; replace before scripting" if scripted else None
    if isinstance(module, LSTM):
        return "is a kernels.LSTM already"
    if type(module) is not nn.LSTM:
        if nn.utils.parametrize.is_parametrized(module) and isinstance(module, nn.LSTM):
            return "has parametrized weights, computed from others; remove the parametrizations first"
        if isinstance(module, nn.LSTM):
            return f"is {type(module).__qualname__}, a subclass of torch.nn.LSTM, which may compute something else"
        if type(module).__name__ == "LSTM":
            return f"is another LSTM, {type(module).__module__}.{type(module).__qualname__}"
        return None
    if set(module._parameters) != set(module._flat_weights_names):  # noqa: SLF001
        return "has weights computed from other parameters (weight norm, pruning); remove that first"
    if "forward" in module.__dict__:
        return "has a forward of its own set on the object"
    if module.proj_size and implementation != "vendor":
        return f"has proj_size={module.proj_size}, which no kernel has, so nothing would be gained"
    return None


def _twin(lstm: nn.LSTM, implementation: str, fp32_precision: str | None, weight_storage: str) -> LSTM:
    """A `kernels.LSTM` that has everything the other has; no weight is drawn or copied."""
    twin = LSTM.__new__(LSTM)
    # Dictionaries of hooks are shared, for that is where a hook's handle removes it from.
    twin.__dict__.update(lstm.__dict__)
    twin.__dict__.pop("_compiled_call_impl", None)
    for name in ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs"):
        twin.__dict__[name] = lstm.__dict__[name].copy()
    twin.implementation, twin.fp32_precision, twin.weight_storage = implementation, fp32_precision, weight_storage
    return twin


def _shown(name: str) -> str:
    return name or "(the model itself)"
