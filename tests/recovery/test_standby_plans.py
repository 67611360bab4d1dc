"""Who takes over, and where a replica finds room: pure."""

from __future__ import annotations

import dataclasses
import math

import pytest

from splitnet.errors import BadPlan, NoPlan
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.standby import followers, plan_without, with_standbys
from splitnet.tensors import TensorSpec

X, H, Y = (TensorSpec(name, "float32", ("batch", 4)) for name in "xhy")


def plan(*, first: tuple[str, ...] = (), second: tuple[str, ...] = ()) -> Plan:
    return Plan(
        model="m",
        model_sha256="0" * 64,
        objective="latency",
        nodes=tuple(NodeRef(name, f"10.0.0.{i}:7001") for i, name in enumerate("abcd")),
        stages=(
            StageSpec("one", "a", ("f",), (X,), (H,), replicas=first),
            StageSpec("two", "b", ("g",), (H,), (Y,), replicas=second),
        ),
        transfers=(Transfer(CLIENT, "one", ("x",)), Transfer("one", "two", ("h",)), Transfer("two", CLIENT, ("y",))),
        inputs=(X,),
        outputs=(OutputSpec("y", Y),),
    )


def places(found: Plan) -> list[tuple[str, tuple[str, ...]]]:
    return [(stage.node, stage.replicas) for stage in found.stages]


def test_the_first_living_replica_takes_over_and_the_lost_node_stands_last() -> None:
    given = plan(second=("c", "d"))
    assert places(plan_without(given, {"b"}, {"a", "c", "d"})) == [("a", ()), ("c", ("d", "b"))]
    assert places(plan_without(given, {"b"}, {"a", "d"})) == [("a", ()), ("d", ("c", "b"))]
    assert places(plan_without(given, {"b", "c"}, {"a", "c", "d"})) == [("a", ()), ("d", ("c", "b"))]


def test_nothing_moves_that_need_not() -> None:
    given = plan(first=("d",), second=("c",))
    after = plan_without(given, {"b"}, {"a", "c", "d"})
    assert after.stages[0] == given.stages[0]
    assert after.transfers == given.transfers
    assert plan_without(given, {"c"}, {"a", "b", "d"}) == given
    again = plan_without(after, {"c"}, {"a", "b", "d"})  # it has come back meanwhile
    assert places(again) == places(given)


def test_the_ingress_is_followed_in_the_order_of_its_replicas() -> None:
    given = plan(first=("d", "c"))
    assert followers(given) == ("d", "c")
    assert plan_without(given, {"a"}, {"b", "c", "d"}).ingress.name == "d"


def test_what_nobody_holds_is_named() -> None:
    with pytest.raises(NoPlan, match=r"stage 'two' was on node 'b'.*no other node holds it") as caught:
        plan_without(plan(), {"b"}, {"a", "c"})
    assert "splitnet plan --replicas" in caught.value.remedy
    with pytest.raises(NoPlan, match="its replicas c are gone, too"):
        plan_without(plan(second=("c",)), {"b", "c"}, {"a"})


@pytest.mark.parametrize(("replicas", "what"), [(("b",), "its own node"), (("z",), "not listed"), (("c", "c"), "twice")])
def test_replicas_that_cannot_be(replicas: tuple[str, ...], what: str) -> None:
    with pytest.raises(BadPlan, match=what):
        plan(second=replicas)


def test_a_plan_with_replicas_survives_json_and_older_ones_are_read() -> None:
    given = plan(second=("c", "d"))
    assert Plan.from_json(given.to_json()) == given
    assert Plan.from_json(plan().to_json().replace('"replicas": [],', "")) == plan()


def test_replicas_go_where_the_room_is_and_their_memory_is_counted() -> None:
    found = with_standbys(plan(), {"a": 85, "b": 100, "c": 120, "d": 0}, {"one": 90, "two": 80})
    assert places(found) == [("a", ("c",)), ("b", ("a",))]
    everywhere = with_standbys(plan(), dict.fromkeys("abcd", math.inf), {"one": 90, "two": 80}, replicas=3)
    assert [sorted(stage.replicas) for stage in everywhere.stages] == [["b", "c", "d"], ["a", "c", "d"]]


def test_no_room_says_how_much_is_missing() -> None:
    with pytest.raises(NoPlan, match=r"'c', which has the most, has 30: 50 bytes are missing"):
        with_standbys(plan(), {"a": 0, "b": 100, "c": 120, "d": 0}, {"one": 90, "two": 80})
    with pytest.raises(BadPlan, match="4 replicas of every stage need 5 nodes"):
        with_standbys(plan(), {}, {"one": 1, "two": 1}, replicas=4)


def test_no_replicas_is_the_plan_itself() -> None:
    given = dataclasses.replace(plan())
    assert with_standbys(given, dict.fromkeys("abcd", math.inf), {"one": 1, "two": 1}, replicas=0) == given
