from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from scripted_node import ScriptedNode

from splitnet.client import AsyncClient
from splitnet.errors import BadInput, DeadlineExceeded, EngineFailure, NodeUnavailable, Overloaded

WINDOW = 4  # the scripted deployment's max_in_flight


def batch(number: int) -> np.ndarray:
    return np.full((1, 4), number, np.float32)


async def jittered(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    await asyncio.sleep(random.random() * 0.01)
    return {"y": inputs["x"]}


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def numbers(answers: Any, seen: list[int] | None = None) -> list[int]:
    seen = [] if seen is None else seen
    async for outputs in answers:
        seen.append(int(outputs["y"][0, 0]))
    return seen


async def test_in_order_with_the_pipeline_full() -> None:
    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        assert await numbers(client.stream(batch(i) for i in range(50))) == list(range(50))
        assert node.peak == WINDOW


@pytest.mark.parametrize(("window", "peak"), [(1, 1), (2, 2), (100, WINDOW)])
async def test_the_window_is_never_more_than_the_deployment_takes(window: int, peak: int) -> None:
    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        assert await numbers(client.stream([batch(i) for i in range(12)], window=window)) == list(range(12))
        assert node.peak == peak


async def test_a_window_of_nothing() -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        with pytest.raises(BadInput, match="window must be at least 1"):
            await numbers(client.stream([batch(1)], window=0))


async def test_no_batches() -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        assert await numbers(client.stream([])) == []


async def test_an_endless_source_is_read_no_further_than_the_window() -> None:
    pulled = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal pulled
        for pulled in itertools.count(1):
            yield batch(pulled)

    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        taken = 0
        async with contextlib.aclosing(client.stream(endless())) as answers:
            async for _ in answers:
                taken += 1
                await asyncio.sleep(0.002)
                assert pulled <= taken + WINDOW
                if taken == 30:
                    break
        await until(lambda: node.under_way == 0)


async def test_an_answer_does_not_wait_for_a_slow_source() -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[np.ndarray]:
        yield batch(1)
        await more.wait()
        yield batch(2)

    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        answers = client.stream(slow())
        assert int((await asyncio.wait_for(anext(answers), 5))["y"][0, 0]) == 1
        more.set()
        assert await numbers(answers) == [2]


@pytest.mark.parametrize("bad", [0, 5, 19])
async def test_the_error_of_a_batch_comes_at_its_place(bad: int) -> None:
    async def one_fails(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs["x"][0, 0] == bad:
            raise EngineFailure("it failed", stage="s1")
        return await jittered(inputs)

    async with ScriptedNode(one_fails) as node, AsyncClient(node.address) as client:
        seen: list[int] = []
        with pytest.raises(EngineFailure, match=f"batch {bad}: it failed") as caught:
            await numbers(client.stream(batch(i) for i in range(20)), seen)
        assert seen == list(range(bad))
        assert (caught.value.batch, caught.value.stage) == (bad, "s1")
        await until(lambda: node.under_way == 0)
        assert await numbers(client.stream(batch(i) for i in range(bad + 1, 20))) == list(range(bad + 1, 20)), "to go on"


async def test_a_batch_that_does_not_fit() -> None:
    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        with pytest.raises(BadInput, match="batch 1: input 'x': expected float32, got float64") as caught:
            await numbers(client.stream([batch(0), np.ones((1, 4)), batch(2)]))
        assert caught.value.batch == 1


async def test_the_callers_own_error_comes_after_the_answers_before_it() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield batch(0)
        yield batch(1)
        raise KeyError("mine")

    seen: list[int] = []
    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:
        with pytest.raises(KeyError, match="mine"):
            await numbers(client.stream(broken()), seen)
    assert seen == [0, 1]


async def test_a_full_pipeline_is_waited_for() -> None:
    async def capacity_two(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if node.under_way > 2:
            raise Overloaded("full", retry_after_s=0.005)
        return await jittered(inputs)

    async with ScriptedNode(capacity_two) as node, AsyncClient(node.address) as client:
        assert await numbers(client.stream(batch(i) for i in range(30))) == list(range(30))


async def test_closing_early_cancels_what_is_under_way() -> None:
    async def first_only(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs["x"][0, 0] > 0:
            await asyncio.Event().wait()
        return {"y": inputs["x"]}

    async with ScriptedNode(first_only) as node, AsyncClient(node.address) as client:
        answers = client.stream(batch(i) for i in itertools.count())
        await anext(answers)
        await until(lambda: node.under_way == WINDOW - 1)
        await answers.aclose()
        await until(lambda: node.under_way == 0)
        assert len(node.cancelled) >= WINDOW - 1


async def test_a_deadline_for_each_batch() -> None:
    async def third_hangs(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        await asyncio.sleep(60 if inputs["x"][0, 0] == 2 else 0)
        return {"y": inputs["x"]}

    async with ScriptedNode(third_hangs) as node, AsyncClient(node.address) as client:
        with pytest.raises(DeadlineExceeded, match="batch 2: no answer"):
            await numbers(client.stream([batch(i) for i in range(5)], timeout_s=0.2))


async def test_the_node_goes_away_in_the_middle() -> None:
    async with ScriptedNode(jittered) as node, AsyncClient(node.address) as client:

        async def ten_and_then_stop() -> None:
            async for outputs in client.stream(batch(i) for i in itertools.count()):
                if outputs["y"][0, 0] == 9:
                    await node.stop()

        with pytest.raises(NodeUnavailable, match=r"batch \d+: the connection to 127.0.0.1:\d+ broke|no node answers") as caught:
            await ten_and_then_stop()
        assert caught.value.batch is not None
        assert caught.value.batch >= 10
        assert caught.value.remedy
