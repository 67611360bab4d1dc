"""One Run stream to an ingress, with any number of requests on it.

Frames of different requests take turns (each request waits for its place behind the others for every frame), at most
`_QUEUED_FRAMES` wait for the socket, and nothing is encoded before its turn. Only the two tasks in here touch the gRPC call, because
gRPC takes the cancellation of a read or a write for the cancellation of the whole call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from typing import Any

import grpc.aio
import numpy as np

from splitnet import channel, wire
from splitnet.errors import BadInput, Cancelled, NodeUnavailable, ProtocolError, ServiceError, SplitnetError
from splitnet.generation import PROMPT, GenerateRequest
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.token_stream import TokenAnswer, TokenStream

__all__ = ["HIGHEST_PRIORITY", "Exchange"]

HIGHEST_PRIORITY = 9

_QUEUED_FRAMES = 4
_SETTLING_S = 0.02
_RETURN_S = 0.2  #: how much earlier than the client the node gives up, at most, so that it can still say where the time went


class Exchange:
    """To be made in the running event loop that it belongs to; starts two tasks, which `close` ends.

    `broken` is None as long as it works. After a break every request on it has failed, and a new Exchange is needed.
    """

    def __init__(
        self,
        connection: grpc.aio.Channel,
        address: str,
        max_tensor_bytes: int = wire.MAX_TENSOR_BYTES,
        pulse: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """`pulse`: raises SplitnetError once the node is gone, though the connection may not say so (`splitnet.heartbeat`)."""
        self.broken: SplitnetError | None = None
        self.fell_silent = False  #: which is why it is broken; the node may be there
        self._address = address
        self._max_tensor_bytes = max_tensor_bytes
        self._answers: dict[str, _Answer | TokenAnswer] = {}
        self._outbox: asyncio.Queue[wire.Message] = asyncio.Queue()
        self._room = asyncio.Semaphore(_QUEUED_FRAMES)
        self._call = channel.run_stream(connection)(None)
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]
        if pulse is not None:
            self._tasks.append(asyncio.create_task(self._watch(pulse)))

    async def ask(
        self,
        request: str,
        deployment: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Collection[str],
        deadline: float,
        priority: int = 0,
    ) -> dict[str, np.ndarray]:
        """Sends a request and waits for its answer, which must hold exactly `outputs`. `deadline` is a time of `time.monotonic()`; it
        goes to the node, and it is the caller who stops waiting then. `priority`: 0 to HIGHEST_PRIORITY.

        Raises what the node answered, NodeUnavailable when the stream broke (the request may have been computed or not), or
        ProtocolError. Cancellation tells the node, which drops the request.
        """
        answer = _Answer(outputs, self._max_tensor_bytes)
        async with self._asked(request, deployment, answer, _frames(request, deployment, inputs, deadline, priority)):
            return await answer.done

    async def generate(
        self,
        request: str,
        deployment: str,
        prompt: np.ndarray,
        wanted: GenerateRequest,
        deadline: float,
        priority: int,
        stream: TokenStream,
    ) -> AsyncGenerator[list[int], None]:
        """Sends a request to generate, and yields tokens as they come; `stream` hears how it ended. Errors and cancellation as with `ask`, and so is closing it."""
        answer = TokenAnswer(wanted.max_new_tokens - wanted.answered)
        async with self._asked(request, deployment, answer, _frames(request, deployment, {PROMPT: prompt}, deadline, priority, wanted)):
            while tokens := await answer.some():
                yield tokens
            stream.ended(answer.done.result())

    @contextlib.asynccontextmanager
    async def _asked(
        self, request: str, deployment: str, answer: _Answer | TokenAnswer, frames: Iterator[wire.Message]
    ) -> AsyncIterator[None]:
        """Sends the frames; within the block the answer comes. Leaving it before the answer is whole tells the node."""
        self._answers[request] = answer
        started = False
        try:
            for message in frames:
                await self._a_turn()
                if answer.done.done():  # the node refused it before it had all of it
                    self._room.release()
                    break
                self._outbox.put_nowait(message)
                started = True
            yield
        except BaseException:
            if started and not answer.failed_by_node and self.broken is None:
                self._outbox.put_nowait(wire.Message(pb.Frame(request=request, deployment=deployment, cancel=pb.Cancel(reason="client"))))
            raise
        finally:
            del self._answers[request]
            answer.drop()

    async def settled(self) -> None:
        """Waits until nothing is under way. Nothing new may be asked then."""
        while self._answers:
            await asyncio.wait([answer.done for answer in self._answers.values()])
            await asyncio.sleep(_SETTLING_S)  # whoever waited for it takes it off

    async def close(self) -> None:
        """Ends the stream; what is under way fails as Cancelled. No task is left."""
        self._break(Cancelled("the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _watch(self, pulse: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await pulse()
        except SplitnetError as error:
            self.fell_silent = self.broken is None
            self._break(NodeUnavailable(error.message, remedy=error.remedy))

    # ---------------------------------------------------------------------------------------------------------------- sending

    async def _a_turn(self) -> None:
        await self._room.acquire()
        if self.broken is not None:
            self._room.release()  # the next in line learns it in turn
            raise _lost(self.broken, self._address)

    async def _send(self) -> None:
        with contextlib.suppress(SplitnetError):  # the receiver hears the reason, from the same call
            while True:
                message = await self._outbox.get()
                with channel.translated(self._address):
                    await self._call.write(message)
                if not message.frame.HasField("cancel"):
                    self._room.release()

    # -------------------------------------------------------------------------------------------------------------- receiving

    async def _receive(self) -> None:
        reason: SplitnetError = NodeUnavailable("the node ended the stream")
        try:
            while (message := await channel.read_frame(self._call, self._address)) is not None:
                if not message.frame.request and message.frame.HasField("failure"):  # the node stops: this was the last of its answers
                    raise channel.from_failure(message.frame.failure)
                self._deliver(message)
        except Cancelled as error:  # the server went away: it was not this side that cancelled
            reason = NodeUnavailable(error.message)
        except SplitnetError as error:
            reason = error
        except Exception as error:
            reason = channel.as_error(error)
            raise
        finally:
            self._break(reason)

    def _deliver(self, message: wire.Message) -> None:
        answer = self._answers.get(message.frame.request)
        if answer is None or answer.done.done():
            return  # of a request that was given up
        try:
            if message.frame.HasField("failure"):
                answer.failed_by_node = True
                raise channel.from_failure(message.frame.failure, message.frame.request)
            answer.take(message)
        except SplitnetError as error:
            answer.done.set_exception(error.at(request=message.frame.request))

    def _break(self, reason: SplitnetError) -> None:
        if self.broken is not None:
            return
        self.broken = reason
        self._call.cancel()
        self._room.release()
        for request, answer in self._answers.items():
            if not answer.done.done():
                answer.done.set_exception(_lost(reason, self._address).at(request=request))


class _Answer:
    """The answer to one request, as it arrives."""

    def __init__(self, outputs: Collection[str], max_tensor_bytes: int) -> None:
        self.done: asyncio.Future[dict[str, np.ndarray]] = asyncio.get_running_loop().create_future()
        self.failed_by_node = False
        self._outputs = outputs
        self._max_tensor_bytes = max_tensor_bytes
        self._tensors: dict[str, wire.TensorAssembler] = {}

    def drop(self) -> None:
        """Nobody waits any more."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # else asyncio reports it as forgotten

    def take(self, message: wire.Message) -> None:
        """Raises ProtocolError for what is no answer to the request."""
        frame = message.frame
        if frame.HasField("tensor"):
            name = frame.tensor.name
            if name not in self._outputs:
                raise ProtocolError(f"the answer holds {name!r}; expected {', '.join(self._outputs)}")
            try:
                if name not in self._tensors:
                    self._tensors[name] = wire.TensorAssembler(frame.tensor, self._max_tensor_bytes)
                self._tensors[name].add(frame.tensor, message.payload)
            except BadInput as error:  # an unknown codec or dtype: here it is the node's fault
                raise ProtocolError(error.message, remedy=error.remedy) from None
        if frame.end:
            missing = [name for name in self._outputs if name not in self._tensors or not self._tensors[name].complete]
            if missing:
                raise ProtocolError(f"the answer ended before {missing[0]!r} was complete")
            self.done.set_result({name: _own(self._tensors[name].array()) for name in self._outputs})


