"""`python -m bench ranks`: two ranks by torchrun, a slow one named, a dead and a hung one told in time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.ranks.keeper import RankEnd, RankPlace, RankReport, _listen, gather, keep, tell
from bench.records import ranks as kept
from bench.records.ranks import RanksRecord
from bench.records.schema import Status

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "ranked_variants.py"


def torchrun(tmp_path, *words: str, **variables: str) -> tuple[int, list[RanksRecord]]:
    """Train by two ranks; exit code of the launcher, and the records."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bench", "ranks"]
    command += ["--workload", "seed@batch=4,length=3", "--plugin", str(PLUGIN), "--out", str(out), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=200, check=False)
    return done.returncode, kept.read(out)


@pytest.mark.slow
def test_a_planted_slow_rank_is_found_and_named(tmp_path):
    """Rank 1 sleeps in its forward pass; the gradients are those of one process all the same.

    It also waits for the gate of rank 0 for longer than it would in a training step.
    """
    words = ["--variant", "slow-rank", "--scaling", "weak", "--rounds", "3", "--steps", "2", "--silence", "4"]
    code, records = torchrun(tmp_path, *words, SEQ2SEQ_TEST_GATE_S="5")
    assert code == 0
    assert [(record.ranks, record.status) for record in records] == [(1, Status.OK), (2, Status.OK)]
    assert [record.straggler for record in records] == [None, 1]
    assert all(record.grad_error <= record.grad_limit for record in records)
    assert records[1].efficiency < 0.9


@pytest.mark.slow
def test_a_rank_that_hangs_is_a_record_in_time(tmp_path):
    """Not a run that hangs; the record names the rank that the others wait for."""
    code, records = torchrun(tmp_path, "--variant", "hanging-rank", "--scaling", "weak", "--silence", "5")
    assert code != 0
    assert {record.status for record in records} == {Status.TIMEOUT}
    assert all("rank 1 hung" in record.reason for record in records)
    assert all(record.step_s is None for record in records)


@pytest.mark.parametrize(
    ("code", "ended", "told"),
    [("os._exit(9)", RankEnd.DIED, "exit code 9"), ("time.sleep(60)", RankEnd.HUNG, "said nothing for 2 s")],
)
def test_a_keeper_tells_how_its_rank_ended(tmp_path, code, ended, told):
    """A process that is gone, and one that does nothing any more; the keeper outlives both."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"import os, time\n{code}\n")
    found = keep(RankPlace(0, 1, tmp_path), {"threads": 1, "plugins": [str(plugin)]}, silence_s=1.0, limit_s=100.0)
    assert (found.ended, found.stage) == (ended, "plugins")
    assert told in found.reason


@pytest.mark.parametrize(
    ("word", "code", "ended"),
    [
        ("computes", "while time.process_time() < 1.5: pass", RankEnd.DIED),
        ("computes", "time.sleep(60)", RankEnd.HUNG),
        ("alive", "while True: pass", RankEnd.HUNG),
        ("waits", "time.sleep(0.6)", RankEnd.DIED),
    ],
)
def test_a_rank_that_computes_or_waits_for_others_does_not_hang(tmp_path, word, code, ended):
    """If it said so, and in computing uses processor time; it is silent for far longer than any other may be."""
    child = subprocess.Popen([sys.executable, "-c", f"import time\n{code}"])
    lines: queue.Queue[str | None] = queue.Queue()
    lines.put(json.dumps({"event": word, "stage": "planted"}))
    threading.Thread(target=lambda: child.wait() or lines.put(None), daemon=True).start()
    try:
        found = _listen(RankPlace(0, 1, tmp_path), child, lines, silence_s=0.1, deadline_s=time.monotonic() + 60)
    finally:
        child.kill()
    assert (found.ended, found.stage) == (ended, "planted")


def test_what_computes_for_ever_is_ended_by_the_time_limit(tmp_path):
    """However busy it is."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    lines: queue.Queue[str | None] = queue.Queue()
    lines.put(json.dumps({"event": "computes", "stage": "planted"}))
    try:
        found = _listen(RankPlace(0, 1, tmp_path), child, lines, silence_s=0.1, deadline_s=time.monotonic() + 1)
    finally:
        child.kill()
        child.wait()
    assert found.ended is RankEnd.HUNG


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The environment that torchrun gives to one of two ranks."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1",
             "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def test_without_torchrun_one_line_says_how(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["ranks"]) == 2
    assert "torchrun --nproc-per-node 2 -m bench ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world", "3"], "more than the 2 ranks"),
        (["--plugin", "none.py"], "does not exist"),
        (["--workload", "sed"], "no workload matches 'sed'; did you mean 'seed'?"),
        (["--variant", "onedn"], "no variant matches 'onedn'; did you mean 'onednn'?"),
    ],
)
def test_wrong_usage_is_one_line(launched, tmp_path, capsys, words, told):
    """A line says what was wrong and what was expected; exit code 2, and nothing is written."""
    assert launched is None
    assert main(["ranks", *words]) == 2
    assert not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_several_machines_need_a_folder_that_all_see(launched, monkeypatch, capsys):
    assert launched is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert main(["ranks"]) == 2
    assert "--exchange" in capsys.readouterr().err


def test_a_keeper_that_tells_nothing_counts_as_dead(tmp_path):
    """Whatever took it, the others do not wait for ever."""
    place = RankPlace(0, 2, tmp_path / "exchange")
    tell(place, RankReport(0, RankEnd.DONE, events=[{"event": "gate"}]))
    found = gather(place, 0.1)
    assert [report.ended for report in found] == [RankEnd.DONE, RankEnd.DIED]
    assert found[0].events == [{"event": "gate"}]


def test_records_come_back_as_they_were_written(tmp_path):
    written = kept.write(tmp_path, [RanksRecord(workload="seed", ranks=2, status=Status.TIMEOUT)], [])
    assert kept.read(tmp_path) == written


def test_every_column_is_documented():
    """results/columns.md says of every column what the code says."""
    assert kept.dictionary() in (ROOT / "results" / "columns.md").read_text(encoding="utf-8")
