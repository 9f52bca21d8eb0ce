"""Reports refusals of an own model, and errors of the user's own code, in one line each."""

from __future__ import annotations

import contextlib
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from seq2seq.workloads.workload import UnknownWorkloadError

_PROJECT = Path(__file__).parent.parent.parent
_LONGEST = 300
#: What colors text in a terminal.
_COLOR = re.compile("\x1b\\[[0-9;]*m")
#: A place in what TorchScript says, and where what the exporter of ONNX says goes over to a request to its readers.
_PLACE = re.compile(r'File "(.+)", line (\d+)')
_REQUEST = "Please feel free to request support"


class OwnModelError(UnknownWorkloadError):
    """An own model that cannot be measured; the message says which part of it, why, and what to do."""


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the user's code raises into one line that names the error and the line of code.

    Args:
        what: whose code runs, as the line begins: `build() of lm.py`.

    Raises:
        OwnModelError: for every error inside, except the end of the process and a lack of memory.
    """
    try:
        yield
    except (OwnModelError, MemoryError):
        raise
    except SystemExit as error:
        msg = f"{what} ended the process (exit code {error.code}); it must return"
        raise OwnModelError(msg) from error
    except Exception as error:
        msg = f"{what} raised {one_line(error)}{place_of(error)}{_advice(error)}"
        raise OwnModelError(msg) from error


def one_line(error: BaseException) -> str:
    """The type of an error and the first of its lines that says what was wrong."""
    lines = [line.strip() for line in _COLOR.sub("", str(error)).splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("The following operation failed")), "")
    if text.startswith("Traceback of TorchScript"):
        text = lines[-1].removeprefix(f"{type(error).__name__}: ")
    # TorchScript lists what it knows first, then what it did not get, then the call.
    elif unmet := next((line for line in lines if line.startswith("Expected a value of type")), ""):
        places = [found for line in lines if (found := _PLACE.fullmatch(line))]
        text = unmet + (f" ({places[-1][1]}:{places[-1][2]})" if places else "")
    # OpenVINO begins with places in its own code; what it says stands last.
    elif text.startswith("Exception from "):
        text = lines[-1]
    # Some end before the place, which stands on the next line.
    elif text.endswith((":", " At")):
        place = next((found for line in lines if (found := _PLACE.match(line))), None)
        text = text.removesuffix(" At").rstrip(".: ") + (f" ({place[1]}:{place[2]})" if place else "")
    text = text.partition(_REQUEST)[0].rstrip()
    return f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__


def place_of(error: BaseException) -> str:
    """The last line of the user's code that an error came through: ` (lm.py:12)`; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def is_users(filename: str) -> bool:
    """Return whether a file of a traceback is the user's: neither a library's nor this project's instrument."""
    path = Path(filename)
    if filename.startswith("<") or "site-packages" in path.parts or "dist-packages" in path.parts:
        return False
    if path.is_relative_to(Path(contextlib.__file__).parent):
        return False
    if not path.is_relative_to(_PROJECT):
        return True
    # Examples and tests within the checkout are models like any other.
    return path.relative_to(_PROJECT).parts[0] not in {"bench", "seq2seq", "kernels"}


def _advice(error: Exception) -> str:
    if "same device" in str(error) or "on the CPU" in str(error) or "cpu tensor" in str(error).lower():
        return "; give the inputs function a parameter `device` and put each tensor where the model reads it"
    if isinstance(error, ImportError) and "no known parent package" in str(error):
        where = "with the folder that holds the package in PYTHONPATH"
        return f"; name a file of a package as a module, PACKAGE.MODULE:FUNCTION, {where}"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return "; if you trust the file, load it with torch.load(FILE, weights_only=False)"
    return ""
