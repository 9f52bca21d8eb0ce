"""A GPU that is simulated in the host's memory, for tests of what runs only where torch sees an NVIDIA GPU.

A process started with `environment` imports torch's CPU build, and finds one device `cuda:0` there. Operations on it
are computed by torch's kernels for CPUs over the same bytes (`device.cpp`); streams, events, graphs, memory and facts
of the device answer as `torch.cuda` does (`cuda.py`); Triton's kernels run in its interpreter, on their path for GPUs
and, where programs wait for each other, all at once (`concurrent_programs.py`).

It shows whether the code for a GPU runs and computes what it should. What it cannot show: times, cuDNN's own results,
races, what a GPU's compiler does, and whatever depends on the order of streams.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
#: Environment variables: the compiled `device.cpp`, and whether Triton's kernels run in the interpreter.
LIBRARY, TRITON = "SIMULATED_GPU", "SIMULATED_GPU_TRITON"

#: Of the entry points; they go when this process ends.
_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def library() -> Path:
    """Compile the device for the torch at hand.

    Raises:
        BuildError: where there is no C++ compiler, or it refuses.
    """
    import torch

    from kernels.cpu import build

    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    links = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = [Path(__file__).with_name(name) for name in ("device.cpp", "memory.h")]
    # The kernels' cache knows no sources but theirs.
    content = f"-DCONTENT={hashlib.sha256(b''.join(part.read_bytes() for part in sources)).hexdigest()}"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", content, abi, "-isystem", str(root / "include")]
    return build.compiled([*build.compiler(), *flags, str(sources[0]), *links])


@functools.cache
def environment(*, triton: bool = True) -> dict[str, str]:
    """Environment of a process that shall see the simulated GPU.

    Args:
        triton: run Triton's kernels in its interpreter, which takes seconds where a GPU takes microseconds; otherwise
            launching one fails.
    """
    _folders.append(tempfile.TemporaryDirectory(prefix="simulated-gpu-"))
    folder = Path(_folders[-1].name)
    # torch calls such an entry point at the end of its import.
    facts = folder / "simulated_gpu-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated-gpu\nVersion: 1\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(
        "[torch.backends]\nsimulated_gpu = simulated_gpu.cuda:install\n", encoding="utf-8"
    )
    path = os.pathsep.join(map(str, (folder, TESTS, TESTS.parent)))
    ours = {"PYTHONPATH": path, LIBRARY: str(library()), TRITON: str(int(triton))}
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ours
