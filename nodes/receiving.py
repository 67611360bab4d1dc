"""How a blob arrives (the Load call): the header, the offset to go on from, the rest, the verdict."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from nodes.blob import BlobWriter
from nodes.logs import Log
from nodes.store import BlobStore
from splitnet.errors import ProtocolError
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["receive_blob"]


async def receive_blob(store: BlobStore, requests: AsyncIterator[pb.LoadRequest], log: Log) -> AsyncIterator[pb.LoadReply]:
    """Answers one Load call. Disk and hashing are worked off in threads. When it breaks off, what came is kept. Raises what the
    store raises, and ProtocolError for messages out of order."""
    first = await anext(requests, None)
    if first is None or first.WhichOneof("body") != "header":
        raise ProtocolError("Load: the first message must be a header")
    sha256, size_bytes = first.header.sha256, first.header.size_bytes
    held = await asyncio.to_thread(store.offset, sha256, size_bytes)
    if held < size_bytes or not await asyncio.to_thread(_is_whole, store, sha256):
        writer = await asyncio.to_thread(store.writer, sha256, size_bytes)
        try:
            held = writer.offset
            yield pb.LoadReply(offset=held)
            await _receive(writer, requests, size_bytes)
            await asyncio.to_thread(writer.commit)
        finally:
            await asyncio.to_thread(writer.close)
    shard = (await asyncio.to_thread(store.unpack_packed, sha256)).sha256 if first.header.packed else ""
    log.info("loaded", blob=sha256[:12], size_bytes=size_bytes, sent_bytes=size_bytes - held, shard=shard[:12])
    yield pb.LoadReply(offset=size_bytes, complete=True, shard=shard)


async def _receive(writer: BlobWriter, requests: AsyncIterator[pb.LoadRequest], size_bytes: int) -> None:
    """One message is hashed and written while the next one arrives. Stops early when the caller does; `commit` says what is missing."""
    left = size_bytes - writer.offset
    writing: asyncio.Future[int] | None = None
    try:
        while left:
            message = await anext(requests, None)
            if writing is not None:
                await writing
            if message is None:
                return
            if message.WhichOneof("body") != "data":
                raise ProtocolError("Load: expected data after the header")
            left = max(left - len(message.data), 0)
            writing = asyncio.get_running_loop().run_in_executor(None, writer.write, message.data)
        if writing is not None:
            await writing
    finally:
        if writing is not None:  # when this is cancelled, the file must not be closed under the thread
            await asyncio.wait((writing,))


def _is_whole(store: BlobStore, sha256: str) -> bool:
    return store.unpacked(sha256) is not None or store.has(sha256)
