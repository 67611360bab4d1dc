"""A node is lost in the middle of requests: they are answered all the same, by a standby or by the node itself when it is back."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from raw_stream import RawStream
from severing import Cable
from small_models import Split, at_rest, slow, split, stages_by

import splitnet
from nodes.deployment import Deployment
from nodes.testing import LocalCluster
from splitnet.errors import NodeUnavailable
from splitnet.install import deploy, undeploy
from splitnet.plan import NodeRef

PATIENCE_S = 20.0
HEAVY = 2000  # rows; some 0.2 s of computing in the second stage


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cut(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    middle = " ".join(v.name for v in slow().structure.vertices[3:-1])
    return split(slow(), cluster.cluster(), tmp_path_factory.mktemp("slow"), stages_by(a="linear relu", b=middle, c="*"))


def with_replicas(cut: Split, **replicas: str) -> Split:
    stages = tuple(dataclasses.replace(s, replicas=tuple(replicas.get(s.name, "").split())) for s in cut.plan.stages)
    return dataclasses.replace(cut, plan=dataclasses.replace(cut.plan, stages=stages))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def held(cluster: LocalCluster, node: str) -> dict[str, Deployment]:
    return dict(cluster.server(node).ledger.deployments)


def kinds(cluster: LocalCluster, node: str) -> list[str]:
    return [event.kind for event in cluster.server(node).ledger.events]


async def test_a_standby_takes_over_and_nothing_is_lost(cluster: LocalCluster, cut: Split) -> None:
    served = with_replicas(cut, stage1="d", stage2="d")
    await asyncio.to_thread(deploy, served.plan, served.shards, name="slow")
    given = [served.inputs(HEAVY, seed=i) for i in range(4)]
    async with splitnet.AsyncClient(served.address, "slow") as client:
        asked = [asyncio.create_task(client.infer(inputs)) for inputs in given]
        await until(lambda: bool(len(cluster.server("b").ledger.requests)))
        await asyncio.to_thread(cluster.kill, "b")
        for inputs, task in zip(given, asked, strict=True):
            assert np.array_equal((await task)["output"], served.whole(inputs)["output"])
        await until(lambda: set(held(cluster, "a")) == {"slow@2"})
        assert {"lost", "replayed", "replaced"} <= set(kinds(cluster, "a"))
        (now,) = held(cluster, "a").values()
        assert [stage.node for stage in now.plan.stages] == ["a", "d", "c"]
        await asyncio.to_thread(cluster.restart, "b")  # with nothing but its disk
        await until(lambda: "slow@2" in held(cluster, "b"))
        assert list(held(cluster, "b")["slow@2"].standby) == ["stage1"]
        await asyncio.to_thread(cluster.kill, "d")
        inputs = served.inputs(3)
        assert np.array_equal((await client.infer(inputs))["output"], served.whole(inputs)["output"])
        await until(lambda: set(held(cluster, "a")) == {"slow@3"})
    await asyncio.to_thread(cluster.restart, "d")
    await until(lambda: "slow@3" in held(cluster, "d"))
    await asyncio.to_thread(at_rest, cluster)
    await asyncio.to_thread(undeploy, served.plan, "slow")


async def test_when_the_ingress_is_lost_its_follower_takes_over_and_the_client_goes_there(cluster: LocalCluster, cut: Split) -> None:
    served = with_replicas(cut, stage0="d")
    await asyncio.to_thread(deploy, served.plan, served.shards, name="led")
    given = [served.inputs(HEAVY, seed=i) for i in range(3)]
    async with splitnet.AsyncClient(served.address, "led") as client:
        asked = [asyncio.create_task(client.infer(inputs)) for inputs in given]
        await until(lambda: bool(len(cluster.server("b").ledger.requests)))
        await asyncio.to_thread(cluster.kill, "a")
        for inputs, task in zip(given, asked, strict=True):
            assert np.array_equal((await task)["output"], served.whole(inputs)["output"])
        assert client.address == cluster.addresses["d"]
        await asyncio.to_thread(cluster.restart, "a")
        await until(lambda: "back" in kinds(cluster, "d"))
        async with splitnet.AsyncClient(cluster.addresses["a"], "led") as other:  # it is sent on
            inputs = served.inputs(3)
            assert np.array_equal((await other.infer(inputs))["output"], served.whole(inputs)["output"])
            assert other.address == cluster.addresses["d"]
    await asyncio.to_thread(at_rest, cluster)
    await asyncio.to_thread(undeploy, served.plan, "led")


async def test_a_connection_that_breaks_loses_nothing_and_answers_nothing_twice(cluster: LocalCluster, cut: Split) -> None:
    with Cable(cluster.addresses["b"]) as cable:
        nodes = tuple(NodeRef(n.name, cable.address if n.name == "b" else n.address) for n in cut.plan.nodes)
        served = dataclasses.replace(cut, plan=dataclasses.replace(cut.plan, nodes=nodes))
        await asyncio.to_thread(deploy, served.plan, served.shards, name="torn")
        ids = [f"r{i}" for i in range(8)]
        async with RawStream(served.address) as stream:
            for i, name in enumerate(ids):
                await stream.send_inputs(name, served.inputs(HEAVY // 4, seed=i), deployment="torn")
            ended: list[str] = []
            while len(ended) < len(ids):
                message = await stream.read()
                assert message is not None
                assert not message.frame.HasField("failure"), message.frame.failure
                if message.frame.end:
                    ended.append(message.frame.request)
                    if len(ended) in (2, 4):
                        cable.reset()
            assert sorted(ended) == ids
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await stream.call.read()  # nothing more comes
        assert "replayed" in kinds(cluster, "a")
        await asyncio.to_thread(undeploy, served.plan, "torn")


async def test_what_waits_fails_by_name_when_nothing_can_hold_it(cluster: LocalCluster, cut: Split) -> None:
    served = with_replicas(cut, stage1="d")
    await asyncio.to_thread(deploy, served.plan, served.shards, name="doomed")
    async with splitnet.AsyncClient(served.address, "doomed") as client:
        asked = [asyncio.create_task(client.infer(served.inputs(HEAVY))) for _ in range(3)]
        await until(lambda: bool(len(cluster.server("b").ledger.requests)))
        await asyncio.to_thread(cluster.kill, "d")
        await asyncio.to_thread(cluster.kill, "b")
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, NodeUnavailable), failure
            assert failure.node == "b"
            assert failure.stage == "stage1"
            assert "start the node" in failure.remedy
        await asyncio.to_thread(cluster.restart, "b")
        inputs = served.inputs(3)
        await until(lambda: "doomed" in held(cluster, "b"))
        assert np.array_equal((await client.infer(inputs, retry=True))["output"], served.whole(inputs)["output"])
    await asyncio.to_thread(cluster.restart, "d")
    await until(lambda: "doomed" in held(cluster, "d"))
    await asyncio.to_thread(undeploy, served.plan, "doomed")
