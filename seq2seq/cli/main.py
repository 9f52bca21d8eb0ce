"""The command line: `python -m seq2seq train | predict | translate | export`; without a command, the seed's example."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from kernels.host.output import run_command
from kernels.host.usage import part_of
from seq2seq.cli.arguments import parser

EXIT_OK, EXIT_NOT_OK, EXIT_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input becomes one line and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words == ["seed"]:
        from seq2seq.cli import example  # noqa: PLC0415 - torch is slow to import, and --help does without

        example.run()
        if not words:
            print("This was the seed's example. What else there is: python -m seq2seq --help", file=sys.stderr)
        return EXIT_OK
    arguments = parser().parse_args(words)
    # torch says so whenever its oneDNN settings are read, on any machine without an Intel GPU.
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
    from seq2seq.cli import commands  # noqa: PLC0415 - the same
    from seq2seq.cli.command_input import CommandError  # noqa: PLC0415
    from seq2seq.training.folder import TrainingError  # noqa: PLC0415

    try:
        return commands.run(arguments)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_OK
    except OSError as error:
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return EXIT_NOT_OK


if __name__ == "__main__":
    run_command(part_of("seq2seq"))
