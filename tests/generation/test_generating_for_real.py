"""A Llama over three nodes that were deployed to: the tokens of transformers, and nothing left behind by clients that go when they like."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
from tiny_llama import Served, deploy_tiny_llama

import splitnet
from nodes.testing import LocalCluster
from splitnet.heartbeat import Heartbeat, Silence

_PATIENT = Heartbeat(patience_s=4.0)  # all of it runs in one process, which a busy machine may hold up


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3, heartbeat=_PATIENT) as running:
        yield running


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return deploy_tiny_llama(cluster, tmp_path_factory.mktemp("llama"))


def _prompt(generator: random.Random) -> list[int]:
    shared = [7, 3, 9, 1] * 6
    return (shared if generator.random() < 0.5 else []) + generator.choices(range(64), k=generator.randrange(1, 20))


def test_greedy_text_is_that_of_the_whole_model(served: Served) -> None:
    with splitnet.Client(served.address, served.name) as client:
        for seed in range(3):
            prompt = _prompt(random.Random(seed))
            assert list(client.generate(prompt, 30)) == served.greedy(prompt, 30)


async def test_clients_that_come_and_go_leave_nothing_and_get_their_own_tokens(served: Served, cluster: LocalCluster) -> None:
    """32 at once, half of which stop in the middle."""
    wanted = [_prompt(random.Random(seed)) for seed in range(8)]
    expected = [served.greedy(prompt, 40) for prompt in wanted]
    clients = [splitnet.AsyncClient(served.address, served.name) for _ in range(4)]
    for client in clients:
        client._heartbeat, client._silence = _PATIENT, Silence(_PATIENT)

    async def visit(number: int) -> None:
        generator = random.Random(number)
        for _ in range(2):
            which = generator.randrange(len(wanted))
            count = generator.randrange(1, 41)
            patience = generator.randrange(1, count + 1) if generator.random() < 0.5 else count
            came: list[int] = []
            async with clients[number % 4].generate(wanted[which], count, retry=True) as stream:
                async for token in stream:
                    came.append(token)
                    if len(came) == patience and patience < count:
                        break
            assert came == expected[which][:patience]

    await asyncio.gather(*map(visit, range(32)))
    for client in clients:
        await client.close()
    deployments = [cluster.server(name).ledger.deployments[served.name] for name in cluster.names]
    here = deployments[0].generator
    assert here is not None
    deadline = time.monotonic() + 5
    while here.slots.live or here.passes or here.slots.free < here.slots.total:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    for deployment in deployments:
        for stage in deployment.stages.values():
            assert len(stage.sessions) <= len(here.slots.kept)
            assert stage.engine.free_tokens() >= here.slots.total - sum(kept.reserved for kept in here.slots.kept)  # type: ignore[attr-defined]
