"""How few plans the pictures of what else could be planned take, and that these are enough."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from partitioner.drawing import draw, studies
from partitioner.drawing.pages import pictures
from partitioner.drawing.studies import sweep
from partitioner.drawing.timeline import timeline
from partitioner.planning import plan
from partitioner.profiling import HERE, Column, Profile
from partitioner.structure import Structure, Vertex
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.plan import OutputSpec, Plan
from splitnet.tensors import TensorSpec

MBIT_S = [1e6 * m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]


def chain(count: int, size: int = 100_000) -> Profile:
    spec = TensorSpec("x", "float32", ("batch", size // 4))
    vertices = [Vertex("x", "input", (spec,), value_bytes=(size,), activation_bytes=size)]
    params = {f"w{k}": 1000 for k in range(count)}
    for k in range(count):
        out, value = TensorSpec(f"op{k}", "float32", ("batch", size // 4)), vertices[-1].values[0].name
        scope = f"layers.{k // 20}.{k % 20}"
        vertices.append(Vertex(out.name, "aten.linear.default", (out,), (value,), (f"w{k}",), 1000, (size,), 2 * size, scope=scope))
    outputs = (OutputSpec(f"op{count - 1}", TensorSpec("y", "float32", ("batch", size // 4))),)
    structure = Structure("chain", "0" * 64, 1, tuple(vertices), (spec,), outputs, params, symbols={"batch": 1})
    seconds = (0.0, *(0.002 for _ in range(count)))
    return Profile(structure, {HERE: Column(seconds, "given")}, "a test", 1, "2", 1, sum(seconds), reference_s=0.01)


def boxes(count: int, bandwidth: float = 1e7) -> Cluster:
    speeds = (0.2, 0.5, 1.0, 1.5, 2.0, 4.0)  # six kinds
    nodes = tuple(ClusterNode(f"n{k}", f"10.0.0.{k + 1}:7000", reference_s=0.01 * speeds[k % 6]) for k in range(count))
    return Cluster(nodes, tuple(Link(a.name, b.name, bandwidth, 1e-4) for a, b in itertools.permutations(nodes, 2)))


class Counted:
    def __init__(self) -> None:
        self.plans = 0
        self.stages: list[int] = []

    def __call__(self, *material: Any, **options: Any) -> Plan:
        self.plans += 1
        made = plan(*material, **options)
        self.stages.append(len(made.stages))
        return made


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_sweep_gives_what_planning_each_bandwidth_gives(objective: str) -> None:
    profile, cluster = chain(12), boxes(3)
    chosen, counted = plan(profile, cluster, objective=objective), Counted()
    quick = sweep(chosen, profile, cluster, counted, MBIT_S)
    each = [point for bits in MBIT_S for point in sweep(chosen, profile, cluster, plan, [bits])]
    assert [point.bandwidth_bits_per_s for point in quick] == MBIT_S
    assert [point.shares for point in quick] == [point.shares for point in each]
    assert [point.objective_s for point in quick] == pytest.approx([point.objective_s for point in each], rel=1e-9)
    assert counted.plans < len(MBIT_S)


def test_one_node_is_the_best_at_every_bandwidth_and_two_plans_show_it() -> None:
    profile, cluster = chain(4), boxes(2)
    counted = Counted()
    points = sweep(plan(profile, cluster), profile, cluster, counted, MBIT_S)
    assert {share.node for point in points for share in point.shares} == {"n0"}
    assert (len(points), counted.plans) == (len(MBIT_S), 2)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_of_a_large_model_few_plans_are_made_and_the_picture_says_so(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 operators on 64 nodes take seconds for each plan; here 20 on 8 count as many."""
    profile, cluster, counted = chain(20), boxes(8, bandwidth=1e8), Counted()
    chosen = plan(profile, cluster, objective=objective)
    monkeypatch.setattr(studies, "_LARGE", 20 * 8)
    panels = pictures(chosen, profile, cluster, counted).panels
    assert counted.plans <= 2 * 2 + 4
    assert max(counted.stages) <= 4
    front, swept = panels[-2:]
    assert "the best for throughput with 2, 4 stages" in front.note
    assert "A plan of 21 operators on 8 nodes takes seconds" in front.note
    assert "at most 4 stages here" in swept.note
    assert len(swept.table) == 1 + 4
    monkeypatch.setattr(studies, "_LARGE", 21 * 8)
    assert all("left out" not in panel.note for panel in pictures(chosen, profile, cluster, plan).panels[-2:])


def test_the_timeline_of_a_full_pipeline_is_at_the_predicted_pace() -> None:
    """Kept busy, the nodes compute twice as long as alone."""
    profile, cluster = chain(6), boxes(3, bandwidth=1e9)
    profile = dataclasses.replace(profile, columns={HERE: dataclasses.replace(profile.columns[HERE], sustained=2.0)})
    chosen = plan(profile, cluster, objective="throughput", stages=2)
    assert chosen.prediction is not None
    alone, full = timeline(chosen, cluster, profile).parts
    assert full.played.throughput_per_s == pytest.approx(chosen.prediction.throughput_per_s, rel=0.01)
    assert alone.played.requests[0].latency_s == pytest.approx(chosen.prediction.latency_s, rel=1e-6)


def test_the_legend_names_every_kind_of_bar(tmp_path: Path) -> None:
    cluster = boxes(2, bandwidth=1e9)
    busy = dataclasses.replace(cluster, nodes=tuple(dataclasses.replace(n, message_s=1e-3, request_s=1e-3) for n in cluster.nodes))
    chosen = plan(chain(4), busy, stages=2)
    for there, words in ((cluster, {"computes", "sends"}), (busy, {"accepts", "computes", "hands over", "sends", "takes in"})):
        draw(chosen, tmp_path / "plan.svg", cluster=there)
        text = (tmp_path / "plan.svg").read_text()
        assert {word for word in ("accepts", "computes", "hands over", "sends", "takes in", "encodes") if f">{word}<" in text} == words
