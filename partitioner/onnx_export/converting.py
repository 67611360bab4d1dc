"""The loop over a document's operators, each handed to the function that knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from partitioner.onnx_export import arithmetic, indices, network, reductions, shapes
from partitioner.onnx_export.builder import Builder, Converter, Unconvertible
from splitnet.graph import GraphDocument, Operator
from splitnet.onnx_nouns import OnnxGraph, OnnxValue
from splitnet.tensors import TensorSpec

__all__ = ["convert", "converters"]

_NUMBERS = {"int": "int64", "float": "float64", "bool": "bool"}
_PYTHON_DTYPES = {"truediv": "float64", "float": "float64", "sqrt": "float64"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "not", "and", "or"}


def converters() -> Mapping[str, Converter]:
    """Every operator of a document that can be converted."""
    return {**arithmetic.CONVERTERS, **reductions.CONVERTERS, **shapes.CONVERTERS, **indices.CONVERTERS, **network.CONVERTERS}


def convert(document: GraphDocument, values: Mapping[str, TensorSpec]) -> OnnxGraph:
    """`values`: dtype and shape of each value of the model. Inputs and outputs keep their names, weights those of the document. Raises
    Unconvertible that says what has no counterpart."""
    builder = Builder(document.weights)
    known = converters()
    inputs = []
    for given in document.inputs:
        spec = values[given.name]
        builder.define(given.name, given.name, spec.dtype, spec.shape)
        inputs.append(OnnxValue(given.name, spec.dtype, spec.shape))
    for op in document.operators:
        name = op.op.partition(".")[2] if op.op.startswith("py.") else op.op
        if op.op not in known:
            raise Unconvertible(f"operator {op.op} (-> {', '.join(op.results)}) has no counterpart")
        try:
            made = known[op.op](builder, _arguments(op), op)
            listed = [made] if isinstance(made, str) else list(made)
            names = [op.out] if isinstance(op.out, str) else list(op.out)
            for result, value in zip(names, listed, strict=False):
                if result is not None:
                    builder.define(result, *_typed(builder, value, values.get(result), name))
        except Unconvertible as error:
            raise Unconvertible(f"operator {op.op} (-> {', '.join(op.results)}): {error}") from None
    outputs = [OnnxValue(name, values[name].dtype, values[name].shape) for name in document.outputs]
    return builder.finish(inputs, outputs)


def _typed(builder: Builder, value: str, spec: TensorSpec | None, name: str) -> tuple[str, str, tuple[int | str, ...]]:
    """The value as what the model says that it is; what the document computes of sizes alone, the model does not list."""
    if spec is None:
        dtype = "bool" if name in _COMPARISONS else _PYTHON_DTYPES.get(name, "int64")
        return builder.cast(value, dtype), dtype, ()
    return builder.cast(value, spec.dtype), spec.dtype, spec.shape


def _arguments(op: Operator) -> dict[str, Any]:
    """By the names of torch's schema, with its defaults; Python's operators take theirs by position: "0", "1"."""
    if op.op.startswith("py."):
        return {str(i): argument for i, argument in enumerate(op.args)}
    _, packet, overload = op.op.split(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
    arguments = {declared.name: declared.default_value if declared.has_default_value() else None for declared in schema.arguments}
    arguments |= {declared.name: given for declared, given in zip(schema.arguments, op.args, strict=False)}
    return arguments | dict(op.kwargs)
