"""A networkx graph of costs, read, checked and put in a topological order."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from partitioner.cost import CodecFigures
from partitioner.solvers.arguments import is_number
from partitioner.solvers.constraints import Operator
from partitioner.solvers.placement import Placement, Realised
from partitioner.solvers.problem import ChainProblem, Codecs, Floats, Overheads, interval_ends, interval_memory
from splitnet.cluster import Link
from splitnet.errors import BadInput, CaptureError
from splitnet.plan import CLIENT, OutputSpec, StageSpec, Transfer
from splitnet.tensors import TensorSpec

if TYPE_CHECKING:
    import networkx

MAX_TABLE = 1500  #: positions for which the memory of every interval is written down

__all__ = ["GraphCosts", "Value", "codec_arrays", "figure", "link_arrays", "read_graph", "read_links"]


@dataclass(frozen=True)
class Value:
    """A tensor: who produces it, how large it is, who uses it (positions), and whether it is an answer."""

    name: str
    bytes: int
    source: int
    users: tuple[int, ...]
    answer: bool = False


@dataclass(frozen=True, eq=False)
class GraphCosts:
    """A graph that has been read and checked, in a topological order, for requests of one batch size."""

    operators: tuple[Operator, ...]
    devices: tuple[str, ...]
    seconds: Floats  # (M, n)
    values: tuple[Value, ...]
    activation_bytes: tuple[int, ...]
    param_bytes: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(operator.name for operator in self.operators)

    @functools.cached_property
    def before(self) -> tuple[frozenset[int], ...]:
        found: list[set[int]] = [set() for _ in self.operators]
        for i, operator in enumerate(self.operators):
            found[i].update(operator.before)
        return tuple(map(frozenset, found))

    @property
    def is_chain(self) -> bool:
        return all(before == ({i - 1} if i else set()) for i, before in enumerate(self.before))

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        return tuple(OutputSpec(value.name, _spec(value)) for value in self.values if value.answer)

    @functools.cached_property
    def return_bytes(self) -> int:
        return sum(value.bytes for value in self.values if value.answer)

    @functools.cached_property
    def producers(self) -> dict[str, str]:
        return {value.name: self.operators[value.source].name for value in self.values}

    @functools.cached_property
    def cut_bytes(self) -> Floats:
        """(n+1,): what is alive at each position."""
        return self._crossing([value.bytes for value in self.values])

    @functools.cached_property
    def cut_tensors(self) -> Floats:
        return self._crossing([1 if value.bytes else 0 for value in self.values])

    def _crossing(self, weights: Sequence[int]) -> Floats:
        crossing = np.zeros(len(self.operators) + 1)
        for value, weight in zip(self.values, weights, strict=True):
            if value.users:
                crossing[value.source + 1 : max(value.users) + 1] += weight
        return crossing

    def problem(
        self, limits: Floats, links: tuple[Floats, Floats], codecs: Codecs, overheads: Overheads, allowed: np.ndarray | None,
        positions: tuple[int, ...],
    ) -> ChainProblem:  # fmt: skip
        """The chain problem whose operators are the vertices between `positions`."""
        spans = list(pairwise(positions))
        cut_bytes = self.cut_bytes[list(positions)]
        activations = [max(self.activation_bytes[a:b]) for a, b in spans]
        params = [float(sum(self.param_bytes[a:b])) for a, b in spans]
        few = len(spans) <= MAX_TABLE
        barred = None if allowed is None else ~np.logical_and.reduceat(allowed, positions[:-1], axis=1)
        return ChainProblem(
            devices=self.devices,
            seconds=np.add.reduceat(self.seconds, positions[:-1], axis=1),
            memory=interval_memory(activations, [[(f"{k}", size)] for k, size in enumerate(params)], cut_bytes)
            if few
            else np.zeros((0, 0)),
            given_ends=None if few else interval_ends(activations, params, cut_bytes, limits, barred),
            limits=limits,
            cut_bytes=cut_bytes,
            return_bytes=float(self.return_bytes),
            bandwidth=links[0],
            latency=links[1],
            cut_tensors=self.cut_tensors[list(positions)],
            return_tensors=sum(value.answer for value in self.values),
            given_codecs=codecs.at(positions),
            given_overheads=overheads,
            allowed=None if barred is None else ~barred,
        )

    def realise(self, placement: Placement) -> Realised:
        """Stages in a topological order, and what goes between them. Raises CaptureError where stages wait for each other."""
        count = len(placement.order)
        stage_of = placement.stage_of
        waits: list[set[int]] = [set() for _ in range(count)]
        flows: dict[tuple[int, int], list[Value]] = {}
        arriving: list[list[TensorSpec]] = [[] for _ in range(count)]
        leaving: list[list[TensorSpec]] = [[] for _ in range(count)]
        for i, before in enumerate(self.before):
            waits[stage_of[i]].update(stage_of[u] for u in before)
        order = _sorted_stages(waits)
        for value in self.values:
            home = stage_of[value.source]
            targets = sorted({stage_of[user] for user in value.users} - {home})
            for target in targets:
                flows.setdefault((home, target), []).append(value)
                arriving[target].append(_spec(value))
            if value.answer:
                flows.setdefault((home, count), []).append(value)
            if targets or value.answer:
                leaving[home].append(_spec(value))
        label = {k: f"stage{place}" for place, k in enumerate(order)} | {count: CLIENT}
        members: list[list[int]] = [[] for _ in range(count)]
        for i, k in enumerate(stage_of):
            members[k].append(i)
        stages = tuple(
            StageSpec(
                name=label[k],
                node=self.devices[placement.order[k]],
                operators=tuple(self.operators[i].name for i in members[k]),
                inputs=tuple(arriving[k]),
                outputs=tuple(leaving[k]),
                param_bytes=sum(self.param_bytes[i] for i in members[k]),
                activation_bytes=max(self.activation_bytes[i] for i in members[k]),
                seconds=math.fsum(self.seconds[placement.order[k], members[k]]),
            )
            for k in order
        )
        place = {k: at for at, k in enumerate(order)} | {count: count}
        ends = sorted(flows, key=lambda end: (place[end[0]], place[end[1]]))
        transfers = tuple(
            Transfer(label[a], label[b], tuple(v.name for v in flows[a, b]), bytes=sum(v.bytes for v in flows[a, b])) for a, b in ends
        )
        return Realised(stages, transfers)


def _sorted_stages(waits: Sequence[set[int]]) -> list[int]:
    order: list[int] = []
    done: set[int] = set()
    left = list(range(len(waits)))
    while left:
        ready = next((k for k in left if waits[k] <= done | {k}), None)
        if ready is None:
            raise CaptureError("stages wait for each other's results", remedy="assign operators so that none does")
        order.append(ready)
        done.add(ready)
        left.remove(ready)
    return order


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.name, "uint8", (value.bytes,))


def figure(value: Any, what: str, *, positive: bool = False, infinite: bool = False) -> float:
    """Raises BadInput, naming `what`, unless `value` is a number that is not negative."""
    if not is_number(value):
        raise BadInput(f"{what}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise BadInput(f"{what}: expected a number below 1e308, got one of {value.bit_length()} bits") from None
    if not (number > 0 if positive else number >= 0) or (not infinite and math.isinf(number)):
        raise BadInput(f"{what}: expected a {'positive figure' if positive else 'figure that is not negative'}, got {value!r}")
    return number


def read_graph(graph: networkx.DiGraph, devices: Sequence[str], items: int = 1) -> GraphCosts:
    """The figures for requests of `items` items. Raises BadInput naming the item that is wrong. The attributes are those of
    `partitioner.solve`."""
    import networkx  # only where a graph is given

    if not isinstance(graph, networkx.Graph):
        raise BadInput(f"expected a networkx.DiGraph, got {type(graph).__name__}")
    if not graph.is_directed():
        raise BadInput("the graph has no directions: its edges do not say what is made before what", remedy="give a networkx.DiGraph")
    if graph.number_of_nodes() == 0:
        raise BadInput("the graph has no vertex")
    if not networkx.is_directed_acyclic_graph(graph):
        cycle = [str(edge[0]) for edge in networkx.find_cycle(graph)]
        raise BadInput(f"the graph has a cycle: {' -> '.join([*cycle, cycle[0]])}", remedy="only graphs without cycles can be divided")
    vertices = _in_order(graph)
    if len({str(v) for v in vertices}) != len(vertices):
        raise BadInput("two vertices of the graph have the same name as text")
    place = {vertex: i for i, vertex in enumerate(vertices)}
    values = _values(graph, vertices, place, items)
    giving = {value.source for value in values if value.answer}
    return GraphCosts(
        operators=tuple(
            Operator(
                str(v), str(graph.nodes[v].get("scope", "")), reads_input=graph.in_degree(v) == 0,
                gives_output=i in giving or graph.out_degree(v) == 0, before=tuple(sorted(place[u] for u in graph.predecessors(v))),
            )
            for i, v in enumerate(vertices)
        ),
        devices=tuple(devices),
        seconds=np.array([_seconds_on(graph, vertex, devices, items) for vertex in vertices]).T.copy(),
        values=values,
        activation_bytes=tuple(items * _size(graph.nodes[v], f"vertex {v!r}", "activation_bytes") for v in vertices),
        param_bytes=tuple(_size(graph.nodes[v], f"vertex {v!r}", "param_bytes") for v in vertices),
    )  # fmt: skip


def _in_order(graph: networkx.DiGraph) -> list[Any]:
    """A topological order: the graph's own where it is one, else one that finishes a branch before it begins the next."""
    given = list(graph)
    place = {v: i for i, v in enumerate(given)}
    if all(place[u] < place[v] for u, v in graph.edges):
        return given
    waiting = {v: graph.in_degree(v) for v in given}
    ready = [v for v in reversed(given) if not waiting[v]]
    order = []
    while ready:
        vertex = ready.pop()
        order.append(vertex)
        for user in graph.successors(vertex):
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return order


