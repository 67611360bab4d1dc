"""The whole model again, made of its stages' shards: for a comparison with one machine alone, without the model's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from partitioner.weight_files import weights_member
from splitnet.errors import BadShard
from splitnet.graph import GraphDocument, Input, Operator, Ref, WeightSpec, parse
from splitnet.plan import CLIENT, NodeRef, Plan, StageSpec, Transfer
from splitnet.shard import Shard, write_shard

__all__ = ["merge", "on_one_node"]

_STAGE = "whole"


def merge(plan: Plan, shards: Mapping[str, Shard], directory: Path) -> Shard:
    """One shard that computes what the plan's stages compute together, bit for bit. What several stages compute again is computed once.

    Raises BadShard for a shard of an engine whose graph cannot be read here."""
    operators: list[Operator] = []
    weights: dict[str, WeightSpec] = {}
    kinds: dict[str, str] = {}
    made: set[str] = set()
    tensors: dict[str, Any] = {}
    for index, stage in enumerate(plan.stages):
        shard = shards[stage.name]
        if shard.manifest.engine != "torch-graph":
            raise BadShard(f"stage {stage.name!r} is for engine {shard.manifest.engine!r}: its graph cannot be joined with others")
        document = parse(shard.member("graph.json").read_bytes())
        kinds |= {given.name: given.kind for given in document.inputs}
        weights |= document.weights
        for path in shard.weights:
            tensors |= load_file(str(path))
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
    stage = _stage(plan, "")
    return write_shard(
        directory,
        model=plan.model,
        model_sha256=plan.model_sha256,
        stage=_STAGE,
        engine="torch-graph",
        inputs=stage.inputs,
        outputs=stage.outputs,
        members={"graph.json": whole.to_bytes(), **weights_member(directory, tensors)},
        param_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        activation_bytes=max(s.activation_bytes for s in plan.stages),
    )


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
