"""All steps of a decoder that is fed what it found, in one native call: for eager inference."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.common.fast_path import unwatched
from kernels.cpu import decoder
from kernels.cpu.decoder import FedState, Memory
from kernels.dispatch import Choice
from seq2seq.models.attention import AttentionSeq2Seq


class FusedDecoder:
    """Runs all steps of an `AttentionSeq2Seq` whose decoder is fed; it has the arguments of the model's own loop.

    What it does not serve runs by the model's own loop: gradients, autocast, a compiler or tracer, other types than
    float32, dropout that acts, and weights that its LSTM keeps in fewer bits.

    Args:
        model: with a `kernels.LSTM` as decoder. Nothing of it is copied, so changed weights take effect.
    """

    def __init__(self, model: AttentionSeq2Seq) -> None:
        self.model, self._own_loop = model, model._step_by_step  # noqa: SLF001 - it stands in for it

    @classmethod
    def into(cls, model: nn.Module) -> None:
        """Put it in the place of a model's own loop; models without a fed decoder stay as they are."""
        if isinstance(model, AttentionSeq2Seq) and model.feeds:
            # Not by nn.Module's own __setattr__: what it holds is the module itself.
            model.__dict__["_step_by_step"] = cls(model)

    def __call__(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        """As `AttentionSeq2Seq._step_by_step`: what each step decoded; the state is brought to their end."""
        model = self.model
        lstm, attention = cast("Any", model.decoder.lstm), model.attention
        layers = [lstm._parameters_of(layer)[0] for layer in range(lstm.num_layers)]  # noqa: SLF001 - of this project
        parameters = (
            [value for own in layers for value in own] + list(attention.parameters()) + list(model.combine.parameters())
        )
        if not self._serves([x, *state.values(), *parameters]):
            return self._own_loop(x, state, lengths)
        vector, scale = attention.vector, attention.scale
        factor = 1.0 if scale is None else float(scale)
        if vector is not None and scale is not None:
            factor /= float(torch.linalg.vector_norm(vector))
        query = (attention.query.weight, attention.query.bias) if isinstance(attention.query, nn.Linear) else None
        values = state["memory"][0]
        keys = state["keys"][0] if attention.projected else values
        found, after = decoder.run(
            x,
            FedState(state["hidden"], state["cell"], state["fed"][0]),
            layers,
            Memory(values, keys, state["mask"][0] if "mask" in state else None, query, vector, factor),
            (model.combine.weight, model.combine.bias),
            None if lengths is None else lengths.to(torch.int64),
            feeds_context=model.feeds_context,
        )
        state["hidden"], state["cell"], state["fed"] = after.hidden, after.cell, after.fed.unsqueeze(0)
        lstm.choices = (Choice("cpu-fused", "in one call with its attention, all steps", {}),) * lstm.num_layers
        return found

    def _serves(self, tensors: list[Tensor]) -> bool:
        lstm = cast("Any", self.model.decoder.lstm)
        if torch.is_grad_enabled() or lstm.weight_storage != "fp32" or not unwatched(tensors):
            return False
        kinds = {(value.dtype, value.device.type) for value in tensors}
        return kinds <= {(torch.float32, "cpu"), (torch.bool, "cpu")} and tensors[0].numel() > 0 and not lstm.training
