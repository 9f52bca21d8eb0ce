"""The parser of every command line here, in the lowest room so that all can share it; it does not import torch.

argparse prints a command's usage before what is wrong with it; what was wrong is then below a screen of options.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from .output import why_unwritable

#: Name that the kernels are imported by: `kernels` in a checkout, another where they are installed.
PACKAGE = __name__.partition(".")[0]

#: What people write, and what it is called here: of these the spelling leads to something else.
OTHER_WORDS = {"gpu": "cuda"}
#: How argparse begins its line about words that it does not know.
UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong and where to read what is right; exit code 2.

    The commands of `add_subparsers` are of this class too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, _number(int, "whole number"))
        self.register("type", float, _number(float, "number"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is not among the choices; argparse lists all of them even where one letter is wrong."""
        if action.choices is not None and value not in action.choices:
            msg = f"invalid choice {str(value)!r}; {meant(str(value), map(str, action.choices))}"
            raise argparse.ArgumentError(action, msg)

    def refuse_unwritable(self, out: Path | None, what: str = "file") -> None:
        """End as `error` does where the value of `--out` could not be written, before the work whose result goes there.

        Args:
            out: the value; None where it was not given.
            what: `file` or `folder`.
        """
        if out is None:
            return
        why = why_unwritable(out) or ("it is a folder" if what == "file" and out.is_dir() else "")
        if why:
            self.error(f"--out {out} cannot be written ({why}); name another {what}")

    def add_subparsers(self, **kwargs: Any) -> Any:
        """As argparse's, with commands that refuse an unknown option themselves, since they know which there are."""
        return super().add_subparsers(**{"parser_class": _Command} | kwargs)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line; where a command is missing, it names those that there are."""
        if message.startswith(UNKNOWN):
            option = message.removeprefix(UNKNOWN).partition(" ")[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message += "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(option, known, 1))
        for action in self._actions:
            if action.choices and message.endswith(f"required: {action.metavar}"):
                message = f"no {action.metavar} is given; choose from {', '.join(action.choices)}"
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


class _Command(Parser):
    """The parser of one of several commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but nothing is left over."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(UNKNOWN + " ".join(left))
        return found, left


def part_of(command: str) -> Callable[[], int]:
    """A `main` for a module that is no program but holds one's work: an error that names the program; exit code 2.

    Without it, `python -m` of such a module does nothing and ends with success.

    Args:
        command: of the program, after `python -m`.
    """

    def refuse() -> int:
        print(f"error: this module is part of a command; run python -m {command}", file=sys.stderr)
        return 2

    return refuse


def meant(word: str, names: Iterable[str]) -> str:
    """Advice for a name that does not exist: `did you mean 'seed'?`, or the names where none is near."""
    known = {name.lower(): name for name in names}
    other = OTHER_WORDS.get(word.lower())
    near = [known[found] for found in ([other] if other in known else difflib.get_close_matches(word.lower(), known))]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from {', '.join(known.values())}"


def _number(kind: Callable[[str], float], expected: str) -> Callable[[str], float]:
    """A conversion that says what it expected; argparse would name a type of Python."""

    def convert(text: str) -> float:
        try:
            return kind(text)
        except ValueError as error:
            msg = f"{text!r} is not a {expected}"
            raise argparse.ArgumentTypeError(msg) from error

    return convert
