"""Layouts: what is sent is the least that can be, sizes are read where they stand, and errors say what is wrong."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.crossing import crossing_bytes
from partitioner.layout import lay_out
from partitioner.recompute import choose, data_inputs
from partitioner.sizes import find_sources
from partitioner.structure import Structure, Vertex
from splitnet.errors import BadModel, BadPlan, CaptureError
from splitnet.plan import OutputSpec
from splitnet.tensors import TensorSpec


def value(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape or ("batch", 4))


def structure(
    *vertices: Vertex, outputs: tuple[str, ...], sizes: dict[str, str] | None = None, params: dict[str, int] | None = None
) -> Structure:
    specs = {spec.name: spec for v in vertices for spec in v.values}
    return Structure(
        name="model", sha256="0" * 64, batch=2, vertices=vertices, inputs=tuple(v.values[0] for v in vertices if v.op == "input"),
        outputs=tuple(OutputSpec(o, TensorSpec(f"out.{o}", "float32", specs[o].shape)) for o in outputs),
        sizes=sizes or {}, symbols={"batch": 2}, param_sizes=params or {},
    )  # fmt: skip


def vertex(
    name: str, *inputs: str, size: int = 8, cheap: bool = False, op: str = "aten.relu.default", shape: tuple[int | str, ...] = ()
) -> Vertex:
    return Vertex(name, op, (value(name, *shape),), inputs, value_bytes=(size,), cheap=cheap)


MASKED = structure(
    vertex("ids", op="input", size=100),
    vertex("mask", "ids", size=10, cheap=True),  # small, made from large
    vertex("wide", "mask", size=1000, cheap=True),  # large, made from small
    vertex("a", "ids", size=500),
    vertex("b", "a", "wide", size=500),
    vertex("c", "b", "wide", size=500),
    outputs=("c",),
)  # fmt: skip


def test_the_small_value_is_sent_and_the_large_one_made_again() -> None:
    layout = lay_out(MASKED, {"mask": 0, "wide": 0, "a": 0, "b": 0, "c": 1})
    first, second = layout.stages
    assert [s.name for s in second.inputs] == ["mask", "b"]
    assert second.executed == ("wide", "c")
    assert second.recomputed == ("wide",)
    assert [s.name for s in first.outputs] == ["mask", "b"]
    assert [(f.source, f.target, f.tensors, f.bytes) for f in layout.flows] == [
        (None, 0, ("ids",), 100), (0, 1, ("mask", "b"), 510), (1, None, ("c",), 500),
    ]  # fmt: skip
    assert crossing_bytes(MASKED) == [100, 100, 100, 100, 510, 510, 0]


def test_a_cheap_operator_that_nobody_needs_there_is_not_run_there() -> None:
    layout = lay_out(MASKED, {"mask": 0, "wide": 0, "a": 0, "b": 1, "c": 1})
    assert layout.stages[0].executed == ("mask", "a")
    assert layout.stages[0].operators == ("mask", "wide", "a")


def test_a_stage_of_cheap_operators_alone_is_empty_and_may_be_left_out() -> None:
    assignment = {"mask": 0, "wide": 1, "a": 2, "b": 2, "c": 2}
    layout = lay_out(MASKED, assignment)
    assert layout.empty == (0, 1)
    assert len(layout.stages) == 1
    without = lay_out(MASKED, {name: stage for name, stage in assignment.items() if stage == 2})
    assert without.stages == layout.stages
    assert without.flows == layout.flows


def test_unknown_and_missing_operators() -> None:
    with pytest.raises(BadPlan, match="no operator 'z'"):
        lay_out(MASKED, {"z": 0})
    with pytest.raises(BadPlan, match="'b' is on no stage"):
        lay_out(MASKED, {"a": 0, "c": 0})


def test_stages_that_wait_for_each_other() -> None:
    with pytest.raises(CaptureError, match="wait for each other"):
        lay_out(MASKED, {"mask": 0, "wide": 0, "a": 0, "b": 1, "c": 0})


def test_branches_go_directly_from_stage_to_stage() -> None:
    model = structure(
        vertex("x", op="input"), vertex("stem", "x"), vertex("left", "stem"), vertex("right", "stem"), vertex("join", "left", "right", "stem"),
        outputs=("join", "right"),
    )  # fmt: skip
    layout = lay_out(model, {"stem": 0, "left": 1, "right": 2, "join": 3})
    assert [(f.source, f.target, f.tensors) for f in layout.flows] == [
        (None, 0, ("x",)), (0, 1, ("stem",)), (0, 2, ("stem",)), (0, 3, ("stem",)), (1, 3, ("left",)), (2, 3, ("right",)),
        (2, None, ("right",)), (3, None, ("join",)),
    ]  # fmt: skip


def test_a_stage_without_inputs_is_triggered_by_the_smallest_input() -> None:
    model = structure(
        vertex("big", op="input", size=100), vertex("small", op="input", size=4), vertex("p", size=64, cheap=True), vertex("y", "big"), outputs=("p", "y"),
    )  # fmt: skip
    layout = lay_out(model, {"p": 1, "y": 0})
    assert [s.name for s in next(s for s in layout.stages if s.index == 1).inputs] == ["small"]


SIZED = structure(
    vertex("x", op="input", shape=("batch", "length")),
    Vertex("n", "size", (TensorSpec("n", "int64", ()),), ("x",), value_bytes=(8,), cheap=True),
    vertex("fixed", "x", shape=(3, 3)),
    vertex("half", "x", shape=("2*batch + 1", 3)),
    vertex("use", "fixed", "n", shape=("batch", 3)),
    outputs=("use", "half"), sizes={"n": "batch"},
)  # fmt: skip


def test_a_size_is_read_from_a_shape_that_is_there() -> None:
    layout = lay_out(SIZED, {"n": 0, "fixed": 0, "half": 0, "use": 0})
    assert [(s.text, s.value, s.axis) for s in layout.stages[0].size_sources] == [("batch", "x", 0)]
    assert find_sources([value("h", "2*batch + 1")])["batch"].scale == 2
    assert find_sources([value("h", "2*batch - 1")])["batch"].offset == -1
    assert "batch" not in find_sources([value("h", "(batch // 2)")])


def test_a_size_that_stands_nowhere_is_sent_as_a_number() -> None:
    layout = lay_out(SIZED, {"n": 0, "fixed": 0, "half": 0, "use": 1})
    assert [s.name for s in layout.stages[1].inputs] == ["n", "fixed"]
    assert [s.name for s in layout.stages[0].outputs] == ["n", "fixed", "half"]


def test_a_size_that_nobody_before_has_comes_with_the_input() -> None:
    layout = lay_out(SIZED, {"n": 1, "fixed": 0, "half": 0, "use": 1})
    assert [s.name for s in layout.stages[1].inputs] == ["x", "fixed"]


# ------------------------------------------------------------------------------------------------------------ by brute force


def random_structure(rng: random.Random) -> Structure:
    vertices = [vertex(f"x{i}", op="input", size=rng.randint(1, 20)) for i in range(rng.randint(1, 2))]
    cheap = {v.name for v in vertices}
    for i in range(rng.randint(2, 9)):
        used = tuple(v.name for v in rng.sample(vertices, min(len(vertices), rng.randint(0 if i else 1, 3))))
        is_cheap = set(used) <= cheap and rng.random() < 0.7
        vertices.append(vertex(f"v{i}", *used, size=rng.randint(1, 20), cheap=is_cheap or not used))
        cheap |= {f"v{i}"} if is_cheap or not used else set()
    return structure(*vertices, outputs=(vertices[-1].name,))


@given(st.integers(0, 1 << 32))
def test_what_is_received_is_the_least(seed: int) -> None:
    rng = random.Random(seed)
    model = random_structure(rng)
    names = [v.values[0].name for v in model.vertices]
    needed = rng.sample(names, min(len(names), 2))
    present = {n for n in names if rng.random() < 0.2}
    closed = {n for n in names if model.producer[n].cheap and rng.random() < 0.3}
    choice = choose(model, needed, present, lambda v: v not in closed)

    def suffices(received: set[str]) -> bool:
        pending, seen = list(needed), set()
        while pending:
            name = pending.pop()
            if name in received or name in present or name in seen:
                continue
            seen.add(name)
            if not model.producer[name].cheap:
                return False
            pending += data_inputs(model, model.producer[name])
        return True

    open_values = [n for n in names if n not in closed and n not in present]
    best = min(
        sum(model.value_bytes[n] for n in chosen)
        for size in range(len(open_values) + 1)
        for chosen in itertools.combinations(open_values, size)
        if suffices(set(chosen))
    )
    assert suffices(set(choice.received))
    assert not choice.received & (closed | present)
    assert sum(model.value_bytes[n] for n in choice.received) == best


@given(st.integers(0, 1 << 32))
def test_crossing_bytes_are_those_of_the_layout(seed: int) -> None:
    model = random_structure(random.Random(seed))
    crossing = crossing_bytes(model)
    assert len(crossing) == len(model.vertices) + 1
    for cut in range(len(model.vertices)):
        layout = lay_out(model, {v.name: int(at >= cut) for at, v in enumerate(model.vertices) if v.op != "input"})
        behind = {s.index: sum(model.value_bytes[i.name] for i in s.inputs) for s in layout.stages}.get(1, 0)
        triggered = any(
            s.index == 1 and not any(i.name in v.inputs for i in s.inputs for v in model.vertices if v.name in s.executed)
            for s in layout.stages
        )
        if not triggered:
            assert crossing[cut] == behind


@given(st.integers(0, 1 << 32))
def test_every_value_is_there_before_it_is_used(seed: int) -> None:
    rng = random.Random(seed)
    model = random_structure(rng)
    stage: dict[str, int] = {}
    for v in model.vertices:
        if v.op != "input":
            earliest = max((stage.get(model.producer[i].name, 0) for i in v.inputs), default=0)
            stage[v.name] = min(3, earliest + rng.randint(0, 1))
    layout = lay_out(model, stage)
    assert layout == lay_out(model, dict(reversed(stage.items())))
    for s in layout.stages:
        there = {i.name for i in s.inputs}
        for name in s.executed:
            assert set(model.vertex[name].inputs) <= there
            there |= {spec.name for spec in model.vertex[name].values}
        assert {o.name for o in s.outputs} <= there
    received = [(f.target, t) for f in layout.flows for t in f.tensors]
    assert len(received) == len(set(received))
    owners = {s.index: s for s in layout.stages}
    for f in layout.flows:
        if f.source is not None:
            assert {spec.name for spec in owners[f.source].outputs} >= set(f.tensors)


# --------------------------------------------------------------------------------------------------------------- the document


def test_structure_survives_json() -> None:
    assert Structure.from_json(MASKED.to_json()) == MASKED
    for text, message in (
        ("{}", "version None"), ("[]", "AttributeError"), ("nonsense", "JSONDecodeError"), (MASKED.to_json().replace('"ids"', '"idz"', 1), "model inputs"),
    ):  # fmt: skip
        with pytest.raises(BadModel, match=message):
            Structure.from_json(text)


def test_the_graph_carries_what_planning_needs() -> None:
    graph = MASKED.graph()
    assert graph.nodes["b"]["activation_bytes"] == 0
    assert graph.nodes["mask"]["cheap"]
    assert graph.edges["wide", "b"]["bytes"] == 1000
    assert set(graph.nodes["a"]) >= {"param_bytes", "activation_bytes", "output_bytes", "flops", "op"}


def test_a_structure_that_does_not_hold_together() -> None:
    with pytest.raises(BadModel, match="'nothing'"):
        structure(vertex("x", op="input"), vertex("y", "nothing"), outputs=("y",))
    with pytest.raises(BadModel, match="twice"):
        structure(vertex("x", op="input"), vertex("x", op="input"), outputs=("x",))
    with pytest.raises(BadModel, match="'z'"):
        Structure("m", "", 1, (vertex("x", op="input"),), (value("x"),), (OutputSpec("z", value("z")),))
