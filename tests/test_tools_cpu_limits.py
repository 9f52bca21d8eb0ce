"""The limits of the CPU kernel: what is counted, and what is made of measured rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.tools import cpu_limits as limits

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
    """Weights do not come at the pace of a cache that is too small; beyond all sets, at that of the last."""
    assert limits.bandwidth(CEILINGS["bytes_per_s"], 1_500_000) == 2e9
    assert limits.bandwidth(CEILINGS["bytes_per_s"], 500_000_000) == 1e9


def test_the_table_has_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With rates it has times, without them dashes; a file without rates is one line and 2."""
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({"ceilings": {"cpu": CEILINGS}}), encoding="utf-8")
    assert limits.main([str(file)]) == 0
    found = capsys.readouterr().out
    assert all(str(case) in found for case in limits.CASES)
    assert "| inference B1 T1 H256 | 2.10 M | 1.0 M | 2099.2 | 1048.6 |" in found
    by_sums = {**CEILINGS, "flops_per_s": {"fp32": 1e9, "fp32 by sums": 2e9}}
    file.write_text(json.dumps({"ceilings": {"cpu": by_sums}}), encoding="utf-8")
    assert limits.main([str(file)]) == 0
    assert "| inference B1 T1 H256 | 2.10 M | 1.0 M | 2099.2 | 524.3 |" in capsys.readouterr().out
    assert limits.main([]) == 0
    assert "| - | - |" in capsys.readouterr().out
    file.write_text("{}", encoding="utf-8")
    assert limits.main([str(file)]) == 2
