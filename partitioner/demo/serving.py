"""One model served twice, split over the nodes and whole on the first, and what is measured of both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import partitioner
import splitnet
from splitnet.cluster import Cluster
from splitnet.plan import Plan

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Batches", "Measured", "Served", "compare", "only", "serve"]

Batches = Sequence[dict[str, np.ndarray]]
_LATENCY_RUNS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """Latency of one batch alone (median), batches per second with the pipeline kept full, payload bytes that left each node."""

    latency_s: float
    batches_per_s: float
    sent_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Served:
    """A plan that is deployed under a name."""

    name: str
    plan: Plan

    def unload(self) -> None:
        splitnet.undeploy(self.plan, self.name)


def serve(model: ModelGraph, cluster: Cluster, *, name: str, stages: int, folder: Path, profile: partitioner.Profile) -> Served:
    """Plans the model over the cluster in that many stages, cuts it, and deploys it."""
    plan = partitioner.plan(profile, cluster, objective="throughput", stages=stages, lossless=True)
    shards = partitioner.cut(model, plan, folder / name)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    splitnet.deploy(plan, shards, name=name)
    return Served(name, plan)


def only(cluster: Cluster, name: str) -> Cluster:
    """The cluster with that node alone."""
    return replace(cluster, nodes=(cluster.node(name),), links=())


def compare(served: Served, batches: Batches, cluster: Cluster) -> tuple[list[dict[str, np.ndarray]], Measured]:
    """The answers to all batches, streamed, and the measurements."""
    with splitnet.Client(served.plan.ingress.address, deployment=served.name) as client:
        answers = list(client.stream(iter(batches)))  # also warms up
        latencies = [_latency_s(client, batches[i % len(batches)]) for i in range(_LATENCY_RUNS)]
        before = _sent(cluster)
        repeated = list(batches) * max(1, 24 // len(batches))
        started = time.perf_counter()
        for _ in client.stream(iter(repeated)):
            pass
        elapsed = time.perf_counter() - started
    sent = {link: (total - before.get(link, 0)) // len(repeated) for link, total in _sent(cluster).items()}
    return answers, Measured(statistics.median(latencies), len(repeated) / elapsed, {k: v for k, v in sent.items() if v})


def _latency_s(client: splitnet.Client, batch: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    client.infer(batch)
    return time.perf_counter() - started


def _sent(cluster: Cluster) -> dict[str, int]:
    return dict(_links(cluster))


def _links(cluster: Cluster) -> Iterator[tuple[str, int]]:
    for node in splitnet.status(cluster):
        for link in node.links:
            yield f"{node.name}->{link.target}", link.sent_bytes
