"""The captured model: its structure, the operators behind it, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from partitioner.expressions import Tree
from partitioner.layout import StageLayout, lay_out
from partitioner.structure import Structure
from splitnet.errors import BadInput
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec, references
from splitnet.interpreter import Program

__all__ = ["ModelGraph"]


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """What `partitioner.capture` makes. The weights are the module's own tensors, not copies, where they start on a
    64-byte boundary."""

    structure: Structure
    operators: Mapping[str, Operator]  # by vertex
    kinds: Mapping[str, str]  # value -> "tensor", "int", "float" or "bool"
    sizes: Mapping[str, Tree]  # size value -> expression over symbols
    weights: Mapping[str, torch.Tensor]
    example_inputs: Mapping[str, torch.Tensor]

    @property
    def name(self) -> str:
        return self.structure.name

    @property
    def sha256(self) -> str:
        """Of the graph and its weights."""
        return self.structure.sha256

    def document(self, stage: StageLayout) -> GraphDocument:
        """The graph document of one stage of a layout."""
        return build_document(self, stage)

    def stage_runner(self, stage: StageLayout) -> Callable[[list[Any]], Sequence[Any]]:
        """What computes one stage of a layout here: the values of its inputs in their order, to those of its outputs. Without gradients it is to be
        called by whoever wants none."""
        return Program(self.document(stage), torch, self.weights).run

    def run(self, inputs: Mapping[str, torch.Tensor], on_vertex: Callable[[str, float], None] | None = None) -> dict[str, torch.Tensor]:
        """The whole model: flat names in, flat names out, at any batch size. `on_vertex` is called with each vertex and its seconds.
        Runs with as many threads as torch is set to, without gradients. Raises BadInput for a missing input."""
        if missing := [spec.name for spec in self.structure.inputs if spec.name not in inputs]:
            raise BadInput(f"input {missing[0]!r} is missing; the model needs {', '.join(s.name for s in self.structure.inputs)}")
        stage, program, vertices = self._whole
        with torch.no_grad():  # not inference_mode: see nodes/engines/torch_graph.py
            on_step = None
            if on_vertex is not None:

                def on_step(op: Operator, seconds: float, _result: Any) -> None:
                    if vertex := vertices.get(op.results[0] if op.results else ""):
                        on_vertex(vertex, seconds)

            results = program.run([inputs[spec.name] for spec in stage.inputs], on_step)
        by_value = dict(zip((spec.name for spec in stage.outputs), results, strict=True))
        return {output.spec.name: by_value[output.value] for output in self.structure.outputs}

    @cached_property
    def _whole(self) -> tuple[StageLayout, Program, dict[str, str]]:
        everything = {v.name: 0 for v in self.structure.vertices if v.op != "input"}
        stage = lay_out(self.structure, everything).stages[0]
        program = Program(self.document(stage), torch, self.weights)
        return stage, program, {v.values[0].name: v.name for v in self.structure.vertices if v.values}


def build_document(model: ModelGraph, stage: StageLayout) -> GraphDocument:
    structure = model.structure
    operators: list[Operator] = []
    known: dict[str, Any] = {}  # symbol or rendered expression -> where it stands
    for source in stage.size_sources:
        name = f"size:{len(known)}"
        operators.append(Operator("py.read", (Ref(source.value), source.axis, source.scale, source.offset), {}, name))
        known[source.text] = Ref(name)
    renamed: dict[str, Any] = {}
    for vertex_name in stage.executed:
        vertex = structure.vertex[vertex_name]
        if vertex.op == "size":
            value = vertex.values[0].name
            text = structure.sizes[value]
            renamed[value] = known[text] if text in known else _expand(model.sizes[value], known, operators)
            if any(spec.name == value for spec in stage.outputs):
                operators.append(Operator("py.int", (renamed[value],), {}, value))
                renamed[value] = Ref(value)
        else:
            op = model.operators[vertex_name]
            operators.append(Operator(op.op, _rename(op.args, renamed), {k: _rename(a, renamed) for k, a in op.kwargs.items()}, op.out))
    return GraphDocument(
        inputs=tuple(Input(spec.name, model.kinds[spec.name]) for spec in stage.inputs),
        weights={name: weight_spec(model.weights[name]) for name in sorted(stage.params)},
        operators=tuple(operators),
        outputs=tuple(spec.name for spec in stage.outputs),
    )


def _expand(tree: Tree, known: dict[str, Any], operators: list[Operator]) -> Any:
    """Appends what computes a size from symbols that are known."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return known[tree]
    key = repr(tree)
    if key not in known:
        args = tuple(_expand(part, known, operators) for part in tree[1:])
        name = f"size:{len(known)}"
        operators.append(Operator(f"py.{tree[0]}", args, {}, name))
        known[key] = Ref(name)
    return known[key]


def _rename(argument: Any, renamed: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return renamed.get(argument.name, argument)
    if isinstance(argument, tuple):
        return tuple(_rename(item, renamed) for item in argument)
    return argument


def weight_spec(weight: torch.Tensor) -> WeightSpec:
    """How the weight is stored. One that is dense in another order of axes keeps its order; one with gaps is packed."""
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda axis: (-strides[axis], axis))
    if not weight.permute(order).is_contiguous():
        order = list(range(weight.ndim))
    return WeightSpec(str(weight.dtype).removeprefix("torch."), tuple(weight.shape), tuple(order), weight.requires_grad)


def used_values(operators: Iterable[Operator]) -> set[str]:
    return {r.name for op in operators for r in references((op.args, op.kwargs)) if isinstance(r, Ref)}


def used_weights(op: Operator) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.name for r in references((op.args, op.kwargs)) if isinstance(r, Weight)))
