"""A chain of small stages, made by hand: no capture, no planner, no torch in the test itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from splitnet import Cluster, NodeRef, OutputSpec, Plan, Shard, StageSpec, TensorSpec, Transfer
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.shard import write_shard

WIDTH = 64
MakeChain = Callable[..., tuple[Plan, dict[str, Shard]]]


def weight(stage: int, seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, stage]).standard_normal((rows, WIDTH)).astype(np.float32)


def graph(stage: int, rows: int) -> bytes:
    """y = (x w^T) w, so that the weight may be as large as a test likes while x and y stay small."""
    x, y, w = f"v{stage}", f"v{stage + 1}", Weight("w")
    return GraphDocument(
        inputs=(Input(x, "tensor"),),
        weights={"w": WeightSpec("float32", (rows, WIDTH), (0, 1))},
        operators=(Operator("aten.linear.default", (Ref(x), w), {}, "h"), Operator("aten.matmul.default", (Ref("h"), w), {}, y)),
        outputs=(y,),
    ).to_bytes()


def expected(x: np.ndarray, *, stages: int = 3, seed: int = 0, rows: int = 96) -> np.ndarray:
    for i in range(stages):
        x = x @ weight(i, seed, rows).T @ weight(i, seed, rows)
    return x


def write_chain(directory: Path, cluster: Cluster, *, stages: int = 3, seed: int = 0, rows: int = 96) -> tuple[Plan, dict[str, Shard]]:
    """Stages on the cluster's nodes in turn; `seed` makes another model of it, `rows` a larger one."""
    specs = [TensorSpec(f"v{i}", "float32", ("batch", WIDTH)) for i in range(stages + 1)]
    shards = {}
    for i in range(stages):
        members: dict[str, bytes | Path] = {"graph.json": graph(i, rows), "weights.safetensors": save({"w": weight(i, seed, rows)})}
        shards[f"stage{i}"] = write_shard(
            directory / f"model{seed}-{rows}.shards" / f"stage{i}",
            model="hf:someone/Chain Model",
            model_sha256=f"{seed:064x}",
            stage=f"stage{i}",
            engine="torch-graph",
            inputs=specs[i : i + 1],
            outputs=specs[i + 1 : i + 2],
            members=members,
            param_bytes=rows * WIDTH * 4,
            activation_bytes=1000,
        )
    names = [f"stage{i}" for i in range(stages)]
    ends = ["", *names, ""]
    plan = Plan(
        model="hf:someone/Chain Model",
        model_sha256=f"{seed:064x}",
        objective="latency",
        nodes=tuple(NodeRef(node.name, node.address) for node in cluster.nodes),
        stages=tuple(
            StageSpec(name, cluster.nodes[i % len(cluster.nodes)].name, (f"op{i}",), (specs[i],), (specs[i + 1],), rows * WIDTH * 4, 1000)
            for i, name in enumerate(names)
        ),
        transfers=tuple(Transfer(a, b, (f"v{i}",)) for i, (a, b) in enumerate(pairwise(ends))),
        inputs=(specs[0],),
        outputs=(OutputSpec(f"v{stages}", TensorSpec("y", "float32", ("batch", WIDTH))),),
    )
    return plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), shards
