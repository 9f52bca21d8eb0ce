"""Workers by fork: each ends, is waited for and is closed off from its siblings as a fresh process would be.

Most servers here are a few lines of Python in the real one's place, whose workers run the code that they are sent; the
real one, which has imported torch, comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.plan.cases import Case
from bench.records.schema import Status
from bench.run import forks
from bench.run.cold import COMPILER
from bench.run.forks import Forked, ForkServer, fork_servers, supported
from bench.run.planning import Described
from bench.run.runner import Runner
from bench.run.worker_process import Settings, Worker, WorkerError, cache_variables

pytestmark = pytest.mark.skipif(not supported(), reason="this system cannot start workers by fork")

ROOT = Path(__file__).parent.parent
#: Serves forks whose work is to run the lines that come as their requests; what they `tell` is their answer.
SERVER = """
import contextlib, ctypes, json, os, signal, subprocess, sys, time
from bench.worker.forking import serve_forks

def main(requests, answers):
    def tell(found):
        os.write(int(answers), json.dumps(found).encode() + b"\\n")
    with os.fdopen(os.dup(int(requests))) as asked:
        code = json.loads(asked.readline())
    exec(code, globals() | {"tell": tell, "requests": int(requests), "answers": int(answers)})
    return 0

sys.exit(serve_forks(int(sys.argv[1]), main))
"""


class Started:
    """A fork that runs a code.

    Attributes:
        child: the process.
        told: its answers, as they come.
    """

    def __init__(self, server: ForkServer, log: Path, code: str, **environment: str) -> None:
        (theirs, ours), (told, answers) = os.pipe(), os.pipe()
        with log.open("a") as file:
            self.child: Forked = server.fork((theirs, answers, file.fileno()), environment)
        os.close(theirs)
        os.close(answers)
        os.write(ours, json.dumps(code).encode() + b"\n")
        os.close(ours)
        self.told = os.fdopen(told)

    def answer(self) -> object:
        """Its next answer."""
        return json.loads(self.told.readline())

    def end(self, *, kill: bool = False) -> int:
        """Its exit code, once it has ended."""
        if kill:
            os.kill(self.child.pid, signal.SIGKILL)
        self.told.close()
        return self.child.wait(10.0)


@pytest.fixture
def stub(monkeypatch) -> Callable[[str], None]:
    """Has servers run a code instead of the real worker's."""
    real = subprocess.Popen

    def put(code: str) -> None:
        def instead(command: list[str], **options: object) -> subprocess.Popen[bytes]:
            if command[0] == "/bin/sh":  # The guard.
                return real(command, **options)
            assert command[:-1] == [sys.executable, "-u", "-m", "bench.worker", "--forks"]
            return real([sys.executable, "-u", "-c", code, command[-1]], **options)

        monkeypatch.setattr(forks.subprocess, "Popen", instead)

    return put


@pytest.fixture
def server(stub, tmp_path) -> Iterator[ForkServer]:
    """A server of workers that run what they are sent."""
    stub(SERVER)
    with fork_servers(Settings(1), tmp_path / "server.log", [()]) as (found,):
        yield found


@pytest.fixture
def log(tmp_path) -> Path:
    """What workers print."""
    return tmp_path / "log"


