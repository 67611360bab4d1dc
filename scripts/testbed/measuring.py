"""A model on a running testbed: profile it on the nodes, deploy plans, and measure what each does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import partitioner
import splitnet
from partitioner.bandwidth import probe
from partitioner.benching import BenchReport
from partitioner.profiling import Column, Profile
from partitioner.profiling_nodes import Options
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text
from splitnet.plan import Plan
from testbed.bed import Testbed

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Outcome", "Subject", "probed"]

_FEWEST, _MOST = 5, 60  # requests of a round
_ROUNDS = 3  # a box in a data centre computes now a quarter faster and now slower, for seconds or minutes on end


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
    def measure(cls, bed: Testbed, model: ModelGraph, cluster: Cluster, budget_s: float = 5.0, repeats: int = 10) -> Subject:
        """`budget_s` for each kind of node; `repeats` on this machine."""
        with bed.free_for_clients():
            return cls(bed, model, partitioner.profile(model, cluster=cluster, options=Options(budget_s=budget_s), repeats=repeats))

    def measured_again(self, cluster: Cluster, budget_s: float) -> Profile:
        """As `measure`, now."""
        return Subject.measure(self.bed, self.model, cluster, budget_s, 1).profile

    def with_median(self, profiles: Sequence[Profile]) -> Subject:
        """Operator by operator, and the pace of a full pipeline likewise: the speed of a shared box drifts."""

        def column(name: str) -> Column:
            several = [profile.columns[name] for profile in profiles]
            seconds = tuple(statistics.median(each) for each in zip(*(c.seconds for c in several), strict=True))
            busy_s = statistics.median(c.sustained * math.fsum(c.seconds) for c in several)
            return Column(seconds, f"{several[0].how}; median of {len(several)} times", busy_s / math.fsum(seconds))

        columns = {name: column(name) for name in profiles[0].columns}
        return dataclasses.replace(self, profile=dataclasses.replace(profiles[0], columns=columns))

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

    def outcomes(self, cluster: Cluster, plans: Sequence[Plan], *, budget_s: float = 4.0, profile_s: float = 4.0) -> list[Outcome]:
        """Serves the plans, which were made by `cut_at` or `alone`, and measures each in three rounds: for about `budget_s` with requests one by
        one, and again with many at once. The model is profiled again after each round (`profile_s` for each kind of node), nothing of ours being
        served then: speed that drifts drifts for both. Predictions are made from the medians of the profiles, and compared with those of the rounds."""
        profiles, reports = [self.profile], [list[BenchReport]() for _ in plans]
        with contextlib.ExitStack() as stack:
            served = [stack.enter_context(self.deployed(plan, f"testbed-{k}")) for k, plan in enumerate(plans)]
            for _ in range(_ROUNDS):
                for k, plan in enumerate(served):
                    reports[k].append(partitioner.bench(plan, deployment=f"testbed-{k}", requests=_requests(plan, budget_s)))
                profiles.append(self.measured_again(cluster, profile_s))
        whole = self.with_median(profiles)
        return [_outcome(whole.again(cluster, plan), found) for plan, found in zip(served, reports, strict=True)]

    def again(self, cluster: Cluster, plan: Plan) -> Plan:
        """The same stages, nodes and codecs, predicted from this profile."""
        nodes = [stage.node for stage in plan.stages]
        only = dataclasses.replace(cluster, nodes=(cluster.node(nodes[0]),), links=()) if len(nodes) == 1 else cluster
        place = {stage.name: stage.node for stage in plan.stages}
        codecs: dict[tuple[str, str], list[str]] = {}
        for t in plan.transfers:
            if t.source in place and t.target in place and place[t.source] != place[t.target]:
                codecs.setdefault((place[t.source], place[t.target]), []).append(t.codec)
        cuts = [stage.operators[0] for stage in plan.stages[1:]]
        if cuts:
            found = partitioner.plan(self.profile, only, objective="throughput", at=cuts, nodes=nodes, link_codecs=codecs)
        else:
            found = partitioner.plan(self.profile, only, stages=1)
        assert [(s.node, s.operators) for s in found.stages] == [(s.node, s.operators) for s in plan.stages], "cut elsewhere"
        return found

    def outcome(
        self, plan: Plan, *, extra_latency_s: float | None = None, extra_bottleneck_s: float = 0.0, budget_s: float = 4.0
    ) -> Outcome:
        """Serves the plan and measures it, for about `budget_s` with requests one by one, and again with many at once. `extra...`: what the
        client's own way to the ingress adds to the prediction (default: what `bench` finds)."""
        with self.deployed(plan) as served:
            report = partitioner.bench(served, deployment="testbed", requests=_requests(served, budget_s))
        return _outcome(served, [report], extra_latency_s, extra_bottleneck_s)


def _requests(plan: Plan, budget_s: float) -> int:
    assert plan.prediction is not None
    each_s = max(plan.prediction.latency_s, 1 / plan.prediction.throughput_per_s)
    return min(max(math.ceil(budget_s / each_s), _FEWEST), _MOST)


def _outcome(plan: Plan, reports: Sequence[BenchReport], extra_latency_s: float | None = None, extra_bottleneck_s: float = 0.0) -> Outcome:
    assert plan.prediction is not None
    report = sorted(reports, key=lambda r: r.throughput_per_s)[len(reports) // 2]
    extra_s = statistics.median(r.client_s for r in reports) if extra_latency_s is None else extra_latency_s
    return Outcome(
        plan,
        report,
        plan.prediction.latency_s + extra_s,
        statistics.median(r.latency_p50_s for r in reports),
        min(plan.prediction.throughput_per_s, 1 / extra_bottleneck_s if extra_bottleneck_s else math.inf),
        report.throughput_per_s,
    )
