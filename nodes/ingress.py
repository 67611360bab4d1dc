"""What the node of a plan's first stage does besides: it admits the client's requests, checks their inputs, and answers."""

from __future__ import annotations

import itertools
import math
import re
import secrets

import numpy as np

from nodes.clients import ClientStream
from nodes.deployment import Deployment
from nodes.ledger import Ledger
from nodes.outbox import EncodedTensor, Parcel
from nodes.pipeline import Pipeline
from nodes.requests import Answer, Request, RequestKey
from splitnet.codecs import Buffer
from splitnet.errors import AlreadyExists, BadInput, DeadlineExceeded, NodeUnavailable, NotFound, ProtocolError, SplitnetError
from splitnet.plan import CLIENT
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Ingress"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_KEPT = 40  # characters of the client's id that stand in the nodes' own, for people who read logs


class Ingress:
    def __init__(self, ledger: Ledger, pipeline: Pipeline) -> None:
        self._ledger = ledger
        self._pipeline = pipeline
        self._log = ledger.log
        self._epoch = secrets.token_hex(4)  # so that ids of an earlier process of this node do not come again
        self._numbers = itertools.count()
        pipeline.ingress = self

    # ------------------------------------------------------------------------------------------------------------- receive

    async def receive(self, client: ClientStream, frame: pb.Frame, payload: Buffer) -> None:
        """A frame from a client. Raises ProtocolError where the stream makes no sense; what is wrong with one request is answered."""
        client_id = frame.request
        request = client.requests.get(client_id)
        if request is None:
            if not _REQUEST_ID.match(client_id):
                raise ProtocolError(f"request id {client_id!r:.100} is not 1 to 64 characters of [A-Za-z0-9_-]")
            if client.ignores(client_id, frame.end) or frame.HasField("cancel"):
                return
            try:
                request = self._admit(client, frame)
            except SplitnetError as error:
                error.at(node=self._ledger.config.name, request=client_id)
                self._log.info("request refused", request=client_id, kind=type(error).__name__, error=error.message)
                client.refuse(client_id, error, complete=frame.end)
                return
        assert request.answer is not None
        if frame.HasField("cancel") or frame.HasField("failure"):
            request.answer.received = True
            self._ledger.cancel(request, frame.cancel.reason or "cancelled by the client")
            return
        if request.answer.received:
            request.answer.received = frame.end
            self._ledger.fail(
                request, AlreadyExists(f"request {client_id!r} is still being answered", remedy="give every request its own id")
            )
            return
        request.answer.received = frame.end
        try:
            if frame.HasField("tensor"):
                await self._take_input(request, request.answer, frame.tensor, payload)
            if frame.end and request.live:
                self._begin(request, request.answer)
        except SplitnetError as error:
            self._ledger.fail(request, error)

    def client_gone(self, client: ClientStream) -> None:
        for request in list(client.requests.values()):
            self._ledger.cancel(request, "the client has gone away")

    def _admit(self, client: ClientStream, frame: pb.Frame) -> Request:
        deployment = self._deployment(frame.deployment)
        if self._ledger.draining or deployment.draining:
            raise NodeUnavailable(
                "the node is being stopped and takes no new requests", remedy="try again once it has been started and deployed to"
            )
        for node in deployment.stopping:
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
        deployment.admission.enter()
        key = RequestKey(deployment.name, deployment.ingress.name, f"{frame.request[:_KEPT]}-{self._epoch}-{next(self._numbers):x}")
        request = self._ledger.open(key, deployment, frame.timeout_s)
        request.answer = Answer(client, frame.request, self._ledger.loop.time(), awaited=set(deployment.outputs))
        client.add(frame.request, request)
        for link in deployment.links.values():
            if not link.connected:
                link.hurry()  # and fail soon, if it cannot be
        return request

    def _deployment(self, name: str) -> Deployment:
        """The deployment of that name; without a name the only one whose ingress this node is."""
        deployments = self._ledger.deployments
        mine = [d for d in deployments.values() if d.is_ingress]
        if not name and len(mine) == 1:
            return mine[0]
        names = ", ".join(d.name for d in mine) or "none"
        if not name:
            raise NotFound(
                f"name a deployment; this node takes requests for: {names}",
                remedy="deploy a plan whose first stage is here" if not mine else "",
            )
        found = deployments.get(name)
        if found is None:
            raise NotFound(
                f"no deployment {name!r} here; this node takes requests for: {names}", remedy="deploy it, or check the name and the address"
            )
        if not found.is_ingress:
            raise NotFound(
                f"requests for {name!r} go to its first stage's node",
                remedy=f"connect to {found.ingress.name!r} at {found.ingress.address}",
            )
        return found

    async def _take_input(self, request: Request, answer: Answer, chunk: pb.TensorChunk, payload: Buffer) -> None:
        specs = request.deployment.inputs
        spec = specs.get(chunk.name)
        if spec is None:
            raise BadInput(f"there is no input {chunk.name!r:.100}", remedy=f"the inputs are {', '.join(specs)}")
        if chunk.name in answer.inputs:
            raise BadInput(f"input {chunk.name!r} was sent twice")
        array = await self._pipeline.decode(request, CLIENT, None, chunk, payload, check=lambda header: spec.check(header, answer.symbols))
        if array is not None:
            answer.inputs[chunk.name] = array

    def _begin(self, request: Request, answer: Answer) -> None:
        """All inputs are there: each goes to the stages that use it."""
        for name in request.deployment.inputs:
            if name not in answer.inputs:
                part = request.arriving
                raise BadInput(
                    f"input {name!r} is missing" + (" (a part of a tensor came)" if part else ""),
                    remedy="send every input, whole, before `end`",
                )
        inputs, answer.inputs = answer.inputs, {}
        for name in inputs:
            request.free((CLIENT, name))
        self._pipeline.deliver(request, inputs, request.deployment.input_routes, None)

    # -------------------------------------------------------------------------------------------------------------- answer

    def answer(self, request: Request, value: str, array: np.ndarray) -> None:
        """A value that makes up (a part of) the answer; the client gets it at once. Raises Overloaded, BadInput."""
        answer = request.answer
        assert answer is not None
        request.free((CLIENT, value))
        answer.awaited.discard(value)
        names = request.deployment.outputs[value]
        for name in names:

            def envelope() -> pb.Frame:
                return pb.Frame(request=answer.client_id, deployment=request.key.deployment)

            end = not answer.awaited and name is names[-1]
            tensor = EncodedTensor(name, array, "raw", self._pipeline.pool)
            parcel = Parcel(
                request.key,
                tensor,
                envelope,
                lambda parcel: self._sent(request, parcel),
                lambda _, error: self._ledger.fail(request, error),
                end,
            )
            request.hold(parcel, array.nbytes)
            answer.client.outbox.put(parcel)

    def _sent(self, request: Request, parcel: Parcel) -> None:
        request.free(parcel)
        if parcel.end and request.answer is not None:
            self._ledger.end(request, self._ledger.loop.time() - request.answer.started_s)