def gone(pid: int) -> bool:
    """Return whether a process ends within a while."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


#: Ways to end: exit code, and what the log must hold.
ENDINGS = {
    "pass": (0, ""),
    "sys.exit()": (0, ""),
    "sys.exit(0)": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('the last words')": (1, "the last words"),
    "os._exit(7)": (7, ""),
    "raise RuntimeError('planted')": (1, "RuntimeError: planted"),
    "raise KeyboardInterrupt": (1, "KeyboardInterrupt"),
    "os.kill(os.getpid(), signal.SIGKILL)": (-signal.SIGKILL, ""),
    "os.kill(os.getpid(), signal.SIGTERM)": (-signal.SIGTERM, ""),
    "ctypes.string_at(0)": (-signal.SIGSEGV, ""),
    "os.abort()": (-signal.SIGABRT, ""),
    "os.kill(os.getpid(), signal.SIGRTMIN + 3)": (-signal.SIGRTMIN - 3, ""),
}


def test_each_end_is_told_as_that_of_a_fresh_process(server, log):
    """Exit codes, signals with their number, and the last words; the server outlives all of them."""
    found = {}
    for code in ENDINGS:
        log.write_text("")
        found[code] = Started(server, log, code).end(), log.read_text().splitlines()[-1:]
    assert {code: end for code, (end, _) in found.items()} == {code: end for code, (end, _) in ENDINGS.items()}
    assert {code: " ".join(said) for code, (_, said) in found.items()} == {
        code: said for code, (_, said) in ENDINGS.items()
    }


def test_each_of_several_has_its_own_end(server, log):
    """They live at once and end in another order than they began."""
    started = [Started(server, log, f"time.sleep({0.1 * (3 - number)})\nos._exit({number})") for number in range(4)]
    assert [one.end() for one in started] == [0, 1, 2, 3]


def test_an_end_can_be_asked_for_again(server, log):
    """As of subprocess.Popen."""
    one = Started(server, log, "os._exit(7)")
    assert [one.end(), one.child.wait(), one.child.wait(0.0)] == [7, 7, 7]


@pytest.mark.parametrize("stopped", [False, True])
def test_waiting_for_what_lives_has_its_limit(server, log, stopped):
    """While it runs and while it stands still: being stopped is no end."""
    one = Started(server, log, "tell('up')\ntime.sleep(60)")
    assert one.answer() == "up"
    if stopped:
        os.kill(one.child.pid, signal.SIGSTOP)
        # The server hears of its children's stops too.
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        one.child.wait(0.2)
    assert Started(server, log, "os._exit(5)").end() == 5
    assert one.end(kill=True) == -signal.SIGKILL


OPEN = """
names = os.listdir('/proc/self/fd')
# The listing itself had one, which is closed again.
found = {name: '/proc/self/fd/' + name for name in names}
tell({name: os.readlink(path) for name, path in found.items() if os.path.lexists(path)})
"""


def test_a_worker_has_no_descriptor_but_its_own(server, log, tmp_path):
    """Its pipes and its log: no sibling's, nothing of the server's, and none of the parent's."""
    siblings = [Started(server, log, "tell('up')\ntime.sleep(60)") for _ in range(3)]
    assert [one.answer() for one in siblings] == ["up"] * 3
    with (tmp_path / "of the parent").open("w") as kept:
        os.set_inheritable(kept.fileno(), True)
        one = Started(server, log, f"tell([requests, answers])\n{OPEN}")
    own, found = one.answer(), one.answer()
    assert one.end() == 0
    assert {found[str(stream)] for stream in (1, 2)} == {str(log)}
    assert found["0"] == os.devnull
    assert set(found) == {"0", "1", "2", *map(str, own)}
    for sibling in siblings:
        sibling.end(kill=True)


def test_nothing_is_left_open_by_workers_that_ended(server, log):
    """Neither here nor in the server, however many there were."""

    def open_now() -> tuple[int, int]:
        return tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (os.getpid(), server._child.pid))

    def settled() -> tuple[int, int]:
        # A worker's end is told here before the thread that heard of it has closed its pipe.
        end = time.monotonic() + 5
        while open_now() != before and time.monotonic() < end:
            time.sleep(0.01)
        return open_now()

    Started(server, log, "pass").end()
    time.sleep(0.1)
    before = open_now()
    for _ in range(10):
        Started(server, log, "pass").end()
    assert settled() == before


def test_the_environment_reaches_the_worker_and_what_it_starts_and_no_sibling(server, log):
    """Variables of that fork alone, beside those of the server."""
    asks = (
        "below = subprocess.run(['sh', '-c', 'echo $FOR_ONE'], capture_output=True, text=True).stdout.strip()\n"
        "tell([os.environ.get('FOR_ONE'), below, os.environ['OMP_NUM_THREADS']])"
    )
    one, other = Started(server, log, asks, FOR_ONE="süd ="), Started(server, log, asks)
    assert one.answer() == ["süd =", "süd =", "1"]
    assert other.answer() == [None, "", "1"]
    assert [one.end(), other.end()] == [0, 0]


def test_a_worker_is_the_first_of_its_own_group(server, log):
    """So that it can be stopped and ended with whatever it started, and nobody else is."""
    code = (
        "inner = subprocess.Popen(['sleep', '60'])\n"
        "tell([os.getpid(), os.getpgid(0), os.getpgid(inner.pid), inner.pid])\n"
        "time.sleep(60)"
    )
    one = Started(server, log, code)
    pid, group, inner_group, inner = one.answer()
    assert one.child.pid == pid == group == inner_group
    assert os.getpgid(server._child.pid) != group
    os.killpg(group, signal.SIGKILL)
    assert one.end() == -signal.SIGKILL
    assert gone(inner)
    assert Started(server, log, "pass").end() == 0


