"""`partitioner.plan` keeps to what was asked, however much better a plan that does not would be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_planning import cluster, profile_of, structure

import partitioner
import splitnet
from nodes.testing import LocalCluster
from partitioner.graph import ModelGraph
from partitioner.planning import plan
from partitioner.profiling import HERE, Column, Profile
from splitnet.cluster import Cluster, Link
from splitnet.errors import NoPlan
from splitnet.plan import CLIENT, Plan


def where(chosen: Plan) -> dict[str, str]:
    return {operator: stage.node for stage in chosen.stages for operator in stage.operators}


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_search_does_not_trade_a_wish_for_speed(objective: str) -> None:
    planned = 0
    for seed in range(15):
        rng = random.Random(seed)
        depth = rng.randint(3, 7)
        boxes = cluster(dict.fromkeys("abc", 0), {n: rng.choice([0.2, 1, 3]) for n in "abc"}, bandwidth=rng.choice([1e6, 1e9]))
        k, node, tolerance = rng.randrange(depth), rng.choice("abc"), rng.choice([0.0, 0.05])
        wishes: list[dict[str, Any]] = [
            {"pin": {f"linear{k}": node}},
            {"forbid": {node: [f"linear{k}"]}},
            {"output_at": node},
            {"input_at": node},
        ]
        for wish in wishes:
            try:
                home = where(plan(profile_of(structure(depth)), boxes, objective=objective, tolerance=tolerance, **wish))
            except NoPlan:
                continue
            planned += 1
            if "forbid" in wish:
                assert home[f"linear{k}"] != node
            else:
                assert home[{"pin": f"linear{k}", "output_at": f"add{depth - 1}", "input_at": "linear0"}[next(iter(wish))]] == node
    assert planned > 50


def leaving(chosen: Plan, node: str) -> set[str]:
    """The values that are sent from a node to another one."""
    home = {stage.name: stage.node for stage in chosen.stages} | {CLIENT: chosen.ingress.name}
    sent = [t for t in chosen.transfers if t.target != CLIENT and home[t.source] == node != home[t.target]]
    return {value for transfer in sent for value in transfer.tensors}


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("private", [0, 1, 2, 3, 4, 5, "block.0", "block.1"])
def test_what_is_private_does_not_leave_by_a_skip_connection(objective: str, private: int | str) -> None:
    """Blocks are linear and add; the add uses the block's input again."""
    boxes = cluster(dict.fromkeys("abc", 0), {"a": 3.0, "b": 0.1, "c": 0.1}, bandwidth=1e9)
    chosen = plan(profile_of(structure(6)), boxes, objective=objective, private=("a", private))
    count = private if isinstance(private, int) else 2 * (int(private[-1]) + 1)
    home = where(chosen)
    names = [v.name for v in structure(6).vertices[1:]]
    assert {home[name] for name in names[:count]} | {chosen.ingress.name} == {"a"}
    assert len(chosen.stages) > 1  # the others are far faster
    inner = {"x", *names[: max(count - 1, 0)]}
    if count % 2:  # the add that ends the block uses what the linear before it used: it stays as well
        assert home[names[count]] == "a"
    assert not leaving(chosen, "a") & inner


def test_cuts_by_hand_do_not_break_privacy() -> None:
    boxes = cluster({"a": 0, "b": 0})
    with pytest.raises(NoPlan, match=r"(would be on node 'b', where it must not be|is private)"):
        plan(profile_of(structure()), boxes, at=["linear1"], nodes=["a", "b"], private=("a", "block.2"))
    with pytest.raises(NoPlan, match=r"'add1'.*uses what is private to 'a'"):
        plan(profile_of(structure()), boxes, private=("a", 3), pin={"add1": "b"})


