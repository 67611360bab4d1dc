"""The reference kernel."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from splitnet.reference_kernel import measure_reference


def test_the_reference_kernel_takes_its_threads_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    found = measure_reference(1, budget_s=0.1)
    assert found.backend == "torch"
    assert found.repeats >= 3
    assert 1e-4 < found.seconds < 5
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"):
        measure_reference(0)


def test_the_reference_kernel_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without_torch(name: str) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name)

    monkeypatch.setattr("splitnet.reference_kernel.importlib.import_module", without_torch)
    found = measure_reference(1, budget_s=0.1)
    assert found.backend == "numpy"
    assert 1e-4 < found.seconds < 5
