"""An own model in another runtime: flattened to tensors in and tensors out, converted, and its outputs put together."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.execution.variant import Variant
from seq2seq.own_model import checks, leaves
from seq2seq.own_model.errors import one_line
from seq2seq.own_model.inputs import Given
from seq2seq.own_model.onnx_file import OnnxModel
from seq2seq.own_model.saved import Form, form_of
from seq2seq.runtimes.export import OPSET, unprinted
from seq2seq.runtimes.registry import RUNTIMES
from seq2seq.runtimes.runtime import Ran


class Flat(nn.Module):
    """A model whose call takes tensors one by one and returns the tensors of its output.

    Attributes:
        model: itself.
        given: inputs whose form the call has.
        arguments, results: names of the tensors that go in and come out.
        config: identifies the model, for exports that are kept.

    Args:
        model: in evaluation mode.
        given: as above, copied.
    """

    def __init__(self, model: nn.Module, given: Given) -> None:
        super().__init__()
        self.model, self.given = model, given.copy()
        self.train(model.training)
        with torch.inference_mode(mode=False), torch.no_grad():
            self._template = model(*self.given.args, **self.given.kwargs)
        self.arguments = tuple(self.given.tensors())
        self.results = tuple(leaves.tensors(self._template, checks.OUTPUT))
        if not self.results:
            msg = "its output holds no tensor, and a converted model returns nothing else"
            raise ValueError(msg)
        self.config = hashlib.sha256(repr((id(model), self.arguments)).encode()).hexdigest()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Call the model with these tensors in the places of those of `given`."""
        named = dict(zip(self.arguments, values, strict=True))
        given = self.given.changed(lambda path, _: named[path])
        result = self.model(*given.args, **given.kwargs)
        return tuple(leaves.tensors(result, checks.OUTPUT).values())

    run = forward

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to convert with: the user's own, since zeros may be no tokens or lengths of this model."""
        return tuple(self.given.tensors().values())

    def together(self, values: tuple[Tensor, ...]) -> Any:
        """An output of the model's own form with these tensors."""
        named = dict(zip(self.results, values, strict=True))
        return leaves.rebuilt(
            self._template, lambda path, leaf: named[path] if isinstance(leaf, Tensor) else leaf, checks.OUTPUT
        )

    def onnx(self) -> bytes:
        """The model as serialised ONNX, with true LSTM nodes, for the shapes of `given`."""
        if isinstance(self.model, OnnxModel):
            theirs = self.model.named(self.given.args, self.given.kwargs)
            return self.model.serialized(dict(zip(theirs, self.arguments, strict=True)))
        file: Any = io.BytesIO()
        with warnings.catch_warnings(), torch.autocast("cpu", enabled=False), unprinted():
            warnings.simplefilter("ignore")
            scripted = form_of(self.model) is Form.SCRIPTED
            torch.onnx.export(
                # The exporter does not trace into TorchScript that is a part of a module.
                torch.jit.trace(self, self.example(), check_trace=False) if scripted else self,
                self.example(),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(self.arguments),
                output_names=list(self.results),
            )
        content: bytes = file.getvalue()
        return content


class Converted:
    """A runtime of `seq2seq.runtimes` that is called as the model is; it converts at the first call.

    Args:
        model: in fp32 on the CPU.
        variant: names the runtime.
    """

    def __init__(self, model: nn.Module, variant: Variant) -> None:
        self._model, self._variant = model, variant
        self._flat: Flat | None = None
        self._runtime: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of its own form."""
        given = Given(_Call(args, kwargs))
        if self._flat is None:
            assert self._variant.runtime is not None  # noqa: S101 - a variant without one is not converted
            self._flat = Flat(self._model, given)
            self._runtime = RUNTIMES[self._variant.runtime](self._flat, self._variant.runtime_options)  # type: ignore[arg-type]
        return self._flat.together(self._runtime(*given.tensors().values()))

    def reload(self) -> None:
        """Take over the model's weights, which were overwritten."""
        if self._runtime is not None:
            self._runtime.reload()

    def ran(self) -> Ran:
        """Description of what the runtime runs, once it was called."""
        found: Ran = self._runtime.ran()
        return found


class _Call:
    """Arguments of a call, as an object with `args` and `kwargs`."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def _stale(model: nn.Module, given: Given, result: Any) -> str | None:
    """Reason why the converted model would be wrong: numbers in its output that only Python computes, or None."""
    if not _numbers(result):
        return None
    varied = given.varied(torch.Generator().manual_seed(1))
    one, two = (_numbers(model(*each.args, **each.kwargs)) for each in (given.copy(), varied))
    if name := next((name for name in {**one, **two} if one.get(name) != two.get(name)), ""):
        return (
            f"{name} is a number that Python computes from tensors at each call, and a converted model returns tensors "
            "alone; return it as a tensor"
        )
    return None


def _numbers(result: Any) -> dict[str, float]:
    return {name: leaf for name, leaf in leaves.flatten(result, checks.OUTPUT) if leaves.is_number(leaf)}


def why_not(model: nn.Module, given: Given, variant: Variant) -> str | None:
    """Reason why a model cannot be converted for a variant, in the exporter's words, or None; it is converted once."""
    try:
        with torch.inference_mode():
            if variant.compiler == "torchscript":
                # Compiled code may refuse the inputs only when it is called: a parameter without a type is a tensor.
                torch.jit.script(model)(*given.args, **given.kwargs)
            elif variant.runtime is not None:
                result = Converted(model, variant)(*given.args, **given.kwargs)
                return _stale(model, given, result)
    except Exception as error:  # noqa: BLE001 - exporters raise anything
        what = "torch.jit.script" if variant.compiler else variant.runtime
        return f"{what} does not take this model: {one_line(error)}"
    return None
