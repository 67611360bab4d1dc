from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodes.testing import LocalCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as running:
        yield running
