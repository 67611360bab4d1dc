"""A link is closed while it connects: gRPC may take the cancellation for its own, which must not keep the link alive."""

from __future__ import annotations

import asyncio
import socket

import pytest

from nodes import link as link_module
from nodes.link import Link
from nodes.logs import get_log
from nodes.requests import RequestKey
from splitnet.channel import FrameCall
from splitnet.errors import NodeUnavailable, SplitnetError
from splitnet.heartbeat import Heartbeat
from splitnet.plan import NodeRef


class Deaf:
    def link_up(self, link: Link) -> None: ...
    def link_down(self, link: Link, error: SplitnetError, lost: list[RequestKey]) -> None: ...
    def refused(self, link: Link, key: RequestKey, error: SplitnetError) -> None: ...


def link_to(port: int) -> Link:
    return Link(NodeRef("a", "127.0.0.1:1"), NodeRef("b", f"127.0.0.1:{port}"), Deaf(), get_log("a", quiet=True), Heartbeat())


@pytest.fixture
def nobody() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_cancellation_that_grpc_swallows(nobody: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `grpc.aio` does between the making of a stream and its first read: the task that sets the stream up is cancelled, ends quietly,
    and the reader hears only that the stream is no more."""
    reading = asyncio.Event()

    async def read_frame(call: FrameCall, address: str) -> None:
        reading.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise NodeUnavailable("the stream is no more") from None

    monkeypatch.setattr(link_module, "read_frame", read_frame)
    link = link_to(nobody)
    await reading.wait()
    async with asyncio.timeout(20):
        await link.close()


async def test_at_any_moment_of_connecting_in_vain(nobody: int) -> None:
    async def one(steps: int) -> None:
        link = link_to(nobody)
        for _ in range(steps):
            await asyncio.sleep(0)
        await link.close()

    async with asyncio.timeout(60):
        for steps in range(150):
            await one(steps)
