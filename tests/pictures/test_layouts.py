"""The geometry and the grouping behind the pictures, on graphs drawn at random."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.drawing.blocks import BlockGraph, group
from partitioner.drawing.rows import Drawing, arrange
from partitioner.structure import Structure, Vertex
from splitnet.plan import OutputSpec
from splitnet.tensors import TensorSpec

WIDTH = 300.0


@st.composite
def edges(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return count, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=24)) if pairs else []


@given(edges(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_boxes_never_overlap_and_lines_go_down_between_them(case: tuple[int, list[tuple[int, int]]], columns: int) -> None:
    count, pairs = case
    drawn = arrange(count, pairs, WIDTH, height_of=lambda box, _w: 20.0 + box, columns=columns, label_width=lambda e: 30.0 + e)
    for a, b in itertools.combinations(drawn.boxes, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart
    for box in drawn.boxes:
        assert box.x >= 0
        assert box.x + box.width <= WIDTH + 1e-6
        assert box.y + box.height <= drawn.height + 1e-6
    for (a, b), line in zip(pairs, drawn.lines, strict=True):
        assert line.points[0][1] == drawn.boxes[a].y + drawn.boxes[a].height
        assert line.points[-1][1] == drawn.boxes[b].y
        for end, box in ((line.points[0], drawn.boxes[a]), (line.points[-1], drawn.boxes[b])):
            assert box.x - 8 <= end[0] <= box.x + box.width + 8
        ys = [y for _, y in line.points]
        assert ys == sorted(ys)
        _passes_no_box(line.points, drawn)
    labels = sorted(line.label[1] for line in drawn.lines)
    assert all(after - before >= 11 for before, after in itertools.pairwise(labels))


def _passes_no_box(points: tuple[tuple[float, float], ...], drawn: Drawing) -> None:
    for (xa, ya), (xb, yb) in itertools.pairwise(points):
        for box in drawn.boxes:
            across = min(xa, xb) < box.x + box.width - 1e-6 and max(xa, xb) > box.x + 1e-6
            along = min(ya, yb) < box.y + box.height - 1e-6 and max(ya, yb) > box.y + 1e-6
            assert not (across and along)


@st.composite
def models(draw: st.DrawFn) -> Structure:
    """Operators in nested modules, each using some before it."""
    count = draw(st.integers(1, 40))
    scope = st.lists(st.sampled_from(["enc", "dec", "0", "1", "attn"]), max_size=3).map(".".join)
    spec = TensorSpec("x", "float32", (1,))
    vertices = [Vertex("x", "input", (spec,), value_bytes=(4,))]
    for k in range(count):
        made = TensorSpec(f"v{k}", "float32", (1,))
        names = [v.name for v in vertices]
        uses = tuple(draw(st.lists(st.sampled_from(names[-6:]), min_size=1, max_size=3, unique=True)))
        cheap = draw(st.booleans()) and draw(st.booleans())
        vertices.append(Vertex(made.name, "aten.mul.Tensor", (made,), uses, value_bytes=(4,), cheap=cheap, scope=draw(scope)))
    return Structure("random", "0", 1, tuple(vertices), (spec,), (OutputSpec(vertices[-1].name, vertices[-1].values[0]),))


@given(models(), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_blocks_hold_every_operator_once_and_form_no_circle(model: Structure, limit: int) -> None:
    names = [v.name for v in model.vertices if v.op != "input"]
    seconds = {name: 0.001 * (1 + k % 5) for k, name in enumerate(names)}
    graph = group(model, names, seconds, limit)
    costly = [v.name for v in model.vertices if v.op != "input" and not v.cheap] or names
    assert sorted(o for block in graph.blocks for o in block.operators) == sorted(costly)
    assert math.fsum(block.seconds for block in graph.blocks) == pytest.approx(math.fsum(seconds[name] for name in costly))
    assert all(block.label for block in graph.blocks)
    assert not _circle(graph)


def _circle(graph: BlockGraph) -> bool:
    left = set(range(len(graph.blocks)))
    while left:
        free = {i for i in left if not any(b == i and a in left for a, b in graph.edges)}
        if not free:
            return True
        left -= free
    return False


def chain(layers: int, parts: int) -> Structure:
    spec = TensorSpec("x", "float32", (1,))
    vertices = [Vertex("x", "input", (spec,), value_bytes=(4,))]
    for k in range(layers * parts):
        made = TensorSpec(f"v{k}", "float32", (1,))
        scope = f"encoder.layer.{k // parts}.part{k % parts}"
        vertices.append(Vertex(made.name, "aten.mul.Tensor", (made,), (vertices[-1].name,), value_bytes=(4,), scope=scope))
    return Structure("chain", "0", 1, tuple(vertices), (spec,), (OutputSpec(vertices[-1].name, vertices[-1].values[0]),))


def test_a_thousand_operators_become_a_few_blocks_named_after_their_modules() -> None:
    model = chain(layers=100, parts=10)
    names = [v.name for v in model.vertices[1:]]
    graph = group(model, names, dict.fromkeys(names, 0.001), 8)
    assert len(graph.blocks) == 8
    assert graph.blocks[0].label.startswith("encoder.layer.0 … ")
    assert graph.blocks[-1].label.endswith("99")
    assert graph.edges == tuple((k, k + 1) for k in range(7))


def test_layers_that_fit_are_shown_each() -> None:
    model = chain(layers=6, parts=10)
    names = [v.name for v in model.vertices[1:]]
    graph = group(model, names, dict.fromkeys(names, 0.001), 8)
    assert [block.label for block in graph.blocks] == [f"encoder.layer.{k}" for k in range(6)]
