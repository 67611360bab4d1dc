"""Whatever `solve` answers on a graph keeps to everything that was asked, however much better a plan that does not would be."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import networkx
import pytest

from partitioner.cost import CodecFigures
from partitioner.solvers import solve
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, Plan

CODECS = {
    "half": CodecFigures(2.0, 400.0, 500.0, 0.25),
    "tiny": CodecFigures(8.0, 100.0, {"a": 50.0, "b": 900.0, "c": 90.0, "d": 90.0}, 0.5),
}


def case(seed: int) -> tuple[networkx.DiGraph, dict[str, float], dict[tuple[str, str], tuple[float, float]], dict[str, Any]]:
    """A graph with branches, sometimes several inputs and answers, and any of the wishes."""
    rng = random.Random(seed)
    names, count = "abcd"[: rng.randint(2, 4)], rng.randint(2, 9)
    graph = networkx.DiGraph()
    for v in range(count):
        seconds = {n: float(rng.choice([0, rng.randint(1, 20)])) for n in names}
        graph.add_node(f"v{v}", seconds=seconds, param_bytes=rng.randint(0, 20), scope=f"block.{v // 2}")
        for u in range(v):
            if (u == v - 1 and rng.random() < 0.8) or rng.random() < 0.25:
                graph.add_edge(f"v{u}", f"v{v}", bytes=rng.choice([0, 1, 8, 64, 512]))
        if not rng.randrange(3):
            graph.nodes[f"v{v}"]["output_bytes"] = 8
    devices = {n: rng.choice([math.inf, math.inf, 120.0]) for n in names}
    pairs = [p for p in itertools.permutations(names, 2) if rng.random() < 0.9]
    links = {p: (2.0 ** rng.randint(0, 8), float(rng.randint(0, 3))) for p in pairs}
    any_vertex, any_node = lambda: f"v{rng.randrange(count)}", lambda: rng.choice(names)
    possible: dict[str, Any] = {
        "pin": {any_vertex(): any_node() for _ in range(rng.randint(1, 2))},
        "forbid": rng.choice([[any_node()], {any_node(): [any_vertex(), "v0"]}]),
        "input_at": any_node(),
        "output_at": any_node(),
        "private": (any_node(), rng.choice([rng.randint(0, count), any_vertex()])),
        "stages": rng.choice([rng.randint(1, 3), range(2, 4)]),
        "max_stages": rng.randint(1, 3),
        "link_codecs": {pair: rng.choice([["raw"], ["half"], ["raw", "tiny"]]) for pair in pairs[::2]},
        "max_accuracy_loss": rng.choice([0.0, 0.25, 0.6]),
        "taken": {any_node(): (float(rng.randint(0, 60)), rng.choice([0.0, 0.5]))},
        "tolerance": rng.choice([0.0, 0.05, 0.5]),
        "batch": rng.choice([1, 3]),
    }
    wished = rng.sample(sorted(possible), rng.randint(1, 4))
    return graph, devices, links, {"codecs": CODECS, **{name: possible[name] for name in wished}}


def check(graph: networkx.DiGraph, devices: dict[str, float], links: Any, wishes: dict[str, Any], plan: Plan) -> None:
    home = {operator: stage.node for stage in plan.stages for operator in stage.operators}
    node = {stage.name: stage.node for stage in plan.stages}
    assert sorted(home) == sorted(graph)
    assert len(set(node.values())) == len(plan.stages)
    for vertex, wanted in wishes.get("pin", {}).items():
        assert home[vertex] == wanted
    forbid = wishes.get("forbid", [])
    for name in forbid:
        vertices = forbid[name] if isinstance(forbid, dict) else list(graph)
        assert name not in {home[vertex] for vertex in vertices}
    inputs = [v for v in graph if graph.in_degree(v) == 0]
    if "input_at" in wishes:
        assert {plan.ingress.name, *(home[v] for v in inputs)} == {wishes["input_at"]}
    if "output_at" in wishes:
        assert {home[v] for v in graph if graph.out_degree(v) == 0} == {wishes["output_at"]}
    if "private" in wishes:
        keeper, which = wishes["private"]
        kept = list(graph)[:which] if isinstance(which, int) else [which, *networkx.ancestors(graph, which)]
        assert {home[v] for v in (*kept, *inputs)} == {keeper}
    if isinstance(asked := wishes.get("stages", range(1, 99)), int):
        assert len(plan.stages) == asked
    else:
        assert len(plan.stages) in asked
        assert len(plan.stages) <= wishes.get("max_stages", 99)
    between = [(node[t.source], node[t.target], t) for t in plan.transfers if CLIENT not in (t.source, t.target)]
    for a, b, transfer in between:
        if transfer.bytes:  # nothing to send needs no link
            assert (a, b) in links
            assert transfer.codec in wishes.get("link_codecs", {}).get((a, b), [transfer.codec])
    loss = sum(CODECS[t.codec].error_of("") for _, _, t in between if t.codec != "raw" and t.bytes)
    assert loss <= wishes.get("max_accuracy_loss", math.inf) + 1e-9
    assert plan.prediction is not None
    for name, needed in plan.prediction.memory_bytes.items():
        assert needed <= devices[name] - wishes.get("taken", {}).get(name, (0.0, 0.0))[0]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_every_wish_is_kept(objective: str) -> None:
    planned = 0
    for seed in range(120):
        graph, devices, links, wishes = case(seed)
        try:
            plan = solve(graph, devices, links, objective, **wishes)
        except (NoPlan, BadInput):  # wishes that contradict each other
            continue
        planned += 1
        check(graph, devices, links, wishes, plan)
    assert planned > 60
