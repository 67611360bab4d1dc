"""The cost model, by hand."""

from __future__ import annotations

import pytest

from partitioner.cost import BUFFERED_REQUESTS, evaluate
from splitnet.cluster import Link
from splitnet.errors import NoPlan
from splitnet.plan import CLIENT, StageSpec, Transfer


def stage(name: str, node: str, seconds: float, params: int = 0, activations: int = 0) -> StageSpec:
    return StageSpec(name, node, (name,), (), (), params, activations, seconds)


def links(*pairs: str, bandwidth: float = 100.0, latency: float = 0.5) -> dict[tuple[str, str], Link]:
    return {(p[0], p[1]): Link(p[0], p[1], bandwidth, latency) for p in pairs}


def test_a_chain_and_its_return() -> None:
    stages = [stage("s", "a", 2.0, 10, 5), stage("t", "b", 3.0, 20, 7)]
    moves = [Transfer(CLIENT, "s", ("x",), bytes=1000), Transfer("s", "t", ("h",), bytes=50), Transfer("t", CLIENT, ("y",), bytes=10)]
    cost = evaluate(stages, moves, links("ab", "ba"))
    assert cost.latency_s == pytest.approx(2 + 0.5 + 0.5 + 3 + 0.5 + 0.1)
    assert cost.bottleneck == "node b"
    assert cost.throughput_per_s == pytest.approx(1 / 3)
    assert cost.link_bytes == {("a", "b"): 50, ("b", "a"): 10}  # the client's own way to the ingress is not a link
    assert cost.memory_bytes == {"a": 15 + BUFFERED_REQUESTS * 1000, "b": 27 + BUFFERED_REQUESTS * 50}


def test_a_link_can_be_the_bottleneck_and_latency_does_not_count_there() -> None:
    stages = [stage("s", "a", 1.0), stage("t", "b", 1.0)]
    cost = evaluate(stages, [Transfer("s", "t", ("h",), bytes=400)], links("ab", latency=9.0))
    assert cost.bottleneck == "link a->b"
    assert cost.bottleneck_s == 4.0
    assert cost.latency_s == 1 + 9 + 4 + 1
    assert cost.objective_s("latency") == 15
    assert cost.objective_s("throughput") == 4


def test_branches_run_at_the_same_time_on_different_nodes_and_in_turn_on_one() -> None:
    moves = [
        Transfer("root", "left", ("h",), bytes=10),
        Transfer("root", "right", ("h",), bytes=10),
        Transfer("left", "join", ("l",), bytes=10),
        Transfer("right", "join", ("r",), bytes=10),
    ]
    apart = [stage("root", "a", 1.0), stage("left", "b", 4.0), stage("right", "c", 3.0), stage("join", "a", 1.0)]
    cost = evaluate(apart, moves, links("ab", "ac", "ba", "ca"))
    assert cost.latency_s == pytest.approx(1 + 0.6 + 4 + 0.6 + 1)
    assert cost.node_seconds == {"a": 2.0, "b": 4.0, "c": 3.0}
    together = [stage("root", "a", 1.0), stage("left", "b", 4.0), stage("right", "b", 3.0), stage("join", "a", 1.0)]
    cost = evaluate(together, moves, links("ab", "ba"))
    assert cost.latency_s == pytest.approx(1 + 0.6 + 4 + 3 + 0.6 + 1)
    assert cost.node_seconds["b"] == 7.0
    assert cost.bottleneck == "node b"


def test_two_transfers_share_a_link() -> None:
    stages = [stage("s", "a", 1.0), stage("t", "b", 1.0), stage("u", "b", 1.0)]
    moves = [Transfer("s", "t", ("h",), bytes=100), Transfer("s", "u", ("k",), bytes=100)]
    cost = evaluate(stages, moves, links("ab"))
    assert cost.link_seconds == {("a", "b"): 2.0}
    assert cost.latency_s == pytest.approx(max(1 + 0.5 + 1 + 1 + 1, 1 + 2 + 0.5 + 1))


def test_model_inputs_leave_from_the_ingress_at_once() -> None:
    stages = [stage("s", "a", 5.0), stage("t", "b", 1.0)]
    moves = [Transfer(CLIENT, "s", ("x",), bytes=10), Transfer(CLIENT, "t", ("z",), bytes=100), Transfer("s", "t", ("h",), bytes=10)]
    cost = evaluate(stages, moves, links("ab"))
    assert cost.latency_s == pytest.approx(5 + 0.5 + 0.1 + 1)
    assert cost.link_bytes == {("a", "b"): 110}


def test_nothing_to_send_needs_no_link_and_takes_no_time() -> None:
    stages = [stage("s", "a", 1.0), stage("t", "b", 1.0)]
    assert evaluate(stages, [Transfer("s", "t", ("h",), bytes=0)], {}).latency_s == 2.0


def test_a_missing_link_is_named() -> None:
    stages = [stage("s", "a", 1.0), stage("t", "b", 1.0)]
    with pytest.raises(NoPlan, match="stage 's' on node 'a' must send 8 bytes to node 'b', but there is no link 'a' -> 'b'"):
        evaluate(stages, [Transfer("s", "t", ("h",), bytes=8)], links("ba"))