def layout(pid: int) -> list[str]:
    """Addresses of the libraries, the stack and the heap of a process."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[0] for line in maps if re.search(r"libc\.so|libc-|\[stack\]|libm\.so", line)]


@pytest.mark.skipif(
    Path("/proc/sys/kernel/randomize_va_space").read_text().strip() == "0"
    if Path("/proc/sys/kernel/randomize_va_space").exists()
    else True,
    reason="this system gives all processes one layout",
)
def test_workers_of_one_server_share_a_layout_and_those_of_others_have_another(stub, log, tmp_path):
    """What processes differ by is sampled by several servers."""
    stub(SERVER)
    with fork_servers(Settings(1), tmp_path / "server.log", [()] * 2) as servers:
        started = [Started(server, log, "tell('up')\ntime.sleep(60)") for server in servers for _ in range(2)]
        assert [one.answer() for one in started] == ["up"] * 4
        found = [layout(one.child.pid) for one in started]
        for one in started:
            one.end(kill=True)
    assert found[0]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert not set(found[0]) & set(found[2])


def failure(ask: Callable[[], object]) -> WorkerError:
    """The error with which it ends."""
    with pytest.raises(WorkerError) as error:
        ask()
    return error.value


def test_seats_go_on_without_a_server_that_died(server, log, tmp_path):
    """It is said once; the next seat is a fresh process."""
    lines: list[str] = []
    console = types.SimpleNamespace(say=lambda line, _style: lines.append(line))
    run = types.SimpleNamespace(_forks=[server], console=console, log=log, _looking=threading.Lock())
    run._living = lambda servers: Runner._living(run, servers)
    assert Runner.seat(run, Settings(1), 3, tmp_path).forks is server
    os.kill(server._child.pid, signal.SIGKILL)
    server._child.wait()
    assert [Runner.seat(run, Settings(1), number, tmp_path).forks for number in (3, 4)] == [None, None]
    assert lines == ["1 of the processes that workers are forked from died; see workers.log"]


@pytest.mark.parametrize(
    ("imports", "own", "from_"),
    [(COMPILER, True, "full"), ("pandas", True, "bare"), ("pandas", False, None)],
)
def test_a_cold_run_finds_imported_what_a_fresh_one_would(imports, own, from_, tmp_path):
    """It is forked from a process with the same imports, and is a fresh one where its memory would not be like it."""
    full, bare = (types.SimpleNamespace(gives_own_pages=own) for _ in range(2))
    run = types.SimpleNamespace(settings=Settings(1), _living=lambda servers: servers)
    run._cold_forks = {(COMPILER,): [full], (): [bare]}
    described = Described(Case("seed", "a", "inference", "cpu", 1), {}, None, imports=(imports,))
    assert Runner.cold(run, described, tmp_path, tmp_path).forks is {"full": full, "bare": bare, None: None}[from_]


def test_servers_that_died_are_taken_out_once_however_many_threads_ask():
    """As cold runs do, which start side by side."""
    ended = []

    def end(server: object) -> None:
        time.sleep(0.05)
        ended.append(server)

    dead, living = (types.SimpleNamespace(alive=alive, __exit__=lambda: end("dead")) for alive in (False, True))
    servers, said = [dead, living], []
    run = types.SimpleNamespace(
        console=types.SimpleNamespace(say=lambda *words: said.append(words)), _looking=threading.Lock()
    )
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Runner._living(run, servers), range(4)))
    assert found == [[living]] * 4
    assert (servers, ended, len(said)) == ([living], ["dead"], 1)


@pytest.mark.parametrize(
    ("own", "gpu", "said"),
    [
        ([True, True], False, "forked; fresh where a variant has environment variables"),
        ([True, False], False, "fresh: this system cannot give a forked process memory of its own"),
        ([], False, "fresh: there is no process to fork them from"),
        ([], True, "fresh: what asks for a GPU leaves a process that cannot be forked"),
    ],
)
def test_a_run_says_how_its_cold_runs_start(own, gpu, said):
    """Cold starts of two runs are alike only where they started alike."""
    assert forks.cold_runs([types.SimpleNamespace(gives_own_pages=found) for found in own], gpu=gpu) == said


def test_a_server_that_is_gone_is_one_line(server, log, tmp_path):
    """A fork of it fails at once with its last words; whom it had forked lives on, and its end is seen."""
    one = Started(server, log, "tell('up')\ntime.sleep(60)")
    assert one.answer() == "up"
    (tmp_path / "server.log").write_text("before\nlast words\n")
    os.kill(server._child.pid, signal.SIGKILL)
    server._child.wait()
    start = time.monotonic()
    for _ in range(2):
        found = failure(lambda: Started(server, log, "pass"))
        assert (found.status, found.stage) == (Status.CRASHED, "fork")
        assert found.reason == "the process that starts workers is gone; it said last: last words"
    assert time.monotonic() - start < 2
    with pytest.raises(subprocess.TimeoutExpired):
        one.child.wait(0.2)
    assert one.end(kill=True) == -signal.SIGKILL
    assert gone(one.child.pid)


def test_a_server_that_does_not_come_up_is_one_line(stub, tmp_path):
    """An import that fails, with what it said; and one that takes for ever, with the limit. Neither is left behind."""
    stub("import no_such_module")
    servers = [ForkServer(Settings(1), tmp_path / "log") for _ in range(2)]
    with servers[0]:
        found = failure(servers[0].ready)
    assert (found.status, found.stage) == (Status.CRASHED, "start")
    assert "No module named 'no_such_module'" in found.reason
    stub("import time\ntime.sleep(60)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forks, "START_LIMIT_S", 0.3)
        with servers[1]:
            found = failure(servers[1].ready)
    assert (found.status, found.stage) == (Status.TIMEOUT, "start")
    assert "did not answer within 0.3 s" in found.reason
    assert all(gone(server._child.pid) for server in servers)


def test_a_server_that_ends_takes_its_guard_along(stub, log, tmp_path):
    """Nothing of it is left when it is left, and forks come up again in the next."""
    stub(SERVER)
    before = set(psutil.Process().children())
    for _ in range(2):
        with fork_servers(Settings(1), tmp_path / "server.log", [()]) as (server,):
            assert len(set(psutil.Process().children()) - before) == 2
            assert Started(server, log, "os._exit(4)").end() == 4
        assert set(psutil.Process().children()) == before


def test_a_system_without_fork_has_no_servers(monkeypatch, tmp_path):
    """Workers are then started fresh, as they are without a server."""
    monkeypatch.setattr(forks, "supported", lambda: False)
    with fork_servers(Settings(1), tmp_path / "log", [()] * 3) as servers:
        assert servers == []
    assert not (tmp_path / "log").exists()


#: A parent whose worker is inside a call that lets no other Python thread run, and has started a compiler.
PARENT = """
import json, os, subprocess, sys, time
from pathlib import Path
from bench.run import forks
from bench.run.worker_process import Settings, Worker

