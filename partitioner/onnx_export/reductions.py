"""Reductions along axes, and what is like them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from partitioner.onnx_export.builder import Builder, Converter, Unconvertible, axis_of, is_float
from splitnet.graph import Dtype, Operator

__all__ = ["CONVERTERS"]

CONVERTERS: dict[str, Converter] = {}
_Args = Mapping[str, Any]


def _axes(argument: Any, rank: int) -> list[int]:
    listed = list(range(rank)) if argument is None or argument == () else [argument] if isinstance(argument, int) else list(argument)
    return [axis_of(axis, rank) for axis in listed]


def _reduction(target: str, floating: bool = False) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        x, rank = a["self"], b.rank(a["self"])
        dtype = a["dtype"].name if isinstance(a.get("dtype"), Dtype) else b.dtype(x)
        if target in ("ReduceSum", "ReduceProd") and not is_float(dtype):
            dtype = "int64"
        if floating and not is_float(dtype):
            dtype = "float32"
        reduced = _axes(a.get("dim"), rank)
        return b.emit(target, b.value(x, dtype), b.ints(*reduced), dtype=dtype, keepdims=int(bool(a.get("keepdim"))))

    return run


def _any(b: Builder, a: _Args, op: Operator) -> str:
    every = op.op.startswith("aten.all")
    reduced = _axes(a.get("dim"), b.rank(a["self"]))
    counted = b.cast(b.value(a["self"], "bool"), "int32")
    return b.emit("ReduceMin" if every else "ReduceMax", counted, b.ints(*reduced), dtype="int32", keepdims=int(bool(a.get("keepdim"))))


def _arg(target: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        x = b.value(a["self"])
        if b.dtype(x) == "bool":
            x = b.cast(x, "int32")
        if a["dim"] is None:
            x = b.emit("Reshape", x, b.ints(-1), dtype=b.dtype(x), shape=("?",))
        axis = axis_of(a["dim"] or 0, b.rank(x))
        return b.emit(target, x, dtype="int64", axis=axis, keepdims=int(bool(a["keepdim"]) and a["dim"] is not None))

    return run


def _vector_norm(b: Builder, a: _Args, op: Operator) -> str:
    if a["ord"] not in (1, 2):
        raise Unconvertible(f"of order {a['ord']}")
    made = _reduction(f"ReduceL{int(a['ord'])}", floating=True)(b, a, op)
    assert isinstance(made, str)
    return made


def _variance(b: Builder, a: _Args, op: Operator) -> str:
    x, rank, dtype = b.value(a["self"]), b.rank(a["self"]), b.dtype(a["self"])
    reduced = _axes(a["dim"], rank)
    count = math.prod(b.known(a["self"], axis) for axis in reduced)
    correction = 1 if a.get("correction") is None else a["correction"]
    mean = b.emit("ReduceMean", x, b.ints(*reduced), dtype=dtype, keepdims=1)
    apart = b.emit("Sub", x, mean, dtype=dtype)
    total = b.emit("ReduceSumSquare", apart, b.ints(*reduced), dtype=dtype, keepdims=int(bool(a["keepdim"])))
    return b.emit("Div", total, b.scalar(count - correction, dtype), dtype=dtype)


def _extreme(target: str, index: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> list[str]:
        axis, keep = axis_of(a["dim"], b.rank(a["self"])), int(bool(a["keepdim"]))
        x, dtype = b.value(a["self"]), b.dtype(a["self"])
        return [b.emit(target, x, b.ints(axis), dtype=dtype, keepdims=keep), b.emit(index, x, dtype="int64", axis=axis, keepdims=keep)]

    return run


def _cumsum(b: Builder, a: _Args, op: Operator) -> str:
    dtype = b.dtype(a["self"]) if is_float(b.dtype(a["self"])) else "int64"
    return b.emit("CumSum", b.value(a["self"], dtype), b.scalar(axis_of(a["dim"], b.rank(a["self"])), "int64"), dtype=dtype)


for _name in ("sum.default", "sum.dim_IntList"):
    CONVERTERS[f"aten.{_name}"] = _reduction("ReduceSum")
for _name in ("mean.default", "mean.dim"):
    CONVERTERS[f"aten.{_name}"] = _reduction("ReduceMean", floating=True)
CONVERTERS |= {
    "aten.amax.default": _reduction("ReduceMax"),
    "aten.amin.default": _reduction("ReduceMin"),
    "aten.max.default": _reduction("ReduceMax"),
    "aten.min.default": _reduction("ReduceMin"),
    "aten.max.dim": _extreme("ReduceMax", "ArgMax"),
    "aten.min.dim": _extreme("ReduceMin", "ArgMin"),
    "aten.prod.dim_int": _reduction("ReduceProd"),
    "aten.argmax.default": _arg("ArgMax"),
    "aten.argmin.default": _arg("ArgMin"),
    "aten.linalg_vector_norm.default": _vector_norm,
    "aten.var.correction": _variance,
    "aten.cumsum.default": _cumsum,
}
CONVERTERS |= {f"aten.{word}.{overload}": _any for word in ("any", "all") for overload in ("default", "dim", "dims")}
