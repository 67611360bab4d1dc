"""Small real modules, captured and cut by hand for the tests of serving: which operator runs in which stage, on which node."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nodes.testing import LocalCluster
from partitioner.capturing import capture
from partitioner.cutting import cut
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from splitnet.cluster import Cluster
from splitnet.plan import NodeRef, Plan, StageSpec
from splitnet.shard import Shard

__all__ = ["Split", "at_rest", "captured", "chain", "diamond", "fragile", "same", "slow", "split", "stages_by"]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


class Chain(torch.nn.Module):
    """Three layers, and a skip connection over the second."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.second = torch.nn.Linear(width, width)
        self.third = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        return self.third(torch.relu(self.second(a)) + a)


class Diamond(torch.nn.Module):
    """Two inputs, two branches that meet again, two outputs of which one leaves early."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left = torch.nn.Linear(width, width)
        self.right = torch.nn.Linear(width, width)
        self.join = torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        left = torch.relu(self.left(x))
        right = torch.tanh(self.right(y))
        return {"joined": self.join(torch.cat([left, right], 1)), "early": left}


class Slow(torch.nn.Module):
    """Three layers of which the second is run many times."""

    def __init__(self, rounds: int, width: int = 256) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, width)
        self.second = torch.nn.Linear(width, width, bias=False)
        self.third = torch.nn.Linear(width, 4)
        self.rounds = rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        for _ in range(self.rounds):
            h = torch.tanh(self.second(h))
        return self.third(h)


class Fragile(torch.nn.Module):
    """Its second stage fails for an index that is out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.head(torch.gather(torch.relu(self.first(x)), 1, index))


def captured(module: torch.nn.Module, *example: torch.Tensor) -> ModelGraph:
    return capture(module.eval(), example, name=type(module).__name__.lower())


@functools.cache
def chain() -> ModelGraph:
    torch.manual_seed(0)
    return captured(Chain(), torch.randn(2, 16))


@functools.cache
def diamond() -> ModelGraph:
    torch.manual_seed(1)
    return captured(Diamond(), torch.randn(2, 16), torch.randn(2, 16))


@functools.cache
def slow() -> ModelGraph:
    """On one thread a batch of 1000 takes about 0.1 s."""
    torch.manual_seed(2)
    return captured(Slow(rounds=20), torch.randn(2, 8))


@functools.cache
def fragile() -> ModelGraph:
    torch.manual_seed(3)
    return captured(Fragile(), torch.randn(2, 8), torch.zeros(2, 4, dtype=torch.int64))


@dataclass(frozen=True)
class Split:
    """A model, the plan that divides it, and its shards."""

    model: ModelGraph
    plan: Plan
    shards: Mapping[str, Shard]

    @property
    def address(self) -> str:
        return self.plan.ingress.address

    def whole(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the undivided model answers."""
        with torch.inference_mode():
            outputs = self.model.run({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def inputs(self, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        made: dict[str, np.ndarray] = {}
        for spec in self.plan.inputs:
            shape = [size if isinstance(size, int) else batch for size in spec.shape]
            whole_numbers = spec.dtype.startswith("int")
            made[spec.name] = (generator.integers(0, 8, shape) if whole_numbers else generator.standard_normal(shape)).astype(spec.dtype)
        return made


def split(
    model: ModelGraph,
    cluster: Cluster,
    directory: Path,
    stages: Sequence[tuple[str, Callable[[str], bool]]],
    *,
    codec: str = "raw",
    max_in_flight: int = 16,
) -> Split:
    """Cuts `model` into `stages`: (node, which operators by name), in order; an operator goes to the first stage that wants it."""
    assignment = {
        vertex.name: next(i for i, (_, wants) in enumerate(stages) if wants(vertex.name))
        for vertex in model.structure.vertices
        if vertex.op != "input"
    }
    layout = lay_out(model.structure, assignment)
    names = {stage.index: f"stage{stage.index}" for stage in layout.stages}
    specs = tuple(
        StageSpec(names[s.index], stages[s.index][0], s.operators, s.inputs, s.outputs, s.param_bytes, s.activation_bytes)
        for s in layout.stages
    )
    transfers = tuple(dataclasses.replace(transfer, codec=codec) for transfer in layout.transfers(names))
    plan = Plan(
        model=model.name,
        model_sha256=model.sha256,
        objective="latency",
        nodes=tuple(NodeRef(node.name, node.address) for node in cluster.nodes),
        stages=specs,
        transfers=transfers,
        inputs=model.structure.inputs,
        outputs=model.structure.outputs,
        max_in_flight=max_in_flight,
    )
    shards = cut(model, plan, directory)
    return Split(model, plan.with_shards({name: shard.sha256 for name, shard in shards.items()}), shards)


def stages_by(**nodes: str) -> list[tuple[str, Callable[[str], bool]]]:
    """`stages_by(a="linear relu", b="linear_1", c="*")`: node -> operators, "*" for the rest."""

    def wants(operators: str) -> Callable[[str], bool]:
        named = set(operators.split())
        return lambda name: name in named or "*" in named

    return [(node.rstrip("_"), wants(operators)) for node, operators in nodes.items()]


def at_rest(cluster: LocalCluster, timeout_s: float = 3.0) -> None:
    """Waits until no node of this process holds anything of any request, and fails where one still does."""
    deadline = time.monotonic() + timeout_s
    while held := _held(cluster):
        assert time.monotonic() < deadline, held
        time.sleep(0.01)


def _held(cluster: LocalCluster) -> dict[str, dict[str, int]]:
    found = {}
    for name in cluster.names:
        ledger = cluster.server(name).ledger
        links = [link for d in list(ledger.deployments.values()) for link in d.links.values()]
        holds = {
            "requests": len(ledger.requests),
            "buffered bytes": ledger.buffers.used_bytes,
            "admitted": sum(d.admission.in_flight for d in list(ledger.deployments.values())),
            "parcels": sum(link.outbox.waiting for link in links),
        }
        if any(holds.values()):
            found[name] = holds
    return found
