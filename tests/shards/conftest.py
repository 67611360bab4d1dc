"""A small valid shard, and ways to make another of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.shard import Shard, write_shard
from splitnet.tensors import TensorSpec

GRAPH = GraphDocument(
    inputs=(Input("x", "tensor"),),
    weights={"w": WeightSpec("float32", (3, 4), (0, 1))},
    operators=(Operator("aten.linear.default", (Ref("x"), Weight("w")), {}, "y"),),
    outputs=("y",),
)


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Shard]:
    """Writes a shard; keywords replace what `write_shard` is given."""

    def make(name: str = "shard", **changes: Any) -> Shard:
        arguments: dict[str, Any] = {
            "model": "m",
            "model_sha256": "0" * 64,
            "stage": "stage0",
            "engine": "torch-graph",
            "inputs": [TensorSpec("x", "float32", ("batch", 4))],
            "outputs": [TensorSpec("y", "float32", ("batch", 3))],
            "members": {
                "graph.json": GRAPH.to_bytes(),
                "weights.safetensors": save({"w": np.arange(12, dtype=np.float32).reshape(3, 4)}),
            },
            "param_bytes": 48,
            "activation_bytes": 28,
        }
        return write_shard(tmp_path / name, **(arguments | changes))

    return make


@pytest.fixture
def shard(make_shard: Callable[..., Shard]) -> Shard:
    return make_shard()
