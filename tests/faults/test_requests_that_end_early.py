"""Deadlines, cancellations, refusals and failures: the client hears of them at once, and every node lets go of all it held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_stream import RawStream
from small_models import Split, at_rest, diamond, fragile, slow, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import DeadlineExceeded, EngineFailure, NodeUnavailable, NotFound, Overloaded
from splitnet.install import deploy, status, undeploy
from splitnet.rpc.v1 import node_pb2 as pb

HEAVY = 4000  # rows; some 0.4 s of computing in the second stage


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def heavy(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    middle = "linear_1 " + " ".join(v.name for v in slow().structure.vertices if v.name.startswith("tanh") or v.name.startswith("linear_"))
    last = slow().structure.outputs[0].value
    stages = stages_by(a="linear relu", b=middle.replace(f"{last}", "") + " linear_1", c="*")
    cut = split(slow(), cluster.cluster(), tmp_path_factory.mktemp("shards"), stages, max_in_flight=3)
    deploy(cut.plan, cut.shards, name="slow")
    return cut


async def computing(cluster: LocalCluster, requests: int = 1) -> None:
    """Returns when that many requests are at the second stage's node."""
    while len(cluster.server("b").ledger.requests) < requests:  # it lives in another thread
        await asyncio.sleep(0.005)


async def test_over_the_bound_the_answer_comes_at_once_and_says_when_to_return(cluster: LocalCluster, heavy: Split) -> None:
    inputs = heavy.inputs(HEAVY)
    async with splitnet.AsyncClient(heavy.address, "slow") as client:
        accepted = [asyncio.create_task(client.infer(inputs)) for _ in range(3)]
        await computing(cluster, 2)
        started = time.monotonic()
        with pytest.raises(Overloaded) as caught:
            await client.infer(heavy.inputs(1))
        assert time.monotonic() - started < 0.3
        assert caught.value.retry_after_s > 0
        assert "max_in_flight" in caught.value.remedy
        answers = await asyncio.gather(*accepted)
        assert all(np.array_equal(answer["output"], answers[0]["output"]) for answer in answers)
        small = heavy.inputs(2)
        assert np.array_equal((await client.infer(small))["output"], heavy.whole(small)["output"])
    at_rest(cluster)


async def test_a_refused_client_that_waits_as_told_is_served(cluster: LocalCluster, heavy: Split) -> None:
    async with splitnet.AsyncClient(heavy.address, "slow") as client:
        answers = await asyncio.gather(*(client.infer(heavy.inputs(200, seed=i), retry=True) for i in range(12)))
    for i, answer in enumerate(answers):
        assert np.array_equal(answer["output"], heavy.whole(heavy.inputs(200, seed=i))["output"])
    at_rest(cluster)


async def test_a_deadline_midway_frees_everything_on_every_node(cluster: LocalCluster, heavy: Split) -> None:
    async with RawStream(heavy.address) as stream:
        started = time.monotonic()
        await stream.send_inputs("late", heavy.inputs(HEAVY), timeout_s=0.15)
        error = await stream.answer("late")
        assert isinstance(error, DeadlineExceeded)
        assert 0.1 < time.monotonic() - started < 0.35
        assert slow().structure.outputs[0].value in error.message
        at_rest(cluster, timeout_s=0.2)  # not only once the second stage has finished
        await stream.send_inputs("next", heavy.inputs(1))
        assert isinstance(await stream.answer("next"), dict)


async def test_a_deadline_before_all_inputs_have_come(cluster: LocalCluster, tmp_path: Path) -> None:
    cut = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    deploy(cut.plan, cut.shards, name="half")
    async with RawStream(cut.address) as stream:
        await stream.send_inputs("half", {"x": cut.inputs()["x"]}, end=False, deployment="half", timeout_s=0.05)
        assert isinstance(await stream.answer("half"), DeadlineExceeded)
        await stream.send_inputs("half", {"y": cut.inputs()["y"]})  # late: ignored, and the id is free again
        await stream.send_inputs("half", cut.inputs(), deployment="half")
        assert isinstance(await stream.answer("half"), dict)
    at_rest(cluster)
    undeploy(cut.plan, "half")


async def test_a_cancellation_midway_frees_everything_on_every_node(cluster: LocalCluster, heavy: Split) -> None:
    async with RawStream(heavy.address) as stream:
        await stream.send_inputs("gone", heavy.inputs(HEAVY))
        await computing(cluster)
        await stream.send(request="gone", cancel=pb.Cancel(reason="no longer wanted"))
        at_rest(cluster, timeout_s=0.3)
        await stream.send_inputs("gone", heavy.inputs(1))
        assert isinstance(await stream.answer("gone"), dict)


async def test_cancelling_infer_reaches_every_node(cluster: LocalCluster, heavy: Split) -> None:
    async with splitnet.AsyncClient(heavy.address, "slow") as client:
        asking = asyncio.create_task(client.infer(heavy.inputs(HEAVY)))
        await computing(cluster)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.to_thread(at_rest, cluster, 0.3)
        assert await client.infer(heavy.inputs(1))


async def test_a_client_that_disappears_midway_leaves_nothing(cluster: LocalCluster, heavy: Split) -> None:
    async with RawStream(heavy.address) as stream:
        for i in range(3):
            await stream.send_inputs(f"gone-{i}", heavy.inputs(HEAVY))
        await computing(cluster)
    at_rest(cluster, timeout_s=0.5)


