"""The limits of the CPU kernel: what is counted, and what is made of measured rates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.records.reader import read_run
from kernels.tools import cpu_limits as limits

REFERENCE_RUNS = Path(__file__).parent.parent / "results" / "reference"

CEILINGS = {"threads": 2, "flops_per_s": {"fp32": 1e9}, "bytes_per_s": {"1000": 4e9, "2000000": 2e9, "90000000": 1e9}}


def test_flops_are_those_of_both_products() -> None:
    """A step of one sequence multiplies two matrices of (4H, H) by a vector; gradients take twice as much again."""
    assert limits.LayerCall("inference", 1, 1, 10).flops == 2 * (400 + 400)
    assert limits.LayerCall("training", 3, 5, 10).flops == 3 * 3 * 5 * 2 * (400 + 400)


def test_weights_in_fewer_bits_are_fewer_bytes() -> None:
    """Of a long call nearly all bytes are recurrent weights."""
    full, half = (limits.LayerCall("inference", 1, 50, 512, size).bytes for size in (4, 2))
    assert 1.9 < full / half < 2


def test_a_limit_is_by_the_set_that_holds_the_weights() -> None:
    """The next smaller set counts, as part of the weights stays in its cache; beyond all sets, the last does."""
    assert limits.bandwidth(CEILINGS["bytes_per_s"], 1_500_000) == 4e9
    assert limits.bandwidth(CEILINGS["bytes_per_s"], 2_000_000) == 2e9
    assert limits.bandwidth(CEILINGS["bytes_per_s"], 500_000_000) == 1e9


@pytest.mark.parametrize(
    "run", [f"cpu-2core-{name}-kernels{threads}" for name in ("zen5", "zen3") for threads in ("", "-2-threads")]
)
def test_no_kept_time_beats_its_limit(run: str) -> None:
    """16 MB of recurrent weights fit the third-level cache, whose rate was measured with 8 MB and not with 32."""
    kept = read_run(REFERENCE_RUNS / run)
    ceilings = kept.environment["ceilings"]["cpu"]
    name = re.compile(r"deepbench@batch=(\d+),hidden=(\d+),length=50")
    times = {
        tuple(map(int, found.groups())): record.batch / record.throughput_seq_per_s
        for record in kept.records
        if record.variant == "cpu-fused" and record.mode == "inference" and (found := name.fullmatch(record.workload))
    }
    found = [case for case in limits.CASES if case.mode == "inference" and case.weight_bytes == 4 and case.steps == 50]
    assert len(found) == 11
    for case in found:
        least = case.bytes / limits.bandwidth(ceilings["bytes_per_s"], case.recurrent)
        assert least < times[case.batch, case.hidden]


#: Ceilings of which something is missing or no number.
BROKEN = {
    "nothing": {},
    "a list": [],
    "no rates": {"threads": 1, "flops_per_s": {}, "bytes_per_s": {}},
    "no threads": {name: rates for name, rates in CEILINGS.items() if name != "threads"},
    "no fp32": CEILINGS | {"flops_per_s": {}},
    "other sets": CEILINGS | {"bytes_per_s": {"large": 1e9}},
    "no numbers": CEILINGS | {"flops_per_s": {"fp32": "fast"}},
}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("none", "No such file or directory"),
        (".", "environment.json: No such file"),
        ("text", "has no ceilings"),
        *((part, "has no ceilings") for part in BROKEN),
    ],
)
def test_what_is_no_run_is_one_line_that_says_what_was_expected(
    given: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a missing file nor a folder without a run shows an exception of Python's."""
    (tmp_path / "text").write_text("no JSON", encoding="utf-8")
    for name, part in BROKEN.items():
        (tmp_path / name).write_text(json.dumps({"ceilings": {"cpu": part}}), encoding="utf-8")
    assert limits.main([str(tmp_path / given)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.endswith("expected the folder of a run of python -m bench on a CPU, or its environment.json\n")
    assert said.count("\n") == 1
    assert "Error" not in said


def test_the_table_has_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With rates it has times, without them dashes; a file without rates is one line and 2."""
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({"ceilings": {"cpu": CEILINGS}}), encoding="utf-8")
    assert limits.main([str(tmp_path)]) == 0
    found = capsys.readouterr().out
    assert all(str(case) in found for case in limits.CASES)
    assert "| inference B1 T1 H256 | 2.10 M | 1.0 M | 524.8 | 1048.6 |" in found
    # No run measures the rate of products of bytes, and fp32's can be beaten.
    assert [line.endswith("| - |") for line in found.splitlines() if "8-bit weights" in line] == [True, True]
    bf16 = {**CEILINGS, "flops_per_s": {"fp32": 1e9, "bf16": 4e9}}
    assert "| inference B1 T1 H1024, 16-bit weights | 16.79 M | 16.8 M | 8392.7 | 4194.3 |" in limits.table(bf16)
    by_sums = {**CEILINGS, "flops_per_s": {"fp32": 1e9, "fp32 by sums": 2e9}}
    file.write_text(json.dumps({"ceilings": {"cpu": by_sums}}), encoding="utf-8")
    assert limits.main([str(file)]) == 0
    assert "| inference B1 T1 H256 | 2.10 M | 1.0 M | 524.8 | 524.3 |" in capsys.readouterr().out
    assert limits.main([]) == 0
    assert "| - | - |" in capsys.readouterr().out
    file.write_text("{}", encoding="utf-8")
    assert limits.main([str(file)]) == 2
