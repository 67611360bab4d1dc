"""Indices into tensors, and tensors made of sizes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partitioner.onnx_export.builder import Builder, Converter, Unconvertible, axis_of, is_float
from splitnet.graph import Dtype, Operator, Ref
from splitnet.tensors import DTYPES

__all__ = ["CONVERTERS"]

CONVERTERS: dict[str, Converter] = {}
_Args = Mapping[str, Any]
_LARGEST_CONSTANT = 1 << 16  # elements; a longer row of numbers is counted by the engine


def _embedding(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("Gather", b.value(a["weight"]), b.value(a["indices"]), dtype=b.dtype(a["weight"]), axis=0)


def _index_select(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    return b.emit("Gather", x, b.value(a["index"]), dtype=b.dtype(x), axis=axis_of(a["dim"], b.rank(x)))


def _gather(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    return b.emit("GatherElements", x, b.value(a["index"]), dtype=b.dtype(x), axis=axis_of(a["dim"], b.rank(x)))


def _index(b: Builder, a: _Args, op: Operator) -> str:
    x, dtype = b.value(a["self"]), b.dtype(a["self"])
    at = [axis for axis, index in enumerate(a["indices"]) if index is not None]
    indices = [a["indices"][axis] for axis in at]
    if any(not b.dtype(index).startswith("int") for index in indices):
        raise Unconvertible("by a mask")
    if len(at) == 1:
        return b.emit("Gather", x, b.value(indices[0]), dtype=dtype, axis=at[0])
    values = [b.value(index, "int64") for index in indices]
    zeros = [b.emit("Mul", value, b.scalar(0, "int64"), dtype="int64") for value in values]
    whole = zeros[0]
    for zero in zeros[1:]:
        whole = b.emit("Add", whole, zero, dtype="int64")
    width = max(b.rank(index) for index in indices)
    tuples = []
    for value in values:
        spread = b.emit("Add", value, whole, dtype="int64", shape=("?",) * width)
        tuples.append(b.unsqueeze(spread, width))
    joined = b.emit("Concat", *tuples, dtype="int64", axis=width)
    rest = [axis for axis in range(b.rank(x)) if axis not in at]
    made = b.emit("GatherND", b.transpose(x, [*at, *rest]), joined, dtype=dtype, shape=("?",) * (width + len(rest)))
    if at == list(range(at[0], at[0] + len(at))) and at[0]:  # neighbours keep their place; others come first
        ahead = at[0]
        made = b.transpose(made, [*range(width, width + ahead), *range(width), *range(width + ahead, width + len(rest))])
    return made


CONVERTERS |= {
    "aten.embedding.default": _embedding,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
}

# ------------------------------------------------------------------------------------------------------------- made of sizes


def _kind(b: Builder, a: _Args, like: Any, otherwise: str) -> str:
    if isinstance(a.get("dtype"), Dtype):
        return str(a["dtype"].name)
    return b.dtype(like) if like is not None else otherwise


def _filled(b: Builder, sizes: Sequence[Any], number: Any, dtype: str) -> str:
    fixed = all(isinstance(size, int) for size in sizes)
    if fixed and math.prod(sizes) == 1 and not isinstance(number, Ref):
        return b.constant(np.full(tuple(sizes), number).astype(DTYPES[dtype]))
    return b.emit("Expand", b.value(number, dtype), b.sizes(sizes), dtype=dtype) if sizes else b.value(number, dtype)


def _full(number: Any, like: str = "") -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        filling = a["fill_value"] if number is None else number
        default = "float32" if isinstance(filling, float) or number is not None else "bool" if isinstance(filling, bool) else "int64"
        return _filled(b, a["size"], filling, _kind(b, a, a[like] if like else None, default))

    return run


def _full_like(number: Any) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        shape = b.emit("Shape", b.value(a["self"]), dtype="int64", shape=(b.rank(a["self"]),))
        dtype = _kind(b, a, a["self"], "")
        filling = a["fill_value"] if number is None else number
        return b.emit("Expand", b.value(filling, dtype), shape, dtype=dtype)

    return run


def _arange(b: Builder, a: _Args, op: Operator) -> str:
    start, end, step = a.get("start", 0), a["end"], a.get("step", 1)
    numbers = (start, end, step)
    dtype = a["dtype"].name if isinstance(a.get("dtype"), Dtype) else "float32" if any(isinstance(n, float) for n in numbers) else "int64"
    if all(isinstance(n, int) for n in numbers) and len(range(*numbers)) <= _LARGEST_CONSTANT:
        return b.constant(np.arange(*numbers).astype(DTYPES[dtype]))
    counted = "float32" if is_float(dtype) else "int64"
    return b.cast(b.emit("Range", *(b.value(n, counted) for n in numbers), dtype=counted, shape=("?",)), dtype)


CONVERTERS |= {
    "aten.full.default": _full(None),
    "aten.new_full.default": _full(None, "self"),
    "aten.zeros.default": _full(0),
    "aten.ones.default": _full(1),
    "aten.new_zeros.default": _full(0, "self"),
    "aten.new_ones.default": _full(1, "self"),
    "aten.full_like.default": _full_like(None),
    "aten.zeros_like.default": _full_like(0),
    "aten.ones_like.default": _full_like(1),
    "aten.scalar_tensor.default": lambda b, a, op: b.value(a["s"], a["dtype"].name if isinstance(a["dtype"], Dtype) else "float32"),
}
CONVERTERS |= {f"aten.arange.{overload}": _arange for overload in ("default", "start", "start_step")}