def read_links(links: Mapping[tuple[str, str], tuple[float, float]], names: Sequence[str]) -> dict[tuple[str, str], Link]:
    found = {}
    for (a, b), (bandwidth, latency) in links.items():
        where = f"link {a!r} -> {b!r}"
        for end in (a, b):
            if end not in names:
                raise BadInput(f"{where}: there is no device {end!r}")
        found[a, b] = Link(
            a, b, figure(bandwidth, f"{where}: bandwidth", positive=True, infinite=True), figure(latency, f"{where}: latency")
        )
    return found


def link_arrays(names: Sequence[str], links: Mapping[tuple[str, str], Link]) -> tuple[Floats, Floats]:
    """Bandwidth and latency as matrices; a pair without a link has latency inf."""
    bandwidth, latency = np.ones((len(names), len(names))), np.full((len(names), len(names)), np.inf)
    place = {name: k for k, name in enumerate(names)}
    for (a, b), link in links.items():
        at = place[a], place[b]
        bandwidth[at], latency[at] = link.bandwidth_bytes_per_s, link.latency_s
    np.fill_diagonal(latency, 0.0)
    return bandwidth, latency


def codec_arrays(
    codecs: Mapping[str, CodecFigures], devices: Sequence[str], operators: Sequence[Operator],
    link_codecs: Mapping[tuple[str, str], Sequence[str]], share: Mapping[str, float],
) -> Codecs:  # fmt: skip
    """`error` and `ratio_at` are of a cut before each operator: those of the result of the operator before it; where a codec leaves that as it is,
    they are those of all that crosses."""
    names = tuple(sorted(codecs, key=lambda name: name != "raw"))
    place = {name: k for k, name in enumerate(devices)}
    permitted = np.ones((len(names), len(devices), len(devices)), dtype=bool)
    for (a, b), usable in link_codecs.items():
        permitted[:, place[a], place[b]] = [name in usable for name in names]

    def speed(name: str, device: str, size: float = 1.0) -> tuple[float, float]:
        codec, left = codecs[name], 1.0 - share.get(device, 0.0)
        return left / max(codec.encode_s(size, device), 1e-300), left / max(codec.decode_s(size, device), 1e-300)

    speeds = np.array([[speed(name, device) for device in devices] for name in names])
    speeds = np.where(speeds >= 1e299, np.inf, speeds)
    error = np.zeros((len(names), len(operators) + 1))
    for c, name in enumerate(names):
        if isinstance(codecs[name].error, Mapping):
            error[c, 1:-1] = [codecs[name].error_of(operator.name) for operator in operators[:-1]]
        else:
            error[c, 1:-1] = codecs[name].error_of("")
    ratio = np.array([codecs[name].best_ratio for name in names])
    ratio_at = None
    if any(isinstance(codecs[name].ratio, Mapping) for name in names):
        ratio_at = np.repeat(ratio[:, None], len(operators) + 1, axis=1)
        for c, name in enumerate(names):
            ratio_at[c, 1:-1] = [codecs[name].ratio_of(operator.name) for operator in operators[:-1]]
            for position in [k for k, operator in enumerate(operators[:-1], start=1) if codecs[name].leaves(operator.name)]:
                crossing = {u for operator in operators[position:] for u in operator.before if u < position}
                ratio_at[c, position] = codecs[name].ratio_of(*(operators[u].name for u in crossing))
                error[c, position] = max((codecs[name].error_of(operators[u].name) for u in crossing), default=0.0)
    return Codecs(names, ratio, speeds[..., 0], speeds[..., 1], error, permitted, ratio_at)


