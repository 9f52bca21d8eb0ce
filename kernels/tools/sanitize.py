"""Run the CPU kernel, the head and the decoder under the compiler's sanitizers: `python -m kernels sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer watch every access over odd sizes, ThreadSanitizer a team's threads.
`python -m kernels sanitize -- -m pytest -q tests/test_cpu_inference.py` runs Python with these arguments and the
kernel built for the first two, which then see the memory of torch's tensors too.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from ..cpu.build import NATIVE, SOURCE, BuildError, compiler
from ..host.output import run_command
from ..host.usage import PACKAGE, Parser, part_of

FLAGS = ("-ffp-contract=fast", "-std=c++17", "-DPLAIN_THREADS", "-pthread")
#: Lines of the source are named in what is found; to follow variables too the compiler would need twice the time. With
#: more optimisation GCC takes four times as long to compile what watches addresses, and less of it is watched: at -O1
#: two of three runs without the barrier after the projection ended with a wrong result and no race.
ADDRESSES = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = "data races"
CHECKS = {"addresses and undefined behaviour": ADDRESSES, RACES: ("-Og", "-g1", "-fsanitize=thread", "-DFOR_RACES")}
LSTM, HEAD, DECODER = "sanitize.cpp", "sanitize_head.cpp", "sanitize_decoder.cpp"
#: Programs by what they run.
PROGRAMS = {"LSTM": LSTM, "head": HEAD, "decoder": DECODER}


def check(names: Collection[str] = CHECKS) -> list[tuple[str, bool, str]]:
    """Each check of these names on each program, with whether it passed, and what it said.

    Raises:
        BuildError: without a compiler, or one without sanitizers.
    """
    found = []
    for subject, main_file in PROGRAMS.items():
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                found.append((f"{subject}, {name}", *run(build(name, Path(folder) / "check", main_file=main_file))))
    return found


def build(name: str, program: Path, source: Path = SOURCE, main_file: str = LSTM, target: str = NATIVE) -> Path:
    """Compile a check into a program; returns its path.

    Args:
        name: key of `CHECKS`.
        program: path of the program.
        source: a file beside which all other sources lie.
        main_file: which of `PROGRAMS`.
        target: the compiler's flags for a CPU.

    Raises:
        BuildError: without a compiler, or one without sanitizers.
    """
    command = [*compiler(), *FLAGS, *target.split(), *CHECKS[name], main_file, "-o", str(program)]
    # From the folder of the sources, as `kernels.cpu.build` does.
    built = subprocess.run(  # noqa: S603 - the user's compiler
        command, capture_output=True, text=True, errors="replace", check=False, cwd=source.parent
    )
    if built.returncode:
        msg = f"cannot build the check for {name}: {built.stderr.strip().splitlines()[-1]}"
        raise BuildError(msg)
    return program


def run(program: Path) -> tuple[bool, str]:
    """Run a check; returns whether it passed, and what it said."""
    # The first race is enough to report.
    environment = {"TSAN_OPTIONS": "halt_on_error=1"} | os.environ
    done = subprocess.run(  # noqa: S603 - what was just built
        [program], capture_output=True, text=True, errors="replace", check=False, timeout=600, env=environment
    )
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def environment() -> dict[str, str]:
    """Environment of a Python process in which AddressSanitizer watches the kernel; a finding ends the process with 1.

    Raises:
        BuildError: without a compiler, or where it does not have the sanitizer as a shared library, as GCC does.
    """
    flags = [*ADDRESSES]
    # The sanitizer has to come before all other libraries, and C++'s own before torch throws its first exception. clang
    # finds GCC's too, which lacks functions that clang calls.
    if sanitizer := _library(f"libclang_rt.asan-{platform.machine()}.so"):
        flags.append("-shared-libasan")
    else:
        sanitizer = _library("libasan.so")
    libraries = {"libasan.so": sanitizer, "libstdc++.so": _library("libstdc++.so")}
    for name, found in libraries.items():
        if not found:
            msg = f"{compiler()[0]} has no {name}: install GCC with its sanitizers, and name it by CXX"
            raise BuildError(msg)
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries.values()),
        # Python keeps much to its end. What is too large gives no memory, as without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "SEQ2SEQ_KERNEL_FLAGS": " ".join(flags),
    }


def _library(name: str) -> str:
    """Path of a library as the compiler finds it, or nothing.

    Raises:
        BuildError: without a compiler.
    """
    command = [*compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout.strip()  # noqa: S603 - the user's
    return found if Path(found).is_absolute() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each check found; 0 when all passed, 2 without a compiler that can; or the exit code of Python."""
    parser = Parser(prog=f"python -m {PACKAGE} sanitize", description=__doc__)
    parser.add_argument(
        "python", nargs="*", metavar="-- ARGUMENT", help="run Python with these arguments under the sanitizers instead"
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if options.python and "--" not in given:
        parser.error(f"unexpected {' '.join(options.python)}; arguments for Python come after --")
    try:
        if options.python:
            command = [sys.executable, *options.python]
            return subprocess.run(command, env=environment(), check=False).returncode  # noqa: S603 - what was asked for
        found = check()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, passed, said in found:
        print(f"{name}: {'nothing found' if passed else 'FAILED'} ({said if passed else said[:2000]})")
    return 0 if all(passed for _, passed, _ in found) else 1


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} sanitize"))
