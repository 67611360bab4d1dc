"""A link: the one long-lived Forward stream from this node to another, opened when a deployment needs it and again after a break."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc
import grpc.aio

from nodes.goodput import Goodput
from nodes.logs import Log
from nodes.outbox import EncodedTensor, Outbox, Parcel
from nodes.requests import RequestKey
from splitnet.channel import FrameCall, as_error, forward_stream, from_failure, open_channel, read_frame, to_failure
from splitnet.errors import NodeUnavailable, SplitnetError
from splitnet.heartbeat import Heartbeat, Silence, pulse
from splitnet.plan import NodeRef
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Link", "LinkEvents", "Links"]

NAME_KEY, ADDRESS_KEY = "splitnet-node", "splitnet-address"  #: metadata of a Forward stream: who sends
_CONNECT_S = 3.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 2.0
_GRPC_ERRORS = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError)
_CANCEL_AGAIN_S = 1.0
_SHORTEST_S = 0.001  # on the wire 0 means that there is no deadline
_REMEMBERED = 1024  # requests that were sent lately, which a break may have lost


class LinkEvents(Protocol):
    """What a link tells its owner."""

    def link_up(self, link: Link) -> None:
        """Connected, for the first time or again."""
        ...

    def link_down(self, link: Link, error: SplitnetError, lost: list[RequestKey]) -> None:
        """An attempt to connect failed, or the stream broke. `lost`: requests of which something may not have arrived."""
        ...

    def refused(self, link: Link, key: RequestKey, error: SplitnetError) -> None:
        """The far side knows nothing of this request's deployment."""
        ...


