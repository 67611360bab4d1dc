"""The whole model again, made of its stages' shards: for a comparison with one machine alone, without the model's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from partitioner.onnx_export.joining import join
from partitioner.weight_files import weights_member
from splitnet.errors import BadShard
from splitnet.graph import GraphDocument, Input, Operator, Ref, WeightSpec, parse
from splitnet.onnx_format import from_bytes, to_bytes
from splitnet.onnx_nouns import ONNX_MEMBER
from splitnet.plan import CLIENT, NodeRef, Plan, StageSpec, Transfer
from splitnet.shard import Shard, write_shard

__all__ = ["merge", "on_one_node"]

_STAGE = "whole"
_MOST_NOTES = 16  # that a manifest holds


def merge(plan: Plan, shards: Mapping[str, Shard], directory: Path) -> Shard:
    """One shard that computes what the plan's stages compute together, for each engine that all of them have a graph for; with the engine that they were cut
    for, bit for bit.

    Raises BadShard for shards that were cut for several engines."""
    engines = sorted({shards[stage.name].manifest.engine for stage in plan.stages})
    if len(engines) > 1:
        raise BadShard(
            f"the shards were cut for different engines ({', '.join(engines)}): their graphs cannot be joined", remedy="cut the model again"
        )
    members, tensors = _joined_documents(plan, shards) if engines == ["torch-graph"] else ({}, _tensors(plan, shards))
    stage = _stage(plan, "")
    graphs = [shards[s.name].files.get(ONNX_MEMBER) for s in plan.stages]
    found = [path for path in graphs if path is not None]
    if len(found) == len(graphs):
        joined = join([from_bytes(path.read_bytes(), place=str(path)) for path in found], stage.inputs, stage.outputs)
        members[ONNX_MEMBER] = to_bytes(joined)
    notes = dict.fromkeys(note for s in plan.stages for note in shards[s.name].manifest.notes)
    return write_shard(
        directory,
        model=plan.model,
        model_sha256=plan.model_sha256,
        stage=_STAGE,
        engine=engines[0],
        inputs=stage.inputs,
        outputs=stage.outputs,
        members={**members, **weights_member(directory, tensors)},
        param_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        activation_bytes=max(s.activation_bytes for s in plan.stages),
        notes=tuple(notes)[:_MOST_NOTES],
    )


def _tensors(plan: Plan, shards: Mapping[str, Shard]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for stage in plan.stages:
        for path in shards[stage.name].weights:
            tensors |= load_file(str(path))
    return tensors


def _joined_documents(plan: Plan, shards: Mapping[str, Shard]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The graph document of the whole, and its weights. What several stages compute again is computed once."""
    operators: list[Operator] = []
    weights: dict[str, WeightSpec] = {}
    kinds: dict[str, str] = {}
    made: set[str] = set()
    for index, stage in enumerate(plan.stages):
        document = parse(shards[stage.name].member("graph.json").read_bytes())
        kinds |= {given.name: given.kind for given in document.inputs}
        weights |= document.weights
        shared = {name for op in document.operators for name in op.results if not name.startswith("size:")}
        for op in document.operators:
            renamed = _own_sizes(op, index, shared)
            if not made.issuperset(renamed.results) or not renamed.results:
                operators.append(renamed)
                made.update(renamed.results)
    whole = GraphDocument(
        inputs=tuple(Input(spec.name, kinds.get(spec.name, "tensor")) for spec in plan.inputs),
        weights=weights,
        operators=tuple(operators),
        outputs=tuple(dict.fromkeys(output.value for output in plan.outputs)),
    )
    return {"graph.json": whole.to_bytes()}, _tensors(plan, shards)


def on_one_node(plan: Plan, node: NodeRef) -> Plan:
    """The same model as one stage there."""
    received = sum(t.bytes for t in plan.transfers if t.source == CLIENT)
    return dataclasses.replace(
        plan,
        nodes=(node,),
        stages=(_stage(plan, node.name),),
        transfers=(
            Transfer(CLIENT, _STAGE, tuple(spec.name for spec in plan.inputs), bytes=received),
            Transfer(_STAGE, CLIENT, tuple(spec.name for spec in _stage(plan, "").outputs)),
        ),
        prediction=None,
    )


def _stage(plan: Plan, node: str) -> StageSpec:
    outputs = {output.value: dataclasses.replace(output.spec, name=output.value) for output in plan.outputs}
    return StageSpec(
        name=_STAGE,
        node=node,
        operators=tuple(dict.fromkeys(name for stage in plan.stages for name in stage.operators)),
        inputs=plan.inputs,
        outputs=tuple(outputs.values()),
        param_bytes=sum(stage.param_bytes for stage in plan.stages),
        activation_bytes=max(stage.activation_bytes for stage in plan.stages),
        seconds=sum(stage.seconds for stage in plan.stages),
    )


def _own_sizes(op: Operator, index: int, shared: set[str]) -> Operator:
    """Sizes that a stage reads from shapes are called the same in every stage, and mean different things."""

    def renamed(name: str) -> str:
        return f"stage{index}:{name}" if name.startswith("size:") and name not in shared else name

    def argument(a: Any) -> Any:
        if isinstance(a, Ref):
            return Ref(renamed(a.name))
        return tuple(argument(item) for item in a) if isinstance(a, tuple) else a

    out = renamed(op.out) if isinstance(op.out, str) else tuple(None if name is None else renamed(name) for name in op.out)
    return Operator(op.op, tuple(argument(a) for a in op.args), {k: argument(a) for k, a in op.kwargs.items()}, out)
