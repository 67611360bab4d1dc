"""Cuts a captured model at random and runs it stage by stage, the way nodes do: shards on disk, engines, tensors over the wire."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from nodes.engines import load_engine
from nodes.engines.torch_graph import to_array
from partitioner.cutting import write_stage
from partitioner.graph import ModelGraph
from partitioner.layout import Layout, lay_out
from partitioner.structure import Structure
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import open_shard
from splitnet.wire import TensorAssembler, tensor_chunks


def random_assignment(structure: Structure, stages: int, rng: random.Random) -> dict[str, int]:
    """A convex division into at most `stages`: along a random topological order (as the planner's linearised cuts), or, half of the
    time, level by level over the DAG, so that branches run side by side."""
    vertices = [v for v in structure.vertices if v.op != "input"]
    if rng.random() < 0.5:
        order = _random_topological_order(structure, rng)
        borders = sorted(rng.sample(range(1, len(order)), min(stages - 1, len(order) - 1)))
        return {name: sum(at >= border for border in borders) for at, name in enumerate(order)}
    # Each vertex goes to the latest stage among its sources, or a later one: convex for any choice, branches apart.
    stage: dict[str, int] = {}
    step = (stages - 1) * 2.0 / len(vertices)
    for vertex in vertices:
        earliest = max((stage.get(structure.producer[v].name, 0) for v in vertex.inputs), default=0)
        stage[vertex.name] = min(stages - 1, earliest + (rng.random() < step))
    return stage


def _random_topological_order(structure: Structure, rng: random.Random) -> list[str]:
    waiting = {v.name: {structure.producer[i].name for i in v.inputs} for v in structure.vertices}
    users: dict[str, list[str]] = {name: [] for name in waiting}
    for name, sources in waiting.items():
        for source in sources:
            users[source].append(name)
    ready = [name for name, sources in waiting.items() if not sources]
    order = []
    while ready:
        name = ready.pop(rng.randrange(len(ready)) if rng.random() < 0.3 else -1)
        order.append(name)
        for user in users[name]:
            waiting[user].discard(name)
            if not waiting[user]:
                ready.append(user)
    return [name for name in order if structure.vertex[name].op != "input"]


def over_the_wire(name: str, array: np.ndarray) -> np.ndarray:
    """What the next node gets."""
    assembler = None
    for chunk, payload in tensor_chunks(name, array, chunk_bytes=1 << 16):
        received = pb.TensorChunk.FromString(chunk.SerializeToString())
        assembler = assembler or TensorAssembler(received)
        assembler.add(received, bytes(payload))
    assert assembler is not None
    assert assembler.complete
    return assembler.array()


class Divided:
    """A model as shards on disk, loaded into engines."""

    def __init__(self, model: ModelGraph, layout: Layout, folder: Path) -> None:
        self.model = model
        self.layout = layout
        self.engines = {}
        for stage in layout.stages:
            path = folder / f"stage{stage.index}"
            write_stage(model, stage, path, name=f"stage{stage.index}")
            self.engines[stage.index] = load_engine(open_shard(path), threads=1)

    def run(self, inputs: Mapping[str, torch.Tensor], wire: bool = True) -> dict[str, np.ndarray]:
        """Only what the layout's flows say is handed from stage to stage."""
        arrived: dict[int, dict[str, np.ndarray]] = {stage.index: {} for stage in self.layout.stages}
        answer: dict[str, np.ndarray] = {}
        results: dict[int | None, dict[str, np.ndarray]] = {None: {name: to_array(t) for name, t in inputs.items()}}
        sent: set[int | None] = set()
        for stage in [None, *(s.index for s in self.layout.stages)]:
            if stage is not None:
                results[stage] = self.engines[stage].run(arrived[stage])
                assert set(results[stage]) == {s.name for s in next(x for x in self.layout.stages if x.index == stage).outputs}
            sent.add(stage)
            for flow in self.layout.flows:
                if flow.source == stage:
                    for name in flow.tensors:
                        array = results[stage][name]
                        array = over_the_wire(name, array) if wire else array
                        if flow.target is None:
                            answer[name] = array
                        else:
                            assert flow.target not in sent, "a flow goes backwards"
                            arrived[flow.target][name] = array
        return {output.spec.name: answer[output.value] for output in self.model.structure.outputs}


def divide(model: ModelGraph, stages: int, seed: int, folder: Path) -> Divided:
    rng = random.Random(seed)
    return Divided(model, lay_out(model.structure, random_assignment(model.structure, stages, rng)), folder)


def assert_same_bits(actual: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and bits; NaNs are alike wherever both have one."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        array = to_array(tensor)
        got = actual[name]
        assert got.dtype == array.dtype, name
        assert got.shape == array.shape, name
        same = (got == array) | ((got != got) & (array != array))
        assert same.all(), f"{name}: {int((~same).sum())} of {same.size} elements differ"
