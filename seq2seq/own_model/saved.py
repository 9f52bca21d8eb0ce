"""Saved files as models: the form of a file, found without running code in it, and the module that runs it.

A program holds operators and weights, and no module whose LSTM a variant could replace. It is measured as it is, and by
whatever else takes it.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate

from seq2seq.execution.variant import CONVERTING, Variant
from seq2seq.own_model.errors import OwnModelError, told
from seq2seq.own_model.onnx_file import OnnxModel

#: Endings of files that hold a model, or are taken for one.
SUFFIXES = (".pt", ".pth", ".pt2", ".torchscript", ".onnx", ".ort")
_INSTEAD = "give the Python function that builds the model: --model FILE.py:FUNCTION"
#: Types whose constants in a program follow the type of its weights.
_REAL = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


class Form(enum.StrEnum):
    """Form of a saved model, in words."""

    PICKLE = "a pickled module"
    EXPORTED = "a program of torch.export"
    SCRIPTED = "a program of TorchScript"
    ONNX = "an ONNX model"


class SavedProgram(nn.Module):
    """A program that is called as any module is.

    Attributes:
        program: the loaded program.
        form: of its file.
    """

    def __init__(self, program: Any, form: Form) -> None:
        super().__init__()
        self.program, self.form = program, form
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> SavedProgram:
        """Return itself: a program has the mode in which it was saved."""
        del mode
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SavedProgram:
        """Convert the weights, and with them the types that an exported graph has as constants: of zero states."""
        super()._apply(fn, recurse)
        kinds = {value.dtype for value in self.parameters() if value.is_floating_point()}
        if self.form is Form.EXPORTED and len(kinds) == 1:
            (kind,) = kinds

            def changed(value: Any) -> Any:
                return kind if isinstance(value, torch.dtype) and value in _REAL else value

            for node in self.program.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, changed), map_aggregate(node.kwargs, changed)
            self.program.recompile()
        return self


def saved_form(reference: str) -> Form | None:
    """Return the form of the file that a reference names; None where it names code. Nothing in the file is run.

    Raises:
        OwnModelError: for a file that holds no model that can be run.
    """
    path = Path(reference)
    # A file of any other name but Python's is a saved model too, if it is there.
    if path.suffix not in SUFFIXES and (path.suffix == ".py" or not path.is_file()):
        return None
    if not path.is_file():
        msg = f"{path} does not exist; expected a saved model, or FILE.py:FUNCTION"
        raise OwnModelError(msg)
    if path.suffix == ".ort":
        msg = f"{path} is in ONNX Runtime's own format; give the .onnx file that it was made from"
        raise OwnModelError(msg)
    if path.suffix == ".onnx":
        return Form.ONNX
    if not zipfile.is_zipfile(path):
        msg = (
            f"{path} is not a file of torch.save, torch.jit.save or torch.export.save; a plain pickle is not loaded, "
            f"since that runs code in it; {_INSTEAD}"
        )
        raise OwnModelError(msg)
    names = _names(path)
    if any("/aotinductor/" in name for name in names):
        msg = f"{path} is compiled by AOTInductor for one machine, and its weights cannot be read; {_INSTEAD}"
        raise OwnModelError(msg)
    if any("/models/" in name or name.endswith("exported_program.json") for name in names):
        _refuse_code(path)
        return Form.EXPORTED
    if any("/code/" in name for name in names):
        return Form.SCRIPTED
    _refuse_weights(path)
    return Form.PICKLE


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        msg = f"{path} is damaged ({error}); save it again"
        raise OwnModelError(msg) from error


def _refuse_code(path: Path) -> None:
    """Refuse a program with a pickle in it that would run code when torch.export.load reads it.

    Raises:
        OwnModelError: naming the part.
    """
    with told(f"reading {path}"), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as part:
                is_pickle = name.endswith(".pt") or part.read(4) == b"PK\x03\x04"
            if not is_pickle:
                continue
            try:
                torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                msg = (
                    f"{path}: {name} is a pickle that runs code when it is loaded; export the program again with plain "
                    f"tensors as example inputs, or {_INSTEAD}"
                )
                raise OwnModelError(msg) from error


def _refuse_weights(path: Path) -> None:
    """Refuse a file whose pickle holds plain values: weights without their model.

    Raises:
        OwnModelError: naming what it holds.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return
    except Exception as error:
        msg = f"{path} cannot be read ({type(error).__name__}); expected a file of torch.save; {_INSTEAD}"
        raise OwnModelError(msg) from error
    kind = f"a dict of {len(found)} entries" if isinstance(found, dict) else f"a {type(found).__name__}"
    msg = f"{path} holds {kind}, as a state_dict is: weights without the model that they are for; {_INSTEAD}, and load "
    raise OwnModelError(msg + "them there")


def load_saved(path: Path, form: Form) -> nn.Module:
    """Load a model from a file of a form that `saved_form` found. Only a pickled module runs code of the file's.

    Raises:
        OwnModelError: for a file that does not load, or holds something else.
    """
    with told(f"loading {path}"), warnings.catch_warnings():
        # torch warns that TorchScript is deprecated.
        warnings.simplefilter("ignore")
        if form is Form.ONNX:
            return OnnxModel(path)
        if form is Form.EXPORTED:
            return SavedProgram(torch.export.load(path).module(), form)
        if form is Form.SCRIPTED:
            return SavedProgram(torch.jit.load(str(path), map_location="cpu"), form)
        # Its classes are looked up beside it.
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        found = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(found, nn.Module):
        msg = f"{path} holds a {type(found).__name__}, expected a whole torch.nn.Module; {_INSTEAD}"
        raise OwnModelError(msg)
    return found


def saved_inputs(path: Path, form: Form) -> Callable[[], Any]:
    """Return a function that gives the inputs in a file, or those that its signature describes.

    Raises:
        OwnModelError: where it has none; the message says what to do.
    """
    advice = "give them: --inputs FILE.py:FUNCTION"
    if form is Form.EXPORTED:
        with told(f"loading {path}"):
            found = torch.export.load(path).example_inputs
        if found is None:
            msg = f"{path} was saved without its example inputs; {advice}"
            raise OwnModelError(msg)
        args, kwargs = found
        return lambda: SimpleNamespace(args=tuple(args), kwargs=dict(kwargs or {}))
    if form is Form.ONNX:
        return OnnxModel(path).drawn_inputs(advice)
    msg = f"{path} is {form}, which holds no example inputs; {advice}"
    raise OwnModelError(msg)


def form_of(model: nn.Module) -> Form | None:
    """Return the form of a loaded program; None for a module with Python code."""
    if isinstance(model, OnnxModel):
        return Form.ONNX
    return model.form if isinstance(model, SavedProgram) else None


def unfit_program(form: Form, variant: Variant) -> str | None:
    """Return the reason why a variant is not a way to execute a program, or None."""
    if form is Form.ONNX and variant.runtime not in CONVERTING:
        return f"the file is {form}, which torch does not run; onnxruntime and openvino do"
    if variant.lstm != "nn" or variant.runtime == "torch-int8":
        return (
            f"the file is {form}: operators, and no torch.nn.LSTM to replace; give the code: --model FILE.py:FUNCTION"
        )
    if variant.compiler == "dynamo" and form is Form.SCRIPTED:
        return f"the file is {form}, into which torch.compile does not look"
    if variant.compiler == "torchscript":
        again = "so this would be `reference` again" if form is Form.SCRIPTED else "and torch.jit.script takes code"
        return f"the file is {form}, {again}"
    return None
