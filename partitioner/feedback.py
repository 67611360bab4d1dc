"""What `splitnet bench` measured goes back into what the next plan is made of. Pure.

- Operators: those of a stage are multiplied by measured / profiled of that stage, on its node; the node's other operators by measured /
  profiled of all its stages.
- Links: a link that kept its sender busy for most of the time, with the pipeline full, is as fast as what it carried; any other link is
  at least that fast.
- What latency then still exceeds the prediction by, the client's own way aside, is charged to the ingress for each request.
- What the full pipeline's pace then still differs from the prediction by, where no link is the bottleneck, is charged to computing in a full
  pipeline (`Column.sustained`) on the plan's nodes.
"""

from __future__ import annotations

import dataclasses
import math

from partitioner.bench_report import BenchReport
from partitioner.constants import codec_figures, machines, outside_bytes, overheads
from partitioner.cost import evaluate
from partitioner.profiling import Column, Profile
from splitnet.cluster import Cluster, Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import Plan

__all__ = ["corrected"]

_SATURATED = 0.8  # share of the time that a link's sender spent waiting for it
_SANE = 20.0  # a factor beyond this says that the report is of other hardware
_HALVINGS = 30
_PACE = 4.0  # a full pipeline differs from one request by less than this
_NOTICEABLE_S = 0.01  # and nothing of what takes less than this, on a busy box


def corrected(profile: Profile, cluster: Cluster, report: BenchReport) -> tuple[Profile, Cluster]:
    """Profile and cluster as the report says that they are. Raises BadInput for a report of another model, of nodes that the cluster does
    not have, or of figures that cannot belong to these."""
    if report.model_sha256 != profile.structure.sha256:
        raise BadInput(f"the benchmark is of another model ({report.model})", remedy="make it again with a plan of this model")
    plan = Plan.from_json(report.plan)
    for node in plan.nodes:
        cluster.node(node.name)
    profile = _with_measured_stages(profile, cluster, plan, report)
    cluster = dataclasses.replace(cluster, links=tuple(_measured_link(link, plan, report) for link in cluster.links))
    cluster = _with_the_rest(cluster, profile, plan, report)
    return _at_its_pace(profile, cluster, plan, report), cluster


def _with_measured_stages(profile: Profile, cluster: Cluster, plan: Plan, report: BenchReport) -> Profile:
    columns = {name: profile.columns[name] for name in profile.columns} | {node.name: profile.on(node) for node in cluster.nodes}
    place = {vertex.name: i for i, vertex in enumerate(profile.structure.vertices)}
    for node in {stage.node for stage in plan.stages}:
        seconds = list(columns[node].seconds)
        factors: dict[int, float] = {}
        expected = measured = 0.0
        for stage, seen in zip(plan.stages, report.stages_alone, strict=True):
            if stage.node != node:
                continue
            own = [place[name] for name in stage.operators]
            before = math.fsum(seconds[i] for i in own)
            expected, measured = expected + before, measured + seen.compute_s
            factors |= dict.fromkeys(own, _factor(seen.compute_s, before, f"stage {stage.name!r} on node {node!r}"))
        other = _factor(measured, expected, f"node {node!r}")
        corrected_s = tuple(s * factors.get(i, other) for i, s in enumerate(seconds))
        columns[node] = Column(corrected_s, f"{columns[node].how}; corrected {other:.3g}x by a benchmark", columns[node].sustained)
    return dataclasses.replace(profile, columns=columns)


def _factor(measured_s: float, profiled_s: float, what: str) -> float:
    if not profiled_s or not measured_s:
        return 1.0
    factor = measured_s / profiled_s
    if not 1 / _SANE < factor < _SANE and max(measured_s, profiled_s) > _NOTICEABLE_S:
        raise BadInput(
            f"{what} took {factor:.3g} times what was profiled: the benchmark is not of these nodes",
            remedy="probe, profile and bench again",
        )
    return factor


def _measured_link(link: Link, plan: Plan, report: BenchReport) -> Link:
    carried = report.bytes_per_link.get(f"{link.source}->{link.target}", 0) * report.throughput_per_s
    if not carried:
        return link
    targets = {t for t in {stage.node for stage in plan.stages} if t != link.source and f"{link.source}->{t}" in report.bytes_per_link}
    busy = sum(stage.send_s for stage in report.stages if stage.node == link.source) * report.throughput_per_s
    saturated = busy > _SATURATED and len(targets) == 1  # else it is not known which link it waited for
    return dataclasses.replace(link, bandwidth_bytes_per_s=carried if saturated else max(carried, link.bandwidth_bytes_per_s))


def _with_the_rest(cluster: Cluster, profile: Profile, plan: Plan, report: BenchReport) -> Cluster:
    place = {vertex.name: i for i, vertex in enumerate(profile.structure.vertices)}
    stages = [
        dataclasses.replace(stage, seconds=math.fsum(profile.columns[stage.node].seconds[place[name]] for name in stage.operators))
        for stage in plan.stages
    ]
    used = [cluster.node(node.name) for node in plan.nodes]
    links = {(link.source, link.target): link for link in cluster.links}
    try:
        cost = evaluate(stages, plan.transfers, links, codec_figures(used), overheads(used))
    except NoPlan:
        return cluster  # a link that the plan used is gone from the cluster
    rest = report.latency_p50_s - report.client_s - cost.latency_s
    ingress = plan.ingress.name
    nodes = [dataclasses.replace(n, request_s=max(n.request_s + rest, 0.0)) if n.name == ingress else n for n in cluster.nodes]
    return dataclasses.replace(cluster, nodes=tuple(nodes))


def _at_its_pace(profile: Profile, cluster: Cluster, plan: Plan, report: BenchReport) -> Profile:
    used, shared = [cluster.node(node.name) for node in plan.nodes], machines(cluster)
    place = {vertex.name: i for i, vertex in enumerate(profile.structure.vertices)}
    links = {(link.source, link.target): link for link in cluster.links}
    spent = overheads(used, "throughput", shared, outside_bytes(plan.transfers))
    codecs = codec_figures(used, "throughput", shared)

    def pace(factor: float) -> tuple[float, str]:
        stages = [
            dataclasses.replace(
                stage, seconds=column.sustained * factor * math.fsum(column.seconds[place[name]] for name in stage.operators)
            )
            for stage in plan.stages
            if (column := profile.columns[stage.node])
        ]
        cost = evaluate(stages, plan.transfers, links, codecs, spent, machines=shared)
        return cost.bottleneck_s, cost.bottleneck

    try:
        if pace(1.0)[1].startswith("link "):
            return profile
    except NoPlan:
        return profile  # a link that the plan used is gone from the cluster
    low, high = 1 / _PACE, _PACE
    for _ in range(_HALVINGS):  # the pace does not fall as computing takes longer
        factor = math.sqrt(low * high)
        low, high = (factor, high) if pace(factor)[0] < 1 / report.throughput_per_s else (low, factor)
    columns = {
        name: dataclasses.replace(column, sustained=column.sustained * low) if name in {n.name for n in plan.nodes} else column
        for name, column in profile.columns.items()
    }
    return dataclasses.replace(profile, columns=columns)
