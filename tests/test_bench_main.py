"""The command line: what a user mistypes is one line and exit code 2, and nothing was started or written for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench.console import Console
from bench.plan.cases import load_suite, suite_names
from bench.records.schema import Status
from bench.run import planning
from bench.run.worker_process import WorkerError

ROOT = Path(__file__).parent.parent


class Inside:
    """A worker that answers inside this process: what it says is the real one's, without its start of seconds."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: str, _: float, **fields: object):
        """Serve one request as the real worker does."""
        from bench.worker import server as worker

        answers = io.StringIO()
        # The real one's standard error is the run's log.
        with contextlib.redirect_stderr(io.StringIO()):
            worker.serve(io.StringIO(json.dumps({"request": request, **fields}) + "\n"), answers)
        for event in map(json.loads, answers.getvalue().splitlines()[1:]):
            if event["event"] == "failed":
                raise WorkerError(Status(event["status"]), event["reason"])
            if event["event"] != "done":
                yield event


@pytest.fixture
def empty(monkeypatch, tmp_path) -> Path:
    """An empty folder to work in, with workers that answer at once."""
    monkeypatch.setattr(planning, "Worker", Inside)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: list[str], capsys) -> str:
    """The one line with which a command line is refused, checked to be one, with exit code 2."""
    try:
        code = command_line.main(words)
    except SystemExit as end:  # argparse's own way
        code = end.code
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


BAD = {
    "unknown suite": (["--suite", "quik"], "'quik'"),
    "suite file that is not there": (["--suite", "mine.toml"], "'mine.toml'"),
    "unknown workload": (["--suite", "smoke", "--workload", "sede"], "'sede'"),
    "unknown variant": (["--suite", "smoke", "--variant", "lop"], "'lop'"),
    "variant pattern without a hit": (["--suite", "smoke", "--variant", "x*"], "'x*'"),
    "unknown axis": (["--workload", "seed@bach=2"], "'bach=2'"),
    "override that is not a number": (["--workload", "seed@batch=two"], "'batch=two'"),
    "override of 0": (["--workload", "seed@batch=0"], "'batch=0'"),
    "override without value": (["--workload", "seed@batch"], "'batch'"),
    "unknown mode": (["--mode", "traning"], "'traning'"),
    "unknown device": (["--device", "tpu"], "'tpu'"),
    "no thread": (["--threads", "0"], "'0'"),
    "threads below 0": (["--threads", "-1"], "'-1'"),
    "threads in words": (["--threads", "two"], "'two'"),
    "threads in digits of another script": (["--threads", "²"], "'²'"),
    "seed below 0": (["--seed", "-1"], "'-1'"),
    "seed beyond all": (["--seed", str(2**31)], "'2147483648'"),
    "half a thread": (["--threads", "1.5"], "'1.5'"),
    "budget in words": (["--budget", "long"], "'long'"),
    "budget of 0": (["--budget", "0"], "'0'"),
    "budget below 0": (["--budget=-3"], "'-3'"),
    "budget without end": (["--budget", "inf"], "'inf'"),
    "budget that is not a number": (["--budget", "nan"], "'nan'"),
    "plugin that is not there": (["--plugin", "mine.py"], "mine.py"),
    "plugin that is a folder": (["--plugin", "."], "plugin ."),
    "unknown wait policy": (["--omp-wait", "sometimes"], "'sometimes'"),
    "unknown option": (["--quick"], "--quick"),
    "misspelled option": (["--sute", "smoke"], "--sute smoke; did you mean --suite?; see python -m bench run --help"),
    "another word for CUDA": (["--device", "gpu"], "did you mean 'cuda'?"),
}


@pytest.mark.parametrize("problem", BAD)
def test_wrong_usage_of_run_is_one_line_that_names_it(problem, empty, capsys):
    """Exit code 2, one line that repeats what was wrong, and nothing written."""
    words, named = BAD[problem]
    assert named in refused(["run", *words], capsys)
    assert not list(empty.iterdir())


