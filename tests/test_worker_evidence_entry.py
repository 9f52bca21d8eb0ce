"""Evidence of a row says where calls of the CPU kernel took the long way, and why."""

from __future__ import annotations

from unittest import mock

import pytest
from recurrences import DEVICE

from bench.worker.evidence import choices_of, explain, observe
from kernels.cpu import entry
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")


def _words(mode: str) -> str:
    """Evidence of a row of `cpu-fused`, built as a run builds it."""
    variant, workload = VARIANTS["cpu-fused"], find_workload("seed@batch=2,length=3")
    reason = variant.why_not("cpu", mode, workload) or (variant.builds and variant.builds(mode))
    if reason:
        pytest.skip(reason)
    executable = Executable(variant, workload.config, mode, "cpu", initial_weights(workload.config, 1))
    batch = executable.prepare(workload.make_batch(0))
    with executable.context():
        executable.call(batch)
        seen = observe(lambda: executable.call(batch), "cpu")
    return explain(variant, workload, "cpu", seen, None, choices_of(executable.model))


def test_a_row_without_the_native_entry_says_why():
    """An entry that cannot be built leaves the variant running, a longer way: its row must not hide that."""
    entry._library.cache_clear()
    try:
        with mock.patch.object(entry, "SOURCE", "missing.cpp"):
            words = _words("inference")
            assert words.startswith("LSTM ran in kernels.LSTM: cpu-fused (encoder, decoder); no native entry")
            assert words.count("could not compile missing.cpp") == 1
            assert "no native entry" not in _words("training"), "which never takes it"
    finally:
        entry._library.cache_clear()
    assert "no native entry" not in _words("inference")
