"""Compile the C++ kernel for this machine, once: a shared library per source, compiler, flags and CPU, kept in a cache.

Several processes may need it at the same moment. Each compiles into a file of its own and renames it into place, so
nobody ever loads half a library; what is wasted is a second or two of compiling, and nobody waits for a lock whose
holder died.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("lstm.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
#: The machine at hand. Tests name others, to run the narrower vectors that other machines have.
NATIVE = "-march=native"
COMPILERS = ("g++", "clang++")
TIME_LIMIT_S = 120


class BuildError(RuntimeError):
    """The kernel cannot be built here; the message says why and what to do."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: `SEQ2SEQ_KERNEL_CACHE`, or the user's cache folder."""
    named = os.environ.get("SEQ2SEQ_KERNEL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seq2seq-kernels"


def compiler() -> list[str]:
    """The C++ compiler as a command: `CXX`, or the first that is there.

    Raises:
        BuildError: when there is none.
    """
    command = os.environ.get("CXX", "").split() or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        wanted = command[0] if command else " or ".join(COMPILERS)
        msg = f"the CPU kernel is compiled on first use and {wanted} is not on the PATH: install a C++ compiler"
        raise BuildError(msg)
    return command


@functools.cache
def library(target: str = NATIVE) -> ctypes.CDLL:
    """The compiled kernel, built if need be.

    Args:
        target: the compiler's flags for a CPU.

    Raises:
        BuildError: without a compiler, or when it fails.
    """
    command = [*compiler(), *FLAGS, *target.split(), str(SOURCE), *_openmp()]
    path = cache_folder() / f"lstm-{_fingerprint(command)}.so"
    if not path.exists():
        _compile(command, path)
    native = ctypes.CDLL(str(path))
    _declare(native)
    return native


def _openmp() -> list[str]:
    """Torch's own OpenMP library, so that its threads serve the kernel too; two pools would fight for the cores."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    found += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    return [str(found[0])] if found else []


def _fingerprint(command: list[str]) -> str:
    """What the library depends on: source, command, the compiler's version and the CPU that `native` means."""
    asked = [command[0], "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout  # noqa: S603 - as below
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*command, version, platform.machine(), cpu_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def cpu_flags() -> str:
    """Instruction sets of this CPU, as the system lists them; a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(command: list[str], path: Path) -> None:
    """Compile into `path`, all or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    except OSError as error:
        msg = f"cannot write compiled kernels to {path.parent} ({error}); set SEQ2SEQ_KERNEL_CACHE to a writable folder"
        raise BuildError(msg) from error
    os.close(handle)
    try:
        done = subprocess.run(  # noqa: S603 - the compiler that the user has
            [*command, "-o", name], capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            msg = f"{command[0]} could not compile {SOURCE.name}: {first}"
            raise BuildError(msg)
        Path(name).chmod(0o755)
        Path(name).replace(path)
    except subprocess.TimeoutExpired as error:
        msg = f"{command[0]} did not finish {SOURCE.name} within {TIME_LIMIT_S} s"
        raise BuildError(msg) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _declare(native: ctypes.CDLL) -> None:
    """Say what the library's functions take, which ctypes would otherwise cut to 32 bits."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    native.lanes.restype = number
    native.mark.restype, native.mark.argtypes = ctypes.c_uint64, [pointer, number]
    native.pack_forward.argtypes = [pointer, pointer, pointer, number, number, number]
    native.pack_backward.argtypes = [pointer, pointer, number]
    native.lstm_forward.argtypes = [pointer, number]
    native.lstm_backward.argtypes = [pointer]
    native.transposed_product.argtypes = [pointer, pointer, pointer, number, number, number, number]
