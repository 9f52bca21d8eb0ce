"""A worker seen from the parent: however it ends, the parent knows why and leaves nothing running.

The children here are a few lines of Python in the real one's place, so that each can end in its own way at once; the
tests of the runner start the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.records.schema import Status
from bench.run import worker_process as process
from bench.run.worker_process import Settings, Worker, WorkerError

HELLO = """
import json, os, signal, subprocess, sys, time
requests, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), file=answers, flush=True)
emit("hello", pid=os.getpid())
"""
#: Answers every request with what it was asked.
ECHO = HELLO + "for line in requests:\n    emit('echo', **json.loads(line))\n    emit('done')\n"


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Makes a worker whose process runs the given code instead."""
    real = subprocess.Popen
    started: list[subprocess.Popen[str]] = []

    def start(code: str, settings: Settings | None = None) -> Worker:
        def instead(command: list[str], **options: object) -> subprocess.Popen[str]:
            if command[0] == "/bin/sh":  # The guard.
                return real(command, **options)
            assert command[:-2] == [sys.executable, "-u", "-m", "bench.worker"]
            started.append(real([sys.executable, "-u", "-c", code, *command[-2:]], **options))
            return started[-1]

        monkeypatch.setattr(process.subprocess, "Popen", instead)
        return Worker(settings or Settings(1), tmp_path / "log", tmp_path / "cache")

    yield start
    for found in started:
        with contextlib.suppress(OSError):
            os.killpg(found.pid, signal.SIGKILL)
        found.wait()


def failure(worker: Worker, limit_s: float = 20.0) -> WorkerError:
    """The error with which a request ends."""
    with worker, pytest.raises(WorkerError) as error:
        list(worker.ask("cold", limit_s))
    return error.value


def gone(pid: int) -> bool:
    """Return whether a process ends within a while."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_request_arrives_with_its_arguments(child):
    """Name, threads and fields go over as JSON, and events come back until it is done; then the next may be asked."""
    with child(ECHO, Settings(3)) as worker:
        for name in ("first", "second"):
            (event,) = worker.ask(name, 20.0, case={"workload": "süd"})
            assert event == {"event": "echo", "request": name, "threads": 3, "case": {"workload": "süd"}}


def test_a_failure_that_the_worker_reports_has_its_status_and_place(child):
    """Status and reason are the worker's, stage and variant those last told."""
    code = HELLO + "emit('stage', name='warm-up', variant='loop')\nemit('failed', status='oom', reason='too big')\n"
    found = failure(child(code + "time.sleep(60)"))
    assert (found.status, found.reason) == (Status.OOM, "too big")
    assert (found.stage, found.variant) == ("warm-up", "loop")


def test_events_before_a_failure_are_not_lost(child):
    """Findings up to then reach the caller."""
    code = HELLO + "emit('cold', fields={'a': 1})\nemit('failed', status='error', reason='x')\ntime.sleep(60)"
    events = []
    with child(code) as worker, pytest.raises(WorkerError):
        events.extend(worker.ask("cold", 20.0))
    # `extend` keeps what came before the error.
    assert events == [{"event": "cold", "fields": {"a": 1}}]


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_a_signal_is_named(child, ending, name):
    """A crash is told by the signal's number and name, and by what was being done."""
    found = failure(child(HELLO + f"emit('stage', name='first call', variant='v')\n{ending}"))
    assert found.status is Status.CRASHED
    assert f"signal {getattr(signal, name).value} ({name})" in found.reason
    assert found.reason.endswith("during: first call")
    assert found.variant == "v"


def test_a_signal_without_a_name_is_told_by_its_number(child):
    """Real-time signals have no name of their own."""
    found = failure(child(HELLO + "os.kill(os.getpid(), signal.SIGRTMIN + 3)"))
    assert found.status is Status.CRASHED
    assert f"signal {signal.SIGRTMIN + 3}" in found.reason


def test_a_kill_by_the_kernel_for_memory_is_told_as_such(child, monkeypatch):
    """SIGKILL while the kernel's count of such kills went up is out of memory."""
    counts = iter([4, 5])
    monkeypatch.setattr(process, "_oom_kills", lambda: next(counts))
    found = failure(child(HELLO + "os.kill(os.getpid(), signal.SIGKILL)"))
    assert (found.status, found.reason) == (Status.OOM, "the worker was killed by the kernel for memory, during: cold")


