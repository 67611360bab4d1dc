"""Which engine runs a stage: the shard's own unless something else is asked for; with auto, the fastest, by measurement."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import chain, split, stages_by

import partitioner
import splitnet
from nodes.config import NodeConfig
from nodes.engines import AUTO, able, choosing, load_engine
from nodes.engines.choosing import choose_engine, shapes_of
from nodes.testing import LocalCluster
from partitioner.cutting import write_stage
from partitioner.layout import lay_out
from partitioner.profiling_nodes import Options
from splitnet.errors import BadInput, BadShard, MissingExtra
from splitnet.install import deploy
from splitnet.node_status import describe_node
from splitnet.shard import Shard, open_shard
from splitnet.tensors import TensorSpec


class Many(torch.nn.Module):
    """Small operators in a row: what ONNX Runtime is many times faster at than an interpreter of torch's operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = torch.tanh(x * 0.5 + 1.0)
        return x


class Odd(torch.nn.Module):
    """An operator that has no counterpart in ONNX here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x).abs()


def shard(module: torch.nn.Module, folder: Path) -> Shard:
    model = partitioner.capture(module.eval(), torch.randn(2, 16))
    stage = lay_out(model.structure, {v.name: 0 for v in model.structure.vertices if v.op != "input"}).stages[0]
    write_stage(model, stage, folder, name="s")
    return open_shard(folder)


def test_the_fastest_stays_and_it_is_said_why(tmp_path: Path) -> None:
    chosen = choose_engine(shard(Many(), tmp_path), {"batch": 2}, threads=1)
    assert chosen.engine.name == "onnx"
    assert set(chosen.seconds) == {"torch-graph", "torch-fast", "onnx"}
    assert chosen.seconds["onnx"] < chosen.seconds["torch-graph"]
    assert chosen.why.startswith("onnx: measured onnx ")
    assert "torch-graph" in chosen.why


def test_a_graph_without_a_counterpart_says_so_and_is_run_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = shard(Odd(), tmp_path)
    assert able(odd) == ("torch-graph", "torch-fast")
    (note,) = odd.manifest.notes
    assert note.startswith("no graph for ONNX Runtime: operator aten.")
    assert note in choose_engine(odd, {}, threads=1).why
    monkeypatch.setattr(choosing, "able", lambda _: ("torch-graph",))
    chosen = choose_engine(odd, {}, threads=1)
    assert (chosen.engine.name, chosen.why) == ("torch-graph", f"torch-graph: the only one that can run this stage here ({note})")
    with pytest.raises(BadShard, match=r"stage 's' has no graph\.onnx, which engine 'onnx' runs: no graph for ONNX Runtime") as caught:
        load_engine(odd, threads=1, engine="onnx")
    assert "--engine auto" in caught.value.remedy


def test_a_box_without_the_engine_is_told_which_one_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = shard(Many(), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else sys)
    assert able(both) == ("onnx",)
    with pytest.raises(MissingExtra, match="engine 'torch-graph' needs torch") as caught:
        load_engine(both, threads=1)
    assert caught.value.remedy == "pip install 'splitnet[node]', or start the node with --engine onnx"


def test_symbolic_shapes_in_numbers() -> None:
    specs = [TensorSpec("a", "float32", ("batch", 3, "2*batch + 1", "length - 2")), TensorSpec("b", "int64", ())]
    assert shapes_of(specs, {"batch": 4, "length": 9}) == {"a": (4, 3, 9, 7), "b": ()}
    with pytest.raises(BadInput, match="cannot be made up"):
        shapes_of([TensorSpec("a", "float32", ("(batch // 2)",))], {"batch": 4})


def test_a_node_refuses_an_engine_that_there_is_not() -> None:
    with pytest.raises(BadInput, match="--engine 'abacus' is not one of reference, auto, torch, torch-graph, torch-fast, onnx"):
        NodeConfig(name="a", engine="abacus")


# ----------------------------------------------------------------------------------------------------------------- on real nodes


@pytest.fixture(scope="module", params=["onnx", AUTO])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with LocalCluster(2, engine=request.param) as nodes:
        yield nodes


def test_nodes_serve_with_it_and_answer_within_rounding(cluster: LocalCluster, tmp_path: Path) -> None:
    made = split(chain(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    deploy(made.plan, made.shards, name="chain")
    with splitnet.Client(made.address, deployment="chain") as client:
        for batch in (1, 3):
            given = made.inputs(batch)
            np.testing.assert_allclose(client.infer(given)["output"], made.whole(given)["output"], rtol=1e-5, atol=1e-6)
    for name, address in cluster.addresses.items():
        (deployment,) = asyncio.run(describe_node(name, address)).deployments
        for stage in deployment.stages:
            assert stage.engine == "onnx" or cluster.config(name).engine == AUTO


def test_a_profile_is_measured_with_the_engine_that_will_serve(cluster: LocalCluster) -> None:
    model = partitioner.capture(Many().eval(), torch.randn(2, 16))
    profile = partitioner.profile(model, repeats=2, cluster=cluster.cluster(), options=Options(budget_s=0.2))
    column = profile.columns["a"]
    assert "engine onnx (shared out among the operators as by torch-graph)" in column.how
    assert 0 < sum(column.seconds) < profile.whole_s
