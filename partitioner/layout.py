"""From "which vertex on which stage" to what every stage runs, receives and sends. Pure; plan() and cut() both use it, so they agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from partitioner.recompute import choose, data_inputs
from partitioner.sizes import SizeSource, find_sources, missing
from partitioner.structure import Structure, Vertex
from splitnet.errors import BadPlan, CaptureError
from splitnet.plan import CLIENT, StageSpec, Transfer
from splitnet.tensors import TensorSpec

__all__ = ["Flow", "Layout", "Prices", "StageLayout", "lay_out", "lay_out_again"]


@dataclass(frozen=True)
class StageLayout:
    """What one stage does. `operators` are the vertices that were assigned to it: what plan.json lists, and what makes the same layout
    again. `executed` are those that run, in order: without assigned cheap ones that nobody needs from here, with those of other
    stages that are computed again here (`recomputed`)."""

    index: int
    operators: tuple[str, ...]
    executed: tuple[str, ...]
    recomputed: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    params: tuple[str, ...]
    param_bytes: int
    activation_bytes: int  # the most that is alive at once, at the example batch; a view counts like a copy
    size_sources: tuple[SizeSource, ...] = ()  # where it reads the symbols and sizes that it needs


@dataclass(frozen=True)
class Flow:
    """Values that go from stage to stage; None is the client. `bytes` is at the example batch."""

    source: int | None
    target: int | None
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Layout:
    """`stages` are in a topological order. A stage that has nothing to compute is in `empty` and not in `stages`; whoever made the
    assignment leaves it out of the plan, and the remaining stages still have this layout."""

    stages: tuple[StageLayout, ...]
    flows: tuple[Flow, ...]
    empty: tuple[int, ...] = ()

    def transfers(
        self, names: Mapping[int, str], codecs: Mapping[tuple[int | None, int | None], str] | None = None
    ) -> tuple[Transfer, ...]:
        """The flows as a plan holds them, with the stages called by name."""
        label: dict[int | None, str] = {None: CLIENT}
        label.update(names.items())
        codecs = codecs or {}
        return tuple(
            Transfer(label[f.source], label[f.target], f.tensors, codecs.get((f.source, f.target), "raw"), f.bytes) for f in self.flows
        )


class Prices(Protocol):
    """What receiving and computing again cost, in seconds; see `partitioner.recompute`. Stages by index; None is the client."""

    def receive_s(self, value: str, source: int | None, target: int) -> float:
        """inf: it must not be sent there."""
        ...

    def compute_s(self, stage: int, operator: str) -> float: ...


def lay_out_again(structure: Structure, stages: Sequence[StageSpec]) -> Layout:
    """The layout that a plan's stages were made from. Where their inputs are not those of the fewest bytes, they are taken as they stand."""
    assignment = {operator: index for index, stage in enumerate(stages) for operator in stage.operators}
    layout = lay_out(structure, assignment)
    planned = {index: {spec.name for spec in stage.inputs} for index, stage in enumerate(stages)}
    if any({spec.name for spec in stage.inputs} != planned[stage.index] for stage in layout.stages):
        return _Layouter(structure, assignment, receives=planned).layout()
    return layout


def lay_out(structure: Structure, assignment: Mapping[str, int], *, prices: Prices | None = None) -> Layout:
    """Lays a model out over stages.

    `assignment` gives each vertex its stage's index; model inputs need none (they come from the client), and cheap vertices
    may be left out (every stage that needs one then computes it). What to send and what to compute again is decided by bytes, or by
    `prices`. Raises BadPlan for a vertex that is unknown or missing, and
    CaptureError where two stages would wait for each other.
    """
    return _Layouter(structure, assignment, prices=prices).layout()


@dataclass
class _Stage:
    index: int
    operators: list[Vertex] = field(default_factory=list)
    demanded: set[str] = field(default_factory=set)  # values that others, or the client, want from here
    received: set[str] = field(default_factory=set)
    executed: list[Vertex] = field(default_factory=list)
    sources: tuple[SizeSource, ...] = ()


