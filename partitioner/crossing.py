"""What every place in a model would cost to cut it there. Pure."""

from __future__ import annotations

from partitioner.recompute import choose, data_inputs
from partitioner.structure import Structure

__all__ = ["crossing_bytes"]


def crossing_bytes(structure: Structure) -> list[int]:
    """For each i in 0..len(vertices): the bytes that must reach the downstream side if the vertices [0, i) are upstream and [i, n) are
    downstream, model inputs that are needed downstream included, sizes (8 bytes each at most) and model outputs not. Entry n is 0."""
    n = len(structure.vertices)
    position = {spec.name: i for i, v in enumerate(structure.vertices) for spec in v.values}
    inputs = {spec.name for spec in structure.inputs}
    outputs: dict[str, list[str]] = {}
    for output in structure.outputs:
        outputs.setdefault(structure.producer[output.value].name, []).append(output.value)
    region = {
        v for c in structure.vertices if c.cheap for v in c.inputs if not structure.producer[v].cheap
    }  # what cheap values are made of
    crossing = [0] * (n + 1)
    forced: set[str] = set()  # results of costly vertices, and inputs, that costly vertices downstream use
    local: set[str] = set()  # what costly vertices downstream produce
    wanted: set[str] = set()  # cheap values that are used downstream
    forced_bytes = cheap_bytes = 0
    for i in range(n - 1, -1, -1):
        vertex = structure.vertices[i]
        stale = vertex.cheap  # it may no longer be received
        if vertex.cheap:
            wanted.update(outputs.get(vertex.name, ()))
        elif vertex.op != "input":
            for value in data_inputs(structure, vertex):
                if structure.producer[value].cheap:
                    stale = stale or value not in wanted
                    wanted.add(value)
                elif value not in forced:
                    forced.add(value)
                    forced_bytes += structure.value_bytes[value]
                    stale = stale or value in region
            for spec in vertex.values:
                local.add(spec.name)
                stale = stale or spec.name in region
                if spec.name in forced:
                    forced.remove(spec.name)
                    forced_bytes -= structure.value_bytes[spec.name]
        if stale:
            choice = choose(structure, sorted(wanted), (forced | local) & region, lambda v, i=i: v in inputs or position[v] < i)  # type: ignore[misc]
            cheap_bytes = sum(structure.value_bytes[v] for v in choice.received)
        crossing[i] = forced_bytes + cheap_bytes
    return crossing
