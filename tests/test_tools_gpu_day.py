"""The GPU day: what a stage may do to it, what is left on disk at any moment, and what it concludes from results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.plan.cases import Filters, expand, load_suite
from bench.run.planning import Described, Plan
from kernels import dispatch, refusals
from kernels import measurements as table
from kernels.common.recurrence import Problem
from kernels.gpu.graph_cache import ReplayCounts
from kernels.tools import check, tune
from kernels.tools.check_work import CheckQuestion, CheckResult
from kernels.tools.gpu_day import (
    command,
    day_folder,
    exchange,
    facts,
    findings,
    json_lines,
    stage_process,
    stages,
    summary,
)
from kernels.tools.gpu_day.day_folder import DayError, DayFolder
from kernels.tools.gpu_day.stages import DAY, PART_S, REHEARSAL, DayStage
from kernels.tools.problems import Sizes
from kernels.tools.process_pool import WorkOutcome

ROOT = Path(__file__).parent.parent


def script(name: str, code: str, **fields) -> DayStage:
    """A stage that runs a line of Python; {work} and {folder} are filled in."""
    return DayStage(name, 1, name, ("-c", code), **({"limit_s": 20.0, "least_s": 0.0} | fields))


FINE = "open('{folder}/out', 'w').write('done')"
HANG = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
CRASH = "import os; os.kill(os.getpid(), 11)"


@pytest.fixture
def folder(tmp_path):
    """A day's folders."""
    found = DayFolder.new(tmp_path / "day", rehearsal=True)
    yield found
    shutil.rmtree(found.work, ignore_errors=True)


@pytest.fixture
def fast(monkeypatch):
    """No waiting for what ignores SIGTERM, and an archive at each look."""
    monkeypatch.setattr(stage_process, "TERMINATE_S", 0.1)
    monkeypatch.setattr(command, "PACK_S", 0.0)


def run(folder: DayFolder, *todo: DayStage, seconds: float = 60.0) -> dict[str, str]:
    """Statuses after the stages ran."""
    command.Day(folder, todo, time.monotonic() + seconds).run(todo)
    return {name: found["status"] for name, found in folder.state["stages"].items()}


@pytest.mark.usefixtures("fast")
def test_whatever_a_stage_does_costs_it_alone(folder):
    """A hang that ignores SIGTERM, a crash, an exception and a wrong result: the next stage runs."""
    todo = [
        script("hang", HANG, limit_s=0.5),
        script("crash", CRASH),
        script("error", "raise RuntimeError('no such thing')"),
        script("wrong", "print('WRONG: three of them'); raise SystemExit(1)"),
        script("needs", FINE, needs=("hang",)),
        script("fine", FINE, needs=("wrong",)),
    ]
    expected = {"hang": "hang", "crash": "crash", "error": "error", "wrong": "wrong", "needs": "skipped", "fine": "ok"}
    assert run(folder, *todo) == expected
    found = folder.state["stages"]
    assert found["crash"]["reason"] == "ended by SIGSEGV"
    assert found["error"]["reason"] == "RuntimeError: no such thing"
    assert found["wrong"]["reason"] == "WRONG: three of them"
    assert found["hang"]["took_s"] < 3


