"""Plans of several stages on real nodes answer exactly what the undivided model answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_stream import RawStream
from small_models import Split, at_rest, chain, diamond, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from partitioner.graph import ModelGraph
from splitnet import wire
from splitnet.install import deploy, status, undeploy


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as nodes:
        yield nodes
        at_rest(nodes)


def equal(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return answer.keys() == expected.keys() and all(np.array_equal(answer[name], expected[name], equal_nan=True) for name in expected)


def serve(cluster: LocalCluster, model: ModelGraph, folder: Path, codec: str = "raw", max_in_flight: int = 16, **stages: str) -> Split:
    cut = split(model, cluster.cluster(), folder, stages_by(**stages), codec=codec, max_in_flight=max_in_flight)
    deploy(cut.plan, cut.shards, name=folder.name)
    return cut


PLANS = {
    "three nodes, and a skip connection over the second": (chain, {"a": "linear relu", "b": "linear_1 relu_1", "c": "*"}),
    "two stages on one node, another between them": (chain, {"a": "linear relu", "b": "linear_1 relu_1", "a_": "*"}),
    "two stages on one node, directly": (chain, {"b": "linear relu linear_1", "b_": "*"}),
    "the ingress is the last node": (chain, {"c": "linear", "b": "relu linear_1 relu_1", "c_": "*"}),
    "one node": (chain, {"b": "*"}),
    "parallel branches that meet on a third node": (diamond, {"a": "linear relu", "b": "linear_1 tanh", "c": "*"}),
    "parallel branches that meet at the ingress": (diamond, {"a": "linear relu", "b": "linear_1 tanh", "a_": "*"}),
}


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("case", PLANS)
def test_a_divided_model_answers_as_the_whole(cluster: LocalCluster, tmp_path: Path, case: str, codec: str) -> None:
    model, stages = PLANS[case]
    served = serve(cluster, model(), tmp_path, codec, **stages)
    with splitnet.Client(served.address, tmp_path.name) as client:
        for batch in (1, 5):
            inputs = served.inputs(batch, seed=batch)
            assert equal(client.infer(inputs), served.whole(inputs))
    undeploy(served.plan, tmp_path.name)
    at_rest(cluster)


def test_tensors_of_many_chunks_arrive_whole(cluster: LocalCluster, tmp_path: Path) -> None:
    """2.4 MB each, with a codec that works in other threads."""
    served = serve(cluster, chain(), tmp_path, "zstd", a="linear relu", b="linear_1 relu_1", c="*")
    inputs = served.inputs(3 * wire.CHUNK_BYTES // 64 - 7)
    with splitnet.Client(served.address, tmp_path.name) as client:
        assert equal(client.infer(inputs), served.whole(inputs))
    moved = {link.target: link.raw_bytes for node in status(cluster.cluster()) for link in node.links if node.name == "a"}
    assert moved["b"] >= inputs["x"].nbytes
    assert moved["c"] >= inputs["x"].nbytes
    undeploy(served.plan, tmp_path.name)


async def test_many_requests_in_flight_on_one_stream(cluster: LocalCluster, tmp_path: Path) -> None:
    served = serve(cluster, diamond(), tmp_path, max_in_flight=64, a="linear relu", b="linear_1 tanh", c="*")
    inputs = {i: served.inputs(batch=1 + i % 7, seed=i) for i in range(64)}
    async with splitnet.AsyncClient(served.address, tmp_path.name) as client:
        answers = await asyncio.gather(*(client.infer(given) for given in inputs.values()))
    for given, answer in zip(inputs.values(), answers, strict=True):
        assert equal(answer, served.whole(given))
    undeploy(served.plan, tmp_path.name)


async def test_frames_of_requests_may_be_mixed_and_the_stream_half_closed(cluster: LocalCluster, tmp_path: Path) -> None:
    served = serve(cluster, diamond(), tmp_path, a="linear relu", b="linear_1 tanh", c="*")
    one, two = served.inputs(2, seed=1), served.inputs(3, seed=2)
    async with RawStream(served.address) as stream:
        await stream.send_inputs("one", {"x": one["x"]}, end=False)
        await stream.send_inputs("two", {"y": two["y"]}, end=False)
        await stream.send_inputs("two", {"x": two["x"]})
        assert equal(await stream.answer("two"), served.whole(two))
        await stream.send_inputs("one", {"y": one["y"]}, end=False)
        await stream.send(request="one", end=True)
        await stream.call.done_writing()
        assert equal(await stream.answer("one"), served.whole(one))
        assert await stream.read() is None
    undeploy(served.plan, tmp_path.name)


def test_nan_is_passed_through(cluster: LocalCluster, tmp_path: Path) -> None:
    served = serve(cluster, chain(), tmp_path, "zstd", a="linear", b="*")
    inputs = served.inputs(2)
    inputs["x"][0, 3] = np.nan
    with splitnet.Client(served.address, tmp_path.name) as client:
        answer = client.infer(inputs)
    assert np.isnan(answer["output"][0]).any()
    assert equal(answer, served.whole(inputs))
    undeploy(served.plan, tmp_path.name)


def test_two_deployments_share_nodes_and_are_counted_apart(cluster: LocalCluster, tmp_path: Path) -> None:
    first = split(chain(), cluster.cluster(), tmp_path / "one", stages_by(a="linear relu", b="*"))
    second = split(diamond(), cluster.cluster(), tmp_path / "two", stages_by(b="linear relu", a="*"))
    deploy(first.plan, first.shards, name="first")
    deploy(second.plan, second.shards, name="second")
    with splitnet.Client(first.address, "first") as one, splitnet.Client(second.address, "second") as two:
        for seed in range(3):
            given = first.inputs(seed=seed)
            assert equal(one.infer(given), first.whole(given))
        given = second.inputs()
        assert equal(two.infer(given), second.whole(given))
    counted = {(d.name, stage.name): stage.requests for node in status(cluster.cluster()) for d in node.deployments for stage in d.stages}
    assert counted == {("first", "stage0"): 3, ("first", "stage1"): 3, ("second", "stage0"): 1, ("second", "stage1"): 1}
    undeploy(first.plan, "first")
    undeploy(second.plan, "second")
