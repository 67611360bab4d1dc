"""What to send and what to compute again: a minimum vertex cut in the cheap region of a model.

Masks, position ids, rotary tables and the like depend on model inputs, constants and sizes through cheap operators only. A stage that
needs such a value may receive it, or receive something smaller and compute it again. The least number of bytes is a minimum vertex
cut between what cannot be computed again (model inputs, results of costly operators) and what the stage needs, where cutting at
a value costs its bytes. Sizes are left out: they cost nothing (see `partitioner.sizes`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from partitioner.structure import Structure, Vertex
from splitnet.errors import CaptureError

__all__ = ["Choice", "choose", "data_inputs"]

_INFINITE = 1 << 62
_SOURCE, _SINK = 0, 1


@dataclass(frozen=True)
class Choice:
    """`received` values come from elsewhere; `computed` are the cheap vertices that run here to make the rest."""

    received: frozenset[str]
    computed: frozenset[str]


def data_inputs(structure: Structure, vertex: Vertex) -> list[str]:
    """The values that a vertex uses, without the sizes that follow from shapes."""
    return [value for value in vertex.inputs if not structure.sizes.get(value)]


def choose(
    structure: Structure, needed: Iterable[str], present: Collection[str], can_receive: Callable[[str], bool],
    *, receive_cost: Callable[[str], int] | None = None, compute_cost: Callable[[Vertex], int] | None = None,
) -> Choice:  # fmt: skip
    """The cheapest way to have the values `needed`: what is received costs its bytes, unless `receive_cost` says otherwise; what is computed again
    costs nothing, unless `compute_cost` does (whole numbers of one unit, picoseconds say).

    `present` values are there anyway. `can_receive(value)` says whether a value may be received; every value whose producer is not
    cheap must be receivable or present: raises CaptureError for one that is neither. Of several minimal cuts the one nearest to `needed` is
    taken: it computes the least again.
    """
    targets = [value for value in needed if value not in present]
    network = _Network()
    price = receive_cost or structure.value_bytes.__getitem__
    entry: dict[str, int] = {}
    pending = list(targets)
    while pending:
        value = pending.pop()
        if value in entry:
            continue
        entry[value] = network.vertex(price(value) if can_receive(value) else _INFINITE)
        producer = structure.producer[value]
        if producer.cheap:
            pending.extend(v for v in data_inputs(structure, producer) if v not in present)
    for value, at in entry.items():
        producer = structure.producer[value]
        if not producer.cheap:
            network.join(_SOURCE, at)
        else:
            if compute_cost and (cost := compute_cost(producer)):
                network.join(_SOURCE, at, cost)
            for used in data_inputs(structure, producer):
                if used not in present:
                    network.join(entry[used] + 1, at)
    for value in set(targets):
        network.join(entry[value] + 1, _SINK)
    behind = network.minimum_cut()
    received = frozenset(value for value, at in entry.items() if at not in behind and at + 1 in behind)
    computed: set[str] = set()
    pending = [value for value in targets if value not in received]
    while pending:
        value = pending.pop()
        producer = structure.producer[value]
        if not producer.cheap:
            raise CaptureError(
                f"value {value!r} must not be sent to where it is needed, and cannot be computed there",
                remedy="let the operators that need it run where it is made",
            )
        if producer.name not in computed:
            computed.add(producer.name)
            pending.extend(v for v in data_inputs(structure, producer) if v not in received and v not in present)
    return Choice(received & _used(structure, computed, targets), frozenset(computed))


def _used(structure: Structure, computed: Iterable[str], targets: Iterable[str]) -> set[str]:
    return set(targets).union(*(structure.vertex[name].inputs for name in computed))


class _Network:
    """A flow network whose vertices have capacities: vertex k is the arc k -> k + 1. Shortest augmenting paths (Edmonds, Karp 1972);
    the networks here have tens of vertices."""

    def __init__(self) -> None:
        self._arcs: list[list[int]] = [[], []]  # per vertex, positions in the two lists below; arc a's reverse is a ^ 1
        self._head: list[int] = []
        self._room: list[int] = []

    def vertex(self, capacity: int) -> int:
        at = len(self._arcs)
        self._arcs += [[], []]
        self._arc(at, at + 1, capacity)
        return at

    def join(self, start: int, end: int, room: int = _INFINITE) -> None:
        self._arc(start, end, room)

    def _arc(self, start: int, end: int, room: int) -> None:
        for a, b, r in ((start, end, room), (end, start, 0)):
            self._arcs[a].append(len(self._head))
            self._head.append(b)
            self._room.append(r)

    def minimum_cut(self) -> set[int]:
        """The vertices on the sink's side of the minimum cut that is nearest to the sink."""
        while (path := self._path()) is not None:
            flow = min(self._room[arc] for arc in path)
            for arc in path:
                self._room[arc] -= flow
                self._room[arc ^ 1] += flow
        behind = {_SINK}
        queue = deque([_SINK])
        while queue:
            for arc in self._arcs[queue.popleft()]:
                if self._room[arc ^ 1] > 0 and self._head[arc] not in behind:
                    behind.add(self._head[arc])
                    queue.append(self._head[arc])
        return behind

    def _path(self) -> list[int] | None:
        came: dict[int, int] = {_SOURCE: -1}
        queue = deque([_SOURCE])
        while queue:
            at = queue.popleft()
            for arc in self._arcs[at]:
                head = self._head[arc]
                if self._room[arc] > 0 and head not in came:
                    came[head] = arc
                    if head == _SINK:
                        path = []
                        while head != _SOURCE:
                            path.append(came[head])
                            head = self._head[came[head] ^ 1]
                        return path
                    queue.append(head)
        return None
