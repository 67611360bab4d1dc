"""Activate, Unload and Describe on real nodes: what does not belong together is refused, and nothing is left of it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from small_models import Split, chain, diamond, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import AlreadyExists, BadPlan, BadShard, InsufficientMemory, NotFound, SplitnetError
from splitnet.install import deploy, undeploy
from splitnet.plan import Plan
from splitnet.rpc.v1 import node_pb2 as pb

MEMORY = 5000


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2, memory_bytes=(0, MEMORY)) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    cut = split(chain(), cluster.cluster(), tmp_path_factory.mktemp("shards"), stages_by(a="linear relu", b="*"))
    deploy(cut.plan, cut.shards, name="chain")
    yield cut
    undeploy(cut.plan, "chain")


@pytest.fixture
async def node(cluster: LocalCluster) -> AsyncIterator[Any]:
    """A stub of node b, which must hold the same after the test."""
    channel = open_channel(cluster.addresses["b"])
    before = await stub(channel).Describe(pb.DescribeRequest())
    yield stub(channel)
    after = await stub(channel).Describe(pb.DescribeRequest())
    assert [d.name for d in after.deployments] == [d.name for d in before.deployments]
    assert after.memory_used_bytes == before.memory_used_bytes
    await channel.close()


async def activate(
    node: Any, plan: Plan | bytes, *, deployment: str = "other", on: str = "b", shards: dict[str, str] | None = None
) -> pb.ActivateReply:
    document = plan if isinstance(plan, bytes) else plan.to_json().encode()
    with translated("b"):
        reply: pb.ActivateReply = await node.Activate(
            pb.ActivateRequest(deployment=deployment, plan_json=document, node=on, shards=shards or {})
        )
        return reply


async def test_the_same_again_changes_nothing(served: Split, node: Any) -> None:
    reply = await activate(node, served.plan, deployment="chain")
    assert reply.load_s == 0
    assert reply.reserved_bytes == (await node.Describe(pb.DescribeRequest())).memory_used_bytes > 0


async def test_another_plan_under_a_taken_name(served: Split, node: Any) -> None:
    other = dataclasses.replace(served.plan, max_in_flight=3)
    with pytest.raises(AlreadyExists, match="with another plan") as caught:
        await activate(node, other, deployment="chain")
    assert "splitnet unload" in caught.value.remedy
    assert caught.value.node == "b"


async def test_a_shard_that_was_not_shipped(served: Split, node: Any) -> None:
    stages = tuple(dataclasses.replace(stage, shard="0" * 64) for stage in served.plan.stages)
    with pytest.raises(NotFound, match="000000000000"):
        await activate(node, dataclasses.replace(served.plan, stages=stages))


async def test_a_plan_without_shards(served: Split, node: Any) -> None:
    stages = tuple(dataclasses.replace(stage, shard="") for stage in served.plan.stages)
    with pytest.raises(BadPlan, match="stage 'stage1' has no shard"):
        await activate(node, dataclasses.replace(served.plan, stages=stages))


async def test_other_shards_than_the_plan_names(served: Split, node: Any) -> None:
    with pytest.raises(BadPlan, match="the plan names shard"):
        await activate(node, served.plan, shards={"stage1": "0" * 64})


async def test_a_shard_of_another_model(served: Split, node: Any) -> None:
    with pytest.raises(BadShard, match="cut from another model"):
        await activate(node, dataclasses.replace(served.plan, model_sha256="1" * 64))


async def test_a_plan_whose_stage_has_another_face_than_its_shard(served: Split, node: Any) -> None:
    (spec,) = served.plan.stages[1].outputs
    stages = (served.plan.stages[0], dataclasses.replace(served.plan.stages[1], outputs=(dataclasses.replace(spec, dtype="float64"),)))
    with pytest.raises(BadShard, match="the outputs of the plan"):
        await activate(node, dataclasses.replace(served.plan, stages=stages))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": b"{"}, "not JSON"),
        ({"plan": b"\xff"}, "not JSON"),
        ({"plan": b'{"version": 99}'}, "version 99"),
        ({"on": "z"}, "no node 'z' in the plan"),
        ({"deployment": ""}, "no name"),
    ],
)
async def test_requests_that_make_no_sense(served: Split, node: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        await activate(node, **{"plan": served.plan, **changes})


async def test_unloading_what_is_not_there(node: Any) -> None:
    with pytest.raises(NotFound, match="no deployment 'nothing' here"), translated("b"):
        await node.Unload(pb.UnloadRequest(deployment="nothing"))


def test_the_memory_limit_says_what_is_missing(cluster: LocalCluster, served: Split, tmp_path: Any) -> None:
    cut = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    with pytest.raises(InsufficientMemory) as caught:
        deploy(cut.plan, cut.shards, name="too-much")
    assert caught.value.node == "b"
    with splitnet.Client(served.address, "chain") as client:
        assert client.infer(served.inputs())


async def test_the_node_itself_holds_to_its_limit(cluster: LocalCluster, served: Split, node: Any, tmp_path: Any) -> None:
    """Shipped by hand, past what `deploy` looks at beforehand."""
    from splitnet.shipping import shard_blobs, ship

    cut = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    channel = open_channel(cluster.addresses["b"])
    for blob in shard_blobs({"stage1": cut.shards["stage1"]}):
        await ship(channel, "b", blob, lambda _: None)
    with pytest.raises(InsufficientMemory, match=rf"of the limit of {MEMORY} bytes .* bytes are missing") as caught:
        await activate(node, cut.plan)
    assert "--memory" in caught.value.remedy
    await channel.close()


async def test_describe_says_what_a_client_needs(cluster: LocalCluster, served: Split) -> None:
    channel = open_channel(cluster.addresses["a"])
    before = await stub(channel).Describe(pb.DescribeRequest(deployment="chain"))
    async with splitnet.AsyncClient(served.address, "chain") as client:
        await client.infer(served.inputs())
    reply = await stub(channel).Describe(pb.DescribeRequest(deployment="chain"))
    (deployment,) = reply.deployments
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in deployment.inputs] == [("x", "float32", ["batch", "16"])]
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in deployment.outputs] == [("output", "float32", ["batch", "16"])]
    assert (deployment.ingress, deployment.node, deployment.in_flight, deployment.max_in_flight) == (True, "a", 0, 16)
    assert deployment.plan_sha256 == served.plan.sha256
    (stage,) = deployment.stages
    assert (stage.name, stage.engine, stage.failures, stage.queued) == ("stage0", "torch-graph", 0, 0)
    assert stage.requests - before.deployments[0].stages[0].requests == 1
    assert min(stage.wait_s, stage.compute_s, stage.encode_s, stage.send_s) > 0
    (link,) = reply.links
    assert (link.target, link.address, link.connected) == ("b", cluster.addresses["b"], True)
    assert link.raw_bytes - before.links[0].raw_bytes == link.sent_bytes - before.links[0].sent_bytes == 2 * 16 * 4
    assert list(reply.engines) == ["torch-graph", "torch-fast", "onnx", "decoder"]
    assert {"raw", "zstd"} <= set(reply.codecs)
    assert reply.process_memory_bytes > 1 << 20
    assert not reply.draining
    assert not reply.insecure
    assert not (await stub(channel).Describe(pb.DescribeRequest(deployment="nothing"))).deployments
    await channel.close()


async def test_probe_and_measure(cluster: LocalCluster) -> None:
    channel = open_channel(cluster.addresses["a"])
    link = await stub(channel).Measure(pb.MeasureRequest(peer_address=cluster.addresses["b"], budget_s=0.3))
    assert link.peer_name == "b"
    assert link.round_trip_s > 0
    assert link.bandwidth_bytes_per_s > 1e6
    assert len({sample.bytes for sample in link.samples}) > 1
    assert (await stub(channel).Measure(pb.MeasureRequest(compute=True, budget_s=0.2))).seconds > 0
    wrong: list[tuple[pb.MeasureRequest, str]] = [
        (pb.MeasureRequest(peer_address="nowhere"), "not HOST:PORT"),
        (pb.MeasureRequest(peer_address="127.0.0.1:1"), "no node answers at 127.0.0.1:1"),
        (pb.MeasureRequest(), "neither"),
    ]
    for request, message in wrong:
        with pytest.raises(SplitnetError, match=message), translated("a"):
            await stub(channel).Measure(request)
    await channel.close()