real, log, code = subprocess.Popen, Path(sys.argv[1]), sys.argv[2]
forks.subprocess.Popen = lambda command, **o: real(
    [sys.executable, "-c", code, command[-1]] if command[0] == sys.executable else command, **o)
with forks.fork_servers(Settings(1), log, [()]) as (server,), Worker(Settings(1), log, log, server) as worker:
    print(server._child.pid, *next(worker.ask("cold", 20.0))["pids"], flush=True)
    time.sleep(60)
"""
DEAF = """
import ctypes, json, os, subprocess, sys, time
from bench.worker.forking import serve_forks

def main(requests, answers):
    def emit(event, **fields):
        os.write(int(answers), json.dumps({"event": event, **fields}).encode() + b"\\n")
    emit("hello")
    inner = subprocess.Popen(["sleep", "60"])
    emit("pids", pids=[os.getpid(), inner.pid])
    ctypes.PyDLL(None).sleep(60)

serve_forks(int(sys.argv[1]), main)
"""


def test_a_forked_worker_ends_with_its_parent(tmp_path):
    """Within 2 s, with the compilers that it started and with the server, whatever they were doing."""
    line = [sys.executable, "-c", PARENT, str(tmp_path / "log"), DEAF]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 2
        assert all(gone(pid) for pid in pids)
        assert time.monotonic() < end


# The real server.

#: Adds requests to the real worker: what its environment is, and a product and a gradient on several threads.
PLUGIN = """
import os, sys
import numpy as np
import torch

def environment(request, emit):
    emit("environment", values=dict(os.environ))

def products(request, emit):
    a = torch.randn(700, 700, dtype=torch.float64, requires_grad=True)
    loss = (a.float() @ a.float()).double().square().mean()
    tasks = len(os.listdir("/proc/self/task"))
    loss.backward()
    exact = np.square(a.detach().numpy() @ a.detach().numpy()).mean()
    emit("products", error=abs(float(loss) - exact) / exact, finite=bool(a.grad.isfinite().all()),
         threads=torch.get_num_threads(), tasks=tasks)

def resident(request, emit):
    emit("resident", bytes=sys.modules["bench.machine.memory"].resident_bytes())