def test_an_exit_is_told_with_the_last_words(child):
    """A worker that leaves says why on standard error, which is kept in the log."""
    found = failure(child(HELLO + "print('first', file=sys.stderr)\nsys.exit('the last words')"))
    assert found.status is Status.CRASHED
    assert "exit code 1" in found.reason
    assert "the last words" in found.reason
    assert "first" not in found.reason


def test_the_last_words_of_another_worker_are_not_its_own(child):
    """The log is shared by all workers of a run: one that leaves without a word has said nothing."""
    with child(HELLO + "print('of another', file=sys.stderr)\nemit('done')\ntime.sleep(60)") as worker:
        list(worker.ask("cold", 20.0))
    found = failure(child(HELLO + "os._exit(3)"))
    assert "exit code 3" in found.reason
    assert "of another" not in found.reason


def test_silence_ends_in_a_timeout(child):
    """The limit is told with what took so long; where compiling is part of it, that too."""
    found = failure(child(HELLO + "emit('stage', name='first call', variant='v')\ntime.sleep(60)"), limit_s=0.3)
    assert found.status is Status.TIMEOUT
    assert found.reason.startswith("first call")
    assert found.reason.endswith("not ended within the limit of 0.3 s")


def test_a_worker_that_goes_on_telling_is_not_ended(child):
    """The limit is for silence: six steps of 0.2 s pass a limit of 0.6 s."""
    code = HELLO + "for n in range(6):\n    time.sleep(0.2)\n    emit('progress', n=n)\nemit('done')\ntime.sleep(60)"
    with child(code) as worker:
        assert [event["n"] for event in worker.ask("measure", 0.6)] == list(range(6))


def test_leaving_ends_the_process_and_what_it_started(child):
    """A hanging worker dies with its compilers."""
    code = HELLO + (
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "emit('pids', pids=[os.getpid(), inner.pid])\ntime.sleep(60)"
    )
    with child(code) as worker:
        pids = next(worker.ask("cold", 20.0))["pids"]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert all(gone(pid) for pid in pids)


