"""The graph document from a stranger: what is not exactly one is refused, and never run."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import BadShard
from splitnet.graph import (
    DEVICE,
    Dtype,
    GraphDocument,
    Input,
    Layout,
    MemoryFormat,
    Operator,
    Ref,
    Weight,
    WeightSpec,
    parse,
    references,
)
from splitnet.operators import is_allowed, torch_operators

DOCUMENT: dict[str, Any] = {
    "format": 1,
    "inputs": [{"name": "x", "kind": "tensor"}, {"name": "batch", "kind": "int"}],
    "weights": {"w": {"dtype": "float32", "shape": [4, 4], "order": [1, 0], "grad": True}},
    "operators": [
        {"op": "aten.linear.default", "args": [{"ref": "x"}, {"weight": "w"}], "kwargs": {}, "out": "y"},
        {"op": "aten.view.default", "args": [{"ref": "y"}, [{"ref": "batch"}, -1]], "kwargs": {}, "out": "z"},
        {"op": "aten.split.Tensor", "args": [{"ref": "z"}, 2, 1], "kwargs": {}, "out": ["a", None]},
    ],
    "outputs": ["a", "y"],
}


def refused(change: Any, match: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(BadShard, match=match) as caught:
        parse(json.dumps(document).encode())
    assert caught.value.remedy


def test_a_good_document() -> None:
    document = parse(json.dumps(DOCUMENT).encode())
    assert document.operators[1].args == (Ref("y"), (Ref("batch"), -1))
    assert document.operators[2].results == ("a",)
    assert parse(document.to_bytes()) == document


def set_at(*path: Any) -> Any:
    *parents, last, new = path

    def change(document: Any) -> None:
        for key in parents:
            document = document[key]
        document[last] = new

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_at("format", 2), "format 2"),
        (set_at("inputs", 0, "name", "../x"), "not a name"),
        (set_at("inputs", 0, "name", "x\n"), "not a name"),
        (set_at("inputs", 0, "kind", "pickle"), "kind"),
        (set_at("inputs", [{"name": "x", "kind": "tensor"}] * 2), "assigned twice"),
        (set_at("inputs", {}), "expected a list"),
        (set_at("weights", []), "expected an object"),
        (set_at("weights", "w", "dtype", "object"), "unknown dtype"),
        (set_at("weights", "w", "shape", [-1, 4]), "expected sizes"),
        (set_at("weights", "w", "order", [0, 0]), "expected the axes"),
        (set_at("weights", "w", "grad", 1), "grad"),
        (set_at("operators", 0, "op", "aten.linear_.default"), "not allowed"),
        (set_at("operators", 0, "op", "aten.from_file.default"), "not allowed"),
        (set_at("operators", 0, "op", "aten.as_strided.default"), "not allowed"),
        (set_at("operators", 0, "op", "os.system"), "not allowed"),
        (set_at("operators", 0, "op", "py.__import__"), "not allowed"),
        (set_at("operators", 0, "op", ["aten.linear.default"]), "not allowed"),
        (set_at("operators", 0, "args", 0, {"ref": "z"}), "before it is assigned"),
        (set_at("operators", 0, "args", 0, {"ref": "nothing"}), "before it is assigned"),
        (set_at("operators", 0, "args", 1, {"weight": "v"}), "unknown 'weight'"),
        (set_at("operators", 0, "args", 1, {"code": "1"}), "unknown 'code'"),
        (set_at("operators", 0, "args", 1, {"ref": "x", "weight": "w"}), "one key"),
        (set_at("operators", 0, "args", 1, {"device": "cuda:0"}), "unknown 'device'"),
        (set_at("operators", 0, "args", 1, {"dtype": "quint8"}), "unknown dtype"),
        (set_at("operators", 0, "args", 1, {"layout": "sparse_coo"}), "unknown 'layout'"),
        (set_at("operators", 0, "args", 1, {"memory_format": "__class__"}), "unknown 'memory_format'"),
        (set_at("operators", 0, "args", 1, 1 << 64), "64 bits"),
        (set_at("operators", 0, "args", 1, "s" * 2000), "string of 2000"),
        (set_at("operators", 0, "args", 1, [[[[[[1]]]]]]), "nested too deep"),
        (set_at("operators", 0, "kwargs", {"a b": 1}), "identifiers"),
        (set_at("operators", 0, "out", "x"), "assigned twice"),
        (set_at("operators", 2, "out", ["a", "a"]), "assigned twice"),
        (set_at("operators", 0, "more", 1), "unknown key 'more'"),
        (lambda d: d["operators"][0].pop("args"), "missing key 'args'"),
        (set_at("operators", 0, None), "expected an object"),
        (set_at("outputs", ["nothing"]), "before it is assigned"),
    ],
)  # fmt: skip
def test_what_is_refused(change: Any, match: str) -> None:
    refused(change, match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x04\x95", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": NaN}', "not valid JSON"),
        (b'{"format": 1, "format": 1}', "stands twice"),
        (b"[]", "expected an object"),
        (json.dumps(DOCUMENT).encode()[:-20], "not valid JSON"),
    ],
)
def test_bytes_that_are_no_document(data: bytes, match: str) -> None:
    with pytest.raises(BadShard, match=match):
        parse(data)


def test_branches_are_checked_too_and_not_bottomless() -> None:
    def branch(depth: int) -> dict[str, Any]:
        operators = []
        if depth:
            inner = {"graph": branch(depth - 1)}
            operators = [{"op": "py.cond", "args": [True, inner, inner, [{"ref": "t"}]], "kwargs": {}, "out": ["r"]}]
        return {
            "format": 1, "inputs": [{"name": "t", "kind": "tensor"}], "weights": {}, "operators": operators, "outputs": ["r" if depth else "t"]
        }  # fmt: skip

    assert parse(json.dumps(branch(2)).encode())
    with pytest.raises(BadShard, match="too deep"):
        parse(json.dumps(branch(6)).encode())
    hidden = branch(1)
    hidden["operators"][0]["args"][1]["graph"]["operators"] = [{"op": "aten.set_.default", "args": [], "kwargs": {}, "out": "q"}]
    with pytest.raises(BadShard, match="not allowed"):
        parse(json.dumps(hidden).encode())


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(), st.text(max_size=20), st.complex_numbers()
)
_tagged = st.sampled_from([Ref("x"), Weight("w"), Dtype("bfloat16"), DEVICE, Layout("strided"), MemoryFormat("channels_last")])
_arguments = st.recursive(st.one_of(_scalars, _tagged), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, complex):
        return isinstance(b, complex) and _alike(a.real, b.real) and _alike(a.imag, b.imag)
    if isinstance(a, float):
        return isinstance(b, float) and (a == b or (math.isnan(a) and math.isnan(b)))
    return type(a) is type(b) and bool(a == b)


@given(st.lists(_arguments, max_size=4).map(tuple))
def test_any_argument_survives(args: tuple[Any, ...]) -> None:
    weights = {"w": WeightSpec("float32", (2,), (0,))}
    document = GraphDocument((Input("x"),), weights, (Operator("aten.add.Tensor", args, {}, "y"),), ("y",))
    depth = max((_depth(a) for a in args), default=0)
    if depth > 4:
        with pytest.raises(BadShard, match="too deep"):
            parse(document.to_bytes())
    else:
        assert _alike(parse(document.to_bytes()).operators[0].args, args)


def _depth(argument: Any) -> int:
    return 1 + max((_depth(a) for a in argument), default=0) if isinstance(argument, tuple) else 0


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_noise_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(BadShard):
        parse(data)


def test_references_are_found_in_lists() -> None:
    assert list(references(((Ref("a"), 1, (Weight("b"),)), {"k": Ref("c")}))) == [Ref("a"), Weight("b"), Ref("c")]


# ------------------------------------------------------------------------------------------------------------- the allow-list


def test_every_listed_operator_exists_and_is_functional() -> None:
    import torch

    assert len(torch_operators()) > 500
    for name in torch_operators():
        _, packet, overload = name.split(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
        assert not schema.is_mutable, name
        assert not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments), name
        assert not any(kind in str(a.real_type) for a in schema.arguments for kind in ("Generator", "Storage", "Stream", "QScheme")), name
        assert schema.returns, name


@pytest.mark.parametrize(
    "name",
    [
        "aten.add_.Tensor", "aten.from_file.default", "aten.as_strided.default", "aten.set_.source_Storage", "aten.resize.default",
        "aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default", "aten.rand.default", "aten.randn_like.default",
        "aten.bernoulli.p", "aten.dropout.default", "aten._reshape_alias.default", "aten.add.out", "aten.native_dropout.default",
        "aten._embedding_bag.default", "aten.record_stream.default", "aten._print.default", "aten.native_batch_norm.default",
        "prim.Print", "aten.linear", "aten", "", "py.eval", "py.", "profiler.record",
    ],
)  # fmt: skip
def test_what_may_not_run(name: str) -> None:
    assert not is_allowed(name)


def test_the_list_is_what_the_rule_gives(repository: Any) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "scripts/operators.py", "--check"], cwd=repository, timeout=120, check=False)
    assert done.returncode == 0, "run scripts/operators.py and read the diff"
