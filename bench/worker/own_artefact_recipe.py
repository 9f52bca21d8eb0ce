"""The source text of an artefact for the user's own model: the user's function builds it, the file makes it run a way.

Runs in a process of its own that is given the model as any worker is: `python -m bench.worker.own_artefact_recipe
WORKLOAD VARIANT MODE DEVICE THREADS OUT` prints what `bench.worker.artefact_recipe` prints.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from torch.nn.utils.rnn import PackedSequence

from bench.worker.artefact_recipe import (
    PROOF,
    NoRecipeError,
    compile_options,
    contexts,
    environment_lines,
    printed,
    replacing,
)
from kernels.host.output import run_command
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model import leaves
from seq2seq.own_model.catalogue import add_variants, own_model
from seq2seq.own_model.execution import as_users_run
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.saved import Form, saved_form
from seq2seq.own_model.source import BUILD, INPUTS, is_file, parts

#: Loads a user's file as the command line does.
_LOADER = '''
def user(place):
    """Return a module of yours: a Python file, which may import files beside it, or a module by name."""
    if not place.endswith(".py"):
        sys.path.insert(0, str(HERE / FOLDER))
        return importlib.import_module(place)
    path = (HERE / place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; put it back, or change its path in {__file__}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    if loaded is None:
        # As an import does: dataclasses and pickle look their module up there.
        sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


'''
#: Statements that load a saved model from a path.
_LOADED = {
    Form.PICKLE: """# Its classes are looked up beside it. Loading a pickle runs the code that it names.
sys.path.insert(0, str((HERE / {0}).resolve().parent))
model = torch.load(HERE / {0}, map_location="cpu", weights_only=False)""",
    Form.EXPORTED: "model = torch.export.load(HERE / {0}).module()",
    Form.SCRIPTED: 'model = torch.jit.load(str(HERE / {0}), map_location="cpu")',
    Form.ONNX: "model = OnnxModel(HERE / {0})",
}
_AROUND = '''
class Applied(nn.Module):
    """A model with what must hold while a call runs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        """Call the model."""
{}

'''


def placed(path: str, out: Path, root: str) -> tuple[str, bool]:
    """Path of a user's file or folder as an artefact names it, and whether it is relative to the artefact.

    It is relative where both are likely to be moved together: both lie in the folder in which the run was begun, or one
    lies beside or above the other.

    Args:
        path: of the user's file or folder.
        out: of the artefact.
        root: folder in which the run was begun; empty where that is not known.
    """
    theirs, ours = Path(path), out.resolve().parent
    both = bool(root) and theirs.is_relative_to(root) and ours.is_relative_to(root)
    if both or theirs.is_relative_to(ours) or ours.is_relative_to(theirs.parent):
        return os.path.relpath(path, ours), True
    return path, False


def own_body(variant: Variant, device: str, mode: str) -> tuple[list[str], list[str], list[str]]:
    """Imports, statements that return what is called in the place of `model`, and the body of a call around it.

    Args:
        variant: in its precision here, none that the user added.
        device: `cpu` or `cuda`.
        mode: `inference` or `training`.

    Raises:
        NoRecipeError: with the reason why there is none.
    """
    around = contexts(variant, device, mode)
    if mode == "training" and (casts := next((text for text in around if "autocast" in text), None)):
        msg = f"your loss must be computed under autocast too, so write `with {casts}:` around model and loss yourself"
        raise NoRecipeError(msg)
    imports, lines = replacing(variant, mode, "not replaced.swapped")
    if variant.runtime is not None:
        imports += [
            "from seq2seq.execution.variants import VARIANTS",
            "from seq2seq.own_model.runtimes import Converted",
        ]
        converted = f'return Converted(model, VARIANTS["{variant.name}"].here())'
        return imports, [*lines, "# Converted at the first call, for its shapes; it refuses others.", converted], []
    made = "model"
    if variant.compiler == "dynamo":
        made = f"torch.compile(model{compile_options(variant)})"
    elif variant.compiler == "torchscript":
        made = "torch.jit.script(model)"
    call = ["return self.model(*args, **kwargs)"]
    if low := variant.stores_low(mode):
        imports.append("from torch.utils._pytree import tree_map")
        cast = f"x.to({variant.dtype}) if getattr(x, 'is_floating_point', bool)() else x"
        call.insert(0, f"args, kwargs = tree_map(lambda x: {cast}, (args, kwargs))")
    if around:
        call = [f"with {', '.join(around)}:", *(f"    {line}" for line in call)]
    if not around and not low:
        return imports, [*lines, f"return {made}"], []
    return imports, [*lines, f"return Applied({made})"], call


class _Places:
    """Paths of the user's files as an artefact names them, and what to say of them."""

    def __init__(self, out: Path, root: str) -> None:
        self._out, self._root = out, root
        self._moved: list[str] = []
        self._fixed: list[str] = []
        #: Folder in which modules are looked for; empty where none is named.
        self.folder = ""

    def __call__(self, path: str) -> str:
        """Return the path of a file or folder."""
        found, relative = placed(path, self._out, self._root)
        named = self._moved if relative else self._fixed
        if found not in named:
            named.append(found)
        return found

    def of(self, reference: str, default: str) -> tuple[str, str]:
        """Return the file or module of a reference, and its function."""
        where, name = parts(reference, default)
        if is_file(where):
            return self(where), name
        self.folder = self(self._root) if self._root else "."
        return where, name

    def __str__(self) -> str:
        """Return the advice for who moves the artefact."""
        said = (
            [f"Found from this file's folder, so move them together: {', '.join(self._moved)}."] if self._moved else []
        )
        said += [f"Found by full paths, so they must stay: {', '.join(self._fixed)}."] if self._fixed else []
        return " ".join(said)


def own_text(own: OwnModel, workload: str, variant: str, mode: str, device: str, threads: int, out: Path) -> str:
    """Return the artefact's source.

    Args:
        own: the user's model.
        workload: one of its names.
        variant: name in `VARIANTS`.
        mode: `inference` or `training`.
        device: `cpu` or `cuda`.
        threads: that it was measured with.
        out: where the file will be.

    Raises:
        NoRecipeError: with the reason why there is none.
    """
    given, found, places = own.spec, as_users_run(VARIANTS[variant].here()), _Places(out, own.spec.folder)
    form = saved_form(given.model)
    build, built = _built(given.model, places)
    asked = _asked(own, workload, places)
    call: list[str] = []
    if found.make is not None:
        made_by, make = places.of(given.variants[variant], "")
        imports, lines = ["import torch"], [f"return user({made_by!r}).{make}(model)"]
    else:
        imports, lines, call = own_body(found, device, mode)
    if call:
        imports.insert(1, "from torch import nn")
    if form is Form.ONNX:
        imports.append("from seq2seq.own_model.onnx_file import OnnxModel")
    loads = any("user(" in line for line in (*built, *asked, *lines))
    libraries = [
        *(["import importlib.util"] if loads else []),
        *(["import os"] if found.environment else []),
        *(["import sys"] if loads or form is Form.PICKLE else []),
        "from pathlib import Path",
    ]
    trained = "" if form not in {None, Form.PICKLE} else ".train()" if mode == "training" else ".eval()"
    head = fill(f"{workload}, {mode} on {device}: `{variant}`, {found.summary}.", 118)
    about = fill(_about(found, build, threads, places), 118, break_on_hyphens=False, break_long_words=False)
    quoted = f"{head}\n\n{about}".replace("\\", "\\\\").replace('"""', "'''")
    around = _AROUND.format(indent("\n".join(call), " " * 8)).lstrip() + "\n" if call else ""
    folder = f"FOLDER = {places.folder!r}\n" if places.folder else ""
    return f'''"""{quoted}
{PROOF}
"""

{chr(10).join(libraries)}

{chr(10).join(imports)}

{chr(10).join(environment_lines(found))}HERE = Path(__file__).resolve().parent
{folder}DEVICE, THREADS = {json.dumps(device)}, {threads}

{_LOADER if loads else chr(10)}{around}def apply(model):
    """Return what is called in the place of `model`; where LSTMs are replaced, they are so in `model` itself."""
{indent(chr(10).join(lines), "    ")}


# For `python -m bench run --add-variant NAME=THIS_FILE:apply`: the limits by which its results are judged.
apply.precision = {json.dumps(found.precision)}


def load():
    """Return your model, run this way."""
{indent(chr(10).join(built), "    ")}
    return apply(model.to(DEVICE){trained})


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
{indent(chr(10).join(asked), "    ")}
    run = load()
    with torch.{"enable_grad" if mode == "training" else "inference_mode"}():
        output = run(*args, **kwargs)
    print(f"one call returned a {{type(output).__name__}}")
'''


