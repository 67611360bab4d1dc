"""A node is lost with its caches in the middle of answers: they go on with the very tokens that they would have had."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator

import pytest
from tiny_llama import Served, deploy_tiny_llama

import splitnet
from nodes.testing import LocalCluster
from splitnet.channel import open_channel, stub
from splitnet.errors import NodeUnavailable
from splitnet.install import deploy, undeploy
from splitnet.rollout import update
from splitnet.rpc.v1 import node_pb2 as pb

COUNT = 60
PROMPTS = ([5, 9, 2, 7], [1, 2, 3], [60] * 20)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    with LocalCluster(4) as running:
        yield running


@pytest.fixture(scope="module")
def served(nodes: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("llama")
    made = deploy_tiny_llama(nodes, folder)
    undeploy(made.plan, made.name)
    return made


class Writer:
    """Asks for all prompts at once; drawn tokens for one of them, so that not only the likeliest must come again."""

    def __init__(self, client: splitnet.AsyncClient) -> None:
        self.came: list[list[int]] = [[] for _ in PROMPTS]
        self.finishes = [""] * len(PROMPTS)
        self._client = client

    async def ask(self, i: int) -> None:
        async with self._client.generate(PROMPTS[i], COUNT, temperature=0.8 if i == 1 else 0.0, repetition_penalty=1.2, seed=7) as stream:
            async for token in stream:
                self.came[i].append(token)
            self.finishes[i] = stream.finish

    def start(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.ask(i)) for i in range(len(PROMPTS))]

    async def under_way(self) -> None:
        while not all(len(tokens) > 5 for tokens in self.came):
            await asyncio.sleep(0)
        assert any(len(tokens) < COUNT for tokens in self.came), "nothing was under way any more"


async def undisturbed(client: splitnet.AsyncClient) -> list[list[int]]:
    writer = Writer(client)
    await asyncio.gather(*writer.start())
    return writer.came


def with_replicas(served: Served, **replicas: str) -> splitnet.Plan:
    stages = tuple(dataclasses.replace(s, replicas=tuple(replicas.get(s.name, "").split())) for s in served.plan.stages)
    return dataclasses.replace(served.plan, stages=stages)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(condition)


def held(nodes: LocalCluster, node: str) -> set[str]:
    return set(nodes.server(node).ledger.deployments)


async def test_a_standby_builds_the_caches_anew(nodes: LocalCluster, served: Served) -> None:
    plan = with_replicas(served, s1="d", s2="d")
    await asyncio.to_thread(deploy, plan, served.shards, name="kept")
    async with splitnet.AsyncClient(served.address, "kept", timeout_s=500) as client:
        expected = await undisturbed(client)
        writer = Writer(client)
        asked = writer.start()
        await writer.under_way()
        await asyncio.to_thread(nodes.kill, "b")
        await asyncio.gather(*asked)
    assert writer.came == expected
    assert writer.finishes == ["length"] * len(PROMPTS)
    assert expected[0] != expected[1]
    assert "replaced" in [event.kind for event in nodes.server("a").ledger.events]
    await asyncio.to_thread(nodes.restart, "b")
    await until(lambda: held(nodes, "b") == {"kept@2"})
    await asyncio.to_thread(undeploy, plan, "kept")


async def test_when_the_ingress_is_lost_text_goes_on_elsewhere_after_what_has_come(nodes: LocalCluster, served: Served) -> None:
    plan = with_replicas(served, s0="d")
    await asyncio.to_thread(deploy, plan, served.shards, name="led")
    async with splitnet.AsyncClient(served.address, "led", timeout_s=500) as client:
        expected = await undisturbed(client)
        writer = Writer(client)
        asked = writer.start()
        await writer.under_way()
        await asyncio.to_thread(nodes.kill, "a")
        await asyncio.gather(*asked)
        assert client.address == nodes.addresses["d"]
    assert writer.came == expected
    assert writer.finishes == ["length"] * len(PROMPTS)
    await asyncio.to_thread(nodes.restart, "a")
    await until(lambda: held(nodes, "a") == {"led@2"})
    await asyncio.to_thread(undeploy, plan, "led")


async def test_when_nothing_can_hold_it_text_ends_at_once_and_says_what_is_missing(nodes: LocalCluster, served: Served) -> None:
    await asyncio.to_thread(deploy, served.plan, served.shards, name="doomed")
    async with splitnet.AsyncClient(served.address, "doomed", timeout_s=500) as client:
        writer = Writer(client)
        asked = writer.start()
        await writer.under_way()
        await asyncio.to_thread(nodes.kill, "c")
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, NodeUnavailable)
            assert (failure.node, failure.stage) == ("c", "s2")
            assert "start the node 'c' again" in failure.remedy
    await asyncio.to_thread(nodes.restart, "c")
    await until(lambda: held(nodes, "c") == {"doomed"})
    await asyncio.to_thread(undeploy, served.plan, "doomed")


async def test_an_answer_goes_on_in_the_middle_of_what_would_stop_it(nodes: LocalCluster, served: Served) -> None:
    """As a client says it that has lost its ingress: a part of the stop sequence has come, the rest is to come."""
    await asyncio.to_thread(deploy, served.plan, served.shards, name="parted")
    tokens = served.greedy(PROMPTS[0], 12)
    stop = tokens[6:10]
    async with splitnet.AsyncClient(served.address, "parted", timeout_s=500) as client:
        async with client.generate(PROMPTS[0], 12, stop=[stop]) as stream:
            whole = [token async for token in stream]
        assert whole == tokens[:10]
        exchange, deployment = await client._connected()
        wanted = splitnet.generation.GenerateRequest(12, stop=(tuple(stop),), answered=8)
        prompt = splitnet.generation.as_prompt([*PROMPTS[0], *tokens[:8]])
        again = splitnet.token_stream.TokenStream()
        pieces = exchange.generate("again", deployment.name, prompt, wanted, 1e12, 0, again)
        assert [token async for piece in pieces for token in piece] == tokens[8:10]
        assert (again.finish, again.prompt_tokens) == ("stop", len(PROMPTS[0]))
    await asyncio.to_thread(undeploy, served.plan, "parted")


@pytest.mark.parametrize("places", ["adc", "cdd"])
async def test_another_plan_goes_on_with_text_of_one_that_lacks_a_node(nodes: LocalCluster, served: Served, places: str) -> None:
    """As `splitnet watch` brings it, once with the same ingress and once with another."""
    name = f"planned-{places}"
    await asyncio.to_thread(deploy, served.plan, served.shards, name=name)
    stages = tuple(dataclasses.replace(stage, node=node) for stage, node in zip(served.plan.stages, places, strict=True))
    async with splitnet.AsyncClient(served.address, name, timeout_s=500) as client, open_channel(served.address) as channel:
        expected = await undisturbed(client)
        writer = Writer(client)
        asked = writer.start()
        await writer.under_way()
        await stub(channel).Watch(pb.WatchRequest(deployment=name, lease_s=30.0))
        await asyncio.to_thread(nodes.kill, "b")
        await until(lambda: "lost" in [e.kind for e in nodes.server("a").ledger.events if e.deployment == name])
        plan = dataclasses.replace(served.plan, stages=stages)
        await asyncio.to_thread(update, plan, served.shards, name=name, where=served.plan, keep=False)
        await asyncio.gather(*asked)
        assert client.address == nodes.addresses[places[0]]
    assert writer.came == expected
    assert writer.finishes == ["length"] * len(PROMPTS)
    await asyncio.to_thread(nodes.restart, "b")
    await asyncio.to_thread(undeploy, plan, name)
