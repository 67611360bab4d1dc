"""What nodes say of themselves while they serve, as a profile and a cluster to plan with. Pure: statuses come in, the caller reads the clock.

- Links: the goodput that the sending node measured, where it has sent something since the last look; what a probe measured; else what is known from
  before, at last the cluster file's figures. A short message on an idle link does not lower a goodput (see `nodes.goodput`).
- Nodes: how much longer its stages took than was profiled, compared with the other nodes. Clients that send larger batches make all stages longer, and
  transfers larger in the same measure: by that measure stage times are divided.
- A node that does not answer, or is draining, is not there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from partitioner.constants import Goal, codec_figures, machines, outside_bytes, overheads
from partitioner.cost import CodecFigures, evaluate
from partitioner.profiling import Profile
from partitioner.structure import Structure
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadCluster, NoPlan
from splitnet.node_status import NodeStatus
from splitnet.plan import CLIENT, CodecOption, Plan, StageSpec

__all__ = ["Measured", "Observer", "identity", "price"]

_LEAST_BYTES = 16 << 10  # between two looks, for a goodput to count as new
_LEAST_RUNS = 4  # of a stage, between two looks
_NOTICEABLE = 1.3  # a node that differs by less from what the plan says is as the plan says
_SANE = 50.0
_LEARNING = 0.5
_WORSE = 1.5  # a link that is so much slower than the cluster file says is probed again when nothing else tells


@dataclass(frozen=True, slots=True)
class _Seen:
    bytes_per_s: float
    at_s: float
    latency_s: float | None = None  # of a probe


class Measured(Protocol):
    """What a plan is made from: `Profile`, or a decoder model's."""

    @property
    def structure(self) -> Structure: ...

    def stage_s(self, node: ClusterNode, plan: Plan, stage: StageSpec) -> float: ...

    def slowed(self, nodes: Sequence[ClusterNode], factors: Mapping[str, float]) -> Self: ...


P = TypeVar("P", bound=Measured)


