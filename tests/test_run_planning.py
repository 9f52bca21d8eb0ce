"""A check of what can run that ends its process makes its case unavailable, and not the run."""

from __future__ import annotations

from bench.plan.cases import Filters, Selection, Suite
from bench.run.planning import make_plan
from bench.run.worker_process import Settings

#: Two variants whose requirements end the worker, as converters of other runtimes do.
ENDING = """
import os, signal
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS

def _aborts(device, mode, workload):
    os.abort()

def _is_killed(device, mode, workload):
    os.kill(os.getpid(), signal.SIGSEGV)

for name, requirement in (("aborts", _aborts), ("is-killed", _is_killed)):
    VARIANTS[name] = Variant(name, "ends the process", requirements=(requirement,))
"""


def test_a_check_that_ends_its_process_is_a_reason_of_its_case(tmp_path):
    """The others are described by another worker, each once and in order."""
    (tmp_path / "ending.py").write_text(ENDING, encoding="utf-8")
    names = ("reference", "aborts", "loop", "is-killed", "onednn")
    suite = Suite("s", "", (Selection(("seed",), names, modes=("inference",)),))
    plan = make_plan(suite, Filters(), Settings(1, plugins=(tmp_path / "ending.py",)), build=False)
    found = {described.case.variant: described.unavailable for described in plan.cases}
    assert tuple(found) == names
    assert found["aborts"] == "the worker died of signal 6 (SIGABRT), during: checking whether aborts can run"
    assert found["is-killed"] == "the worker died of signal 11 (SIGSEGV), during: checking whether is-killed can run"
    assert [found[name] for name in ("reference", "loop", "onednn")] == [None] * 3
