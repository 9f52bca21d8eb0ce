"""Persistent kernels of cuDNN: the GPU day and the evidence of a run conclude the same from the same profile."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.worker import evidence
from kernels.tools.gpu_day import facts
from seq2seq.workloads.registry import find_workload

STEPS = 3
BY_NAME, BY_LAUNCHES, NOT = "by name", "by launches", "not recognised"
SAID = {
    BY_NAME: "persistent kernels", BY_LAUNCHES: "all steps in one launch", NOT: "no persistent kernels recognised",
}  # fmt: skip


@pytest.mark.parametrize(
    ("launches", "persistent"),
    [
        ({"RNN_blockPersist_fp_LSTM": 1, "elementWise": STEPS}, BY_NAME),
        ({"smallH": 1, "gemm": STEPS - 1}, BY_LAUNCHES),
        ({"smallH": 1, "void at::native::vectorized_elementwise_kernel<4>": STEPS}, BY_LAUNCHES),
        ({"smallH": 1, "Memset (Device)": STEPS, "Memcpy DtoD (Device -> Device)": 2 * STEPS}, BY_LAUNCHES),
        ({"gemm": STEPS, "smallH": 1}, NOT),
        ({"void at::native::vectorized_elementwise_kernel<4>": 1}, NOT),
        ({}, NOT),
    ],
)
def test_a_fact_and_the_evidence_conclude_the_same(monkeypatch, launches, persistent):
    """Torch's own kernels, copies and fills show nothing, however often they run."""
    events = [
        SimpleNamespace(
            name=name, device_type=f"DeviceType.{facts.DEVICE.upper()}", self_cpu_time_total=1.0, device_time_total=1.0,
            time_range=SimpleNamespace(start=0, end=1),
        )
        for name, count in launches.items()
        for _ in range(count * facts.CALLS)
    ]  # fmt: skip
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profile))
    fact = facts._kernels(nn.LSTM, 2, STEPS, 4, torch.float32, "inference")
    # As the summary reads it.
    found = BY_NAME if fact["persistent"] else NOT if fact["once a step"] else BY_LAUNCHES
    words = evidence._cudnn_words(launches, find_workload(f"seed@batch=2,length={STEPS}"))
    assert found == persistent
    assert words.startswith(SAID[persistent])


@pytest.mark.parametrize(("steps", "calls"), [(3, 10), (400, 5), (1500, 2)])
def test_long_sequences_are_profiled_in_few_calls(monkeypatch, steps, calls):
    """A launch a step makes some hundred thousand events of ten calls, and reading them would take the stage's time."""
    made = []

    class CountedLSTM(nn.LSTM):
        def forward(self, x):
            made.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(SimpleNamespace(events=list)))
    facts._kernels(CountedLSTM, 1, steps, 1, torch.float32, "inference")
    assert made == [steps] * (3 + calls)