def _seconds_on(graph: networkx.DiGraph, vertex: Any, devices: Sequence[str], items: int) -> list[float]:
    seconds = graph.nodes[vertex].get("seconds")
    if type(seconds) is dict:  # the usual case: plain figures, many times over
        found: list[Any] = [seconds.get(device) for device in devices]
        if all(type(f) is float and 0.0 <= f < math.inf for f in found):
            return [items * f for f in found]
    return [_seconds(graph, vertex, device, items) for device in devices]


def _seconds(graph: networkx.DiGraph, vertex: Any, device: str, items: int) -> float:
    seconds = graph.nodes[vertex].get("seconds")
    if not isinstance(seconds, Mapping) or device not in seconds:
        raise BadInput(f"vertex {vertex!r} has no seconds for device {device!r}", remedy="give every vertex seconds={device: seconds}")
    found, what = seconds[device], f"vertex {vertex!r}: seconds on {device!r}"
    if isinstance(found, tuple | list):
        if len(found) != 2:
            raise BadInput(f"{what}: expected a number, or (fixed, per item), got {found!r}")
        return figure(found[0], f"{what}: fixed") + items * figure(found[1], f"{what}: per item")
    return items * figure(found, what)


def _size(attributes: Mapping[str, Any], what: str, key: str, *, required: bool = False) -> int:
    if required and key not in attributes:
        raise BadInput(f"{what} has no {key!r}")
    return math.ceil(figure(attributes.get(key, 0), f"{what}: {key}"))


def _values(graph: networkx.DiGraph, vertices: Sequence[Any], place: Mapping[Any, int], items: int) -> tuple[Value, ...]:
    values = []
    for vertex in vertices:
        tensors: dict[Any, tuple[int, list[int]]] = {}
        for _, user, attributes in graph.out_edges(vertex, data=True):
            size = items * _size(attributes, f"edge {vertex!r} -> {user!r}", "bytes", required=True)
            key = attributes.get("tensor", size)
            try:
                before, users = tensors.get(key, (0, []))
            except TypeError:
                raise BadInput(f"edge {vertex!r} -> {user!r}: tensor: expected a name, got {key!r}") from None
            tensors[key] = max(before, size), [*users, place[user]]
        answer = not tensors
        if answer and (size := items * _size(graph.nodes[vertex], f"vertex {vertex!r}", "output_bytes")):
            tensors[size] = size, []
        for k, (size, users) in enumerate(tensors.values()):
            name = str(vertex) if len(tensors) == 1 else f"{vertex}.{k}"
            values.append(Value(name, size, place[vertex], tuple(sorted(users)), answer))
    return tuple(values)
