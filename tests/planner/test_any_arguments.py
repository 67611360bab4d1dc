"""Whatever is given to `solve`: a plan, or an error of ours that names what is wrong. And a cycle that is told is one."""

from __future__ import annotations

import math
import re
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_planning import cluster, profile_of, structure

import partitioner
from partitioner.cost import CodecFigures, Overhead
from splitnet.errors import BadInput, SplitnetError
from splitnet.plan import Plan

DEVICES = {"a": math.inf, "b": 4000.0}
LINKS = {("a", "b"): (1e6, 0.001), ("b", "a"): (2e6, 0.001)}


def graph(**changes: Any) -> networkx.DiGraph:
    made = networkx.DiGraph()
    for name, seconds in (("x", 0.01), ("y", 0.02), ("z", 0.03)):
        made.add_node(name, seconds={"a": seconds, "b": 2 * seconds}, param_bytes=100, activation_bytes=10)
    made.add_edge("x", "y", bytes=10)
    made.add_edge("y", "z", bytes=20)
    made.nodes["y"].update(changes)
    return made


LEAVES = st.sampled_from(
    [
        None, True, 0, 1, -1, 3, 1.5, math.nan, math.inf, -math.inf, 10**400, "", "a", "b", "x", "y", "raw", "*", b"a", object(), 1j,
        np.float64("nan"), np.int64(2), np.array([1.0, 2.0]), range(0), range(1, 3), range(5, 1, -1), int, Overhead(), CodecFigures(),
    ]
)  # fmt: skip
HASHABLE = LEAVES.filter(lambda leaf: not isinstance(leaf, np.ndarray))
JUNK = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(HASHABLE | st.tuples(HASHABLE, HASHABLE), inner, max_size=3)
    ),
    max_leaves=6,
)
#: What is nearly right is more likely to be believed.
NEARLY = {
    "devices": st.dictionaries(st.sampled_from(["a", "b", 3, ("a",)]), LEAVES, max_size=2),
    "links": st.dictionaries(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")) | HASHABLE | st.just("ab"),
                             st.tuples(LEAVES, LEAVES) | LEAVES, max_size=2),
    "pin": st.dictionaries(st.sampled_from(["x", "*", 3]), LEAVES, min_size=1, max_size=2),
    "taken": st.dictionaries(st.sampled_from("ab"), st.tuples(LEAVES, LEAVES), min_size=1, max_size=2),
    "forbid": st.dictionaries(st.sampled_from("ab"), st.lists(LEAVES, max_size=2) | LEAVES, min_size=1, max_size=2),
    "link_codecs": st.dictionaries(st.just(("a", "b")), st.lists(LEAVES, max_size=2) | LEAVES, min_size=1),
    "private": st.tuples(st.just("a"), LEAVES),
    "microbatches": st.lists(LEAVES, max_size=2),
    "at": st.lists(LEAVES, max_size=2),
    "overheads": st.dictionaries(st.sampled_from(["a", "b"]) | HASHABLE, LEAVES, max_size=2),
    "codecs": st.dictionaries(st.sampled_from(["raw", "half"]), LEAVES, max_size=2),
}  # fmt: skip
ARGUMENTS = [
    "graph",
    "devices",
    "links",
    "objective",
    "codecs",
    "stages",
    "max_stages",
    "pin",
    "forbid",
    "at",
    "input_at",
    "output_at",
    "private",
    "taken",
    "link_codecs",
    "max_accuracy_loss",
    "overheads",
    "batch",
    "microbatches",
    "tolerance",
]
OF_PLAN = [name for name in ARGUMENTS if name not in ("graph", "devices", "links", "overheads", "batch", "microbatches")] + [
    "profile", "cluster", "nodes", "lossless", "calibration", "margin",
]  # fmt: skip
QUICK = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(QUICK, max_examples=500)
@given(st.data(), st.sampled_from(ARGUMENTS))
def test_any_argument(data: st.DataObject, name: str) -> None:
    junk = data.draw(NEARLY[name] | JUNK if name in NEARLY else JUNK)
    arguments: dict[str, Any] = {"graph": graph(), "devices": DEVICES, "links": LINKS, name: junk}
    try:
        found = partitioner.solve(**arguments)
    except SplitnetError:
        return
    Plan.from_json(found.to_json())


@settings(QUICK, max_examples=200)
@given(JUNK, st.sampled_from(["seconds", "param_bytes", "activation_bytes", "output_bytes", "scope", "bytes", "tensor"]))
def test_any_attribute(junk: Any, key: str) -> None:
    made = graph()
    place = made.edges["x", "y"] if key in ("bytes", "tensor") else made.nodes["z"]
    place[key] = junk
    try:
        found = partitioner.solve(made, DEVICES, LINKS)
    except SplitnetError:
        return
    Plan.from_json(found.to_json())


PROFILE, BOXES = profile_of(structure(2)), cluster({"a": 0, "b": 0})


@settings(QUICK, max_examples=300)
@given(st.data(), st.sampled_from(OF_PLAN))
def test_any_argument_of_plan(data: st.DataObject, name: str) -> None:
    junk = data.draw(NEARLY[name] | JUNK if name in NEARLY else JUNK)
    try:
        found = partitioner.plan(**{"profile": PROFILE, "cluster": BOXES, name: junk})
    except SplitnetError:
        return
    Plan.from_json(found.to_json())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"graph": networkx.Graph([("x", "y")])}, "the graph has no directions"),
        ({"graph": {"x": {}}}, "expected a networkx.DiGraph, got dict"),
        ({"graph": networkx.DiGraph([("x", "y"), ("y", "z"), ("z", "x")])}, "the graph has a cycle: x -> y -> z -> x$"),
        ({"graph": networkx.DiGraph([("x", "x")])}, "the graph has a cycle: x -> x$"),
        ({"links": {("a", "b"): 3.0}}, r"links: expected a mapping \(a, b\) -> \(bytes per second, seconds\), got \('a', 'b'\): 3.0"),
        ({"links": {"ab": (1.0, 1.0)}}, "got 'ab': "),
        ({"forbid": "b"}, "forbid: expected nodes' names"),
        ({"at": "y"}, "at: expected a sequence of operators"),
        ({"stages": 2.0}, "stages: expected a whole number or a range, got 2.0"),
        ({"stages": True}, "got True"),
        ({"overheads": {"c": Overhead()}}, "overheads: there is no device 'c'; there are a, b"),
        ({"overheads": {"a": Overhead(stage_s=-1.0)}}, "stage_s of 'a'"),
        ({"devices": {"a": 10**400}}, "below 1e308"),
    ],
)  # fmt: skip
def test_what_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        partitioner.solve(**{"graph": graph(), "devices": DEVICES, "links": LINKS, **arguments})
    assert re.search(message, caught.value.message), caught.value.message
