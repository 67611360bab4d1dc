"""Deploying to real nodes: all of it, or none; nothing twice; and who is to blame when it fails."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from chain_model import WIDTH, MakeChain, expected

import splitnet
from nodes.testing import LocalCluster
from splitnet import NodeRef, Plan
from splitnet.errors import AlreadyExists, BadInput, BadPlan, BadShard, InsufficientMemory, NodeUnavailable, NotFound
from splitnet.install import Progress, default_name
from splitnet.shard import MANIFEST, pack


def ask(plan: Plan, name: str) -> np.ndarray:
    x = np.random.default_rng(7).standard_normal((2, WIDTH)).astype(np.float32)
    with splitnet.Client(plan.ingress.address, deployment=name) as client:
        return client.infer({"v0": x})["y"]


def right(**model: int) -> np.ndarray:
    return expected(np.random.default_rng(7).standard_normal((2, WIDTH)).astype(np.float32), **model)


def held(nodes: LocalCluster) -> dict[str, list[str]]:
    return {node.name: [deployment.name for deployment in node.deployments] for node in splitnet.status(nodes.cluster())}


def test_a_plan_is_deployed_answers_and_goes_again(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster())
    seen: list[Progress] = []
    deployed = splitnet.deploy(plan, shards, on_progress=seen.append)
    assert deployed.name == "chain-model"
    assert deployed.ingress == nodes.addresses["a"]
    total = sum(s.manifest.total_bytes + len(s.manifest.to_bytes()) for s in shards.values())
    assert sum(deployed.sent_bytes.values()) == total
    assert (seen[-1].held_bytes, seen[-1].total_bytes) == (total, total)
    assert [p.phase for p in seen if p.phase == "activate"] == ["activate"] * 3
    assert seen[-1].node == "a"  # the ingress comes last
    assert np.allclose(ask(plan, "chain-model"), right(), rtol=1e-3)
    statuses = {node.name: node for node in splitnet.status(plan)}
    assert [s.name for s in statuses["b"].deployments[0].stages] == ["stage1"]
    assert statuses["a"].deployments[0].ingress
    assert statuses["b"].deployments[0].stages[0].requests == 1
    assert statuses["a"].memory_used_bytes == 96 * WIDTH * 4 + 1000
    assert splitnet.undeploy(plan) == ["a", "b", "c"]
    assert held(nodes) == {"a": [], "b": [], "c": []}
    with pytest.raises(NotFound, match="no node has a deployment 'chain-model'; there are: none"):
        splitnet.undeploy(nodes.cluster(), "chain-model")


def test_nothing_is_shipped_twice(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster())
    assert sum(splitnet.deploy(plan, shards).sent_bytes.values()) > 0
    again = splitnet.deploy(plan, shards)  # harmless
    other_name = splitnet.deploy(plan, shards, name="second")
    assert set(again.sent_bytes.values()) == set(other_name.sent_bytes.values()) == {0}
    splitnet.undeploy(plan, "second", delete_blobs=True)  # the first one's blobs are in use
    assert np.allclose(ask(plan, "chain-model"), right(), rtol=1e-3)
    splitnet.undeploy(plan, delete_blobs=True)
    assert sum(splitnet.deploy(plan, shards).sent_bytes.values()) > 0
    nodes.kill("b")
    nodes.restart("b")
    splitnet.undeploy(plan)
    assert set(splitnet.deploy(plan, shards).sent_bytes.values()) == {0}  # kept on b's disk, hashed again there
    assert np.allclose(ask(plan, "chain-model"), right(), rtol=1e-3)


def test_several_stages_of_one_node_and_packed_shards(make_chain: MakeChain, tmp_path: Path) -> None:
    with LocalCluster(2) as nodes:
        plan, shards = make_chain(nodes.cluster(), stages=5)
        packed = {name: pack(shard, tmp_path / f"{name}.zip") for name, shard in shards.items()}
        splitnet.deploy(plan, packed)
        assert np.allclose(ask(plan, ""), right(stages=5), rtol=1e-3)
        assert [[s.name for s in node.deployments[0].stages] for node in splitnet.status(plan)] == [
            ["stage0", "stage2", "stage4"],
            ["stage1", "stage3"],
        ]
        assert not any(splitnet.deploy(plan, tmp_path).sent_bytes.values()), "a directory that holds one file per stage"
        (tmp_path / "stage3.zip").unlink()
        with pytest.raises(BadPlan, match="no shard for stage 'stage3'"):
            splitnet.deploy(plan, str(tmp_path))


async def test_from_within_an_event_loop(make_chain: MakeChain) -> None:
    with LocalCluster(1) as nodes:
        plan, shards = make_chain(nodes.cluster())
        assert (await splitnet.deploy_async(plan, shards)).name == "chain-model"
        assert splitnet.status(plan)[0].deployments[0].name == "chain-model"  # blocking, as in a notebook
        assert await splitnet.undeploy_async(plan) == ["a"]


# --------------------------------------------------------------------------------------------------------------- broken streams


class Relay:
    """Passes TCP on to a node, and breaks each connection after so many bytes towards it."""

    def __init__(self, target: str, budget_bytes: int) -> None:
        self.host, _, port = target.rpartition(":")
        self.port = int(port)
        self.budget_bytes = budget_bytes
        self.connections = 0
        self.broken = 0
        self.passed_bytes = 0

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._server.close_clients() if hasattr(self._server, "close_clients") else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
        left = self.budget_bytes

        async def back() -> None:
            while data := await far_reader.read(65536):
                writer.write(data)

        answering = asyncio.create_task(back())
        try:
            while data := await reader.read(65536):
                far_writer.write(data)
                await far_writer.drain()
                self.passed_bytes += len(data)
                left -= len(data)
                if left < 0:
                    self.broken += 1
                    break
        except ConnectionError:
            pass
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            for end in (writer, far_writer):
                end.transport.abort()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.shipping._BACKOFF_S", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_an_upload_goes_on_where_the_stream_broke(make_chain: MakeChain) -> None:
    """16 MB through a link that breaks every 3 MB or so arrive whole; what had arrived is not sent again."""
    with LocalCluster(1) as nodes:
        async with Relay(nodes.addresses["a"], 3_000_000) as relay:
            plan, shards = make_chain(nodes.cluster(), stages=1, rows=65536)
            plan = dataclasses.replace(plan, nodes=(NodeRef("a", relay.address),))
            await splitnet.deploy_async(plan, shards)
            assert relay.broken >= 4
            total = shards["stage0"].manifest.total_bytes
            assert total > 16_000_000
            # at most what was under way in the socket buffers is lost with each break
            assert relay.passed_bytes < total + relay.broken * 2_500_000
        statuses = await splitnet.status_async(nodes.cluster())
        assert [d.name for d in statuses[0].deployments] == ["chain-model"]


@pytest.mark.usefixtures("impatient")
async def test_a_link_that_never_gets_a_byte_through_is_given_up(make_chain: MakeChain) -> None:
    with LocalCluster(1) as nodes:
        plan, shards = make_chain(nodes.cluster(), stages=1, rows=65536)
        async with Relay(nodes.addresses["a"], 20_000) as relay:  # Describe passes, the weights do not
            weak = dataclasses.replace(plan, nodes=(NodeRef("a", relay.address),))
            with pytest.raises(NodeUnavailable) as caught:
                await splitnet.deploy_async(weak, shards)
            assert caught.value.node == "a"
        await splitnet.deploy_async(plan, shards)


# ------------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_node_that_does_not_answer(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster())
    nodes.kill("c")
    with pytest.raises(NodeUnavailable, match=f"node 'c' at {nodes.addresses['c']}: no node answers") as caught:
        splitnet.deploy(plan, shards)
    assert "start `splitnet node` there" in caught.value.remedy
    statuses = {node.name: node for node in splitnet.status(nodes.cluster())}
    assert [statuses[n].deployments for n in "ab"] == [(), ()]
    assert "no node answers" in statuses["c"].error


def test_two_deployments_of_one_name(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster())
    other, other_shards = make_chain(nodes.cluster(), seed=1)
    splitnet.deploy(plan, shards, name="search")
    with pytest.raises(AlreadyExists, match="it already serves another plan under the name 'search'") as caught:
        splitnet.deploy(other, other_shards, name="search")
    assert "splitnet unload search" in caught.value.remedy
    assert np.allclose(ask(plan, "search"), right(), rtol=1e-3)
    splitnet.deploy(other, other_shards, name="search2")
    assert np.allclose(ask(other, "search2"), right(seed=1), rtol=1e-3)


def test_a_node_without_the_memory(make_chain: MakeChain) -> None:
    need = 96 * WIDTH * 4 + 1000
    with LocalCluster(2, memory_bytes=[0, need - 1]) as nodes:
        plan, shards = make_chain(nodes.cluster(), stages=2)
        with pytest.raises(InsufficientMemory, match=f"its stages need {need} bytes, {need - 1} of {need - 1} are free") as caught:
            splitnet.deploy(plan, shards)
        assert caught.value.node == "b"
        assert held(nodes) == {"a": [], "b": []}


def test_the_node_itself_also_refuses_and_nothing_half_stays(make_chain: MakeChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """When two deploy at once, the check before shipping does not help: the node has the last word, and the others are cleared."""
    import splitnet.install as module

    need = 96 * WIDTH * 4 + 1000
    with LocalCluster(3, memory_bytes=[0, need - 1, 0]) as nodes:
        plan, shards = make_chain(nodes.cluster())
        monkeypatch.setattr(module, "check_nodes", lambda *_: None)
        with pytest.raises(InsufficientMemory, match="1 bytes are missing") as caught:
            splitnet.deploy(plan, shards)
        assert caught.value.node == "b"
        assert held(nodes) == {"a": [], "b": [], "c": []}


def test_a_failed_deployment_leaves_an_earlier_one_alone(make_chain: MakeChain) -> None:
    with LocalCluster(2) as nodes:
        plan, shards = make_chain(nodes.cluster(), stages=2)
        splitnet.deploy(plan, shards)
        nodes.kill("b")
        with pytest.raises(NodeUnavailable, match="node 'b'"):
            splitnet.deploy(plan, shards)
        assert held(nodes)["a"] == ["chain-model"]
        with pytest.raises(NodeUnavailable, match="deployment 'chain-model' may still be on node 'b'"):
            splitnet.undeploy(plan)
        assert held(nodes)["a"] == []


def test_shards_that_do_not_belong_to_the_plan(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster())
    _, others = make_chain(nodes.cluster(), seed=1)
    _, longer = make_chain(nodes.cluster(), rows=128)
    for wrong, message in (
        ({}, "there is no shard for stage 'stage0'"),
        (shards | {"stage9": shards["stage0"]}, "there is a shard for stage 'stage9', which the plan does not have"),
        (shards | {"stage1": others["stage1"]}, "the plan is for model 'hf:someone/Chain Model' .* was cut from"),
        (shards | {"stage1": shards["stage2"]}, "is for stage 'stage2'"),
        (shards | {"stage1": longer["stage1"]}, "the plan names shard"),
    ):
        with pytest.raises(BadPlan, match=message):
            splitnet.deploy(plan, wrong)
    assert held(nodes) == {"a": [], "b": [], "c": []}


def test_a_shard_that_changed_after_it_was_opened(nodes: LocalCluster, make_chain: MakeChain) -> None:
    """The node hashes what comes. It refuses, says so, and stays up."""
    plan, shards = make_chain(nodes.cluster())
    file = shards["stage1"].member("weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadShard, match="wrong sha256: announced") as caught:
        splitnet.deploy(plan, shards)
    assert caught.value.node == "b"
    file.write_bytes(data[:-1])
    with pytest.raises(BadShard, match="became shorter while it was sent"):
        splitnet.deploy(plan, shards)
    data[-1] ^= 1
    file.write_bytes(data)
    splitnet.deploy(plan, shards)


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 64, "-x"])
def test_a_name_that_cannot_be(make_chain: MakeChain, name: str) -> None:
    with LocalCluster(1) as nodes:
        plan, shards = make_chain(nodes.cluster())
        if not name:
            assert splitnet.deploy(plan, shards, name=name).name == "chain-model"
        else:
            with pytest.raises(BadInput, match="deployment name"):
                splitnet.deploy(plan, shards, name=name)


def test_names_are_made_of_models() -> None:
    assert default_name("hf:sentence-transformers/all-MiniLM-L6-v2") == "all-minilm-l6-v2"
    assert default_name("py:shop.model:build") == "shop.model-build"
    assert default_name("/tmp/resnet50.pt2") == "resnet50"
    assert default_name("Sequential") == "sequential"
    assert default_name("///") == "model"
    assert len(default_name("x" * 200)) == 63


def test_a_port_where_something_else_listens(make_chain: MakeChain) -> None:
    with LocalCluster(1) as nodes, socket.create_server(("127.0.0.1", 0)) as silent:
        plan, shards = make_chain(nodes.cluster(), stages=1)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        plan = dataclasses.replace(plan, nodes=(NodeRef("a", address),))
        (status,) = splitnet.status(plan, timeout_s=0.5)
        assert status.error
        assert os.path.exists(shards["stage0"].path / MANIFEST)
