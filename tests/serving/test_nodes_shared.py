"""One node with several stages, several deployments, several clients; and deployments that go while others are served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_stream import RawStream
from small_models import Split, at_rest, chain, diamond, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import SplitnetError
from splitnet.install import deploy, undeploy

WIDE = 3000  # rows; large enough that zstd works in another thread


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cut(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Three stages in a row on the second node, and the way back over the first."""
    first, second, third, fourth, *_ = (v.name for v in chain().structure.vertices if v.op != "input")
    stages = stages_by(a=first, b=second, b_=third, b__=fourth, a_="*")
    made = split(chain(), cluster.cluster(), tmp_path_factory.mktemp("row"), stages, codec="zstd")
    deploy(made.plan, made.shards, name="row")
    return made


async def test_stages_that_follow_one_another_on_one_node(cluster: LocalCluster, cut: Split) -> None:
    async with splitnet.AsyncClient(cut.address, "row", timeout_s=5.0) as client:
        for seed in range(10):
            given = cut.inputs(4, seed)
            assert np.array_equal((await client.infer(given))["output"], cut.whole(given)["output"])
    at_rest(cluster)


async def test_two_clients_may_use_the_same_request_ids(cut: Split) -> None:
    async with RawStream(cut.address) as one, RawStream(cut.address) as other:
        given = [cut.inputs(3, seed=1), cut.inputs(5, seed=2)]
        await asyncio.gather(*(s.send_inputs("same", g, deployment="row") for s, g in zip((one, other), given, strict=True)))
        for stream, inputs in zip((one, other), given, strict=True):
            answer = await stream.answer("same")
            assert isinstance(answer, dict), answer
            assert np.array_equal(answer["output"], cut.whole(inputs)["output"])


async def test_a_deployment_that_goes_under_load_disturbs_no_other(
    cluster: LocalCluster, cut: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own requests end in clean errors; those of the other one, over the same links, are all answered."""
    beside = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"), codec="zstd")
    ended = False

    async def asked(address: str, name: str, source: Split) -> tuple[int, list[BaseException]]:
        answered, failures = 0, []
        client = splitnet.AsyncClient(address, name)
        while not ended:
            try:
                await client.infer(source.inputs(WIDE), timeout_s=10.0)
                answered += 1
            except SplitnetError as error:
                failures.append(error)
                await asyncio.sleep(0.01)
        await client.close()
        return answered, failures

    steady = [asyncio.create_task(asked(cut.address, "row", cut)) for _ in range(2)]
    shaken = [asyncio.create_task(asked(beside.address, "beside", beside)) for _ in range(4)]
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await asyncio.to_thread(deploy, beside.plan, beside.shards, name="beside")
            await asyncio.sleep(0.15)
            await asyncio.to_thread(undeploy, beside.plan, "beside", drain_s=0.0)
    ended = True
    for answered, failures in await asyncio.gather(*steady):
        assert answered
        assert not failures
    failed = [failure for _, failures in await asyncio.gather(*shaken) for failure in failures]
    clean = {
        "NotFound",
        "Cancelled",
        "NodeUnavailable",
        "Overloaded",
    }  # the last: by the pace that is predicted, four clients may be too many
    assert {type(failure).__name__ for failure in failed} <= clean, failed
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text
    at_rest(cluster)
