"""A node that dies, lies, babbles, or says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from scripted_node import ScriptedNode, deployment, frames

from splitnet import channel, wire
from splitnet.client import AsyncClient
from splitnet.errors import BadInput, DeadlineExceeded, EngineFailure, NodeUnavailable, ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb

X = np.ones((2, 4), np.float32)


def node_that(answer: Callable[[str, Any], Any]) -> ScriptedNode:
    """`answer(request, context)` is called at the end of each request; the stream ends after the first."""

    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        async for data in requests:
            frame = wire.decode_frame(data).frame
            if frame.end:
                await answer(frame.request, context)
                return

    return ScriptedNode(talk=talk)


async def test_no_node_there() -> None:
    async with ScriptedNode() as node:
        address = node.address
    with pytest.raises(NodeUnavailable, match=f"no node answers at {address}") as caught:
        await AsyncClient(address).infer(X)
    assert "splitnet node" in caught.value.remedy


async def test_something_else_listens_there() -> None:
    async def web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(web_server, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(NodeUnavailable, match="no node answers"):
            async with AsyncClient(f"127.0.0.1:{port}", timeout_s=5):
                pass


async def test_nothing_answers_at_all() -> None:
    hung_up = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
            async with AsyncClient(f"127.0.0.1:{port}", timeout_s=0.3):
                pass
        await asyncio.wait_for(hung_up.wait(), 5)


async def test_another_grpc_service_listens_there() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(ProtocolError, match="does not offer this call") as caught:
        await AsyncClient(f"127.0.0.1:{port}").infer(X)
    assert "splitnet node" in caught.value.remedy
    await server.stop(None)


async def ends_the_stream(request: str, context: Any) -> None:
    pass


async def half_an_answer(request: str, context: Any) -> None:
    first = frames(request, {"y": np.zeros((1 << 18, 4), np.float32)})[0]
    await context.write(wire.encode_frame(first))


async def aborts(request: str, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")


async def cancels(request: str, context: Any) -> None:
    await context.abort(grpc.StatusCode.CANCELLED, "")


async def crashes(request: str, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNKNOWN, "Unexpected <class 'ZeroDivisionError'>")


@pytest.mark.parametrize("answer", [ends_the_stream, half_an_answer, aborts, cancels, crashes])
async def test_the_stream_ends_before_the_answer(answer: Any) -> None:
    async with node_that(answer) as node, AsyncClient(node.address) as client:
        with pytest.raises(NodeUnavailable, match=f"the connection to {node.address} broke while the request was under way") as caught:
            await client.infer(X)
        assert "send it again" in caught.value.remedy
        assert caught.value.request
        node.talk = node.answer_all
        assert (await client.infer(X))["y"].shape == (2, 4), "the next call connects anew"
        assert node.describes == 2, "and asks again what is there"


async def test_a_break_fails_every_request_under_way() -> None:
    release = asyncio.Event()

    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        await release.wait()

    async with ScriptedNode(talk=talk) as node, AsyncClient(node.address) as client:
        large = np.zeros((1 << 22, 4), np.float32)  # 64 MiB: more than fits into the socket, so that the senders wait
        tasks = [asyncio.create_task(client.infer(large)) for _ in range(5)]
        await asyncio.sleep(0.1)
        release.set()
        failures = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(failure) for failure in failures] == [NodeUnavailable] * 5
        assert len({id(failure) for failure in failures}) == 5, "each has its own, with its own traceback"


async def test_the_node_comes_back() -> None:
    node = ScriptedNode()
    address = await node.start()
    client = AsyncClient(address)
    await client.infer(X)
    await node.stop()
    for _ in range(3):
        with pytest.raises(NodeUnavailable):
            await client.infer(X)
    await node.start(address)
    async with asyncio.timeout(5):
        while True:
            try:
                await client.infer(X)
                break
            except NodeUnavailable:
                await asyncio.sleep(0.02)
    await client.close()
    await node.stop()


def _reply(request: str, **fields: Any) -> bytes:
    return wire.encode_frame(wire.Message(pb.Frame(request=request, **fields), b"12345678"))


def _tensor(**changes: Any) -> pb.TensorChunk:
    fields: dict[str, Any] = {"name": "y", "dtype": "float32", "shape": [2], "stored_bytes": 8, "codec": "raw", "length": 8}
    return pb.TensorChunk(**(fields | changes))


LIES: dict[str, Callable[[str], list[bytes]]] = {
    "a tensor of another name": lambda r: [_reply(r, tensor=_tensor(name="z"))],
    "an unknown element type": lambda r: [_reply(r, tensor=_tensor(dtype="float8"))],
    "an unknown codec": lambda r: [_reply(r, tensor=_tensor(codec="lzma"))],
    "more bytes than the limit": lambda r: [_reply(r, tensor=_tensor(shape=[1 << 60], stored_bytes=1 << 62))],
    "bytes that are not the shape's": lambda r: [_reply(r, tensor=_tensor(stored_bytes=12))],
    "a chunk in the wrong place": lambda r: [_reply(r, tensor=_tensor(offset=4, length=4))],
    "a payload that is too long": lambda r: [_reply(r, tensor=_tensor(shape=[1], stored_bytes=4, length=4))],
    "a chunk too many": lambda r: [_reply(r, tensor=_tensor()), _reply(r, tensor=_tensor())],
    "an end before the tensor": lambda r: [_reply(r, tensor=_tensor(shape=[4], stored_bytes=16), end=True)],
    "an end with nothing": lambda r: [pb.Frame(request=r, end=True).SerializeToString()],
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_answer_that_is_none_fails_its_request_alone(lie: str) -> None:
    async def compute(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs["x"].shape[0] == 3:
            await asyncio.Event().wait()
        return {"y": inputs["x"]}

    node = ScriptedNode(compute)

    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        async def relay() -> AsyncIterator[bytes]:
            async for data in requests:
                frame = wire.decode_frame(data).frame
                if frame.end and list(frame.tensor.shape) == [3, 4]:
                    for reply in LIES[lie](frame.request):
                        async with node.writing:
                            await context.write(reply)
                yield data

        await node.answer_all(relay(), context)

    node.talk = talk
    async with node, AsyncClient(node.address) as client:
        good, bad = await asyncio.gather(client.infer(X), client.infer(np.ones((3, 4), np.float32), timeout_s=5), return_exceptions=True)
        assert isinstance(good, dict)
        assert isinstance(bad, ProtocolError), bad
        assert (await client.infer(X))["y"].shape == (2, 4)
        assert len(node.cancelled) == 1, "the node is told to drop it"
        assert node.streams == 1


@pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x7a\xff\xff\xff\x0f", b"GET / HTTP/1.1"])
async def test_garbage_ends_the_stream_but_not_the_client(garbage: bytes) -> None:
    async def babble(request: str, context: Any) -> None:
        await context.write(garbage)
        await asyncio.sleep(5)

    async with node_that(babble) as node, AsyncClient(node.address) as client:
        with pytest.raises(ProtocolError, match="frame"):
            await client.infer(X)
        node.talk = node.answer_all
        await client.infer(X)


async def test_a_message_larger_than_the_limit() -> None:
    async def huge(request: str, context: Any) -> None:
        await context.write(b"\0" * (wire.MAX_MESSAGE_BYTES + 1))

    async with node_that(huge) as node, AsyncClient(node.address) as client:
        with pytest.raises((ProtocolError, NodeUnavailable)):
            await client.infer(X, timeout_s=5)


async def test_frames_that_nobody_asked_for_are_ignored() -> None:
    async def chatter(request: str, context: Any) -> None:
        for message in (*frames("stranger", {"y": X}), wire.Message(pb.Frame()), *frames(request, {"y": X}), *frames(request, {"y": X})):
            await context.write(wire.encode_frame(message))
        await asyncio.sleep(5)

    async with node_that(chatter) as node, AsyncClient(node.address) as client:
        np.testing.assert_array_equal((await client.infer(X))["y"], X)


async def test_a_late_answer_is_not_taken_for_another() -> None:
    async def slow_once(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": inputs["x"]}

    late: list[str] = []

    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        async for data in requests:
            frame = wire.decode_frame(data).frame
            if frame.HasField("cancel"):
                for message in frames(late[0], {"y": X * 7}):
                    await context.write(wire.encode_frame(message))
            elif not late:
                late.append(frame.request)
            else:
                for message in frames(frame.request, {"y": X * 2}):
                    await context.write(wire.encode_frame(message))

    async with ScriptedNode(slow_once, talk) as node, AsyncClient(node.address) as client:
        with pytest.raises(DeadlineExceeded):
            await client.infer(X, timeout_s=0.1)
        np.testing.assert_array_equal((await client.infer(X))["y"], X * 2)


async def test_refused_at_the_first_chunk_the_rest_is_not_sent() -> None:
    async def talk(requests: AsyncIterator[bytes], context: Any) -> None:
        count = 0
        async for data in requests:
            frame = wire.decode_frame(data).frame
            count += 1
            if count == 1:
                failure = channel.to_failure(EngineFailure("no"))
                await context.write(pb.Frame(request=frame.request, failure=failure).SerializeToString())
                await asyncio.sleep(0.1)
            received.append(frame)

    received: list[pb.Frame] = []
    async with ScriptedNode(talk=talk) as node, AsyncClient(node.address) as client:
        with pytest.raises(EngineFailure):
            await client.infer(np.zeros((1 << 22, 4), np.float32))  # 64 chunks
        await asyncio.sleep(0.15)
    assert len(received) < 60


async def test_a_compressed_answer() -> None:
    async def compressed(request: str, context: Any) -> None:
        for message in frames(request, {"y": np.arange(1 << 20, dtype=np.float32).reshape(-1, 4)}, codec="zstd"):
            await context.write(wire.encode_frame(message))
        await asyncio.sleep(5)

    async with node_that(compressed) as node, AsyncClient(node.address) as client:
        np.testing.assert_array_equal((await client.infer(X))["y"].ravel(), np.arange(1 << 20, dtype=np.float32))


async def test_an_element_type_that_this_version_does_not_know() -> None:
    status = deployment(inputs=[pb.TensorSpec(name="x", dtype="float4", shape=["batch"])])
    async with ScriptedNode(deployments=[status]) as node:
        with pytest.raises(ProtocolError, match="'float4' is not one of"):
            await AsyncClient(node.address).connect()


async def test_stalled_sends_keep_their_deadline_and_memory() -> None:
    async def deaf(requests: AsyncIterator[bytes], context: Any) -> None:
        await asyncio.sleep(30)

    async with ScriptedNode(talk=deaf) as node, AsyncClient(node.address) as client:
        large = np.zeros((1 << 22, 4), np.float32)
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await client.infer(large, timeout_s=0.1)
        with pytest.raises(BadInput):
            await client.infer(X.astype(np.int64))
        assert client._exchange is not None
        assert client._exchange._outbox.qsize() <= 8, "nothing piles up behind a node that does not read"
