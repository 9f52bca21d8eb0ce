"""Standard streams take any text and may be closed at any time; new files are whole or not there."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.host.output import printable, replacing, why_unwritable, write_new, write_whole

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash") or ""
TEXT = "Grüße \udcfc 日本"
HEAD = "import sys, os; from kernels.host.output import is_closed, lacking, run_command\n"


def run(program: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program's `main` as a command, its streams redirected by a shell."""
    variables = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]} | environment
    return subprocess.run(
        [BASH, "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, HEAD + program],
        env=variables, capture_output=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "Grüße \\udcfc 日本".encode()),
        ({"PYTHONIOENCODING": "ascii"}, rb"Gr\xfc\xdfe \udcfc \u65e5\u672c"),
        ({"PYTHONIOENCODING": "latin-1"}, b"Gr\xfc\xdfe \\udcfc \\u65e5\\u672c"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"Gr\xfc\xdfe \udcfc \u65e5\u672c"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stream_of_any_encoding_takes_any_text(variables, expected, unbuffered):
    """Characters that the encoding lacks are escaped, on both streams, buffered or not."""
    program = f"def main(): print({TEXT!a}); print({TEXT!a}, file=sys.stderr); return 7\nrun_command(main)"
    found = run(program, PYTHONUNBUFFERED=unbuffered, **variables)
    assert (found.returncode, found.stdout, found.stderr) == (7, expected + b"\n", expected + b"\n")


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path):
    """`command | head -1`: what is done after that is done, nothing is said of it, and the exit code is the command's.

    So for Python's own print, for what rich prints, and for the first write after the pipe has closed.
    """
    done = tmp_path / "done"
    program = f"""
import time
from rich.console import Console
def main():
    print("first", flush=True)
    time.sleep(0.3)
    for number in range(2000):
        print("more", number)
        Console().print("and more")
    open({str(done)!r}, "w").write("yes")
    return 5
run_command(main)"""
    found = run(program, "| head -1")
    assert (found.returncode, found.stdout, found.stderr) == (5, b"first\n", b"")
    assert done.read_text() == "yes"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_what_cannot_be_written_in_the_end_is_an_error():
    """A full disk below standard output is one line and exit code 1, not a traceback at exit."""
    found = run("def main(): print('lost'); return 0\nrun_command(main)", "> /dev/full")
    assert (found.returncode, found.stderr) == (1, b"error: standard output: No space left on device\n")


def test_a_closed_stream_leads_nowhere(tmp_path):
    """No file that is opened later gets its number: what is printed below Python would be written into it."""
    path = tmp_path / "table"
    program = f"""
def main():
    print("gone"), print("gone", file=sys.stderr), sys.stdout.write("gone")
    file = open({str(path)!r}, "w")
    os.write(1, b"from C"), os.write(2, b"from C")
    file.write(f"{{is_closed(sys.stdout)}} {{file.fileno() > 2}}")
    return 3
run_command(main)"""
    found = run(program, ">&- 2>&-")
    assert (found.returncode, path.read_text()) == (3, "True True")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_one_line(number, code):
    """Ctrl-C and SIGTERM end a command wherever it is, and whatever cleans up behind it does."""
    # A shell lets what it runs in the background ignore Ctrl-C, and these tests may run there.
    program = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
    try:
        os.kill(os.getpid(), {int(number)})
    finally:
        print("cleaned")
run_command(main)"""
    found = run(program)
    assert (found.returncode, found.stdout, found.stderr) == (code, b"cleaned\n", b"interrupted\n")


def test_every_command_line_ends_this_way():
    """Whatever `python -m` starts goes through `run_command`, but for a worker and programs that stand alone."""
    found = {}
    for path in (path for room in ("bench", "kernels", "seq2seq") for path in (ROOT / room).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                found[f"{path.parent.name}/{path.name}"] = "run_command(" in ast.unparse(node)
    assert len(found) > 5
    alone = {name for name, through in found.items() if not through}
    deployed = {"deployment/deployed_forecast.py", "deployment/deployed_texts.py", "serve/example.py"}
    # Processes that a command starts, and whose last line it reads.
    assert alone == deployed | {"worker/__main__.py", "worker/ranks.py", "serve/generator.py", "sweep/measure.py"}


def test_no_module_with_a_command_s_work_succeeds_by_doing_nothing():
    """Whatever has a `main` runs it or refuses as a program; a worker's has arguments that no user knows."""
    silent = set()
    for path in (path for room in ("bench", "kernels", "seq2seq") for path in (ROOT / room).rglob("*.py")):
        body = ast.parse(path.read_text()).body
        ends = isinstance(body[-1], ast.If) and "__main__" in ast.unparse(body[-1].test) if body else False
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body) and not ends:
            silent.add(f"{path.parent.name}/{path.name}")
    assert silent == {"worker/server.py"}


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("kernels.cpu.serve.export", "kernels export-c"),
        ("kernels.tools.check", "kernels check"),
        ("kernels.tools.gpu_day.command", "kernels gpu-day"),
        ("seq2seq.cli.main", "seq2seq"),
    ],
)
def test_a_part_of_a_command_names_it(module, command):
    """Also where the module was the command once."""
    found = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    said = f"error: this module is part of a command; run python -m {command}\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", said)


@given(st.binary().filter(lambda raw: b"\0" not in raw))
def test_a_printable_name_is_text_that_can_be_written(raw):
    """Any bytes of a name, in a UTF-8 locale and in ASCII, give the same text; what is UTF-8 stays as it is."""
    found = printable(raw.decode("utf-8", "surrogateescape"))
    assert found == printable(raw.decode("ascii", "surrogateescape"))
    found.encode()
    try:
        assert found == raw.decode()
    except UnicodeDecodeError:
        assert "\\x" in found


def test_new_files_are_all_there_or_none(tmp_path):
    """One that exists stays as it is, and nothing is left of the others."""
    write_new({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert (tmp_path / "b").read_bytes() == b"2"
    with pytest.raises(FileExistsError):
        write_new({tmp_path / "c": b"3", tmp_path / "a": b"4"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(FileNotFoundError):
        write_new({tmp_path / "c": b"3", tmp_path / "no" / "d": b"4"})
    assert not (tmp_path / "c").exists()


def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path, monkeypatch):
    """A file where a folder should be, a file system that refuses, a name that is too long; nothing is left behind."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "deep" / "new"):
        assert why_unwritable(path) == ""
    assert why_unwritable(tmp_path / "file" / "new") == f"{tmp_path / 'file'} is not a folder"
    assert why_unwritable(tmp_path / ("x" * 300)) == "File name too long"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert why_unwritable(tmp_path / "new") == "Read-only file system"


def test_two_that_write_one_file_do_not_meet(tmp_path):
    """Each has a file of its own until it is whole; the later one wins, and nothing is left beside it."""
    path = tmp_path / "table.json"
    with replacing(path) as first:
        first.write(b"first")
        write_whole(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "table.json"
    write_whole(path, b"old")
    with pytest.raises(ValueError, match="closed file"), replacing(path) as file:
        file.close()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
