"""The edge: gRPC calls and protobuf messages on one side, the node's rooms on the other. No decision is taken here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from nodes.call_handlers import decoding
from nodes.callers import Caller, current_caller, note
from nodes.certificates import CertificateKeeper
from nodes.clients import ClientStream
from nodes.compute import ComputeThread
from nodes.describe import Describer
from nodes.generation.orders import decode_orders
from nodes.heartbeat import Pulses
from nodes.ingress import Ingress
from nodes.installer import Installer
from nodes.ledger import Ledger
from nodes.link import ADDRESS_KEY, NAME_KEY
from nodes.measuring import Measurer
from nodes.peers import Offers, gather, give
from nodes.pipeline import Pipeline
from nodes.receiving import receive_blob
from nodes.recovery import Recovery
from nodes.requests import RequestKey
from nodes.store import BlobStore
from splitnet.channel import abort_with, from_failure, to_failure
from splitnet.errors import BadInput, ProtocolError, SplitnetError
from splitnet.plan import NodeRef
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.rpc.v1.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from splitnet.security.roles import Role
from splitnet.wire import MAX_MESSAGE_BYTES, Message, decode_frame, encode_frame

__all__ = ["SERVICE", "Servicer", "add_to_server"]

SERVICE = pb.DESCRIPTOR.services_by_name["Node"].full_name

_LONGEST_NAME = 100
_LONGEST_LEASE_S = 600.0
_MAX_BACKLOG = 1000  # failures that wait to be sent to one client
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Reply = TypeVar("Reply")


class Servicer(NodeServicer):
    def __init__(
        self,
        ledger: Ledger,
        pipeline: Pipeline,
        ingress: Ingress,
        installer: Installer,
        recovery: Recovery,
        describer: Describer,
        store: BlobStore,
        compute: ComputeThread,
        certificates: CertificateKeeper,
    ) -> None:
        self._ledger = ledger
        self._pipeline = pipeline
        self._ingress = ingress
        self._installer = installer
        self._recovery = recovery
        self._describer = describer
        self._store = store
        self._certificates = certificates
        self._offers = Offers(store)
        self._measurer = Measurer(ledger, store, compute)
        self._log = ledger.log
        self.clients: set[ClientStream] = set()
        self._client_left = asyncio.Event()
        self._streams: set[Context] = set()
        self._forwards: dict[NodeRef, Context] = {}  # the newest of each sender
        self._pulses = Pulses(secrets.token_hex(8), self._fell_silent)

    # ------------------------------------------------------------------------------------------------------------ requests

    async def Run(self, _: object, context: Context) -> None:  # type: ignore[override] # registered by `add_to_server`
        """Reads until the client has said all, and answers until all of it is answered."""
        client = ClientStream()
        self.clients.add(client)
        self._streams.add(context)
        writer = asyncio.create_task(client.outbox.pump(_writer(context)), name="answers to a client")
        try:
            async for message in _frames(context):
                await client.caller.pass_bytes(len(message.payload))
                await self._ingress.receive(client, message.frame, message.payload)
                if client.outbox.backlog > _MAX_BACKLOG:  # a client that asks and does not read: it must wait until it does
                    await client.outbox.flushed()
            await client.settled()
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))
        finally:
            self._streams.discard(context)
            self.clients.discard(client)
            self._client_left.set()
            self._ingress.client_gone(client)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def Forward(self, _: object, context: Context) -> None:  # type: ignore[override] # registered by `add_to_server`
        """Greets, then takes what the other node sends until the stream ends."""
        sender = _sender(context)
        write = _writer(context)
        token = self._ledger.sender_opened(sender)
        self._streams.add(context)
        self._forwards[sender] = context
        receipts = 0
        try:
            await write(Message(pb.Frame(received=pb.Received())))
            async for message in _frames(context):
                frame = message.frame
                if frame.acknowledge:
                    receipts += 1
                    await write(Message(pb.Frame(received=pb.Received(frames=receipts))))
                key = RequestKey(frame.deployment, frame.ingress, frame.request)
                try:
                    await self._take(key, message)
                except SplitnetError as error:
                    error.at(node=self._ledger.config.name, stage=frame.stage)
                    self._log.warning("frame refused", request=key.request[:_LONGEST_NAME], sender=sender.name, error=error.message)
                    reply = pb.Frame(
                        request=key.request, deployment=key.deployment, ingress=key.ingress, failure=to_failure(error, key.request)
                    )
                    await write(Message(reply))
        except SplitnetError as error:
            self._log.warning("link refused", sender=sender.name, address=sender.address, error=error.message)
            await abort_with(context, error.at(node=self._ledger.config.name))
        finally:
            self._streams.discard(context)
            if self._forwards.get(sender) is context:
                del self._forwards[sender]
            self._ledger.sender_closed(sender, token)

    async def Heartbeat(self, _: object, context: Context) -> None:  # type: ignore[override] # registered by `add_to_server`
        """Answers beats until the stream ends."""
        self._streams.add(context)

        async def reply(beat: pb.Beat) -> None:
            await context.write(beat.SerializeToString())

        try:
            await self._pulses.answer(_beats(context), reply, _sender(context))
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))
        finally:
            self._streams.discard(context)

    async def _fell_silent(self, sender: NodeRef, reason: SplitnetError) -> None:
        """Whatever it sent is given up; should it be there after all, it hears so and begins anew."""
        if (context := self._forwards.get(sender)) is not None:
            self._log.warning("a node fell silent", sender=sender.name, address=sender.address, error=reason.message)
            await _end(context, reason)

    async def take_leave(self, reason: SplitnetError) -> None:
        """Tells the clients to end their streams, and returns when they have: for a client that has not read its answers yet loses them with a stream that ends
        in an error (gRPC throws away what was received and not read)."""
        for client in self.clients:
            client.outbox.send_now(pb.Frame(failure=to_failure(reason)))
        while self.clients:
            self._client_left.clear()
            await self._client_left.wait()

    async def end_streams(self, reason: SplitnetError) -> None:
        """Ends all Run and Forward streams; the far sides are told why."""
        for context in list(self._streams):
            await _end(context, reason)

    async def _take(self, key: RequestKey, message: Message) -> None:
        frame = message.frame
        if max(map(len, key)) > _LONGEST_NAME or len(frame.stage) > _LONGEST_NAME:
            raise ProtocolError("a frame's request, deployment, stage or ingress is too long")
        if not key.request:
            self._take_for_all(key, frame)
        elif frame.HasField("failure"):
            self._ledger.failed_elsewhere(key, from_failure(frame.failure))
        elif frame.HasField("cancel"):
            self._ledger.dropped_by_ingress(key)
        elif frame.HasField("tensor"):
            await self._pipeline.take(key, frame.stage, frame.tensor, message.payload, frame.timeout_s, frame.steps)
        else:
            raise ProtocolError("a frame has neither a tensor, nor a failure, nor a cancellation")

    def _take_for_all(self, key: RequestKey, frame: pb.Frame) -> None:
        """What is said of no request in particular, when a node stops: see `Ledger.leave`."""
        if frame.HasField("failure"):
            self._ledger.node_stops(key.deployment, from_failure(frame.failure).node)
        elif frame.HasField("cancel"):
            self._ledger.released(key.deployment)
        elif frame.steps:
            self._pipeline.sessions_closed(self._ledger.deployments.get(key.deployment), decode_orders(frame.steps))
        else:
            raise ProtocolError("a frame's request is missing")

    # ------------------------------------------------------------------------------------------------------------- install

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        reply = self._describer.describe(request.deployment, plans=request.plans)
        return reply if not current_caller().deployments else _only(reply, current_caller())

    async def Load(self, request_iterator: AsyncIterator[pb.LoadRequest], context: Context) -> AsyncIterator[pb.LoadReply]:
        try:
            async for reply in receive_blob(self._store, request_iterator, self._log):
                yield reply
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))

    async def Offer(self, request: pb.OfferRequest, context: Context) -> pb.OfferReply:
        async def act() -> pb.OfferReply:
            note(f"{len(request.blobs)} blobs to {request.node!r:.100}")
            return pb.OfferReply(held=await self._offers.offer(request.blobs, request.node, request.lease_s))

        return await self._guarded(context, act)

    async def Gather(self, request: pb.GatherRequest, context: Context) -> AsyncIterator[pb.LoadReply]:
        note(f"{request.sha256:.12} from {request.node!r:.100}")
        try:
            async for held, complete in gather(self._store, request, self._log):
                yield pb.LoadReply(offset=held, complete=complete)
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))

    async def Give(self, request: pb.GiveRequest, context: Context) -> AsyncIterator[pb.GiveReply]:
        try:
            async for piece in give(self._store, self._offers, _asking_node(context), request.sha256, request.offset):
                yield pb.GiveReply(data=piece)
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))

    async def Activate(self, request: pb.ActivateRequest, context: Context) -> pb.ActivateReply:
        async def act() -> pb.ActivateReply:
            note(f"{request.deployment}@{request.generation} plan {hashlib.sha256(request.plan_json).hexdigest()[:12]}")
            deployment, load_s = await self._installer.activate(
                request.deployment,
                request.plan_json,
                request.node,
                dict(request.shards),
                generation=request.generation,
                wait=request.wait,
                check=functools.partial(self._certificates.check_shards, signatures=request.signatures),
            )
            return pb.ActivateReply(reserved_bytes=deployment.reserved_bytes, load_s=load_s)

        return await self._guarded(context, act)

    async def Switch(self, request: pb.SwitchRequest, context: Context) -> pb.SwitchReply:
        async def act() -> pb.SwitchReply:
            note(f"{request.deployment}@{request.generation} share {request.share:g}")
            before = self._installer.switch(
                request.deployment, request.generation, request.share, request.ingress_address, keep=request.keep, term=request.term
            )
            await self._installer.kept()
            return pb.SwitchReply(before=before)

        return await self._guarded(context, act)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> pb.WatchReply:
        async def act() -> pb.WatchReply:
            lease_s = min(max(request.lease_s, 0.0), _LONGEST_LEASE_S)
            return pb.WatchReply(lost=self._recovery.watched(request.deployment, lease_s, request.hopeless))

        return await self._guarded(context, act)

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadReply:
        async def act() -> pb.UnloadReply:
            drain_s = min(max(request.drain_s, 0.0), self._ledger.config.request_s)
            note(f"{request.deployment}@{request.generation}")
            cancelled = await self._installer.unload(request.deployment, drain_s, request.delete_blobs, generation=request.generation)
            return pb.UnloadReply(cancelled=cancelled)

        return await self._guarded(context, act)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:
        async def act() -> pb.ReleaseReply:
            note(f"{len(request.blobs)} blobs")
            return pb.ReleaseReply(freed_bytes=await self._installer.release(request.blobs))

        return await self._guarded(context, act)

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyReply:
        async def act() -> pb.SetPolicyReply:
            note(f"sha256 {hashlib.sha256(request.policy_json).hexdigest()}")
            return pb.SetPolicyReply(calls_ended=await self._certificates.set_policy(request.policy_json, request.signature))

        return await self._guarded(context, act)

    # ------------------------------------------------------------------------------------------------------------- measure

    async def Probe(self, request_iterator: AsyncIterator[pb.ProbeRequest], context: Context) -> AsyncIterator[pb.ProbeReply]:
        async for request in request_iterator:
            if request.reply_bytes > MAX_MESSAGE_BYTES - 1024:
                await abort_with(
                    context, BadInput(f"reply_bytes {request.reply_bytes} is more than fits into a message of {MAX_MESSAGE_BYTES}")
                )
            yield pb.ProbeReply(received_bytes=len(request.payload), payload=bytes(request.reply_bytes))

    async def Measure(self, request: pb.MeasureRequest, context: Context) -> pb.MeasureReply:
        return await self._guarded(context, lambda: self._measurer.measure(request))

    async def _guarded(self, context: Context, act: Callable[[], Awaitable[Reply]]) -> Reply:
        try:
            return await act()
        except SplitnetError as error:
            await abort_with(context, error.at(node=self._ledger.config.name))


def _asking_node(context: Context) -> str:
    """By its certificate; where there are none, by its own word."""
    identity = current_caller().identity
    if identity.role is Role.NODE:
        return identity.name
    return next((value for key, value in context.invocation_metadata() or () if key == NAME_KEY and isinstance(value, str)), "")


def add_to_server(servicer: Servicer, server: grpc.aio.Server) -> None:
    """Registers all calls with undecoded messages: for Run and Forward `wire.decode_frame` finds the payload in them without a copy; for
    the others, what cannot be decoded is answered by a message (gRPC would log a traceback and say nothing)."""
    add_NodeServicer_to_server(servicer, server)
    undecoded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        call.name: decoding(getattr(servicer, call.name), GetMessageClass(call.input_type), (call.client_streaming, call.server_streaming))
        for call in pb.DESCRIPTOR.services_by_name["Node"].methods
    }
    undecoded["Run"] = grpc.stream_stream_rpc_method_handler(servicer.Run)
    undecoded["Forward"] = grpc.stream_stream_rpc_method_handler(servicer.Forward)
    undecoded["Heartbeat"] = grpc.stream_stream_rpc_method_handler(servicer.Heartbeat)
    server.add_registered_method_handlers(SERVICE, undecoded)  # take the place of the generated ones


def _only(reply: pb.DescribeReply, caller: Caller) -> pb.DescribeReply:
    """What a caller may see that is let to some deployments only."""
    seen = [d for d in reply.deployments if caller.may_see(d.name)]
    for field in ("deployments", "links", "events"):
        reply.ClearField(field)
    reply.deployments.extend(seen)
    return reply


async def _end(context: Context, reason: SplitnetError) -> None:
    # The first is how gRPC's abort returns; the others come where the far side has gone already.
    with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
        await abort_with(context, reason)


async def _beats(context: Context) -> AsyncIterator[pb.Beat]:
    """Raises BadInput for bytes that are not a beat."""
    while isinstance(data := await context.read(), bytes):
        try:
            yield pb.Beat.FromString(data)
        except DecodeError:
            raise BadInput(f"{len(data)} bytes are not a Beat", remedy="run the same version of splitnet on both sides") from None


async def _frames(context: Context) -> AsyncIterator[Message]:
    """Raises ProtocolError for bytes that are not a frame."""
    while isinstance(data := await context.read(), bytes):  # else grpc.aio.EOF
        yield decode_frame(data)


def _writer(context: Context) -> Callable[[Message], Awaitable[None]]:
    async def write(message: Message) -> None:
        await context.write(encode_frame(message))

    return write


def _sender(context: Context) -> NodeRef:
    """Who opened this stream, by its own words."""
    said = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    return NodeRef(said.get(NAME_KEY, "")[:_LONGEST_NAME], said.get(ADDRESS_KEY, "")[:_LONGEST_NAME])
