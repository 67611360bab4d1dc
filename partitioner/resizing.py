"""A captured model at other sizes: a batch of 8, 128 tokens. The graph is the same; its figures are measured again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from partitioner.graph import ModelGraph
from partitioner.kinds import estimate_flops
from partitioner.layout import lay_out
from partitioner.sizes import dimension_size
from partitioner.structure import Vertex
from splitnet.errors import BadInput, SplitnetError
from splitnet.graph import Operator, Ref, Weight, references
from splitnet.interpreter import Program

__all__ = ["at_sizes"]


def at_sizes(model: ModelGraph, sizes: Mapping[str, int]) -> ModelGraph:
    """The model with example inputs of these sizes ("batch", "sequence": see `structure.symbols`), and every byte count and estimate at
    them. The example inputs are repeated or shortened. Its identity (sha256) and weights stay; cut with the model that was profiled.

    Raises BadInput for a symbol that the model does not have, a size below 1, or sizes that the model does not run with.
    """
    structure = model.structure
    for symbol, size in sizes.items():
        if symbol not in structure.symbols:
            known = ", ".join(structure.symbols) or "none: every size is fixed"
            raise BadInput(f"the model {structure.name!r} has no symbolic size {symbol!r}; it has {known}")
        if size < 1:
            raise BadInput(f"size {symbol!r} must be at least 1, got {size}")
    symbols = {**structure.symbols, **sizes}
    if symbols == dict(structure.symbols):
        return model
    inputs = {}
    for spec in structure.inputs:
        tensor = model.example_inputs[spec.name]
        for axis, dimension in enumerate(spec.shape):
            wanted = dimension_size(spec.name, dimension, symbols)
            if wanted != tensor.shape[axis]:
                tensor = tensor.index_select(axis, torch.arange(wanted) % tensor.shape[axis])
        inputs[spec.name] = tensor
    shapes, nbytes = _measured(model, inputs)
    vertices = tuple(_resized(model, v, shapes, nbytes) for v in structure.vertices)
    resized = dataclasses.replace(structure, batch=symbols.get("batch", 1), vertices=vertices, symbols=symbols)
    return dataclasses.replace(model, structure=resized, example_inputs=inputs)


def _measured(model: ModelGraph, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Runs the model once: shape of each tensor, bytes of each value."""
    structure = model.structure
    stage = lay_out(structure, {v.name: 0 for v in structure.vertices if v.op != "input"}).stages[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in (*inputs.items(), *model.weights.items())}
    nbytes = {name: tensor.nbytes for name, tensor in inputs.items()}

    def observe(op: Operator, _seconds: float, result: Any) -> None:
        names = (op.out,) if isinstance(op.out, str) else op.out
        for value, item in zip(names, (result,) if isinstance(op.out, str) else result, strict=False):
            if value is not None and isinstance(item, torch.Tensor):
                shapes[value], nbytes[value] = tuple(item.shape), _stored_bytes(item)

    with torch.inference_mode():
        program = Program(model.document(stage), torch, {name: weight.detach() for name, weight in model.weights.items()})
        try:
            program.run([inputs[spec.name] for spec in stage.inputs], observe)
        except (SplitnetError, RuntimeError) as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
            raise BadInput(f"the model {structure.name!r} does not run with inputs {given}: {text[:300]}") from error
    return shapes, nbytes


def _stored_bytes(tensor: torch.Tensor) -> int:
    """What the wire sends: a broadcast dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _resized(model: ModelGraph, vertex: Vertex, shapes: Mapping[str, tuple[int, ...]], nbytes: Mapping[str, int]) -> Vertex:
    before = model.structure.value_bytes
    value_bytes = tuple(nbytes.get(spec.name, before[spec.name]) for spec in vertex.values)
    flops = vertex.flops
    if (op := model.operators.get(vertex.name)) is not None:
        arguments = references((op.args, op.kwargs))
        tensors = [shapes[r.name] for r in arguments if isinstance(r, Ref | Weight) and r.name in shapes]
        flops = estimate_flops(op.op, tensors, shapes.get(op.results[0], ()))
    activations = sum(value_bytes) + sum(nbytes.get(value, before[value]) for value in vertex.inputs if vertex.op != "size")
    return dataclasses.replace(vertex, value_bytes=value_bytes, activation_bytes=activations, flops=flops)
