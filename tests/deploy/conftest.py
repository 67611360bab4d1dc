"""Real nodes, and a model for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from chain_model import MakeChain, write_chain

from nodes.testing import LocalCluster


@pytest.fixture
def make_chain(tmp_path: Path) -> MakeChain:
    return partial(write_chain, tmp_path)


@pytest.fixture
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(3) as cluster:
        yield cluster
