"""Equal nodes, and an answer whose way home is the bottleneck: the search must count it, or it asks for ever for what cannot be."""

from __future__ import annotations

import itertools

import networkx
import pytest

from partitioner.solvers import solve


def test_the_way_home_counts_between_equal_nodes() -> None:
    graph = networkx.DiGraph(name="large answer")
    for k in range(4):
        graph.add_node(f"op{k}", seconds={"a": 0.1, "b": 0.1})
        if k:
            graph.add_edge(f"op{k - 1}", f"op{k}", bytes=10)
    graph.nodes["op3"]["output_bytes"] = 1000
    links = dict.fromkeys(itertools.permutations("ab"), (1000.0, 0.0))
    plan = solve(graph, {"a": 1e9, "b": 1e9}, links, "throughput", stages=2)
    assert plan.prediction is not None
    assert plan.prediction.throughput_per_s == pytest.approx(1.0)
