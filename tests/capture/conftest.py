"""Arithmetic as a node does it: one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _arithmetic() -> Iterator[None]:
    """One thread; and no fused attention layer: torch takes it only where gradients are off, and rounds otherwise in it than the same
    module does with gradients on (see `partitioner.capturing`)."""
    threads, fused = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fused)
