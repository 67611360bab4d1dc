"""Planning from a profile and a cluster, on structures written by hand (the profile's figures are given, not measured)."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from partitioner.layout import lay_out
from partitioner.planning import plan
from partitioner.profiling import HERE, Column, Profile
from partitioner.structure import Structure, Vertex
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadCluster, BadInput, BadModel, NoPlan
from splitnet.plan import OutputSpec, Plan
from splitnet.tensors import TensorSpec

MIB = 1 << 20


def structure(depth: int = 6, *, width: int = 1024, param_bytes: int = MIB, skip: bool = True) -> Structure:
    """A residual chain: each block is two operators, and its input is added to its output."""
    size = 4 * width
    vertices = [Vertex("x", "input", (TensorSpec("x", "float32", ("batch", width)),), value_bytes=(size,), activation_bytes=size)]
    params = {}
    current = "x"
    for k in range(depth):
        params[f"w{k}"] = param_bytes
        spec = TensorSpec(f"linear{k}", "float32", ("batch", width))
        vertices.append(
            Vertex(spec.name, "aten.linear.default", (spec,), (current,), (f"w{k}",), param_bytes, (size,), 2 * size, scope=f"block.{k}")
        )
        total = TensorSpec(f"add{k}", "float32", ("batch", width))
        uses = (spec.name, current) if skip else (spec.name,)
        vertices.append(Vertex(total.name, "aten.add.Tensor", (total,), uses, (), 0, (size,), 3 * size, scope=f"block.{k}"))
        current = total.name
    return Structure(
        name="Residual",
        sha256="0" * 64,
        batch=1,
        vertices=tuple(vertices),
        inputs=vertices[0].values,
        outputs=(OutputSpec(current, TensorSpec("y", "float32", ("batch", width))),),
        param_sizes=params,
        symbols={"batch": 1},
    )


def profile_of(model: Structure, linear_s: float = 0.010, add_s: float = 0.001) -> Profile:
    seconds = tuple(0.0 if v.op == "input" else linear_s if "linear" in v.op else add_s for v in model.vertices)
    return Profile(model, {HERE: Column(seconds, "measured here")}, "a test", 1, "2", 1, math.fsum(seconds), reference_s=0.010)


def cluster(memory: dict[str, int], speed: dict[str, float] | None = None, bandwidth: float = 1e8, latency: float = 1e-4) -> Cluster:
    nodes = tuple(
        ClusterNode(n, f"127.0.0.1:{7000 + k}", m, reference_s=0.010 * (speed or {}).get(n, 1.0)) for k, (n, m) in enumerate(memory.items())
    )
    return Cluster(nodes, tuple(Link(a, b, bandwidth, latency) for a, b in itertools.permutations(memory, 2)))


def test_latency_prefers_one_machine_and_says_so() -> None:
    chosen = plan(profile_of(structure()), cluster({"a": 0, "b": 0, "c": 0}, {"b": 0.5}))
    assert [stage.node for stage in chosen.stages] == ["b"]
    assert chosen.prediction is not None
    assert chosen.prediction.latency_s == pytest.approx(6 * 0.011 / 2)
    assert chosen.prediction.bound == pytest.approx(chosen.prediction.latency_s)
    assert "One machine alone is best for latency: 'b'" in chosen.explain()
    assert [a.fits for a in chosen.prediction.alternatives] == [True, True, True]
    assert Plan.from_json(chosen.to_json()) == chosen


def test_throughput_uses_all_machines() -> None:
    chosen = plan(profile_of(structure()), cluster({"a": 0, "b": 0, "c": 0}), objective="throughput")
    assert len(chosen.stages) == 3
    assert chosen.prediction is not None
    assert chosen.prediction.throughput_per_s == pytest.approx(1 / 0.022)
    assert "Splitting pays: 3.00x the throughput" in chosen.explain()
    assert "optimal" in chosen.explain()


def test_slow_links_make_splitting_useless() -> None:
    chosen = plan(profile_of(structure()), cluster({"a": 0, "b": 0}, bandwidth=1e4), objective="throughput")
    assert len(chosen.stages) == 1


def test_memory_forces_a_split_and_is_kept() -> None:
    limits = {"a": 3 * MIB + MIB // 2, "b": 4 * MIB}
    chosen = plan(profile_of(structure()), cluster(limits))
    assert len(chosen.stages) == 2
    assert chosen.prediction is not None
    assert all(size <= limits[node] for node, size in chosen.prediction.memory_bytes.items())
    assert not any(a.fits for a in chosen.prediction.alternatives)
    assert "fits on no single node" in chosen.explain()
    assert "a->b" in chosen.explain() or "b->a" in chosen.explain()


def test_the_plan_is_what_the_layout_makes_of_it() -> None:
    model = structure()
    chosen = plan(profile_of(model), cluster({"a": 0, "b": 0, "c": 0}), stages=3)
    layout = lay_out(model, {name: k for k, stage in enumerate(chosen.stages) for name in stage.operators})
    assert [s.inputs for s in layout.stages] == [s.inputs for s in chosen.stages]
    assert [s.outputs for s in layout.stages] == [s.outputs for s in chosen.stages]
    assert layout.transfers({k: s.name for k, s in enumerate(chosen.stages)}) == chosen.transfers
    assert [s.activation_bytes for s in layout.stages] == [s.activation_bytes for s in chosen.stages]


def test_cuts_avoid_the_inside_of_a_block() -> None:
    chosen = plan(profile_of(structure()), cluster({"a": 0, "b": 0}), stages=2, objective="throughput")
    assert chosen.stages[1].operators[0].startswith("linear")  # one tensor crosses; inside a block there are two


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_no_split_is_predicted_better_than_the_plan(objective: str) -> None:
    """Against every two cuts on every three nodes in order, laid out and evaluated exactly."""
    model = structure(4)
    measured, boxes = profile_of(model), cluster({"a": 0, "b": 3 * MIB, "c": 0}, {"a": 1.5, "b": 0.4, "c": 1.0}, bandwidth=2e6)

    def reached(p: Plan) -> float:
        assert p.prediction is not None
        return p.prediction.latency_s if objective == "latency" else 1 / p.prediction.throughput_per_s

    best = reached(plan(measured, boxes, objective=objective))
    names = [v.name for v in model.vertices[2:]]
    tried = 0
    for count in (1, 2):
        for cuts in itertools.combinations(names, count):
            for order in itertools.permutations("abc", count + 1):
                try:
                    other = reached(plan(measured, boxes, objective=objective, at=cuts, nodes=order))
                except NoPlan:
                    continue
                tried += 1
                assert best <= other + 1e-12, (cuts, order)
    assert tried > 50


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("speed", [{}, {"b": 0.5, "c": 3.0}])
def test_of_a_simple_chain_the_plan_is_proven_to_be_the_best(objective: str, speed: dict[str, float]) -> None:
    """However many stages are asked for; and no cut by hand on any nodes in any order is below the bound."""
    profile, nodes = profile_of(structure(5, skip=False)), cluster({"a": 0, "b": 0, "c": 0}, speed)
    found = plan(profile, nodes, objective=objective, stages=2)
    assert found.prediction is not None
    best_s = found.prediction.latency_s if objective == "latency" else 1 / found.prediction.throughput_per_s
    assert found.prediction.bound == pytest.approx(best_s, rel=1e-9)
    for order in itertools.permutations(["a", "b", "c"], 2):
        for k in range(1, 5):
            other = plan(profile, nodes, objective=objective, at=[f"linear{k}"], nodes=order).prediction
            assert other is not None
            assert (other.latency_s if objective == "latency" else 1 / other.throughput_per_s) >= found.prediction.bound * (1 - 1e-9)


def test_cuts_by_hand() -> None:
    chosen = plan(profile_of(structure()), cluster({"a": 0, "b": 0, "c": 0}), at=["linear2", "add4"], nodes=["c", "a", "b"])
    assert [stage.node for stage in chosen.stages] == ["c", "a", "b"]
    assert [stage.operators[0] for stage in chosen.stages] == ["linear0", "linear2", "add4"]
    assert chosen.ingress.name == "c"
    assert [(stage.first, stage.last) for stage in chosen.stages] == [
        ("block.0", "block.1"),
        ("block.2", "block.4"),
        ("block.4", "block.5"),
    ]
    assert "block.2" in chosen.explain()
    with pytest.raises(BadInput, match="no operator 'linear99'"):
        plan(profile_of(structure()), cluster({"a": 0, "b": 0}), at=["linear99"])
    with pytest.raises(BadInput, match="2 cuts make 3 stages, but there are 2 nodes"):
        plan(profile_of(structure()), cluster({"a": 0, "b": 0}), at=["linear2", "linear3"])
    with pytest.raises(BadInput, match="in the model's order"):
        plan(profile_of(structure()), cluster({"a": 0, "b": 0, "c": 0}), at=["linear3", "linear2"])
    with pytest.raises(NoPlan, match=r"node 'a' needs 5\.0 MiB and has 3.0 MiB"):
        plan(profile_of(structure()), cluster({"a": 3 * MIB, "b": 0}), at=["linear5"])


def test_forbidden_nodes_are_left_out() -> None:
    boxes = cluster({"a": 0, "b": 0}, {"b": 0.1})
    assert plan(profile_of(structure()), boxes, forbid=["b"]).stages[0].node == "a"
    with pytest.raises(NoPlan, match="every node"):
        plan(profile_of(structure()), boxes, forbid=["a", "b"])
    with pytest.raises(BadCluster, match="no node 'z'"):
        plan(profile_of(structure()), boxes, forbid=["z"])


def test_too_little_memory_anywhere() -> None:
    with pytest.raises(NoPlan, match=r"memory are missing; in the arrangement that lacks least, node '[ab]'"):
        plan(profile_of(structure()), cluster({"a": 2 * MIB, "b": 2 * MIB}))


def test_requests_in_flight_fit_into_memory() -> None:
    model = structure(4, width=MIB // 4)  # 1 MiB per tensor
    roomy = plan(profile_of(model), cluster({"a": 0, "b": 0}), stages=2)
    tight = plan(profile_of(model), cluster({"a": 14 * MIB, "b": 14 * MIB}, bandwidth=1e9), stages=2)
    assert roomy.max_in_flight == 16
    assert 2 <= tight.max_in_flight < 10


def test_a_profile_survives_json_and_scales() -> None:
    measured = profile_of(structure())
    node = ClusterNode("pi", "10.0.0.1:7000", reference_s=0.040)
    assert measured.on(node).seconds[1] == pytest.approx(0.040)
    assert measured.on(node).how.startswith("scaled by the reference kernel: 4x")
    assert "not measured" in measured.on(ClusterNode("new", "10.0.0.2:7000")).how
    wide = measured.for_cluster(cluster({"a": 0}, {"a": 2.0}))
    again = Profile.from_json(wide.to_json())
    assert again == wide
    assert again.sha256 == wide.sha256 != measured.sha256
    assert again.columns["a"].how.startswith("scaled")


def test_bad_profiles_are_refused() -> None:
    text = profile_of(structure()).to_json()
    with pytest.raises(BadModel, match="version 9, this splitnet reads version 1"):
        Profile.from_json(text.replace('\n "version": 1', '\n "version": 9'))
    with pytest.raises(BadModel, match="not a profile"):
        Profile.from_json("[1, 2]")
    with pytest.raises(BadModel, match="operator 'linear0' has nan seconds"):
        Profile.from_json(text.replace("0.01,", "NaN,", 1))
    with pytest.raises(BadModel, match="cannot read the profile"):
        Profile.load("/no/such/profile.json")


def test_six_hundred_operators_plan_in_seconds() -> None:
    model = structure(300)
    chosen = plan(profile_of(model), cluster({"a": 0, "b": 0, "c": 0}), objective="throughput")
    assert len(chosen.stages) == 3
    assert chosen.prediction is not None
    assert chosen.prediction.throughput_per_s == pytest.approx(3 / (300 * 0.011), rel=0.02)


def test_throughput_is_predicted_with_what_a_busy_node_takes_and_latency_with_what_one_request_finds() -> None:
    model = profile_of(structure(2, skip=True), 0.009, 0.001)
    column = dataclasses.replace(model.columns[HERE], sustained=1.5)
    model = dataclasses.replace(model, columns={HERE: column, "a": column})
    node = ClusterNode("a", "10.0.0.1:7001", request_s=1e-3, stage_cpu_s=2e-3, message_cpu_s=1e-3, request_cpu_s=3e-3, cores=1)
    for objective in ("latency", "throughput"):
        made = plan(model, Cluster((node,)), objective=objective).prediction
        assert made is not None
        assert made.latency_s == pytest.approx(0.020 + 1e-3)
        assert 1 / made.throughput_per_s == pytest.approx(0.020 * 1.5 + 2e-3 + 3e-3)
        (alone,) = made.alternatives
        assert (alone.latency_s, alone.throughput_per_s) == pytest.approx((made.latency_s, made.throughput_per_s))
        assert sum(s.seconds for s in plan(model, Cluster((node,)), objective=objective).stages) == pytest.approx(0.020)


def test_near_the_break_even_one_node_is_chosen_and_the_plan_says_why() -> None:
    """The second node is 25 times as slow: it can take a twenty-sixth of the work."""
    model, nodes = profile_of(structure(30), 0.010, 0.0), cluster({"a": 0, "b": 0}, {"b": 25.0}, bandwidth=1e12, latency=0.0)
    eager = plan(model, nodes, objective="throughput", margin=0.0, tolerance=0.0)
    assert len(eager.stages) == 2
    made = plan(model, nodes, objective="throughput", tolerance=0.0)
    assert [stage.node for stage in made.stages] == ["a"]
    assert made.prediction is not None
    assert "only 3.3% better than node 'a' alone" in made.prediction.note
    assert made.prediction.bound < 1 / made.prediction.throughput_per_s  # what was passed over stays in the gap
    assert len(plan(model, nodes, objective="throughput", stages=2).stages) == 2  # asked for in so many words
