"""Precision of cuDNN: set and put back, and the older switch stays readable inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.common.cudnn_precision import cudnn_precision, lstm_precision, wanted_precision


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_older_switch_can_be_read_inside(precision):
    """Advice such as `torch.backends.cudnn.flags(enabled=False)` works inside; one switch alone would raise."""
    cudnn: Any = torch.backends.cudnn
    before = lstm_precision()
    with cudnn_precision(precision):
        assert lstm_precision() == precision
        assert cudnn.allow_tf32 is (precision == "tf32")
        with cudnn.flags(enabled=False):
            assert not cudnn.enabled
    assert lstm_precision() == before
    assert isinstance(cudnn.allow_tf32, bool)


def test_switches_that_were_apart_are_put_back_so():
    """A user who has set one operator alone finds it as it was."""
    set_one, get = torch._C._set_fp32_precision_setter, torch._C._get_fp32_precision_getter
    before = get("cuda", "rnn")
    set_one("cuda", "rnn", "ieee" if before == "tf32" else "tf32")
    try:
        apart = get("cuda", "rnn"), get("cuda", "conv")
        with cudnn_precision("ieee"):
            pass
        assert (get("cuda", "rnn"), get("cuda", "conv")) == apart
    finally:
        set_one("cuda", "rnn", before)
    assert isinstance(torch.backends.cudnn.allow_tf32, bool)


def test_only_float32_without_tf32_forbids_tensor_cores():
    """CuDNN's bfloat16 would run without them, or not at all."""
    kinds = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
    assert [wanted_precision(dtype, tf32=tf32) for dtype, tf32 in kinds] == ["ieee", "tf32", "tf32", "tf32"]
