"""Compile the C++ kernel for this machine, once: a shared library per source, compiler, flags and CPU, kept in a cache.

Whoever makes a first call waits for the compiler, so the kernel is compiled in parts, one for each way to keep weights,
when they are first needed (`library`), and side by side with other libraries (`beside`).

Several processes may need it at the same moment. Each compiles into a file of its own and renames it into place, so
nobody ever loads half a library; what is wasted is a second or two of compiling, and nobody waits for a lock whose
holder died. Its name holds the digest of its content: loading a damaged library could kill the process, so one that
does not have its digest is built anew. `SEQ2SEQ_KERNEL_FLAGS` adds flags of the compiler, for sanitizers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import limited

SOURCE = Path(__file__).with_name("lstm.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
#: The machine at hand. Tests name others, to run the narrower vectors that other machines have. On ARM, clang knows no
#: `-march=native`.
NATIVE = "-mcpu=native" if platform.machine() in {"aarch64", "arm64"} else "-march=native"
COMPILERS = ("g++", "clang++")
#: What to do where a linker misses it, as on macOS, whose own g++ is clang.
NO_LIBGOMP = "GCC's libgomp is missing: install GCC and name it by CXX (on macOS: brew install gcc, then CXX=g++-15)"
#: The first part that was loaded, by target.
_first: dict[str, int] = {}
#: Libraries that this process asked for, and start and end of the compilation of those that were not there, seconds.
_asked: set[str] = set()
_spent: dict[str, tuple[float, float]] = {}
#: `Status` of status.h: what a function returns. Negative ones become exceptions.
DONE, CHANGED, NO_MEMORY = 0, 1, -1


class BuildError(RuntimeError):
    """The kernel cannot be built here; the message says why and what to do."""


def cache_folder() -> Path:
    """Folder of compiled kernels: `SEQ2SEQ_KERNEL_CACHE`, or the user's cache folder."""
    named = os.environ.get("SEQ2SEQ_KERNEL_CACHE")
    if named:
        # A library without a folder in its name would be looked for in the system's folders.
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seq2seq-kernels"


def compiler() -> list[str]:
    """The C++ compiler as a command: `CXX`, quoted as in a shell, or the first that is there.

    Raises:
        BuildError: when there is none.
    """
    command = _words("CXX") or [name for name in COMPILERS if shutil.which(name)][:1]
    found = shutil.which(command[0]) if command else None
    if found is None:
        wanted = command[0] if command else " or ".join(COMPILERS)
        msg = f"the CPU kernel is compiled on first use and {wanted} is not on the PATH: install a C++ compiler"
        raise BuildError(msg)
    # It is run from the folder of the sources.
    return [str(Path(found).absolute()) if os.sep in command[0] else command[0], *command[1:]]


def missing() -> str | None:
    """Reason why the kernel cannot be compiled here, as far as known without compiling it; None if it may work."""
    try:
        compiler()
    except BuildError as error:
        return str(error)
    return None


def spent_s() -> float:
    """Seconds that this process has waited for a compiler; 0 where everything was found compiled."""
    found, last = 0.0, 0.0
    for start, end in sorted(_spent.values()):
        found += max(0.0, end - max(start, last))
        last = max(last, end)
    return found


def spent() -> dict[str, float]:
    """Seconds of each compilation in this process, by the library's name."""
    return {name: end - start for name, (start, end) in _spent.items()}


def saved_s(compiled: Mapping[str, float], cores: int) -> float:
    """Seconds that this process would have waited longer for a compiler, had it not found what others compiled.

    Args:
        compiled: seconds of each compilation in another process, by the library's name.
        cores: of the machine, on which libraries are compiled side by side.
    """
    all_s = [seconds for name, seconds in (dict(compiled) | spent()).items() if name in _asked]
    return max(0.0, max(sum(all_s) / cores, max(all_s, default=0.0)) - spent_s())


def library(target: str = NATIVE, *, kept: int | None = None) -> ctypes.CDLL:
    """The compiled kernel, built if need be; what failed once is not tried again in this process.

    Args:
        target: the compiler's flags for a CPU.
        kept: how weights are kept, a number of `packing.KEPT`, for the functions that walk or that pack weights or
            count them; None for the others, which are the same in every part: any part that is there serves.

    Raises:
        BuildError: without a compiler, or when it fails.
    """
    part = _first.get(target, 0) if kept is None else kept
    return available(_outcome(target, part if target == NATIVE else None))


def loaded() -> bool:
    """Return whether this process has a part of the kernel."""
    return bool(_first)


