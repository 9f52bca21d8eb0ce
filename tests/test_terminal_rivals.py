"""`bench show RUN --rivals`: the fastest of some variants against the fastest of all others."""

from __future__ import annotations

import pytest
from run_folders import make_run

from bench.__main__ import main
from bench.errors import UsageError
from bench.plan.cases import REFERENCE
from bench.records.reader import read_run
from bench.records.schema import Status
from bench.terminal.rivals import pairings

SPEEDUPS = {REFERENCE: 1.0, "onednn": 2.0, "cpu-fused": 3.0, "cpu-fused-int8": 6.0, "onnxruntime-int8": 5.0}
PRECISIONS = {"cpu-fused-int8": "int8", "onnxruntime-int8": "int8", "cpu-fused-bf16": "bf16"}


def rivals_of(path, pattern="cpu-fused*", **recipe) -> dict[str, tuple[str, str, float]]:
    """Ours, the rival and the ratio of each precision in a made-up run."""
    run = read_run(make_run(path, precisions=PRECISIONS, **({"speedups": SPEEDUPS, "figured": True} | recipe)))
    found = pairings(run, pattern)
    return {pair.precision: (pair.ours.variant, pair.rival.variant, pair.ratio.value) for pair in found}


def test_each_precision_has_its_pair(tmp_path):
    """The fastest of both sides in fp32, in int8 and in any; the ratio is what the drawn times say."""
    assert rivals_of(tmp_path / "run") == {
        "fp32": ("cpu-fused", "onednn", pytest.approx(1.5, rel=0.02)),
        "int8": ("cpu-fused-int8", "onnxruntime-int8", pytest.approx(1.2, rel=0.02)),
        "any": ("cpu-fused-int8", "onnxruntime-int8", pytest.approx(1.2, rel=0.02)),
    }


def test_a_slower_variant_has_a_ratio_below_one(tmp_path):
    assert rivals_of(tmp_path / "run", "onednn")["any"] == ("onednn", "cpu-fused-int8", pytest.approx(1 / 3, rel=0.02))


def test_a_precision_of_one_side_is_only_in_any(tmp_path):
    """Ours is then compared with the fastest rival of all."""
    found = rivals_of(tmp_path / "run", speedups=SPEEDUPS | {"cpu-fused-bf16": 8.0})
    assert "bf16" not in found
    assert found["any"] == ("cpu-fused-bf16", "onnxruntime-int8", pytest.approx(1.6, rel=0.02))


def test_a_refused_variant_is_no_rival(tmp_path):
    """The fastest of all failed its gate."""
    found = rivals_of(tmp_path / "run", failed={"onnxruntime-int8": (Status.PARITY_FAILED, "wrong")})
    assert found["any"] == ("cpu-fused-int8", "onednn", pytest.approx(3.0, rel=0.02))


def test_one_precision_is_said_once(tmp_path):
    assert list(rivals_of(tmp_path / "run", speedups={REFERENCE: 1.0, "cpu-fused": 3.0})) == ["fp32"]


def test_of_variants_without_figures_none_is_the_fastest(tmp_path):
    """Their order is that of their records, which says nothing."""
    with pytest.raises(UsageError, match="no group of this run has a time"):
        rivals_of(tmp_path / "run", figured=False)


def test_the_table_as_markdown_marks_what_is_doubtful(tmp_path, capsys):
    """Every row of the table begins and ends with a column's mark; disturbed samples give the sign and its meaning."""
    folder = make_run(tmp_path / "run", speedups=SPEEDUPS, precisions=PRECISIONS, figured=True, disturbed_share=1.0)
    assert main(["show", str(folder), "--rivals", "cpu-fused*", "--format", "markdown"]) == 0
    header, rule, *rows, blank, meaning = capsys.readouterr().out.splitlines()
    assert header.startswith("| case | precision | ")
    assert set(rule) == set("|- ")
    assert len(rows) == 3
    # The median of ours and the ratio.
    assert all(row.count(" | ") == 6 and row.count("| \\~") == 2 for row in rows)
    # Otherwise it would be a row as well.
    assert not blank
    assert meaning.startswith("~: a doubtful figure")


@pytest.mark.parametrize("option", ["--rivals", "--against"])
def test_a_variant_without_a_figure_is_refused_with_its_reason(option, tmp_path, capsys):
    """Other names are no help where the name is right."""
    failed = {"onnxruntime-int8": (Status.PARITY_FAILED, "wrong by 3")}
    folder = make_run(tmp_path / "run", speedups=SPEEDUPS, figured=True, failed=failed)
    assert main(["show", str(folder), option, "onnxruntime-int8"]) == 2
    said = capsys.readouterr().err
    assert "wrong by 3" in said
    assert "did you mean" not in said
