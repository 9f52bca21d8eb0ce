"""Load what the command line names: `file.py:function`, `package.module:function` or a saved model."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seq2seq.own_model.errors import OwnModelError, is_users, told
from seq2seq.own_model.saved import Form, load_saved, saved_form

#: Environment variable that carries the `Spec` to workers, as JSON.
VARIABLE = "SEQ2SEQ_BENCH_OWN_MODEL"
#: How names of such workloads begin.
PREFIX = "own:"
#: The functions that are taken where only a file is named.
BUILD, INPUTS, LOSS, METRIC = "build", "example_inputs", "loss", "metric"
_SEED = 1


@dataclass(frozen=True)
class Spec:
    """Options of the command line for an own model; each is a reference such as `/home/me/lm.py:build`.

    Attributes:
        model: the function that builds it, or a saved model.
        inputs: the function that gives its inputs; empty for `example_inputs` beside the model.
        trace: JSON lines of the function's arguments with counts; empty for none.
        loss: `loss(output, inputs)`, for training; empty where the model returns a loss, or for none.
        metric: `score(output, inputs)`; empty for none.
        variants: variants of the user's own by name.
        folder: where the user is: modules are looked for there.
    """

    model: str
    inputs: str = ""
    trace: str = ""
    loss: str = ""
    metric: str = ""
    variants: dict[str, str] = field(default_factory=dict)
    folder: str = ""

    @property
    def label(self) -> str:
        """The model's name in tables: that of its file, and of its function where that is not `build`."""
        place, _, function = self.model.rpartition(":") if names_function(self.model) else (self.model, "", "")
        stem = Path(place).stem if "/" in place or place.endswith(".py") else place.rpartition(".")[2]
        stem = re.sub(r"[^\w.+-]", "-", stem)
        return stem if function in {"", BUILD} else f"{stem}.{function}"


def names_function(reference: str) -> bool:
    """Return whether a reference names a function besides a file or module."""
    return ":" in reference and reference.rpartition(":")[2].isidentifier()


def spec() -> Spec | None:
    """The own model that this process was started for; None without one."""
    given = os.environ.get(VARIABLE)
    return Spec(**json.loads(given)) if given else None


def load(reference: str, default: str = "", option: str = "") -> Any:
    """The object that a reference names.

    Args:
        reference: `file.py:function` or `package.module:function`.
        default: the function's name where the reference has none.
        option: of the command line, which can name another; empty where the reference has the function's name.

    Raises:
        OwnModelError: for a file, module or function that does not exist, or that raises when it is loaded.
    """
    place, name = parts(reference, default)
    module = _file(place) if is_file(place) else _module(place)
    found = getattr(module, name, None)
    if found is None:
        functions = _functions(module)
        near = difflib.get_close_matches(name, functions, cutoff=0.5)
        there = f"did you mean {near[0]!r}?" if near else f"its functions: {', '.join(functions) or 'none'}"
        msg = f"{place} has no {name!r}; {there}{f'; name one with {option} FILE.py:FUNCTION' if option else ''}"
        raise OwnModelError(msg)
    return found


def _functions(module: types.ModuleType) -> list[str]:
    """Names of the functions that a module or what belongs to its package defines; what it imports is not its own."""
    found = []
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        own = home == module.__name__ or home.startswith(f"{module.__name__}.")
        if own and not name.startswith("_") and inspect.isfunction(inspect.unwrap(value)):
            found.append(name)
    return found


def parts(reference: str, default: str = "") -> tuple[str, str]:
    """File or module of a reference, and its function: the default where it names none."""
    place, _, name = reference.rpartition(":") if names_function(reference) else (reference, "", "")
    return place, name or default


def is_file(place: str) -> bool:
    """Return whether what a reference names is a file's path, and not a module's name."""
    return place.endswith(".py") or "/" in place


@functools.cache
def _file(path: str) -> types.ModuleType:
    file = Path(path)
    if not file.is_file():
        names = [other.name for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names)
        advice = f"did you mean {file.parent / near[0]}?" if near else "expected the path of a Python file"
        msg = f"{path} does not exist; {advice}"
        raise OwnModelError(msg)
    # As Python does for a script: files beside it can be imported, and find it under its own name.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = file.stem if file.stem not in sys.modules else f"own_model_{hashlib.sha1(path.encode()).hexdigest()[:8]}"  # noqa: S324
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        msg = f"{path} is not a Python file; expected FILE.py:FUNCTION"
        raise OwnModelError(msg)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    with told(f"loading {path}"):
        found.loader.exec_module(module)
    return module


def _module(name: str) -> types.ModuleType:
    given = spec()
    if given and given.folder and given.folder not in sys.path:
        sys.path.insert(0, given.folder)
    try:
        missing = importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        missing = True
    if missing:
        msg = f"no module {name!r} can be imported from {given.folder if given else '.'}; expected FILE.py:FUNCTION or "
        raise OwnModelError(msg + "PACKAGE.MODULE:FUNCTION")
    with told(f"importing {name}"):
        return importlib.import_module(name)


def builder(reference: str) -> Callable[[], nn.Module]:
    """A function that builds the model that a reference names: in float32 on the CPU, alike each time.

    Raises:
        OwnModelError: for what is not a model, or a file that holds none.
    """
    form = saved_form(reference)
    option = "" if names_function(reference) else "--model"
    made: Any = load(reference, BUILD, option) if form is None else None
    # A program is loaded each time, since not every one can be copied.
    pickled = load_saved(Path(reference), form) if form is Form.PICKLE else None

    def build() -> nn.Module:
        if form is not None:
            found = copy.deepcopy(pickled) if pickled is not None else load_saved(Path(reference), form)
            return found.cpu()
        with seeded(), told(f"{reference}"):
            model = copy.deepcopy(made) if isinstance(made, nn.Module) else made()
        if not isinstance(model, nn.Module):
            msg = f"{reference} returned a {type(model).__name__}, expected a torch.nn.Module"
            raise OwnModelError(msg)
        return model.cpu()

    return build


@contextlib.contextmanager
def seeded(seed: int = _SEED) -> Iterator[None]:
    """Seed torch, Python and NumPy inside the block; afterwards their generators continue as before."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, which fork_rng(devices=[]) does not put back.
        torch.default_generator.manual_seed(seed)
        state = random.getstate()
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        kept = numpy.random.get_state() if numpy else None
        if numpy:
            # It takes 32 bits.
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(kept)


def takes(function: Any, name: str) -> bool:
    """Return whether a function has a parameter of that very name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def digests(given: Spec) -> dict[str, str]:
    """SHA-256 of the user's files by path: those that are named, the trace, and what they import from beside them."""
    root = [Path(folder) for folder in {given.folder, str(Path(given.model).parent)} if folder not in {"", "."}]
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    users = {file for file in files if file and is_users(file) and any(Path(file).is_relative_to(r) for r in root)}
    references = (given.model, given.inputs, given.loss, given.metric, *given.variants.values())
    named = [given.trace, *(reference.rpartition(":")[0] or reference for reference in references)]
    users |= {place for place in named if place and Path(place).is_file()}
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(users)}