def beside(job: Callable[[], object], *others: Callable[[], object]) -> None:
    """Do jobs at the same time, each of which waits for a compiler; one that fails says so when it is asked again."""

    def tried(other: Callable[[], object]) -> None:
        with contextlib.suppress(BuildError):
            other()

    threads = [threading.Thread(target=tried, args=(other,)) for other in others]
    try:
        for thread in threads:
            thread.start()
        tried(job)
        for thread in threads:
            thread.join()
    except BaseException:
        # An interrupt reaches this thread alone.
        limited.end_all()
        raise


def load(source: str, target: str, subject: str) -> ctypes.CDLL | str:
    """Load a library of one source beside the kernel's, built if needed; return the reason if that fails.

    Args:
        source: its name in this folder.
        target: the compiler's flags for a CPU.
        subject: what it has, in words.
    """
    try:
        return ctypes.CDLL(str(compiled(command(source, target))))
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the {subject} for CPUs cannot be loaded ({error})"


def available(found: ctypes.CDLL | str) -> ctypes.CDLL:
    """Return a library that was found.

    Raises:
        BuildError: where there is the reason in its place.
    """
    if isinstance(found, str):
        raise BuildError(found)
    return found


@functools.cache
def _outcome(target: str, part: int | None) -> ctypes.CDLL | str:
    """The library, or why there is none: whoever asks at every new shape must not wait for a failing compiler again.

    Builds for other targets are whole: they are for tests, and optimised little, so that most of their time would be
    the headers' in each part.
    """
    try:
        native = ctypes.CDLL(str(compiled(command(SOURCE.name, target if part is None else f"{target} -DPART={part}"))))
        _declare(native)
        _first.setdefault(target, part or 0)
    except BuildError as error:
        return str(error)
    except (OSError, AttributeError, RuntimeError) as error:  # not to be run or loaded, or no home folder
        return f"the CPU kernel cannot be built or loaded ({error}); CXX and SEQ2SEQ_KERNEL_CACHE name others"
    return native


def command(source: str, target: str = NATIVE) -> list[str]:
    """The compiler's command for a source in this folder, without the name of the output.

    Raises:
        BuildError: without a compiler.
    """
    return [*compiler(), *FLAGS, *target.split(), *_words("SEQ2SEQ_KERNEL_FLAGS"), source, *_openmp()]


def compiled(command: list[str]) -> Path:
    """The shared library that a command makes of a source in this folder, from the cache where it lies there.

    Raises:
        BuildError: when the compiler fails.
    """
    source = next(word for word in command if word.endswith(".cpp"))
    folder, stem = cache_folder(), f"{Path(source).stem}-{_fingerprint(command)}"
    _asked.add(stem)
    return next(filter(_whole, sorted(folder.glob(f"{stem}-*.so"))), None) or _compile(command, folder, stem)


def _words(variable: str) -> list[str]:
    """Words of an environment variable, quoted as in a shell."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        msg = f"{variable} is {text!r}, which is not a command ({error})"
        raise BuildError(msg) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Return whether a library is the compiled one: a power cut or full disk may have left another under its name."""
    try:
        return path.stem.endswith("-" + _digest(path.read_bytes()))
    except OSError:
        return False


def _openmp() -> list[str]:
    """Torch's own OpenMP library, so that its threads serve the kernel too; two pools would fight for the cores.

    Where torch brings none it is the compiler's libgomp. The kernel calls it by name (`team.h`), so no compiler needs
    OpenMP itself. Torch for macOS brings LLVM's, which has the same functions, as tests on Linux
    show with it. macOS was not tried.
    """
    root = Path(torch.__file__).parent
    places = (root, "lib/libgomp*.so*"), (root.parent, "torch.libs/libgomp*.so*"), (root, "lib/libomp.dylib")
    found = [str(path) for folder, pattern in places for path in sorted(folder.glob(pattern))]
    return found[:1] or ["-lgomp"]


