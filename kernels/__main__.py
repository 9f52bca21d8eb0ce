"""`python -m kernels check | tune | gpu-day | compile | sanitize | limits | export-c`: tools of the kernels.

A tool is imported when it is asked for, and parses what follows its name.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .host.output import run_command
from .host.usage import PACKAGE, Parser

#: Module of each tool, and its line in the help.
TOOLS = {
    "check": ("check", "are the kernels right on this GPU?"),
    "tune": ("tune", "measure which kernel is fastest on this GPU, for `auto`"),
    "gpu-day": ("gpu_day.command", "all of these on a GPU that you have for minutes only, the most valuable first"),
    "compile": ("compile", "compile them without a GPU: do they fit, do they spill?"),
    "sanitize": ("sanitize", "run the CPU kernel under the compiler's sanitizers"),
    "limits": ("cpu_limits", "least time in which this CPU can run an LSTM layer"),
    "export-c": ("export_c", "write a trained LSTM as a C library that needs neither Python nor torch"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the tool that the first argument names; return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    lines = "\n".join(f"  {name:<10} {line}" for name, (_, line) in TOOLS.items())
    parser = Parser(
        prog=f"python -m {PACKAGE}",
        description="Check, tune and compile the kernels, or take an LSTM to where there is no Python.",
        epilog=f"tools:\n{lines}\n\n`python -m {PACKAGE} TOOL --help` lists the options of a tool.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tool", choices=list(TOOLS), metavar="TOOL", help="one of those below")
    tool = parser.parse_known_args(words[:1])[0].tool
    return int(importlib.import_module(f".tools.{TOOLS[tool][0]}", __package__).main(words[1:]))


if __name__ == "__main__":
    run_command(main)
