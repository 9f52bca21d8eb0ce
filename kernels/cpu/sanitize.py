"""Run the CPU kernel under the compiler's sanitizers: `python -m kernels.cpu.sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer watch every access over odd sizes, ThreadSanitizer a team's threads.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernels.cpu.build import SOURCE, BuildError, compiler
from kernels.output import run_command
from kernels.usage import Parser

FLAGS = ("-O1", "-g", "-march=native", "-ffp-contract=fast", "-std=c++17", "-DPLAIN_THREADS", "-pthread")
CHECKS = {
    "addresses and undefined behaviour": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "data races": ("-fsanitize=thread",),
}


def check(source: Path = SOURCE) -> list[tuple[str, bool, str]]:
    """Each check with whether it passed, and what it said.

    Raises:
        BuildError: without a compiler, or one without sanitizers.
    """
    found = []
    for name, flags in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "check"
            command = [*compiler(), *FLAGS, *flags, str(source.with_name("sanitize.cpp")), "-o", str(program)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler
            if built.returncode:
                msg = f"cannot build the check for {name}: {built.stderr.strip().splitlines()[-1]}"
                raise BuildError(msg)
            done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=600)  # noqa: S603
            found.append((name, done.returncode == 0, (done.stdout + done.stderr).strip()))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each check found; 0 when all passed, 2 without a compiler that can."""
    Parser(prog="python -m kernels.cpu.sanitize", description=__doc__).parse_args(arguments)
    try:
        found = check()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, passed, said in found:
        print(f"{name}: {'nothing found' if passed else 'FAILED'} ({said if passed else said[:2000]})")
    return 0 if all(passed for _, passed, _ in found) else 1


if __name__ == "__main__":
    run_command(main)
