from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import BadPlan
from splitnet.plan import CLIENT, Alternative, NodeRef, OutputSpec, Plan, Prediction, StageSpec, Transfer
from splitnet.tensors import TensorSpec


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ("batch", 4))


def diamond() -> Plan:
    """x -> stage0 -> (stage1, stage2) -> stage3, with a skip of x to stage3."""
    x, a, b, c, y = (tensor(name) for name in "xabcy")
    return Plan(
        model="diamond",
        model_sha256="ab" * 32,
        objective="latency",
        nodes=(NodeRef("n0", "127.0.0.1:7001"), NodeRef("n1", "127.0.0.1:7002")),
        stages=(
            StageSpec("stage0", "n0", ("op0",), (x,), (a,), param_bytes=10, seconds=0.5),
            StageSpec("stage1", "n1", ("op1",), (a,), (b,)),
            StageSpec("stage2", "n0", ("op2",), (a,), (c,)),
            StageSpec("stage3", "n1", ("op3",), (x, b, c), (y,)),
        ),
        transfers=(
            Transfer(CLIENT, "stage0", ("x",)),
            Transfer(CLIENT, "stage3", ("x",), bytes=16),
            Transfer("stage0", "stage1", ("a",), codec="zstd"),
            Transfer("stage0", "stage2", ("a",)),
            Transfer("stage1", "stage3", ("b",)),
            Transfer("stage2", "stage3", ("c",)),
            Transfer("stage3", CLIENT, ("y",)),
        ),
        inputs=(x,),
        outputs=(OutputSpec("y", dataclasses.replace(y, name="output")),),
        prediction=Prediction(2, 0.25, 8.0, "n0", 0.2, {"n0": 100}, {"n0->n1": 32}, (Alternative("n0", 0.5, 2.0, True),)),
    )


def test_round_trip() -> None:
    plan = diamond()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).sha256 == plan.sha256


def test_ingress_is_the_first_stages_node() -> None:
    assert diamond().ingress == NodeRef("n0", "127.0.0.1:7001")


def test_shards_are_filled_in_by_name() -> None:
    plan = diamond().with_shards({f"stage{i}": str(i) * 64 for i in range(4)})
    assert [stage.shard[0] for stage in plan.stages] == ["0", "1", "2", "3"]


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(diamond().to_json())
    return loaded


def drop_input(d: dict[str, Any]) -> None:
    d["transfers"] = [t for t in d["transfers"] if t["source"] != "stage1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, this splitnet reads version 1"),
        (lambda d: d.pop("version"), "version None"),
        (lambda d: d.update(stages=[]), "no stage"),
        (lambda d: d.update(max_in_flight=0), "max_in_flight"),
        (lambda d: d.update(surprise=1), "unknown key 'surprise'"),
        (lambda d: d.pop("objective"), "plan.objective: missing"),
        (lambda d: d["stages"][1].update(node="n9"), "'n9', which the plan does not list"),
        (lambda d: d["stages"][1].update(name="stage0"), "stage 'stage0' stands twice"),
        (lambda d: d["stages"][1].update(name=""), "stage has no name|no such stage"),
        (lambda d: d["stages"][0].update(seconds=-1.0), r"plan.stages\[0\].seconds: expected a figure that is not negative"),
        (lambda d: d["stages"][0].update(param_bytes="many"), r"plan.stages\[0\].param_bytes: expected int, got str"),
        (lambda d: d["stages"][0]["inputs"][0].update(dtype="object"), r"plan.stages\[0\].inputs\[0\]: element type 'object'"),
        (lambda d: d["stages"][0]["inputs"][0].update(shape=[-3]), "negative dimension -3"),
        (lambda d: d["transfers"][2].update(source="stage3", target="stage0", tensors=["y"]), "goes backwards"),
        (lambda d: d["transfers"][2].update(source="nobody"), "no such stage"),
        (lambda d: d["transfers"][2].update(tensors=["b"]), "not an output of the source"),
        (lambda d: d["transfers"].append(d["transfers"][2]), "'a' stands twice"),
        (drop_input, "nothing sends 'b' to 'stage3'"),
        (lambda d: d["prediction"]["memory_bytes"].update(n0=-1), r"memory_bytes\['n0'\]"),
    ],
)
def test_faults_are_named(change: Any, message: str) -> None:
    broken = document()
    change(broken)
    with pytest.raises(BadPlan, match=message):
        Plan.from_json(json.dumps(broken))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1', '{"version": 1}', "[" * 100_000, b"\xff\xfe"])
def test_not_a_plan(text: str | bytes) -> None:
    with pytest.raises(BadPlan):
        Plan.from_json(text)


def test_a_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(BadPlan, match=r"nowhere\.json.*\n.*splitnet plan"):
        Plan.load(tmp_path / "nowhere.json")


def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(path for key, child in children for path in paths(child, (*at, key)))]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=JSON_VALUES)
def test_any_change_gives_a_plan_or_a_bad_plan(data: st.DataObject, value: Any) -> None:
    """A hostile document never raises anything but BadPlan."""
    broken = copy.deepcopy(document())
    path = data.draw(st.sampled_from([p for p in paths(broken) if p]))
    parent: Any = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with contextlib.suppress(BadPlan):
        plan = Plan.from_json(json.dumps(broken))
        assert Plan.from_json(plan.to_json()) == plan
