"""What the terminal gets: live, in a log, quietly and as JSON; the doctor, and one case in depth."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console as RichConsole
from run_folders import changed, make_run

from bench import console as terminal
from bench.__main__ import main
from bench.analysis.run_summary import summary_row
from bench.console import Console, Output
from bench.plan.cases import Case
from bench.plan.own_model import VARIABLE
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status
from bench.terminal import doctor
from bench.terminal.doctor import FactState, MachineCheck
from bench.terminal.show import again, facts

GOOD = Record("seed", "lstm", "onednn", "inference", "cpu", speedup=2.0, speedup_lo=1.9, speedup_hi=2.1)
BAD = Record("seed", "lstm", "loop", "inference", "cpu", status=Status.OOM, reason="too [big]")
CASE = Case("seed", "onednn", "inference", "cpu", 2)


class Times(NamedTuple):
    """CPU times as the system counts them, seconds."""

    user: float = 0.0
    nice: float = 0.0
    system: float = 0.0
    idle: float = 0.0
    iowait: float = 0.0
    irq: float = 0.0
    softirq: float = 0.0
    steal: float = 0.0


def played(output: Output = Output.FULL, *, live: bool = False, width: int = 100) -> str:
    """What a run of two cases prints."""
    console = Console(2, 60.0, output)
    file = io.StringIO()
    console._rich = RichConsole(file=file, force_terminal=live, width=width, soft_wrap=True, color_system=None)
    with console:
        console.say("begun")
        console.advance(CASE, "cold start")
        console.record(GOOD)
        console.record(BAD)
        console.say("page: somewhere", "bold")
    console.verdict({"exit_code": 1, "share": float("nan")})
    return file.getvalue()


def test_a_terminal_shows_the_group_and_the_time_left(monkeypatch):
    """The live table has the case that is at it, the bar and the time left; every record stays as a line."""
    seen = []

    def drawn(_, shown):
        sketch = io.StringIO()
        RichConsole(file=sketch, width=100).print(shown)
        seen.append(sketch.getvalue())

    monkeypatch.setattr(terminal.Live, "update", drawn)
    out = played(live=True)
    assert "seed/inference/cpu/2t" in seen[0]
    assert "cold start" in seen[0]
    assert "about 60 s left" in seen[0]
    assert "2.00x" in seen[-1]
    assert "2.00x [1.90, 2.10]" in out
    assert "oom: too [big]" in out


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    """Without a terminal progress is a line, not more often than every half minute."""
    assert "cases, about" not in played()
    monkeypatch.setattr(terminal, "LOG_EVERY_S", 0.0)
    out = played()
    assert "0/2 cases, about 60 s left: seed/inference/cpu/2t onednn: cold start" in out
    assert "\x1b" not in out


def test_quietly_only_what_is_wrong_and_the_page_is_left():
    """A case that failed and the last line; no figure."""
    assert played(Output.QUIET).splitlines() == [
        "seed                     inference loop             oom: too [big]",
        "page: somewhere",
    ]


def test_json_is_one_line_a_record_and_a_verdict(capsys):
    """Standard output has nothing but JSON; what is said goes elsewhere."""
    said = played(Output.JSON)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["record", "record", "verdict"]
    assert lines[0]["speedup"] == 2.0
    assert lines[2] == {"event": "verdict", "exit_code": 1, "share": None}
    assert "begun" in said


def test_the_time_left_follows_the_pace(monkeypatch):
    """At first the guess counts, at the end the pace: half done in a minute leaves a minute or so."""
    console = Console(4, 400.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: console._start_s + 60.0)
    console._ended = 2
    assert console._left() == ", about 200 s left".replace("200 s", "3 min")
    console._ended = 4
    assert console._left() == ""


def test_the_doctor_names_what_is_lacking(monkeypatch, capsys):
    """Something that a run needs makes the exit code 1, with the remedy; less than that does not."""
    fine = [MachineCheck("torch", FactState.OK, "2.13"), MachineCheck("GPU", FactState.LIMITED, "none", "none needed")]
    monkeypatch.setattr(doctor, "checks", lambda: iter(fine))
    assert main(["doctor"]) == 0
    assert "ready to measure" in capsys.readouterr().out
    monkeypatch.setattr(
        doctor, "checks", lambda: iter([*fine, MachineCheck("torch", FactState.MISSING, "none", "install torch")])
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "install torch" in out
    assert "not ready; missing: torch" in out


def test_a_busy_machine_is_a_warning_and_not_a_lack(monkeypatch, capsys):
    """It says so in its own words, and the exit code depends on what is missing alone."""
    busy, missing = doctor.judged_noise(1.5, 0.0), MachineCheck("disk", FactState.MISSING, "0 MB", "make room")
    for found, code in ([busy], 0), ([busy, missing], 1):
        monkeypatch.setattr(doctor, "checks", lambda found=found: iter(found))
        assert main(["doctor"]) == code
        out = capsys.readouterr().out
        assert "warning: the machine is busy (other programs use 1.50 cores)" in out
        assert "ready to measure" not in out
        assert ("not ready; missing: disk" in out) == bool(code)
        assert "lack of: noise" not in out


def test_each_check_of_the_doctor_can_fail(monkeypatch):
    """Planted: no compiler, no package, no torch, little memory and disk, a busy machine, a slow governor, a quota."""
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.compiler().state is FactState.LIMITED
    assert (
        doctor.packages("x", ("no_such_package",), FactState.MISSING, "get it").found == "no_such_package not installed"
    )
    assert [check.state for check in doctor.torch_checks("the worker died")] == [FactState.MISSING]
    assert doctor.memory(1e8).state is FactState.MISSING
    assert doctor.disk(1e8).state is FactState.LIMITED
    assert doctor.judged_noise(1.5, 0.0).state is FactState.BUSY
    assert doctor.judged_noise(0.02, 0.0).state is FactState.OK
    assert "performance" in doctor.governor({"governor": "powersave"}).remedy
    for machine in ({}, {"governor": "unknown on this system"}):
        unknown = doctor.governor(machine)
        assert (unknown.state, unknown.found) == (FactState.UNKNOWN, "this system does not say")
    assert doctor.governor({"governor": "performance"}).state is FactState.OK
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 0.5)
    assert doctor.cores().state is FactState.LIMITED


def test_noise_counts_what_others_take(monkeypatch):
    """Counters of two cores, of which another process keeps one busy for a second."""
    readings = iter([Times(), Times(user=1.0, idle=1.0)])
    monkeypatch.setattr(doctor.psutil, "cpu_times", lambda: next(readings))
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda interval: interval)
    monkeypatch.setattr(doctor.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(doctor.psutil, "Process", lambda: type("P", (), {"cpu_times": staticmethod(Times)}))
    assert doctor.noise().found == "other programs use 1.00 cores"


def test_show_lists_the_cases_of_a_run(tmp_path, capsys):
    """Without a case: every case with its status."""
    folder = make_run(tmp_path / "run", figured=True)
    assert main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "seed/inference/onednn" in out
    assert "seed/inference/loop" in out


def test_show_has_one_case_in_depth_with_its_repro_line(tmp_path, capsys):
    """The figures, what is known of the case, and the command that measures it again, plugins included."""
    environment = changed("run", arguments={"plugin": ["my plugin.py"]})
    folder = make_run(tmp_path / "run", environment, figured=True)
    assert main(["show", str(folder), "onednn"]) == 0
    out = capsys.readouterr().out
    assert "2.00x [" in out or "x [" in out
    assert "60 rounds in 3 processes" in out
    assert "--workload seed --mode inference --variant onednn --device cpu --threads 1 --plugin 'my plugin.py'" in out


def test_show_names_a_model_of_the_user_in_its_repro_line():
    """The model, its inputs, functions and the added variant: without them there is no such workload."""
    said = {"model": "/m.py:build", "inputs": "/i.py:one", "trace": "", "loss": "/m.py:loss", "metric": "/m.py:score"}
    said |= {"variants": {"mine": "/v.py:make", "other": "/v.py:other"}, "folder": "/"}
    environment = {"threads": {"workers": {VARIABLE: json.dumps(said)}}}
    run = RecordedRun(Path("run"), (), 0, {}, environment)
    own = Record("own:m", "m", "mine", "training", "cpu", threads=2, omp_wait="passive")
    assert again(own, run) == (
        "python -m bench run --model /m.py:build --inputs /i.py:one --loss /m.py:loss --metric /m.py:score "
        "--add-variant mine=/v.py:make --workload own:m --mode training --variant mine --device cpu --threads 2 "
        "--omp-wait passive"
    )
    assert "--model" not in again(GOOD, run)


def test_show_marks_figures_to_distrust():
    """A throughput comes from the median: where that is no estimate, neither is it; doubts mark what is left."""
    record = replace(GOOD, latency_p50_s=1.0, latency_p50_lo_s=0.9, latency_p50_hi_s=1.1, throughput_seq_per_s=2e3)
    assert dict(facts(record))["throughput"] == "2.00 k sequences/s"
    assert "doubtful" not in dict(facts(record))
    wide = dict(facts(replace(record, latency_p50_lo_s=0.01, latency_p50_hi_s=9.0, interval_wide=True)))
    assert (wide["throughput"], wide["p50"].split(" [")[0]) == ("~no estimate", "~no estimate")
    assert wide["speedup"] == "~2.00x [1.90, 2.10]"
    assert wide["doubtful"] == "the interval is wider than the suite asked for"
    assert summary_row(replace(record, latency_p50_hi_s=90.0, throughput_steps_per_s=2e3), best=False)["steps/s"] == (
        "no estimate"
    )


@pytest.mark.parametrize(
    ("asked", "ran", "said"),
    [
        ("int8", "fp32", "asked for int8; products that the profiler sees ran in fp32"),
        ("int8", "", "int8"),
        ("bf16", "bf16 and fp32", "bf16 and fp32"),
        ("tf32", "fp32", "tf32"),
        ("fp32", "fp32", "fp32"),
        ("", "fp32", "fp32"),
    ],
)
def test_show_says_which_precision_was_asked_for(asked, ran, said):
    """Products inside our kernels are hidden from the profiler, which then reports only those of other layers."""
    assert dict(facts(replace(GOOD, precision=asked, ran_precision=ran)))["precision"] == said


def test_show_has_speedups_over_any_variant(tmp_path, capsys):
    """Over `onednn` the reference's is the inverse of what `onednn` has over the reference, and its own is 1."""
    folder = make_run(tmp_path / "run", figured=True)
    assert main(["show", str(folder), "--against", "onednn"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "seed/inference" in line]
    figures = {line.split()[0].rpartition("/")[2]: line for line in lines}
    assert "1.00x" in figures["onednn"]
    assert "0.50x" in figures["reference"]


def test_speedups_over_any_variant_are_marked_where_they_are_doubtful(tmp_path, capsys):
    """As those over the reference are, with what the mark means."""
    folder = make_run(tmp_path / "run", figured=True, disturbed_share=1.0)
    assert main(["show", str(folder), "--against", "onednn"]) == 0
    *lines, meaning = capsys.readouterr().out.splitlines()
    assert all("~" in line for line in lines if "seed/inference" in line)
    assert meaning.startswith("~: a doubtful figure")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "onedn"], "did you mean"),
        (["other/inference/onednn", "--against", "onednn"], "lists all cases"),
        (["onedn"], "did you mean"),
        (["inference"], "matches 6 cases"),
        (["*"], "matches 6 cases"),
        (["onednn"], "matches 2 cases"),
        (["--trace", "t.json"], "is of one case"),
        (["onednn", "--rivals", "cpu-*"], "lists all cases"),
        (["onednn", "--format", "markdown"], "for tables of cases"),
        (["--rivals", "onedn"], "did you mean 'onednn'?"),
        (["--rivals", "*"], "leaves no rival"),
    ],
)
def test_show_refuses_what_is_not_one_case(tmp_path, capsys, words, said):
    """A typo gets the near name, a pattern of several their names; exit code 2."""
    folder = make_run(tmp_path / "run", workloads=("seed", "other"))
    assert main(["show", str(folder), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["show", "{run}", "onednn", "--trace", "{file}"],
        ["history", "{root}", "--out", "{file}"],
        ["report", "{run}", "{run}", "--out", "{file}"],
    ],
)
def test_a_file_that_cannot_be_written_is_a_wrong_name(tmp_path, capsys, words):
    """Said before anything is profiled, with what to do; exit code 2."""
    run = make_run(tmp_path / "runs" / "run", figured=True)
    make_run(tmp_path / "runs" / "run2", figured=True)
    file = tmp_path / "none" / "file.html"
    if words[0] != "show":
        # A folder that is missing is made for a page.
        file.parent.write_text("", encoding="utf-8")
    assert main([word.format(run=run, root=run.parent, file=file) for word in words]) == 2
    assert capsys.readouterr().err.endswith("; name another file\n")


@pytest.mark.slow
def test_show_writes_a_chrome_trace(tmp_path, capsys):
    """One call of the case as a trace that has the LSTM in it; an existing file is kept."""
    folder = make_run(tmp_path / "run", figured=True)
    trace = tmp_path / "trace.json"
    assert main(["show", str(folder), "seed/inference/onednn", "--trace", str(trace)]) == 0
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::lstm" in names
    assert main(["show", str(folder), "seed/inference/onednn", "--trace", str(trace)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_without_a_command_one_line_names_them(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.startswith("error: no COMMAND is given; choose from run, list, doctor, ")


def test_list_shows_the_cases_of_a_suite(capsys):
    """Every case of a suite with what keeps it from running here; a typo gets the near name."""
    assert main(["list", "--suite", "smoke"]) == 0
    out = capsys.readouterr().out
    assert "torchscript" in out
    assert "cases can run here" in out
    assert main(["list", "--suite", "smok"]) == 2
    assert "did you mean 'smoke'?" in capsys.readouterr().err
