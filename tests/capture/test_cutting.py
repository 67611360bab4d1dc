"""cut(): a plan becomes shards, and a plan for something else does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import partitioner
from nodes.engines import load_engine
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from splitnet.errors import BadPlan
from splitnet.plan import NodeRef, Plan, StageSpec
from splitnet.shard import open_shard


@pytest.fixture(scope="module")
def model() -> ModelGraph:
    torch.manual_seed(0)
    return partitioner.capture(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(2, 4))


@pytest.fixture(scope="module")
def plan(model: ModelGraph) -> Plan:
    layout = lay_out(model.structure, {"linear": 0, "relu": 0, "linear_1": 1})
    names = {0: "front", 1: "back"}
    return Plan(
        model=model.name, model_sha256=model.sha256, objective="latency", nodes=(NodeRef("n", "h:1"),),
        stages=tuple(StageSpec(names[s.index], "n", s.operators, s.inputs, s.outputs) for s in layout.stages),
        transfers=layout.transfers(names), inputs=model.structure.inputs, outputs=model.structure.outputs,
    )  # fmt: skip


def test_shards_of_a_plan(model: ModelGraph, plan: Plan, tmp_path: Path) -> None:
    shards = partitioner.cut(model, plan, tmp_path)
    assert list(shards) == ["front", "back"]
    again = partitioner.cut(model, plan, tmp_path / "again")
    assert {name: s.sha256 for name, s in shards.items()} == {name: s.sha256 for name, s in again.items()}
    named = plan.with_shards({name: s.sha256 for name, s in shards.items()})
    assert named.stages[1].shard == open_shard(tmp_path / "back").sha256
    x = np.ones((3, 4), np.float32)
    middle = load_engine(shards["front"], threads=1).run({"input": x})
    answer = load_engine(shards["back"], threads=1).run(middle)
    assert torch.equal(torch.from_numpy(answer["linear_1"]), model.run({"input": torch.from_numpy(x)})["output"])
    assert load_engine(shards["front"], threads=1).memory_bytes() == 4 * (4 * 8 + 8) == shards["front"].manifest.param_bytes


def test_a_plan_for_another_model(model: ModelGraph, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="the plan is for the model") as caught:
        partitioner.cut(model, dataclasses.replace(plan, model_sha256="1" * 64), tmp_path)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_plan_whose_stages_are_not_this_models(model: ModelGraph, plan: Plan, tmp_path: Path) -> None:
    moved = dataclasses.replace(
        plan,
        stages=(
            dataclasses.replace(plan.stages[0], operators=("linear",)),
            dataclasses.replace(plan.stages[1], operators=("relu", "linear_1")),
        ),
    )
    with pytest.raises(BadPlan, match="stage 'front': the plan's outputs are"):
        partitioner.cut(model, moved, tmp_path)
    less = dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], operators=("linear",)), plan.stages[1]))
    with pytest.raises(BadPlan, match="'relu' is on no stage"):
        partitioner.cut(model, less, tmp_path)


def test_vertices_are_timed(model: ModelGraph) -> None:
    seen: list[str] = []
    model.run(dict(model.example_inputs), on_vertex=lambda name, seconds: seen.append(name) if seconds >= 0 else None)
    assert seen == ["linear", "relu", "linear_1"]
