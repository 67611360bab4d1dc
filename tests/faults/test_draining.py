"""SIGTERM at a node while requests are in flight: whatever was admitted before is answered, and nothing new is taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Split, captured, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import NodeUnavailable
from splitnet.install import deploy, status

ROWS = 512  # 4 MiB of answer
PATIENCE_S = 20.0


class Wide(torch.nn.Module):
    """Work in three stages, and a large answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 512)
        self.second = torch.nn.Linear(512, 512)
        self.third = torch.nn.Linear(512, 512)
        self.last = torch.nn.Linear(512, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        for _ in range(5):
            h = torch.tanh(self.second(h))
        for _ in range(5):
            h = torch.tanh(self.third(h))
        return self.last(h)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3, processes=True, drain_s=60.0) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cut(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    torch.manual_seed(7)
    model = captured(Wide(), torch.randn(2, 8))
    names = [v.name for v in model.structure.vertices if v.op != "input"]
    stages = stages_by(a=" ".join(names[:2]), b=" ".join(names[2:12]), c="*")
    return split(model, cluster.cluster(), tmp_path_factory.mktemp("wide"), stages)


@pytest.fixture
def served(cluster: LocalCluster, cut: Split) -> Split:
    """Deployed on all three nodes; those that an earlier test has ended are started again."""
    for name in cluster.names:
        if not cluster.alive(name):
            cluster.restart(name)
    deploy(cut.plan, cut.shards, name="wide")
    return cut


async def in_flight(cluster: LocalCluster, node: str, requests: int = 1) -> None:
    """Returns when that many requests are at that node."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        (found,) = [n for n in await asyncio.to_thread(status, cluster.cluster()) if n.name == node]
        if any(d.in_flight >= requests for d in found.deployments):
            return
    raise AssertionError(f"nothing arrived at {node!r}")


async def admitted(cluster: LocalCluster, asked: Sequence[asyncio.Task[Any]]) -> None:
    """Returns when none of them is on its way to the ingress any more."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        answered = sum(task.done() for task in asked)
        (ingress,) = [n for n in await asyncio.to_thread(status, cluster.cluster()) if n.name == "a"]
        if answered + sum(d.in_flight for d in ingress.deployments) >= len(asked):
            return
    raise AssertionError("requests did not arrive")


@pytest.mark.parametrize("stopped", ["b", "abc"])
async def test_what_was_admitted_is_answered_whichever_nodes_are_asked_to_stop(cluster: LocalCluster, served: Split, stopped: str) -> None:
    async with splitnet.AsyncClient(served.address, "wide") as client:
        given = served.inputs(ROWS)
        expected = served.whole(given)["output"]
        asked = [asyncio.create_task(client.infer(given)) for _ in range(8)]
        await in_flight(cluster, "c")
        await admitted(cluster, asked)
        for name in stopped:
            cluster.terminate(name)
        for answer in await asyncio.gather(*asked):
            assert np.array_equal(answer["output"], expected)
        for name in stopped:
            assert await asyncio.to_thread(cluster.wait_stopped, name) == 0
            assert "Traceback" not in cluster.log(name)


async def test_a_client_that_is_held_up_reads_its_answer_after_the_ingress_has_gone(cluster: LocalCluster, served: Split) -> None:
    """All of the answer is with it, or on its way, when the node ends the stream: what it has not read yet counts, too."""
    async with splitnet.AsyncClient(served.address, "wide") as client:
        given = served.inputs(ROWS)
        asked = asyncio.create_task(client.infer(given))
        await in_flight(cluster, "a")
        cluster.terminate("a")
        time.sleep(2.5)  # noqa: ASYNC251 # it is the loop that is held up
        assert np.array_equal((await asked)["output"], served.whole(given)["output"])
        assert await asyncio.to_thread(cluster.wait_stopped, "a") == 0


@pytest.mark.parametrize("stopped", ["c"])
async def test_while_a_node_finishes_new_requests_are_refused_by_its_name(cluster: LocalCluster, served: Split, stopped: str) -> None:
    async with splitnet.AsyncClient(served.address, "wide") as client:
        given = served.inputs(ROWS)
        asked = [asyncio.create_task(client.infer(given)) for _ in range(12)]
        await in_flight(cluster, stopped)
        cluster.terminate(stopped)
        small = served.inputs(1)
        more: list[asyncio.Task[Any]] = []
        while not any(
            task.done() and task.exception() for task in more
        ):  # the signal takes a moment to arrive; what came before it is answered
            more.append(asyncio.create_task(client.infer(small, retry=True)))
            await asyncio.sleep(0.02)
        (refused,) = {type(task.exception()): task.exception() for task in more if task.done() and task.exception()}.values()
        assert isinstance(refused, NodeUnavailable)
        assert f"node '{stopped}' is stopping" in refused.message
        assert refused.node == stopped
        assert "start it again" in refused.remedy
        assert all(answer["output"].shape == (ROWS, 2048) for answer in await asyncio.gather(*asked))
        answers = await asyncio.gather(*more, return_exceptions=True)
        assert all(isinstance(answer, NodeUnavailable) or answer["output"].shape == (1, 2048) for answer in answers)
        assert await asyncio.to_thread(cluster.wait_stopped, stopped) == 0
        await asyncio.to_thread(cluster.restart, stopped)
        await asyncio.to_thread(deploy, served.plan, served.shards, name="wide")
        assert (await client.infer(small))["output"].shape == (1, 2048)
