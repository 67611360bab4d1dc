"""ONNX graphs that a stranger might send: refused with BadShard, or failing as EngineFailure; the process goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engines import load_engine
from splitnet.errors import BadShard, EngineFailure
from splitnet.onnx_format import from_bytes, to_bytes
from splitnet.onnx_nouns import ALLOWED_OPERATORS, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.protobuf_bytes import fields, put
from splitnet.shard import Shard, open_shard, write_shard
from splitnet.tensors import TensorSpec

X, Y = OnnxValue("x", "float32", ("n",)), OnnxValue("y", "float32", ("m",))


def ints(*numbers: int) -> OnnxTensor:
    return OnnxTensor("int64", (len(numbers),), np.array(numbers, np.int64).tobytes())


def graph(*nodes: OnnxNode, constants: dict[str, OnnxTensor] | None = None, **changes: Any) -> OnnxGraph:
    return dataclasses.replace(OnnxGraph((X,), (Y,), (), constants or {}, nodes), **changes)


GOOD = graph(
    OnnxNode("Pad", ("x", "wide", "", "axes"), ("p",), {"mode": "constant"}),
    OnnxNode("LeakyRelu", ("p",), ("r",), {"alpha": 0.5}),
    OnnxNode("Slice", ("r", "start", "end"), ("y",)),
    constants={"wide": ints(1, 1), "axes": ints(0), "start": ints(1), "end": ints(1 << 62)},
)


def shard(folder: Path, given: OnnxGraph | bytes, **changes: Any) -> Shard:
    data = given if isinstance(given, bytes) else to_bytes(given)
    fields_ = {
        "model": "m", "model_sha256": "0" * 64, "stage": "s", "engine": "onnx", "members": {"graph.onnx": data}, "param_bytes": 0, "activation_bytes": 0,
        "inputs": [TensorSpec("x", "float32", ("n",))], "outputs": [TensorSpec("y", "float32", ("m",))],
    }  # fmt: skip
    write_shard(folder, **(fields_ | changes))
    return open_shard(folder)


def test_it_comes_back_as_it_was_and_runs(tmp_path: Path) -> None:
    assert from_bytes(to_bytes(GOOD)) == GOOD
    engine = load_engine(shard(tmp_path, GOOD), threads=1)
    assert engine.run({"x": np.array([2.0, -2.0], np.float32)})["y"].tolist() == [2.0, -1.0, 0.0]


def test_the_onnx_package_reads_what_is_written() -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(to_bytes(GOOD), full_check=True)
    for operator in ALLOWED_OPERATORS:
        assert onnx.defs.has(operator), operator
        attributes = onnx.defs.get_schema(operator).attributes.values()
        assert not any(attribute.type == onnx.defs.OpSchema.AttrType.GRAPH for attribute in attributes), operator


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (graph(OnnxNode("If", ("x",), ("y",))), "operator 'If' is not allowed"),
        (graph(OnnxNode("Loop", ("x",), ("y",))), "operator 'Loop' is not allowed"),
        (graph(OnnxNode("RandomNormalLike", ("x",), ("y",))), "is not allowed"),
        (graph(OnnxNode("FusedMatMul", ("x", "x"), ("y",))), "is not allowed"),
        (graph(OnnxNode("Relu", ("z",), ("y",))), "'z' is used before it is made"),
        (graph(OnnxNode("Relu", ("y",), ("y",))), "'y' is used before it is made"),
        (graph(OnnxNode("Relu", ("x",), ("x",))), "made twice"),
        (graph(OnnxNode("Relu", ("x",), ("z",))), "output 'y' is never made"),
        (graph(OnnxNode("Relu", ("x",), ("y",)), opset=3), "operator set 3"),
        (graph(OnnxNode("Relu", ("x",), ("y",)), outputs=(Y, Y)), "an output stands twice"),
        (graph(OnnxNode("Add", ("x",) * 5000, ("y",))), "more than 4096 inputs"),
        (graph(OnnxNode("Relu", ("x",), ("y",)), constants={"c": OnnxTensor("float32", (1 << 40,), b"")}), "0 bytes are no float32"),
    ],
)
def test_a_graph_that_does_not_hold_together_is_refused(bad: OnnxGraph, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadShard, match=why):
        shard(tmp_path, bad)


def rebuilt(data: bytes, path: tuple[int, ...], more: bytes) -> bytes:
    """The message with `more` added to the first one at that path of field numbers."""
    if not path:
        return data + more
    made, done = b"", False
    for number, value in fields(data):
        if number == path[0] and not done:
            assert isinstance(value, bytes)
            value, done = rebuilt(value, path[1:], more), True
        made += put(number, value)
    assert done
    return made


@pytest.mark.parametrize(
    ("path", "more", "why"),
    [
        ((), put(25, put(1, "f")), "fields that splitnet does not write"),  # a function
        ((), put(20, b""), "fields that splitnet does not write"),  # training
        ((), put(14, put(1, "k") + put(2, "v")), "fields that splitnet does not write"),  # metadata
        ((), put(8, put(1, "com.microsoft") + put(2, 1)), "fields that splitnet does not write"),  # another domain
        ((7, 1), put(7, "com.microsoft"), "fields that splitnet does not write"),  # an operator of another domain
        ((7, 1), put(6, "doc"), "fields that splitnet does not write"),
        ((7, 1), put(5, put(1, "body") + put(6, put(2, "g")) + put(20, 5)), "kind 5, such as a graph, is not allowed"),
        ((7,), put(15, b""), "fields that splitnet does not write"),  # a sparse initializer
        ((7,), put(5, put(1, b"") + put(2, 1) + put(8, "w") + put(13, put(1, "location") + put(2, "../../etc/passwd")) + put(14, 1)), "only weights.safetensors"),
        ((7,), put(5, put(1, b"") + put(2, 1) + put(8, "w") + put(13, put(1, "location") + put(2, "*/_ORT_MEM_ADDR_/*")) + put(14, 1)), "only weights.safetensors"),
        ((7,), put(5, put(1, b"") + put(2, 8) + put(8, "w") + put(6, "text")), "element type 8 is not known"),
        ((), b"\x80", "not an ONNX graph"),
        ((7,), b"\x0a\xff\xff\xff\xff\x0f", "not an ONNX graph"),
    ],
)  # fmt: skip
def test_what_splitnet_does_not_write_is_refused(path: tuple[int, ...], more: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadShard, match=why):
        shard(tmp_path, rebuilt(to_bytes(GOOD), path, more))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_refused_or_mean_another_graph(data: st.DataObject) -> None:
    """Never another exception; and what is taken is written again as the same bytes."""
    bytes_ = bytearray(to_bytes(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(bytes_) - 1))
        bytes_[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        taken = from_bytes(bytes(bytes_))
    except BadShard:
        return
    assert to_bytes(taken) == bytes(bytes_)


@pytest.mark.parametrize(
    "nodes",
    [
        [OnnxNode("Conv", ("x", "x"), ("y",))],
        [OnnxNode("Relu", ("x", "x", "x"), ("y",))],
        [OnnxNode("Relu", ("x",), ("y",), {"no_such": 1})],
        [OnnxNode("Cast", ("x",), ("y",), {"to": 7})],
        [OnnxNode("Reshape", ("x", "x"), ("y",))],
        [OnnxNode("Transpose", ("x",), ("y",), {"perm": (5, 9)})],
        [OnnxNode("Expand", ("one", "huge"), ("e",)), OnnxNode("Add", ("e", "x"), ("y",))],  # folded when it is loaded
    ],
)
def test_what_onnx_runtime_does_not_take_is_a_bad_shard_or_a_failure(nodes: list[OnnxNode], tmp_path: Path) -> None:
    constants = {"one": OnnxTensor("float32", (1,), np.ones(1, np.float32).tobytes()), "huge": ints(1 << 44)}
    made = shard(tmp_path, graph(*nodes, constants=constants))
    with pytest.raises((BadShard, EngineFailure)) as caught:
        load_engine(made, threads=1).run({"x": np.ones(3, np.float32)})
    assert "ONNX Runtime" in caught.value.message


def test_a_size_in_a_request_cannot_take_all_memory(tmp_path: Path) -> None:
    sized = graph(
        OnnxNode("Expand", ("x", "n"), ("e",)), OnnxNode("ReduceMax", ("e", "axis"), ("y",), {"keepdims": 0}),
        inputs=(X, OnnxValue("n", "int64", (1,))), constants={"axis": ints(0)}, outputs=(OnnxValue("y", "float32", ()),),
    )  # fmt: skip
    inputs = [TensorSpec("x", "float32", ("n",)), TensorSpec("n", "int64", (1,))]
    engine = load_engine(shard(tmp_path, sized, inputs=inputs, outputs=[TensorSpec("y", "float32", ())]), threads=1)
    x = np.ones(1, np.float32)
    for huge in (1 << 36, 1 << 62, -5):
        with pytest.raises(EngineFailure, match="ONNX Runtime failed"):
            engine.run({"x": x, "n": np.array([huge])})
        assert engine.run({"x": x, "n": np.array([1000])})["y"] == 1.0


def test_weights_and_manifest_are_held_against_the_graph(tmp_path: Path) -> None:
    from safetensors.numpy import save

    weight = OnnxValue("weight/w", "float32", (2,))
    made = graph(OnnxNode("Mul", ("x", "weight/w"), ("y",)), weights=(weight,))

    def load(name: str, **changes: Any) -> None:
        members = {"graph.onnx": to_bytes(made), "weights.safetensors": save({"w": changes.pop("w", np.ones(2, np.float32))})}
        load_engine(shard(tmp_path / name, made, **({"members": members, "param_bytes": 16} | changes)), threads=1)

    load("good")
    with pytest.raises(BadShard, match=r"weight 'w' should be float32 \(2,\), the file has F64"):
        load("dtype", w=np.ones(2))
    with pytest.raises(BadShard, match=r"the file has F32 \(3,\)"):
        load("shape", w=np.ones(3, np.float32))
    with pytest.raises(BadShard, match=r"the manifest's outputs are not those of graph\.onnx"):
        load("face", outputs=[TensorSpec("z", "float32", ("m",))])
    with pytest.raises(BadShard, match=r"the manifest's inputs are not those of graph\.onnx"):
        load("kind", inputs=[TensorSpec("x", "float64", ("n",))])
    with pytest.raises(BadShard, match="manifest declares 4"):
        shard(
            tmp_path / "bytes",
            made,
            param_bytes=4,
            members={"graph.onnx": to_bytes(made), "weights.safetensors": save({"w": np.ones(2, np.float32)})},
        )