#: A parent with a worker that is inside a call which lets no other Python thread run, and has started a compiler.
PARENT = """
import signal, subprocess, sys, time
from pathlib import Path
from bench.run import worker_process as process

# nohup, under which these tests may run, lets its children ignore it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
real, code = subprocess.Popen, sys.argv[1]
process.subprocess.Popen = lambda command, **o: real(
    [sys.executable, "-c", code, *command[-2:]] if command[0] == sys.executable else command, **o)
with process.Worker(process.Settings(1), Path(sys.argv[2]), Path(sys.argv[2])) as worker:
    print(*next(worker.ask("cold", 20.0))["pids"], flush=True)
    time.sleep(60)
"""
DEAF = HELLO + (
    "import ctypes\n"
    "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "emit('pids', pids=[os.getpid(), inner.pid])\nctypes.PyDLL(None).sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_worker_ends_with_its_parent(number, tmp_path):
    """Within 2 s, with the compilers that it started, whatever it was doing: nobody is left to burn the processor."""
    line = [sys.executable, "-c", PARENT, DEAF, str(tmp_path / "log")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=process.ROOT) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait()
        end = time.monotonic() + 2
        assert all(gone(pid) for pid in pids)
        assert time.monotonic() < end


def test_a_worker_s_guard_ends_with_it(child):
    """Whichever way a worker ends, no process of it is left."""
    before = set(psutil.Process().children())
    with child(ECHO) as worker:
        assert len(set(psutil.Process().children()) - before) == 2
        list(worker.ask("cold", 20.0))
    assert set(psutil.Process().children()) == before


def test_a_worker_without_a_guard_is_ended(child, monkeypatch):
    """If the guard cannot be started, the worker is not left behind."""
    worker = child(ECHO)
    start = process.subprocess.Popen

    def refuse(command: list[str], **options: object) -> subprocess.Popen[str]:
        if command[0] == "/bin/sh":
            raise FileNotFoundError(command[0])
        return start(command, **options)

    monkeypatch.setattr(process.subprocess, "Popen", refuse)
    with pytest.raises(FileNotFoundError), worker:
        pytest.fail("it has no guard")
    assert gone(worker._child.pid)


def test_a_worker_that_never_comes_up_is_ended(child, monkeypatch):
    """The start has a limit of its own, past which the process is ended, not left behind."""
    monkeypatch.setattr(process, "START_LIMIT_S", 0.5)
    worker = child("import time\ntime.sleep(60)")
    with pytest.raises(WorkerError) as error, worker:
        pytest.fail("it never came up")
    assert error.value.status is Status.TIMEOUT
    assert error.value.reason == "start: not ended within the limit of 0.5 s"
    assert gone(worker._child.pid)


def test_a_worker_that_dies_at_its_start_tells_why(child):
    """An import that fails is told by its last line, and the log is closed."""
    worker = child("import no_such_module")
    with pytest.raises(WorkerError) as error, worker:
        pytest.fail("it never came up")
    assert error.value.status is Status.CRASHED
    assert "No module named 'no_such_module'" in error.value.reason
    assert "during: start" in error.value.reason
    assert worker._log_file.closed


def test_a_worker_that_died_between_requests_is_told(child):
    """Writing to a process that is gone is no error of the parent's."""
    with child(HELLO + "os.kill(os.getpid(), signal.SIGKILL)") as worker:
        worker._child.wait()
        with pytest.raises(WorkerError) as error:
            list(worker.ask("cold", 20.0))
    assert error.value.status is Status.CRASHED


def test_settings_travel_as_environment_variables(child, tmp_path):
    """Threads, how they wait, plugins by absolute path, and caches of the run's own."""
    code = HELLO + "emit('variables', values=dict(os.environ))\nemit('done')\ntime.sleep(60)"
    plugins = (tmp_path / "a:ü\n b.py", tmp_path / os.fsdecode(b"\xff.py"))
    with child(code, Settings(3, "active", plugins)) as worker:
        values = next(worker.ask("cold", 20.0))["values"]
    assert (values["OMP_NUM_THREADS"], values["MKL_NUM_THREADS"], values["OMP_WAIT_POLICY"]) == ("3", "3", "active")
    assert json.loads(values["SEQ2SEQ_BENCH_PLUGINS"]) == [str(path) for path in plugins]
    assert values["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "cache"))
    assert values["TRITON_CACHE_DIR"].startswith(str(tmp_path / "cache"))
    # By it a worker knows that others of this run, which compute on the same GPU, are no strangers.
    assert values["SEQ2SEQ_BENCH_FAMILY"] == str(os.getpid())


@pytest.mark.parametrize(("own", "level"), [(None, "6"), ("0", "0")])
def test_the_profiler_s_notes_are_left_out_of_the_log(child, monkeypatch, own, level):
    """Of 124 lines of a log, 82 were Kineto's; who wants to see them says so."""
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    if own is not None:
        monkeypatch.setenv("KINETO_LOG_LEVEL", own)
    code = HELLO + "emit('variables', values=dict(os.environ))\nemit('done')\ntime.sleep(60)"
    with child(code) as worker:
        assert next(worker.ask("cold", 20.0))["values"]["KINETO_LOG_LEVEL"] == level


def test_the_default_wait_policy_is_nobody_s():
    """With the default, a worker gets exactly what a user gets who sets nothing."""
    assert "OMP_WAIT_POLICY" not in Settings(1, "default").variables()
    assert "OMP_WAIT_POLICY" not in Settings(1).variables()


def test_what_a_child_prints_goes_to_the_log(child, tmp_path):
    """Standard error of all workers of a run is kept, one after the other."""
    for word in ("one", "two"):
        with child(HELLO + f"print('{word}', file=sys.stderr)\nemit('done')\ntime.sleep(60)") as worker:
            list(worker.ask("cold", 20.0))
    assert (tmp_path / "log").read_text(encoding="utf-8").split() == ["one", "two"]


@pytest.fixture
def vmstat(monkeypatch, tmp_path) -> Iterator[Path]:
    """A file in place of the kernel's."""
    file = tmp_path / "vmstat"
    real = Path
    monkeypatch.setattr(process, "Path", lambda name: file if name == "/proc/vmstat" else real(name))
    return file


def test_the_kernel_s_count_of_kills_is_read(vmstat):
    """Its own line, not one whose name ends alike; 0 where there is no such file."""
    assert process._oom_kills() == 0
    vmstat.write_text("nr_free 1\nmemcg_oom_kill 99\noom_kill 7\n")
    assert process._oom_kills() == 7


def test_events_are_one_json_a_line():
    """The real worker writes what the tests above rely on."""
    import io

    worker = pytest.importorskip("bench.worker.server")
    answers = io.StringIO()
    worker.serve(io.StringIO(json.dumps({"request": "nonsense"}) + "\n"), answers)
    hello, failed = map(json.loads, answers.getvalue().splitlines())
    assert hello["event"] == "hello"
    assert (failed["event"], failed["status"]) == ("failed", "error")


#: Ways to print, from Python and below it, at once, in a child, and at the end.
PRINTING = [
    'print(\'{"event": "done"}\', flush=True)',
    'os.write(1, b\'{"event": "done"}\\n\')',
    'os.write(2, b\'{"event": "done"}\\n\')',
    'import ctypes\nctypes.CDLL(None).puts(b\'{"event": "done"}\')',
    "os.system('echo done')",
    "subprocess.run(['sh', '-c', 'echo done; echo done >&2'])",
    "print('\\udcff → no such text')",
    "os.write(1, bytes(range(256)))",
    "import atexit\natexit.register(print, 'at the end')",
    "subprocess.Popen(['sleep', '60'])",
]


def test_nothing_that_is_printed_is_an_answer(monkeypatch, tmp_path):
    """The real worker, with a plugin that prints: its answers come whole, and what was printed is in the log.

    In all ways at once, as it is loaded and before it answers: starting a worker takes seconds.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    plugin = tmp_path / "printing.py"
    plugin.write_text(
        "import os, subprocess, threading, time\n"
        f"CODE = {PRINTING!r}\n"
        "def talk():\n"
        "    for code in CODE:\n"
        "        exec(code, globals())\n"
        "talk()\n"
        "from seq2seq.workloads.registry import WORKLOADS\n"
        "class Talking(dict):\n"
        "    def values(self):\n"
        "        talk()\n"
        "        return super().values()\n"
        "from bench.worker import server as worker\n"
        "worker.WORKLOADS = Talking(WORKLOADS)\n",
        encoding="utf-8",
    )
    with Worker(Settings(1, plugins=(plugin,)), tmp_path / "log", tmp_path / "cache") as worker:
        events = list(worker.ask("catalogue", 60.0))
    assert [event["event"] for event in events] == ["catalogue"]
    assert any(entry["name"] == "seed" for entry in events[0]["workloads"])
    printed = (tmp_path / "log").read_bytes()
    assert printed.count(b'{"event": "done"}') >= 2 * 3
    assert printed.count(b"\ndone\n") >= 2
    assert printed.count(bytes(range(256))) == 2


def test_what_reads_standard_input_takes_no_request(child):
    """A library that asks a question finds no answer there, and the request arrives."""
    code = HELLO + "assert sys.stdin.read() == ''\n" + ECHO.removeprefix(HELLO)
    with child(code) as worker:
        (event,) = worker.ask("cold", 20.0)
    assert event["request"] == "cold"


def test_an_end_is_noticed_though_a_child_of_the_worker_s_holds_its_pipes(child):
    """A forked process lives on with all descriptors; the worker's death is reported within seconds all the same."""
    code = HELLO + "emit('last', n=1)\nif os.fork() == 0:\n    time.sleep(60)\nos._exit(7)"
    start = time.monotonic()
    events = []
    with child(code) as worker, pytest.raises(WorkerError) as error:
        events.extend(worker.ask("cold", 30.0))
    assert events == [{"event": "last", "n": 1}]
    assert "exit code 7" in error.value.reason
    assert time.monotonic() - start < 10


def test_a_worker_that_closes_its_answers_and_lives_on_is_ended(child, monkeypatch):
    """It cannot answer any more: it is told and ended, and the run goes on."""
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    worker = child(HELLO + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nanswers.close()\ntime.sleep(60)")
    found = failure(worker)
    assert found.status is Status.CRASHED
    assert "closed its answers" in found.reason
    assert gone(worker._child.pid)


def test_a_torn_answer_is_no_answer(child):
    """A worker that dies in the middle of a line is told as dead."""
    found = failure(child(HELLO + 'answers.write(\'{"event": "do\')\nanswers.flush()\nos._exit(3)'))
    assert "exit code 3" in found.reason
