"""The chain solver against brute force. All figures are multiples of powers of two, so that sums are exact and the gap is exactly 0."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cost import BUFFERED_REQUESTS
from partitioner.solvers import solve
from splitnet.errors import NoPlan
from splitnet.plan import Plan

Devices = dict[str, float]
Links = dict[tuple[str, str], tuple[float, float]]
TICK = 1.0 / 1024


def chain(figures: list[dict[str, object]], sizes: list[int]) -> networkx.DiGraph:
    graph = networkx.DiGraph(name="chain")
    for k, attributes in enumerate(figures):
        graph.add_node(f"op{k}", **attributes)
        if k:
            graph.add_edge(f"op{k - 1}", f"op{k}", bytes=sizes[k - 1])
    return graph


def instance(seed: int) -> tuple[networkx.DiGraph, Devices, Links]:
    """Small, heterogeneous; tight memory, asymmetric and missing links, empty cuts and free operators all occur."""
    rng = random.Random(seed)
    length, names = rng.randint(1, 6), ["a", "b", "c", "d"][: rng.randint(1, 4)]
    speed = {name: rng.choice([1, 2, 5]) for name in names}
    figures: list[dict[str, object]] = []
    for _ in range(length):
        work = rng.randint(0, 30)
        figures.append(
            {
                "seconds": {name: (work * speed[name] + rng.randint(0, 3)) * TICK for name in names},
                "param_bytes": rng.randint(0, 40),
                "activation_bytes": rng.randint(0, 10),
            }
        )
    figures[-1]["output_bytes"] = rng.choice([0, 8, 64])
    graph = chain(figures, [rng.choice([0, 16, 64, 256]) for _ in range(length - 1)])
    devices = {name: rng.choice([math.inf, 120, 60, 40]) for name in names}
    links: Links = {
        pair: (2.0 ** rng.randint(10, 16), rng.randint(0, 8) * TICK) for pair in itertools.permutations(names, 2) if rng.random() < 0.85
    }
    return graph, devices, links


def arrangements(length: int, names: list[str]) -> Iterator[list[tuple[str, int, int]]]:
    """Every way to give intervals of a chain to devices, each device at most one."""
    for count in range(1, min(length, len(names)) + 1):
        for inner in itertools.combinations(range(1, length), count - 1):
            cuts = (0, *inner, length)
            for order in itertools.permutations(names, count):
                yield [(order[k], cuts[k], cuts[k + 1]) for k in range(count)]


def price(graph: networkx.DiGraph, devices: Devices, links: Links, stages: list[tuple[str, int, int]]) -> tuple[float, float] | None:
    """(latency, bottleneck) of an arrangement, written down straight from the cost model; None where it cannot be."""
    latency, busiest, received = 0.0, 0.0, 0
    for k, (device, start, end) in enumerate(stages):
        inside = [graph.nodes[f"op{i}"] for i in range(start, end)]
        compute = math.fsum(op["seconds"][device] for op in inside)
        memory = sum(op["param_bytes"] for op in inside) + max(op["activation_bytes"] for op in inside) + BUFFERED_REQUESTS * received
        if memory > devices[device]:
            return None
        latency, busiest = latency + compute, max(busiest, compute)
        last = k == len(stages) - 1
        size = graph.nodes[f"op{end - 1}"].get("output_bytes", 0) if last else graph.edges[f"op{end - 1}", f"op{end}"]["bytes"]
        target = stages[0][0] if last else stages[k + 1][0]
        received = size
        if size and target != device:
            if (device, target) not in links:
                return None
            bandwidth, delay = links[device, target]
            latency, busiest = latency + delay + size / bandwidth, max(busiest, size / bandwidth)
    return latency, busiest


def reached(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.latency_s if plan.objective == "latency" else 1.0 / plan.prediction.throughput_per_s


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_equals_brute_force(objective: str) -> None:
    feasible = split = 0
    for seed in range(150):
        graph, devices, links = instance(seed)
        prices = [price(graph, devices, links, stages) for stages in arrangements(len(graph), list(devices))]
        figures = [p[0] if objective == "latency" else p[1] for p in prices if p is not None]
        if not figures:
            with pytest.raises(NoPlan):
                solve(graph, devices, links, objective)
            continue
        feasible += 1
        plan = solve(graph, devices, links, objective)
        prediction = plan.prediction
        assert prediction is not None
        split += len(plan.stages) > 1
        best = min(figures)
        assert prediction.bound == (best if objective == "latency" else max(best, 1e-9)), seed  # nothing is faster than the shortest time
        if objective == "latency":
            assert prediction.latency_s == best, seed
        else:
            assert 1 / prediction.throughput_per_s == pytest.approx(max(best, 1e-9), rel=1e-12), seed
            quickest = min(p[0] for p in prices if p is not None and p[1] == best)
            assert prediction.latency_s == quickest, f"seed {seed}: among equal bottlenecks the quickest"
        assert all(size <= devices[node] for node, size in prediction.memory_bytes.items())
        assert len({stage.node for stage in plan.stages}) == len(plan.stages)
    assert feasible > 90
    assert split > 15


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_between_equal_devices_the_answers_way_home_counts(objective: str) -> None:
    graph = chain([{"seconds": {"a": 8 * TICK, "b": 8 * TICK}, "param_bytes": 40} for _ in range(3)], [16, 16])
    graph.nodes["op2"]["output_bytes"] = 64
    links = dict.fromkeys(itertools.permutations("ab"), (1024.0, 2 * TICK))
    plan = solve(graph, {"a": 119, "b": 119}, links, objective)
    assert plan.prediction is not None
    assert plan.prediction.bound == reached(plan) == ((3 * 8 + 2 + 16 + 2 + 64) * TICK if objective == "latency" else 64 * TICK)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_forced_number_of_stages_equals_brute_force(objective: str) -> None:
    tried = 0
    for seed in range(60):
        graph, devices, links = instance(seed)
        for count in (2, 3):
            prices = [price(graph, devices, links, s) for s in arrangements(len(graph), list(devices)) if len(s) == count]
            figures = [p[0] if objective == "latency" else p[1] for p in prices if p is not None]
            if figures:
                tried += 1
                plan = solve(graph, devices, links, objective, stages=count)
                assert len(plan.stages) == count
                assert reached(plan) == pytest.approx(max(min(figures), 1e-9), rel=1e-12), seed
                assert plan.prediction is not None
                assert plan.prediction.bound <= min(figures)
    assert tried > 20


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.sampled_from(["latency", "throughput"]))
def test_a_faster_device_never_makes_it_worse(seed: int, which: int, objective: str) -> None:
    graph, devices, links = instance(seed)
    try:
        before = reached(solve(graph, devices, links, objective))
    except NoPlan:
        return
    name = list(devices)[which % len(devices)]
    for vertex in graph:
        graph.nodes[vertex]["seconds"][name] /= 2
    devices[name] *= 2
    assert reached(solve(graph, devices, links, objective)) <= before


def test_a_tensor_that_is_used_twice_is_charged_once() -> None:
    graph = networkx.DiGraph()
    for name in "abcd":
        graph.add_node(name, seconds={"x": 1.0, "y": 1.0}, param_bytes=10)
    graph.add_edge("a", "b", bytes=8)
    graph.add_edge("a", "c", bytes=8)
    graph.add_edge("a", "d", bytes=8)
    graph.add_edge("b", "c", bytes=100)
    graph.add_edge("c", "d", bytes=100)
    plan = solve(graph, {"x": 26, "y": math.inf}, {("x", "y"): (1.0, 0.0), ("y", "x"): (1.0, 0.0)}, stages=2)
    assert [stage.operators for stage in plan.stages] == [("a",), ("b", "c", "d")]
    assert [t.bytes for t in plan.transfers] == [8]
    assert Plan.from_json(plan.to_json()) == plan


def test_two_tensors_of_one_vertex_are_both_charged() -> None:
    graph = networkx.DiGraph()
    for name in "abc":
        graph.add_node(name, seconds={"x": 1.0, "y": 1.0})
    graph.add_edge("a", "b", bytes=8, tensor="left")
    graph.add_edge("a", "c", bytes=8, tensor="right")
    graph.add_edge("b", "c", bytes=64)
    plan = solve(graph, {"x": math.inf, "y": math.inf}, {("x", "y"): (1.0, 0.0), ("y", "x"): (1.0, 0.0)}, stages=2)
    assert [t.bytes for t in plan.transfers] == [16]
    assert len(plan.transfers[0].tensors) == 2


def test_a_hundred_layers_on_eight_devices_in_a_second() -> None:
    rng = random.Random(0)
    names = [f"n{k}" for k in range(8)]
    speed = {name: rng.uniform(1, 5) for name in names}
    figures: list[dict[str, object]] = [
        {"seconds": {n: rng.uniform(0.5, 1.5) * speed[n] for n in names}, "param_bytes": 1000} for _ in range(100)
    ]
    graph = chain(figures, [rng.randint(1, 10**6) for _ in range(99)])
    devices = dict.fromkeys(names, 40_000.0 + 2e6)
    links = {pair: (rng.uniform(1e5, 1e7), rng.uniform(0, 0.1)) for pair in itertools.permutations(names, 2)}
    for objective in ("latency", "throughput"):
        start = time.process_time()
        solve(graph, devices, links, objective)
        print(objective, time.process_time() - start)
        assert time.process_time() - start < 2.0  # 1 s on a quiet machine


def test_many_operators_on_five_devices() -> None:
    rng = random.Random(1)
    names = [f"n{k}" for k in range(5)]
    figures: list[dict[str, object]] = [{"seconds": {n: rng.uniform(0.5, 5) for n in names}, "param_bytes": 10} for _ in range(150)]
    graph = chain(figures, [rng.randint(1, 10**6) for _ in range(499)])
    links = dict.fromkeys(itertools.permutations(names, 2), (1e6, 0.01))
    start = time.process_time()
    plan = solve(graph, dict.fromkeys(names, math.inf), links, "throughput")
    print(time.process_time() - start)
    assert time.process_time() - start < 4.0  # 2 s on a quiet machine
    assert len(plan.stages) == 5
