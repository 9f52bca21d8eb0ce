"""The ceiling and who is above it: shares, verdicts, and the doubt in favour of the case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.analysis.roofline import (
    BY_SUMS,
    MARGIN,
    SUMS,
    Ceilings,
    Judge,
    Rates,
    Work,
    excess,
    precisions,
    share,
)
from bench.records.schema import Status

RATES = Rates(
    {"fp32": 100e9, "bf16": 400e9, "fp16": 5e9}, {32_768: 200e9, 524_288: 250e9, 1 << 23: 100e9, 1 << 28: 40e9}
)
MACHINE = Ceilings(1, RATES)
#: The evidence of a case in whose fp32 products additions took the place of multiplications.
SUMMED = f"LSTM ran in kernels.LSTM: cpu-fused (encoder, decoder); multiplied by avx512-fma and {SUMS}"
#: 1 GFLOP and 1 MB in 20 ms: half of what fp32 products allow.
WORK = Work(1e9, 1e6, 0.020, ("fp32",))
FIELDS = {
    "flops": 10**9, "least_bytes": 10**6, "batch": 8, "throughput_seq_per_s": 8 / 0.020, "precision": "fp32",
    "ran_precision": "fp32", "device": "cpu",
}  # fmt: skip


def judged(fields: dict, *measured: Ceilings | None) -> tuple[dict, int]:
    """The verdict on a machine that measures so one time after the other, and how often it was measured."""
    left = list(measured)
    judge = Judge(lambda _: left.pop(0))
    judge.look("cpu")
    return judge.judge(fields), len(measured) - len(left)


def slower(factor: float) -> Ceilings:
    """The machine with all its rates divided."""
    flops = {name: rate / factor for name, rate in RATES.flops_per_s.items()}
    return Ceilings(1, Rates(flops, {size: rate / factor for size, rate in RATES.bytes_per_s.items()}))


def test_the_share_is_the_least_time_over_the_time():
    """A case that takes 10 ms at the fastest and took 20 is at half of its ceiling."""
    assert judged(FIELDS, MACHINE) == ({"ceiling_share": pytest.approx(0.5), "bound": "compute"}, 1)


def test_what_moves_much_is_bound_by_memory():
    """1 GB at 40 GB/s takes longer than 1 GFLOP."""
    found = share(replace(WORK, least_bytes=1e9, call_s=0.05), MACHINE)
    assert found == {"ceiling_share": pytest.approx(0.5), "bound": "memory"}


@pytest.mark.parametrize(
    ("working_set", "expected"), [(1, 250e9), (32_768, 250e9), (600_000, 250e9), (1 << 23, 100e9), (1 << 40, 40e9)]
)
def test_a_working_set_gets_the_bandwidth_of_the_cache_it_fits_in(working_set: int, expected: float):
    """The best of what was measured with a set at least as large, or the next smaller: a doubt speaks for the case."""
    assert RATES.bandwidth(working_set) == expected


@pytest.mark.parametrize(
    ("rates", "evidence", "rate"),
    [
        ({}, "LSTM ran in oneDNN", 100e9),
        ({}, SUMMED, 100e9),
        ({BY_SUMS: 150e9}, "LSTM ran in oneDNN", 100e9),
        ({BY_SUMS: 150e9}, None, 100e9),
        ({BY_SUMS: 150e9}, SUMMED, 150e9),
    ],
)
def test_only_what_takes_sums_may_be_as_fast_as_they_are(rates: dict[str, float], evidence: str | None, rate: float):
    """1.4 times the rate of the fastest plain product is impossible, but where the evidence names sums: there 1.5."""
    machine = Ceilings(1, Rates({**RATES.flops_per_s, **rates}, RATES.bytes_per_s))
    fields = FIELDS | {"evidence": evidence}
    at = {gain: judged(fields | {"throughput_seq_per_s": 8 * gain * 100}, machine, machine)[0] for gain in (0.5, 1.4)}
    assert at[0.5]["ceiling_share"] == pytest.approx(0.5 * 100e9 / rate)
    assert (at[1.4].get("status") is Status.IMPOSSIBLE) == (rate == 100e9)
    assert machine.product_limit("fp32") == 100e9
    assert machine.product_limit("bf16") == 400e9


@pytest.mark.parametrize(
    ("asked", "ran", "expected"),
    [("fp32", "", (BY_SUMS,)), ("int8-head", "fp32", (BY_SUMS, "int8-head")), ("bf16", "bf16", ("bf16",))],
)
def test_sums_take_the_place_of_fp32_alone(asked: str, ran: str, expected: tuple[str, ...]):
    """Products of other types are what they were."""
    assert precisions({"precision": asked, "ran_precision": ran, "evidence": SUMMED}) == expected


def test_a_narrow_type_without_a_fast_product_has_the_ceiling_of_fp32():
    """Its values can be multiplied as fp32, so its own slow product bounds nothing."""
    assert RATES.product("fp16") == 100e9
    assert RATES.product("bf16") == 400e9
    assert RATES.product("int8") is None


@pytest.mark.parametrize(
    ("asked", "ran", "expected"),
    [
        ("bf16", "bf16 and fp32", ("bf16", "fp32")),
        ("bf16", "fp32", ("fp32",)),
        ("tf32", "fp32", ("tf32",)),
        ("fp16", "", ("fp16",)),
    ],
)
def test_the_ceiling_is_that_of_the_precision_that_ran(asked: str, ran: str, expected: tuple[str, ...]):
    """Precisions are those the profiler saw, TF32 by what was asked, and what was asked where it saw nothing."""
    assert precisions({"precision": asked, "ran_precision": ran}) == expected


def test_the_highest_of_several_precisions_counts():
    """A case with bf16 and fp32 products may be as fast as bf16."""
    assert share(replace(WORK, precisions=("fp32", "bf16")), MACHINE)["ceiling_share"] == pytest.approx(0.125)


@pytest.mark.parametrize("factor", [2.3, 20.0])
def test_what_is_faster_than_the_machine_is_impossible(factor: float):
    """Ceilings planted too low condemn, in words with the figures, after exactly one more measurement."""
    verdict, times = judged(FIELDS, slower(2 * factor), slower(2 * factor))
    assert verdict["status"] is Status.IMPOSSIBLE
    assert verdict["reason"].startswith(
        f"{factor:.1f}x faster than this machine's fp32 products allow: 1.00 GFLOP in 20.0"
    )
    assert times == 2


def test_bandwidth_is_a_ceiling_too():
    """1 GB in 5 ms is five times what memory gives."""
    reason = excess(Work(1e6, 1e9, 0.005, ("fp32",)), MACHINE)
    assert reason == (
        "5.0x faster than this machine's bandwidth allows: 1.00 GB in 5.00 ms is 200 GB/s, "
        "the most in 1 measurements is 40.0 GB/s"
    )


def test_a_machine_that_was_held_up_is_measured_again():
    """The best of both measurements counts, and acquits; the first alone would have condemned."""
    assert excess(WORK, slower(4))
    verdict, times = judged(FIELDS, slower(4), MACHINE)
    assert (verdict["ceiling_share"], times) == (pytest.approx(0.5), 2)


def test_a_second_measurement_that_fails_condemns_by_the_first():
    """Then there is only the first to go by."""
    assert judged(FIELDS, slower(4), None)[0]["status"] is Status.IMPOSSIBLE


def test_the_margin_is_the_doubt():
    """A case at the edge of the margin is possible, one beyond it is not."""
    at = WORK.flops / RATES.flops_per_s["fp32"]
    assert not excess(replace(WORK, call_s=at / (1 + 0.9 * MARGIN)), MACHINE)
    assert excess(replace(WORK, call_s=at / (1 + 1.1 * MARGIN)), MACHINE)


def test_several_threads_that_were_held_up_condemn_nobody():
    """Four threads can do four times what one did; a case below that is possible, but its share is not known."""
    held_up = Ceilings(4, slower(100).rates, one_thread=slower(4).rates)
    assert excess(WORK, Ceilings(4, slower(100).rates))
    assert judged(FIELDS, held_up, held_up) == ({}, 2)


def test_a_precision_that_was_not_measured_bounds_nothing():
    """No share and no verdict by products; by bytes there still is one."""
    assert judged(FIELDS | {"ran_precision": "int8"}, MACHINE) == ({}, 1)
    # Beside products of fp32 that the profiler saw, a kernel of ours may have multiplied in integers.
    assert judged(FIELDS | {"precision": "int8-head", "ran_precision": "fp32"}, MACHINE) == ({}, 1)
    assert "bandwidth" in excess(Work(1e9, 1e9, 0.005, ("int8",)), MACHINE)


@pytest.mark.parametrize("missing", ["flops", "least_bytes", "throughput_seq_per_s"])
def test_what_is_not_known_gives_no_share(missing: str):
    """A case without work or time is not judged."""
    assert judged(FIELDS | {missing: None}, MACHINE) == ({}, 1)


def test_ceilings_survive_json():
    """environment.json gives back what was measured, to four digits."""
    found = Ceilings(2, RATES, one_thread=slower(2).rates, measurements=3)
    assert Ceilings.of(found.as_json()) == found
    assert Ceilings.of(MACHINE.as_json()) == MACHINE
