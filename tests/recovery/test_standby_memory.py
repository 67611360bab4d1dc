"""Standbys get their place by the cluster's memory, which is counted."""

from __future__ import annotations

import dataclasses

import pytest
from test_standby_plans import places, plan

from partitioner.standbys import add_standbys
from splitnet.cluster import Cluster, ClusterNode
from splitnet.errors import BadInput, NoPlan
from splitnet.generation_plan import Generation
from splitnet.plan import Plan, Prediction

SIZES = {"one": (1000, 200), "two": (3000, 100)}


def sized(**memory: int) -> Cluster:
    return Cluster(tuple(ClusterNode(n, f"10.0.0.{i}:7001", memory.get(n, 0)) for i, n in enumerate("abcd")), ())


def measured() -> Plan:
    given = plan()
    stages = tuple(dataclasses.replace(s, param_bytes=SIZES[s.name][0], activation_bytes=SIZES[s.name][1]) for s in given.stages)
    used = tuple(node for node in given.nodes if node.name in "ab")
    prediction = Prediction(1, 0.1, 10.0, memory_bytes={"a": 1200, "b": 3100})
    return dataclasses.replace(given, stages=stages, nodes=used, prediction=prediction)


def test_nodes_that_the_plan_does_not_use_take_part_and_what_they_hold_is_said() -> None:
    cluster = sized(a=1500, b=3200, c=2000, d=5000)
    found = add_standbys(measured(), cluster)
    assert places(found) == [("a", ("c",)), ("b", ("d",))]
    assert [node.name for node in found.nodes] == ["a", "b", "c", "d"]
    assert found.prediction is not None
    assert dict(found.prediction.memory_bytes) == {"a": 1200, "b": 3100, "c": 1200, "d": 3100}
    assert "held ready" in found.explain()


def test_what_is_private_to_a_node_has_no_standby() -> None:
    found = add_standbys(measured(), sized(), private_to="a")
    assert [bool(stage.replicas) for stage in found.stages] == [False, True]
    assert found.stages[1].replicas != ("b",)
    assert found.prediction is not None
    assert "no standby for one: what is private to 'a' is for no other node" in found.explain()
    assert places(add_standbys(measured(), sized(), 1, ["a"], private_to="a")) == [("a", ()), ("b", ("a",))]


def test_caches_are_counted() -> None:
    cluster = sized(a=1500, b=3200, c=2000, d=5000)
    generation = Generation(16, 1, 8, {"one": 10, "two": 100})
    with pytest.raises(NoPlan, match=r"stage 'two': it needs 4700 bytes, and 'c', which has the most, has 2000: 2700 bytes are missing"):
        add_standbys(dataclasses.replace(measured(), generation=generation), dataclasses.replace(cluster, nodes=cluster.nodes[:3]))


def test_memory_that_others_take_is_not_there() -> None:
    cluster = sized(a=1500, b=3200, c=2000, d=5000)
    with pytest.raises(NoPlan, match=r"stage 'two': it needs 3100 bytes, and 'c', which has the most, has 2000: 1100 bytes are missing"):
        add_standbys(measured(), cluster, taken_bytes={"d": 4000.0})


def test_only_where_it_was_asked_for() -> None:
    cluster = sized()
    assert places(add_standbys(measured(), cluster, 1, ["d"])) == [("a", ("d",)), ("b", ("d",))]
    with pytest.raises(NoPlan, match="give one node more"):
        add_standbys(measured(), cluster, 1, ["b"])
    with pytest.raises(BadInput, match="no node 'z'"):
        add_standbys(measured(), cluster, 1, ["z"])
    with pytest.raises(BadInput, match="2 replicas cannot be on 1 nodes"):
        add_standbys(measured(), cluster, 2, ["d"])
