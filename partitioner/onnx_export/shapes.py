"""Sizes, layouts, slices, joins, indices, and tensors made of sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partitioner.onnx_export.arithmetic import floor_div
from partitioner.onnx_export.builder import Builder, Converter, Unconvertible, axis_of
from splitnet.graph import Operator
from splitnet.tensors import DTYPES

__all__ = ["CONVERTERS"]

CONVERTERS: dict[str, Converter] = {}
_Args = Mapping[str, Any]
_END = (1 << 63) - 1

# ----------------------------------------------------------------------------------------------------------------------- sizes


def _size(b: Builder, a: _Args, op: Operator) -> str:
    return _dimension(b, a["0"], a["1"])


def _dimension(b: Builder, tensor: Any, axis: int) -> str:
    shape = b.emit("Shape", b.value(tensor), dtype="int64", shape=(b.rank(tensor),))
    return b.emit("Gather", shape, b.scalar(axis_of(axis, b.rank(tensor)), "int64"), dtype="int64")


def _read(b: Builder, a: _Args, op: Operator) -> str:
    size = _dimension(b, a["0"], a["1"])
    if a["3"]:
        size = b.emit("Sub", size, b.scalar(a["3"], "int64"), dtype="int64")
    return size if a["2"] == 1 else b.emit("Div", size, b.scalar(a["2"], "int64"), dtype="int64")


def _sized(target: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        kinds = {b.dtype(b.value(argument)) for argument in a.values()}
        dtype = "int64" if kinds <= {"int64", "bool"} else "float64"
        values = [b.value(argument, dtype) for argument in a.values()]
        if target == "FloorDiv":
            if dtype != "int64":
                raise Unconvertible("of floats")
            return floor_div(b, values[0], values[1], dtype)
        if target == "TrueDiv":
            return b.emit("Div", *(b.cast(value, "float64") for value in values), dtype="float64")
        made = "bool" if target in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual") else dtype
        return b.emit(target, *values, dtype=made)

    return run


CONVERTERS |= {f"py.{name}": _sized(target) for name, target in {
    "add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "FloorDiv", "truediv": "TrueDiv", "mod": "Mod", "neg": "Neg", "abs": "Abs", "min": "Min",
    "max": "Max", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual",
}.items()}  # fmt: skip
CONVERTERS |= {
    "py.size": _size,
    "py.read": _read,
    "py.int": lambda b, a, op: b.value(a["0"], "int64"),
    "py.float": lambda b, a, op: b.value(a["0"], "float64"),
    "py.sqrt": lambda b, a, op: b.emit("Sqrt", b.value(a["0"], "float64"), dtype="float64"),
}

# --------------------------------------------------------------------------------------------------------------------- layouts


def _reshape(b: Builder, x: str, sizes: Sequence[Any]) -> str:
    if any(isinstance(size, int) and size == 0 for size in sizes):
        raise Unconvertible("to an empty shape")
    return b.emit("Reshape", x, b.sizes(sizes), dtype=b.dtype(x), shape=tuple(s if isinstance(s, int) and s >= 0 else "?" for s in sizes))


def _view(b: Builder, a: _Args, op: Operator) -> str:
    return _reshape(b, b.value(a["self"]), a["size"] if "size" in a else a["shape"])


def _flatten(b: Builder, a: _Args, op: Operator) -> str:
    rank = b.rank(a["self"])
    start, end = axis_of(a["start_dim"], rank), axis_of(a["end_dim"], rank)
    if not rank:
        return _reshape(b, b.value(a["self"]), [-1])
    sizes: list[Any] = [0] * start + [-1]  # 0: as it was
    if end != rank - 1:
        sizes += [b.known(a["self"], axis) for axis in range(end + 1, rank)]
    return b.emit("Reshape", b.value(a["self"]), b.ints(*sizes), dtype=b.dtype(a["self"]))


def _permute(b: Builder, a: _Args, op: Operator) -> str:
    rank = b.rank(a["self"])
    return b.transpose(b.value(a["self"]), [axis_of(axis, rank) for axis in a["dims"]])


def _transpose(b: Builder, a: _Args, op: Operator) -> str:
    rank = b.rank(a["self"])
    order = list(range(rank))
    if rank:
        first, second = axis_of(a.get("dim0", 0), rank), axis_of(a.get("dim1", rank - 1), rank)
        order[first], order[second] = order[second], order[first]
    return b.transpose(b.value(a["self"]), order)


def _unsqueeze(b: Builder, a: _Args, op: Operator) -> str:
    return b.unsqueeze(b.value(a["self"]), axis_of(a["dim"], b.rank(a["self"]) + 1))


def _squeeze(b: Builder, a: _Args, op: Operator) -> str:
    shape = b.shape(a["self"])
    dims = range(len(shape)) if "dim" not in a else [a["dim"]] if isinstance(a["dim"], int) else a["dim"]
    gone = sorted({axis_of(axis, len(shape)) for axis in dims if shape[axis] == 1})
    return b.squeeze(b.value(a["self"]), *gone) if gone else b.value(a["self"])


def _expand(b: Builder, a: _Args, op: Operator) -> str:
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in a["size"]]
    x = b.value(a["self"])
    return b.emit("Expand", x, b.sizes(sizes), dtype=b.dtype(x)) if sizes else x


def _expand_as(b: Builder, a: _Args, op: Operator) -> str:
    shape = b.emit("Shape", b.value(a["other"]), dtype="int64", shape=(b.rank(a["other"]),))
    return b.emit("Expand", b.value(a["self"]), shape, dtype=b.dtype(a["self"]))


def _repeat(b: Builder, a: _Args, op: Operator) -> str:
    x, more = b.value(a["self"]), len(a["repeats"]) - b.rank(a["self"])
    if more:
        x = b.unsqueeze(x, *range(more))
    return b.emit("Tile", x, b.sizes(a["repeats"]), dtype=b.dtype(x))


CONVERTERS |= {f"aten.{name}.default": _view for name in ("view", "_unsafe_view", "reshape")}
CONVERTERS |= {
    "aten.flatten.using_ints": _flatten,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _transpose,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.expand.default": _expand,
    "aten.expand_as.default": _expand_as,
    "aten.repeat.default": _repeat,
}
CONVERTERS |= {f"aten.squeeze.{overload}": _squeeze for overload in ("default", "dim", "dims")}

# ------------------------------------------------------------------------------------------------------------ slices and joins


def _select(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    return b.emit("Gather", x, b.value(a["index"], "int64"), dtype=b.dtype(x), axis=axis_of(a["dim"], b.rank(x)))


def _slice(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    start, end = (0 if a["start"] is None else a["start"]), (_END if a["end"] is None else a["end"])
    return b.slice(x, axis_of(a["dim"], b.rank(x)), start, end, a["step"])


def _narrow(b: Builder, a: _Args, op: Operator) -> str:
    if not isinstance(a["start"], int) or not isinstance(a["length"], int) or a["start"] < 0:
        raise Unconvertible("at a computed place")
    x = b.value(a["self"])
    return b.slice(x, axis_of(a["dim"], b.rank(x)), a["start"], a["start"] + a["length"])


def _cat(b: Builder, a: _Args, op: Operator) -> str:
    given = [tensor for tensor in a["tensors"] if b.shape(tensor) != (0,)]  # torch passes over what has no dimensions to speak of
    dtypes = [b.dtype(tensor) for tensor in given]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = str(np.promote_types(DTYPES[dtype], DTYPES[other]))
    return b.emit("Concat", *(b.value(tensor, dtype) for tensor in given), dtype=dtype, axis=axis_of(a["dim"], b.rank(given[0])))


def _stack(b: Builder, a: _Args, op: Operator) -> str:
    axis = axis_of(a["dim"], b.rank(a["tensors"][0]) + 1)
    parts = [b.unsqueeze(b.value(tensor), axis) for tensor in a["tensors"]]
    return b.emit("Concat", *parts, dtype=b.dtype(parts[0]), axis=axis)


def _split(b: Builder, a: _Args, op: Operator) -> list[str]:
    x = b.value(a["self"])
    axis = axis_of(a["dim"], b.rank(x))
    if "split_sizes" in a:
        sizes = list(a["split_sizes"])
    else:
        whole = b.known(x, axis)
        each = a["split_size"] if "split_size" in a else -(-whole // a["chunks"])
        if not isinstance(each, int):
            raise Unconvertible("into a computed size")
        sizes = [min(each, whole - start) for start in range(0, whole, each)]
    results = [(b.dtype(x), tuple(size if i == axis else s for i, s in enumerate(b.shape(x)))) for size in sizes]
    return b.emit_all("Split", [x, b.sizes(sizes)], results, axis=axis)


def _unbind(b: Builder, a: _Args, op: Operator) -> list[str]:
    x = b.value(a["self"])
    axis = axis_of(a["dim"], b.rank(x))
    return [b.emit("Gather", x, b.scalar(i, "int64"), dtype=b.dtype(x), axis=axis) for i in range(b.known(x, axis))]


def _roll(b: Builder, a: _Args, op: Operator) -> str:
    x, shape = b.value(a["self"]), b.shape(a["self"])
    if not a["dims"]:
        raise Unconvertible("of the flattened tensor")
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        axis = axis_of(dim, len(shape))
        size = b.known(a["self"], axis)
        if size and (at := -shift % size):
            x = b.emit("Concat", b.slice(x, axis, at, _END), b.slice(x, axis, 0, at), dtype=b.dtype(x), shape=shape, axis=axis)
    return x


def _flip(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    for dim in a["dims"]:
        x = b.slice(x, axis_of(dim, b.rank(x)), -1, -_END, -1)
    return x


def _pad(b: Builder, a: _Args, op: Operator) -> str:
    x, rank, widths = b.value(a["self"]), b.rank(a["self"]), list(a["pad"] if "pad" in a else a["padding"])
    if not all(isinstance(width, int) for width in widths):
        raise Unconvertible("by a computed width")
    if not any(widths):
        return x
    mode = str(a.get("mode", "constant"))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise Unconvertible(f"in the mode {mode!r}")
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in range(len(widths) // 2)]  # from the last axis on
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs[::-1]
    dtype = b.dtype(x)
    listed = b.ints(*(before for before, _ in pairs), *(after for _, after in pairs))
    filling = [b.value(a.get("value") or 0, dtype)] if mode == "constant" else []
    return b.emit("Pad", x, listed, *filling, dtype=dtype, mode=modes[mode])


def _diff(b: Builder, a: _Args, op: Operator) -> str:
    x = b.value(a["self"])
    axis, dtype = axis_of(a["dim"], b.rank(x)), b.dtype(x)
    if a["n"] != 1 or dtype == "bool":
        raise Unconvertible(f"{a['n']} times, of {dtype}")
    parts = [b.value(part, dtype) for part in (a["prepend"], a["self"], a["append"]) if part is not None]
    if len(parts) > 1:
        x = b.emit("Concat", *parts, dtype=dtype, shape=("?",) * b.rank(x), axis=axis)
    return b.emit("Sub", b.slice(x, axis, 1, _END), b.slice(x, axis, 0, -1), dtype=dtype)


def _triangle(upper: int) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        x = b.value(a["self"])
        if (dtype := b.dtype(x)) == "bool":  # the kernel knows numbers
            made = b.emit("Trilu", b.cast(x, "int64"), b.scalar(a["diagonal"], "int64"), dtype="int64", upper=upper)
            return b.cast(made, dtype)
        return b.emit("Trilu", x, b.scalar(a["diagonal"], "int64"), dtype=dtype, upper=upper)

    return run


CONVERTERS |= {
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": _unbind,
    "aten.roll.default": _roll,
    "aten.flip.default": _flip,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.diff.default": _diff,
    "aten.tril.default": _triangle(0),
    "aten.triu.default": _triangle(1),
}
