"""Blobs from node to node: what an operator has allowed another node to take from here, and taking what this one was told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path

from nodes.link import NAME_KEY
from nodes.logs import Log
from nodes.store import BlobStore
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import BadInput, BadShard, DeadlineExceeded, NodeUnavailable, NotPermitted, Overloaded, ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Offers", "gather", "give"]

_CHUNK_BYTES = 1 << 20
_STALL_S = 60.0
_CALL_S = 3600.0
_LONGEST_LEASE_S = 3600.0
_MOST_BLOBS = 65536
_MOST_OFFERS = 1 << 18
_ATTEMPTS = 3  # in a row without one byte of progress
_PAUSE_S = 0.2


class Offers:
    """Which node may take which blob, and until when."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._until_s: dict[tuple[str, str], float] = {}

    async def offer(self, blobs: Collection[str], node: str, lease_s: float) -> list[str]:
        """Which of the blobs are here, whole; `node` may take these. Raises BadInput for what is no name of a blob, Overloaded where too much is offered already."""
        if len(blobs) > _MOST_BLOBS:
            raise BadInput(f"expected at most {_MOST_BLOBS} blobs, got {len(blobs)}")
        held = [sha256 for sha256 in blobs if await asyncio.to_thread(self._store.has, sha256)]
        now = time.monotonic()
        if node:
            self._until_s = {key: until_s for key, until_s in self._until_s.items() if until_s > now}
            if len(self._until_s) + len(held) > _MOST_OFFERS:
                raise Overloaded("too many blobs are offered to other nodes already", retry_after_s=1.0)
            self._until_s |= {(node, sha256): now + min(max(lease_s, 0.0), _LONGEST_LEASE_S) for sha256 in held}
        return held

    def check(self, node: str, sha256: str) -> None:
        """Raises NotPermitted unless it was offered to the node of this name."""
        if self._until_s.get((node, sha256), 0.0) <= time.monotonic():
            raise NotPermitted(
                f"blob {sha256[:12]:.12} was not offered to node {node!r:.80}", remedy="deploy: it allows nodes to take what they need"
            )


async def give(store: BlobStore, offers: Offers, node: str, sha256: str, offset: int) -> AsyncIterator[bytes]:
    """The blob's bytes from `offset` on. Raises NotPermitted, NotFound, BadInput."""
    offers.check(node, sha256)
    with store.holding([sha256]):
        path = await asyncio.to_thread(store.path, sha256)
        size_bytes = path.stat().st_size
        if offset > size_bytes:
            raise BadInput(f"blob {sha256[:12]} has {size_bytes} bytes, it was asked for from {offset} on")
        while offset < size_bytes:
            piece = await asyncio.to_thread(_read, path, offset)
            if not piece:
                raise BadShard(f"blob {sha256[:12]} became shorter while it was sent", remedy="deploy again")
            yield piece
            offset += len(piece)


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(_CHUNK_BYTES)


async def gather(store: BlobStore, request: pb.GatherRequest, log: Log) -> AsyncIterator[tuple[int, bool]]:
    """Takes a blob from another node: (bytes that are here, whether it is complete and verified), again and again. A stream that breaks is taken up again for as long as
    there is progress. Raises what the other node says, NodeUnavailable, DeadlineExceeded, and BadShard where the bytes are not what their name says; what arrived is kept."""
    sha256, size_bytes = request.sha256, request.size_bytes
    held = await asyncio.to_thread(store.offset, sha256, size_bytes)
    yield held, held == size_bytes and await asyncio.to_thread(store.has, sha256)
    if await asyncio.to_thread(store.has, sha256):
        return
    writer = await asyncio.to_thread(store.writer, sha256, size_bytes)
    started, begun, failures = time.perf_counter(), writer.offset, 0
    try:
        while writer.offset < size_bytes:
            before = writer.offset
            try:
                async with open_channel(request.address, node=request.node) as channel:
                    with translated(request.address):
                        call = stub(channel).Give(
                            pb.GiveRequest(sha256=sha256, offset=writer.offset), timeout=_CALL_S, metadata=((NAME_KEY, request.as_node),)
                        )
                        try:
                            while True:
                                async with asyncio.timeout(_STALL_S):
                                    reply = await call.read()
                                if not isinstance(reply, pb.GiveReply):
                                    break
                                await asyncio.to_thread(writer.write, reply.data)
                                yield writer.offset, False
                        except TimeoutError:
                            raise DeadlineExceeded(f"nothing came for {_STALL_S:.0f} s", remedy="check the link") from None
                        finally:
                            call.cancel()
                if writer.offset < size_bytes:
                    raise ProtocolError(f"{request.address} gave {writer.offset} of {size_bytes} bytes of blob {sha256[:12]}")
            except (NodeUnavailable, DeadlineExceeded) as error:
                failures = 1 if writer.offset > before else failures + 1
                if failures >= _ATTEMPTS:
                    error.at(node=request.node)
                    raise
                log.warning("taking up again", blob=sha256[:12], source=request.node, at=writer.offset, error=error.message)
                await asyncio.sleep(_PAUSE_S * 2**failures)
        await asyncio.to_thread(writer.commit)
    finally:
        await asyncio.to_thread(writer.close)
    log.info("gathered", blob=sha256[:12], source=request.node, bytes=size_bytes - begun, seconds=round(time.perf_counter() - started, 3))
    yield size_bytes, True
