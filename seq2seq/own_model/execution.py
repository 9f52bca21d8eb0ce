"""An own model executed as a variant says; the baseline is the model as its user runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.execution.executable import Executable, execute, own_code
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import REFERENCE
from seq2seq.models.base import Config
from seq2seq.models.weights import Weights
from seq2seq.own_model import checks, lstms
from seq2seq.own_model.errors import OwnModelError, told
from seq2seq.own_model.inputs import Given
from seq2seq.own_model.runtimes import Converted
from seq2seq.own_model.workload import OwnWorkload


@execute.register(OwnWorkload)
def execute_own(
    workload: OwnWorkload, variant: Variant, mode: str, device: str, weights: Weights, *, stored: bool | None = None
) -> OwnExecutable:
    """A variant built for an own model; see `execute`."""
    return OwnExecutable(workload, as_users_run(variant), mode, device, weights, stored=stored)


def as_users_run(variant: Variant) -> Variant:
    """The variant for an own model: the user's own call leaves torch's settings as they are."""
    return dataclasses.replace(variant, vendor_lstm=True) if variant.name == REFERENCE.name else variant


class OwnExecutable(Executable):
    """Executable for inputs and outputs of any form.

    Attributes:
        workload: whose model it is.
        kept: why LSTMs of the model were not replaced, by name.

    Args:
        workload: as above.
        variant: the way to execute.
        mode: `inference` or `training`.
        device: `cpu` or `cuda`.
        weights: fp32 state_dict to start from.
        stored: as for `Executable`.
    """

    def __init__(
        self,
        workload: OwnWorkload,
        variant: Variant,
        mode: str,
        device: str,
        weights: Weights,
        *,
        stored: bool | None = None,
    ) -> None:
        self.workload = workload
        self.kept: dict[str, str] = {}
        self._made: Callable[..., Any] | None = None
        # What a user made casts by itself, whatever its precision.
        stored = False if variant.make is not None else stored
        super().__init__(variant, workload.config, mode, device, weights, stored=stored)  # type: ignore[arg-type]
        self._autocast = self._autocast and variant.make is None

    def _build(self, config: Config) -> nn.Module:
        del config
        model = self.workload.own.build()
        if self.mode == "training":
            checks.without_dropout(model)
        model, self.kept = lstms.replaced(model, self.variant)
        return model

    def _make_runtime(self) -> Converted | None:  # type: ignore[override]
        return Converted(self.model, self.variant) if self.variant.runtime is not None else None

    def _compile(self, model: nn.Module) -> Callable[..., Any]:
        if self.runtime is not None:
            return self.runtime
        if self.variant.make is not None:
            self._remake()
            return self._call_made
        if self.variant.compiler == "torchscript":
            scripted: Callable[..., Any] = torch.jit.script(model)
            return scripted
        if self.variant.compiler == "dynamo":
            # As a user compiles it, but for code of its own: see `own_code`.
            model.forward = own_code(model.forward)
            compiled: Callable[..., Any] = torch.compile(model, **self.variant.compile_options)
            return compiled
        return model

    def _compile_steps(self, model: Any) -> Any:
        return model

    def _remake(self) -> None:
        """Make what a variant of the user's own calls, from the model with the weights that it has now."""
        assert self.variant.make is not None  # noqa: S101 - asked before
        with told(f"the added variant {self.variant.name}"):
            made: Any = self.variant.make(self.model)
        if not callable(made):
            msg = f"the added variant {self.variant.name} returned a {type(made).__name__}, expected a module or "
            raise OwnModelError(msg + "a function that is called as the model is")
        self._made = made

    def _call_made(self, *args: Any, **kwargs: Any) -> Any:
        return self._made(*args, **kwargs)  # type: ignore[misc]

    def _shares_weights(self) -> bool:
        """Return whether what the user made reads the model's own weights, so that new ones need no new making."""
        if not isinstance(self._made, nn.Module):
            return False
        own = {id(value) for value in self.model.parameters()}
        return own == {id(value) for value in self._made.parameters()}

    def prepare(self, batch: Any) -> Any:
        """The inputs on this executable's device, in the type that its model reads."""
        return batch.to(self.device, self.variant.dtype if self._stored else None)

    def forward(self, batch: Any) -> Any:
        """One call of the model, under autocast where the variant says so; call it inside `context`."""
        with self.casting():
            return self._run(*batch.args, **batch.kwargs)

    def loss(self, result: Any, batch: Any) -> Tensor:
        """The user's loss, or the one that the model returned; under autocast, as users who cast compute it."""
        with self.casting():
            return self.workload.own.loss_of(result, batch)

    def named(self, result: Any) -> dict[str, Tensor]:
        """The leaves of what a call returned by path, but for those that nothing computes."""
        if self.mode == "training":
            return {"loss": result}
        found = checks.outputs_of(result)
        return {name: value for name, value in found.items() if name not in self.workload.aliased}

    def completed(self, found: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Nothing follows from the outputs of a call."""
        del batch
        return found

    def remarks(self, batch: Any) -> dict[str, Any]:
        """The score of a call, where the user has a metric."""
        own = self.workload.own
        if own.metric is None or self.mode != "inference":
            return {}
        return {"metric": own.score_of(self.forward(batch), batch)}

    def words(self) -> list[str]:
        """Remarks besides what ran: LSTMs that were not replaced, dropout switched off, a truth in float32."""
        found = [f"{name} is the model's own LSTM still: {reason}" for name, reason in self.kept.items()]
        if self.mode == "training" and self.workload.notes:
            found.append(self.workload.notes)
        if self.workload.narrow:
            found.append(f"truth in float32, limits wider: {self.workload.narrow}")
        return found

    def quantities(self, batch: Any, *, together: bool = False, of_inputs: bool = True) -> dict[str, Tensor]:
        """Everything the gate compares, by name: outputs and, in training, the loss and all gradients."""
        real = batch.real()
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        with self.context():
            if self.mode != "training":
                return {name: value.clone() for name, value in self.named(self.forward(batch)).items()}
            watched, leaves = self._watched(batch)
            if together:
                return self._trained(watched, parameters | leaves)
            found = self._trained(batch, parameters)
            # A pass of its own, as in `Executable`: compiled for inputs that take gradients, it is another graph.
            if real and of_inputs:
                again = self._trained(watched, leaves)
                found |= {f"grad {name}": again[f"grad {name}"] for name in leaves}
        return found

    def _watched(self, batch: Given) -> tuple[Given, dict[str, Tensor]]:
        """The batch with real inputs that take gradients, and those inputs by path."""
        real = set(batch.real())
        aliases = batch.changed(lambda name, leaf: leaf.detach().requires_grad_() if name in real else leaf)
        return aliases, {name: leaf for name, leaf in aliases.tensors().items() if name in real}

    def _trained(self, batch: Given, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        result = self.forward(batch)
        loss = self.loss(result, batch)
        found = {name: value for name, value in checks.outputs_of(result).items() if name not in self.workload.aliased}
        found |= {"loss": loss} | self._gradients(loss, leaves)
        return {name: value.detach().clone() for name, value in found.items()}

    def load(self, weights: Weights) -> None:
        """Overwrite the weights in place; what was converted or made from a copy of them is made again."""
        super().load(weights)
        if self._made is None or self._shares_weights():
            return
        reload = getattr(self._made, "reload", None)
        # What converts at its first call must do so now, or a timed call would pay for it.
        (reload or self._remake)()

    def weights(self) -> Weights:
        """A copy of the current state, on the CPU; what is real in fp32."""
        return {
            name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().clone()
            for name, value in self.model.state_dict().items()
            if isinstance(value, Tensor)
        }
