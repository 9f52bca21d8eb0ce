"""Code for an NVIDIA GPU, run on one that is simulated in the host's memory (`simulated_gpu`).

Each test is a process of its own, which sees the simulated device as torch is imported.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_gpu

pytest.importorskip("triton")

#: What a GPU is strict about, the simulated one is too.
STRICT = """
import torch

x = torch.randn(3, 4, device="cuda")
assert str(x.device) == "cuda:0" and torch.empty(4, device="cuda").isnan().all()


def refused(call, words):
    try:
        call()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)


refused(lambda: x + torch.zeros(4), "two devices")
refused(lambda: torch.empty(2 << 30, dtype=torch.int8, device="cuda"), "out of memory")
kept = torch.zeros(3, 4, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    doubled = torch.nn.functional.linear(kept, torch.eye(4, device="cuda").mul(2))
    refused(lambda: kept.sum().item(), "capturing")
    refused(lambda: kept.cpu(), "capturing")
    refused(torch.cuda.synchronize, "capturing")
kept.copy_(x)
graph.replay()
assert torch.equal(doubled, 2 * x)
"""

#: Every kernel, in both passes, against torch's LSTM on the CPU; and calls that replay a graph of it.
KERNELS = """
import sys

import torch

from kernels import LSTM
from kernels.gpu import graph_cache

torch.manual_seed(0)
plain = torch.nn.LSTM(6, 16, 2, batch_first=True, bidirectional=True).double()
x, lengths = torch.randn(3, 5, 6), torch.tensor([5, 2, 4])


def right(x):
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.double(), lengths, batch_first=True, enforce_sorted=False)
    return torch.nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)[0]


for name in ("cell", "sequence", "persistent", "auto"):
    own = LSTM(6, 16, 2, batch_first=True, bidirectional=True, implementation=name)
    own.load_state_dict(plain.state_dict())
    own = own.cuda()
    given, expected = x.cuda().requires_grad_(), x.clone().requires_grad_()
    output = own(given, lengths=lengths.cuda())[0]
    torch.testing.assert_close(output.cpu().double(), right(expected), rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    plain.zero_grad()
    right(expected).square().sum().backward()
    torch.testing.assert_close(given.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-5)
    for (label, one), other in zip(own.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad.cpu().double(), other.grad, rtol=1e-4, atol=1e-5, msg=label)
    assert {choice.implementation for choice in own.choices} == {name} or name == "auto"
plain, lengths = torch.nn.LSTM(6, 16, batch_first=True).double(), torch.tensor([5, 5, 5])
own = LSTM(6, 16, batch_first=True, implementation="cell")
own.load_state_dict(plain.state_dict())
own, kept = own.cuda(), x.cuda()
before = graph_cache.state()
with torch.inference_mode():
    for _ in range(6):
        fresh = torch.randn(3, 5, 6)
        kept.copy_(fresh)
        torch.testing.assert_close(own(kept)[0].cpu().double(), right(fresh), rtol=1e-5, atol=1e-6)
print(graph_cache.state().captured - before.captured, graph_cache.state().replayed - before.replayed)
"""


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=simulated_gpu.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_simulated_gpu_is_strict_where_a_gpu_is():
    """Two devices in one operation, memory beyond its own, and a graph that cannot hold what waits for the host."""
    _run(STRICT)


def test_every_kernel_is_right_on_the_path_for_a_gpu():
    """Forward, backward, lengths and two directions of each; and a graph of a call is captured and replayed."""
    captured, replayed = map(int, _run(KERNELS).split()[-2:])
    assert captured > 0
    assert replayed > 0


@pytest.mark.slow
def test_a_run_measures_the_simulated_gpu(tmp_path: Path):
    """Training in mixed precision passes its gate; our kernels say that Triton cannot launch there."""
    done = subprocess.run(
        [
            sys.executable, "-m", "bench", "run", "--workload", "seed@hidden=16,length=3,batch=2", "--mode", "training",
            "--device", "cuda", "--variant", "amp-fp16", "--variant", "triton-cell", "--budget", "1s",
            "--no-second-instrument", "--out", str(tmp_path / "run"),
        ],
        env=simulated_gpu.environment(triton=False), cwd=simulated_gpu.TESTS.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "run" / "records.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "reference": "ok",
        "amp-fp16": "ok",
        "triton-cell": "unavailable",
    }
    assert "Triton" in rows["triton-cell"]["reason"]
    assert all(float(rows[name]["memory_cuda_allocated_bytes"]) > 0 for name in ("reference", "amp-fp16"))
    facts = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert "simulated" in json.dumps(facts)
