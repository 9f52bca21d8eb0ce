"""Export a trained LSTM as C, which runs without Python.

Writes its weights, the kernel's sources, a C header and examples to a folder; `make` there builds a library that needs
neither Python nor torch. The file is a state_dict, by torch.save or as safetensors.
"""

from __future__ import annotations

import pickle
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cpu.serve.export import PRECISIONS, ServeExportError, export_c
from ..host.output import run_command
from ..host.usage import PACKAGE, Parser, part_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, or print why not in one line and return 2."""
    parser = Parser(prog=f"python -m {PACKAGE} export-c", description=__doc__)
    parser.add_argument("weights", type=Path, help="a state_dict: a file of torch.save, or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, new or empty")
    parser.add_argument("--prefix", default="", help="prefix of the LSTM's names, such as encoder.")
    parser.add_argument("--head", help="linear layer to apply to the last layer's output, such as head")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="how the library keeps the weights")
    options = parser.parse_args(arguments)
    try:
        export_c(
            read(options.weights), options.out, prefix=options.prefix, head=options.head, precision=options.precision
        )
    except ServeExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        why = error.strerror or error
        print(f"error: {options.out} cannot be written: {why}; name another folder with --out", file=sys.stderr)
        return 2
    print(f"wrote {options.out}; build it where it will run: make -C {shlex.quote(str(options.out))}")
    return 0


def read(path: Path) -> Mapping[str, Tensor]:
    """A state_dict of a file.

    Raises:
        ServeExportError: for a file that holds none or cannot be read.
    """
    if not path.is_file():
        msg = f"{path} is not a file; give the weights, a state_dict that torch.save or safetensors wrote"
        raise ServeExportError(msg)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only for such files

            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        msg = f"{path} needs the package safetensors: pip install safetensors"
        raise ServeExportError(msg) from None
    except Exception as error:
        # What libraries say of such files is advice to their own callers, some of it to run whatever code a file holds.
        raise ServeExportError(_why_unread(path, error)) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        msg = f"{path} holds no state_dict (names with tensors); save model.state_dict()"
        raise ServeExportError(msg)
    return found


def _why_unread(path: Path, error: Exception) -> str:
    """Say what is wrong with a file that neither torch nor safetensors read, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    kind = "safetensors" if path.suffix == ".safetensors" else "torch.save"
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return f"{path} holds more than tensors, and that may run code when it is loaded; save model.state_dict()"
    return f"{path} cannot be read as a file of {kind}; give a state_dict that torch.save or safetensors wrote"


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} export-c"))