def test_an_existing_run_folder_is_refused(empty, capsys):
    """It is named, and left as it is."""
    (empty / "mine").mkdir()
    (empty / "mine" / "records.jsonl").write_text("{}\n")
    words = ["run", "--suite", "smoke", "--out", "mine"]
    for more in ([], ["--dry-run"]):
        assert command_line.main([*words, *more]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: mine exists")
        assert shown.err.count("\n") == 1
        assert shown.out == ""
    assert [path.name for path in (empty / "mine").iterdir()] == ["records.jsonl"]


def test_a_bad_suite_file_is_one_line(empty, capsys):
    """Errors inside the file are reported with the file's name."""
    (empty / "mine.toml").write_text('name = "mine"\nsummary = ""\nbudgt_s = 3\n[[select]]\nworkloads = ["seed"]\n')
    line = refused(["run", "--suite", "mine.toml"], capsys)
    assert "mine.toml" in line
    assert "'budgt_s'" in line


@pytest.mark.parametrize(
    ("words", "command"),
    [([], ""), (["rn"], ""), (["report"], " report"), (["run", "--out"], " run"), (["run", "--seed", "x\ny"], " run")],
)
def test_an_incomplete_command_is_one_line_that_says_where_to_look(words, command, empty, capsys):
    """A missing or bad value is reported without a screen of usage, but with the command that prints it."""
    assert refused(words, capsys).endswith(f"; see python -m bench{command} --help\n")
    assert not list(empty.iterdir())


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "unreadable records"])
def test_a_report_of_what_is_no_run_is_one_line(kind, empty, capsys):
    """A folder that is not there, is empty, is a file, or has records that cannot be read."""
    folder = empty / "run"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "unreadable records":
        (folder / "records.csv").write_bytes(b"\x00\xff\xfe")
    before = sorted(empty.rglob("*"))
    assert "run" in refused(["report", str(folder)], capsys)
    assert sorted(empty.rglob("*")) == before


def test_a_dry_run_prints_each_case_and_writes_nothing(empty, capsys):
    """All cases of the suite with what keeps them from running here, and the expected time."""
    assert command_line.main(["run", "--suite", "smoke", "--dry-run", "--out", "mine"]) == 0
    shown = capsys.readouterr()
    (selection,) = load_suite("smoke").select
    for variant in selection.variants:
        assert sum(variant in line.split() for line in shown.out.splitlines()) == 1
    assert "5 cases in 1 group" in shown.out
    assert "expected time about" in shown.out
    assert shown.err == ""
    assert not list(empty.iterdir())


@pytest.mark.usefixtures("empty")
def test_a_dry_run_says_what_cannot_run(capsys):
    """The reason stands beside the case."""
    words = ["run", "--suite", "smoke", "--variant", "cudnn", "--mode", "training", "--mode", "inference", "--dry-run"]
    assert command_line.main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " cudnn " in line]
    assert [line[1] for line in lines] == ["training", "inference"]
    assert all("exists on cuda only" in " ".join(line) for line in lines)


