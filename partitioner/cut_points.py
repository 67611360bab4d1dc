"""Where a model can be cut in its own order, as a calibration sees it: places where the same tensors cross are one cut. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.crossing import crossing_bytes
from partitioner.layout import Layout, lay_out
from partitioner.solvers.constraints import Operator, matching
from partitioner.structure import Structure
from splitnet.errors import BadInput, CaptureError

__all__ = ["CutPoint", "chosen_cuts", "cut_at"]


@dataclass(frozen=True, eq=False)
class CutPoint:
    """`layout` is that of the model in two stages. `after`: the operators after which a cut gives these `tensors`."""

    after: tuple[str, ...]
    tensors: tuple[str, ...]
    layout: Layout
    bytes: int

    @property
    def before(self) -> str:
        """The last operator of the first stage."""
        return self.after[-1]


def chosen_cuts(structure: Structure, most: int) -> tuple[CutPoint, ...]:
    """At most so many cuts, in the model's order: between any two costly operators, where the fewest bytes cross (as planning does); of each stretch
    of equal work (by estimated operations) the one with the fewest bytes. Cuts that send more than the one before and the one after, though
    there is work for fewer, are the inside of a block, and come last."""
    if most < 1:
        raise BadInput(f"at least 1 cut must be measured, got {most}")
    crossing = crossing_bytes(structure)
    costly = [i for i, v in enumerate(structure.vertices) if not v.cheap and v.op != "input"]
    positions = [min(range(a + 1, b + 1), key=lambda i: (crossing[i], i)) for a, b in itertools.pairwise(costly)]
    if not positions:
        raise BadInput(f"the model {structure.name!r} has one operator: there is nothing to cut")
    work = list(itertools.accumulate((max(v.flops, 1.0) for v in structure.vertices), initial=0.0))
    stretches: dict[int, list[int]] = {}
    for i in positions:
        stretches.setdefault(int(work[i] / work[-1] * most), []).append(i)
    chosen = {min(stretch, key=lambda i: (crossing[i], i)) for stretch in stretches.values()}
    # Stretches without a place to cut (one operator is long) leave room for the next best, the narrowest first.
    for i in sorted(set(positions) - chosen, key=lambda i: (crossing[i], i)):
        if len(_grouped(structure, chosen)) >= most:
            break
        chosen.add(i)
    return _grouped(structure, chosen)[:most]


def cut_at(structure: Structure, patterns: Sequence[str]) -> tuple[CutPoint, ...]:
    """Cuts before the operators or modules that are named. Raises BadInput for one that is not there, or where nothing crosses."""
    operators = [Operator(v.name, v.scope) for v in structure.vertices]
    found: list[CutPoint] = []
    for pattern in patterns:
        position = matching(pattern, operators)[0]
        points = _grouped(structure, {position})
        if not points:
            raise BadInput(f"a cut before {pattern!r} leaves one side without work", remedy="cut within the model")
        found += points
    return tuple(found)


def _grouped(structure: Structure, positions: set[int]) -> tuple[CutPoint, ...]:
    found: dict[tuple[str, ...], CutPoint] = {}
    for i in sorted(positions):
        point = _cut_point(structure, i)
        if point is not None:
            known = found.get(point.tensors)
            found[point.tensors] = (
                point if known is None else CutPoint((*known.after, *point.after), known.tensors, known.layout, known.bytes)
            )
    return tuple(found.values())


def _cut_point(structure: Structure, position: int) -> CutPoint | None:
    """None where there are no two stages, or nothing goes from the first to the second."""
    assignment = {v.name: int(i >= position) for i, v in enumerate(structure.vertices) if v.op != "input"}
    try:
        layout = lay_out(structure, assignment)
    except CaptureError:
        return None
    for flow in layout.flows:
        if (flow.source, flow.target) == (0, 1):
            return CutPoint((structure.vertices[position - 1].name,), flow.tensors, layout, flow.bytes)
    return None
