"""Predicted beside measured on this machine, without shaped links: a tiny MLP, a CNN, a ViT and a BERT, on one node and on two.

    python scripts/bench/truth.py [--models mlp,cnn,vit,bert] [--rounds 3] [--requests 30]

Each round profiles on the nodes, predicts, and serves, so that what disturbs the machine for a while disturbs both; the ratio measured /
predicted is the median over rounds. Nodes are processes of one thread each; with the client they share this machine's cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from testbed.models import bert, cnn, vit

import partitioner
from nodes.testing import LocalCluster
from partitioner.bandwidth import probe
from partitioner.profiling_nodes import Options
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text, table
from splitnet.plan import Plan


def mlp() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Six layers, 256 wide: less computing than messages cost."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers).eval(), {"input": torch.randn(8, 256)}


MODELS = {"mlp": mlp, "cnn": cnn, "vit": vit, "bert": bert}


def plans(model: Any, profile: Any, cluster: Cluster) -> list[Plan]:
    """On one node, and in two halves."""
    vertices = profile.structure.vertices
    seconds = profile.columns[cluster.nodes[0].name].seconds
    elapsed, middle = 0.0, ""
    for vertex, took in zip(vertices, seconds, strict=True):
        elapsed += took
        if elapsed >= sum(seconds) / 2 and not vertex.cheap:
            middle = vertex.name
            break
    names = [node.name for node in cluster.nodes]
    only = Cluster((cluster.nodes[0],))
    return [partitioner.plan(profile, only), partitioner.plan(profile, cluster, at=[middle], nodes=names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("model", "nodes", "compute", "latency predicted", "measured", "ratio", "batches/s predicted", "measured", "ratio", "stages")]
    errors: list[float] = []
    with LocalCluster(2, processes=True) as boxes:
        for name in arguments.models.split(","):
            module, inputs = MODELS[name]()
            model = partitioner.capture(module, inputs, name=name)
            found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
            for _ in range(arguments.rounds):
                cluster = probe(list(boxes.addresses.values()), budget_s=1.0)
                profile = partitioner.profile(model, repeats=1, cluster=cluster, options=Options(budget_s=2.0))
                for plan in plans(model, profile, cluster):
                    with tempfile.TemporaryDirectory() as folder:
                        shards = partitioner.cut(model, plan, folder)
                        plan = plan.with_shards({s: shard.sha256 for s, shard in shards.items()})
                        report = partitioner.bench(plan, shards=shards, requests=arguments.requests, deployment="truth")
                    assert plan.prediction is not None
                    found[len(plan.stages)].append(
                        {
                            "compute": statistics.mean(s.compute_s / s.predicted_s for s in report.stages_alone),
                            "latency": (plan.prediction.latency_s + report.client_s, report.latency_p50_s),
                            "rate": (plan.prediction.throughput_per_s, report.throughput_per_s),
                            "stages": "; ".join(
                                f"{s.stage} {seconds_text(s.predicted_s)}->{seconds_text(s.compute_s)}" for s in report.stages_alone
                            ),
                        }
                    )
            for count, rounds in found.items():
                latency = statistics.median(seen / expected for expected, seen in (r["latency"] for r in rounds))
                rate = statistics.median(seen / expected for expected, seen in (r["rate"] for r in rounds))
                errors += [abs(1 / latency - 1), abs(1 / rate - 1)]
                last = rounds[-1]
                rows.append(
                    (
                        name, str(count), f"{statistics.median(r['compute'] for r in rounds):.2f}",
                        *map(seconds_text, last["latency"]), f"{latency:.2f}", *(f"{r:.4g}" for r in last["rate"]), f"{rate:.2f}", last["stages"],
                    )
                )  # fmt: skip
                print(*rows[-1], sep="  ", flush=True)
    print("\n" + "\n".join(table(rows)))
    print(
        f"\nmean error {statistics.mean(errors):.1%} (ratios are medians of {arguments.rounds} rounds; the figures beside are the last round's)"
    )


if __name__ == "__main__":
    main()