@pytest.mark.usefixtures("fast")
def test_children_of_a_stage_are_killed_with_it(folder):
    """A grandchild that holds the GPU would outlive its parent."""
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += "open('{work}/pid', 'w').write(str(p.pid)); p.wait()"
    run(folder, script("parent", code, limit_s=1.5))
    pid = int((folder.work / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_that_is_over_leaves_stages_for_resume(folder):
    """A stage is not begun without its least time; the next day has it."""
    todo = script("late", FINE, least_s=30.0)
    assert run(folder, todo, seconds=10.0) == {"late": "left"}
    assert run(folder, todo) == {"late": "ok"}


@pytest.mark.usefixtures("fast")
def test_a_stage_is_killed_when_the_day_ends(folder):
    """The limit of a stage is what is left of the day."""
    began = time.monotonic()
    assert run(folder, script("hang", HANG), seconds=0.5) == {"hang": "hang"}
    assert time.monotonic() - began < 3


@pytest.mark.usefixtures("fast")
def test_archive_is_whole_and_files_are_few_at_every_moment(folder, monkeypatch):
    """While a stage writes line after line, each archive that is there can be read, and so can the state."""
    seen = []
    look = command.Day._look

    def looked(day):
        look(day)
        names = list(folder.path.iterdir())
        with tarfile.open(folder.path / day_folder.ARCHIVE) as archive:
            seen.append(sum(len(archive.extractfile(one).read()) for one in archive if one.name.endswith("out")))
        assert len(names) <= day_folder.MOST_FILES
        json.loads((folder.path / day_folder.STATE).read_text())

    monkeypatch.setattr(command.Day, "_look", looked)
    monkeypatch.setattr(stage_process, "LOOK_S", 0.05)
    for number in range(6):
        table.write(folder.tables / f"gpu-{number}.json", table.MeasuredTable(f"gpu {number}"))
    code = (
        "import time\nfor _ in range(30):\n with open('{folder}/out', 'a') as f: f.write('x' * 1000)\n time.sleep(.03)"
    )
    run(folder, script("writes", code))
    assert seen == sorted(seen)
    assert 0 < seen[len(seen) // 2] < 30_000
    command.Day(folder, (), 0.0).close()
    assert len(list(folder.path.iterdir())) <= day_folder.MOST_FILES
    assert not folder.work.exists()


def test_an_old_copy_of_a_table_makes_room_for_a_newer_one(folder):
    """Only the three newest tables lie beside the archive, whatever lay there before."""
    paths = [folder.tables / f"gpu-{number}.json" for number in range(4)]
    for number, path in enumerate(paths):
        table.write(path, table.MeasuredTable(path.stem))
        os.utime(path, (number, number))
    folder.pack()
    os.utime(paths[0], (9, 9))
    folder.pack()
    assert {path.name for path in folder.path.glob("gpu-*.json")} == {f"gpu-{number}.json" for number in (0, 2, 3)}
    assert (folder.path / day_folder.STATE).exists()


def test_what_cannot_be_read_stays_where_it_is(folder, monkeypatch):
    """The archive lacks it, so it is named and the work folder is kept; what a stage removed is no loss."""
    read = Path.read_bytes
    errors = {"bad": PermissionError("no"), "gone": FileNotFoundError("gone")}

    def read_bytes(path: Path) -> bytes:
        if path.name in errors:
            raise errors[path.name]
        return read(path)

    for name in ("bad", "gone", "good"):
        (folder.work / name).write_text(name)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    folder.pack()
    folder.clear()
    assert folder.state["not_packed"] == ["bad"]
    assert (folder.work / "bad").exists()
    assert "too large or unreadable: bad in" in summary.write(folder.state, folder.work, ())


def test_what_a_killed_day_had_half_written_goes(folder):
    """It would count among the few files of the out folder."""
    (folder.path / ".results.tar.gz.0123.new").write_text("half")
    DayFolder.resumed(folder.path, rehearsal=True)
    assert not list(folder.path.glob(".*"))


def test_a_day_that_was_killed_continues(tmp_path):
    """SIGKILL in the middle of a stage: what was done stays, the orphan is killed, the stage runs again."""
    out = tmp_path / "day"
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from types import SimpleNamespace
from test_tools_gpu_day import FINE, script
from kernels.tools.gpu_day import command
from kernels.tools.gpu_day.day_folder import DayFolder
todo = (script("first", FINE), script("second", "import time; time.sleep(60)"))
command.Day(DayFolder.new(Path({str(out)!r}), rehearsal=True), todo, time.monotonic() + 60).run(todo)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while "second" not in (state := read_stages(out)) or "pid" not in state["second"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    orphan = state["second"]["pid"]
    assert Path(f"/proc/{orphan}").exists()
    folder = DayFolder.resumed(out, rehearsal=True)
    assert run(folder, script("first", "raise SystemExit(3)"), script("second", FINE)) == {
        "first": "ok",
        "second": "ok",
    }
    deadline = time.monotonic() + 5
    while Path(f"/proc/{orphan}/cmdline").exists() and Path(f"/proc/{orphan}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shutil.rmtree(folder.work)


def read_stages(out: Path) -> dict:
    """Stages of the state on disk; none before there is one."""
    path = out / day_folder.STATE
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def test_a_process_of_someone_else_is_not_killed():
    """A number that the system gave to another process bears no mark of the day."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        stage_process.kill_left(process.pid, "token")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    finally:
        process.kill()
        process.wait()


def test_another_machine_continues_from_the_archive(folder):
    """The few files of the out folder are all that a second part needs."""
    run(folder, script("first", FINE))
    command.Day(folder, (), 0.0).close()
    resumed = DayFolder.resumed(folder.path, rehearsal=True)
    assert (resumed.work / "first" / "out").read_text() == "done"
    assert resumed.work != folder.work
    shutil.rmtree(resumed.work)


def test_folders_that_are_no_place_for_a_day_are_refused(folder, tmp_path):
    """A folder with a day, one with anything else, one without a day, a rehearsal for a day."""
    with pytest.raises(DayError, match="give --resume"):
        DayFolder.new(folder.path, rehearsal=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DayError, match="name a new folder"):
        DayFolder.new(tmp_path / "other", rehearsal=True)
    with pytest.raises(DayError, match="begin one without --resume"):
        DayFolder.resumed(tmp_path / "other", rehearsal=True)
    with pytest.raises(DayError, match="give --rehearse"):
        DayFolder.resumed(folder.path, rehearsal=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{tmp}/new"], "torch sees no GPU"),
        (["--out", "{tmp}/new", "--rehearse", "--again", "sute", "--resume"], "no such stage"),
        (["--out", "{tmp}/new", "--rehearse", "--again", "suite"], "give --resume too"),
        (["--out", "{tmp}/new", "--rehearse", "--resume"], "is not the state of a day"),
        (["--out", f"{__file__}/new", "--rehearse"], "is not a folder); name another folder with --out"),
        (["--out", "{tmp}/new", "--time-limit", "0min"], "is not a time above 0, as 90s or 3min"),
    ],
)
def test_wrong_usage_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_sees_gpu", lambda: False)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(command.main([word.format(tmp=tmp_path) for word in arguments]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def answers(work: Path, *outcomes: WorkOutcome) -> None:
    """Write answers as a stage does."""
    for outcome in outcomes:
        json_lines.append(work / "stage" / json_lines.ROWS, check.row_of(outcome))


def answer(kind: str = "parity", config: object = "A(1)", status: str = "ok", **fields) -> WorkOutcome:
    """An answer about the persistent kernel."""
    task = CheckQuestion(kind, "persistent", Sizes(2, 2, 16), config=config)
    return WorkOutcome(task, status, CheckResult(fields.pop("worst", 0.5), "output", "errors: 1"), **fields)


@dataclasses.dataclass(frozen=True)
class TiledConfig:
    """A configuration of a kernel that does not exist."""

    tile: int


def test_what_is_wrong_moves_hangs_or_crashes_is_unfit(tmp_path):
    """Too little memory at one size and a graph that fails are no reason; a pass of its own is not affected."""
    answers(
        tmp_path,
        answer(config=TiledConfig(1), worst=7.0),
        answer("repeat", TiledConfig(2), "error", reason="AssertionError: run 3 of 5: 1 of 3 elements differ"),
        answer("streams", TiledConfig(3), "hang", reason="no answer within 4 s"),
        answer("threads", TiledConfig(4), "crash", reason="the child died with exit code -9"),
        answer(config=TiledConfig(5), status="error", reason="OutOfMemoryError: too much"),
        answer("graph", TiledConfig(6), "error", reason="AssertionError: graph and module differ"),
        answer(config=TiledConfig(7)),
    )
    found = findings.refusals(tmp_path)
    assert [one.config for one in found] == [f"TiledConfig(tile={number})" for number in (1, 2, 3, 4)]
    assert {(one.implementation, one.backward) for one in found} == {("persistent", False)}


def test_what_was_known_to_be_wrong_stays_listed(folder, tmp_path, monkeypatch):
    """Nothing that the day does not ask about is timed again; what it finds right at the same question is."""
    monkeypatch.setattr(table, "FOLDER", tmp_path / "measured")

    def known(number: int, reason: str = "streams in float16 at B2: no answer within 4 s") -> refusals.Refusal:
        return refusals.Refusal("persistent", False, repr(TiledConfig(number)), reason)

    every = [refusals.Refusal("cell", True, "", "3 of 4 were wrong"), *map(known, (1, 2, 3))]
    every.append(known(4, "tuning at B2: errors: 1"))
    refusals.write(table.FOLDER / refusals.NAME, every)
    run(folder)
    assert list(refusals.read(folder.tables / refusals.NAME)) == every
    answers(
        folder.work,
        answer("streams", TiledConfig(1)),
        answer(config=TiledConfig(2)),
        answer(config=TiledConfig(5), worst=7.0),
        answer(config=TiledConfig(4)),
        answer("repeat", TiledConfig(4)),
    )
    command.Day(folder, (), 0.0).publish()
    given_back = refusals.read(folder.path / refusals.NAME)
    assert [one.config for one in given_back] == [repr(TiledConfig(5)), "", repr(TiledConfig(2)), repr(TiledConfig(3))]
    run(folder)
    assert len(refusals.read(folder.work / findings.INHERITED)) == len(every)


@pytest.mark.parametrize(("right", "whole"), [(2, True), (5, False)])
def test_a_kernel_that_is_mostly_wrong_is_left_out_whole(tmp_path, right, whole):
    answers(tmp_path, *(answer(config=TiledConfig(n), worst=9.0) for n in range(3)))
    answers(tmp_path, *(answer(config=TiledConfig(n)) for n in range(10, 10 + right)))
    assert (findings.refusals(tmp_path)[0].config == "") is whole


def test_what_the_tuner_found_at_full_length_is_unfit(tmp_path):
    """Its table names what it left out, each with its reason."""
    wrong = ("cell CellConfig(tile=2): AssertionError: run 7 of 50: bits differ", "torch's own LSTM in float16: no")
    entry = table.MeasuredShape("backward", "float16", 16, 100, 512, 1, {}, wrong=wrong)
    table.write(tmp_path / "tables" / "gpu.json", table.MeasuredTable("gpu", (entry,)))
    (found,) = findings.refusals(tmp_path)
    assert (found.implementation, found.backward, found.config) == ("cell", True, "CellConfig(tile=2)")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables that the environment names."""
    monkeypatch.setenv(table.VARIABLE, str(tmp_path))
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


PROBLEM = Problem("cuda", torch.float16, 16, 100, 512, saves=False, capability=90, multiprocessors=132, gpu="G")


def test_dispatch_takes_no_configuration_that_was_found_wrong(tables):
    """The next best is taken; where none is left the kernel is refused with the reason."""
    pytest.importorskip("triton")
    first = dispatch.choose_config(PROBLEM, "persistent", backward=False)
    refusals.write(tables / refusals.NAME, [refusals.Refusal("persistent", False, repr(first), "it raced")])
    dispatch.forget()
    assert dispatch.choose_config(PROBLEM, "persistent", backward=False) != first
    assert "persistent" not in dispatch.choose(PROBLEM, "cell").refused
    refusals.write(tables / refusals.NAME, [refusals.Refusal("persistent", False, "", "it raced")])
    dispatch.forget()
    with pytest.raises(ValueError, match=r"a check found it wrong on this machine .*refused.json.: it raced"):
        dispatch.choose(PROBLEM, "persistent")


def test_the_tuner_takes_no_configuration_that_was_found_wrong(tables, capsys):
    """It says which, with the file that lists it."""
    pytest.importorskip("triton")
    before = [task.config for task in tune._tasks(Sizes(2, 3, 16), tf32=False, most=3) if not task.backward]
    refusals.write(tables / refusals.NAME, [refusals.Refusal("persistent", False, repr(before[-1]), "it raced")])
    dispatch.forget()
    after = [task.config for task in tune._tasks(Sizes(2, 3, 16), tf32=False, most=3) if not task.backward]
    assert before[-1] not in after
    assert f"{before[-1]}: {tables / refusals.NAME}: it raced" in capsys.readouterr().out


def test_a_broken_list_is_refused_by_name(tables):
    (tables / refusals.NAME).write_text("[{}]")
    with pytest.raises(ValueError, match="is not a list of refused configurations"):
        refusals.reason("cell", None, backward=False)


def test_the_summary_says_what_was_found(folder):
    """Failures with their first line, what is left out, measured against predicted, and what is next."""
    answers(folder.work, answer(config=TiledConfig(1), worst=7.0), answer(config=TiledConfig(2)))
    gpu = {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}
    json_lines.append(folder.work / "machine" / json_lines.FACTS, {"fact": "gpu", "value": gpu})
    timing = table.Timing({"tile": 2}, 1e-3, 0.9e-3, 1.1e-3, 15)
    entry = table.MeasuredShape(
        "inference", "float16", 16, 1000, 512, 1, {"cell": timing}, around_s=1e-4, vendor_s=0.55e-3
    )
    table.write(folder.tables / "nvidia-h200.json", table.MeasuredTable("NVIDIA H200", (entry,)))
    folder.state["rehearsal"] = False
    folder.set("hang", status="hang", reason="killed at its limit of 9 s")
    text = summary.write(folder.state, folder.work, (script("hang", HANG), script("open", FINE)))
    for expected in (
        "# GPU day: NVIDIA H200",
        "| hang | hang | hang |  | killed at its limit of 9 s |",
        "TiledConfig(tile=1): errors: 1",
        "## Left out",
        "| cell (tile 2) | 1 [0.9, 1.1] |",
        "| 0.5 [0.458, 0.55] |",
        "- next: hang ended by hang",
        "- next: to run with --resume --part 1 and time for it: open",
        "- next: persistent forward: 1 x wrong in `parity`",
        "cell is 2.00 times slower than torch's own at its fairest",
        "times what kernels/estimate.py predicts",
    ):
        assert expected in text, f"{expected!r} is not in:\n{text}"


@pytest.mark.parametrize(
    ("quartiles", "speedup"),
    [({}, "0.25"), ({"module_low_s": 1.6e-3, "module_high_s": 2.5e-3}, "0.25 [0.2, 0.312]")],
    ids=["earlier table", "own quartiles"],
)
def test_the_speedup_is_of_whole_calls_over_torch_at_its_fairest(folder, quartiles, speedup):
    """Torch's own on padded sizes counts, and of ours the module; quartiles of the recurrence are not its own."""
    timing = table.Timing({"tile": 2}, 1e-3, 0.9e-3, 1.1e-3, 15, module_s=2e-3, **quartiles)
    entry = table.MeasuredShape(
        "inference", "float16", 15, 1000, 512, 1, {"cell": timing}, around_s=1e-4, vendor_s=3e-3, vendor_float16_s=2e-3,
        vendor_padded_s=0.5e-3,
    )  # fmt: skip
    table.write(folder.tables / "nvidia-h200.json", table.MeasuredTable("NVIDIA H200", (entry,)))
    gpu = {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}
    json_lines.append(folder.work / "machine" / json_lines.FACTS, {"fact": "gpu", "value": gpu})
    text = summary.write(folder.state, folder.work, ())
    assert f"| 500 | {speedup} |" in text
    assert "cell is 4.00 times slower than torch's own at its fairest" in text


def test_the_summary_compares_the_ways_to_wait(folder):
    """The fastest configuration of each, whichever came first; what is worth putting first is said."""
    names = [f"persistent PersistentConfig(block_b={n}, sync='{sync}')" for n, sync in enumerate(("barrier", "poll"))]
    medians = {names[0]: 2e-3, names[1]: 1.5e-3, names[0].replace("0", "7"): 2.2e-3, "cell CellConfig(tile=1)": 9e-3}
    entry = table.MeasuredShape(
        "inference", "float16", 16, 1000, 768, 1, {"cell": table.Timing({}, 9e-3)}, medians_s=medians
    )
    path = folder.stage("exchange") / json_lines.TIMINGS
    table.write(path, table.MeasuredTable("NVIDIA H200", (entry,)))
    assert table.read(path).entries == (entry,)
    gpu = {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}
    json_lines.append(folder.work / "machine" / json_lines.FACTS, {"fact": "gpu", "value": gpu})
    text = summary.write(folder.state, folder.work, ())
    assert "| B16 H768 T1000 float16 | inference | 2 | 1.5 |  |" in text
    assert "poll takes 0.75 of barrier's time: `configs` may put it first" in text


def test_the_summary_says_what_a_call_runs_and_what_the_machine_keeps(folder):
    """Persistent kernels by their name or by how seldom they run, gaps before them, memory that is not given back."""
    kernels = [{"name": "forward_kernel", "us": 50.0, "calls": 1.0}]
    value = {"persistent": False, "once a step": False, "us": 60.0, "gap us": {"forward_kernel": 3.5}}
    own = folder.work / "own-kernels" / json_lines.FACTS
    json_lines.append(own, {"fact": "B16 T25 H512 float16 inference", "value": value | {"kernels": kernels}})
    json_lines.append(own, {"fact": "precision of torch's own at B16", "value": {"error": 1e-6, "ATen's own": 5e-7}})
    json_lines.append(own, {"fact": "precision of torch's own at H160", "error": "RuntimeError: the gate would"})
    cudnn = folder.work / "cudnn-names" / json_lines.FACTS
    steps = [{"name": "elementWise", "us": 50.0, "calls": 25.0}]
    json_lines.append(cudnn, {"fact": "one", "value": value | {"once a step": True, "kernels": steps}})
    json_lines.append(cudnn, {"fact": "two", "value": value | {"persistent": True, "kernels": steps}})
    said = f"MiB held by torch: [2, 4, 6]: {facts.GROWS} 2 MiB a graph"
    json_lines.append(folder.work / "machine" / json_lines.FACTS, {"fact": "graphs give back", "value": said})
    text = summary.write(folder.state, folder.work, ())
    for expected in (
        "## What a call of kernels.LSTM runs",
        "| B16 T25 H512 float16 inference | by launches | 60 | 3.5 | forward_kernel x1 |",
        "- precision of torch's own at B16: error 1e-06, ATen's own 5e-07",
        "- next: own-kernels, precision of torch's own at H160: RuntimeError: the gate would",
        "| one | no | 60 |  | elementWise x25 |",
        "| two | by name | 60 |",
        "- next: graphs give back: torch keeps memory of dropped graphs",
    ):
        assert expected in text, f"{expected!r} is not in:\n{text}"


def test_gaps_are_those_in_which_nothing_runs():
    """Overlapping kernels leave none; of several launches the median counts."""
    spans = [(0.0, 10.0, "a"), (12.0, 20.0, "b"), (15.0, 30.0, "a"), (31.0, 32.0, "b"), (40.0, 41.0, "b")]
    assert facts.gaps_us(spans) == {"b": 2.0, "a": 0.0}


@pytest.mark.parametrize("defect", [0.0, 1e-3])
def test_a_library_that_is_less_precise_than_aten_is_named(defect, monkeypatch):
    """Its own result is accepted; one that is off by a thousandth is an error of that fact alone."""
    results = facts._results
    called = []

    def spoiled(*given):
        called.append(results(*given))
        # The truth comes first, then the library, then ATen.
        return [value + defect * value.abs().max() if len(called) == 2 else value for value in called[-1]]

    monkeypatch.setattr(facts, "_results", spoiled)
    if defect:
        with pytest.raises(RuntimeError, match="the gate would refuse it"):
            facts._precise(2, 3, 16, torch.float32)
    else:
        found = facts._precise(2, 3, 16, torch.float32)
        assert 0 < found["error"] < 1e-5
        assert 0 < found["ATen's own"] < 1e-5


def test_a_result_that_cannot_be_read_costs_the_summary_alone(folder):
    """The archive is still written: the day cannot be had again."""
    (folder.stage("x") / json_lines.TIMINGS).write_text("{")
    command.Day(folder, (), 0.0).publish()
    assert "a result cannot be read: ValueError" in (folder.path / day_folder.SUMMARY).read_text()
    assert (folder.path / day_folder.ARCHIVE).exists()


def test_a_line_that_was_cut_off_is_skipped(tmp_path):
    json_lines.append(tmp_path / "lines", {"a": 1})
    with (tmp_path / "lines").open("a") as file:
        file.write('{"a": ')
    assert json_lines.read(tmp_path / "lines") == [{"a": 1}]


@pytest.mark.parametrize("listed", [DAY, REHEARSAL], ids=["day", "rehearsal"])
def test_stages_are_well_formed(listed):
    """Each name is one stage, needs come before, parts are in order, places of commands can be filled in."""
    names = [stage.name for stage in listed]
    assert len(set(names)) == len(names)
    assert [stage.part for stage in listed] == sorted(stage.part for stage in listed)
    for number, stage in enumerate(listed):
        assert set(stage.needs) <= set(names[:number])
        assert stage.least_s <= stage.limit_s
        for word in (*stage.command, *stage.resumed):
            word.format(package="kernels", folder="f", work="w", tables="t", seconds="1")


def test_what_decides_fits_each_part():
    """If all that comes before takes its limit, part 1 still begins exchange and tuning, part 2 suite and check."""
    for part, name in ((1, "exchange"), (1, "tune-short"), (2, "suite"), (2, "check-others")):
        own = [stage for stage in DAY if stage.part == part]
        before_s = sum(stage.limit_s for stage in own[: [stage.name for stage in own].index(name)])
        (stage,) = [stage for stage in own if stage.name == name]
        assert before_s + stage.least_s + command.CLOSING_S <= PART_S[part]


def test_the_exchange_ends_in_time_and_counts_what_it_left(tmp_path, monkeypatch, capsys):
    """Killed at its limit it would read as a hang; `--resume` asks again."""
    pytest.importorskip("triton")
    given = exchange.TimeLeft(60.0)
    assert (list(given.of("abc")), given.left) == (["a", "b", "c"], 0)
    monkeypatch.setattr(sys, "argv", ["exchange", "--folder", str(tmp_path), "--time-limit", "0.000001"])
    code = exchange.main()
    questions = len(list(exchange._alone(2, small=exchange.DEVICE != "cuda")))
    assert stage_process.STATUSES[code] == stage_process.PARTIAL
    assert stage_process.PARTIAL in command.OPEN
    assert f"the time is over: {questions} questions and timings" in capsys.readouterr().out


def test_a_kernel_that_is_never_replayed_is_a_fact_that_failed(monkeypatch):
    """Its name says that it was replayed; what it launched plainly for is told."""
    pytest.importorskip("triton")
    assert "without a GPU nothing is replayed" in facts._cell()
    monkeypatch.setattr(facts, "DEVICE", "cuda")
    counts = iter([ReplayCounts(0, 0, 0, 0, {}), ReplayCounts(0, 0, 0, 0, {"capturing failed: no room": 6})])
    monkeypatch.setattr(facts.graph_cache, "state", lambda: next(counts))
    with pytest.raises(RuntimeError, match="no graph was replayed: capturing failed: no room"):
        facts._cell()
    counts = iter([ReplayCounts(2, 5, 0, 2, {}), ReplayCounts(3, 9, 0, 3, {"early": 2})])
    assert facts._cell().endswith("of the limit; 1 graph captured, 4 calls replayed")


def test_every_package_of_the_suite_is_listed_or_known_to_be_there():
    """A requirement of the suite that is neither in the list of wheels nor on a usual GPU machine stops its stages."""
    there = {
        "jinja2",
        "matplotlib",
        "numpy",
        "pandas",
        "psutil",
        "py-cpuinfo",
        "pytest",
        "pytest-benchmark",
        "rich",
        "scipy",
        "torch",
        "triton",
    }
    suite = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["suite"]
    lines = (ROOT / "docs" / "gpu-day-requirements.txt").read_text().splitlines()
    listed = {line.split("==")[0].split(">=")[0].strip() for line in lines if line and not line.startswith("#")}
    assert {re.split("[<>=;]", line)[0] for line in suite} <= there | listed


def test_a_rehearsal_fails_where_a_defect_was_not_caught(folder, capsys):
    """A planted crash that ended well, and a configuration that was found wrong and timed all the same."""
    folder.set("planted-crash", status="ok")
    answers(folder.work, answer(config=TiledConfig(1), worst=7.0))
    entry = table.MeasuredShape("forward", "float32", 2, 2, 16, 1, {"persistent": table.Timing({"tile": 1}, 1e-3)})
    table.write(folder.tables / "interpreter.json", table.MeasuredTable("interpreter", (entry,)))
    assert command.rehearsal_verdict(folder, REHEARSAL) == 1
    out = capsys.readouterr().out
    assert "planted-crash ended as ok, expected crash" in out
    assert "was timed (tables/interpreter.json): TiledConfig(tile=1)" in out


def test_the_planted_stages_are_rehearsed():
    """Each ends as it has to, or the rehearsal fails."""
    assert set(command.PLANTED) <= {stage.name for stage in stages.REHEARSAL}


def test_the_short_suite_is_expected_to_fit_its_stage():
    """All three groups, with the reference that joins each, by the times that a run on a GPU is planned with."""
    suite = load_suite("short-gpu")
    names = {"workloads": [{"name": "flashrnn"}, {"name": "deepbench"}],
             "variants": [{"name": name} for name in ("reference", "cudnn-fair", "triton-fp16")],
             "torch": {"gpu": "any"}}  # fmt: skip
    groups = tuple(
        (group, tuple(Described(case, {}, None) for case in group.cases)) for group in expand(suite, names, Filters())
    )
    stage = next(stage for stage in DAY if stage.name == "suite")
    assert [len(cases) for _, cases in groups] == [3, 3, 3]
    assert Plan(suite, groups, {}, {}).expected_s() <= stage.limit_s - stage.closing_s


@pytest.mark.parametrize(("own", "name"), [("b2", "NVIDIA H200"), ("c3", "NVIDIA T400")])
def test_nvidia_smi_tells_of_the_gpu_that_torch_uses(monkeypatch, tmp_path, own, name):
    """It lists the one of the screen first, which may not be CUDA's first; without its number the first counts."""
    program = tmp_path / "nvidia-smi"
    values = ", ".join(["580.1"] + ["1"] * (facts.SMI.count(",") - 1))
    lines = "\n".join(
        f"{uuid}, {gpu}, {values}" for uuid, gpu in (("GPU-a1", "NVIDIA T400"), ("GPU-b2", "NVIDIA H200"))
    )
    program.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=uuid,{facts.SMI} ] && cat <<'end'\n{lines}\nend\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=own))
    assert facts._smi() == {"name": name, "driver_version": "580.1"} | dict.fromkeys(facts.SMI.split(",")[2:], "1")


def test_a_machine_where_triton_cannot_launch_is_told_first(monkeypatch):
    """Each later stage would fail, or measure torch's own LSTM alone."""
    monkeypatch.setattr(facts, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    ask = facts.machine_facts()["Triton can launch"]
    assert ask() == "yes"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match="built for AMD's"):
        ask()