@pytest.mark.usefixtures("empty")
def test_options_replace_what_the_suite_says(capsys):
    """Workloads with overrides, variants with labels, modes and threads."""
    words = ["--workload", "seed@batch=2", "--variant", "loop#again", "--mode", "training", "--threads", "3"]
    assert command_line.main(["run", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 cases in 1 group" in shown
    assert "3 threads" in shown
    assert all(word in shown for word in ("seed@batch=2", "loop#again", "reference", "training"))


def test_list_names_everything_there_is(empty, capsys):
    """Every suite, workload and variant has its line, and what is for GPUs alone says so."""
    from seq2seq.execution.variants import VARIANTS
    from seq2seq.workloads.registry import WORKLOADS

    assert command_line.main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    first = {row[0]: " ".join(row) for row in rows}
    assert {*suite_names(), *WORKLOADS, *VARIANTS} <= set(first)
    for variant in VARIANTS.values():
        if variant.devices == ("cuda",):
            assert "exists on cuda only" in first[variant.name]
    assert first["reference"].endswith("runs")
    assert not list(empty.iterdir())


@pytest.mark.usefixtures("empty")
def test_list_for_a_gpu_says_why_there_is_none(capsys):
    """If torch sees no GPU, every variant for one says so."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["list", "--device", "cuda"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["cudnn"])
    assert "needs an NVIDIA GPU" in line
    assert (
        next(line for line in shown.splitlines() if line.split()[:1] == ["onednn"])
        .rstrip()
        .endswith("exists on cpu only")
    )


def test_help_tells_the_exit_codes(capsys):
    """Exit codes that a script must know."""
    with pytest.raises(SystemExit) as end:
        command_line.main(["--help"])
    assert end.value.code == 0
    assert "Exit codes" in capsys.readouterr().out


SPY = """
import sys
from bench.__main__ import main
code = main(sys.argv[1:])
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "seq2seq", "kernels")]
# What every command line uses, which imports no torch.
heavy = [name for name in heavy if name != "kernels" and not name.startswith("kernels.host")]
print(code, heavy, file=sys.stderr)
"""


@pytest.mark.slow
def test_the_parent_never_imports_torch(tmp_path):
    """A dry run does all that the parent does before it measures: torch would take cores and memory from workers."""
    words = ["run", "--suite", "smoke", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", SPY, *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == "0 []"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"\xef\xbb\xbf1 / 0\r", "ZeroDivisionError"),
        (b"import no_such_module\n", "no_such_module"),
        (b"def\n", "mine.py is not Python in UTF-8: SyntaxError"),
        ("1 / 0\n".encode("utf-16"), "mine.py is not Python in UTF-8: SyntaxError"),
    ],
    ids=["raises", "imports", "syntax", "utf-16"],
)
def test_a_plugin_that_fails_is_one_line(text, named, tmp_path, monkeypatch, capsys):
    """The plugin's own error is told in one line with exit code 2, and nothing is written."""
    plugin = tmp_path / "mine.py"
    plugin.write_bytes(text)
    monkeypatch.chdir(tmp_path)
    assert named in refused(["run", "--suite", "smoke", "--plugin", str(plugin), "--dry-run"], capsys)
    # Besides the plugin's bytecode, which Python keeps unless told otherwise.
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_a_dry_run_tells_of_the_second_instrument(empty, capsys):
    """It is in the plan of the suite that has it, and gone when it is refused."""
    line = "then pytest-benchmark, as a second instrument, times"
    assert command_line.main(["run", "--suite", "quick", "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    assert command_line.main(["run", "--suite", "quick", "--dry-run", "--no-second-instrument"]) == 0
    assert line not in capsys.readouterr().out
    assert not list(empty.iterdir())


def test_more_threads_than_cores_are_warned_of(empty, capsys, monkeypatch):
    """One line that says what it means; as many threads as cores are no reason for it."""
    monkeypatch.setattr(command_line, "usable_cores", lambda: 2)
    words = ["run", "--suite", "smoke", "--variant", "reference", "--dry-run", "--threads"]
    assert command_line.main([*words, "3"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert "3 threads share the 2 cores" in line
    assert "--threads 2" in line
    assert command_line.main([*words, "2"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("where", ["file/below", "file"])
def test_a_folder_that_cannot_be_made_is_refused_at_once(where, empty, capsys):
    """Before anything is asked of a worker, dry run or not; nothing is made."""
    (empty / "file").touch()
    for more in ([], ["--dry-run"]):
        line = refused(["run", "--suite", "smoke", "--out", where, *more], capsys)
        assert "file" in line
        assert "name another with --out" in line
    assert [path.name for path in empty.iterdir()] == ["file"]


def test_a_run_in_which_nothing_can_run_promises_no_time(empty, capsys):
    """It says what will happen instead."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["run", "--workload", "seed", "--variant", "cudnn", "--device", "cuda", "--dry-run"]
    assert command_line.main(words) == 0
    shown = capsys.readouterr().out
    assert "none can run here" in shown
    assert "expected time" not in shown
    assert list(empty.iterdir()) == []


def test_many_cases_that_cannot_run_for_one_reason_are_one_line(empty, capsys):
    """In the table of a dry run, and in a run's lines and last table; the records keep a row for each."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["run", "--workload", "seed", "--variant", "cudnn*", "--device", "cuda", "--out", "mine"]
    words += ["--mode", "inference", "--mode", "training"]
    for more in (["--dry-run"], []):
        assert command_line.main([*words, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        told = [line for line in lines if "needs an NVIDIA GPU" in line]
        assert len(told) == 1
        assert not [line for line in lines if "cudnn-fair" in line]
    assert "nothing was measured" in lines
    assert not [line for line in lines if "which variant to ship" in line]
    rows = (empty / "mine" / "records.csv").read_text().splitlines()[1:]
    assert len(rows) >= 14
    assert told[0].startswith(f"{len(rows)} cases unavailable: needs an NVIDIA GPU")


@pytest.mark.usefixtures("empty")
def test_a_narrowed_run_says_that_it_keeps_the_time_of_the_suite(capsys):
    """Unless the command line says how long, or nothing is narrowed."""
    words = ["run", "--suite", "smoke", "--dry-run"]
    seconds = load_suite("smoke").budget_s
    budget = f"(one group) get the whole measuring time of the suite smoke, {seconds:.0f} s;"
    for more, said in (["--variant", "onednn"], True), (["--variant", "onednn", "--budget", "1"], False), ([], False):
        assert command_line.main([*words, *more]) == 0
        assert (budget in capsys.readouterr().out) == said


def test_a_table_fits_the_terminal():
    """Cells are wrapped, whatever they hold; a line of text is left to the terminal."""
    rich = pytest.importorskip("rich.console")
    console = Console()
    console._rich = rich.Console(force_terminal=True, width=60, file=io.StringIO(), soft_wrap=True, color_system=None)
    console.table(["a", "b", "c"], [["word " * 30, "x" * 100, "1"], ["2", "3", "4"]])
    lines = console._rich.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(line.count("x") for line in lines) == 100


@pytest.mark.usefixtures("empty")
def test_list_says_where_a_runtime_serves(capsys):
    """In a user's words: what it cannot do."""
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.split()[:1] == ["cpu-fused-int8"])
    assert "runs; inference only" in line or "install a C++ compiler" in line
