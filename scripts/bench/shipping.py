"""A model that a second node is to hold, too: over the deployer's slow uplink, and from the node that has it.

    python scripts/bench/shipping.py [--megabytes 16] [--uplink-mbit 20] [--lan-mbit 1000]

Two nodes on one machine behind a relay that shapes their links (scripts/testbed). Seconds of a deployment with the model on node a, then of one that has it on node b: once
taken from a, and once, for comparison, with b asked to take nothing from others. Shards are made up; loading them is part of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import save
from testbed.bed import Testbed
from testbed.shaping import LinkShape
from testbed.spec import CLIENT, BedSpec, NodeSpec

import splitnet
from splitnet import Cluster, NodeRef, OutputSpec, Plan, Shard, StageSpec, TensorSpec, Transfer
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.shard import write_shard

_WIDTH = 256


def shard_of(folder: Path, rows: int, seed: int) -> Shard:
    graph = GraphDocument(
        inputs=(Input("x", "tensor"),),
        weights={"w": WeightSpec("float32", (rows, _WIDTH), (0, 1))},
        operators=(Operator("aten.linear.default", (Ref("x"), Weight("w")), {}, "y"),),
        outputs=("y",),
    )
    weights = np.random.default_rng(seed).standard_normal((rows, _WIDTH)).astype(np.float32)
    x, y = TensorSpec("x", "float32", ("batch", _WIDTH)), TensorSpec("y", "float32", ("batch", rows))
    return write_shard(
        folder, model="bench", model_sha256=f"{seed:064x}", stage="all", engine="torch-graph", inputs=(x,), outputs=(y,),
        members={"graph.json": graph.to_bytes(), "weights.safetensors": save({"w": weights})}, param_bytes=weights.nbytes, activation_bytes=0,
    )  # fmt: skip


def plan_of(cluster: Cluster, node: str, shard: Shard, *, alone: bool) -> Plan:
    """`alone`: of that node only, so that no other is asked."""
    manifest = shard.manifest
    refs = tuple(NodeRef(n.name, n.address) for n in cluster.nodes if n.name == node or not alone)
    return Plan(
        model=manifest.model, model_sha256=manifest.model_sha256, objective="latency", nodes=refs,
        stages=(StageSpec("all", node, ("all",), manifest.inputs, manifest.outputs, manifest.param_bytes, 0),),
        transfers=(Transfer("", "all", ("x",)), Transfer("all", "", ("y",))),
        inputs=manifest.inputs, outputs=(OutputSpec("y", manifest.outputs[0]),),
    ).with_shards({"all": shard.sha256})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--uplink-mbit", type=float, default=20.0)
    parser.add_argument("--lan-mbit", type=float, default=1000.0)
    arguments = parser.parse_args()
    up, lan = (LinkShape(mbit * 125_000, latency_s=0.001) for mbit in (arguments.uplink_mbit, arguments.lan_mbit))
    names = ("a", "b")
    links = {(CLIENT, name): up for name in names} | {(name, CLIENT): up for name in names}
    spec = BedSpec(tuple(NodeSpec(name) for name in names), links=links, default=lan)
    rows = arguments.megabytes * 1_000_000 // (4 * _WIDTH)
    with Testbed(spec) as bed, tempfile.TemporaryDirectory() as folder:
        cluster = bed.cluster()
        for node in names:  # its engine's first load imports torch
            small = shard_of(Path(folder) / "small", 16, 0)
            splitnet.deploy(plan_of(cluster, node, small, alone=True), {"all": small}, name=f"small-{node}")
        for seed, way in ((1, "from the node that has it"), (2, "from the deployer again")):
            shard = shard_of(Path(folder) / str(seed), rows, seed)
            for node, alone in (("a", True), ("b", seed == 2)):
                started = time.perf_counter()
                done = splitnet.deploy(plan_of(cluster, node, shard, alone=alone), {"all": shard}, name=f"m{seed}{node}")
                said = {
                    "way": "first" if node == "a" else way, "node": node, "seconds": round(time.perf_counter() - started, 2),
                    "sent_bytes": done.sent_bytes[node], "taken_bytes": done.taken_bytes[node],
                }  # fmt: skip
                print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
