"""Which generation takes a call: the noun alone, without a node."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.admission import Admission
from nodes.deployment import Deployment
from nodes.family import Families
from splitnet.errors import AlreadyExists, BadInput, Moved, NotFound
from splitnet.generations import generation_key, parse_key
from splitnet.plan import NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

X = TensorSpec("x", "float32", (1,))


def plan(ingress: str) -> Plan:
    other = "b" if ingress == "a" else "a"
    y, z = dataclasses.replace(X, name="y"), dataclasses.replace(X, name="z")
    return Plan(
        "m",
        "0" * 64,
        "latency",
        (NodeRef("a", "host-a:1"), NodeRef("b", "host-b:1")),
        (StageSpec("s0", ingress, ("f",), (X,), (y,)), StageSpec("s1", other, ("g",), (y,), (z,))),
        (Transfer("", "s0", ("x",)), Transfer("s0", "s1", ("y",)), Transfer("s1", "", ("z",))),
        (X,),
        (OutputSpec("z", z),),
    )


def made(name: str, generation: int, ingress: str = "a", own: str = "a") -> Deployment:
    cut = plan(ingress)
    return Deployment(generation_key(name, generation), cut, cut.sha256, cut.node(own), {}, Admission(4))


@pytest.fixture
async def families() -> Families:
    """Of node a, where generation 1 of "m" serves and 2 is loaded."""
    families = Families({})
    families.add(made("m", 1))
    families.add(made("m", 2), wait=True)
    return families


def states(families: Families) -> dict[str, str]:
    return {key: families.state(deployment) for key, deployment in families.deployments.items()}


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), st.integers(1, 10**8))
def test_a_key_says_name_and_generation(name: str, generation: int) -> None:
    assert parse_key(generation_key(name, generation)) == (name, generation if generation > 1 else 0)


@pytest.mark.parametrize("text", ["m", "m@", "m@x", "m@-1", "m@²", "m@1234567890"])
def test_what_is_no_key_is_a_name(text: str) -> None:
    assert parse_key(text) == (text, 0)


async def test_a_loaded_generation_takes_nothing_until_it_is_switched_to(families: Families) -> None:
    assert {families.enter("m").generation for _ in range(50)} == {1}
    assert families.enter("").name == "m"
    assert families.enter("m@2").generation == 2, "whoever names it gets it"
    assert families.switch("m", 2, 1.0) == 1
    assert {families.enter("m").generation for _ in range(50)} == {2}
    assert states(families) == {"m": "kept", "m@2": "active"}
    assert families.switch("m", 1, 1.0, keep=False) == 2
    assert states(families) == {"m": "active", "m@2": "loaded"}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.99])
async def test_a_canary_gets_its_share_of_any_run_of_calls(families: Families, share: float) -> None:
    families.switch("m", 2, share)
    taken = [families.enter("m").generation for _ in range(3000)]
    for first in range(0, 3000, 300):
        assert abs(Counter(taken[first : first + 300])[2] / 300 - share) < 0.015
    assert states(families) == {"m": "active", "m@2": "canary"}
    families.switch("m", 2, 0.0)
    assert {families.enter("m").generation for _ in range(50)} == {1}


async def test_a_share_that_cannot_be(families: Families) -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="share"):
            families.switch("m", 2, share)
    with pytest.raises(BadInput, match="is the active one"):
        families.switch("m", 1, 0.5)
    families.add(made("m", 3, ingress="b"), wait=True)
    with pytest.raises(BadInput, match="first stage is on the same node"):
        families.switch("m", 3, 0.5)
    with pytest.raises(NotFound):
        families.switch("m", 9, 1.0)
    with pytest.raises(NotFound):
        families.switch("other", 1, 1.0)
    assert states(families) == {"m": "active", "m@2": "loaded", "m@3": "loaded"}


async def test_clients_are_sent_where_the_requests_go_now(families: Families) -> None:
    families.switch("m", 7, 1.0, "host-b:1")
    for name in ("m", "m"):
        with pytest.raises(Moved) as caught:
            families.enter(name)
        assert caught.value.address == "host-b:1"
    for deployment in families.held("m"):
        families.remove(deployment)
    with pytest.raises(Moved):  # nothing is left here but this word
        families.enter("m")
    families.add(made("m", 8), wait=False)  # until it is deployed here again
    assert families.enter("m").generation == 8


async def test_a_node_that_never_took_the_requests_does_not_redirect() -> None:
    families = Families({})
    families.add(made("m", 1, ingress="a", own="b"))
    with pytest.raises(NotFound, match="first stage's node") as caught:
        families.enter("m")
    assert "host-a:1" in caught.value.remedy
    for deployment in families.held("m"):
        families.remove(deployment)
    with pytest.raises(NotFound, match="no deployment"):
        families.enter("m")


async def test_another_plan_does_not_slip_in(families: Families) -> None:
    with pytest.raises(AlreadyExists, match="with another plan"):
        families.check_serving("m", 2)
    families.check_serving("m", 1)
    families.check_serving("new", 1)


async def test_what_is_being_unloaded_is_not_switched_to(families: Families) -> None:
    families.deployments["m@2"].draining = True
    with pytest.raises(NotFound, match="unloaded"):
        families.switch("m", 2, 1.0)
    assert states(families)["m@2"] == "draining"


async def test_a_canary_that_goes_takes_nothing_with_it(families: Families) -> None:
    families.switch("m", 2, 0.5)
    families.remove(families.deployments["m@2"])
    assert {families.enter("m").generation for _ in range(50)} == {1}