def _about(variant: Variant, build: str, threads: int, places: _Places) -> str:
    """Return the artefact's explanation of itself."""
    needs = f" Needs {' and '.join(variant.needs)}." if variant.needs else ""
    if variant.runtime is not None:
        needs += " This project must be on the path (PYTHONPATH=CHECKOUT)."
    elif variant.lstm == "kernels":
        needs += " This project must be on the path (PYTHONPATH=CHECKOUT), or its kernels installed."
    return (
        f"`load()` returns the model that {build}, run this way; it is called as yours is. `apply(model)` does that to "
        f"a model that you have. Measured with {threads} thread{'s' if threads != 1 else ''}: "
        f"torch.set_num_threads({threads}).{needs} {places} Run as a program it makes one call."
    )


def _built(reference: str, places: _Places) -> tuple[str, list[str]]:
    """Return who builds the model, in words, and statements that build it."""
    form = saved_form(reference)
    if form is None:
        where, name = places.of(reference, BUILD)
        return f"`{name}` of {where} builds", [f"model = user({where!r}).{name}()"]
    path = places(reference)
    return f"the file {path} holds", _LOADED[form].format(repr(path)).splitlines()


def _asked(own: OwnModel, workload: str, places: _Places) -> list[str]:
    """Return statements that make the arguments of the measured call."""
    given, form = own.spec, saved_form(own.spec.model)
    if not given.inputs and form is Form.EXPORTED:
        return [f"args, kwargs = torch.export.load(HERE / {places(given.model)!r}).example_inputs"]
    asked = own.names[workload]
    if not given.inputs and form is Form.ONNX:
        source = f'OnnxModel(HERE / {places(given.model)!r}).drawn_inputs("")'
    else:
        source = "user({!r}).{}".format(*places.of(own.inputs_name, INPUTS))
    return [
        f"inputs = {source}",
        f"given = {asked.code}",
        f"args, kwargs = {_arguments(asked.make(0, 'cpu'))}",
    ]


def _arguments(value: Any) -> str:
    """Return the expression of a call's positional and keyword arguments in `given`."""
    if isinstance(value, PackedSequence):
        return "(given,), {}"
    if isinstance(value, (tuple, list)):
        return "given, {}"
    if isinstance(value, Mapping):
        return "(), given"
    if leaves.is_arguments(value):
        return 'getattr(given, "args", ()), getattr(given, "kwargs", {})'
    return "(given,), {}"


def main() -> int:
    """Print the recipe."""
    workload, variant, mode, device, threads, out = sys.argv[1:]
    add_variants()
    return printed(variant, lambda: own_text(own_model(), workload, variant, mode, device, int(threads), Path(out)))


if __name__ == "__main__":
    run_command(main)
