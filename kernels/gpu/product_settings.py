"""Settings of torch that decide how a product is computed: part of the key of every graph that holds one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def product_settings(dtype: torch.dtype) -> tuple[Hashable, ...]:
    """State of torch that decides how its products of a type are computed, and so what a graph has in it."""
    # Not through `torch.backends.cuda`, whose attributes call these and take five times as long: a step asks twice.
    ask: Any = torch._C  # noqa: SLF001
    how: Hashable = None
    if dtype == torch.float32:
        how = ask._get_fp32_precision_getter("cuda", "matmul")  # noqa: SLF001
    elif dtype == torch.float16:
        # Whether sums may be rounded between parts, whether K may be split, and whether they are kept in float16.
        how = ask._get_cublas_allow_fp16_reduced_precision_reduction(), ask._get_cublas_allow_fp16_accumulation()  # noqa: SLF001
    elif dtype == torch.bfloat16:
        how = ask._get_cublas_allow_bf16_reduced_precision_reduction()  # noqa: SLF001
    return ask._get_deterministic_algorithms(), how, ask._get_blas_preferred_backend()  # noqa: SLF001
