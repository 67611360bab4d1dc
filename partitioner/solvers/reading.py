"""A networkx graph of costs, read, checked and put in a topological order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from partitioner.solvers.problem import Candidate, ChainProblem, Floats, interval_memory
from partitioner.solvers.select import Realised
from splitnet.cluster import Link
from splitnet.errors import BadInput
from splitnet.plan import CLIENT, OutputSpec, StageSpec, Transfer
from splitnet.tensors import TensorSpec

if TYPE_CHECKING:
    import networkx

__all__ = ["GraphCosts", "link_arrays", "read_graph"]


@dataclass(frozen=True)
class _Value:
    """A tensor: who produces it, how large it is, who uses it (positions)."""

    name: str
    bytes: int
    source: int
    users: tuple[int, ...]


@dataclass(frozen=True)
class GraphCosts:
    """A graph that has been read and checked, in a topological order."""

    names: tuple[str, ...]
    problem: ChainProblem
    links: Mapping[tuple[str, str], Link]
    values: tuple[_Value, ...]
    outputs: tuple[OutputSpec, ...]
    activation_bytes: tuple[int, ...]
    param_bytes: tuple[int, ...]
    uses: Mapping[int, Mapping[int, float]]  # operator -> the operators that it uses, and the bytes
    is_chain: bool

    def realise(self, candidate: Candidate) -> Realised:
        """The stages and transfers of a candidate."""
        bounds = list(pairwise(candidate.cuts))
        stage_of = [k for k, (j, i) in enumerate(bounds) for _ in range(j, i)]
        arriving: list[list[TensorSpec]] = [[] for _ in bounds]
        leaving: list[list[TensorSpec]] = [[] for _ in bounds]
        flows: dict[tuple[int, int], list[_Value]] = {}
        results = {output.value for output in self.outputs}
        for value in self.values:
            home = stage_of[value.source]
            targets = sorted({stage_of[user] for user in value.users} - {home})
            for target in targets:
                flows.setdefault((home, target), []).append(value)
                arriving[target].append(_spec(value))
            if value.name in results:
                flows.setdefault((home, len(bounds)), []).append(value)
            if targets or value.name in results:
                leaving[home].append(_spec(value))
        label = [f"stage{k}" for k in range(len(bounds))]
        stages = []
        for k, (j, i) in enumerate(bounds):
            device = candidate.order[k]
            stages.append(
                StageSpec(
                    name=label[k],
                    node=self.problem.devices[device],
                    operators=self.names[j:i],
                    inputs=tuple(arriving[k]),
                    outputs=tuple(leaving[k]),
                    param_bytes=sum(self.param_bytes[j:i]),
                    activation_bytes=max(self.activation_bytes[j:i]),
                    seconds=math.fsum(self.problem.seconds[device, j:i]),
                )
            )
        transfers = [
            Transfer(
                label[a], CLIENT if b == len(bounds) else label[b], tuple(v.name for v in carried), bytes=sum(v.bytes for v in carried)
            )
            for (a, b), carried in sorted(flows.items())
        ]
        return Realised(tuple(stages), tuple(transfers))


def _spec(value: _Value) -> TensorSpec:
    return TensorSpec(value.name, "uint8", (value.bytes,))


def _figure(value: Any, what: str, *, positive: bool = False, infinite: bool = False) -> float:
    """Raises BadInput, naming `what`, unless `value` is a number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise BadInput(f"{what}: expected a number, got {value!r}")
    figure = float(value)
    if not (figure > 0 if positive else figure >= 0) or (not infinite and math.isinf(figure)):
        raise BadInput(f"{what}: expected a {'positive figure' if positive else 'figure that is not negative'}, got {value!r}")
    return figure


