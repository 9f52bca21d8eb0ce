"""All steps of a decoder that is fed what it found, in one native call: for eager inference."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.common.fast_path import unwatched
from kernels.cpu import decoder
from kernels.cpu.decoder import FedState, Memory
from kernels.dispatch import CPU, Choice
from kernels.lstm import LSTM
from seq2seq.layers.padding import Reader
from seq2seq.models.attention import AttentionSeq2Seq
from seq2seq.models.attention_layer import Attention

#: What the native call does in a model's place.
_REPLACED = ("_step_by_step", "_look", "_combined")


class FusedDecoder:
    """Runs all steps of an `AttentionSeq2Seq` whose decoder is fed; it has the arguments of the model's own loop.

    What it does not serve runs by the model's own loop: gradients, autocast, a compiler or tracer, other types than
    float32, dropout that acts, an LSTM that another kernel runs or that keeps its weights in fewer bits, modules with
    hooks or with a forward of their own, and lengths outside 1 to the steps.

    Args:
        model: changed weights take effect. Changes that torch does not count are looked for as `kernels.LSTM` does, in
            the layers of attention and combination too: in short calls a few single elements may go unnoticed.
    """

    def __init__(self, model: AttentionSeq2Seq) -> None:
        self.model = model

    @classmethod
    def into(cls, model: nn.Module) -> None:
        """Put it in the place of a model's own loop; models without a fed decoder of ours stay as they are."""
        if not isinstance(model, AttentionSeq2Seq) or not model.feeds or not isinstance(model.decoder.lstm, LSTM):
            return
        if all(getattr(type(model), name) is getattr(AttentionSeq2Seq, name) for name in _REPLACED):
            # Not by nn.Module's own __setattr__: what it holds is the module itself.
            model.__dict__["_step_by_step"] = cls(model)

    def __call__(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        """As `AttentionSeq2Seq._step_by_step`: what each step decoded; the state is brought to their end."""
        own = torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._runs_as_built()
        found = None if own else self._run(x, state, lengths)
        return AttentionSeq2Seq._step_by_step(self.model, x, state, lengths) if found is None else found  # noqa: SLF001 - it stands in for it

    def _runs_as_built(self) -> bool:
        """Return whether nothing sees or changes the calls of the modules that the native call stands in for."""
        model = self.model
        lstm, attention = cast("Any", model.decoder.lstm), model.attention
        if not isinstance(lstm, LSTM) or lstm.implementation != CPU or lstm.weight_storage != "fp32" or lstm.training:
            return False
        parts = (
            (model.decoder, Reader), (lstm, LSTM), (attention, Attention), (model.combine, nn.Linear),
            (attention.query, nn.Linear if attention.additive else nn.Identity),
        )  # fmt: skip
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:  # noqa: SLF001 - torch has no public name
            return False
        return all(
            # A parametrized module has a class of its own, with the same forward.
            type(part).forward is kind.forward
            and "forward" not in vars(part)
            and not part._forward_hooks  # noqa: SLF001
            and not part._forward_pre_hooks  # noqa: SLF001
            for part, kind in parts
        )

    def _run(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor | None:
        """All steps in one native call; None, and nothing done, for tensors that it does not serve."""
        model = self.model
        lstm, attention = cast("Any", model.decoder.lstm), model.attention
        # Each is read once: a parametrization computes it anew.
        layers = [lstm._parameters_of(layer)[0] for layer in range(lstm.num_layers)]  # noqa: SLF001 - of this project
        query = (attention.query.weight, attention.query.bias) if isinstance(attention.query, nn.Linear) else None
        combine, vector, scale = (model.combine.weight, model.combine.bias), attention.vector, attention.scale
        values, fed, mask = state["memory"].squeeze(0), state["fed"].squeeze(0), state.get("mask")
        keys = state["keys"].squeeze(0) if attention.projected else values
        given = [x, state["hidden"], state["cell"], fed, values, keys]
        given += [
            value for own in (*layers, query or (), combine, (vector, scale)) for value in own if value is not None
        ]
        if not _serves(given, mask, lengths):
            return None
        # Of a vector of zeros the factor is infinite, and the scores are NaN, as the model's own.
        factor = 1.0 if scale is None else float(scale if vector is None else scale / torch.linalg.vector_norm(vector))
        found, after = decoder.run(
            x,
            FedState(state["hidden"], state["cell"], fed),
            layers,
            Memory(
                values, keys, None if mask is None else mask.squeeze(0).expand(values.shape[:2]), query, vector, factor
            ),
            combine,
            None if lengths is None else lengths.to(torch.int64),
            feeds_context=model.feeds_context,
        )
        state["hidden"], state["cell"], state["fed"] = after.hidden, after.cell, after.fed.unsqueeze(0)
        # Not by nn.Module's own __setattr__, with which the LSTM drops what it prepared.
        lstm.__dict__["choices"] = (Choice(CPU, "in one call with its attention, all steps", {}),) * lstm.num_layers
        return found


def _serves(given: list[Tensor], mask: Tensor | None, lengths: Tensor | None) -> bool:
    """Return whether the native call can read these without conversion, and nothing else has to see its operators.

    Args:
        given: all that must be float32: x first, the state and the parameters.
        mask: of the memory.
        lengths: of x.
    """
    others = [value for value in (mask, lengths) if value is not None]
    if not unwatched([*given, *others]) or any(
        value.device.type != "cpu" or not value.numel() for value in (*given, *others)
    ):
        return False
    if any(value.dtype is not torch.float32 for value in given) or (mask is not None and mask.dtype is not torch.bool):
        return False
    if lengths is None:
        return True
    if lengths.dtype not in {torch.int64, torch.int32}:
        return False
    least, most = (int(value) for value in lengths.aminmax())
    return least >= 1 and most <= given[0].size(1)