REQUESTS = {"environment": environment, "products": products, "resident": resident}
sys.modules["bench.worker.server"].REQUESTS |= REQUESTS
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[ForkServer]:
    """A server that has imported all that workers need."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("forks")
    (folder / "plugin.py").write_text(PLUGIN)
    with fork_servers(Settings(2, plugins=(folder / "plugin.py",)), folder / "log", [()]) as (found,):
        yield found


def test_the_server_runs_nothing_that_a_fork_would_lose(real):
    """One thread at most that works, and no process of its own.

    NumPy's OpenBLAS has a pool from its import on, which sleeps, and which a child makes anew when it needs it.
    """

    def used_ns() -> dict[str, int]:
        tasks = Path(f"/proc/{real._child.pid}/task").iterdir()
        return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

    before = used_ns()
    time.sleep(0.1)
    more = {task: used - before[task] for task, used in used_ns().items()}
    # What it does to answer may still be going on.
    assert more.pop(str(real._child.pid)) < 20_000_000
    assert set(more.values()) <= {0}
    assert psutil.Process(real._child.pid).children() == []


def test_a_worker_for_a_cold_run_has_its_memory_to_itself(real, log, tmp_path):
    """As a fresh process it has resident what its imports touched; one for a seat need not."""
    assert real.gives_own_pages
    whole = psutil.Process(real._child.pid).memory_info().rss
    case = {"workload": "seed", "variant": "reference", "mode": "inference", "device": "cpu", "threads": 1}
    with Worker(Settings(2), log, tmp_path, real) as worker:
        (before,) = worker.ask("resident", 60.0)
        list(worker.ask("prepare", 60.0, case=case))
        (after,) = worker.ask("resident", 60.0)
    assert before["bytes"] < 0.9 * whole
    assert after["bytes"] == pytest.approx(whole, rel=0.03)


def test_a_forked_worker_has_caches_of_its_own(real, log, tmp_path):
    """Those of its run, set in its environment; it is up in a fraction of what importing torch takes."""
    took = []
    for number in range(3):
        cache = tmp_path / f"cache{number}"
        start = time.perf_counter()
        with Worker(Settings(2), log, cache, real) as worker:
            took.append(time.perf_counter() - start)
            (event,) = worker.ask("environment", 60.0)
        assert cache_variables(cache).items() <= event["values"].items()
        assert event["values"]["OMP_NUM_THREADS"] == "2"
    assert min(took) < 0.5


def test_an_environment_of_its_own_is_not_forked(real, log, tmp_path):
    """What it does to libraries as they are loaded cannot be had later, so the process is started fresh."""
    with Worker(real._settings.with_environment({"KMP_BLOCKTIME": "0"}), log, tmp_path, real) as worker:
        (event,) = worker.ask("environment", 60.0)
        assert event["values"]["KMP_BLOCKTIME"] == "0"
        assert b"KMP_BLOCKTIME=0" in Path(f"/proc/{worker._child.pid}/environ").read_bytes().split(b"\0")
        assert psutil.Process(worker._child.pid).ppid() == os.getpid()


def test_torch_and_its_threads_work_in_a_forked_worker(real, log, tmp_path):
    """A product by two threads of OpenMP's, its gradient, and a product by NumPy; in a second fork beside it too."""
    with Worker(Settings(2), log, tmp_path, real) as one, Worker(Settings(2), log, tmp_path, real) as other:
        for worker in (one, other, one):
            (event,) = worker.ask("products", 60.0)
            assert event["error"] < 1e-3
            assert event["finite"]
            assert (event["threads"], event["tasks"] >= 2) == (2, True)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_variants_run_in_a_forked_worker(real, log, tmp_path, mode):
    """Torch's own ways, and ONNX Runtime where it is: gated, timed, and gated again."""
    names = ["reference", "onednn", *(["onnxruntime"] if mode == "inference" else [])]
    cases = [vars(Case("seed@batch=4,length=5", name, mode, "cpu", 1)) for name in names]
    with Worker(Settings(1), log, tmp_path, real) as worker:
        events = worker.ask("describe", 120.0, cases=cases, build=False)
        described = [event for event in events if event["event"] == "described"]
        here = [case for case, event in zip(cases, described, strict=True) if not event["reason"]]
        assert {case["variant"] for case in here} >= {"reference"}
        gates = [e for e in worker.ask("sit", 120.0, cases=here, seed=1, audit=True) if e["event"] == "gate"]
        for case in here:
            (turn,) = worker.ask("turn", 60.0, name=case["variant"])
            assert min(turn["block"]["calls_s"]) > 0
        gates += [e for e in worker.ask("stand", 120.0, seed=2) if e["event"] == "gate"]
    assert [(e["variant"], e["passed"]) for e in gates] == [(case["variant"], True) for case in here] * 2
