from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import Chain, Diamond, Split, captured, split

import splitnet
from nodes.testing import LocalCluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def diamond(nodes: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Two inputs, two outputs, branches on two nodes; deployed as "diamond"."""
    model = captured(Diamond(), torch.randn(2, 16), torch.randn(2, 16))
    left = ("linear", "relu")
    stages = [("a", lambda name: name in left), ("b", lambda name: name in ("linear_1", "tanh")), ("c", lambda name: True)]
    made = split(model, nodes.cluster(), tmp_path_factory.mktemp("diamond"), stages, codec="zstd")
    splitnet.deploy(made.plan, made.shards, name="diamond")
    return made


@pytest.fixture(scope="module")
def chain(nodes: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """One input, one output, three stages, at most 3 in flight; deployed as "chain"."""
    model = captured(Chain(), torch.randn(2, 16))
    stages = [("a", lambda name: name in ("linear", "relu")), ("b", lambda name: name in ("linear_1", "relu_1")), ("c", lambda name: True)]
    made = split(model, nodes.cluster(), tmp_path_factory.mktemp("chain"), stages, max_in_flight=3)
    splitnet.deploy(made.plan, made.shards, name="chain")
    return made
