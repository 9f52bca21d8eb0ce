"""All steps of a decoder that is fed what it found, in one native call, and another back: for eager code."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.common.fast_path import unwatched
from kernels.cpu import decoder, decoder_training, fused
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

    Where gradients are needed, the call keeps what one native call back needs: gates, cells, h, attention's weights and
    queries of every step. There are no gradients of gradients; asking for them raises NotImplementedError.

    What it does not serve runs by the model's own loop: autocast, a compiler or tracer, other types than float32, an
    LSTM that another kernel runs or that keeps its weights in fewer bits, modules with hooks or with a forward of their
    own, attention with scores of its own, a model that looks or combines in a way of its own, and lengths outside 1 to
    the steps. `choices` of the LSTM say which of these it was. Dropout between the LSTM's layers draws other random
    numbers than that loop.

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
        if not any(_changed(model, AttentionSeq2Seq, name) for name in _REPLACED):
            # Not by nn.Module's own __setattr__: what it holds is the module itself.
            model.__dict__["_step_by_step"] = cls(model)

    def __call__(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        """As `AttentionSeq2Seq._step_by_step`: what each step decoded; the state is brought to their end."""
        if torch.compiler.is_compiling():
            return AttentionSeq2Seq._step_by_step(self.model, x, state, lengths)  # noqa: SLF001 - it stands in for it
        why = self._refused()
        found = why or self._run(x, state, lengths)
        if isinstance(found, Tensor):
            return found
        decoded = AttentionSeq2Seq._step_by_step(self.model, x, state, lengths)  # noqa: SLF001
        self._note(f"a step at a time: {found}")
        return decoded

    def _note(self, reason: str) -> None:
        """Put a reason before that of what the LSTM ran."""
        lstm = cast("Any", self.model.decoder.lstm)
        if isinstance(lstm, LSTM):
            noted = [dataclasses.replace(choice, reason=f"{reason}; {choice.reason}") for choice in lstm.choices]
            # Not by nn.Module's own __setattr__, with which the LSTM drops what it prepared.
            lstm.__dict__["choices"] = tuple(noted)

    def _refused(self) -> str | None:
        """Reason why something sees or changes the calls of the modules that the native call stands in for, or None."""
        model = self.model
        lstm, attention = cast("Any", model.decoder.lstm), model.attention
        if not isinstance(lstm, LSTM) or lstm.implementation != CPU or lstm.weight_storage != "fp32":
            return "the native decoder is for cpu-fused with its weights in fp32"
        parts = (
            (model.decoder, Reader, "forward"), (lstm, LSTM, "forward"), (attention, Attention, "forward"),
            (model.combine, nn.Linear, "forward"),
            (attention.query, nn.Linear if attention.additive else nn.Identity, "forward"),
        )  # fmt: skip
        of_all = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks  # noqa: SLF001 - torch has no public name
        backward = nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks  # noqa: SLF001
        if of_all or backward or any(_hooked(part) for part, *_ in parts):
            return "hooks see the calls of modules"
        others = (
            (attention, Attention, "scores"),
            (model, AttentionSeq2Seq, "_look"),
            (model, AttentionSeq2Seq, "_combined"),
        )
        # A parametrized module has a class of its own, with the same forward.
        for part, kind, name in (*parts, *others):
            if _changed(part, kind, name):
                return f"a module has its own {name}"
        return None

    def _run(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor | str:
        """All steps in one native call; for tensors that it does not serve nothing is done, and the reason returned."""
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
        if why := _not_served(given, mask, lengths):
            return why
        gradients = torch.is_grad_enabled() and any(value.requires_grad for value in given)
        factor = 1.0
        if gradients and scale is not None:
            # By torch, which has the gradients of this.
            keys = keys * scale if vector is None else keys
            vector = vector if vector is None else vector * (scale / torch.linalg.vector_norm(vector))
        elif scale is not None:
            # Of a vector of zeros the factor is infinite, and the scores are NaN, as the model's own.
            factor = float(scale if vector is None else scale / torch.linalg.vector_norm(vector))
        run = decoder_training.run if gradients else decoder.run
        # With gradients they are copied there, to int32.
        ends = lengths if lengths is None or gradients else lengths.to(torch.int32)
        found, after = run(
            x,
            FedState(state["hidden"], state["cell"], fed),
            layers,
            Memory(
                values, keys, None if mask is None else mask.squeeze(0).expand(values.shape[:2]), query, vector, factor
            ),
            combine,
            ends,
            _dropped(lstm, x),
            feeds_context=model.feeds_context,
        )
        state["hidden"], state["cell"], state["fed"] = after.hidden, after.cell, after.fed.unsqueeze(0)
        how = "in one call with its attention, all steps" + (", and one back" if gradients else "")
        lstm.__dict__["choices"] = (Choice(CPU, how, {}, fused.instructions()),) * lstm.num_layers
        return found


def _dropped(lstm: Any, x: Tensor) -> Tensor | None:
    """Factors of what each layer hands to the next in each step of x, drawn at once; None where nothing is dropped."""
    if not (lstm.training and lstm.dropout and lstm.num_layers > 1):
        return None
    return functional.dropout(x.new_ones(lstm.num_layers - 1, *x.shape[:2], lstm.hidden_size), lstm.dropout)


def _changed(part: nn.Module, kind: type[nn.Module], name: str) -> bool:
    """Return whether a module has another method than a class, by a class of its own or in itself."""
    return getattr(type(part), name) is not getattr(kind, name) or name in vars(part)


def _hooked(part: nn.Module) -> bool:
    """Return whether a module has hooks that its call would run."""
    return bool(
        part._forward_hooks  # noqa: SLF001 - torch has no public name for any of these
        or part._forward_pre_hooks  # noqa: SLF001
        or part._backward_hooks  # noqa: SLF001
        or part._backward_pre_hooks  # noqa: SLF001
    )


def _not_served(given: list[Tensor], mask: Tensor | None, lengths: Tensor | None) -> str | None:
    """Reason why the native call cannot read these without conversion, or something else has to see its operators.

    Args:
        given: all that must be float32: x first, the state and the parameters.
        mask: of the memory.
        lengths: of x.
    """
    others = [value for value in (mask, lengths) if value is not None]
    if not unwatched([*given, *others]):
        return "autocast, a tracer, a mode or a transform sees the operators"
    if any(value.device.type != "cpu" or not value.numel() for value in (*given, *others)):
        return "a tensor is empty or not on the CPU"
    if any(value.dtype is not torch.float32 for value in given) or (mask is not None and mask.dtype is not torch.bool):
        return "the native decoder is for float32"
    if lengths is None:
        return None
    if lengths.dtype not in {torch.int64, torch.int32}:
        return "lengths are not int64 or int32"
    least, most = (int(value) for value in lengths.aminmax())
    return None if least >= 1 and most <= given[0].size(1) else "a length is not from 1 to the steps"
