"""The ONNX graphs of a plan's stages as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitnet.onnx_nouns import WEIGHT, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.tensors import TensorSpec

__all__ = ["join"]


def join(graphs: Sequence[OnnxGraph], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> OnnxGraph:
    """Computes what they compute one after the other, which each take values of the ones before by name. What a graph keeps to itself may be called the same as in
    another. They are all of one operator set."""
    crossing = {spec.name for spec in (*inputs, *outputs)} | {value.name for graph in graphs for value in (*graph.inputs, *graph.outputs)}
    made: set[str] = set()
    nodes: list[OnnxNode] = []
    constants: dict[str, OnnxTensor] = {}
    weights: dict[str, OnnxValue] = {}
    for index, graph in enumerate(graphs):
        own: dict[str, str] = {}  # names here -> names in the whole

        def called(name: str, own: Mapping[str, str] = own, index: int = index) -> str:
            kept = not name or name in crossing or name.startswith(WEIGHT)
            return own.get(name, name if kept else f"{index}/{name}")

        weights |= {weight.name: weight for weight in graph.weights}
        constants |= {called(name): tensor for name, tensor in graph.constants.items()}
        for node in graph.nodes:
            taken = tuple(called(name) for name in node.inputs)
            for name in node.outputs:
                if name in made:  # computed again here, of the same values
                    own[name] = f"{index}/again/{name}"
            results = tuple(called(name) for name in node.outputs)
            made.update(name for name in results if name)
            nodes.append(OnnxNode(node.op, taken, results, node.attributes))
    return OnnxGraph(
        inputs=tuple(OnnxValue(spec.name, spec.dtype, spec.shape) for spec in inputs),
        outputs=tuple(OnnxValue(spec.name, spec.dtype, spec.shape) for spec in outputs),
        weights=tuple(weights[name] for name in sorted(weights)),
        constants=constants,
        nodes=tuple(nodes),
        opset=graphs[0].opset,
    )
