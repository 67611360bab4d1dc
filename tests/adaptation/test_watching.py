"""When a plan is switched: the decision alone, by a clock that the test sets, and what is read off the nodes' words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.observing import Observer, identity, price
from partitioner.planning import plan as make_plan
from partitioner.profiling import HERE, Column, Profile
from partitioner.structure import Structure
from partitioner.watching import Judge, Rules
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadCluster, BadInput
from splitnet.node_status import DeploymentStatus, LinkStatus, NodeStatus, StageStatus
from splitnet.plan import Plan

NEAR, FAR = "near", "far"


def play(judge: Judge, bandwidth: Callable[[float], float], until_s: float, every_s: float = 1.0) -> list[float]:
    """Two plans: FAR is good on a fast link, NEAR does not use it. When there were switches."""
    now_s, plan, switches = 0.0, FAR, []
    while now_s < until_s:
        costs = {FAR: 0.02 + 1.0 / bandwidth(now_s), NEAR: 0.05}
        best = min(costs, key=costs.__getitem__)
        if judge.consider(now_s, plan, costs[plan], best, costs[best]).switch:
            judge.switched(now_s, plan, best)
            plan = best
            switches.append(now_s)
        now_s += every_s
    return switches


def test_a_fall_that_lasts_is_followed_once() -> None:
    assert play(Judge(Rules()), lambda t: 100.0 if t < 60 else 5.0, 3600) == [65.0]


def test_a_fall_that_passes_is_not_followed() -> None:
    assert play(Judge(Rules()), lambda t: 5.0 if 60 <= t < 64 else 100.0, 600) == []


@pytest.mark.parametrize("period_s", [2, 6, 9])
def test_a_bandwidth_that_swings_faster_than_is_waited_for_is_left_alone(period_s: int) -> None:
    assert play(Judge(Rules(steady_s=5.0)), lambda t: 100.0 if t % period_s < period_s / 2 else 5.0, 1800) == []


@pytest.mark.parametrize("period_s", [20, 60, 200, 600])
def test_it_does_not_flap(period_s: int) -> None:
    """Each time that it goes back, it waits twice as long: a link that swings for hours causes a dozen switches, and not one per swing."""
    judge = Judge(Rules(pause_s=30.0, longest_pause_s=7200.0, calm_s=14400.0))
    switches = play(judge, lambda t: 100.0 if t % period_s < period_s / 2 else 5.0, 8 * 3600)
    assert 1 <= len(switches) <= 14
    pauses = [b - a for a, b in itertools.pairwise(switches)]
    assert all(pause >= 30 for pause in pauses)
    assert pauses == sorted(pauses) or max(pauses) >= 3600


@given(st.lists(st.floats(0.001, 10.0), min_size=20, max_size=200), st.floats(0.0, 1.0), st.floats(0.0, 20.0), st.floats(0.0, 60.0))
def test_never_two_switches_within_a_pause_and_never_to_what_is_no_better(
    costs: list[float], margin: float, steady_s: float, pause_s: float
) -> None:
    judge = Judge(Rules(margin=margin, steady_s=steady_s, pause_s=pause_s))
    last_s, present = -math.inf, 0
    for now_s, cost_s in enumerate(costs):
        verdict = judge.consider(float(now_s), present, 1.0, 1 - present, cost_s)
        if verdict.switch:
            assert 1.0 / cost_s - 1 >= margin
            assert now_s - last_s >= pause_s
            judge.switched(float(now_s), present, 1 - present)
            last_s, present = float(now_s), 1 - present


def test_a_plan_that_cannot_serve_is_left_at_once() -> None:
    judge = Judge(Rules())
    judge.switched(0.0, "old", "new")
    assert judge.consider(0.1, "new", math.inf, "other", 5.0).switch
    assert not judge.consider(0.2, "new", math.inf, "", math.inf).switch, "where nothing could serve, there is nothing to switch to"


def test_a_switch_that_failed_is_not_tried_again_at_once() -> None:
    judge = Judge(Rules(steady_s=1.0, pause_s=10.0))
    assert [judge.consider(t, "a", 2.0, "b", 1.0).switch for t in (0.0, 1.0)] == [False, True]
    judge.failed(1.0)
    assert next(t for t in range(2, 20) if judge.consider(float(t), "a", 2.0, "b", 1.0).switch) == 11


def test_rules_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="margin"):
        Rules(margin=-1.0)


# ------------------------------------------------------------------------------------------------------- what the nodes say


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of a real module: 8 layers of which the activations between shrink."""
    import torch

    from partitioner.capturing import capture

    torch.manual_seed(0)
    widths = (256, 1024, 1024, 512, 256, 64, 16, 8)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    structure: Structure = capture(torch.nn.Sequential(*layers).eval(), (torch.randn(64, 256),), name="funnel").structure
    seconds = tuple(0.02 if v.param_bytes else 0.0001 for v in structure.vertices)
    return Profile(structure, {HERE: Column(seconds, "made up")}, "cpu", 1, "", 1, sum(seconds), 0.01)


def cluster(bandwidth: float = 50e6) -> Cluster:
    nodes = (ClusterNode("weak", "w:1", reference_s=0.04), ClusterNode("strong", "s:1", reference_s=0.01))
    return Cluster(nodes, tuple(Link(a, b, bandwidth, 0.002) for a, b in (("weak", "strong"), ("strong", "weak"))))


