"""Deployment: a trained model as one file that runs without this project, and the check that it computes the same.

Each format fixes something else: a trace its loops, torch.export the steps of an LSTM. So the written file is loaded
again and compared with the model, on the sizes of the export and on others, and the result says which sizes it serves.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.host.output import write_new
from seq2seq.deployment.facts import add_metadata
from seq2seq.models.base import Config, Model
from seq2seq.runtimes.export import ExportedRun, to_onnx
from seq2seq.runtimes.runtime import ARGUMENTS, Inputs, Results

#: Largest difference from the model's own results, absolute and relative: float32 in another order of operations.
TOLERANCE = 1e-4
#: A part of it that changes when one looks for what the file serves, by name: factors of batch, source, target.
VARIATIONS = {"batches": (2, 1, 1), "source steps": (1, 2, 1), "target steps": (1, 1, 2)}

Loaded = Callable[..., Results]


class ExportError(ValueError):
    """Error of an export: format, model, cause, and what to do instead, in one line."""


@dataclass(frozen=True)
class ExportSizes:
    """Of the inputs that a model is exported with, and which the file serves in any case."""

    batch: int = 2
    source_steps: int = 8
    target_steps: int = 6

    def times(self, batch: int, source: int, target: int) -> ExportSizes:
        """Other sizes."""
        return ExportSizes(self.batch * batch, self.source_steps * source, self.target_steps * target)


@dataclass(frozen=True)
class Served:
    """Sizes that a file serves besides those of its export, found by comparing it with its model.

    Attributes:
        any_of: names of `VARIATIONS` in which it gives the model's results for other sizes too.
        refused: those in which it raises for other sizes.
        wrong: those in which it gives other results for them, without a word.
    """

    any_of: tuple[str, ...]
    refused: tuple[str, ...]
    wrong: tuple[str, ...]

    def words(self, sizes: ExportSizes) -> str:
        """One line for people."""
        exact = {"batches": sizes.batch, "source steps": sizes.source_steps, "target steps": sizes.target_steps}
        parts = [f"any {' and '.join(self.any_of)}"] if self.any_of else []
        parts += [f"only {name} of {exact[name]}" for name in self.refused]
        parts += [f"only {name} of {exact[name]}, WRONG RESULTS for others" for name in self.wrong]
        return "; ".join(parts)


def export(
    model: Model,
    path: Path,
    form: str,
    sizes: ExportSizes | None = None,
    *,
    lengths: bool = False,
    facts: Mapping[str, Any] | None = None,
    beside: Mapping[Path, bytes] | None = None,
) -> Served:
    """Write a model's `run` to a file, load it again and compare its results with the model's.

    Args:
        model: on the CPU, in evaluation mode.
        path: of the file; one that is there is replaced once the new one was compared.
        form: of `FORMATS`.
        sizes: of the inputs that it is exported with; small ones when None.
        lengths: whether the inputs have lengths; `torchscript` takes them in any case.
        facts: about the model, see `deployment_facts`, which an ONNX file takes as metadata.
        beside: new files that are written with it: all or none.

    Returns:
        What it serves besides those sizes.

    Raises:
        ExportError: for a model that the format cannot hold, with the cause and what to do instead.
        OSError: when the file cannot be written.
    """
    sizes = sizes or ExportSizes()
    if form not in FORMATS:
        msg = f"format is {form!r}, expected one of {', '.join(FORMATS)}"
        raise ExportError(msg)
    found = FORMATS[form]
    if found.suffix and path.suffix != found.suffix:
        msg = f"{form}: the file is {path.name}, expected a name that ends in {found.suffix}"
        raise ExportError(msg)
    if lengths and model.config.stacks and not found.packs:
        msg = f"{form}: the {model.config.family} model cannot be exported with lengths: torch.export cannot pack "
        msg += "sequences, whose sizes depend on the lengths' values; use onnx or torchscript, or leave the lengths out"
        raise ExportError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    inputs = make_inputs(model.config, sizes, _dtype(model), lengths=lengths)
    try:
        with _told(model, form), _quiet(), torch.no_grad():
            found.write(model, inputs, aside)
            if form == "onnx" and facts:
                add_metadata(aside, facts)
            loaded = found.load(aside)
            if not agree(loaded(*inputs), ExportedRun(model)(*inputs)):
                msg = "the file's results are not the model's"
                raise RuntimeError(msg)
            served = _served(model, loaded, sizes, lengths=lengths)
        write_new(beside or {})
        try:
            aside.replace(path)
        except OSError:
            for other in beside or {}:
                other.unlink()
            raise
    finally:
        aside.unlink(missing_ok=True)
    return served


def load(path: Path, form: str) -> Loaded:
    """Computation in a file: called as `Model.run`, it gives outputs and the two tensors of the final state.

    Arguments that the file was not exported with are left out or None.

    Raises:
        ExportError: for a file that is not of that format.
    """
    if form not in FORMATS:
        msg = f"format is {form!r}, expected one of {', '.join(FORMATS)}"
        raise ExportError(msg)
    try:
        with _quiet():
            return FORMATS[form].load(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        msg = f"{path} cannot be read as {form} ({_line(error)}); expected a file that was exported in that format"
        raise ExportError(msg) from error


def make_inputs(
    config: Config, sizes: ExportSizes, dtype: torch.dtype = torch.float32, *, lengths: bool = False
) -> Inputs:
    """Random inputs of these sizes, the same each time: source, target where there is a decoder, lengths if asked."""
    generator = torch.Generator().manual_seed(0)

    def draw(steps: int, features: int, vocabulary: int) -> Tensor:
        if vocabulary:
            return torch.randint(vocabulary, (sizes.batch, steps), generator=generator)
        return torch.randn(sizes.batch, steps, features, dtype=dtype, generator=generator)

    def some(steps: int) -> Tensor | None:
        # Of every length from 1 to all, but never sorted.
        return (torch.arange(sizes.batch) * 3 + steps - 1) % steps + 1 if lengths else None

    source = draw(sizes.source_steps, config.input_size, config.source_vocabulary)
    if not config.decodes:
        return source, None, some(sizes.source_steps), None
    target = draw(sizes.target_steps, config.target_size, config.target_vocabulary)
    return source, target, some(sizes.source_steps), some(sizes.target_steps)


def agree(found: Results, expected: Results) -> bool:
    """Return whether results are the same up to `TOLERANCE`, shapes and types too."""
    return all(
        one.shape == two.shape and one.dtype == two.dtype and torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE)
        for one, two in zip(found, expected, strict=True)
    )


def _served(model: Model, loaded: Loaded, sizes: ExportSizes, *, lengths: bool) -> Served:
    any_of: list[str] = []
    refused: list[str] = []
    wrong: list[str] = []
    for name, factors in VARIATIONS.items():
        if name == "target steps" and not model.config.decodes:
            continue
        inputs = make_inputs(model.config, sizes.times(*factors), _dtype(model), lengths=lengths)
        try:
            found = loaded(*inputs)
        except Exception:  # noqa: BLE001 - each runtime refuses in its own way
            refused.append(name)
            continue
        (any_of if agree(found, ExportedRun(model)(*inputs)) else wrong).append(name)
    return Served(tuple(any_of), tuple(refused), tuple(wrong))


@dataclass(frozen=True)
class Format:
    """Functions that write and read a format.

    Attributes:
        summary: one line for people.
        write: writes a model for inputs to a path.
        load: reads it.
        instead: what to do when the format cannot hold a model.
        suffix: that the file's name must have; any when empty.
        packs: whether LSTMs over sequences of different lengths can be exported.
    """

    summary: str
    write: Callable[[Model, Inputs, Path], None]
    load: Callable[[Path], Loaded]
    instead: str
    suffix: str = ""
    packs: bool = True


def _script(model: Model, inputs: Inputs, path: Path) -> None:
    del inputs
    _save(torch.jit.script(model), path)


def _save(module: Any, path: Path) -> None:
    """By way of a buffer: torch's C++ takes no path whose bytes are not UTF-8."""
    content = io.BytesIO()
    torch.jit.save(module, content)
    path.write_bytes(content.getvalue())