class Link:
    """What is put in while there is no connection waits for the attempt that is under way (or that this starts), and is forgotten
    when that fails: the owner is told and fails the requests."""

    def __init__(self, source: NodeRef, target: NodeRef, events: LinkEvents, log: Log, heartbeat: Heartbeat) -> None:
        self.source = source
        self.target = target
        self.goodput = Goodput()
        self.outbox = Outbox(self.goodput)
        self.connected = False
        self.users = 0
        self.process = ""  # which one was heard there last; "" while none was
        self._heartbeat = heartbeat
        self._silence = Silence(heartbeat)
        self.fell_silent = False  # so the last connection ended
        self.was_up = False  # and not: another attempt has failed
        self._events = events
        self._log = log.bind(link=f"{source.name}->{target.name}", address=target.address)
        self._recent: OrderedDict[RequestKey, None] = OrderedDict()
        self._hurry = asyncio.Event()
        self._call: FrameCall | None = None  # while connected
        self._finishing = self._closed = False
        self._task = asyncio.create_task(self._serve(), name=f"link {source.name}->{target.name}")

    def send(
        self,
        key: RequestKey,
        stage: str,
        deadline_s: float,
        tensor: EncodedTensor,
        on_sent: Callable[[Parcel], None],
        on_failed: Callable[[Parcel, SplitnetError], None],
        steps: bytes = b"",
    ) -> Parcel:
        """`deadline_s`: by the event loop's clock; it travels as the time that is left. `steps`: of a decoder model's forward pass; then the other node's limit holds, and
        the frame is as small as can be."""
        clock = asyncio.get_running_loop().time

        def envelope() -> pb.Frame:
            nonlocal steps
            if steps:
                first, steps = steps, b""
                return pb.Frame(request=key.request, deployment=key.deployment, stage=stage, ingress=key.ingress, steps=first)
            left_s = max(deadline_s - clock(), _SHORTEST_S)
            return pb.Frame(request=key.request, deployment=key.deployment, stage=stage, ingress=key.ingress, timeout_s=left_s)

        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        parcel = Parcel(key, tensor, envelope, on_sent, on_failed)
        self.outbox.put(parcel)
        self._hurry.set()
        return parcel

    def send_failure(self, key: RequestKey, error: SplitnetError) -> None:
        self._send_now(
            pb.Frame(request=key.request, deployment=key.deployment, ingress=key.ingress, failure=to_failure(error, key.request))
        )

    def send_cancel(self, key: RequestKey, reason: str) -> None:
        self._send_now(pb.Frame(request=key.request, deployment=key.deployment, ingress=key.ingress, cancel=pb.Cancel(reason=reason[:200])))

    def send_stopping(self, deployment: str, ingress: str, error: SplitnetError) -> None:
        """To the ingress: this node is being stopped. A failure of no request in particular."""
        self._send_now(pb.Frame(deployment=deployment, ingress=ingress, failure=to_failure(error)))

    def send_orders(self, deployment: str, ingress: str, steps: bytes) -> None:
        """From the ingress: sessions to close, while no forward pass is to be sent that could say so."""
        self._send_now(pb.Frame(deployment=deployment, ingress=ingress, steps=steps))

    def send_released(self, deployment: str, ingress: str) -> None:
        """The ingress's answer, once nothing is in flight: a cancellation of no request in particular."""
        self._send_now(pb.Frame(deployment=deployment, ingress=ingress, cancel=pb.Cancel(reason="nothing is in flight")))

    def _send_now(self, frame: pb.Frame) -> None:
        """Forgotten when there is no connection to be had: then the far side drops the request by itself."""
        self.outbox.send_now(frame)
        self._hurry.set()

    def hurry(self) -> None:
        """Connects now if there is no connection, instead of after the pause."""
        self._hurry.set()

    async def finish(self) -> None:
        """Sends what waits and ends the stream in good order: when this returns, the far side has taken all of it. Takes as long as the far
        side does; when cancelled, some of it may not have arrived. Nothing is sent afterwards."""
        self._finishing = True
        if self._call is None:
            return
        await self.outbox.flushed()
        if (call := self._call) is not None:
            with contextlib.suppress(*_GRPC_ERRORS):  # it broke meanwhile
                await call.done_writing()
            await asyncio.wait((self._task,))

    async def close(self) -> None:
        """gRPC may take a cancellation for its own: one that comes while a stream is being set up ends that attempt, and no more."""
        self._closed = True
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=_CANCEL_AGAIN_S)
        self.outbox.clear()

    async def _serve(self) -> None:
        backoff_s = 0.0
        while True:
            started = time.monotonic()
            try:
                await self._attempt()
            except SplitnetError as error:
                reason = error
            except _GRPC_ERRORS as error:
                reason = as_error(error, self.target.address)
            if self._finishing or self._closed:
                return
            self._down(reason)
            lasted = time.monotonic() - started > _CONNECT_S
            backoff_s = _FIRST_BACKOFF_S if lasted else min(max(backoff_s * 2, _FIRST_BACKOFF_S), _LONGEST_BACKOFF_S)
            await self._pause(backoff_s)

    async def _attempt(self) -> None:
        """Connects, and sends until the stream breaks; always raises."""
        address = self.target.address
        channel = open_channel(address, node=self.target.name)
        try:
            call = forward_stream(channel)(metadata=grpc.aio.Metadata((NAME_KEY, self.source.name), (ADDRESS_KEY, self.source.address)))
            try:
                async with asyncio.timeout(_CONNECT_S):
                    await _connected(channel)
                    asked_s = time.monotonic()
                    greeting = await read_frame(call, address)
            except TimeoutError:
                raise NodeUnavailable(f"{address} did not answer within {_CONNECT_S:g} s") from None
            if greeting is None:
                raise NodeUnavailable(f"{address} ended the stream at once")
            self.connected = True
            self._events.link_up(self)
            self.goodput.restart(time.monotonic() - asked_s, greeting.frame.HasField("received"))
            self._log.info("link up")
            await self._converse(call)
        finally:
            await channel.close()

    async def _converse(self, call: FrameCall) -> None:
        writer = asyncio.create_task(self.outbox.pump(call.write))
        reader = asyncio.create_task(self._listen(call))
        heart = asyncio.create_task(self._beat())
        self._call = call
        try:
            await asyncio.wait((writer, reader, heart), return_when=asyncio.FIRST_COMPLETED)
            if not heart.done():
                await asyncio.wait((reader,), timeout=1.0)  # it knows the reason, and ends when the writer cannot go on
            for task in (reader, writer, heart):
                if task.done():
                    task.result()
        finally:
            self._call = None
            call.cancel()
            for task in (writer, reader, heart):
                task.cancel()
            await asyncio.gather(writer, reader, heart, return_exceptions=True)

    async def _beat(self) -> None:
        """Until the far side is silent, which it raises as NodeUnavailable; for ever where it knows no heartbeat."""
        metadata = ((NAME_KEY, self.source.name), (ADDRESS_KEY, self.source.address))
        try:
            channel = open_channel(self.target.address, node=self.target.name)
            await pulse(channel, self.target.address, self._heartbeat, self._silence, metadata, self._heard_from)
        except SplitnetError:
            self.fell_silent = self._silence.left_s(time.monotonic()) <= 0
            raise
        await asyncio.Event().wait()

    def _heard_from(self, process: str) -> None:
        if self.fell_silent and process == self.process:
            self._silence.false_alarm(time.monotonic())
            self._log.info("it was there all the time; silence is believed later from now on")
        self.fell_silent = False
        self.process = process

    async def _listen(self, call: FrameCall) -> None:
        while (message := await read_frame(call, self.target.address)) is not None:
            self._silence.alive(time.monotonic())
            frame = message.frame
            if frame.HasField("received"):
                self.goodput.arrived(time.monotonic())
                self.outbox.has_room_again()
            elif frame.HasField("failure"):
                self._events.refused(self, RequestKey(frame.deployment, frame.ingress, frame.request), from_failure(frame.failure))
        raise NodeUnavailable(f"{self.target.address} ended the stream")

    def _down(self, error: SplitnetError) -> None:
        if self.connected:
            self._log.warning("link down", error=error.message)
        self.connected, self.was_up = False, self.connected
        self.outbox.clear()
        lost = list(self._recent)
        self._recent.clear()
        self._hurry.clear()
        self._events.link_down(self, error, lost)

    async def _pause(self, backoff_s: float) -> None:
        """Waits before the next attempt; cut short when something is to be sent, but never so short that it spins."""
        await asyncio.sleep(_FIRST_BACKOFF_S)
        try:
            async with asyncio.timeout(backoff_s - _FIRST_BACKOFF_S):
                await self._hurry.wait()
        except TimeoutError:
            pass
        self._hurry.clear()


async def _connected(channel: grpc.aio.Channel) -> None:
    """Or the attempt has failed, which the call then says."""
    while (state := channel.get_state(try_to_connect=True)) in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        await channel.wait_for_state_change(state)


class Links:
    """The links of a node, shared by its deployments."""

    def __init__(self, events: LinkEvents, log: Log, heartbeat: Heartbeat) -> None:
        self._events = events
        self._log = log
        self._heartbeat = heartbeat
        self._links: dict[tuple[NodeRef, NodeRef], Link] = {}

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def take(self, source: NodeRef, target: NodeRef) -> Link:
        """To be given back with `release`."""
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = Link(source, target, self._events, self._log, self._heartbeat)
        link.users += 1
        link.hurry()
        return link

    async def release(self, link: Link) -> None:
        """Closes the link after its last user."""
        link.users -= 1
        if not link.users:
            del self._links[link.source, link.target]
            await link.close()

    async def finish(self) -> None:
        """All of them, as `Link.finish`."""
        await asyncio.gather(*(link.finish() for link in self))

    async def close(self) -> None:
        for link in self:
            del self._links[link.source, link.target]
            await link.close()
