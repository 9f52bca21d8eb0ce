"""Ceilings that a worker measures: the arithmetic by a planted clock, and one real measurement cut short."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from bench.analysis.roofline import BY_SUMS
from bench.worker import ceilings


@pytest.fixture
def a_second_each(monkeypatch):
    """Every probe takes a second; returns how many were taken."""
    taken = []

    def shortest(call, device):
        call()
        taken.append(device)
        return 1.0

    monkeypatch.setattr(ceilings, "_shortest_s", shortest)
    return taken


def test_a_product_counts_two_operations_a_term(a_second_each):
    """128 x 128 x 128 in a second; a type that slow gets no larger product, which would take minutes."""
    assert ceilings._fastest_product("bf16", "cpu") == 2 * 128**3
    assert len(a_second_each) == 1


def test_the_fastest_way_to_multiply_counts(monkeypatch):
    """If oneDNN is faster than torch.mm, fp32's ceiling is oneDNN's; without oneDNN it is torch.mm's."""
    seconds = {"mm": 1.0, "_times_packed": 0.5}
    monkeypatch.setattr(ceilings, "_shortest_s", lambda way, _: way() is not None and seconds[way.func.__name__])
    assert ceilings._fastest_product("fp32", "cpu") == 2 * 128**3 / 0.5
    monkeypatch.setattr(ceilings, "_packed", lambda _: None)
    assert ceilings._fastest_product("fp32", "cpu") == 2 * 128**3


def test_a_packed_product_is_the_product():
    """The call that is timed as a product is one."""
    left, right = torch.randn(128, 128), torch.randn(128, 128)
    packed = ceilings._packed(right)
    if packed is None:
        pytest.skip("this torch has no oneDNN")
    torch.testing.assert_close(ceilings._times_packed(left, packed), left @ right.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_are_those_that_a_probe_touches(a_second_each, monkeypatch, threads):
    """Reading goes through 32 MiB however small the working set; beyond that updating in place counts both ways."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert ceilings._fastest_move(torch.ones(8192), "cpu") == ceilings.REREAD["cpu"]
    large = torch.ones(ceilings.REREAD["cpu"] // 4)
    assert ceilings._fastest_move(large, "cpu") == 2 * large.nbytes
    assert len(a_second_each) == 6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("cache", "free", "largest"),
    [(0, 1 << 36, 256 << 20), (96 << 20, 1 << 36, 384 << 20), (1 << 30, 1 << 36, 1 << 30), (0, 1 << 26, 1 << 23)],
)
def test_working_sets_go_from_the_innermost_cache_to_memory(monkeypatch, device, cache, free, largest):
    """From 32 KiB on, each at most four times the one before, far beyond the device's own last cache and in memory."""
    ours, other = (cache, free), (300 << 20, 1 << 32)
    (cpu_cache, cpu_free), (gpu_cache, gpu_free) = (ours, other) if device == "cpu" else (other, ours)
    monkeypatch.setattr(ceilings, "_last_cache_bytes", lambda: cpu_cache)
    monkeypatch.setattr(ceilings.psutil, "virtual_memory", lambda: SimpleNamespace(available=cpu_free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu_free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=gpu_cache))
    sizes = ceilings._sizes_up_to(ceilings._largest_set(device))
    assert (sizes[0], sizes[-1]) == (32 * 1024, largest)
    assert all(small < large <= 4 * small for small, large in itertools.pairwise(sizes))


def test_a_measurement_has_every_precision_and_leaves_the_threads_alone(monkeypatch):
    """Real, but with little data: rates above 0, one thread's own beside those of two, never above them."""
    monkeypatch.setattr(ceilings, "SLICE_S", 0.001)
    monkeypatch.setattr(ceilings, "LARGEST_PRODUCT", 128)
    monkeypatch.setattr(ceilings, "_largest_set", lambda _: 1 << 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = ceilings.measure("cpu")
        assert torch.get_num_threads() == found["threads"] == 2
    finally:
        torch.set_num_threads(before)
    by_sums = {BY_SUMS} if ceilings.adds_beside() else set()
    assert set(found["flops_per_s"]) == {"fp32", "bf16", "fp16"} | by_sums
    assert all(found["flops_per_s"][name] == 1.5 * found["flops_per_s"]["fp32"] for name in by_sums)
    for kind in ("flops_per_s", "bytes_per_s"):
        assert all(0 < found["one_thread"][kind][name] <= rate for name, rate in found[kind].items())


@pytest.mark.parametrize(
    ("text", "adds"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", False),
        (None, False),
    ],
)
def test_only_amd_s_processors_with_avx512_add_beside(tmp_path, text, adds):
    """Others take the same pipes for both, and get no rate that they cannot reach."""
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    assert ceilings.adds_beside(file) is adds


@pytest.mark.gpu
def test_a_gpu_has_tf32_beside_ieee_products(monkeypatch):
    """Four precisions, each with its own setting: TF32 is no slower than fp32, and the setting is put back."""
    monkeypatch.setattr(ceilings, "SLICE_S", 0.005)
    before = torch.backends.cuda.matmul.fp32_precision
    found = ceilings.measure("cuda")
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert set(found["flops_per_s"]) == {"fp32", "tf32", "bf16", "fp16"}
    assert found["flops_per_s"]["tf32"] > 0.9 * found["flops_per_s"]["fp32"] > 0
    assert "one_thread" not in found
