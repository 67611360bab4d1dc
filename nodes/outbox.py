"""What waits to be sent on one stream: the tensors of several requests, chunk by chunk and in turn, so that a large one does not hold
up the others. Encoding runs ahead of sending."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from nodes.goodput import Goodput
from splitnet.codecs import Buffer
from splitnet.errors import SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import Message, tensor_chunks

__all__ = ["Chooses", "EncodedTensor", "Outbox", "Parcel"]

_INLINE_BYTES = 1 << 16  # encoding less than this takes less time than handing it to another thread
_MAX_URGENT = 10_000
_Chunk = tuple[pb.TensorChunk, Buffer]
_Write = Callable[[Message], Awaitable[None]]


class Chooses(Protocol):
    """Says which codec a tensor gets, when it is about to be encoded, and hears what its chunks came to."""

    def pick(self, array: np.ndarray) -> str: ...

    def saw(self, codec: str, size_bytes: int, encoded_bytes: int) -> None: ...


class EncodedTensor:
    """The chunks of one tensor. Each is encoded once, however many streams take it (`takers`), and dropped when all of them have.
    Raw chunks are views; other codecs run in `pool`, one chunk ahead of the fastest taker. `codec`: a name; or who chooses one, once, when
    the first chunk is asked for: such a tensor is `adaptive`, and waits until its link has room."""

    def __init__(self, name: str, array: np.ndarray, codec: str | Chooses, pool: Executor, takers: int = 1) -> None:
        self.size_bytes = array.nbytes
        self.adaptive = not isinstance(codec, str)
        self._name, self._array = name, array
        self._codec = codec
        self._encode_s = 0.0
        self._chunks: Iterator[_Chunk] | None = None
        self._inline = False
        self._pool = pool
        self._takers = takers
        self._made: list[_Chunk | asyncio.Future[_Chunk] | None] = []
        self._untaken: list[int] = []
        self._stored_bytes = 0

    def prepare(self) -> None:
        """Begins with the first chunk, where that is worth a thread."""
        self._begin()
        if not self._inline and not self._made:
            self._make()

    def _begin(self) -> None:
        if self._chunks is None:
            self._codec_name = self._codec if isinstance(self._codec, str) else self._codec.pick(self._array)
            self._chunks = tensor_chunks(self._name, self._array, self._codec_name)
            self._inline = self._codec_name == "raw" or self.size_bytes < _INLINE_BYTES

    async def chunk(self, index: int) -> tuple[pb.TensorChunk, Buffer, bool]:
        """Chunk `index`, and whether it is the last. Each taker asks for 0, 1, 2, ... once. Raises BadInput where the tensor cannot be
        sent at all."""
        self._begin()
        if index == len(self._made):
            self._make()
        made = self._made[index]
        assert made is not None, "a chunk was taken by more than `takers`"
        chunk = made if isinstance(made, tuple) else await made
        self._untaken[index] -= 1
        self._made[index] = chunk if self._untaken[index] else None
        head, payload = chunk
        if not isinstance(self._codec, str):
            self._codec.saw(self._codec_name, head.length, len(payload))
        if not index:
            self._stored_bytes = head.stored_bytes
        last = head.offset + head.length >= self._stored_bytes
        if not (last or self._inline) and index + 1 == len(self._made):
            self._make()
        return head, payload, last

    def take_encode_s(self) -> float:
        """The time spent in the codec since this was last asked."""
        spent_s, self._encode_s = self._encode_s, 0.0
        return spent_s

    def _make(self) -> None:
        self._made.append(self._next() if self._inline else asyncio.get_running_loop().run_in_executor(self._pool, self._next))
        self._untaken.append(self._takers)

    def _next(self) -> _Chunk:
        started = time.perf_counter()
        assert self._chunks is not None, "begun before"
        try:
            return next(self._chunks)
        finally:
            self._encode_s += time.perf_counter() - started


@dataclass(slots=True, eq=False)
class Parcel:
    """A tensor on its way to one stage of one request. Parcels of one key are sent in order, those of different keys in turn."""

    key: Hashable
    tensor: EncodedTensor
    envelope: Callable[[], pb.Frame]  #: a new frame with everything but the tensor in it
    on_sent: Callable[[Parcel], None]
    on_failed: Callable[[Parcel, SplitnetError], None]
    end: bool = False  #: the request's last parcel: its last frame says so
    send_s: float = field(default=0.0, init=False)
    next_chunk: int = field(default=0, init=False)
    sent_bytes: int = field(default=0, init=False)  # before the codec
    dropped: bool = field(default=False, init=False)


class Outbox:
    """Unbounded in itself: what is put in here has been admitted, and its bytes counted, by the caller (`nodes.admission`)."""

    def __init__(self, goodput: Goodput | None = None) -> None:
        """`goodput`: of the stream's link, which tensors that are adaptive wait for."""
        self.sent_bytes = 0  # after the codec
        self.raw_bytes = 0  # before it
        self.frames = 0
        self._urgent: deque[pb.Frame] = deque()
        self._parcels: dict[Hashable, deque[Parcel]] = {}
        self._turns: dict[Hashable, None] = {}  # keys of _parcels, the next to be served first
        self._wake: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._goodput = goodput

    def send_now(self, frame: pb.Frame) -> None:
        """A frame without payload that overtakes all tensors: a failure, a cancellation. Where so many wait that the far side cannot
        be reading, the oldest is forgotten: it has its deadlines."""
        if len(self._urgent) >= _MAX_URGENT:
            self._urgent.popleft()
        self._urgent.append(frame)
        self._rouse()

    def put(self, parcel: Parcel) -> None:
        if not parcel.tensor.adaptive:
            parcel.tensor.prepare()
        if parcel.key in self._parcels:
            self._parcels[parcel.key].append(parcel)
        else:
            self._parcels[parcel.key] = deque((parcel,))
            self._turns[parcel.key] = None
        self._rouse()

    def drop(self, key: Hashable) -> None:
        """Forgets what was not sent yet; a chunk that is being written still goes out."""
        for parcel in self._parcels.pop(key, ()):
            parcel.dropped = True

    def clear(self) -> None:
        self._urgent.clear()
        for key in list(self._parcels):
            self.drop(key)
        self._turns.clear()
        self._idle.set()

    @property
    def backlog(self) -> int:
        """Frames of `send_now` that have not been sent."""
        return len(self._urgent)

    @property
    def waiting(self) -> int:
        """Parcels that have not been sent to the end."""
        return sum(map(len, self._parcels.values()))

    @property
    def queued_bytes(self) -> int:
        """Of those, before the codec."""
        return sum(max(p.tensor.size_bytes - p.sent_bytes, 0) for parcels in self._parcels.values() for p in parcels)

    async def flushed(self) -> None:
        """Returns when everything has been handed to gRPC (or forgotten)."""
        await self._idle.wait()

    async def pump(self, write: _Write) -> None:
        """Sends for ever. Whatever `write` raises ends it, and leaves the queues to be cleared."""
        while True:
            if self._urgent:
                await self._write(write, Message(self._urgent.popleft()))
            elif (parcel := self._next()) is not None:
                del self._turns[parcel.key]
                await self._send_chunk(parcel, write)
                if parcel.key in self._parcels:
                    self._turns[parcel.key] = None
            else:
                if not self._turns:
                    self._idle.set()
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake

    def _next(self) -> Parcel | None:
        """Whose turn it is. Adaptive tensors are passed over while their link has no room: `has_room_again` follows."""
        has_room: bool | None = None
        for key in list(self._turns):
            if key not in self._parcels:  # dropped meanwhile
                del self._turns[key]
                continue
            parcel = self._parcels[key][0]
            if not parcel.tensor.adaptive or self._goodput is None:
                return parcel
            if has_room is None:
                has_room = self._goodput.has_room(time.monotonic())
            if has_room:
                return parcel
        return None

    def has_room_again(self) -> None:
        """Perhaps: the far side has taken something."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _look_ahead(self) -> None:
        """Encodes what comes next while this is being sent, where the link will take it at once."""
        if self._goodput is not None and (parcel := self._next()) is not None and parcel.tensor.adaptive:
            parcel.tensor.prepare()

    async def _send_chunk(self, parcel: Parcel, write: _Write) -> None:
        try:
            head, payload, last = await parcel.tensor.chunk(parcel.next_chunk)
        except SplitnetError as error:
            self._remove(parcel)
            parcel.on_failed(parcel, error)
            return
        if parcel.dropped:
            return
        parcel.next_chunk += 1
        parcel.sent_bytes += head.length
        frame = parcel.envelope()
        frame.tensor.CopyFrom(head)
        if last:
            self._remove(parcel)
            if parcel.end:  # complete from here on: its place must be free before the client can know that it is
                frame.end = True
                parcel.on_sent(parcel)
        self._look_ahead()
        started = time.perf_counter()
        await self._write(write, Message(frame, payload))
        parcel.send_s += time.perf_counter() - started
        self.raw_bytes += head.length
        if last and not parcel.end and not parcel.dropped:
            parcel.on_sent(parcel)

    async def _write(self, write: _Write, message: Message) -> None:
        if self._goodput is not None and (size_bytes := len(message.payload)):
            now_s = time.monotonic()
            message.frame.acknowledge = asked = self._goodput.asks(now_s, size_bytes)
            self._goodput.sent(now_s, size_bytes, asked=asked)
        await write(message)
        self.frames += 1
        self.sent_bytes += len(message.payload)

    def _remove(self, parcel: Parcel) -> None:
        waiting = self._parcels.get(parcel.key)
        if waiting and waiting[0] is parcel:
            waiting.popleft()
            if not waiting:
                del self._parcels[parcel.key]

    def _rouse(self) -> None:
        self._idle.clear()
        self.has_room_again()
