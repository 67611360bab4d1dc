"""A stage's operators as a few blocks that a person can read: grouped by the module that they came from. Pure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partitioner.structure import Structure, Vertex

__all__ = ["Block", "BlockGraph", "group"]

_Key = tuple[str, str]  # module path; and _OWN for the operators of an opened module that belong to none of its parts, or _JOINED
_OWN, _JOINED = "\0own", "\0joined"
_LEAST = 0.03  # of all the seconds: a lighter module is not opened
_MOST = 0.5  # of the siblings' time: such a module may be opened without them


@dataclass(frozen=True, slots=True)
class Block:
    """`label` is a module path, a range of them ("layer.0 … layer.3"), or an operator. `seconds` and `param_bytes` are sums."""

    label: str
    operators: tuple[str, ...]
    seconds: float
    param_bytes: int


@dataclass(frozen=True)
class BlockGraph:
    """Blocks in a topological order, and which uses what which made; never a cycle."""

    blocks: tuple[Block, ...]
    edges: tuple[tuple[int, int], ...]


def group(structure: Structure, operators: Sequence[str], seconds: Mapping[str, float], limit: int) -> BlockGraph:
    """At most `limit` blocks, as fine as that allows: the heaviest module is opened first, and neighbours in a row of modules are joined
    where there are too many of them. Only where branches that cannot be joined are more than `limit` are there more blocks. What may be
    recomputed (masks, sizes) is left out, unless there is nothing else."""
    wanted = set(operators)
    vertices = [v for v in structure.vertices if v.name in wanted and not v.cheap and v.op != "input"]
    vertices = vertices or [v for v in structure.vertices if v.name in wanted]
    grouping = _Grouping(structure, vertices, seconds)
    opened: set[str] = set()
    shut: set[str] = set()
    best = grouping.make(opened)
    while families := _families(best, grouping, shut):
        family = max(families, key=lambda siblings: sum(siblings.values()))
        heaviest = max(family, key=family.__getitem__)
        trial = grouping.make(opened | set(family))
        if len(trial) > limit and family[heaviest] > _MOST * sum(family.values()):
            family = {heaviest: family[heaviest]}
            trial = _contract(grouping.make(opened | {heaviest}), limit, parent=heaviest)
        if len(trial) > limit:
            shut.update(family)
            continue
        opened.update(family)
        best = trial
    best = _contract(best, limit)
    place = {v: i for i, b in enumerate(best) for v in b.vertices}
    edges = {(place[s], place[v.name]) for v in vertices for s in grouping.sources(v) if place[s] != place[v.name]}
    blocks = tuple(Block(grouping.label(b), tuple(b.vertices), b.seconds, b.param_bytes) for b in best)
    return BlockGraph(blocks, tuple(sorted(edges)))


def _families(groups: Sequence[_Group], grouping: _Grouping, shut: set[str]) -> list[dict[str, float]]:
    """Modules that can still be opened, with their seconds, those of one parent together: siblings are opened at once, so that equal
    layers look equal."""
    found: dict[str | None, dict[str, float]] = defaultdict(dict)
    least = _LEAST * sum(g.seconds for g in groups)
    for g in groups:
        prefix, own = g.key
        if not own and prefix not in shut and g.seconds >= least and grouping.has_parts(g):
            siblings = found[prefix.rpartition(".")[0] if prefix else None]
            siblings[prefix] = siblings.get(prefix, 0.0) + g.seconds
    return list(found.values())


@dataclass
class _Group:
    key: _Key
    vertices: list[str]
    seconds: float
    param_bytes: int
    above: int  # bit set of the groups that it depends on, directly or not
    before: set[int]
    labels: tuple[str, str]  # of its first and its last part


class _Grouping:
    def __init__(self, structure: Structure, vertices: Sequence[Vertex], seconds: Mapping[str, float]) -> None:
        self.structure = structure
        self.vertices = vertices
        self.seconds = seconds
        self.names = {v.name for v in vertices}
        self.everything = [v for v in structure.vertices if not v.cheap and v.op != "input"]

    def sources(self, vertex: Vertex) -> list[str]:
        found = (self.structure.producer[value].name for value in vertex.inputs)
        return [name for name in found if name in self.names]

    def has_parts(self, g: _Group) -> bool:
        """Whether there are modules inside this one."""
        return any(len(self.structure.vertex[v].scope) > len(g.key[0]) for v in g.vertices)

    def label(self, g: _Group) -> str:
        first, last = g.labels
        if first == _OWN or (not first and len(g.vertices) < len(self.everything)):
            heaviest = max(g.vertices, key=lambda v: self.seconds.get(v, 0.0))
            name = _operator(self.structure.vertex[heaviest].op)
            return name if len(g.vertices) == 1 else f"{name} and {len(g.vertices) - 1} more"
        if first == last or last == _OWN:
            return first or self.structure.name
        a, b = first.split("."), last.split(".")
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        return f"{first} … {'.'.join(b[shared:])}" if 0 < shared < len(b) else f"{first} … {last}"

    def make(self, opened: set[str]) -> list[_Group]:
        """Each operator joins the last group of its module, unless that would close a circle."""
        groups: list[_Group] = []
        home: dict[str, int] = {}
        latest: dict[_Key, int] = {}
        counted: set[str] = set()
        for vertex in self.vertices:
            key = _key(vertex, opened)
            before = {home[s] for s in self.sources(vertex)}
            index = latest.get(key)
            if index is not None and any(groups[b].above >> index & 1 for b in before - {index}):
                index = None
            if index is None:
                index = latest[key] = len(groups)
                label = key[1] or key[0]
                groups.append(_Group(key, [], 0.0, 0, 0, set(), (label, label)))
            mine = groups[index]
            before.discard(index)
            news = 0
            for b in before:
                news |= groups[b].above | 1 << b
            mine.above |= news
            for other in groups:
                if other.above >> index & 1:
                    other.above |= news
            mine.before |= before
            mine.vertices.append(vertex.name)
            mine.seconds += self.seconds.get(vertex.name, 0.0)
            fresh = [p for p in vertex.params if p not in counted]
            counted.update(fresh)
            mine.param_bytes += sum(self.structure.param_sizes[p] for p in fresh)
            home[vertex.name] = index
        return _absorb(_sorted(groups))


def _key(vertex: Vertex, opened: set[str]) -> _Key:
    parts = vertex.scope.split(".") if vertex.scope else []
    prefix = ""
    for part in parts:
        if prefix not in opened:
            return prefix, ""
        prefix = f"{prefix}.{part}" if prefix else part
    return (prefix, _OWN) if prefix in opened else (prefix, "")


def _operator(op: str) -> str:
    """ "aten.conv2d.default" -> "conv2d"."""
    parts = op.split(".")
    return (parts[1] if len(parts) > 1 else op).strip("_")


def _sorted(groups: list[_Group]) -> list[_Group]:
    """In a topological order: one that another depends on has fewer above it."""
    order = sorted(range(len(groups)), key=lambda i: (groups[i].above.bit_count(), i))
    place = {old: new for new, old in enumerate(order)}
    for g in groups:
        g.before = {place[b] for b in g.before}
        g.above = 0
    return [groups[i] for i in order]


def _after(groups: Sequence[_Group]) -> dict[int, set[int]]:
    after: dict[int, set[int]] = defaultdict(set)
    for i, g in enumerate(groups):
        for b in g.before:
            after[b].add(i)
    return after


def _absorb(groups: list[_Group]) -> list[_Group]:
    """What stands between modules (an addition, an activation) joins the module right before it, else the one right after it."""
    while True:
        after = _after(groups)
        for i, g in enumerate(groups):
            if g.key[1] != _OWN:
                continue
            if len(g.before) == 1 and len(after[b := next(iter(g.before))]) == 1 and groups[b].key[1] != _OWN:
                groups = _joined(groups, b, i, name_of=b)
                break
            if len(after[i]) == 1 and len(groups[a := next(iter(after[i]))].before) == 1 and groups[a].key[1] != _OWN:
                groups = _joined(groups, i, a, name_of=a)
                break
        else:
            return groups


def _contract(groups: list[_Group], limit: int, parent: str | None = None) -> list[_Group]:
    """Joins neighbours in a row, the lightest pair of siblings first; only the parts of `parent` where one is given."""
    while len(groups) > limit:
        after = _after(groups)
        pairs = [(b, i) for i, g in enumerate(groups) for b in g.before if len(g.before) == 1 and len(after[b]) == 1]
        siblings = [(b, i) for b, i in pairs if _parent(groups[b]) == _parent(groups[i]) and parent in (None, _parent(groups[i]))]
        if not siblings and (parent is not None or not pairs):
            return groups
        b, i = min(siblings or pairs, key=lambda pair: groups[pair[0]].seconds + groups[pair[1]].seconds)
        groups = _joined(groups, b, i)
    return groups


def _parent(g: _Group) -> str:
    return g.key[0].rpartition(".")[0]


def _joined(groups: list[_Group], first: int, second: int, name_of: int | None = None) -> list[_Group]:
    """`second` comes right after `first`. The new group is named after one of them, or after both."""
    a, b = groups[first], groups[second]
    named = groups[name_of] if name_of is not None else None
    labels = named.labels if named else (a.labels[0], b.labels[1])
    # A join of several modules cannot be opened any more: it stands for them.
    key = named.key if named else (a.key[0], _JOINED if a.key != b.key else a.key[1])
    merged = _Group(
        key, a.vertices + b.vertices, a.seconds + b.seconds, a.param_bytes + b.param_bytes, 0, a.before | (b.before - {first}), labels
    )
    kept = [merged if i == first else g for i, g in enumerate(groups) if i != second]

    def moved(index: int) -> int:
        index = first if index == second else index
        return index - (index > second)

    for g in kept:
        g.before = {moved(i) for i in g.before}
    return kept