async def test_a_failing_request_names_its_place_and_disturbs_no_other(cluster: LocalCluster, tmp_path: Path) -> None:
    cut = split(fragile(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="gather", c="*"))
    deploy(cut.plan, cut.shards, name="fragile")
    good = cut.inputs(3)
    bad = {**good, "index": good["index"] + 99}
    async with splitnet.AsyncClient(cut.address, "fragile") as client:
        asked = [client.infer(bad if i % 2 else good) for i in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    for i, answer in enumerate(answers):
        if i % 2:
            assert isinstance(answer, EngineFailure)
            assert (answer.node, answer.stage) == ("b", "stage1")
            assert answer.request
            assert "gather" in answer.message
        else:
            assert isinstance(answer, dict)
            assert np.array_equal(answer["output"], cut.whole(good)["output"])
    at_rest(cluster)
    counted = {
        stage.name: (stage.requests, stage.failures)
        for n in status(cluster.cluster())
        for d in n.deployments
        if d.name == "fragile"
        for stage in d.stages
    }
    assert counted == {"stage0": (8, 0), "stage1": (8, 4), "stage2": (4, 0)}
    undeploy(cut.plan, "fragile")


async def test_unloading_drains_and_then_cancels(cluster: LocalCluster, tmp_path: Path, heavy: Split) -> None:
    def deployed() -> None:
        deploy(heavy.plan, heavy.shards, name="short-lived")

    for drain_s, finishes in ((20.0, True), (0.0, False)):
        await asyncio.to_thread(deployed)
        async with RawStream(heavy.address) as stream:
            await stream.send_inputs("last", heavy.inputs(HEAVY), deployment="short-lived")
            await computing(cluster)
            unloading = asyncio.create_task(asyncio.to_thread(undeploy, heavy.plan, "short-lived", drain_s=drain_s))
            answer = await stream.answer("last")
            assert isinstance(answer, dict) == finishes, answer
            await unloading
            await stream.send_inputs("next", heavy.inputs(1), deployment="short-lived")
            refusal = await stream.answer("next")
            assert isinstance(refusal, NotFound), refusal
    at_rest(cluster)
    assert not [d.name for node in status(cluster.cluster()) for d in node.deployments if d.name == "short-lived"]


async def test_an_idle_node_that_went_away_fails_requests_at_once(tmp_path: Path) -> None:
    """Its deployment only; the others on the remaining nodes go on."""
    with LocalCluster(3) as nodes:
        through = split(diamond(), nodes.cluster(), tmp_path / "1", stages_by(a="linear relu", b="linear_1 tanh", c="*"))
        beside = split(diamond(), nodes.cluster(), tmp_path / "2", stages_by(a="linear relu", b="*"))
        await asyncio.to_thread(deploy, through.plan, through.shards, name="through")
        await asyncio.to_thread(deploy, beside.plan, beside.shards, name="beside")
        async with splitnet.AsyncClient(through.address, "through") as one, splitnet.AsyncClient(beside.address, "beside") as two:
            assert await one.infer(through.inputs())
            await asyncio.to_thread(nodes.kill, "c")
            started = time.monotonic()
            with pytest.raises(NodeUnavailable) as caught:
                await one.infer(through.inputs())
            assert time.monotonic() - started < 1.0
            assert (caught.value.node, caught.value.stage) == ("c", "stage2")
            assert nodes.addresses["c"] in caught.value.message
            assert "start the node 'c' again" in caught.value.remedy
            assert await two.infer(beside.inputs())
            await asyncio.to_thread(nodes.restart, "c")
            while "through" not in nodes.server("c").ledger.deployments:  # it is given its stages again
                assert time.monotonic() - started < 20
                await asyncio.sleep(0.02)
            answer = await one.infer(through.inputs())
        assert np.array_equal(answer["joined"], through.whole(through.inputs())["joined"])
        at_rest(nodes)


async def test_what_a_broken_link_between_two_nodes_that_live_loses_is_sent_again(cluster: LocalCluster, heavy: Split) -> None:
    """The ingress sees both nodes and cannot know; the sender tells it what may have been lost."""
    async with RawStream(heavy.address) as stream:
        given = heavy.inputs(HEAVY)
        await stream.send_inputs("lost", given)
        await computing(cluster)
        server = cluster.server("b")

        async def break_link() -> None:
            (link,) = [link for d in server.ledger.deployments.values() for link in d.links.values() if link.target.name == "c"]
            key = next(iter(server.ledger.requests)).key
            link._recent[key] = None  # as if its last chunk had just been handed to the network
            server.ledger.link_down(link, NodeUnavailable("cable pulled"), [key])

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(break_link(), cluster._loop.loop))
        answer = await stream.answer("lost")
        assert isinstance(answer, dict)
        assert np.array_equal(answer["output"], heavy.whole(given)["output"])
        assert "replayed" in [event.kind for event in cluster.server("a").ledger.events]
        await asyncio.to_thread(at_rest, cluster, 0.5)
        await stream.send_inputs("next", heavy.inputs(1))
        assert isinstance(await stream.answer("next"), dict)


async def test_a_client_that_asks_and_never_reads_is_made_to_wait(cluster: LocalCluster, heavy: Split) -> None:
    """30,000 requests that are refused at once: their refusals must not pile up in the node."""
    server = cluster.server("a")
    worst = 0
    async with RawStream(heavy.address) as stream:
        try:
            async with asyncio.timeout(2):
                for i in range(30_000):
                    await stream.send(request=f"r{i}", deployment="nowhere" * 10, end=True)
                    if i % 20 == 0:
                        worst = max([worst, *(client.outbox.backlog for client in list(server._servicer.clients))])
        except TimeoutError:
            pass  # it is being made to wait
        worst = max([worst, *(client.outbox.backlog for client in list(server._servicer.clients))])
        assert 0 < worst <= 1001
