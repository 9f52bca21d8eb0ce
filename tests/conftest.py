"""What all tests share: one hypothesis profile, and how kernels run where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when a kernel is defined whether it will be interpreted, so this comes before any import of one.
# Without a GPU there is no other way to run them; on a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ImportError:
    pass  # The modules that need it skip themselves.
else:
    # A first call compiles or allocates, so one example may take far longer than the next: no deadline.
    settings.register_profile("project", deadline=None, max_examples=20, print_blob=True)
    settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (torch.cuda.is_available() is false)"))
