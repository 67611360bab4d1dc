"""An ONNX graph while it is being made: values with their dtypes and shapes, constants that are kept once, operators in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from splitnet.graph import Operator, Ref, Weight, WeightSpec
from splitnet.onnx_nouns import OPSET, WEIGHT, Attribute, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.tensors import DTYPES, dtype_name

__all__ = ["Builder", "Converter", "Unconvertible", "axis_of", "is_float"]

#: What ONNX Runtime computes with on processors; it has next to nothing for bfloat16 and complex numbers.
_COMPUTED = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")

Dims = tuple[int | str, ...]
#: Emits what computes one operator (its arguments by their names in torch's schema), and returns the value, or one per result.
Converter = Callable[["Builder", Mapping[str, Any], Operator], str | Sequence[str]]


class Unconvertible(Exception):
    """The graph has no ONNX counterpart; the message says which operator, and why, to a person."""


def is_float(dtype: str) -> bool:
    return dtype.startswith("float")


def axis_of(axis: int, rank: int) -> int:
    """A torch axis, which may count from the end."""
    return axis + rank if axis < 0 else axis


class Builder:
    """Names: values keep those of the document; WEIGHT goes before those of weights; what is made in between is
    called "<number>"."""

    def __init__(self, weights: Mapping[str, WeightSpec]) -> None:
        self._specs = weights
        self._weights: dict[str, OnnxValue] = {}
        self._lying: dict[str, str] = {}  # weight -> the value with its axes in order
        self._constants: dict[str, OnnxTensor] = {}
        self._constant_names: dict[OnnxTensor, str] = {}
        self._nodes: list[OnnxNode] = []
        self._alias: dict[str, str] = {}  # document value -> ONNX value
        self._types: dict[str, tuple[str, Dims]] = {}
        self._count = 0

    # ----------------------------------------------------------------------------------------------------------------- values

    def define(self, name: str, value: str, dtype: str, shape: Dims) -> None:
        """From now on the document's value `name` is `value`."""
        if dtype not in _COMPUTED:
            raise Unconvertible(f"{dtype} values have no kernels in ONNX Runtime")
        self._alias[name] = value
        self._types[value] = (dtype, shape)

    def value(self, argument: Any, dtype: str | None = None) -> str:
        """A value, a weight or a number as an ONNX value; as `dtype`, if that is given."""
        match argument:
            case Ref(name):
                found = self._alias[name]
            case Weight(name):
                found = self._weight(name)
            case bool() | int() | float():
                return self.scalar(
                    argument, dtype or ("bool" if isinstance(argument, bool) else "int64" if isinstance(argument, int) else "float32")
                )
            case str():
                found = argument  # one that was made here
            case _:
                raise Unconvertible(f"an argument {argument!r:.40}")
        return found if dtype is None else self.cast(found, dtype)

    def dtype(self, argument: Any) -> str:
        return self._types[self.value(argument)][0]

    def shape(self, argument: Any) -> Dims:
        return self._types[self.value(argument)][1]

    def rank(self, argument: Any) -> int:
        return len(self.shape(argument))

    def known(self, argument: Any, axis: int) -> int:
        """A size that is the same in every run."""
        size = self.shape(argument)[axis]
        if isinstance(size, str):
            raise Unconvertible(f"needs a fixed size, and dimension {axis} is {size!r}")
        return size

    def _weight(self, name: str) -> str:
        if name not in self._lying:
            spec = self._specs[name]
            if spec.dtype not in _COMPUTED:
                raise Unconvertible(f"{spec.dtype} weights have no kernels in ONNX Runtime")
            stored = tuple(spec.shape[axis] for axis in spec.order)
            value = OnnxValue(WEIGHT + name, spec.dtype, stored)
            self._weights[name] = value
            self._types[value.name] = (spec.dtype, stored)
            back = [spec.order.index(axis) for axis in range(len(stored))]
            self._lying[name] = (
                value.name
                if back == sorted(back)
                else self.emit("Transpose", value.name, dtype=spec.dtype, shape=spec.shape, perm=tuple(back))
            )
        return self._lying[name]

    def constant(self, array: np.ndarray) -> str:
        """Arrays with the same content are one value."""
        dtype = dtype_name(array.dtype)
        tensor = OnnxTensor(dtype, array.shape, np.ascontiguousarray(array).tobytes())
        if tensor not in self._constant_names:
            name = self._constant_names[tensor] = f"constant/{len(self._constants)}"
            self._constants[name] = tensor
            self._types[name] = (dtype, array.shape)
        return self._constant_names[tensor]

    def scalar(self, number: complex, dtype: str) -> str:
        kind = DTYPES[dtype]
        with np.errstate(over="ignore"):  # the least float32 as a float16 is -inf, as in torch
            return self.constant(np.array(number).astype(kind))

    def ints(self, *numbers: int) -> str:
        """A list as ONNX takes axes and sizes."""
        return self.constant(np.array(numbers, np.int64))

    def sizes(self, items: Sequence[Any]) -> str:
        """Sizes, of which some are computed, as one list."""
        if all(isinstance(item, int) for item in items):
            return self.ints(*items)
        parts = [self.ints(item) if isinstance(item, int) else self.unsqueeze(self.value(item), 0) for item in items]
        return parts[0] if len(parts) == 1 else self.emit("Concat", *parts, dtype="int64", shape=(len(items),), axis=0)

    # -------------------------------------------------------------------------------------------------------------- operators

    def emit(self, op: str, *inputs: str, dtype: str, shape: Dims = (), **attributes: Attribute) -> str:
        """One operator with one result. `shape` matters only where a later call asks for it."""
        return self.emit_all(op, inputs, [(dtype, shape)], **attributes)[0]

    def emit_all(self, op: str, inputs: Sequence[str], results: Sequence[tuple[str, Dims]], **attributes: Attribute) -> list[str]:
        names = []
        for dtype, shape in results:
            names.append(str(self._count))
            self._count += 1
            self._types[names[-1]] = (dtype, shape)
        self._nodes.append(OnnxNode(op, tuple(inputs), tuple(names), dict(sorted(attributes.items()))))
        return names

    def cast(self, value: str, dtype: str) -> str:
        from splitnet.onnx_format import ELEMENT_TYPES

        there, shape = self._types[value]
        if there == dtype:
            return value
        if dtype not in _COMPUTED:
            raise Unconvertible(f"{dtype} values have no kernels in ONNX Runtime")
        return self.emit("Cast", value, dtype=dtype, shape=shape, to=ELEMENT_TYPES[dtype])

    def unsqueeze(self, value: str, *axes: int) -> str:
        """`axes` count in the result, and not from the end."""
        dtype, shape = self._types[value]
        made = list(shape)
        for axis in sorted(axes):
            made.insert(axis, 1)
        return self.emit("Unsqueeze", value, self.ints(*axes), dtype=dtype, shape=tuple(made))

    def squeeze(self, value: str, *axes: int) -> str:
        dtype, shape = self._types[value]
        kept = tuple(size for axis, size in enumerate(shape) if axis not in axes)
        return self.emit("Squeeze", value, self.ints(*axes), dtype=dtype, shape=kept)

    def transpose(self, value: str, order: Sequence[int]) -> str:
        dtype, shape = self._types[value]
        if list(order) == list(range(len(shape))):
            return value
        return self.emit("Transpose", value, dtype=dtype, shape=tuple(shape[axis] for axis in order), perm=tuple(order))

    def slice(self, value: str, axis: int, start: Any, end: Any, step: int = 1) -> str:
        dtype, shape = self._types[value]
        made = tuple("?" if i == axis else size for i, size in enumerate(shape))
        return self.emit("Slice", value, self.sizes([start]), self.sizes([end]), self.ints(axis), self.ints(step), dtype=dtype, shape=made)

    # ------------------------------------------------------------------------------------------------------------------ whole

    def finish(self, inputs: Sequence[OnnxValue], outputs: Sequence[OnnxValue]) -> OnnxGraph:
        """The graph; its outputs get their names. What nothing uses is left out."""
        taken: set[str] = {value.name for value in inputs}
        renamed: dict[str, str] = {}
        makers = {name for node in self._nodes for name in node.outputs}
        ends = []
        for value in outputs:
            made = self._alias[value.name]
            if made in makers and made not in renamed and value.name not in taken:
                renamed[made] = value.name
            else:
                ends.append(OnnxNode("Identity", (renamed.get(made, made),), (value.name,)))
            taken.add(value.name)
        nodes = [
            OnnxNode(n.op, tuple(renamed.get(i, i) for i in n.inputs), tuple(renamed.get(o, o) for o in n.outputs), n.attributes)
            for n in self._nodes
        ] + ends
        needed = {value.name for value in outputs}
        kept = []
        for node in reversed(nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        return OnnxGraph(
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=tuple(weight for _, weight in sorted(self._weights.items()) if weight.name in needed),
            constants={name: tensor for name, tensor in self._constants.items() if name in needed},
            nodes=tuple(reversed(kept)),
            opset=OPSET,
        )
