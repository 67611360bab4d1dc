"""A .onnx file as MODEL: measured, cut anywhere, served by ONNX Runtime; and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, diamond, split, stages_by

import partitioner
import splitnet
from nodes.engines import load_engine
from nodes.testing import LocalCluster
from partitioner.calibrating import Task, calibrate
from partitioner.cutting import cut, write_stage
from partitioner.layout import lay_out
from partitioner.merging import merge
from partitioner.profiling import HERE
from partitioner.samples import load_samples
from partitioner.splitting import travel
from splitnet.errors import BadModel, BadShard
from splitnet.install import deploy


def model(*nodes: Any, opset: int = 17, shape: tuple[Any, ...] = ("N", 3, 8, 8)) -> onnx.ModelProto:
    generator = np.random.default_rng(0)

    def weight(name: str, *sizes: int) -> Any:
        return numpy_helper.from_array(generator.standard_normal(sizes).astype(np.float32) * 0.2, name)

    default = (
        helper.make_node("Conv", ["image", "conv.w", "conv.b"], ["/conv/out"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["/conv/out"], ["hidden"]),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2.0, np.float32))),
        helper.make_node("Mul", ["hidden", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "/conv/out"], ["skip"]),
        helper.make_node("GlobalAveragePool", ["skip"], ["pooled"]),
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch_size"]),
        helper.make_node("Concat", ["batch_size", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["pooled", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.w"], ["scores"], transB=1),
    )
    graph = helper.make_graph(
        list(nodes) or list(default),
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [
            weight("conv.w", 16, 3, 3, 3), weight("conv.b", 16), weight("head.w", 40, 16),
            numpy_helper.from_array(np.array([0]), "zero"), numpy_helper.from_array(np.array([-1]), "rest"),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)], ir_version=8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    onnx.save(model(), str(path))
    return path


def reference(file: Path, image: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    answer: np.ndarray = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
    return answer


def test_it_has_a_structure_with_a_symbolic_batch(file: Path) -> None:
    loaded = partitioner.load_model(str(file))
    structure = loaded.structure
    assert structure.name == "small"
    assert [(s.name, s.shape) for s in structure.inputs] == [("image", ("batch", 3, 8, 8))]
    assert [v.op for v in structure.vertices][:4] == ["input", "onnx.Conv", "onnx.Relu", "onnx.Mul"]
    assert structure.vertex["/conv/out"].params == ("conv.w",)  # a bias of 64 bytes stands in the graph
    assert structure.vertex["batch_size"].cheap
    assert structure.param_bytes == 4 * (16 * 27 + 40 * 16)
    assert partitioner.load_model(str(file)).sha256 == loaded.sha256


def test_it_is_profiled_cut_and_served(file: Path, tmp_path: Path) -> None:
    loaded = partitioner.load_model(str(file))
    profile = partitioner.profile(loaded, repeats=2)
    assert sum(profile.columns[HERE].seconds) == pytest.approx(profile.whole_s)
    with LocalCluster(2) as cluster:
        made = split(loaded, cluster.cluster(), tmp_path, stages_by(a="/conv/out hidden", b="*"))
        assert {shard.manifest.engine for shard in made.shards.values()} == {"onnx"}
        deploy(made.plan, made.shards, name="small")
        with splitnet.Client(made.address, deployment="small") as client:
            for batch in (1, 4):
                image = np.random.default_rng(batch).standard_normal((batch, 3, 8, 8), np.float32)
                np.testing.assert_allclose(client.infer({"image": image})["scores"], reference(file, image), rtol=1e-5, atol=1e-6)
                whole = loaded.run({"image": torch.from_numpy(image)})
                np.testing.assert_allclose(whole["scores"].numpy(), reference(file, image), rtol=1e-5, atol=1e-6)
        plan = partitioner.plan(profile, cluster.cluster(), objective="latency")
        assert set(cut(loaded, plan, tmp_path / "planned")) == {stage.name for stage in plan.stages}


def test_torch_cannot_run_its_shards(file: Path, tmp_path: Path) -> None:
    loaded = partitioner.load_model(str(file))
    stage = lay_out(loaded.structure, {v.name: 0 for v in loaded.structure.vertices if v.op != "input"}).stages[0]
    shard = write_stage(loaded, stage, tmp_path, name="s")
    assert load_engine(shard, threads=1).name == "onnx"
    with pytest.raises(BadShard, match=r"no graph\.json, which engine 'torch-graph' runs"):
        load_engine(shard, threads=1, engine="torch")
    with pytest.raises(BadModel, match="has no graph document"):
        loaded.document(stage)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (model(helper.make_node("RandomNormalLike", ["image"], ["scores"])), "operator RandomNormalLike .* is not supported"),
        (model(helper.make_node("Gelu", ["image"], ["scores"], domain="com.microsoft")), "operators of the domain 'com.microsoft'"),
        (model(opset=7), "operator set 7"),
    ],
)
def test_what_is_not_run_is_refused(made: onnx.ModelProto, why: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(BadModel, match=why):
        partitioner.load_model(str(path))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no such file"):
        partitioner.load_model(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("hello, this is no model")
    with pytest.raises(BadModel, match="not an ONNX model"):
        partitioner.load_model(str(tmp_path / "text.onnx"))


@pytest.mark.parametrize("kind", ["chain", "diamond", "file"])
def test_stages_joined_again_are_the_whole_model(kind: str, file: Path, tmp_path: Path) -> None:
    whole_model = {"chain": chain, "diamond": diamond, "file": lambda: partitioner.load_model(str(file))}[kind]()
    names = [v.name for v in whole_model.structure.vertices if v.op != "input"]
    with LocalCluster(3) as cluster:
        thirds = stages_by(a=" ".join(names[: len(names) // 3]), b=" ".join(names[len(names) // 3 : 2 * len(names) // 3]), c="*")
        made = split(whole_model, cluster.cluster(), tmp_path / "parts", thirds)
    joined = merge(made.plan, made.shards, tmp_path / "whole")
    engine = load_engine(joined, threads=1, engine="onnx")
    given = made.inputs(3)
    answer = engine.run(given)
    wanted = made.model.run({name: torch.from_numpy(array) for name, array in given.items()})
    for output in made.plan.outputs:
        np.testing.assert_allclose(answer[output.value], wanted[output.spec.name].numpy(), rtol=1e-5, atol=1e-6)


def test_what_codecs_lose_is_measured_on_a_file_too(file: Path, tmp_path: Path) -> None:
    """The second part of a cut is run by ONNX Runtime; beside it the same by hand in torch."""
    images = np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", image=images)
    graph = partitioner.load_model(str(file))
    task = Task.make(graph, load_samples(tmp_path / "images.npz", graph.structure), "mse")
    found = calibrate(task, codecs=("zstd", "int4"), cuts=3, at=["pooled"])
    (cut_there,) = (each for each in found.cuts if "skip" in each.tensors)
    assert all(each.codecs["zstd"].loss == 0 < each.codecs["int4"].loss for each in found.cuts)

    generator = np.random.default_rng(0)
    kernel, bias, head = (torch.from_numpy(generator.standard_normal(s).astype(np.float32) * 0.2) for s in ((16, 3, 3, 3), 16, (40, 16)))
    made = torch.conv2d(torch.from_numpy(images), kernel, bias, padding=1)
    skip = made.relu() * 2 + made
    arrived = torch.stack([torch.from_numpy(travel(each[None].numpy(), "int4").array)[0] for each in skip])
    whole, split_up = (values.mean((2, 3)) @ head.T for values in (skip, arrived))
    by_hand = float(((whole - split_up) ** 2).sum() / (whole**2).sum())
    assert cut_there.codecs["int4"].loss == pytest.approx(by_hand, rel=0.02)
