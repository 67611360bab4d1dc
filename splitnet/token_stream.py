"""The tokens of one generation as they come from the ingress."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import numpy as np

from splitnet import wire
from splitnet.errors import BadInput, ProtocolError
from splitnet.generation import TOKENS
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["TokenAnswer", "TokenStream"]


class TokenStream:
    """What `AsyncClient.generate` returns: an asynchronous iterator of token ids. The request is sent when the first is asked for. `aclose()` (or leaving
    `async with`, or letting go of it) ends it early, on the nodes too.

    `finish` is "" until the last token has been read, then "stop" (the model's own end, or a stop sequence: the tokens of it are among those that came) or "length"
    (max_new_tokens). `prompt_tokens`, and how many of them the nodes still had (`cached_tokens`), are known then, too."""

    def __init__(self) -> None:
        self.finish = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._pieces: AsyncGenerator[list[int], None] | None = None
        self._ready: deque[int] = deque()

    def attach(self, pieces: AsyncGenerator[list[int], None]) -> Self:
        self._pieces = pieces
        return self

    def ended(self, said: pb.Generated) -> None:
        self.finish, self.prompt_tokens, self.cached_tokens = said.finish, said.prompt_tokens, said.cached_tokens

    async def some(self) -> list[int]:
        """The tokens that are there, at least one; none at the end."""
        if not self._ready:
            try:
                return await anext(self._pieces) if self._pieces is not None else []
            except StopAsyncIteration:
                return []
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        if not self._ready:
            self._ready.extend(await self.some())
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        self._ready.clear()
        if self._pieces is not None:
            await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


class TokenAnswer:
    """The answer to one request to generate, as it arrives: see `splitnet.exchange`."""

    def __init__(self, most: int) -> None:
        """`most`: tokens that were asked for."""
        self.done: asyncio.Future[pb.Generated] = asyncio.get_running_loop().create_future()
        self.failed_by_node = False
        self._left = most
        self._new: list[int] = []
        self._arrived = asyncio.Event()
        self.done.add_done_callback(lambda _: self._arrived.set())

    def drop(self) -> None:
        """Nobody waits any more."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # else asyncio reports it as forgotten

    def take(self, message: wire.Message) -> None:
        """Raises ProtocolError for what is no answer to the request."""
        frame = message.frame
        if frame.HasField("tensor"):
            tokens = _tokens(message)
            self._left -= len(tokens)
            if self._left < 0:
                raise ProtocolError("the answer has more tokens than were asked for")
            self._new += tokens
            self._arrived.set()
        if frame.end:
            self.done.set_result(frame.generated)

    async def some(self) -> list[int]:
        """The tokens that have come since the last call, at least one; none at the end. Raises what the request failed with, after the tokens that came before."""
        while not self._new:
            if self.done.done():
                self.done.result()
                return []
            self._arrived.clear()
            await self._arrived.wait()
        new, self._new = self._new, []
        return new


def _tokens(message: wire.Message) -> list[int]:
    chunk = message.frame.tensor
    if chunk.name != TOKENS or chunk.dtype != "int32" or len(chunk.shape) != 1:
        raise ProtocolError(f"the answer holds {chunk.name!r:.80} of {chunk.dtype!r:.80}; expected {TOKENS} of int32, one dimension")
    try:
        assembler = wire.TensorAssembler(chunk, wire.CHUNK_BYTES)
        whole = assembler.add(chunk, message.payload)
    except BadInput as error:  # an unknown codec: here it is the node's fault
        raise ProtocolError(error.message, remedy=error.remedy) from None
    if not whole:
        raise ProtocolError("the answer's tokens came in parts")
    found: list[int] = assembler.array().astype(np.int64).tolist()
    return found
