"""A profile on a cluster: what the solvers need to know of a captured model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partitioner.constants import machines, overheads, paced
from partitioner.cost import CodecFigures, Cost, Machine, Overhead, evaluate
from partitioner.crossing import crossing_bytes
from partitioner.layout import lay_out, lay_out_again
from partitioner.pricing import DraftPrices, measured_codecs
from partitioner.privacy import Privacy
from partitioner.profiling import Profile
from partitioner.solvers.constraints import Constraints, Operator, allowed_operators
from partitioner.solvers.graphs import overhead_arrays, shared
from partitioner.solvers.narrowing import narrowed
from partitioner.solvers.placement import Placement, Realised, Scale
from partitioner.solvers.problem import ChainProblem, Codecs, Floats, Objective, interval_memory
from partitioner.solvers.reading import GraphCosts, Value, codec_arrays, link_arrays
from partitioner.structure import Structure
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import NoPlan
from splitnet.plan import StageSpec

__all__ = ["Draft"]

MAX_POSITIONS = 300  #: cuts that are considered; beyond, the narrowest of each stretch of equal time
_NARROWER = 24


@dataclass(frozen=True, eq=False)
class Draft:
    """A model's operators (vertices, in the structure's order) on the nodes that may be used, with the figures for one goal (see
    `partitioner.constants`). `sustained` by node: how much longer computing takes than for latency. `make_other` makes the draft for the other goal."""

    goal: Objective
    profile: Profile
    nodes: tuple[ClusterNode, ...]
    sustained: Mapping[str, float]
    make_other: Callable[[], Draft]
    links: Mapping[tuple[str, str], Link]
    seconds: Floats  # (M, vertices)
    crossing: tuple[int, ...]
    figures: Mapping[str, CodecFigures]
    overheads: Mapping[str, Overhead]
    wishes: Constraints
    machines: tuple[Machine, ...] = ()
    allowed: np.ndarray | None = None
    privacy: Privacy | None = None

    @classmethod
    def make(
        cls, profile: Profile, cluster: Cluster, nodes: Sequence[ClusterNode], wishes: Constraints,
        codecs: Mapping[str, CodecFigures] | None, goal: Objective,
    ) -> Draft:  # fmt: skip
        names = tuple(node.name for node in nodes)
        share = {name: taken[1] for name, taken in wishes.taken.items()}
        slow = {name: 1.0 / (1.0 - share.get(name, 0.0)) for name in names}
        figures = (
            measured_codecs(nodes) if codecs is None else codecs if "raw" in codecs else {**measured_codecs(nodes, ("raw",)), **codecs}
        )
        shared_machines = machines(cluster)
        sustained = dict.fromkeys(names, 1.0)
        structure = profile.structure
        ends = [spec.name for spec in structure.inputs] + [output.value for output in structure.outputs]
        if goal == "throughput":
            figures = paced(figures, nodes, shared_machines)
            sustained = {node.name: profile.on(node).sustained for node in nodes}
        spent = overheads(nodes, goal, shared_machines, sum(structure.value_bytes[name] for name in ends))
        return cls(
            goal=goal,
            make_other=lambda: cls.make(profile, cluster, nodes, wishes, codecs, "latency" if goal == "throughput" else "throughput"),
            profile=profile,
            nodes=tuple(nodes),
            sustained=sustained,
            links={(k.source, k.target): k for k in cluster.links if k.source in names and k.target in names},
            seconds=np.array([np.asarray(profile.on(node).seconds) * (slow[node.name] * sustained[node.name]) for node in nodes]),
            crossing=tuple(crossing_bytes(profile.structure)),
            figures=shared(figures, names, share),
            overheads={name: o.times(slow[name]) for name, o in spent.items()},
            wishes=wishes,
            machines=shared_machines,
        )

    def restricted(self) -> Draft:
        """With what the wishes rule out. Raises BadInput for a pattern of nothing, NoPlan where no node is left for an operator."""
        wishes = replace(self.wishes, forbid=())  # the nodes that are left
        allowed = allowed_operators(wishes, self.names, self.operators)
        if wishes.private is None:
            return replace(self, allowed=allowed)
        privacy = Privacy.of(self.structure, self.operators, *wishes.private, noised=wishes.noise is not None)
        allowed = np.ones((len(self.names), len(self.operators)), dtype=bool) if allowed is None else allowed
        elsewhere = np.array([name != privacy.node for name in self.names])
        private = np.array([o.name in privacy.operators for o in self.operators])
        allowed[np.ix_(elsewhere, private)] = False
        for i in map(int, np.flatnonzero(~allowed.any(axis=0))):
            raise NoPlan(
                f"no node may run operator {self.operators[i].name!r}: it uses what is private to {privacy.node!r}, where another wish forbids it",
                remedy="take back one of these wishes",
            )
        return replace(self, allowed=allowed, privacy=privacy)

    @functools.cached_property
    def other(self) -> Draft:
        return self.make_other()

    def predicted(self, realised: Realised) -> tuple[Realised, Cost]:
        """The same with each stage's seconds as one request alone finds them, and the cost: latency with the figures for latency, how long
        one request keeps what busy with those for throughput."""
        other = self.other
        idle, busy = (self, other) if self.goal == "latency" else (other, self)
        for_latency, for_pace = (
            replace(realised, stages=tuple(replace(s, seconds=s.seconds * to[s.node] / self.sustained[s.node]) for s in realised.stages))
            for to in (idle.sustained, busy.sustained)
        )
        latency_s = idle.cost(for_latency).latency_s
        return for_latency, replace(busy.cost(for_pace), latency_s=latency_s)

    def cost(self, realised: Realised) -> Cost:
        """With this draft's figures."""
        producers = {value: v.name for value, v in self.structure.producer.items()}
        return evaluate(realised.stages, realised.transfers, self.links, self.figures, self.overheads, producers, self.machines)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @property
    def structure(self) -> Structure:
        return self.profile.structure

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        return {n.name: max(0.0, (n.memory_bytes or math.inf) - self.wishes.taken.get(n.name, (0.0, 0.0))[0]) for n in self.nodes}

    @functools.cached_property
    def place(self) -> dict[str, int]:
        return {vertex.name: i for i, vertex in enumerate(self.structure.vertices)}

    @functools.cached_property
    def operators(self) -> tuple[Operator, ...]:
        structure = self.structure
        inputs = {spec.name for spec in structure.inputs}
        answers = {structure.producer[o.value].name for o in structure.outputs}
        return tuple(
            Operator(
                v.name, v.scope, reads_input=not v.cheap and v.op != "input" and bool(inputs & set(v.inputs)),
                gives_output=v.name in answers, before=tuple(self.place[structure.producer[u].name] for u in v.inputs),
                counts=not v.cheap and v.op != "input",
            )
            for v in structure.vertices
        )  # fmt: skip

    @functools.cached_property
    def before(self) -> tuple[frozenset[int], ...]:
        """Operators that costly operators use, costly ones alone: what local search moves."""
        costly = {i for i, o in enumerate(self.operators) if o.counts}
        return tuple(frozenset(set(o.before) & costly) if i in costly else frozenset() for i, o in enumerate(self.operators))

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The stretch between two considered cuts that each vertex stands in."""
        return tuple(k for k, (a, b) in enumerate(itertools.pairwise(self.positions)) for _ in range(a, b))

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """Where cuts are considered: between any two costly operators, at the narrowest place among the cheap ones that stand between them;
        where these are too many, the narrowest of each stretch of equal time."""
        costly = [i for i, o in enumerate(self.operators) if o.counts]
        found = [min(range(a + 1, b + 1), key=lambda i: (self.crossing[i], i)) for a, b in itertools.pairwise(costly)]
        return narrowed(np.asarray(self.crossing, dtype=np.float64), self.seconds.mean(axis=0), found, MAX_POSITIONS)[0]

    @functools.cached_property
    def codecs(self) -> Codecs:
        return codec_arrays(self.figures, self.names, self.operators, self._usable_links(), {})

    def _usable_links(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {pair: tuple(codecs) for pair, codecs in self.wishes.link_codecs.items() if set(pair) <= set(self.names)}

    def problem(self, positions: tuple[int, ...]) -> ChainProblem:
        structure = self.structure
        spans = list(itertools.pairwise(positions))
        cut_bytes = np.array([self.crossing[i] for i in positions], dtype=np.float64)
        cut_bytes[0] = cut_bytes[-1] = 0.0
        live = _live_bytes(structure)
        params = [
            [(p, float(structure.param_sizes[p])) for p in dict.fromkeys(p for v in structure.vertices[a:b] for p in v.params)]
            for a, b in spans
        ]
        bandwidth, latency = link_arrays(self.names, self.links)
        answers = {o.value for o in structure.outputs}
        return ChainProblem(
            devices=self.names,
            seconds=np.array([[row[a:b].sum() for a, b in spans] for row in self.seconds]),
            memory=interval_memory([max(live[a:b]) for a, b in spans], params, cut_bytes),
            limits=np.array([self.limits[name] for name in self.names]),
            cut_bytes=cut_bytes,
            return_bytes=float(sum(structure.value_bytes[v] for v in answers)),
            bandwidth=bandwidth,
            latency=latency,
            return_tensors=len(answers),
            given_codecs=self.codecs.at(positions),
            given_overheads=overhead_arrays(self.names, self.overheads),
            allowed=None if self.allowed is None else np.logical_and.reduceat(self.allowed, positions[:-1], axis=1),
        )

    def scale(self, goal: Objective, stages: range) -> Scale:
        return Scale(
            realise=self.realise, objective=goal, links=self.links, limits=self.limits, stages=stages, codecs=self.figures,
            overheads=self.overheads, producers={value: v.name for value, v in self.structure.producer.items()},
            link_codecs=self._usable_links(), budget=self.wishes.max_accuracy_loss, ingress=self.wishes.ingress, machines=self.machines,
        )  # fmt: skip

    def realise(self, placement: Placement) -> Realised:
        """Raises NoPlan for what the wishes rule out: the search proposes it, too."""
        self._check_allowed(placement)
        layout = lay_out(
            self.structure,
            {v.name: placement.stage_of[i] for i, v in enumerate(self.structure.vertices)},
            prices=DraftPrices(self, placement.order),
        )
        names = {stage.index: f"stage{k}" for k, stage in enumerate(layout.stages)}
        stages = tuple(
            StageSpec(
                name=names[stage.index],
                node=self.names[placement.order[stage.index]],
                operators=stage.operators,
                inputs=stage.inputs,
                outputs=stage.outputs,
                param_bytes=stage.param_bytes,
                activation_bytes=stage.activation_bytes,
                seconds=math.fsum(self.seconds[placement.order[stage.index], self.place[name]] for name in stage.executed),
                first=(ends := _ends(self.structure, stage.operators))[0],
                last=ends[1],
            )
            for stage in layout.stages
        )
        return self.kept_private(Realised(stages, layout.transfers(names)))

    def _check_allowed(self, placement: Placement) -> None:
        if self.allowed is None:
            return
        node = np.asarray(placement.order)[np.asarray(placement.stage_of)]
        barred = np.flatnonzero(~self.allowed[node, np.arange(len(node))])
        if barred.size:
            v = int(barred[0])
            raise NoPlan(
                f"operator {self.operators[v].name!r} would be on node {self.names[node[v]]!r}, where it must not be",
                remedy="move the cuts, or take back a wish",
            )

    def kept_private(self, realised: Realised) -> Realised:
        """The same. Raises NoPlan where a value would leave the node that it is private to."""
        if self.privacy is not None and (value := self.privacy.leak(realised)):
            if value not in self.privacy.values:
                raise NoPlan(
                    f"value {value!r} would leave node {self.privacy.node!r} without noise: it is {self.structure.value[value].dtype}, and noise is for floating-point numbers",
                    remedy="give the model without that input (such as a mask: send requests without padding), or let it all run there",
                )
            raise NoPlan(
                f"value {value!r} would leave node {self.privacy.node!r}, to which it is private",
                remedy="keep more of the model there (--private), or let it all run there",
            )
        return realised

    def reproducible(self, realised: Realised) -> Realised:
        """The same, or where `cut` would not find the same decisions about what to compute again in it, what `cut` will make of it."""
        layout = lay_out_again(self.structure, realised.stages)
        inputs = [{spec.name for spec in stage.inputs} for stage in realised.stages]
        found = [{spec.name for spec in stage.inputs} for stage in layout.stages]
        if inputs == found and [s.outputs for s in realised.stages] == [s.outputs for s in layout.stages]:
            return realised
        assignment = {name: k for k, stage in enumerate(realised.stages) for name in stage.operators}
        plain = lay_out(self.structure, assignment)
        node = {stage.name: k for k, stage in enumerate(self.nodes)}
        stages = tuple(
            replace(
                realised.stages[s.index], inputs=s.inputs, outputs=s.outputs, param_bytes=s.param_bytes, activation_bytes=s.activation_bytes,
                seconds=math.fsum(self.seconds[node[realised.stages[s.index].node], self.place[name]] for name in s.executed),
            )
            for s in plain.stages
        )  # fmt: skip
        codecs = {(t.source, t.target): t.codec for t in realised.transfers}
        transfers = plain.transfers({k: stage.name for k, stage in enumerate(realised.stages)})
        again = tuple(replace(t, codec=codecs.get((t.source, t.target), "raw")) for t in transfers)
        return self.kept_private(Realised(stages, again))

    @functools.cached_property
    def costly(self) -> GraphCosts:
        """The operators that run exactly once, with the tensors that they take from each other directly."""
        kept = [i for i, o in enumerate(self.operators) if o.counts]
        rank = {i: k for k, i in enumerate(kept)}
        structure, users = self.structure, dict[str, list[int]]()
        for i in kept:
            for value in structure.vertices[i].inputs:
                users.setdefault(value, []).append(rank[i])
        answers = {o.value for o in structure.outputs}
        values = tuple(
            Value(spec.name, size, rank[i], tuple(users.get(spec.name, ())), spec.name in answers)
            for i in kept
            for spec, size in zip(structure.vertices[i].values, structure.vertices[i].value_bytes, strict=True)
            if spec.name in users or spec.name in answers
        )
        before = [tuple(sorted({rank[u] for u in self.operators[i].before if u in rank})) for i in kept]
        return GraphCosts(
            operators=tuple(replace(self.operators[i], before=before[k]) for k, i in enumerate(kept)),
            devices=self.names, seconds=self.seconds[:, kept], values=values,
            activation_bytes=(0,) * len(kept), param_bytes=self._own_params(kept),
        )  # fmt: skip

    def _own_params(self, kept: Sequence[int]) -> tuple[int, ...]:
        """Bytes of the parameters that only one operator uses: they are somewhere exactly once."""
        uses: dict[str, int] = {}
        for vertex in self.structure.vertices:
            for name in vertex.params:
                uses[name] = uses.get(name, 0) + 1
        return tuple(sum(self.structure.param_sizes[p] for p in self.structure.vertices[i].params if uses[p] == 1) for i in kept)

    def narrower(self, placement: Placement, problem: ChainProblem) -> Iterator[Placement]:
        """The same order of nodes with one border at a place nearby where less crosses."""
        count = len(placement.order)
        cuts = [next((i for i, s in enumerate(placement.stage_of) if s >= k), len(self.operators)) for k in range(count)] + [
            len(self.operators)
        ]
        for k in range(1, count):
            here = cuts[k]
            better = [i for i in self.positions if cuts[k - 1] < i < cuts[k + 1] and self.crossing[i] < self.crossing[here]]
            for i in sorted(better, key=lambda i: abs(i - here))[:_NARROWER]:
                moved = [*cuts[:k], i, *cuts[k + 1 :]]
                stage_of = tuple(s for s, (a, b) in enumerate(itertools.pairwise(moved)) for _ in range(a, b))
                yield Placement(placement.order, stage_of)


def _ends(structure: Structure, operators: Sequence[str]) -> tuple[str, str]:
    """Where a stage begins and ends, for people: by its costly operators."""
    costly = [name for name in operators if not structure.vertex[name].cheap] or list(operators)
    first, last = structure.vertex[costly[0]], structure.vertex[costly[-1]]
    return first.scope or first.name, last.scope or last.name


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