def _fingerprint(command: list[str]) -> str:
    """Digest of what the library depends on: sources, command, the compiler's version and the CPU of `native`."""
    asked = [command[0], "--version"]
    version = _ran(asked, "said which version it is").stdout
    digest = hashlib.sha256()
    for source in sorted(SOURCE.parent.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    # entry.cpp reads torch's headers.
    for part in (*command, version, platform.machine(), cpu_flags(), torch.__version__):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def cpu_flags() -> str:
    """Instruction sets of this CPU, as the system lists them; a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(command: list[str], folder: Path, stem: str) -> Path:
    """Compile into a file of the folder whose name begins with `stem`, all or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=stem, suffix=".tmp")
    except OSError as error:
        msg = f"cannot write compiled kernels to {folder} ({error}); set SEQ2SEQ_KERNEL_CACHE to a writable folder"
        raise BuildError(msg) from error
    os.close(handle)
    source, start = f"{stem.split('-', maxsplit=1)[0]}.cpp", time.perf_counter()
    try:
        # Not with what is to be loaded before Python's libraries: under a sanitizer a compiler takes minutes.
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        # The source is named relative to its folder: GCC writes its name into the assembly before inline code, where a
        # line end in a folder's name is a syntax error.
        done = _ran([*command, "-o", name], f"compiled {source}", env=environment, cwd=SOURCE.parent)
        if done.returncode:
            said = done.stderr.strip()[:200] or f"it ended with {done.returncode} and said nothing"
            first = next((line for line in done.stderr.splitlines() if "error" in line.lower()), said)
            if "gomp" in done.stderr.lower():
                first += f"; {NO_LIBGOMP}"
            msg = f"{command[0]} could not compile {source}: {first}"
            raise BuildError(msg)
        content = Path(name).read_bytes()
        if not content:
            msg = f"{command[0]} succeeded but wrote nothing: is it a C++ compiler?"
            raise BuildError(msg)
        Path(name).chmod(0o755)
        return Path(name).replace(folder / f"{stem}-{_digest(content)}.so")
    finally:
        _spent[stem] = start, time.perf_counter()
        Path(name).unlink(missing_ok=True)


def _ran(command: list[str], what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a compiler as `limited.run` does; `what` it has then done.

    Raises:
        BuildError: where it took longer than a limit.
    """
    try:
        return limited.run(command, **options)
    except limited.LimitError as error:
        msg = f"{command[0]} was ended before it had {what}: {error}"
        raise BuildError(msg) from error


def _declare(native: ctypes.CDLL) -> None:
    """Declare what the functions take, which ctypes would otherwise cut to 32 bits, and raise what they report."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    native.lanes.restype = native.cores.restype = number
    native.failure.restype = ctypes.c_char_p
    native.instructions.restype, native.instructions.argtypes = ctypes.c_char_p, [number] * 3
    native.sums_from.restype, native.sums_from.argtypes = number, [number]
    native.hindrance.restype, native.hindrance.argtypes = ctypes.c_char_p, [number]
    native.packed_backward_bytes.restype, native.packed_backward_bytes.argtypes = number, [number] * 3
    native.backward_by_tiles.restype, native.backward_by_tiles.argtypes = number, [number]
    native.results_rounded.restype, native.results_rounded.argtypes = number, [number]
    native.numbers_kept.restype, native.numbers_kept.argtypes = number, [number] * 4
    native.linear_numbers.restype, native.linear_numbers.argtypes = number, [number] * 2
    native.mark.restype, native.mark.argtypes = ctypes.c_uint64, [pointer, number]
    native.in_large_pages.restype, native.in_large_pages.argtypes = None, [pointer, number]
    native.mark_all.restype, native.mark_all.argtypes = ctypes.c_uint64, [pointer, number]
    returning_a_status = {
        "packed_bytes": [number] * 3,
        "pack_forward": [pointer, pointer, pointer, number, number, number],
        "pack_backward": [pointer, pointer, number, number, number],
        "pack_linear": [pointer, pointer, number, number],
        "lstm_forward": [pointer, number],
        "lstm_layers": [ctypes.c_char_p],
        "lstm_backward": [pointer, number],
    }
    for name, takes in returning_a_status.items():
        function = getattr(native, name)
        function.restype, function.argtypes = number, takes
        # Calling back into Python takes a quarter of a microsecond: whoever makes the shortest calls checks by itself.
        if name != "lstm_layers":
            function.errcheck = lambda status, *_: checked(native, status)


def checked(native: ctypes.CDLL, status: int, failure: str = "failure") -> int:
    """Return a status of the library that is not negative.

    Args:
        native: the library.
        status: what a function of it returned.
        failure: name of its function that says why the last one failed.

    Raises:
        MemoryError: where native code found no memory; the message has the bytes and what they were for.
        RuntimeError: where it failed otherwise, as when threads cannot be started.
    """
    if status >= 0:
        return status
    said = getattr(native, failure)().decode(errors="replace")
    raise (MemoryError if status == NO_MEMORY else RuntimeError)(said)
