"""Tell whether Triton can launch anything on the GPU that torch uses: it builds what launches with a C compiler."""

from __future__ import annotations

import functools
import importlib

import torch

#: Said of a torch that calls AMD's GPUs `cuda`.
NOT_NVIDIA = "the kernels hold instructions of NVIDIA's GPUs, and this torch is built for AMD's"


def hindrance() -> str | None:
    """Reason why Triton can launch nothing here; None where it can, where it is missing, and where CUDA is not in use.

    Without a compiler or Python's headers, the first launch would raise in the middle of a call.
    """
    if torch.version.hip:
        return NOT_NVIDIA
    return _driver_error() if torch.cuda.is_initialized() else None


@functools.cache
def _driver_error() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    # A missing compiler, one that fails, a missing library of CUDA's and what was built but does not load differ.
    except Exception as error:  # noqa: BLE001 - as above
        said = (str(error).splitlines() or [""])[0]
        return (
            "Triton cannot launch here; it needs a C compiler and Python's headers (apt-get install gcc python3-dev): "
            f"{type(error).__name__}: {said}"
        )
    return None
