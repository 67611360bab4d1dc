"""`partitioner.plan`: a profile and a cluster in, the best plan out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partitioner.cost import BUFFERED_REQUESTS, Cost, evaluate
from partitioner.layout import crossing_bytes, lay_out
from partitioner.profiling import Profile
from partitioner.solvers.bound import Fastest, bottleneck_bound, latency_bound
from partitioner.solvers.graphs import check_objective, stage_range
from partitioner.solvers.problem import Candidate, ChainProblem, Floats, Objective, interval_memory
from partitioner.solvers.reading import link_arrays
from partitioner.solvers.select import Realised, Selected, alternatives, select
from partitioner.structure import Structure
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadInput, NoPlan
from splitnet.explain import bytes_text
from splitnet.plan import NodeRef, Plan, Prediction, StageSpec

__all__ = ["plan"]

MAX_POSITIONS = 300  #: cuts that are considered; beyond, the narrowest of each stretch of equal time
_MAX_IN_FLIGHT = 16


def plan(
    profile: Profile,
    cluster: Cluster,
    *,
    objective: str = "latency",
    stages: int | None = None,
    max_stages: int | None = None,
    forbid: Collection[str] = (),
    at: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
) -> Plan:
    """The plan that is predicted to be best for `objective`, "latency" or "throughput".

    One machine alone is always among the candidates. `stages` asks for exactly so many, `max_stages` for at most so many, `forbid` leaves
    nodes out. `at` cuts by hand, before each of these operators (names of vertices, in order), and takes the `nodes` in the given
    order, one more than cuts (default: the cluster's first ones). The profile's times are scaled to each node (see `Profile.on`).

    What is optimised is exact over the model's own order of operators with every live tensor charged at its cut; the best candidates of
    that are laid out and evaluated as they will run. Raises BadInput or BadCluster for what does not exist, NoPlan saying what is missing.
    """
    goal = check_objective(objective)
    for name in (*forbid, *(nodes or ())):
        cluster.node(name)
    if at is not None:
        wanted = [cluster.node(name) for name in (nodes or [n.name for n in cluster.nodes if n.name not in forbid])]
        return _manual(profile, cluster, goal, at, wanted)
    if nodes is not None:
        raise BadInput("`nodes` gives the order of nodes for cuts by hand; it needs `at`")
    usable = [node for node in cluster.nodes if node.name not in forbid]
    if not usable:
        raise NoPlan("every node of the cluster is forbidden", remedy="leave at least one")
    draft = _Draft.make(profile, cluster, usable)
    best = select(draft.problem, goal, draft.realise, draft.links, draft.segment_names, stage_range(len(usable), stages, max_stages))
    return draft.finish(best, goal)


def _manual(profile: Profile, cluster: Cluster, goal: Objective, at: Sequence[str], nodes: Sequence[ClusterNode]) -> Plan:
    """Cuts before the operators `at`, on the first of `nodes`."""
    position = {vertex.name: i for i, vertex in enumerate(profile.structure.vertices)}
    for name in at:
        if name not in position:
            close = [v for v in position if name in v][:3]
            raise BadInput(
                f"no operator {name!r} in the model {profile.structure.name!r}", remedy=f"did you mean {', '.join(close)}?" if close else ""
            )
    cuts = [position[name] for name in at]
    if any(a >= b for a, b in itertools.pairwise([0, *cuts])):
        raise BadInput("cuts must stand in the model's order, each once, and not before its first operator")
    if len(nodes) < len(cuts) + 1:
        raise BadInput(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but there are {len(nodes)} nodes")
    used = list(nodes[: len(cuts) + 1])
    draft = _Draft.make(profile, cluster, used, positions=[0, *cuts, len(position)])
    realised = draft.realise(Candidate(math.nan, tuple(range(len(cuts) + 2)), tuple(range(len(used)))))
    cost = evaluate(realised.stages, realised.transfers, draft.links)
    for node in used:
        need = cost.memory_bytes.get(node.name, 0)
        if node.memory_bytes and need > node.memory_bytes:
            raise NoPlan(
                f"with these cuts node {node.name!r} needs {bytes_text(need)} and has {bytes_text(node.memory_bytes)}: "
                f"{bytes_text(need - node.memory_bytes)} are missing",
                remedy="move the cuts, or raise the node's memory limit",
            )
    return draft.finish(Selected(realised, cost), goal)


@dataclass(frozen=True)
class _Draft:
    """A profile on a cluster, as the chain solver wants it: operators joined into segments between the positions where cuts are
    considered."""

    profile: Profile
    nodes: tuple[ClusterNode, ...]
    links: Mapping[tuple[str, str], Link]
    seconds: Floats  # (M, vertices)
    positions: tuple[int, ...]
    problem: ChainProblem

    @classmethod
    def make(cls, profile: Profile, cluster: Cluster, nodes: Sequence[ClusterNode], positions: Sequence[int] | None = None) -> _Draft:
        structure = profile.structure
        names = tuple(node.name for node in nodes)
        links = {(k.source, k.target): k for k in cluster.links if k.source in names and k.target in names}
        seconds = np.array([profile.on(node).seconds for node in nodes])
        crossing = crossing_bytes(structure)
        chosen = tuple(positions or _positions(structure, crossing, seconds.mean(axis=0)))
        spans = list(itertools.pairwise(chosen))
        cut_bytes = np.array([crossing[i] for i in chosen], dtype=np.float64)
        cut_bytes[0] = cut_bytes[-1] = 0.0
        live = _live_bytes(structure)
        params = [
            [(p, float(structure.param_sizes[p])) for p in dict.fromkeys(p for v in structure.vertices[a:b] for p in v.params)]
            for a, b in spans
        ]
        bandwidth, latency = link_arrays(names, links)
        problem = ChainProblem(
            devices=names,
            seconds=np.array([[row[a:b].sum() for a, b in spans] for row in seconds]),
            memory=interval_memory([max(live[a:b]) for a, b in spans], params, cut_bytes),
            limits=np.array([node.memory_bytes or math.inf for node in nodes], dtype=np.float64),
            cut_bytes=cut_bytes,
            return_bytes=float(sum(structure.value_bytes[v] for v in {o.value for o in structure.outputs})),
            bandwidth=bandwidth,
            latency=latency,
        )
        return cls(profile, tuple(nodes), links, seconds, chosen, problem)

    @property
    def segment_names(self) -> tuple[str, ...]:
        vertices = self.profile.structure.vertices
        return tuple(vertices[a].name for a in self.positions[:-1])

    def realise(self, candidate: Candidate) -> Realised:
        structure = self.profile.structure
        place = {vertex.name: i for i, vertex in enumerate(structure.vertices)}
        assignment = {
            vertex.name: k
            for k, (a, b) in enumerate(itertools.pairwise(candidate.cuts))
            for vertex in structure.vertices[self.positions[a] : self.positions[b]]
        }
        layout = lay_out(structure, assignment)
        names = {stage.index: f"stage{k}" for k, stage in enumerate(layout.stages)}
        stages = tuple(
            StageSpec(
                name=names[stage.index],
                node=self.nodes[candidate.order[stage.index]].name,
                operators=stage.operators,
                inputs=stage.inputs,
                outputs=stage.outputs,
                param_bytes=stage.param_bytes,
                activation_bytes=stage.activation_bytes,
                seconds=math.fsum(self.seconds[candidate.order[stage.index], place[name]] for name in stage.executed),
                **_ends(structure, stage.operators),
            )
            for stage in layout.stages
        )
        return Realised(stages, layout.transfers(names))

    def bound_s(self, objective: Objective, alone: Sequence[float]) -> float:
        """A lower bound over all plans. Only operators that run exactly once count: cheap ones may run anywhere, or not at all."""
        structure = self.profile.structure
        costly = [i for i, v in enumerate(structure.vertices) if not v.cheap and v.op != "input"]
        seconds = self.seconds[:, costly]
        if objective == "throughput":
            return bottleneck_bound(seconds)
        rank = {structure.vertices[i].name: k for k, i in enumerate(costly)}
        uses: dict[int, dict[int, float]] = {}
        for k, i in enumerate(costly):
            for value in structure.vertices[i].inputs:
                if (source := rank.get(structure.producer[value].name)) is not None:
                    carried = uses.setdefault(k, {})
                    carried[source] = carried.get(source, 0.0) + structure.value_bytes[value]
        return latency_bound(seconds, uses, alone, Fastest.of(self.links.values()))

    def finish(self, best: Selected, objective: Objective) -> Plan:
        structure, cost, realised = self.profile.structure, best.cost, best.realised
        alone = alternatives(self.problem, self.realise)
        bound = self.bound_s(objective, [a.latency_s for a in alone if a.fits])
        used = {stage.node for stage in realised.stages}
        return Plan(
            model=structure.name,
            model_sha256=structure.sha256,
            objective=objective,
            nodes=tuple(NodeRef(node.name, node.address) for node in self.nodes if node.name in used),
            stages=realised.stages,
            transfers=realised.transfers,
            inputs=structure.inputs,
            outputs=structure.outputs,
            profile_sha256=self.profile.sha256,
            max_in_flight=self._in_flight(realised, cost),
            prediction=Prediction(
                batch=structure.batch,
                latency_s=cost.latency_s,
                throughput_per_s=cost.throughput_per_s,
                bottleneck=cost.bottleneck,
                bound=min(bound, cost.objective_s(objective)),
                memory_bytes=dict(cost.memory_bytes),
                bytes_per_link={f"{a}->{b}": size for (a, b), size in cost.link_bytes.items()},
                alternatives=alone,
                symbols=dict(structure.symbols),
            ),
        )

    def _in_flight(self, realised: Realised, cost: Cost) -> int:
        """As many requests as the memory that is left can hold the inputs of."""
        home = {stage.name: stage.node for stage in realised.stages}
        received: dict[str, int] = {}
        for transfer in realised.transfers:
            if transfer.target:
                node = home[transfer.target]
                received[node] = received.get(node, 0) + transfer.bytes
        limit = {node.name: node.memory_bytes for node in self.nodes if node.memory_bytes}
        room = [
            BUFFERED_REQUESTS + (limit[node] - cost.memory_bytes[node]) // size for node, size in received.items() if node in limit and size
        ]
        return int(min([_MAX_IN_FLIGHT, *room]))


def _positions(structure: Structure, crossing: Sequence[int], seconds: Floats) -> list[int]:
    """Where cuts are considered: between any two costly operators, at the narrowest place among the cheap ones that stand between them;
    where these are too many, the narrowest of each stretch of equal time."""
    costly = [i for i, v in enumerate(structure.vertices) if not v.cheap and v.op != "input"]
    found = [min(range(a + 1, b + 1), key=lambda i: (crossing[i], i)) for a, b in itertools.pairwise(costly)]
    if len(found) > MAX_POSITIONS:
        elapsed = np.cumsum(seconds)
        stretches: dict[int, list[int]] = {}
        for i in found:
            stretches.setdefault(int(elapsed[i - 1] / max(elapsed[-1], 1e-12) * MAX_POSITIONS), []).append(i)
        found = [min(stretch, key=lambda i: (crossing[i], i)) for stretch in stretches.values()]
    return [0, *found, len(structure.vertices)]


def _ends(structure: Structure, operators: Sequence[str]) -> dict[str, str]:
    """Where a stage begins and ends, for people: by its costly operators."""
    costly = [name for name in operators if not structure.vertex[name].cheap] or list(operators)
    first, last = structure.vertex[costly[0]], structure.vertex[costly[-1]]
    return {"first": first.scope or first.name, "last": last.scope or last.name}


def _live_bytes(structure: Structure) -> list[int]:
    """For each operator: the bytes of all values that are produced by then and used then or later. A stage that runs it holds no more."""
    count = len(structure.vertices)
    last = {value: i for i, vertex in enumerate(structure.vertices) for value in vertex.inputs}
    last |= {output.value: count - 1 for output in structure.outputs}
    change = [0] * (count + 1)
    for i, vertex in enumerate(structure.vertices):
        for spec, size in zip(vertex.values, vertex.value_bytes, strict=True):
            change[i] += size
            change[last.get(spec.name, i) + 1] -= size
    return list(itertools.accumulate(change[:count]))
