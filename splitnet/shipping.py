"""Ships blobs to a node by its Load call: only what the node lacks, taken up again where a stream broke."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import grpc
import grpc.aio

from splitnet.channel import stub, translated
from splitnet.errors import BadShard, DeadlineExceeded, NodeUnavailable, Overloaded, ProtocolError, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import Shard

__all__ = ["Blob", "shard_blobs", "ship"]

_CHUNK_BYTES = 1 << 20
_STALL_S = 120.0  # longest silence: a small box that hashes a large blob
_CALL_S = 3600.0  # a stream that lasts longer is broken off and taken up again
_ATTEMPTS = 5  # in a row without one byte of progress
_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 5.0
_WRITE_FAILED = "Internal error from Core"  # grpc.aio's words
_STATUS_POLLS, _STATUS_POLL_S = 50, 0.02
_LoadCall = grpc.aio.StreamStreamCall[pb.LoadRequest, pb.LoadReply]


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes and their name: a file, or (a manifest) the bytes themselves."""

    sha256: str
    size_bytes: int
    content: Path | bytes


def shard_blobs(shards: Mapping[str, Shard]) -> list[Blob]:
    """What a node needs for these stages, each blob once, every manifest after its members."""
    blobs: dict[str, Blob] = {}
    for shard in shards.values():
        for name, member in shard.manifest.members.items():
            blobs.setdefault(member.sha256, Blob(member.sha256, member.size_bytes, shard.member(name)))
        manifest = shard.manifest.to_bytes()
        blobs.setdefault(shard.sha256, Blob(shard.sha256, len(manifest), manifest))
    return list(blobs.values())


async def ship(channel: grpc.aio.Channel, address: str, blob: Blob, on_bytes: Callable[[int], None]) -> int:
    """Returns the bytes that were really sent. `on_bytes` is told how many more of the blob's bytes the node holds (those that it held
    before included; a negative number where it had to begin anew).

    A broken stream, a stall and a busy node are tried again with growing pauses, for as long as there is progress; then the last error is
    raised. What arrived stays on the node, cancelled or not."""
    sender = _Sender(channel, address, blob, on_bytes)
    failures = 0
    while True:
        confirmed = sender.confirmed
        try:
            await sender.run()
            return sender.sent
        except (NodeUnavailable, DeadlineExceeded, Overloaded) as error:
            failures = 1 if sender.confirmed > confirmed else failures + 1
            if failures >= _ATTEMPTS:
                raise
            pause_s = max(error.retry_after_s, min(_BACKOFF_S * 2**failures, _LONGEST_BACKOFF_S)) * random.uniform(0.7, 1.3)
            await asyncio.sleep(pause_s)
        except BadShard:
            if not sender.resumed:
                raise
            sender.resumed = False  # what an earlier upload left there was wrong; the node has dropped it


class _Sender:
    def __init__(self, channel: grpc.aio.Channel, address: str, blob: Blob, on_bytes: Callable[[int], None]) -> None:
        self._channel = channel
        self._address = address
        self._blob = blob
        self._on_bytes = on_bytes
        self.held = 0  # bytes on the node, or on their way there
        self.confirmed = 0  # bytes on the node, by its own word
        self.sent = 0
        self.resumed = False

    async def run(self) -> None:
        """One Load call, from the header to its status. A call that is cancelled at `complete`, while the node still sends its status,
        makes gRPC log an error over there."""
        with translated(self._address):
            load: Any = stub(self._channel).Load  # its type knows only the form that takes an iterator of requests
            call: _LoadCall = load(timeout=_CALL_S)
            try:
                await self._write(call, pb.LoadRequest(header=pb.BlobHeader(sha256=self._blob.sha256, size_bytes=self._blob.size_bytes)))
                reply = await self._read(call)
                if reply is None or reply.offset > self._blob.size_bytes:
                    raise ProtocolError(
                        f"{self._address} gave no offset to continue from", remedy="run the same version of splitnet on both sides"
                    )
                self.confirmed = reply.offset
                self._advance(reply.offset)
                self.resumed = 0 < reply.offset < self._blob.size_bytes
                if not reply.complete:
                    await self._send_rest(call)
                    await self._await_complete(call)
                while await self._read(call) is not None:
                    pass
            finally:
                call.cancel()  # has no effect on a call that has ended

    async def _send_rest(self, call: _LoadCall) -> None:
        if isinstance(self._blob.content, bytes):
            await self._send(call, self._blob.content[self.held :])
        else:
            file = await asyncio.to_thread(self._open, self._blob.content)
            try:
                while chunk := await asyncio.to_thread(file.read, min(_CHUNK_BYTES, self._blob.size_bytes - self.held)):
                    await self._send(call, chunk)
            finally:
                file.close()
            if self.held != self._blob.size_bytes:
                raise BadShard(
                    f"{self._blob.content} became shorter while it was sent: {self.held} of {self._blob.size_bytes} bytes",
                    remedy="cut the model again, and do not change the shards while they are deployed",
                )
        with translated(self._address):
            await call.done_writing()

    def _open(self, path: Path) -> BinaryIO:
        try:
            file = path.open("rb")
        except OSError as error:
            raise BadShard(f"cannot read {str(path)!r}: {error.strerror}", remedy="cut the model again") from None
        file.seek(self.held)
        return file

    async def _send(self, call: _LoadCall, data: bytes) -> None:
        await self._write(call, pb.LoadRequest(data=data))
        self.sent += len(data)
        self._advance(self.held + len(data))

    async def _await_complete(self, call: _LoadCall) -> None:
        while (reply := await self._read(call)) is not None:
            if reply.complete:
                return
        if self.held != self._blob.size_bytes or self.sent:
            raise ProtocolError(f"{self._address} ended the call without confirming blob {self._blob.sha256[:12]}")

    def _advance(self, held: int) -> None:
        self._on_bytes(held - self.held)
        self.held = held

    async def _write(self, call: _LoadCall, request: pb.LoadRequest) -> None:
        """Where the node has ended the call, its reason comes from reading: gRPC's writer only says that the call is over."""
        try:
            async with asyncio.timeout(_STALL_S):
                await call.write(request)
        except TimeoutError:
            raise self._stalled() from None
        except (asyncio.InvalidStateError, grpc.aio.UsageError):
            await self._read(call)
            raise
        except grpc.aio.AioRpcError as error:
            if error.details() != _WRITE_FAILED:
                raise
            await self._await_status(call)

    async def _await_status(self, call: _LoadCall) -> NoReturn:
        """A write that fails gives the call a status of its own; the one that the node sent, or the reason of the break, replaces it
        as soon as it is read."""
        for _ in range(_STATUS_POLLS):
            await asyncio.sleep(_STATUS_POLL_S)
            if await call.details() != _WRITE_FAILED:
                await self._read(call)
        raise NodeUnavailable(f"the connection to {self._address} broke", remedy="check the link and the node, and deploy again")

    async def _read(self, call: _LoadCall) -> pb.LoadReply | None:
        try:
            async with asyncio.timeout(_STALL_S):
                reply = await call.read()
        except TimeoutError:
            raise self._stalled() from None
        return reply if isinstance(reply, pb.LoadReply) else None  # grpc.aio.EOF

    def _stalled(self) -> SplitnetError:
        return DeadlineExceeded(
            f"{self._address}: nothing moved for {_STALL_S:.0f} s while blob {self._blob.sha256[:12]} was shipped",
            remedy="check the link and the node",
        )
