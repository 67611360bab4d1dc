from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np
import pytest
from scripted_node import ScriptedNode, X, deployment

from splitnet import wire
from splitnet.client import AsyncClient
from splitnet.errors import BadInput, Cancelled, DeadlineExceeded, EngineFailure, NodeUnavailable, NotFound, NotPermitted, Overloaded
from splitnet.tensors import TensorSpec


def ones(batch: int = 2) -> np.ndarray:
    return np.ones((batch, 4), np.float32)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def never(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_an_answer_and_what_goes_in_and_out() -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        outputs = await client.infer({"x": ones()})
        np.testing.assert_array_equal(outputs["y"], ones() + 1)
        outputs["y"][:] = 0  # the caller's own
        assert client.inputs == (X,)
        assert [spec.name for spec in client.outputs] == ["y"]
        assert client.max_in_flight == 4
        assert (await client.describe()).model == "test"


async def test_the_only_input_needs_no_name() -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        np.testing.assert_array_equal((await client.infer(ones()))["y"], ones() + 1)


@pytest.mark.parametrize(
    "array",
    [ones(6)[::2], np.asfortranarray(ones(3)), ones().astype(">f4"), np.broadcast_to(np.float32(1), (2, 4)), np.flip(ones(), 0)],
    ids=["sliced", "fortran", "big-endian", "broadcast", "negative"],
)
async def test_layouts_of_the_input(array: np.ndarray) -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        np.testing.assert_array_equal((await client.infer(array))["y"], np.asarray(array, np.float32) + 1)


async def test_a_broadcast_output_is_the_callers_own() -> None:
    async def broadcast(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": np.broadcast_to(inputs["x"][:, :1], inputs["x"].shape)}

    async with ScriptedNode(broadcast) as node, AsyncClient(node.address) as client:
        y = (await client.infer(ones()))["y"]
        y[0, 0] = 5
        assert y[0, 1] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"z": ones()}, "no input 'z'; the model has x"),
        ({}, "input 'x' is missing"),
        (ones().astype(np.float64), "expected float32, got float64"),
        ([[1.0, 2.0, 3.0, 4.0]], "expected float32, got float64"),
        (np.ones((2, 5), np.float32), "dimension 1 must be 4, got 5"),
        (np.ones(4, np.float32), "expected 2 dimensions"),
        (np.ones((0, 4), np.float32), "dimension 0 is empty"),
        ([[1, 2], [3]], "cannot become an array"),
        (np.array([["a"]]), "input 'x'"),
        (np.ma.masked_array(ones()), "masked"),
    ],
)
async def test_inputs_that_do_not_fit_are_refused_before_anything_is_sent(inputs: Any, message: str) -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        with pytest.raises(BadInput, match="input") as caught:
            await client.infer(inputs)
        assert message in str(caught.value)
        assert not node.frames


async def test_inputs_that_share_a_symbol_must_agree() -> None:
    specs = [wire.spec_to_message(TensorSpec(name, "float32", ("batch", 4))) for name in "ab"]
    async with ScriptedNode(deployments=[deployment(inputs=specs)]) as node, AsyncClient(node.address) as client:
        with pytest.raises(BadInput, match="'batch' is 2 in another input"):
            await client.infer({"a": ones(2), "b": ones(3)})
        with pytest.raises(BadInput, match="the model has 2 inputs: a, b"):
            await client.infer(ones())


async def test_a_tensor_larger_than_the_nodes_limit() -> None:
    async with ScriptedNode() as node:
        node.reply.max_tensor_bytes = 100
        async with AsyncClient(node.address) as client:
            with pytest.raises(BadInput, match="more than the node's limit of 100"):
                await client.infer(ones(100))