class Observer(Generic[P]):
    """Looks at the nodes of one cluster again and again."""

    def __init__(self, cluster: Cluster, profile: P) -> None:
        self._cluster = cluster
        self._profile = profile
        self._links: dict[tuple[str, str], _Seen] = {}
        self._sent: dict[tuple[str, str], tuple[int, int]] = {}
        self._runs: dict[tuple[str, str, int], tuple[int, float]] = {}
        self._factors: dict[str, float] = {}
        self._missing: dict[str, str] = {}

    @property
    def missing(self) -> Mapping[str, str]:
        """Nodes that cannot be planned with, and why."""
        return self._missing

    def look(self, statuses: Sequence[NodeStatus], name: str, plan: Plan, now_s: float) -> None:
        """`statuses` of all the cluster's nodes; `plan` is the one that serves under `name`."""
        self._missing = {s.name: s.error or "it is being stopped" for s in statuses if s.error or s.draining}
        raw_bytes = 0
        for status in statuses:
            for link in status.links:
                pair = (status.name, link.target)
                sent, raw = self._sent.get(pair, (link.sent_bytes, link.raw_bytes))
                self._sent[pair] = link.sent_bytes, link.raw_bytes
                raw_bytes += max(link.raw_bytes - raw, 0)
                if link.connected and link.goodput_bytes_per_s > 0 and link.sent_bytes - sent >= _LEAST_BYTES:
                    self._links[pair] = _Seen(link.goodput_bytes_per_s, now_s)
        self._look_at_stages(statuses, name, plan, raw_bytes)

    def probed(self, source: str, target: str, bytes_per_s: float, latency_s: float, now_s: float) -> None:
        self._links[source, target] = _Seen(bytes_per_s, now_s, latency_s)

    def doubtful(self, now_s: float, old_s: float, plan: Plan | None = None) -> list[tuple[str, str]]:
        """Links to be probed: with a `plan` those that it needs, and of which nothing newer than `old_s` is known; else those that were
        last seen slower than the cluster file says, so long ago."""
        if plan is not None:
            node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.ingress.name}
            pairs = {(node[t.source], node[t.target]) for t in plan.transfers if node[t.source] != node[t.target] and t.bytes}
        else:
            pairs = {
                pair
                for pair, seen in self._links.items()
                if (link := self._cluster.link(*pair)) is not None and seen.bytes_per_s * _WORSE < link.bandwidth_bytes_per_s
            }
        known = {pair for pair, seen in self._links.items() if now_s - seen.at_s <= old_s}
        return sorted(pair for pair in pairs - known if not {*pair} & set(self._missing))

    def cluster(self) -> Cluster:
        """The nodes that are there, and the links as they were last seen. Raises BadCluster where no node is left."""
        there = tuple(node for node in self._cluster.nodes if node.name not in self._missing)
        if not there:
            raise BadCluster("no node answers", remedy="start `splitnet node` on them")
        names = {node.name for node in there}
        links = tuple(self._link(link) for link in self._cluster.links if {link.source, link.target} <= names)
        return dataclasses.replace(self._cluster, nodes=there, links=links)

    def profile(self) -> P:
        """With the times of nodes that turned out to be faster or slower."""
        noticed = {name: factor for name, factor in self._factors.items() if max(factor, 1 / factor) >= _NOTICEABLE}
        return self._profile.slowed(self._cluster.nodes, noticed)

    def changed(self) -> list[str]:
        """For people: what is otherwise than the files say."""
        notes = [f"node {name}: {why}" for name, why in self._missing.items()]
        for (a, b), seen in sorted(self._links.items()):
            link = self._cluster.link(a, b)
            if link is not None and not 1 / _WORSE < seen.bytes_per_s / link.bandwidth_bytes_per_s < _WORSE:
                notes.append(f"{a}->{b}: {seen.bytes_per_s / 1e6:.3g} MB/s")
        notes += [f"node {name}: {f:.2g}x the time" for name, f in sorted(self._factors.items()) if max(f, 1 / f) >= _NOTICEABLE]
        return notes

    def _link(self, link: Link) -> Link:
        seen = self._links.get((link.source, link.target))
        if seen is None:
            return link
        latency_s = link.latency_s if seen.latency_s is None else seen.latency_s
        return dataclasses.replace(link, bandwidth_bytes_per_s=seen.bytes_per_s, latency_s=latency_s)

    def _look_at_stages(self, statuses: Sequence[NodeStatus], name: str, plan: Plan, raw_bytes: int) -> None:
        taken: dict[str, list[tuple[float, float]]] = {}
        requests = 0
        for status in statuses:
            held = next((d for d in status.generations(name) if d.plan_sha256 == plan.sha256), None)
            for stage in held.stages if held is not None else ():
                profiled_s = self._profile.stage_s(self._cluster.node(status.name), plan, plan.stage(stage.name))
                key = (status.name, stage.name, held.generation if held is not None else 0)
                before = self._runs.get(key, (stage.requests, stage.compute_s))
                self._runs[key] = stage.requests, stage.compute_s
                runs, spent_s = stage.requests - before[0], stage.compute_s - before[1]
                if runs >= _LEAST_RUNS and profiled_s > 0:
                    taken.setdefault(status.name, []).append((profiled_s, spent_s / runs))
                    requests = max(requests, runs)
        if not taken:
            return
        ratios = {node: sum(s for _, s in pairs) / sum(p for p, _ in pairs) for node, pairs in taken.items()}
        scale = _size_factor(plan, raw_bytes, requests) or (sorted(ratios.values())[(len(ratios) - 1) // 2])
        for node, ratio in ratios.items():
            factor = min(max(ratio / scale, 1 / _SANE), _SANE)
            self._factors[node] = self._factors.get(node, factor) ** (1 - _LEARNING) * factor**_LEARNING


def _size_factor(plan: Plan, raw_bytes: int, requests: int) -> float:
    """How many times larger the clients' requests are than those that the plan was made for, by what went over links; 0: not known, nor where text is
    generated: passes are of every size."""
    if plan.generation is not None:
        return 0.0
    node = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.ingress.name}
    planned = sum(t.bytes for t in plan.transfers if node[t.source] != node[t.target])
    return raw_bytes / (planned * requests) if planned and requests and raw_bytes else 0.0


def identity(plan: Plan) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What makes a plan another plan: where it is cut, and which node runs what. Codecs change without one."""
    return tuple((stage.node, stage.operators) for stage in plan.stages)


def price(plan: Plan, profile: Profile, cluster: Cluster) -> float:
    """The objective's seconds of a plan on this cluster, each transfer with the best of its codecs. Infinite where it cannot serve there."""
    names = {node.name for node in cluster.nodes}
    if not {stage.node for stage in plan.stages} <= names:
        return math.inf
    goal: Goal = "throughput" if plan.objective == "throughput" else "latency"
    used = [cluster.node(node.name) for node in plan.nodes if node.name in names]
    shared = machines(cluster)
    place = {vertex.name: i for i, vertex in enumerate(profile.structure.vertices)}
    columns = {node.name: profile.on(node) for node in used}
    stages = [
        dataclasses.replace(
            stage,
            seconds=math.fsum(columns[stage.node].seconds[place[operator]] for operator in stage.operators)
            * (columns[stage.node].sustained if goal == "throughput" else 1.0),
        )
        for stage in plan.stages
    ]
    links = {(link.source, link.target): link for link in cluster.links}
    spent = overheads(used, goal, shared, outside_bytes(plan.transfers))
    figures = codec_figures(used, goal, shared)
    options = [_options(i, t.codec, t.codecs, figures) for i, t in enumerate(plan.transfers)]
    known = {name: figure for option in options for name, figure in option.items()}
    chosen = [next(iter(option)) for option in options]

    def cost_s() -> float:
        transfers = [dataclasses.replace(t, codec=codec) for t, codec in zip(plan.transfers, chosen, strict=True)]
        cost = evaluate(stages, transfers, links, known, spent, machines=shared if goal == "throughput" else ())
        return cost.latency_s if goal == "latency" else cost.bottleneck_s

    try:
        best_s = cost_s()
        for i in sorted(range(len(options)), key=lambda i: -plan.transfers[i].bytes):
            for name in options[i]:
                before, chosen[i] = chosen[i], name
                if (now_s := cost_s()) < best_s:
                    best_s = now_s
                else:
                    chosen[i] = before
    except NoPlan:  # a link that it needs is not there
        return math.inf
    return best_s


def _options(place: int, codec: str, options: Sequence[CodecOption], figures: Mapping[str, CodecFigures]) -> dict[str, CodecFigures]:
    """A transfer's codecs under names of its own, its present one first: what each makes of it stands in the plan."""
    found = {f"{o.name}#{place}": CodecFigures(o.ratio, o.encode_bytes_per_s, o.decode_bytes_per_s) for o in options}
    present = f"{codec}#{place}"
    if present not in found:
        found[present] = figures.get(codec, CodecFigures())
    return {present: found[present], **found}
