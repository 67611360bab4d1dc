"""Shipping by way of the nodes: what one of them holds, or has just been sent, the others take from it, and not from whoever deploys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc.aio

from splitnet.channel import open_channel, stub, translated
from splitnet.errors import NotPermitted, ProtocolError, SplitnetError
from splitnet.plan import NodeRef
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shipping import Blob, ship

__all__ = ["Carried", "Carrier"]

_SMALL_BYTES = 64 << 10  # asking takes longer than sending
_ASK_S = 10.0
_LEASE_S = 3600.0
_CALL_S = 3600.0


@dataclass(slots=True)
class Carried:
    """`sent_bytes` from here, `taken_bytes` from other nodes. `failures`: why something had to be sent from here that another node has."""

    sent_bytes: int = 0
    taken_bytes: int = 0
    failures: list[str] = field(default_factory=list)


class Carrier:
    """Brings blobs to nodes, several at a time; each is sent from here once at most, unless a node cannot take it from another."""

    def __init__(self, nodes: Sequence[NodeRef]) -> None:
        self._nodes = nodes
        self._holders: dict[str, list[NodeRef]] = {}
        self._coming: dict[str, asyncio.Event] = {}  # a node is being brought it; then others can have it from there

    async def ask(self, wanted: Mapping[str, Sequence[Blob]]) -> None:
        """What each node holds already of what others want. One that does not answer holds nothing: it is told of where it is needed."""
        names = sorted({blob.sha256 for blobs in wanted.values() for blob in blobs if blob.size_bytes >= _SMALL_BYTES})
        if not names:
            return

        async def one(node: NodeRef) -> list[str]:
            try:
                return await _offer(node, names, "")
            except SplitnetError:
                return []

        for node, held in zip(self._nodes, await asyncio.gather(*map(one, self._nodes)), strict=True):
            for sha256 in held:
                self._holders.setdefault(sha256, []).append(node)

    async def bring(self, node: NodeRef, channel: grpc.aio.Channel, blobs: Sequence[Blob], on_bytes: Callable[[int], None]) -> Carried:
        """All of them to one node. `on_bytes` as in `ship`."""
        done = Carried()
        for blob in blobs:
            await self._one(node, channel, blob, on_bytes, done)
        return done

    async def _one(self, node: NodeRef, channel: grpc.aio.Channel, blob: Blob, on_bytes: Callable[[int], None], done: Carried) -> None:
        if blob.size_bytes < _SMALL_BYTES:
            done.sent_bytes += await ship(channel, node.address, blob, on_bytes)
            return
        while (coming := self._coming.get(blob.sha256)) is not None and not self._holders.get(blob.sha256):
            await coming.wait()
        holders = self._holders.setdefault(blob.sha256, [])
        if node not in holders:
            for holder in tuple(holders):
                try:
                    done.taken_bytes += await _take(node, channel, holder, blob, on_bytes)
                except SplitnetError as error:
                    done.failures.append(f"blob {blob.sha256[:12]} from node {holder.name!r}: {error}")
                else:
                    holders.append(node)
                    return
        event = self._coming[blob.sha256] = asyncio.Event()
        try:
            done.sent_bytes += await ship(channel, node.address, blob, on_bytes)
            holders.append(node)
        finally:
            if self._coming.get(blob.sha256) is event:
                del self._coming[blob.sha256]
            event.set()


async def _offer(node: NodeRef, blobs: Sequence[str], to: str) -> list[str]:
    async with open_channel(node.address, node=node.name) as channel:
        with translated(node.address):
            reply = await stub(channel).Offer(pb.OfferRequest(blobs=blobs, node=to, lease_s=_LEASE_S), timeout=_ASK_S)
    return list(reply.held)


async def _take(node: NodeRef, channel: grpc.aio.Channel, holder: NodeRef, blob: Blob, on_bytes: Callable[[int], None]) -> int:
    """The bytes that went from node to node. What is reported of a blob that then fails is taken back."""
    if not await _offer(holder, [blob.sha256], node.name):
        raise NotPermitted(f"node {holder.name!r} does not hold it any more")
    held, first, complete = 0, -1, False
    request = pb.GatherRequest(sha256=blob.sha256, size_bytes=blob.size_bytes, node=holder.name, address=holder.address, as_node=node.name)
    try:
        with translated(node.address):
            async for reply in stub(channel).Gather(request, timeout=_CALL_S):
                first = reply.offset if first < 0 else first
                on_bytes(reply.offset - held)
                held, complete = reply.offset, reply.complete
        if not complete:
            raise ProtocolError(f"{node.address} ended the call without confirming blob {blob.sha256[:12]}")
    except BaseException:
        on_bytes(-held)
        raise
    return held - first