async def test_not_a_number_is_passed_through_bit_for_bit() -> None:
    async def same(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": inputs["x"]}

    bits = np.array([[0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000]], np.uint32)
    async with ScriptedNode(same) as node, AsyncClient(node.address) as client:
        outputs = await client.infer(bits.view(np.float32))
    np.testing.assert_array_equal(outputs["y"].view(np.uint32), bits)


async def test_large_requests_interleave_and_small_ones_are_not_held_up() -> None:
    async with ScriptedNode() as node, AsyncClient(node.address) as client:
        large = np.zeros((1 << 20, 4), np.float32)  # 16 chunks
        answers = await asyncio.gather(client.infer(large), client.infer(large), client.infer(ones()))
        assert [a["y"].shape[0] for a in answers] == [1 << 20, 1 << 20, 2]
        order = [frame.request for frame in node.frames]
        assert len(set(order)) == 3
        assert sum(a != b for a, b in itertools.pairwise(order)) > 16, "chunks of different requests take turns"
        ends = {frame.request: at for at, frame in enumerate(node.frames) if frame.end}
        assert min(ends.values()) < 8, "the small request did not wait for the large ones"
    assert node.streams == 1


async def test_a_failure_is_of_the_same_class_and_disturbs_nobody() -> None:
    async def second_fails(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs["x"].shape[0] == 3:
            raise EngineFailure("the shard failed", node="b", stage="s1", remedy="see its log")
        await asyncio.sleep(0.05)
        return {"y": inputs["x"]}

    async with ScriptedNode(second_fails) as node, AsyncClient(node.address) as client:
        good, bad = await asyncio.gather(client.infer(ones()), client.infer(ones(3)), return_exceptions=True)
        assert isinstance(good, dict)
        assert isinstance(bad, EngineFailure)
        assert (bad.node, bad.stage, bad.message, bad.remedy) == ("b", "s1", "the shard failed", "see its log")
        assert bad.request
        assert (await client.infer(ones()))["y"].shape == (2, 4)
        assert not node.cancelled
    assert node.streams == 1


async def test_the_deadline_travels_and_is_kept_here() -> None:
    async with ScriptedNode(never) as node, AsyncClient(node.address) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"no answer from 127.0.0.1:\d+ within 0.2 s"):
            await client.infer(ones(), timeout_s=0.2)
        assert 0.19 < time.monotonic() - started < 2
        await until(lambda: node.cancelled)
        assert 0 < node.frames[0].timeout_s < 0.2
        await until(lambda: node.under_way == 0)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
async def test_a_timeout_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(BadInput, match="timeout_s must be positive"):
        AsyncClient("127.0.0.1:1", timeout_s=timeout_s)
    with pytest.raises(BadInput, match="timeout_s must be positive"):
        await AsyncClient("127.0.0.1:1").infer({}, timeout_s=timeout_s)


async def test_cancelling_the_task_tells_the_node() -> None:
    async with ScriptedNode(never) as node, AsyncClient(node.address) as client:
        task = asyncio.create_task(client.infer(ones()))
        await until(lambda: node.under_way)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: node.cancelled and node.under_way == 0)
        node.compute = ScriptedNode().compute
        assert (await client.infer(ones()))["y"].shape == (2, 4), "the stream survives a cancelled request"
    assert node.streams == 1


async def test_overloaded_is_the_callers_unless_retry_is_asked_for() -> None:
    refusals, pause_s = 2, 0.01

    async def busy(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Overloaded("full", retry_after_s=pause_s)
        return {"y": inputs["x"]}

    async with ScriptedNode(busy) as node, AsyncClient(node.address) as client:
        with pytest.raises(Overloaded) as caught:
            await client.infer(ones())
        assert caught.value.retry_after_s == 0.01
        assert (await client.infer(ones(), retry=True))["y"].shape == (2, 4)
        refusals, pause_s = 1, 60.0  # longer than the request has
        with pytest.raises(Overloaded):  # and not DeadlineExceeded: this says more
            await client.infer(ones(), retry=True, timeout_s=30)


async def test_close_fails_what_is_under_way_and_what_comes_after() -> None:
    async with ScriptedNode(never) as node:
        client = AsyncClient(node.address)
        task = asyncio.create_task(client.infer(ones()))
        await until(lambda: node.under_way)
        await client.close()
        await client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            await task
        with pytest.raises(BadInput, match="the client is closed"):
            await client.infer(ones())


# ------------------------------------------------------------------------------------------------------------ which deployment


async def test_the_deployment_is_chosen_or_must_be_named() -> None:
    async with ScriptedNode(deployments=[deployment("m"), deployment("n")]) as node:
        async with AsyncClient(node.address, "n") as client:
            await client.infer(ones())
        assert {frame.deployment for frame in node.frames} == {"n"}
        with pytest.raises(NotFound, match=r"several deployments are at .*: 'm', 'n'"):
            await AsyncClient(node.address).connect()
        with pytest.raises(NotFound, match=r"no deployment 'o' at .*; it has 'm', 'n'"):
            await AsyncClient(node.address, "o").connect()


async def test_nothing_is_deployed() -> None:
    async with ScriptedNode(deployments=[]) as node:
        with pytest.raises(NotFound, match="nothing is deployed"):
            async with AsyncClient(node.address):
                pass


async def test_not_the_ingress() -> None:
    async with ScriptedNode(deployments=[deployment(ingress=False, ingress_address="10.0.0.5:7001")]) as node:
        with pytest.raises(NotPermitted, match="later stage") as caught:
            await AsyncClient(node.address).connect()
        assert "connect to 10.0.0.5:7001" in caught.value.remedy


async def test_a_deployment_that_enters_elsewhere_does_not_compete() -> None:
    async with ScriptedNode(deployments=[deployment("m"), deployment("n", ingress=False)]) as node, AsyncClient(node.address) as client:
        assert (await client.describe()).name == "m"


async def test_a_draining_node() -> None:
    async with ScriptedNode() as node:
        node.reply.draining = True
        with pytest.raises(NodeUnavailable, match="draining"):
            await AsyncClient(node.address).connect()


async def test_metadata_before_connecting() -> None:
    with pytest.raises(BadInput, match="has not connected"):
        _ = AsyncClient("127.0.0.1:1").inputs


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", "localhost:0", "localhost:99999", "http://a:1", ":7001", "a b:1"])
async def test_not_an_address(address: str) -> None:
    with pytest.raises(BadInput, match="is not HOST:PORT"):
        await AsyncClient(address).connect()