def read_graph(graph: networkx.DiGraph, devices: Mapping[str, float], links: Mapping[tuple[str, str], tuple[float, float]]) -> GraphCosts:
    """Raises BadInput naming the item that is wrong. The attributes are those of `partitioner.solve`."""
    import networkx  # only where a graph is given

    if not devices:
        raise BadInput("there is no device to plan for")
    if graph.number_of_nodes() == 0:
        raise BadInput("the graph has no vertex")
    if not networkx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(str(edge[0]) for edge in networkx.find_cycle(graph))
        raise BadInput(f"the graph has a cycle: {cycle}", remedy="only graphs without cycles can be divided")
    names = tuple(devices)
    limits = np.array([_figure(size, f"device {name!r}: memory", infinite=True) for name, size in devices.items()])
    read_links = _read_links(links, names)
    vertices = list(networkx.topological_sort(graph))
    if len({str(v) for v in vertices}) != len(vertices):
        raise BadInput("two vertices of the graph have the same name as text")
    place = {vertex: i for i, vertex in enumerate(vertices)}
    seconds = np.array([[_seconds(graph, vertex, device) for vertex in vertices] for device in names])
    param_bytes = tuple(_size(graph.nodes[v], f"vertex {v!r}", "param_bytes") for v in vertices)
    activation_bytes = tuple(_size(graph.nodes[v], f"vertex {v!r}", "activation_bytes") for v in vertices)
    values = _values(graph, vertices, place)
    cut_bytes = np.zeros(len(vertices) + 1)
    for value in values:
        if value.users:
            cut_bytes[value.source + 1 : max(value.users) + 1] += value.bytes
    sinks = [value for value in values if not value.users]
    bandwidth, latency = link_arrays(names, read_links)
    problem = ChainProblem(
        devices=names,
        seconds=seconds,
        memory=interval_memory(activation_bytes, [[(str(v), size)] for v, size in zip(vertices, param_bytes, strict=True)], cut_bytes),
        limits=limits,
        cut_bytes=cut_bytes,
        return_bytes=float(sum(sink.bytes for sink in sinks)),
        bandwidth=bandwidth,
        latency=latency,
    )
    return GraphCosts(
        names=tuple(map(str, vertices)),
        problem=problem,
        links=read_links,
        values=values,
        outputs=tuple(OutputSpec(sink.name, _spec(sink)) for sink in sinks),
        activation_bytes=activation_bytes,
        param_bytes=param_bytes,
        uses={place[v]: {place[u]: graph.edges[u, v]["bytes"] for u in graph.predecessors(v)} for v in vertices},
        is_chain=all(set(graph.predecessors(v)) == {u} for u, v in pairwise(vertices)),
    )


def _read_links(links: Mapping[tuple[str, str], tuple[float, float]], names: Sequence[str]) -> dict[tuple[str, str], Link]:
    found = {}
    for (a, b), (bandwidth, latency) in links.items():
        where = f"link {a!r} -> {b!r}"
        for end in (a, b):
            if end not in names:
                raise BadInput(f"{where}: there is no device {end!r}")
        found[a, b] = Link(
            a, b, _figure(bandwidth, f"{where}: bandwidth", positive=True, infinite=True), _figure(latency, f"{where}: latency")
        )
    return found


def link_arrays(names: Sequence[str], links: Mapping[tuple[str, str], Link]) -> tuple[Floats, Floats]:
    """Bandwidth and latency as matrices; a pair without a link has latency inf."""
    bandwidth, latency = np.ones((len(names), len(names))), np.full((len(names), len(names)), np.inf)
    for (a, b), link in links.items():
        at = names.index(a), names.index(b)
        bandwidth[at], latency[at] = link.bandwidth_bytes_per_s, link.latency_s
    np.fill_diagonal(latency, 0.0)
    return bandwidth, latency


def _seconds(graph: networkx.DiGraph, vertex: Any, device: str) -> float:
    seconds = graph.nodes[vertex].get("seconds")
    if not isinstance(seconds, Mapping) or device not in seconds:
        raise BadInput(f"vertex {vertex!r} has no seconds for device {device!r}", remedy="give every vertex seconds={device: seconds}")
    return _figure(seconds[device], f"vertex {vertex!r}: seconds on {device!r}")


def _size(attributes: Mapping[str, Any], what: str, key: str, *, required: bool = False) -> int:
    if required and key not in attributes:
        raise BadInput(f"{what} has no {key!r}")
    return math.ceil(_figure(attributes.get(key, 0), f"{what}: {key}"))


def _values(graph: networkx.DiGraph, vertices: Sequence[Any], place: Mapping[Any, int]) -> tuple[_Value, ...]:
    values = []
    for vertex in vertices:
        tensors: dict[Any, tuple[int, list[int]]] = {}
        for _, user, attributes in graph.out_edges(vertex, data=True):
            size = _size(attributes, f"edge {vertex!r} -> {user!r}", "bytes", required=True)
            key = attributes.get("tensor", size)
            before, users = tensors.get(key, (0, []))
            tensors[key] = max(before, size), [*users, place[user]]
        if not tensors and (size := _size(graph.nodes[vertex], f"vertex {vertex!r}", "output_bytes")):
            tensors[size] = size, []
        for k, (size, users) in enumerate(tensors.values()):
            name = str(vertex) if len(tensors) == 1 else f"{vertex}.{k}"
            values.append(_Value(name, size, place[vertex], tuple(sorted(users))))
    return tuple(values)
