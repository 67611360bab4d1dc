"""A model on a running testbed: profile it on the nodes, deploy plans, and measure what each does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import partitioner
import splitnet
from partitioner.bandwidth import probe
from partitioner.benching import BenchReport
from partitioner.profiling import Profile
from partitioner.profiling_nodes import Options
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text
from splitnet.plan import Plan
from testbed.bed import Testbed

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Outcome", "Subject", "probed"]

_FEWEST, _MOST = 5, 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predicted beside measured, seconds and batches per second."""

    plan: Plan
    report: BenchReport
    predicted_latency_s: float
    latency_s: float
    predicted_per_s: float
    per_s: float

    @property
    def latency_error(self) -> float:
        """Of the prediction, as a share of what was measured; positive: predicted too much."""
        return self.predicted_latency_s / self.latency_s - 1

    @property
    def throughput_error(self) -> float:
        return self.predicted_per_s / self.per_s - 1

    def lines(self, title: str) -> list[str]:
        """For people: the errors, and each stage's times beside what was predicted of it."""
        plan = "  ".join(f"{s.node}: {seconds_text(s.predicted_s)} -> {seconds_text(s.compute_s)}" for s in self.report.stages)
        rates = f"{self.predicted_per_s:.3g} -> {self.per_s:.3g}/s ({self.throughput_error:+.1%})"
        latency = f"{seconds_text(self.predicted_latency_s)} -> {seconds_text(self.latency_s)} ({self.latency_error:+.1%})"
        return [f"  {title}: latency {latency}, throughput {rates}; computing {plan}"]

    def figures(self) -> dict[str, Any]:
        """For programs."""
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.report.stages],
            "bytes_per_link": dict(self.report.bytes_per_link),
            "predicted_latency_s": self.predicted_latency_s,
            "latency_s": self.latency_s,
            "predicted_per_s": self.predicted_per_s,
            "per_s": self.per_s,
        }


def probed(bed: Testbed, budget_s: float = 1.0) -> Cluster:
    """The cluster as the nodes measure it."""
    return probe([bed.addresses[name] for name in bed.spec.names], budget_s=budget_s)


@dataclass(frozen=True)
class Subject:
    """A model, measured on the nodes of a testbed."""

    bed: Testbed
    model: ModelGraph
    profile: Profile

    @classmethod
    def measure(cls, bed: Testbed, model: ModelGraph, cluster: Cluster, budget_s: float = 5.0) -> Subject:
        """`budget_s` for each kind of node."""
        with bed.free_for_clients():
            return cls(bed, model, partitioner.profile(model, cluster=cluster, options=Options(budget_s=budget_s)))

    def alone(self, cluster: Cluster, node: str) -> Plan:
        """The plan that runs everything on one node."""
        only = dataclasses.replace(cluster, nodes=(cluster.node(node),), links=())
        return partitioner.plan(self.profile, only, stages=1)

    def cut_at(self, cluster: Cluster, cuts: Sequence[str], nodes: Sequence[str]) -> Plan:
        """The plan with these cuts, on these nodes in order."""
        return partitioner.plan(self.profile, cluster, objective="throughput", at=list(cuts), nodes=list(nodes))

    @contextlib.contextmanager
    def deployed(self, plan: Plan, name: str = "testbed", *, fixed: bool = True) -> Iterator[Plan]:
        """Cut, shipped over unshaped links and activated; gone after the block. `fixed`: each transfer keeps its codec."""
        with tempfile.TemporaryDirectory(prefix="splitnet-testbed-") as folder, self.bed.free_for_clients():
            shards = partitioner.cut(self.model, plan, Path(folder))
            plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
            plan = plan.with_fixed_codecs() if fixed else plan  # what was predicted
            splitnet.deploy(plan, shards, name=name)
        try:
            yield plan
        finally:
            splitnet.undeploy(plan, name)

    def outcome(
        self, plan: Plan, *, extra_latency_s: float | None = None, extra_bottleneck_s: float = 0.0, budget_s: float = 4.0
    ) -> Outcome:
        """Serves the plan and measures it, for about `budget_s` with requests one by one, and again with many at once. `extra...`: what the
        client's own way to the ingress adds to the prediction (default: what `bench` finds)."""
        assert plan.prediction is not None
        latency_s = plan.prediction.latency_s + (extra_latency_s or 0.0)
        bottleneck_s = max(1 / plan.prediction.throughput_per_s, extra_bottleneck_s)
        requests = min(max(math.ceil(budget_s / max(latency_s, bottleneck_s)), _FEWEST), _MOST)
        with self.deployed(plan) as served:
            report = partitioner.bench(served, deployment="testbed", requests=requests)
        return Outcome(
            served,
            report,
            latency_s + report.client_s if extra_latency_s is None else latency_s,
            report.latency_p50_s,
            1 / bottleneck_s,
            report.throughput_per_s,
        )