class Masked(torch.nn.Module):
    """Attention under a mask that is made from an input; the picture is normalised first, which is cheap and still shows it."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        mask = (keep != 0)[:, :, None] & torch.ones(1, 8, 8, dtype=torch.bool).tril()
        h = self.first((x - 0.5) / 0.25)
        for layer in self.layers:
            h = h + torch.nn.functional.scaled_dot_product_attention(h, h, layer(h), mask)
        return h


@pytest.fixture(scope="module")
def masked() -> ModelGraph:
    torch.manual_seed(0)
    return partitioner.capture(Masked().eval(), (torch.rand(2, 8, 32), torch.ones(2, 8, dtype=torch.int64)), name="masked")


def profile_with(model: ModelGraph, cheap_s: float, costly_s: float = 1e-3) -> Profile:
    seconds = tuple(0.0 if v.op in ("input", "size") else cheap_s if v.cheap else costly_s for v in model.structure.vertices)
    return Profile(model.structure, {HERE: Column(seconds, "given")}, "a test", 1, "2", 1, sum(seconds), reference_s=0.01)


def joined(boxes: LocalCluster, bandwidth: float) -> Cluster:
    found = boxes.cluster()
    return Cluster(found.nodes, tuple(Link(a.name, b.name, bandwidth, 1e-6) for a in found.nodes for b in found.nodes if a is not b))


@pytest.fixture(scope="module")
def boxes() -> Iterator[LocalCluster]:
    with LocalCluster(3) as found:
        yield found


def answers_equal(model: ModelGraph, chosen: Plan, folder: Path, name: str) -> None:
    """Cut, deployed and served, the plan gives the whole model's bits."""
    shards = partitioner.cut(model, chosen, folder)
    for stage in chosen.stages:
        assert {spec.name for spec in shards[stage.name].manifest.inputs} == {spec.name for spec in stage.inputs}
    deployed = splitnet.deploy(chosen, shards, name=name)
    try:
        generator = np.random.default_rng(3)
        keep = np.tril(np.ones((4, 8), np.int64))
        inputs = {"x": generator.random((4, 8, 32), dtype=np.float32), "keep": keep}
        with splitnet.Client(deployed.ingress, name) as client:
            answer = client.infer(inputs)
        with torch.inference_mode():
            whole = model.run({name: torch.from_numpy(array) for name, array in inputs.items()})
        for key, tensor in whole.items():
            assert (torch.from_numpy(answer[key]) == tensor).all()
    finally:
        splitnet.undeploy(chosen, name)


@pytest.mark.parametrize("private", [0, 1, "layers.0"])
def test_private_layers_end_to_end(boxes: LocalCluster, masked: ModelGraph, tmp_path: Path, private: int | str) -> None:
    chosen = plan(profile_with(masked, 1e-7), joined(boxes, 1e12), objective="throughput", stages=3, private=("b", private))
    assert chosen.ingress.name == "b"
    structure, home = masked.structure, where(chosen)
    shown = {"x", "keep"}  # written down here: what shows the input without being a mask
    for vertex in structure.vertices:
        if vertex.cheap and shown & set(vertex.inputs):
            shown |= {spec.name for spec in vertex.values if spec.dtype != "bool" and vertex.op != "size"}
    assert len(shown) > 2  # the normalised picture
    assert not leaving(chosen, "b") & shown
    for stage in chosen.stages:
        assert stage.node == "b" or not {spec.name for spec in stage.inputs} & shown
    costly = [v.name for v in structure.vertices if not v.cheap and v.op != "input"]
    first = costly[: 1 if private == 1 else 2 if private == "layers.0" else 0]
    assert all(home[name] == "b" for name in first)
    inner = {value for name in first for value in structure.vertex[name].inputs}
    assert not leaving(chosen, "b") & inner
    answers_equal(masked, chosen, tmp_path, "private")


def test_a_price_decides_what_is_computed_again_end_to_end(boxes: LocalCluster, masked: ModelGraph, tmp_path: Path) -> None:
    """On a slow link the mask is made again from what is smaller; where computing is dear and the link fast, it is sent."""
    at: Any = {"at": ["layers.1"], "nodes": ["a", "b"]}
    slow = plan(profile_with(masked, 1e-7), joined(boxes, 1e4), **at)
    dear = plan(profile_with(masked, 1.0), joined(boxes, 1e12), **at)
    received = [{spec.name: masked.structure.value_bytes[spec.name] for spec in chosen.stages[1].inputs} for chosen in (slow, dear)]
    assert set(received[0]) != set(received[1])
    assert sum(received[0].values()) < sum(received[1].values())
    for name, chosen in (("slow", slow), ("dear", dear)):
        answers_equal(masked, chosen, tmp_path / name, name)