class _Layouter:
    def __init__(
        self, structure: Structure, assignment: Mapping[str, int], *, prices: Prices | None = None,
        receives: Mapping[int, Collection[str]] | None = None,
    ) -> None:  # fmt: skip
        self.structure, self.prices, self.receives = structure, prices, receives
        for name in assignment:
            if name not in structure.vertex:
                raise BadPlan(f"no operator {name!r} in the model {structure.name!r}", remedy="make the plan again for this model")
        outputs = {structure.producer[o.value].name for o in structure.outputs}
        for vertex in structure.vertices:
            if vertex.name not in assignment and vertex.op != "input" and (not vertex.cheap or vertex.name in outputs):
                raise BadPlan(f"operator {vertex.name!r} is on no stage", remedy="put every operator of the model on a stage")
        self.owner = {v.name: assignment[v.name] for v in structure.vertices if v.op != "input" and v.name in assignment}
        self.stages = {index: _Stage(index) for index in sorted(set(self.owner.values()))}
        for vertex in structure.vertices:
            if vertex.name in self.owner:
                self.stages[self.owner[vertex.name]].operators.append(vertex)
        self.order = self._topological_order()
        self.place = {index: i for i, index in enumerate(self.order)}
        self.rank = {name: i for i, name in enumerate(structure.value)}
        self.model_inputs = {spec.name for spec in structure.inputs}

    def layout(self) -> Layout:
        for output in self.structure.outputs:
            self._owner_of(output.value).demanded.add(output.value)
        for index in reversed(self.order):  # a stage may ask earlier ones for more
            self._settle(self.stages[index])
        live = [self.stages[index] for index in self.order if self.stages[index].executed]
        return Layout(
            stages=tuple(self._describe(stage) for stage in live),
            flows=tuple(self._flows(live)),
            empty=tuple(index for index in self.order if not self.stages[index].executed),
        )

    def _topological_order(self) -> list[int]:
        before: dict[int, set[int]] = {index: set() for index in self.stages}
        for vertex in self.structure.vertices:
            if (target := self.owner.get(vertex.name)) is not None:
                for value in data_inputs(self.structure, vertex):
                    source = self.owner.get(self.structure.producer[value].name, target)
                    if source != target:
                        before[target].add(source)
        order: list[int] = []
        while waiting := [index for index in before if index not in order]:
            ready = next((index for index in waiting if before[index] <= set(order)), None)
            if ready is None:
                raise CaptureError(
                    f"stages {', '.join(map(str, waiting))} wait for each other's results",
                    remedy="assign operators so that no value comes back to a stage that it left",
                )
            order.append(ready)
        return order

    def _owner_of(self, value: str) -> _Stage:
        return self.stages[self.owner[self.structure.producer[value].name]]

    def _settle(self, stage: _Stage) -> None:
        """Decides what the stage runs and receives, and asks the stages before it."""
        structure = self.structure
        own = [v for v in stage.operators if not v.cheap]
        tensors = {value for value in stage.demanded if not structure.sizes.get(value)}
        needed = tensors.union(*(data_inputs(structure, v) for v in own))
        local = {spec.name for v in own for spec in v.values}
        forced = {value for value in needed - local if not structure.producer[value].cheap}

        def can_receive(value: str) -> bool:
            producer = structure.producer[value].name
            return value in self.model_inputs or self.owner.get(producer, stage.index) != stage.index

        def receivable(value: str) -> bool:
            if self.receives is not None:
                return can_receive(value) and value in self.receives[stage.index]
            return can_receive(value) and (self.prices is None or math.isfinite(self._receive_s(stage, value)))

        prices = self.prices
        choice = choose(
            structure, sorted(needed), local | forced, receivable,
            receive_cost=None if prices is None else lambda value: _picoseconds(self._receive_s(stage, value)),
            compute_cost=None if prices is None else lambda vertex: _picoseconds(prices.compute_s(stage.index, vertex.name)),
        )  # fmt: skip
        stage.received = forced | choice.received
        running = choice.computed | {v.name for v in own}
        stage.executed = [v for v in structure.vertices if v.name in running]
        self._settle_sizes(stage)
        if stage.executed and not stage.received:  # a stage runs when its inputs arrive, so it must have one
            stage.received.add(min(self.model_inputs, key=lambda name: (structure.value_bytes[name], name)))
        for value in stage.received - self.model_inputs:
            self._owner_of(value).demanded.add(value)

    def _receive_s(self, stage: _Stage, value: str) -> float:
        assert self.prices is not None
        source = None if value in self.model_inputs else self.owner.get(self.structure.producer[value].name)
        return self.prices.receive_s(value, source, stage.index)

    def _settle_sizes(self, stage: _Stage) -> None:
        """Finds each size in the shape of a tensor that is received anyway; else it comes as a number from the stage that owns it; else from
        the smallest model input that has it."""
        structure = self.structure
        wanted = {v for v in stage.demanded if structure.sizes.get(v)}
        wanted |= {value for v in stage.executed for value in v.inputs if structure.sizes.get(value)}
        for value in sorted(wanted):
            text = structure.sizes[value]
            if not missing(text, self._sources(stage), structure.symbols):
                continue
            owner = self.owner.get(structure.producer[value].name)
            if owner is not None and self.place[owner] < self.place[stage.index]:
                stage.received.add(value)
                continue
            for symbol in sorted(missing(text, self._sources(stage), structure.symbols)):
                carriers = [s for s in structure.inputs if symbol in find_sources([s])]
                stage.received.add(min(carriers, key=lambda s: (structure.value_bytes[s.name], s.name)).name)
        read = wanted - stage.received
        sources = self._sources(stage)
        texts: set[str] = set()
        for value in read:
            text = structure.sizes[value]
            texts |= {text} if text in sources else {s for s in sources if s in structure.symbols and s in _words(text)}
        stage.sources = tuple(sources[text] for text in sorted(texts))
        own = {v.name for v in stage.executed}
        stage.executed = [v for v in structure.vertices if v.name in own or (v.values and v.values[0].name in read)]

    def _sources(self, stage: _Stage) -> dict[str, SizeSource]:
        tensors = [v for v in stage.received if v not in self.structure.sizes]
        return find_sources(self.structure.value[v] for v in sorted(tensors, key=self.rank.__getitem__))

    def _describe(self, stage: _Stage) -> StageLayout:
        structure = self.structure
        params = tuple(dict.fromkeys(p for v in stage.executed for p in v.params))
        return StageLayout(
            index=stage.index,
            operators=tuple(v.name for v in stage.operators),
            executed=tuple(v.name for v in stage.executed),
            recomputed=tuple(v.name for v in stage.executed if self.owner.get(v.name) != stage.index),
            inputs=self._specs(stage.received),
            outputs=self._specs(stage.demanded),
            params=params,
            param_bytes=sum(structure.param_sizes[p] for p in params),
            activation_bytes=_peak_bytes(structure, stage.received, stage.executed, stage.demanded),
            size_sources=stage.sources,
        )

    def _specs(self, values: set[str]) -> tuple[TensorSpec, ...]:
        return tuple(self.structure.value[v] for v in sorted(values, key=self.rank.__getitem__))

    def _flows(self, live: list[_Stage]) -> list[Flow]:
        ends: dict[tuple[int | None, int | None], set[str]] = {}
        for stage in live:
            for value in stage.received:
                source = None if value in self.model_inputs else self._owner_of(value).index
                ends.setdefault((source, stage.index), set()).add(value)
        for output in self.structure.outputs:
            ends.setdefault((self._owner_of(output.value).index, None), set()).add(output.value)
        place: dict[int | None, int] = {None: -1}
        place.update(self.place.items())
        last = len(place)

        def position(end: tuple[int | None, int | None]) -> tuple[int, int]:
            return place[end[0]], last if end[1] is None else place[end[1]]

        return [
            Flow(*end, tuple(sorted(ends[end], key=self.rank.__getitem__)), sum(self.structure.value_bytes[v] for v in ends[end]))
            for end in sorted(ends, key=position)
        ]


def _picoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e12))


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def _peak_bytes(structure: Structure, received: set[str], executed: list[Vertex], kept: set[str]) -> int:
    last = {value: i for i, vertex in enumerate(executed) for value in vertex.inputs}
    own = {spec.name for vertex in executed for spec in vertex.values}
    alive = peak = sum(structure.value_bytes[value] for value in received)
    gone: set[str] = set()
    for i, vertex in enumerate(executed):
        alive += vertex.output_bytes
        peak = max(peak, alive)
        dead = {v for v in (*vertex.inputs, *(s.name for s in vertex.values)) if last.get(v, i) == i and v not in kept} - gone
        gone |= dead
        alive -= sum(structure.value_bytes[v] for v in dead if v in received or v in own)
    return peak