def planned(profile: Profile, where: Cluster) -> Plan:
    return make_plan(profile, where, objective="latency", input_at="weak")


def said(
    node: str, plan: Plan, *, sent: int = 0, goodput: float = 0.0, runs: int = 0, compute_s: float = 0.0, error: str = ""
) -> NodeStatus:
    other = "strong" if node == "weak" else "weak"
    stages = tuple(StageStatus(s.name, "e", runs, 0, 0, 0, runs * compute_s, 0, 0, 0, 0) for s in plan.stages if s.node == node)
    held = DeploymentStatus("m", "m", plan.sha256, node == plan.ingress.name, 16, 0, stages)
    link = LinkStatus(other, "", sent, sent, 1, True, goodput_bytes_per_s=goodput)
    return NodeStatus(node, f"{node[0]}:1", error=error, deployments=() if error else (held,), links=() if error else (link,))


def test_a_plan_is_priced_as_it_was_planned(profile: Profile) -> None:
    plan = planned(profile, cluster())
    assert plan.prediction is not None
    assert price(plan, profile, cluster()) == pytest.approx(plan.prediction.latency_s, rel=0.02)


def test_a_link_that_fell_makes_another_plan_better(profile: Profile) -> None:
    plan = planned(profile, cluster())
    observer = Observer(cluster(), profile)
    observer.look([said("weak", plan), said("strong", plan)], "m", plan, 0.0)
    assert observer.cluster() == cluster()
    observer.look([said("weak", plan, sent=1_000_000, goodput=1e5), said("strong", plan)], "m", plan, 1.0)
    link = observer.cluster().link("weak", "strong")
    assert link is not None
    assert link.bandwidth_bytes_per_s == 1e5
    assert observer.changed() == ["weak->strong: 0.1 MB/s"]
    better = planned(profile, observer.cluster())
    assert identity(better) != identity(plan)
    assert price(better, profile, observer.cluster()) < 0.8 * price(plan, profile, observer.cluster())


def test_a_goodput_without_traffic_is_old_news(profile: Profile) -> None:
    plan = planned(profile, cluster())
    observer = Observer(cluster(), profile)
    for now_s in (0.0, 1.0):
        observer.look([said("weak", plan, sent=5000, goodput=1e6), said("strong", plan)], "m", plan, now_s)
    assert observer.cluster() == cluster()


def test_a_slow_link_that_is_not_used_any_more_is_to_be_probed(profile: Profile) -> None:
    plan = planned(profile, cluster())
    observer = Observer(cluster(), profile)
    observer.probed("weak", "strong", 1e6, 0.02, 0.0)
    assert observer.doubtful(10.0, 30.0) == []
    assert observer.doubtful(31.0, 30.0) == [("weak", "strong")]
    assert ("weak", "strong") not in observer.doubtful(1.0, 5.0, plan), "a plan's links are fresh as long as that"
    observer.probed("weak", "strong", 49e6, 0.002, 32.0)
    assert observer.doubtful(100.0, 30.0) == []


@pytest.mark.parametrize("size", [1, 4])
def test_a_node_that_became_slow_is_seen_whatever_the_clients_send(profile: Profile, size: int) -> None:
    """Batches four times as large make every stage and every transfer four times as large, and no node slower."""
    plan = planned(profile, cluster())
    assert len(plan.stages) == 2, "else this test shows nothing"
    crossing = sum(t.bytes for t in plan.transfers if {t.source, t.target} == {s.name for s in plan.stages} or t.target == "") * 10 * size
    own = {
        s.node: sum(
            profile.on(cluster().node(s.node)).seconds[i] for i, v in enumerate(profile.structure.vertices) if v.name in s.operators
        )
        for s in plan.stages
    }
    observer = Observer(cluster(), profile)
    observer.look([said("weak", plan), said("strong", plan)], "m", plan, 0.0)
    slow = [
        said("weak", plan, sent=crossing, runs=10, compute_s=own["weak"] * size),
        said("strong", plan, runs=10, compute_s=3 * own["strong"] * size),
    ]
    observer.look(slow, "m", plan, 1.0)
    seconds = {
        node: sum(observer.profile().columns[node].seconds) / sum(profile.on(cluster().node(node)).seconds) for node in ("weak", "strong")
    }
    assert seconds == {"weak": 1.0, "strong": pytest.approx(3.0, rel=0.05)}


def test_nodes_that_do_not_answer_are_not_planned_with(profile: Profile) -> None:
    plan = planned(profile, cluster())
    observer = Observer(cluster(), profile)
    observer.look([said("weak", plan), said("strong", plan, error="connection refused")], "m", plan, 0.0)
    assert [node.name for node in observer.cluster().nodes] == ["weak"]
    assert math.isinf(price(plan, profile, observer.cluster()))
    alone = planned(profile, observer.cluster())
    assert {stage.node for stage in alone.stages} == {"weak"}
    observer.look([said("weak", plan, error="x"), said("strong", plan, error="x")], "m", plan, 1.0)
    with pytest.raises(BadCluster, match="no node answers"):
        observer.cluster()
