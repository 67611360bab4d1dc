"""What the node of a plan's first stage does besides: it admits the client's requests and checks their inputs. How they go on from there, and
how they are answered, stands in `nodes.dispatch`."""

from __future__ import annotations

import math
import re

from nodes.calls import Call
from nodes.clients import ClientStream
from nodes.deployment import Deployment
from nodes.dispatch import Dispatcher
from nodes.generation.desk import TextDesk
from nodes.ledger import Ledger
from nodes.pipeline import Pipeline
from splitnet.codecs import Buffer
from splitnet.errors import AlreadyExists, BadInput, DeadlineExceeded, Moved, NodeUnavailable, Overloaded, ProtocolError, SplitnetError
from splitnet.plan import CLIENT
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Ingress"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_HIGHEST_PRIORITY = 9


class Ingress:
    def __init__(self, ledger: Ledger, pipeline: Pipeline) -> None:
        self._ledger = ledger
        self._calls = ledger.calls
        self._pipeline = pipeline
        self._dispatcher = Dispatcher(ledger, pipeline)
        self._desk = ledger.calls.carrier = TextDesk(ledger, pipeline, self._dispatcher)
        self.advance = self._dispatcher.advance

    async def receive(self, client: ClientStream, frame: pb.Frame, payload: Buffer) -> None:
        """A frame from a client. Raises ProtocolError where the stream makes no sense; what is wrong with one request is answered."""
        client_id = frame.request
        call = client.calls.get(client_id)
        new = call is None
        if call is None:
            if not _REQUEST_ID.match(client_id):
                raise ProtocolError(f"request id {client_id!r:.100} is not 1 to 64 characters of [A-Za-z0-9_-]")
            if client.ignores(client_id, frame.end) or frame.HasField("cancel"):
                return
            try:
                call = self._admit(client, frame)
            except SplitnetError as error:
                error.at(node=self._ledger.config.name, request=client_id)
                self._ledger.log.info("request refused", request=client_id, kind=type(error).__name__, error=error.message)
                client.refuse(client_id, error, complete=frame.end)
                return
        if frame.HasField("cancel") or frame.HasField("failure"):
            call.received = True
            self._calls.cancel(call, frame.cancel.reason or "cancelled by the client")
            return
        if call.received:
            call.received = frame.end
            self._calls.fail(call, AlreadyExists(f"request {client_id!r} is still being answered", remedy="give every request its own id"))
            return
        call.received = frame.end
        try:
            if new:
                self._desk.open(call, frame)
            if frame.HasField("tensor"):
                await self._take_input(call, frame.tensor, payload)
            if frame.end and call.live:
                self._check_complete(call)
                if self._desk.takes(call):
                    self._desk.begin(call)
                else:
                    self._dispatcher.join_line(call)
        except SplitnetError as error:
            self._calls.fail(call, error)

    def rejoin(self, call: Call) -> None:
        """A whole call that has come to another generation, with nothing of it under way."""
        if not self._desk.takes(call):
            self._dispatcher.join_line(call)
            return
        try:
            self._desk.begin_again(call)
        except SplitnetError:  # no room at the moment, say: the client comes again, and waits for it
            where = call.deployment.ingress.address
            self._calls.fail(call, Moved("another plan takes its place", address=where, remedy=f"connect to {where}"))

    def client_gone(self, client: ClientStream) -> None:
        for call in list(client.calls.values()):
            self._calls.cancel(call, "the client has gone away")

    def _admit(self, client: ClientStream, frame: pb.Frame) -> Call:
        deployment = self._ledger.families.enter(frame.deployment)
        if self._ledger.draining or deployment.draining:
            raise NodeUnavailable(
                "the node is being stopped and takes no new requests", remedy="try again once it has been started and deployed to"
            )
        for node in deployment.closing:
            raise NodeUnavailable(
                f"node {node!r} is stopping and takes no new requests",
                remedy="start it again and deploy the plan again, or make a plan without it",
                node=node,
                stage=deployment.stages_on(node),
            )
        if not math.isfinite(frame.timeout_s):
            raise BadInput(f"timeout_s is {frame.timeout_s}", remedy="give a number of seconds, or 0 for the node's limit")
        if frame.timeout_s < 0:
            raise DeadlineExceeded("the request's time had run out before it came", remedy="give it more time")
        if frame.priority > _HIGHEST_PRIORITY:
            raise BadInput(f"priority is {frame.priority}", remedy=f"give 0 (usual) to {_HIGHEST_PRIORITY} (most urgent)")
        client.caller.admit(deployment.name)
        self._enter(deployment, client, frame.priority)
        call = self._calls.open(client, frame.request, deployment, frame.priority, self._ledger.deadline(frame.timeout_s))
        for link in deployment.links.values():
            if not link.connected:
                link.hurry()  # and fail soon, if it cannot be
        return call

    def _enter(self, deployment: Deployment, client: ClientStream, priority: int) -> None:
        """Where there is no place, one that only waits, and is less urgent, makes room: the least urgent, and of those the last."""
        try:
            deployment.admission.enter(client)
        except Overloaded as full:
            waiting = [c for c in self._calls if c.deployment is deployment and not c.requests and c.priority < priority]
            if not waiting:
                raise
            last = min(waiting, key=lambda call: (call.priority, -call.started_s))
            message = f"a request of priority {priority} took its place: {full.message}"
            self._calls.fail(last, Overloaded(message, remedy=full.remedy, retry_after_s=full.retry_after_s))
            deployment.admission.enter(client)

    async def _take_input(self, call: Call, chunk: pb.TensorChunk, payload: Buffer) -> None:
        specs = call.deployment.inputs
        spec = specs.get(chunk.name)
        if spec is None:
            raise BadInput(f"there is no input {chunk.name!r:.100}", remedy=f"the inputs are {', '.join(specs)}")
        if chunk.name in call.inputs:
            raise BadInput(f"input {chunk.name!r} was sent twice")
        array = await self._pipeline.decode(call, CLIENT, None, chunk, payload, check=lambda header: spec.check(header, call.symbols))
        if array is not None:
            call.inputs[chunk.name] = array

    def _check_complete(self, call: Call) -> None:
        for name in call.deployment.inputs:
            if name not in call.inputs:
                part = call.arriving
                raise BadInput(
                    f"input {name!r} is missing" + (" (a part of a tensor came)" if part else ""),
                    remedy="send every input, whole, before `end`",
                )
