"""The client: sends tensors to a deployment's ingress and receives its answers; `splitnet.Client` is the blocking twin. The story of one request stands in `AsyncClient.infer`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

import grpc.aio
import numpy as np

from splitnet import channel
from splitnet.batch_source import END, BatchSource
from splitnet.deployment import Deployment, Inputs, as_arrays, choose
from splitnet.errors import BadInput, DeadlineExceeded, Moved, NodeUnavailable, Overloaded, SplitnetError
from splitnet.exchange import HIGHEST_PRIORITY, Exchange
from splitnet.failover import find_ingress, goes_on
from splitnet.generation import GenerateRequest, Stop, TextModel, as_prompt
from splitnet.heartbeat import Heartbeat, Silence, pulse
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security.credentials import AccessLike, as_access
from splitnet.tensors import TensorSpec
from splitnet.token_stream import TokenStream

__all__ = ["AsyncClient"]

_RETRY_S = 0.05  #: when an overloaded node does not say when to come back
_MOST_MOVES = 8  #: of one request, from node to node


class AsyncClient:
    """A client of one deployment.

        async with AsyncClient("10.0.0.5:7001") as client:
            outputs = await client.infer({"pixel_values": array})

    `address` is the ingress: the node of the plan's first stage. `deployment` may be left out where the node takes requests for only
    one. `timeout_s` holds for each request, from the call to the answer, connecting included. `credentials`: a folder that `splitnet certs issue` made, or what
    `splitnet.Credentials` makes of it; else those that are found (docs/security.md), and plaintext within this machine.

    Any number of tasks of one event loop may call at once; all requests share one connection. It is made at the first call (or on
    `async with`). When it breaks, or nothing is heard from the node for 0.4 s, and the plan names who follows the ingress (replicas of its
    first stage), requests go there by themselves, under the ids that they had, within their time: they may be computed a second time, and are
    answered once; text that is being generated goes on after the tokens that have come. Where nobody follows, the requests under way fail with NodeUnavailable; the next call connects anew and asks the node
    again what it serves. After a failed attempt calls fail at once for up to a second before the next attempt.
    """

    def __init__(self, address: str, deployment: str = "", *, timeout_s: float = 60.0, credentials: AccessLike | None = None) -> None:
        self.address = address
        self._access = None if credentials is None else as_access(credentials)
        self.timeout_s = _positive(timeout_s)
        self._wanted = deployment
        self._deployment: Deployment | None = None
        self._channel: grpc.aio.Channel | None = None
        self._exchange: Exchange | None = None
        self._connecting = asyncio.Lock()
        self._closed = False
        self._heartbeat = Heartbeat()
        self._silence = Silence(self._heartbeat)
        self._leaving: set[asyncio.Task[Any]] = set()  # connections to where the requests went before
        self._requests = (f"{secrets.token_hex(8)}-{number}" for number in itertools.count())

    # --------------------------------------------------------------------------------------------------------------- requests

    async def infer(
        self, inputs: Inputs, *, timeout_s: float | None = None, retry: bool = False, priority: int = 0
    ) -> dict[str, np.ndarray]:
        """The model's outputs for these inputs, by name.

        `inputs` maps names to arrays (or lists, or torch tensors on the CPU); for a model with one input it may be the array alone.
        They are checked here before anything is sent. No dtype is converted. The arrays must not change until the call returns. The
        outputs are yours to write to. Where requests wait for the pipeline, a higher `priority` (0 to 9) goes first; those that have
        waited long rise.

        Raises BadInput for inputs that do not fit, Overloaded when the pipeline is full (`retry=True`: waits as long as the node asks
        and tries again, within the timeout), DeadlineExceeded, NodeUnavailable, or what a stage failed with. Cancelling the call, or
        running out of time, tells the nodes to drop the request.
        """
        _check_priority(priority)
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        deadline, moves, request, lost = time.monotonic() + limit_s, 0, next(self._requests), False
        async with self._limit(limit_s):
            while True:
                exchange, deployment = await self._connected()
                arrays = as_arrays(inputs, deployment.inputs, deployment.max_tensor_bytes)
                outputs = [spec.name for spec in deployment.outputs]
                try:
                    return await exchange.ask(request, deployment.name, arrays, outputs, deadline, priority)
                except Overloaded as busy:
                    wait_s = busy.retry_after_s or _RETRY_S
                    if not (retry or lost) or time.monotonic() + wait_s >= deadline:
                        raise
                except Moved as moved:
                    moves, wait_s = await self._follow(moved, exchange, moves), 0.0
                except NodeUnavailable:
                    if self._closed or not await goes_on(exchange, deployment, self.address, self._open):
                        raise
                    lost, wait_s = True, 0.0  # it had been taken in: now it waits for its place
                await asyncio.sleep(wait_s)

    async def stream(
        self,
        batches: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        window: int | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[dict[str, np.ndarray], None]:
        """The outputs for each of many inputs, in their order, with the pipeline kept full.

        `window` requests are under way at once: as many as the deployment takes, unless you want fewer. `batches` is read only as far
        ahead as that, so it may be endless and memory stays bounded. A plain iterable is read in the event loop, so it must not
        block; use an asynchronous one where it may. `timeout_s` holds for each batch, from when it is sent. A full pipeline is waited for.

        When a batch fails, the batches before it have been yielded, then its error is raised with its index in `error.batch`; the
        batches under way behind it are cancelled and the stream has ended. To go on, call again with the batches after that index.
        Closing the generator early (`contextlib.aclosing`) cancels what is under way.
        """
        width = await self.window(window)
        source = BatchSource(batches)
        pull: asyncio.Task[Any] | None = None
        under_way: deque[asyncio.Task[Any]] = deque()
        index, more = 0, True
        try:
            while more or under_way:
                if more and pull is None and len(under_way) < width:
                    pull = asyncio.create_task(source.next())
                waited = [task for task in (pull, *itertools.islice(under_way, 1)) if task is not None]
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if pull is not None and pull.done():
                    more = pull.exception() is None and pull.result() is not END
                    if pull.exception() is not None:
                        under_way.append(pull)  # the caller's own error comes out at its place, too
                    elif more:
                        under_way.append(
                            asyncio.create_task(self.infer_batch(index, pull.result(), timeout_s=timeout_s, priority=priority))
                        )
                    pull, index = None, index + 1
                elif under_way and under_way[0].done():
                    yield under_way.popleft().result()
        finally:
            await _cancel([*under_way, *([pull] if pull is not None else [])])

    async def window(self, wanted: int | None) -> int:
        """How many requests `stream` keeps under way. Connects if need be."""
        if wanted is not None and wanted < 1:
            raise BadInput(f"window must be at least 1, got {wanted}")
        await self.connect()
        return min(wanted or self.max_in_flight, self.max_in_flight)

    async def infer_batch(self, index: int, inputs: Inputs, *, timeout_s: float | None = None, priority: int = 0) -> dict[str, np.ndarray]:
        """One batch of a stream: `infer` that waits where the pipeline is full and says which batch failed."""
        try:
            return await self.infer(inputs, timeout_s=timeout_s, retry=True, priority=priority)
        except SplitnetError as error:
            error.batch, error.message = index, f"batch {index}: {error.message}"
            raise

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = (),
        *,
        ignore_eos: bool = False,
        timeout_s: float | None = None,
        retry: bool = False,
        priority: int = 0,
    ) -> TokenStream:
        """The tokens that a decoder model continues a prompt with, each as soon as it is there: `async for token in client.generate(ids, 64)`.

        `input_ids`: token ids, a list or an array of one dimension. For the others see `splitnet.generation.GenerateRequest`; without a `seed` each call draws
        anew. `stop`: token ids or sequences of token ids. `timeout_s` holds from the first token asked for to the last one.

        Raises BadInput at once for options that cannot be; then, while iterating, BadInput for a prompt that does not fit the model, Overloaded when the caches have no
        room (`retry=True`: waits and tries again, within the timeout), DeadlineExceeded, NodeUnavailable, or what a stage failed with; tokens that came
        before have been yielded. Closing the iterator (`aclose()`, `async with`) or cancelling tells the nodes, which free its caches."""
        _check_priority(priority)
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        wanted = GenerateRequest.of(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop, ignore_eos)
        stream = TokenStream()
        return stream.attach(self._generate(as_prompt(input_ids), wanted, limit_s, retry, priority, stream))

    async def _generate(
        self, prompt: np.ndarray, wanted: GenerateRequest, limit_s: float, retry: bool, priority: int, stream: TokenStream
    ) -> AsyncGenerator[list[int], None]:
        deadline, moves, request, lost = time.monotonic() + limit_s, 0, next(self._requests), False
        came: list[int] = []
        while True:
            async with self._limit(limit_s, deadline - time.monotonic()):
                exchange, deployment = await self._connected()
            if deployment.text is None:
                raise BadInput(f"deployment {deployment.name!r} does not generate text", remedy="use `infer`")
            deployment.text.check(prompt, wanted)
            text, rest = np.concatenate((prompt, np.array(came, prompt.dtype))), dataclasses.replace(wanted, answered=len(came))
            pieces = exchange.generate(request, deployment.name, text, rest, deadline, priority, stream)
            try:
                async with contextlib.aclosing(pieces):
                    while True:
                        async with self._limit(limit_s, deadline - time.monotonic()):
                            piece = await anext(pieces, None)
                        if piece is None:
                            return
                        came += piece
                        lost = False
                        yield piece
            except Overloaded as busy:
                wait_s = busy.retry_after_s or _RETRY_S
                if not (lost or (retry and not came)) or time.monotonic() + wait_s >= deadline:
                    raise
            except Moved as moved:
                moves, wait_s, lost = await self._follow(moved, exchange, moves), 0.0, lost or bool(came)
            except NodeUnavailable:
                if self._closed or not await goes_on(exchange, deployment, self.address, self._open):
                    raise
                lost, wait_s = True, 0.0
            await asyncio.sleep(wait_s)

    # ------------------------------------------------------------------------------------------------------------ what is there

    async def describe(self) -> Deployment:
        """Asks the node what it serves now. Raises as `connect`."""
        async with self._limit(self.timeout_s):
            self._deployment = await self._describe()
            return self._deployment

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What goes in. Known once connected."""
        return self._known().inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out. Known once connected."""
        return self._known().outputs

    @property
    def max_in_flight(self) -> int:
        """How many requests the deployment takes at once, from all its clients. Known once connected."""
        return self._known().max_in_flight

    @property
    def text(self) -> TextModel | None:
        """What the deployment takes where it is of a decoder model, else None. Known once connected."""
        return self._known().text

    def _known(self) -> Deployment:
        if self._deployment is None:
            raise BadInput("the client has not connected yet", remedy="use `async with`, or await client.connect() first")
        return self._deployment

    # ------------------------------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        """Connects unless connected. Raises NodeUnavailable, DeadlineExceeded, NotFound (no such deployment, or several and none was
        named) or NotPermitted (another node takes its requests)."""
        async with self._limit(self.timeout_s):
            await self._connected()

    async def close(self) -> None:
        """Ends the connection; calls under way fail with Cancelled. Idempotent."""
        self._closed = True
        if self._exchange is not None:
            await self._exchange.close()
        if self._channel is not None:
            await self._channel.close(None)
        await _cancel(list(self._leaving))

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _connected(self) -> tuple[Exchange, Deployment]:
        async with self._connecting:
            if self._closed:
                raise BadInput("the client is closed", remedy="make a new one")
            if self._exchange is None or self._deployment is None or self._exchange.broken is not None:
                if self._exchange is not None:
                    await self._exchange.close()
                    await self._find_ingress()
                self._deployment = await self._describe()
                self._exchange = Exchange(self._connection(), self.address, pulse=self._pulse)
            return self._exchange, self._deployment

    async def _find_ingress(self) -> None:
        """After a break: goes to whoever takes the requests now, where somebody follows."""
        if self._deployment is None or not self._deployment.followers:
            return
        candidates = (self.address, *self._deployment.followers)
        address = await find_ingress(candidates, self._deployment.name, self._open)
        self._wanted = self._wanted or self._deployment.name  # a follower may serve others besides
        if address != self.address:
            self._leave_for(address)

    async def _pulse(self) -> None:
        await pulse(self._open(self.address), self.address, self._heartbeat, self._silence)

    async def _describe(self, moves: int = 0) -> Deployment:
        with channel.translated(self.address):
            reply = await channel.stub(self._connection()).Describe(pb.DescribeRequest())
        try:
            return choose(reply, self._wanted, self.address)
        except Overloaded as busy:  # it is being loaded from the node's disk, and will be there
            await asyncio.sleep(busy.retry_after_s)
            return await self._describe(moves)
        except Moved as moved:
            self._leave_for(_next_address(moved, moves))
            return await self._describe(moves + 1)

    async def _follow(self, moved: Moved, exchange: Exchange, moves: int) -> int:
        """Another plan has taken the place of the one that entered here: goes where it enters. What is under way here is finished here."""
        address = _next_address(moved, moves)
        async with self._connecting:
            if self._exchange is exchange:  # else another request has heard of it before
                self._leave_for(address)
        return moves + 1

    def _leave_for(self, address: str) -> None:
        if self._channel is not None:
            task = asyncio.create_task(_wind_up(self._exchange, self._channel), name=f"winding up {self.address}")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        self.address, self._channel, self._exchange = address, None, None

    def _connection(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = self._open(self.address)
        return self._channel

    def _open(self, address: str) -> grpc.aio.Channel:
        return channel.open_channel(address, credentials=self._access)

    @contextlib.asynccontextmanager
    async def _limit(self, limit_s: float, left_s: float | None = None) -> AsyncIterator[None]:
        """`left_s`: of `limit_s`, where some of it has passed."""
        try:
            async with asyncio.timeout(limit_s if left_s is None else left_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer from {self.address} within {limit_s:g} s",
                remedy="raise timeout_s, or see `splitnet status` for what the nodes are doing",
            ) from None


async def _wind_up(exchange: Exchange | None, connection: grpc.aio.Channel) -> None:
    """Closes them after the last answer."""
    try:
        if exchange is not None:
            await exchange.settled()
    finally:
        if exchange is not None:
            await exchange.close()
        await connection.close(None)


def _next_address(moved: Moved, moves: int) -> str:
    """Raises `moved` where it leads nowhere."""
    if not moved.address or moves >= _MOST_MOVES:
        raise moved
    return moved.address


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_priority(priority: int) -> None:
    if not 0 <= priority <= HIGHEST_PRIORITY:
        raise BadInput(f"priority must be 0 (usual) to {HIGHEST_PRIORITY} (most urgent), got {priority}")


def _positive(timeout_s: float) -> float:
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise BadInput(f"timeout_s must be positive and finite, got {timeout_s}")
    return float(timeout_s)
