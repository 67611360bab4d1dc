"""Graphs that are not chains, and input that cannot be planned for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import networkx
import numpy as np
import pytest

from partitioner.cost import BUFFERED_REQUESTS, RAW
from partitioner.solvers import solve
from partitioner.solvers.graphs import check_objective
from partitioner.solvers.ideals import search
from partitioner.solvers.problem import Overheads
from partitioner.solvers.reading import codec_arrays, link_arrays, read_graph, read_links
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import Plan

FAST = (1e9, 0.001)
BOTH = {("a", "b"): FAST, ("b", "a"): FAST}


def pair(**changes: object) -> networkx.DiGraph:
    """Two operators on two devices."""
    graph = networkx.DiGraph(name="pair")
    graph.add_node("first", seconds={"a": 1.0, "b": 2.0}, param_bytes=100, activation_bytes=10)
    graph.add_node("second", **({"seconds": {"a": 1.0, "b": 2.0}, "param_bytes": 100, "activation_bytes": 10} | changes))
    graph.add_edge("first", "second", bytes=10)
    return graph


def random_dag(seed: int) -> tuple[networkx.DiGraph, dict[str, float], dict[tuple[str, str], tuple[float, float]]]:
    rng = random.Random(seed)
    names, count = ["a", "b", "c"], rng.randint(2, 6)
    graph = networkx.DiGraph()
    for v in range(count):
        graph.add_node(f"v{v}", seconds={n: float(rng.randint(1, 20)) for n in names}, param_bytes=rng.randint(0, 20))
        for u in range(v):
            if (u == v - 1 and rng.random() < 0.8) or rng.random() < 0.3:
                graph.add_edge(f"v{u}", f"v{v}", bytes=rng.choice([1, 8, 64]))
    devices = {n: rng.choice([math.inf, 60.0]) for n in names}
    return graph, devices, {p: (2.0 ** rng.randint(0, 6), float(rng.randint(0, 3))) for p in itertools.permutations(names, 2)}


def convex_plans(
    graph: networkx.DiGraph, devices: dict[str, float], links: dict[tuple[str, str], tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """(latency, bottleneck) of every division into stages that do not wait for each other, one per device, written down from the cost model."""
    order = list(networkx.topological_sort(graph))
    for choice in itertools.product(devices, repeat=len(order)):
        where = dict(zip(order, choice, strict=True))
        if (price := price_of(graph, devices, links, where)) is not None:
            yield price


def price_of(
    graph: networkx.DiGraph, devices: dict[str, float], links: dict[tuple[str, str], tuple[float, float]], where: dict[str, str]
) -> tuple[float, float] | None:
    stages = networkx.DiGraph()
    stages.add_nodes_from(where.values())
    stages.add_edges_from({(where[u], where[v]) for u, v in graph.edges if where[u] != where[v]})
    if not networkx.is_directed_acyclic_graph(stages):
        return None
    sent: dict[tuple[str, str], int] = {}
    for u in graph:
        for size in {graph.edges[u, v]["bytes"] for v in graph.successors(u)}:  # equal sizes are one tensor
            for target in {where[v] for v in graph.successors(u) if graph.edges[u, v]["bytes"] == size} - {where[u]}:
                sent[where[u], target] = sent.get((where[u], target), 0) + size
    end: dict[str, float] = {}
    busiest = 0.0
    for device in networkx.topological_sort(stages):
        inside = [v for v in graph if where[v] == device]
        begin, received = 0.0, 0
        for (a, b), size in sent.items():
            if b == device:
                if (a, b) not in links:
                    return None
                begin = max(begin, end[a] + links[a, b][1] + size / links[a, b][0])
                busiest = max(busiest, size / links[a, b][0])
                received += size
        memory = sum(graph.nodes[v].get("param_bytes", 0) for v in inside) + max(graph.nodes[v].get("activation_bytes", 0) for v in inside)
        if memory + BUFFERED_REQUESTS * received > devices[device]:
            return None
        took = sum(graph.nodes[v]["seconds"][device] for v in inside)
        end[device] = begin + took
        busiest = max(busiest, took)
    return max(end.values()), busiest


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_equals_brute_force_over_convex_divisions(objective: str) -> None:
    split = 0
    for seed in (*range(40), 271):  # 271: a source that need not wait
        graph, devices, links = random_dag(seed)
        figures = [p[objective == "throughput"] for p in convex_plans(graph, devices, links)]
        if not figures:
            with pytest.raises(NoPlan):
                solve(graph, devices, links, objective)
            continue
        plan = solve(graph, devices, links, objective)
        assert plan.prediction is not None
        reached = plan.prediction.latency_s if objective == "latency" else 1 / plan.prediction.throughput_per_s
        assert reached == pytest.approx(min(figures), rel=1e-12), seed
        assert plan.prediction.bound == pytest.approx(reached, rel=1e-9), f"seed {seed}: not proven"
        assert plan.prediction.bound <= reached + 1e-12
        assert Plan.from_json(plan.to_json()) == plan
        split += len(plan.stages) > 1
    assert split > 9


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_an_unfinished_search_still_bounds(objective: str) -> None:
    """The bound that is left where nothing is searched: it must hold for every plan."""
    for seed in range(60, 85):
        graph, devices, links = random_dag(seed)
        figures = [p[objective == "throughput"] for p in convex_plans(graph, devices, links)]
        costs = read_graph(graph, list(devices))
        count = len(costs.operators)
        read = read_links(links, list(devices))
        codecs = codec_arrays(RAW, list(devices), costs.operators, {}, {})
        problem = costs.problem(
            np.array(list(devices.values())), link_arrays(list(devices), read), codecs, Overheads.none(3), None, tuple(range(count + 1))
        )
        goal = check_objective(objective)
        for effort in (0, 5, 50):
            found = search(costs, problem, goal, range(1, 4), math.inf, effort=effort)
            assert found is not None
            assert found.bound_s <= min(figures, default=math.inf) + 1e-9


def test_a_skip_connection_goes_directly() -> None:
    graph = networkx.DiGraph()
    for name in ("a", "b", "c"):
        graph.add_node(name, seconds=dict.fromkeys("xyz", 1.0), param_bytes=10)
    graph.add_edge("a", "b", bytes=1)
    graph.add_edge("b", "c", bytes=1)
    graph.add_edge("a", "c", bytes=4, tensor="skip")
    links = dict.fromkeys(itertools.permutations("xyz", 2), (8.0, 0.0))
    plan = solve(graph, dict.fromkeys("xyz", math.inf), links, stages=3)
    assert {(t.source, t.target): t.bytes for t in plan.transfers} == {
        ("stage0", "stage1"): 1,
        ("stage0", "stage2"): 4,
        ("stage1", "stage2"): 1,
    }
    assert plan.prediction is not None
    assert plan.prediction.latency_s == 3 + 2 / 8  # the skip travels meanwhile


def test_several_results_return_to_the_ingress() -> None:
    graph = networkx.DiGraph()
    graph.add_node("in", seconds={"a": 1.0, "b": 1.0}, param_bytes=5)
    graph.add_node("left", seconds={"a": 1.0, "b": 1.0}, param_bytes=5, output_bytes=16)
    graph.add_node("right", seconds={"a": 1.0, "b": 1.0}, param_bytes=5, output_bytes=32)
    graph.add_edge("in", "left", bytes=4)
    graph.add_edge("in", "right", bytes=4)
    plan = solve(graph, {"a": math.inf, "b": math.inf}, {("a", "b"): (1.0, 0.0), ("b", "a"): (2.0, 0.0)}, stages=2)
    assert {output.value for output in plan.outputs} == {"left", "right"}
    assert sum(t.bytes for t in plan.transfers if not t.target) == 48


def test_one_machine_alone_is_best_and_explain_says_so() -> None:
    plan = solve(pair(), {"a": math.inf, "b": math.inf}, BOTH)
    assert [stage.node for stage in plan.stages] == ["a"]
    text = plan.explain()
    assert "One machine alone is best for latency: 'a'" in text
    assert "optimal" in text
    forced = solve(pair(), {"a": math.inf, "b": math.inf}, BOTH, stages=2).explain()
    assert "'a' alone would be 1.50x as fast as this plan, which was asked for" in forced
    assert "within 50." in forced


def test_explain_says_when_splitting_pays() -> None:
    text = solve(pair(), {"a": math.inf, "b": math.inf}, BOTH, "throughput", stages=2).explain()
    assert "Splitting gains nothing" in text
    split = solve(pair(seconds={"a": 9.0, "b": 2.0}), {"a": math.inf, "b": math.inf}, BOTH, "throughput")
    assert "Splitting pays: 2.00x the throughput of the best node alone ('b')" in split.explain()
    tight = solve(pair(), {"a": 130.0, "b": 140.0}, BOTH).explain()
    assert "fits on no single node" in tight
    assert "no, too little memory" in tight


def test_too_little_memory_says_how_much_and_where() -> None:
    with pytest.raises(
        NoPlan, match=r"50 B of memory are missing; in the arrangement that lacks least, node 'b' .* has 160 B .* needs 210 B"
    ):
        solve(pair(), {"a": 60.0, "b": 160.0}, BOTH)


def test_an_operator_that_fits_nowhere_is_named() -> None:
    with pytest.raises(NoPlan, match=r"operator 'second' alone needs 930 B, and the largest node has 150 B"):
        solve(pair(param_bytes=900), {"a": 120.0, "b": 150.0}, BOTH)


def test_a_missing_link_is_named() -> None:
    with pytest.raises(NoPlan, match=r"no link 'a' -> 'b'|no link 'b' -> 'a'"):
        solve(pair(), {"a": 130.0, "b": 140.0}, {})
    graph = pair(output_bytes=8)
    with pytest.raises(NoPlan, match=r"no link"):
        solve(graph, {"a": 130.0, "b": 140.0}, {("a", "b"): FAST})


def test_more_stages_than_operators() -> None:
    with pytest.raises(NoPlan, match="3 stages were asked for, but there are 2 nodes"):
        solve(pair(), {"a": 1e9, "b": 1e9}, BOTH, stages=3)
    one = networkx.DiGraph()
    one.add_node("only", seconds={"a": 1.0, "b": 1.0})
    with pytest.raises(NoPlan, match="2 stages were asked for, but there are 1 places"):
        solve(one, {"a": 1e9, "b": 1e9}, BOTH, stages=2)


@pytest.mark.parametrize(
    ("graph", "devices", "links", "objective", "message"),
    [
        (networkx.DiGraph([("u", "v"), ("v", "u")]), {"a": 1}, {}, "latency", "cycle: "),
        (networkx.DiGraph(), {"a": 1}, {}, "latency", "no vertex"),
        (pair(), {}, {}, "latency", "no device"),
        (pair(), {"a": 1, "b": 1}, {}, "beauty", "objective 'beauty' is neither"),
        (pair(seconds={"a": 1.0}), {"a": 1, "b": 1}, {}, "latency", "vertex 'second' has no seconds for device 'b'"),
        (pair(seconds={"a": math.nan, "b": 1}), {"a": 1, "b": 1}, {}, "latency", "vertex 'second': seconds on 'a': expected .* got nan"),
        (pair(seconds={"a": -1.0, "b": 1}), {"a": 1, "b": 1}, {}, "latency", "vertex 'second': seconds on 'a': .*got -1.0"),
        (pair(seconds={"a": "1", "b": 1}), {"a": 1, "b": 1}, {}, "latency", "seconds on 'a': expected a number, got '1'"),
        (pair(param_bytes=-1), {"a": 1, "b": 1}, {}, "latency", "vertex 'second': param_bytes: .*got -1"),
        (pair(), {"a": math.nan, "b": 1}, {}, "latency", "device 'a': memory: .*got nan"),
        (pair(), {"a": 1, "b": 1}, {("a", "z"): FAST}, "latency", "link 'a' -> 'z': there is no device 'z'"),
        (pair(), {"a": 1, "b": 1}, {("a", "b"): (0.0, 0.0)}, "latency", "link 'a' -> 'b': bandwidth: expected a positive"),
        (pair(), {"a": 1, "b": 1}, {("a", "b"): (1.0, -1.0)}, "latency", "link 'a' -> 'b': latency: .*got -1.0"),
    ],
)
def test_bad_input_names_the_item(graph: networkx.DiGraph, devices: dict, links: dict, objective: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        solve(graph, devices, links, objective)


def test_edges_need_bytes_and_codecs_must_be_known() -> None:
    graph = pair()
    del graph.edges["first", "second"]["bytes"]
    with pytest.raises(BadInput, match="edge 'first' -> 'second' has no 'bytes'"):
        solve(graph, {"a": 1e9, "b": 1e9}, BOTH)
    with pytest.raises(BadInput, match="codec 'mp3'"):
        solve(pair(), {"a": 1e9, "b": 1e9}, BOTH, codecs=["raw", "mp3"])
    with pytest.raises(BadInput, match="stages must be at least 1, got 0"):
        solve(pair(), {"a": 1e9, "b": 1e9}, BOTH, stages=0)


def test_more_devices_than_can_be_searched_exactly() -> None:
    names = [f"n{k}" for k in range(16)]
    graph = networkx.DiGraph()
    for k in range(10):
        graph.add_node(f"v{k}", seconds={name: 1.0 + d / 100 for d, name in enumerate(names)})
        if k:
            graph.add_edge(f"v{k - 1}", f"v{k}", bytes=1)
    links = dict.fromkeys(itertools.permutations(names, 2), (1e6, 0.0))
    plan = solve(graph, dict.fromkeys(names, math.inf), links, "throughput")
    assert len(plan.stages) > 4
    assert plan.prediction is not None
    assert 1 / plan.prediction.throughput_per_s < 2.4  # some device has to take two operators
    assert 1.0 <= plan.prediction.bound < 2.4
    plan = solve(graph, dict.fromkeys(names, math.inf), links, "throughput", max_stages=2)
    assert len(plan.stages) == 2
