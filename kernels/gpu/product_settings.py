"""What of torch's settings decides how a product is computed: part of the key of every graph that holds one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def product_settings(dtype: torch.dtype) -> tuple[Hashable, ...]:
    """State of torch that decides how its products of a type are computed, and so what a graph has in it."""
    matmul: Any = torch.backends.cuda.matmul
    how: Hashable = None
    if dtype == torch.float32:
        how = matmul.fp32_precision
    elif dtype == torch.float16:
        how = matmul.allow_fp16_reduced_precision_reduction
    elif dtype == torch.bfloat16:
        how = matmul.allow_bf16_reduced_precision_reduction
    return torch.are_deterministic_algorithms_enabled(), how, torch.backends.cuda.preferred_blas_library()
