"""The demo's model in its tiny form, trained once for this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from partitioner.demo.llm.training import TINY, Progress, trained_model


@pytest.fixture(scope="session")
def told() -> list[Progress]:
    """What the training said."""
    return []


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, told: list[Progress]) -> Path:
    return trained_model(TINY, tmp_path_factory.mktemp("models"), told.append)