def _load_script(path: Path) -> Loaded:
    run: Loaded = _existing_module(path).run
    return run


def _trace(model: Model, inputs: Inputs, path: Path) -> None:
    names = [name for name, value in zip(ARGUMENTS, inputs, strict=True) if value is not None]
    # As a function, whose weights are constants: tracing a module would script its other methods, which it cannot mix.
    frozen = copy.deepcopy(model).requires_grad_(False)

    def traced(*values: Tensor) -> Results:
        return frozen.run(**dict(zip(names, values, strict=True)))

    _save(torch.jit.trace(traced, tuple(value for value in inputs if value is not None)), path)


def _load_trace(path: Path) -> Loaded:
    module = _existing_module(path)

    def run(*arguments: Tensor | None) -> Results:
        found: Results = module(*(value for value in arguments if value is not None))
        return found

    return run


def _existing_module(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    return torch.jit.load(io.BytesIO(path.read_bytes()))


def _program(model: Model, inputs: Inputs) -> torch.export.ExportedProgram:
    """With batch and steps left open, as far as the model's operators let them be."""
    open_ = torch.export.Dim.AUTO
    shapes = tuple(None if value is None else dict.fromkeys(range(min(2, value.dim())), open_) for value in inputs)
    return torch.export.export(ExportedRun(model), inputs, dynamic_shapes=shapes)


def _write_program(model: Model, inputs: Inputs, path: Path) -> None:
    torch.export.save(_program(model, inputs), path)


def _load_program(path: Path) -> Loaded:
    return _all_arguments(torch.export.load(path).module())


def _write_onnx(model: Model, inputs: Inputs, path: Path) -> None:
    path.write_bytes(to_onnx(model, inputs, dynamic=True))


def _load_onnx(path: Path) -> Loaded:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    # What it refuses it also raises.
    options.log_severity_level = 4
    session = runtime.InferenceSession(path.read_bytes(), options)

    def run(*arguments: Tensor | None) -> Results:
        given = {name: value.numpy() for name, value in zip(ARGUMENTS, arguments, strict=False) if value is not None}
        outputs, hidden, cell = map(torch.from_numpy, session.run(None, given))
        return outputs, hidden, cell

    return run


def _compile(model: Model, inputs: Inputs, path: Path) -> None:
    inductor = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(_program(model, inputs), package_path=str(path))


def _load_compiled(path: Path) -> Loaded:
    if not path.is_file():
        raise FileNotFoundError(path)
    return _all_arguments(importlib.import_module("torch._inductor").aoti_load_package(str(path)))


def _all_arguments(program: Callable[..., Any]) -> Loaded:
    """A program takes as many arguments as it was exported with."""

    def run(*arguments: Tensor | None) -> Results:
        outputs, hidden, cell = program(*arguments, *(None,) * (len(ARGUMENTS) - len(arguments)))
        return outputs, hidden, cell

    return run


FORMATS = {
    "torchscript": Format(
        "scripted: run, encode and step, for any sizes and lengths, in Python and C++ (deprecated by torch)",
        _script,
        _load_script,
        "use torch-export",
    ),
    "torchscript-trace": Format(
        "one traced run: loops of the example's steps stay as they were (deprecated by torch)",
        _trace,
        _load_trace,
        "use torchscript",
    ),
    "torch-export": Format(
        "torch.export: what torch itself builds on now",
        _write_program,
        _load_program,
        "use torchscript",
        ".pt2",
        packs=False,
    ),
    "onnx": Format(
        "for ONNX Runtime, OpenVINO and others, with true LSTM nodes", _write_onnx, _load_onnx, "use torchscript"
    ),
    "aotinductor": Format(
        "compiled to machine code for this machine; needs a C++ compiler",
        _compile,
        _load_compiled,
        "use torch-export",
        ".pt2",
        packs=False,
    ),
}


def _dtype(model: Model) -> torch.dtype:
    return next(value.dtype for value in model.parameters())


@contextlib.contextmanager
def _told(model: Model, form: str) -> Iterator[None]:
    """Whatever a compiler raises becomes one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        instead = FORMATS[form].instead
        msg = f"{form}: the {model.config.family} model cannot be exported: {_line(error)}; {instead}"
        raise ExportError(msg) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Compilers warn of what they do not guarantee; here it is checked instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    """The first line with something in it, and whose error it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
