"""What `private` keeps on a node: the raw input, whatever still shows it, and all that the first layers make but their result. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.solvers.constraints import Operator, matching
from partitioner.solvers.placement import Realised
from partitioner.structure import Structure
from splitnet.noise import FLOATS
from splitnet.plan import CLIENT

__all__ = ["Privacy"]


@dataclass(frozen=True)
class Privacy:
    """`operators` run on `node`, and `values` never leave it.

    Of the first layers' values those may leave that none of the first layers uses itself: their result. An input that was only reshaped,
    cast or scaled still shows what was asked; a boolean that was made from it (a mask) does not, and may leave."""

    node: str
    operators: frozenset[str]
    values: frozenset[str]
    noised: bool = False  # nothing leaves but floating-point numbers, on which there will be noise

    @classmethod
    def of(cls, structure: Structure, operators: Sequence[Operator], node: str, first: int | str, *, noised: bool = False) -> Privacy:
        """`first`: so many operators, or a pattern: all that match and what they depend on. `operators`: the structure's vertices, in order."""
        private = _first(operators, first)
        values = _showing_inputs(structure)
        for name in private:
            values |= {v for v in structure.vertex[name].inputs if structure.producer[v].name in private}
        users = {v.name for v in structure.vertices if v.op not in ("input", "size") and values & set(v.inputs)}
        return cls(node, frozenset(private | users), frozenset(values), noised)

    def leak(self, realised: Realised) -> str:
        """The first value that leaves the node in this, "" where none does. What the client sends in is on the first stage's node."""
        home = {stage.name: stage.node for stage in realised.stages} | {CLIENT: realised.stages[0].node}
        for transfer in realised.transfers:
            if transfer.target != CLIENT and home[transfer.target] != self.node:
                for value in transfer.tensors:
                    if value in self.values or (self.noised and home[transfer.source] == self.node and not _floats(realised, value)):
                        return value
        return ""


def _floats(realised: Realised, value: str) -> bool:
    specs = [spec for stage in realised.stages for spec in (*stage.outputs, *stage.inputs) if spec.name == value]
    return all(spec.dtype in FLOATS for spec in specs)


def _first(operators: Sequence[Operator], which: int | str) -> set[str]:
    """Without what is cheap: masks and the like may be made anywhere."""
    counting = {i for i, o in enumerate(operators) if o.counts}
    if isinstance(which, int):
        return {operators[i].name for i in sorted(counting)[:which]}
    found: set[int] = set()
    pending = matching(which, operators)
    while pending:
        at = pending.pop()
        if at not in found:
            found.add(at)
            pending.extend(operators[at].before)
    return {operators[i].name for i in found & counting}


def _showing_inputs(structure: Structure) -> set[str]:
    """The inputs, and what cheap operators make of them, booleans and sizes aside."""
    shown = {spec.name for spec in structure.inputs}
    for vertex in structure.vertices:
        if vertex.cheap and shown & set(vertex.inputs):
            shown |= {spec.name for spec in vertex.values if spec.dtype != "bool" and spec.name not in structure.sizes}
    return shown
