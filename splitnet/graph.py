"""The graph document: a stage's arithmetic as JSON that a node can take from a stranger.

    {"format": 1,
     "inputs":    [{"name": "x", "kind": "tensor"}, {"name": "batch", "kind": "int"}],
     "weights":   {"linear.weight": {"dtype": "float32", "shape": [8, 4], "order": [0, 1], "grad": true}},
     "operators": [{"op": "aten.linear.default", "args": [{"ref": "x"}, {"weight": "linear.weight"}], "kwargs": {}, "out": "y"}],
     "outputs":   ["y"]}

Operators are named, from an allow-list (`splitnet.operators`), and run in order. Each value is assigned once, before it is used. `out` is
the name of the one result, or a list with a name or null for each of several. A weight is stored as it lies in memory: `order`
lists its axes from the outermost, so that a transposed or channels-last weight comes back with the strides that it had. `grad` says whether the weight was trainable: torch
chooses kernels by it (matmul folds a batch for a trainable matrix), also where no gradient is taken.

Arguments are null, booleans, whole numbers of 64 bits, finite numbers, strings, lists, and objects with one key:

    {"ref": value}  {"weight": name}  {"dtype": "int64"}  {"device": "engine"}  {"layout": "strided"}
    {"memory_format": "channels_last"}  {"float": "nan" | "inf" | "-inf"}  {"complex": [re, im]}  {"graph": document}

`graph` is the body of a branch (`py.cond`): a whole document, without weights, whose inputs are the operands.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from splitnet.errors import BadShard
from splitnet.graph_nouns import (
    DEVICE,
    GRAPH_VERSION,
    Device,
    Dtype,
    GraphDocument,
    Input,
    Layout,
    MemoryFormat,
    Operator,
    Ref,
    Weight,
    WeightSpec,
    references,
)
from splitnet.operators import is_allowed
from splitnet.tensors import DTYPES

__all__ = [
    "DEVICE", "GRAPH_VERSION", "Device", "Dtype", "GraphDocument", "Input", "Layout", "MemoryFormat", "Operator", "Ref", "Weight", "WeightSpec",
    "parse", "references",
]  # fmt: skip

KINDS = ("tensor", "int", "float", "bool")
_NAME = re.compile(r"[A-Za-z0-9_.:\-]{1,256}\Z")
_MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
_TRAINABLE = ("float64", "float32", "float16", "bfloat16", "complex64")
_MAX_BYTES = 64 << 20
_MAX_OPERATORS = 200_000
_MAX_LIST = 65_536
_MAX_TEXT = 1_024
_MAX_DEPTH = 4  # lists in lists, and branches in branches
_MAX_DIMENSIONS = 64
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def parse(data: bytes) -> GraphDocument:
    """Raises BadShard, with the path to the fault, for whatever is not exactly a graph document of this version."""
    if len(data) > _MAX_BYTES:
        _fault("graph", f"{len(data)} bytes are more than the limit of {_MAX_BYTES}")
    document = _strict_json(data)
    if isinstance(document, dict) and document.get("format") != GRAPH_VERSION:
        raise BadShard(
            f"graph: format {document.get('format')!r:.80}, this splitnet reads {GRAPH_VERSION}", remedy="update splitnet on this node"
        )
    return _Reader("graph", 0).document(document)


def _strict_json(data: bytes) -> Any:
    """JSON without duplicate keys, NaN or bottomless nesting."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(items)
        if len(document) != len(items):
            raise ValueError("a key stands twice in one object")
        return document

    def refused(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refused)
    except RecursionError:
        _fault("graph", "nested too deeply")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _fault("graph", f"not valid JSON: {error!s:.200}")


def _fault(at: str, message: str) -> NoReturn:
    raise BadShard(f"{at}: {message}", remedy="the shard was not written by splitnet, or was tampered with: cut the model again")


