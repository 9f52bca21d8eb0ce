"""The head with shapes and numbers that are empty or do not fit: results as torch.nn.Linear's, or one clear line."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

import torch
from recurrences import DEVICE
from test_kernels_head import check
from torch import nn

from kernels import ShortlistHead
from kernels.cpu import shortlist

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the head is for CPUs"),
    pytest.mark.skipif(bool(shortlist.hindrance()), reason=str(shortlist.hindrance())),
]


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), (0, 3), (3,)])
@pytest.mark.parametrize("features", [(3, 0), (0, 3), (0, 0)])
def test_layers_without_inputs_or_outputs(features: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Give what torch.nn.Linear gives: an empty tensor, or the bias."""
    head, h = ShortlistHead(20, 20, exact=2), torch.ones(*shape[:-1], features[0])
    head.weight = nn.Parameter(torch.ones(features[::-1]))
    head.bias = nn.Parameter(torch.arange(float(features[1])))
    with torch.no_grad():
        assert torch.equal(head(h), nn.functional.linear(h, head.weight, head.bias))
        assert head.error_bound(h).shape == shape[:-1]


@pytest.mark.parametrize("value", [0, -1, 1.5, None, 2**63, 10**30])
def test_a_number_of_exact_outputs_that_cannot_be_is_refused(value: int) -> None:
    """When the head is made and when the number is set later; then the earlier one stays."""
    head = ShortlistHead(20, 100, exact=3)
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        ShortlistHead(20, 100, exact=value)
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        head.exact = value
    assert head.exact == 3
    head.exact = 2**63 - 1
    check(head, torch.randn(2, 20))
    head.exact = 5
    check(head, torch.randn(2, 20))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("bias", (3,), r"bias has shape \(3,\), expected \(100,\)"),
        ("bias", (1,), r"bias has shape \(1,\), expected \(100,\)"),
        ("bias", (1, 100), r"bias has shape \(1, 100\), expected \(100,\)"),
        ("bias", (), r"bias has shape \(\), expected \(100,\)"),
        ("weight", (20,), r"weight has shape \(20,\), expected \(out_features, in_features\)"),
        ("weight", (), r"weight has shape \(\), expected"),
        ("weight", (2, 50, 20), r"weight has shape \(2, 50, 20\), expected"),
        ("weight", (90, 20), r"bias has shape \(100,\), expected \(90,\)"),
    ],
)
def test_parameters_of_another_shape_are_refused(name: str, shape: tuple[int, ...], says: str) -> None:
    """Replaced after the head was made, and after a call: native code would read past their end."""
    head, h = ShortlistHead(20, 100), torch.randn(2, 20)
    with torch.no_grad():
        head(h)
        setattr(head, name, nn.Parameter(torch.zeros(shape)))
        with pytest.raises(RuntimeError, match=says):
            head(h)
        with pytest.raises(RuntimeError, match=says):
            head.error_bound(h)
