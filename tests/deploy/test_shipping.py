"""How a Load call ends: with the node's status, not by cancelling the node's last words."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from splitnet.channel import open_channel
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.rpc.v1 import node_pb2_grpc
from splitnet.shipping import Blob, ship

CONTENT = b"some bytes" * 100


class Slow(node_pb2_grpc.NodeServicer):
    """A node that takes its time between `complete` and its status."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.ended: list[str] = []

    async def Load(self, request_iterator: AsyncIterator[pb.LoadRequest], context: object) -> AsyncIterator[pb.LoadReply]:
        try:
            await anext(request_iterator)
            if self.held < len(CONTENT):
                yield pb.LoadReply(offset=self.held)
                assert (await anext(request_iterator)).data == CONTENT[self.held :]
            yield pb.LoadReply(offset=len(CONTENT), complete=True)
            await asyncio.sleep(0.1)
            self.ended.append("with its status")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


@pytest.mark.parametrize("held", [0, 10, len(CONTENT)])
async def test_a_call_is_over_when_the_node_has_said_so(held: int) -> None:
    node = Slow(held)
    server = grpc.aio.server()
    node_pb2_grpc.add_NodeServicer_to_server(node, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            sent = await ship(
                channel, f"127.0.0.1:{port}", Blob(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), CONTENT), lambda _: None
            )
        assert sent == len(CONTENT) - held
        assert node.ended == ["with its status"]
    finally:
        await server.stop(0)