class _Reader:
    def __init__(self, at: str, depth: int) -> None:
        self.at = at
        self.depth = depth
        self.defined: set[str] = set()
        self.weights: dict[str, WeightSpec] = {}

    def document(self, d: Any) -> GraphDocument:
        if self.depth > _MAX_DEPTH:
            _fault(self.at, "branches are nested too deep")
        self._keys(d, self.at, {"format", "inputs", "weights", "operators", "outputs"})
        inputs = tuple(self._input(item, f"{self.at}.inputs[{i}]") for i, item in enumerate(self._list(d["inputs"], f"{self.at}.inputs")))
        if not isinstance(d["weights"], dict) or (d["weights"] and self.depth):
            _fault(f"{self.at}.weights", "expected an object, and an empty one in a branch")
        for name, weight in d["weights"].items():
            at = f"{self.at}.weights[{name!r:.80}]"
            self.weights[self._name(name, at)] = self._weight(weight, at)
        listed = self._list(d["operators"], f"{self.at}.operators", _MAX_OPERATORS)
        operators = tuple(self._operator(item, f"{self.at}.operators[{i}]") for i, item in enumerate(listed))
        outputs = tuple(self._known(item, f"{self.at}.outputs") for item in self._list(d["outputs"], f"{self.at}.outputs"))
        return GraphDocument(inputs, self.weights, operators, outputs)

    def _input(self, d: Any, at: str) -> Input:
        self._keys(d, at, {"name", "kind"})
        if d["kind"] not in KINDS:
            _fault(f"{at}.kind", f"expected one of {', '.join(KINDS)}, got {d['kind']!r:.80}")
        return Input(self._define(d["name"], f"{at}.name"), d["kind"])

    def _weight(self, d: Any, at: str) -> WeightSpec:
        self._keys(d, at, {"dtype", "shape", "order", "grad"})
        shape, order = (self._list(d[key], f"{at}.{key}", _MAX_DIMENSIONS) for key in ("shape", "order"))
        if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            _fault(f"{at}.shape", f"expected sizes, got {shape!r:.80}")
        if not all(type(axis) is int for axis in order) or sorted(order) != list(range(len(shape))):
            _fault(f"{at}.order", f"expected the axes of the shape, each once, got {order!r:.80}")
        dtype = self._dtype(d["dtype"], at)
        if not isinstance(d["grad"], bool) or (d["grad"] and dtype not in _TRAINABLE):
            _fault(f"{at}.grad", f"expected a boolean, and false for {dtype}")
        return WeightSpec(dtype, tuple(shape), tuple(order), d["grad"])

    def _operator(self, d: Any, at: str) -> Operator:
        self._keys(d, at, {"op", "args", "kwargs", "out"})
        op = d["op"]
        if not isinstance(op, str) or not is_allowed(op):
            raise BadShard(
                f"{at}.op: operator {op!r:.80} is not allowed", remedy="only the operators that splitnet lists may run on a node"
            )
        at = f"{at} ({op})"
        args = tuple(self._argument(item, f"{at}.args[{i}]", 0) for i, item in enumerate(self._list(d["args"], f"{at}.args")))
        if not isinstance(d["kwargs"], dict) or not all(key.isidentifier() and len(key) <= 64 for key in d["kwargs"]):
            _fault(f"{at}.kwargs", "expected an object with identifiers as keys")
        kwargs = {key: self._argument(item, f"{at}.kwargs.{key}", 0) for key, item in d["kwargs"].items()}
        out: str | tuple[str | None, ...]
        if isinstance(d["out"], list):
            listed = self._list(d["out"], f"{at}.out")
            out = tuple(None if name is None else self._define(name, f"{at}.out[{i}]") for i, name in enumerate(listed))
        else:
            out = self._define(d["out"], f"{at}.out")
        return Operator(op, args, kwargs, out)

    def _argument(self, a: Any, at: str, depth: int) -> Any:
        if a is None or isinstance(a, bool):
            return a
        if isinstance(a, int):
            if not -(1 << 63) <= a < 1 << 63:
                _fault(at, "a whole number of more than 64 bits")
            return a
        if isinstance(a, float):
            return a if math.isfinite(a) else _fault(at, 'a number that is not finite; write {"float": "nan"}')
        if isinstance(a, str):
            return a if len(a) <= _MAX_TEXT else _fault(at, f"a string of {len(a)} characters, the limit is {_MAX_TEXT}")
        if isinstance(a, list):
            if depth >= _MAX_DEPTH:
                _fault(at, "lists are nested too deep")
            return tuple(self._argument(item, f"{at}[{i}]", depth + 1) for i, item in enumerate(self._list(a, at)))
        if not isinstance(a, dict) or len(a) != 1:
            _fault(at, "expected an object with one key")
        return self._tagged(*next(iter(a.items())), at)

    def _tagged(self, tag: str, body: Any, at: str) -> Any:
        match tag:
            case "ref":
                return Ref(self._known(body, at))
            case "weight" if isinstance(body, str) and body in self.weights:
                return Weight(body)
            case "dtype":
                return Dtype(self._dtype(body, at))
            case "device" if body == "engine":
                return DEVICE
            case "layout" if body == "strided":
                return Layout(body)
            case "memory_format" if body in _MEMORY_FORMATS:
                return MemoryFormat(body)
            case "float" if isinstance(body, str) and body in _SPECIAL:
                return _SPECIAL[body]
            case "complex" if isinstance(body, list) and len(body) == 2:
                real, imaginary = (self._argument(part, at, _MAX_DEPTH) for part in body)
                if type(real) in (int, float) and type(imaginary) in (int, float):
                    return complex(real, imaginary)
            case "graph":
                reader = _Reader(f"{at}.graph", self.depth + 1)
                return reader.document(body)
        return _fault(at, f"unknown {tag!r:.40}: {body!r:.80}")

    @staticmethod
    def _keys(d: Any, at: str, keys: set[str]) -> None:
        if not isinstance(d, dict):
            _fault(at, f"expected an object, got {type(d).__name__}")
        if wrong := sorted(set(d) ^ keys):
            _fault(at, f"{'missing' if wrong[0] in keys else 'unknown'} key {wrong[0]!r:.80}")

    @staticmethod
    def _list(v: Any, at: str, limit: int = _MAX_LIST) -> list[Any]:
        if not isinstance(v, list):
            _fault(at, f"expected a list, got {type(v).__name__}")
        return v if len(v) <= limit else _fault(at, f"{len(v)} entries are more than the limit of {limit}")

    @staticmethod
    def _dtype(v: Any, at: str) -> str:
        return v if isinstance(v, str) and v in DTYPES else _fault(at, f"unknown dtype {v!r:.80}")

    @staticmethod
    def _name(v: Any, at: str) -> str:
        return v if isinstance(v, str) and _NAME.match(v) else _fault(at, f"not a name: {v!r:.80}")

    def _define(self, v: Any, at: str) -> str:
        name = self._name(v, at)
        if name in self.defined:
            _fault(at, f"value {name!r} is assigned twice")
        self.defined.add(name)
        return name

    def _known(self, v: Any, at: str) -> str:
        return v if isinstance(v, str) and v in self.defined else _fault(at, f"value {v!r:.80} is used before it is assigned")
