"""A stage's ONNX graph as the bytes of a .onnx file, written canonically, and read back by a reader that trusts nothing.

The file is ordinary ONNX (https://onnx.ai/onnx/repo-docs/IR.html), so that any tool shows it; its weights are external data in
weights.safetensors, where each stands under its own name. The reader accepts exactly the bytes that the writer makes of what it has read: a field that
is not known here, an operator that is not allowed, a path, a second spelling are all refused. What reaches ONNX Runtime was
therefore written by this module, whoever sent it; a node needs no other reader of ONNX (the `onnx` package would be 30 MB more on every box).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from splitnet.errors import BadShard
from splitnet.onnx_nouns import ALLOWED_OPERATORS, NEWEST_OPSET, OLDEST_OPSET, Attribute, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.protobuf_bytes import fields, packed_floats, packed_varints, put, unpacked_floats, unpacked_varints
from splitnet.tensors import DTYPES

__all__ = ["ELEMENT_TYPES", "MAX_BYTES", "Place", "from_bytes", "to_bytes"]

MAX_BYTES = 64 << 20
_MAX_NODES = 200_000
_MAX_TEXT = 1024
_MAX_DIMENSIONS = 64
_MAX_PORTS = 4096  # inputs of one operator: Concat of many
_IR_VERSION = 9  # that of operator set 20; every ONNX Runtime since 1.17 reads it
_PRODUCER = "splitnet"
_LOCATION = "weights.safetensors"
_FLOAT, _INT, _STRING, _TENSOR, _FLOATS, _INTS = 1, 2, 3, 4, 6, 7  # AttributeProto.AttributeType
_EXTERNAL = 1  # TensorProto.DataLocation

#: our names of element types -> TensorProto.DataType
ELEMENT_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16,
}  # fmt: skip
_DTYPE_OF = {number: name for name, number in ELEMENT_TYPES.items()}


#: where a weight lies: a file's name, its first byte there, how many
Place = tuple[str, int, int]


def to_bytes(graph: OnnxGraph, places: Mapping[str, Place] | None = None) -> bytes:
    """Canonical: the same graph has the same bytes. `places`: where each weight lies, for an engine; without it, as a shard holds it."""
    body = b"".join(put(1, _node(node)) for node in graph.nodes)
    body += put(2, "stage")
    body += b"".join(put(5, _constant(name, tensor)) for name, tensor in graph.constants.items())
    body += b"".join(put(5, _weight(weight, places)) for weight in graph.weights)
    body += b"".join(put(11, _value(value)) for value in graph.inputs)
    body += b"".join(put(12, _value(value)) for value in graph.outputs)
    return put(1, _IR_VERSION) + put(2, _PRODUCER) + put(7, body) + put(8, put(1, "") + put(2, graph.opset))


def from_bytes(data: bytes, *, place: str = "graph.onnx") -> OnnxGraph:
    """Raises BadShard, saying what is wrong, for whatever is not exactly such a graph."""
    if len(data) > MAX_BYTES:
        _fault(place, f"{len(data)} bytes are more than the limit of {MAX_BYTES}")
    try:
        graph = _read_model(data, place)
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        _fault(place, f"not an ONNX graph as splitnet writes it: {type(error).__name__}: {error!s:.200}")
    _check(graph, place)
    if to_bytes(graph) != data:
        _fault(place, "holds fields that splitnet does not write (control flow, functions, other domains, metadata), or another spelling")
    return graph


def _fault(place: str, message: str) -> NoReturn:
    raise BadShard(f"{place}: {message}", remedy="the graph was not written by splitnet, or was tampered with: cut the model again")


# -------------------------------------------------------------------------------------------------------------------- writing


def _node(node: OnnxNode) -> bytes:
    data = b"".join(put(1, name) for name in node.inputs) + b"".join(put(2, name) for name in node.outputs)
    return data + put(4, node.op) + b"".join(put(5, _attribute(name, value)) for name, value in node.attributes.items())


def _attribute(name: str, value: Attribute) -> bytes:
    data = put(1, name)
    match value:
        case OnnxTensor():
            return data + put(5, _constant("", value)) + put(20, _TENSOR)
        case float():
            return data + put(2, value) + put(20, _FLOAT)
        case int():
            return data + put(3, value) + put(20, _INT)
        case str():
            return data + put(4, value) + put(20, _STRING)
    if any(isinstance(item, float) for item in value):
        return data + put(7, packed_floats(tuple(float(item) for item in value))) + put(20, _FLOATS)
    return data + put(8, packed_varints(tuple(int(item) for item in value))) + put(20, _INTS)


def _constant(name: str, tensor: OnnxTensor) -> bytes:
    return put(1, packed_varints(tensor.shape)) + put(2, ELEMENT_TYPES[tensor.dtype]) + put(8, name) + put(9, tensor.data)


def _weight(weight: OnnxValue, places: Mapping[str, Place] | None) -> bytes:
    shape = tuple(int(size) for size in weight.shape)
    entries = [("location", _LOCATION)]
    if places is not None:
        location, offset, length = places[weight.name]
        entries = [("location", location), ("offset", str(offset)), ("length", str(length))]
    place = b"".join(put(13, put(1, key) + put(2, value)) for key, value in entries)
    return put(1, packed_varints(shape)) + put(2, ELEMENT_TYPES[weight.dtype]) + put(8, weight.name) + place + put(14, _EXTERNAL)


def _value(value: OnnxValue) -> bytes:
    dimensions = b"".join(put(1, put(1, size) if isinstance(size, int) else put(2, size)) for size in value.shape)
    return put(1, value.name) + put(2, put(1, put(1, ELEMENT_TYPES[value.dtype]) + put(2, dimensions)))


# -------------------------------------------------------------------------------------------------------------------- reading


def _read_model(data: bytes, place: str) -> OnnxGraph:
    model = _grouped(data)
    graph = _grouped(_bytes(model, 7))
    if len(graph.get(1, ())) > _MAX_NODES:
        _fault(place, f"{len(graph[1])} operators are more than the limit of {_MAX_NODES}")
    constants: dict[str, OnnxTensor] = {}
    weights: list[OnnxValue] = []
    for stored in graph.get(5, ()):
        tensor = _grouped(stored)
        if 14 in tensor or 13 in tensor:
            location = _grouped(_bytes(tensor, 13))
            if _bytes(location, 2) != _LOCATION.encode():
                _fault(place, f"weight {_text(tensor, 8)!r:.80} lies at {_bytes(location, 2)!r:.80}: only {_LOCATION} may hold weights")
            weights.append(OnnxValue(_text(tensor, 8), _dtype(tensor[2][0]), _dims(tensor)))
        else:
            name = _text(tensor, 8)
            if name in constants:
                _fault(place, f"constant {name!r:.80} stands twice")
            constants[name] = _read_constant(tensor)
    return OnnxGraph(
        inputs=tuple(_read_value(item) for item in graph.get(11, ())),
        outputs=tuple(_read_value(item) for item in graph.get(12, ())),
        weights=tuple(weights),
        constants=constants,
        nodes=tuple(_read_node(item) for item in graph.get(1, ())),
        opset=_int(_grouped(_bytes(model, 8)), 2),
    )


def _grouped(data: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    if not isinstance(data, bytes):
        raise TypeError(f"expected a message, got {type(data).__name__}")
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found


def _bytes(message: Mapping[int, list[Any]], number: int) -> bytes:
    value = message[number][0]
    if not isinstance(value, bytes):
        raise TypeError(f"field {number}: expected bytes, got {type(value).__name__}")
    return value


def _int(message: Mapping[int, list[Any]], number: int) -> int:
    value = message[number][0]
    if type(value) is not int:
        raise TypeError(f"field {number}: expected a number, got {type(value).__name__}")
    return value


def _text(message: Mapping[int, list[Any]], number: int) -> str:
    return _decoded(_bytes(message, number))


def _decoded(data: Any) -> str:
    if not isinstance(data, bytes) or len(data) > _MAX_TEXT:
        raise ValueError(f"expected a text of at most {_MAX_TEXT} bytes")
    return data.decode()


def _dtype(number: Any) -> str:
    if number not in _DTYPE_OF:
        raise ValueError(f"element type {number!r:.40} is not known")
    return _DTYPE_OF[number]


def _dims(tensor: Mapping[int, list[Any]]) -> tuple[int, ...]:
    dims = unpacked_varints(_bytes(tensor, 1))
    if len(dims) > _MAX_DIMENSIONS or any(size < 0 for size in dims):
        raise ValueError(f"not a shape: {dims!r:.80}")
    return dims


def _read_constant(tensor: Mapping[int, list[Any]]) -> OnnxTensor:
    dtype, shape, data = _dtype(tensor[2][0]), _dims(tensor), _bytes(tensor, 9)
    if math.prod(shape) * DTYPES[dtype].itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {dtype} of shape {shape}")
    return OnnxTensor(dtype, shape, data)


def _read_value(data: Any) -> OnnxValue:
    value = _grouped(data)
    tensor = _grouped(_bytes(_grouped(_bytes(value, 2)), 1))
    shape: list[int | str] = []
    for dimension in (_grouped(item) for item in _grouped(_bytes(tensor, 2)).get(1, ())):
        shape.append(_int(dimension, 1) if 1 in dimension else _text(dimension, 2))
    if len(shape) > _MAX_DIMENSIONS or any(isinstance(size, int) and size < 0 for size in shape):
        raise ValueError(f"not a shape: {shape!r:.80}")
    return OnnxValue(_text(value, 1), _dtype(tensor[1][0]), tuple(shape))


def _read_node(data: Any) -> OnnxNode:
    node = _grouped(data)
    attributes = dict(_read_attribute(item) for item in node.get(5, ()))
    if len(attributes) != len(node.get(5, ())):
        raise ValueError("an attribute stands twice")
    inputs, outputs = (tuple(_decoded(name) for name in node.get(number, ())) for number in (1, 2))
    return OnnxNode(_text(node, 4), inputs, outputs, attributes)


def _read_attribute(data: Any) -> tuple[str, Attribute]:
    attribute = _grouped(data)
    value: Attribute
    match kind := _int(attribute, 20):
        case 1:
            value = attribute[2][0]
            if not isinstance(value, float):
                raise TypeError("expected a float")
        case 2:
            value = _int(attribute, 3)
        case 3:
            value = _text(attribute, 4)
        case 4:
            value = _read_constant(_grouped(_bytes(attribute, 5)))
        case 6:
            value = unpacked_floats(_bytes(attribute, 7))
        case 7:
            value = unpacked_varints(_bytes(attribute, 8))
        case _:
            raise ValueError(f"an attribute of kind {kind}, such as a graph, is not allowed")
    return _text(attribute, 1), value


def _check(graph: OnnxGraph, place: str) -> None:
    """Operators from the list, and each value made once and before it is used."""
    if not OLDEST_OPSET <= graph.opset <= NEWEST_OPSET:
        _fault(place, f"operator set {graph.opset}: this splitnet reads {OLDEST_OPSET} to {NEWEST_OPSET}")
    made: set[str] = set()

    def define(name: str) -> None:
        if not name or name in made:
            _fault(place, f"value {name!r:.80} is made twice, or has no name")
        made.add(name)

    for value in (*graph.inputs, *graph.weights):
        define(value.name)
    for name in graph.constants:
        define(name)
    for i, node in enumerate(graph.nodes):
        if node.op not in ALLOWED_OPERATORS:
            raise BadShard(
                f"{place}: node[{i}]: operator {node.op!r:.80} is not allowed",
                remedy="only the operators that splitnet lists may run on a node",
            )
        if len(node.inputs) > _MAX_PORTS or len(node.outputs) > _MAX_PORTS:
            _fault(place, f"node[{i}] ({node.op}): more than {_MAX_PORTS} inputs or outputs")
        for name in node.inputs:
            if name and name not in made:
                _fault(place, f"node[{i}] ({node.op}): value {name!r:.80} is used before it is made")
        for name in filter(None, node.outputs):
            define(name)
    for value in graph.outputs:
        if value.name not in made:
            _fault(place, f"output {value.name!r:.80} is never made")
    if len({value.name for value in graph.outputs}) != len(graph.outputs):
        _fault(place, "an output stands twice")
