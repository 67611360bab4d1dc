"""A client's Run stream, as the pipeline sees it: what is in flight on it, and what is to be sent back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nodes.callers import current_caller
from nodes.outbox import Outbox
from splitnet.channel import to_failure
from splitnet.errors import SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb

if TYPE_CHECKING:
    from nodes.calls import Call

__all__ = ["ClientStream"]

_REFUSED = 4096  # requests whose remaining frames are ignored


class ClientStream:
    """`calls` by the id that the client chose; ids need to be unique on one stream only."""

    def __init__(self) -> None:
        self.caller = current_caller()
        self.outbox = Outbox()
        self.calls: dict[str, Call] = {}
        self._refused: dict[str, None] = {}
        self._settled: asyncio.Event = asyncio.Event()
        self._settled.set()

    def add(self, client_id: str, call: Call) -> None:
        self.calls[client_id] = call
        self.caller.entered()
        self._settled.clear()

    def remove(self, client_id: str, *, complete: bool) -> None:
        """`complete`: the client has sent all of the request; else what still comes of it is ignored."""
        del self.calls[client_id]
        self.caller.left()
        if not complete:
            self._ignore(client_id)
        if not self.calls:
            self._settled.set()

    def ignores(self, client_id: str, end: bool) -> bool:
        """Whether this frame belongs to a request that has failed already; `end`: it is the request's last, so the id is free again."""
        known = client_id in self._refused
        if known and end:
            del self._refused[client_id]
        return known

    def refuse(self, client_id: str, error: SplitnetError, *, complete: bool) -> None:
        """Answers a request that was not taken in."""
        self._send_failure(client_id, error)
        if not complete:
            self._ignore(client_id)

    def fail(self, client_id: str, call: Call, error: SplitnetError) -> None:
        """Answers with a failure; what was not sent of the answer yet is forgotten."""
        self.outbox.drop(call)
        self._send_failure(client_id, error)

    def _send_failure(self, client_id: str, error: SplitnetError) -> None:
        self.outbox.send_now(pb.Frame(request=client_id, failure=to_failure(error, client_id), end=True))

    async def settled(self) -> None:
        """Returns when nothing is in flight and every answer was handed to gRPC."""
        await self._settled.wait()
        await self.outbox.flushed()

    def _ignore(self, client_id: str) -> None:
        self._refused[client_id] = None
        if len(self._refused) > _REFUSED:
            del self._refused[next(iter(self._refused))]