def _frames(
    request: str, deployment: str, inputs: Mapping[str, np.ndarray], deadline: float, priority: int, wanted: GenerateRequest | None = None
) -> Iterator[wire.Message]:
    """The request as frames, each made when it is asked for."""

    def frame() -> pb.Frame:
        left_s = deadline - time.monotonic()
        return pb.Frame(
            request=request, deployment=deployment, timeout_s=max(left_s - min(_RETURN_S, left_s / 10), 1e-3), priority=priority
        )

    last = len(inputs) - 1
    for position, (name, array) in enumerate(inputs.items()):
        stored_bytes = None
        for chunk, payload in wire.tensor_chunks(name, array):
            stored_bytes = chunk.stored_bytes if stored_bytes is None else stored_bytes
            message = wire.Message(frame(), payload)
            message.frame.tensor.CopyFrom(chunk)
            if wanted is not None and position == chunk.offset == 0:
                message.frame.generate.CopyFrom(wanted.to_message())
            message.frame.end = position == last and chunk.offset + chunk.length == stored_bytes
            yield message
    if not inputs:
        message = wire.Message(frame())
        message.frame.end = True
        yield message


def _own(array: np.ndarray) -> np.ndarray:
    """An array whose elements are its own: a broadcast one is copied, so that writing to one element does not change others."""
    return array.copy() if 0 in array.strides and array.size > 1 else array


def _lost(reason: SplitnetError, address: str) -> SplitnetError:
    """The error of one request on a stream that broke; each gets its own, because a raised exception carries a traceback."""
    if type(reason) in (NodeUnavailable, ServiceError):
        return NodeUnavailable(
            f"the connection to {address} broke while the request was under way: {reason.message}",
            remedy="send it again (the next call connects anew); it may or may not have been computed",
        )
    return type(reason)(reason.message, remedy=reason.remedy, node=reason.node, stage=reason.stage)
