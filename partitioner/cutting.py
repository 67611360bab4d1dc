"""cut: a captured model and a plan become shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from partitioner.graph import ModelGraph, weight_spec
from partitioner.layout import Layout, StageLayout, lay_out_again
from partitioner.onnx_export import onnx_member
from partitioner.onnx_model import OnnxModel
from partitioner.weight_files import weights_member
from splitnet.errors import BadPlan
from splitnet.noise import Noise
from splitnet.onnx_format import to_bytes
from splitnet.onnx_nouns import ONNX_MEMBER
from splitnet.plan import Plan
from splitnet.shard import Shard, write_shard

__all__ = ["cut", "write_stage"]


def cut(model: ModelGraph, plan: Plan, directory: str | Path) -> dict[str, Shard]:
    """Writes the shard of each stage to `directory`/<stage name>, and returns them by stage name; `plan.with_shards` takes their
    hashes. A shard that stood there is replaced. Raises BadPlan for a plan that was made for another model, or whose stages are not
    what this model gives for their operators."""
    if plan.model_sha256 != model.sha256:
        raise BadPlan(
            f"the plan is for the model {plan.model!r} ({plan.model_sha256[:12]}), not for {model.name!r} ({model.sha256[:12]})",
            remedy="make the plan again for this model",
        )
    layout = lay_out_again(model.structure, plan.stages)
    _check(plan, layout)
    shards = {}
    for stage in layout.stages:
        name = plan.stages[stage.index].name
        shards[name] = write_stage(model, stage, Path(directory) / name, name=name, noise=plan.noise if stage.index == 0 else None)
    return shards


def write_stage(
    model: ModelGraph, stage: StageLayout, directory: Path, *, name: str, weights: Iterable[str] | None = None, noise: Noise | None = None
) -> Shard:
    """Writes one stage's shard. `weights`: only these, for a shard that is measured and never serves (default: all)."""
    engine, graphs, notes = _graphs(model, stage)
    stored = _stored(model.weights, stage.params if weights is None else weights)
    return write_shard(
        directory,
        model=model.name,
        model_sha256=model.sha256,
        stage=name,
        engine=engine,
        inputs=stage.inputs,
        outputs=stage.outputs,
        members={**graphs, **weights_member(directory, stored)},
        param_bytes=stage.param_bytes,
        activation_bytes=stage.activation_bytes,
        notes=notes,
        noise=noise,
    )


def _graphs(model: ModelGraph, stage: StageLayout) -> tuple[str, dict[str, bytes], tuple[str, ...]]:
    """The shard's engine, the members that say what to compute, and notes for people."""
    if isinstance(model, OnnxModel):
        return "onnx", {ONNX_MEMBER: to_bytes(model.stage_graph(stage))}, ()
    document = model.document(stage)
    onnx_graph, notes = onnx_member(document, model.structure.value)
    return "torch-graph", {"graph.json": document.to_bytes(), **onnx_graph}, notes


def _stored(weights: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Each weight as its bytes lie in memory, and apart from the others: safetensors refuses tensors that share memory."""
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in names:
        weight = weights[name].detach().cpu()
        lying = weight.permute(weight_spec(weight).order).contiguous()
        address = lying.untyped_storage().data_ptr()
        if address in seen or lying.untyped_storage().nbytes() != lying.nbytes:
            lying = lying.clone()
        seen.add(address)
        stored[name] = lying
    return stored


def _check(plan: Plan, layout: Layout) -> None:
    described = {stage.index: stage for stage in layout.stages}
    for index, stage in enumerate(plan.stages):
        if index not in described:
            raise BadPlan(f"stage {stage.name!r} has nothing to compute", remedy="make the plan again")
        for what, planned, found in (
            ("inputs", stage.inputs, described[index].inputs),
            ("outputs", stage.outputs, described[index].outputs),
        ):
            if sorted(s.name for s in planned) != sorted(s.name for s in found):
                raise BadPlan(
                    f"stage {stage.name!r}: the plan's {what} are {[s.name for s in planned]}, its operators need {[s.name for s in found]}",
                    remedy="make the plan again with this version of splitnet",
                )
