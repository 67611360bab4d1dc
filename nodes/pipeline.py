"""A request's way through this node: receive -> decode -> run -> encode -> send.

All of it happens in the event loop, except what an engine does (in the compute thread) and what a codec does with large chunks (in a
small pool). A request belongs to its ingress (`nodes.ingress`): that node alone answers, fails and cancels it; the others report to
it, and drop what they are told to drop.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np

from nodes.admission import Buffers
from nodes.compute import ComputeThread
from nodes.config import NodeConfig
from nodes.deployment import Deployment, Route, Stage
from nodes.link import Link
from nodes.logs import Log
from nodes.outbox import EncodedTensor, Parcel
from nodes.requests import Request, RequestKey, Requests
from splitnet.codecs import Buffer
from splitnet.errors import DeadlineExceeded, EngineFailure, NodeUnavailable, NotFound, Overloaded, ProtocolError, SplitnetError
from splitnet.plan import CLIENT, NodeRef
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec, dtype_name

if TYPE_CHECKING:
    from nodes.ingress import Ingress

__all__ = ["Pipeline"]

_INLINE_BYTES = 1 << 16  # decoding less than this takes less time than handing it to another thread
_SPARE = 8


class Pipeline:
    """The requests of all deployments on this node. Every method is to be called in the event loop."""

    ingress: Ingress  #: set by it

    def __init__(self, config: NodeConfig, compute: ComputeThread, pool: Executor, log: Log) -> None:
        self.config = config
        self.pool = pool
        self.log = log
        self.deployments: dict[str, Deployment] = {}
        self.requests = Requests()
        self.buffers = Buffers(config.buffer_bytes)
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._compute = compute
        self._ended = asyncio.Event()
        self._senders: dict[NodeRef, object] = {}

    # ------------------------------------------------------------------------------------------------------------- receive

    async def take(self, key: RequestKey, stage: str, chunk: pb.TensorChunk, payload: Buffer, timeout_s: float) -> None:
        """A chunk from another node. Raises NotFound or ProtocolError for what no ingress can be told about: the sender must be."""
        deployment = self.deployments.get(key.deployment)
        if deployment is None:
            raise NotFound(f"this node does not serve deployment {key.deployment!r}", remedy="deploy the plan again: `splitnet deploy`")
        if key.ingress != deployment.ingress.name:
            raise ProtocolError(
                f"the ingress of {key.deployment!r} is {deployment.ingress.name!r}, not {key.ingress!r}", remedy="deploy the plan again"
            )
        request = self.requests.get(key)
        if request is None:
            if self.requests.has_ended(key) or deployment.is_ingress:
                return  # late
            try:
                request = self._open(key, deployment, timeout_s)
            except SplitnetError as error:
                self.requests.forget(key)
                self._report(deployment, key, error)
                return
        try:
            array = await self.decode(request, stage, self._awaited(request, stage, chunk.name), chunk, payload)
            if array is not None:
                self._arrive(request, stage, chunk.name, array)
        except SplitnetError as error:
            self.fail(request, error.at(stage=stage))

    def _open(self, key: RequestKey, deployment: Deployment, timeout_s: float) -> Request:
        if self.draining or deployment.draining:
            raise NodeUnavailable("the node is being stopped", remedy="try again once it has been started and deployed to")
        # The ingress keeps to max_in_flight; it may be ahead by what is already answered there and not yet put away here.
        if self.requests.count(deployment) >= 2 * deployment.admission.limit + _SPARE:
            raise Overloaded("more requests came from the ingress than max_in_flight allows", retry_after_s=0.1)
        limit_s = self.config.request_s
        request = Request(key, deployment, self.loop.time() + (min(timeout_s, limit_s) if timeout_s > 0 else limit_s), self.buffers)
        self.watch(request)
        return request

    def watch(self, request: Request) -> None:
        """From here on it is live, and ends at its deadline at the latest."""
        self.requests.add(request)
        request.timer = self.loop.call_at(request.deadline_s, self._expired, request)

    def _awaited(self, request: Request, stage: str, name: str) -> TensorSpec | None:
        """What a tensor must look like; None for a part of the answer, which the stage that made it has checked."""
        if stage == CLIENT and request.answer is not None:
            if name not in request.answer.awaited:
                raise ProtocolError(f"value {name!r} is not awaited for the answer", remedy="deploy the plan again")
            return None
        here = request.deployment.stages.get(stage)
        if here is None:
            raise ProtocolError(f"there is no stage {stage!r} of {request.deployment.name!r} on this node", remedy="deploy the plan again")
        if name not in here.inputs or stage in request.ran or name in request.inputs.get(stage, ()):
            known = "is no input" if name not in here.inputs else "came twice"
            raise ProtocolError(f"value {name!r} {known} of stage {stage!r}", remedy="deploy the plan again")
        return here.inputs[name]

    # -------------------------------------------------------------------------------------------------------------- decode

    async def decode(
        self,
        request: Request,
        stage: str,
        spec: TensorSpec | None,
        chunk: pb.TensorChunk,
        payload: Buffer,
        check: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray | None:
        """Puts the chunk in its place; the tensor once it is whole. `check` sees it (its header, in effect) before it is filled.
        None also when the request has ended meanwhile."""
        started = time.perf_counter()
        assembler, new = request.assembler(stage, chunk, self.config.max_tensor_bytes)
        if new:
            _check_header(assembler.array(), spec)
            if check is not None:
                check(assembler.array())
        if len(payload) == chunk.length or chunk.length < _INLINE_BYTES:  # as good as raw
            whole = assembler.add(chunk, payload)
        else:
            whole = await self.loop.run_in_executor(self.pool, assembler.add, chunk, payload)
        if stage != CLIENT:
            request.deployment.stages[stage].decode_s += time.perf_counter() - started
        if not (whole and request.live):
            return None
        request.assembled(stage, chunk.name)
        return assembler.array()

    # ----------------------------------------------------------------------------------------------------------------- run

    def _arrive(self, request: Request, stage: str, name: str, array: np.ndarray) -> None:
        """A whole value is there, for a stage of this node or for the answer."""
        if stage == CLIENT:
            self.ingress.answer(request, name, array)
            return
        here = request.deployment.stages[stage]
        waiting = request.inputs.setdefault(stage, {})
        waiting[name] = array
        if len(waiting) == len(here.inputs):
            del request.inputs[stage]
            request.ran.add(stage)
            here.queued += 1
            self._compute.submit(functools.partial(self._run, request, here, waiting, time.perf_counter()))

    def _run(self, request: Request, stage: Stage, inputs: Mapping[str, np.ndarray], ready_s: float) -> None:
        """In the compute thread."""
        started = time.perf_counter()
        outcome: dict[str, np.ndarray] | SplitnetError | None = None
        if request.live and self.loop.time() < request.deadline_s:  # else nobody waits for it any more
            try:
                outcome = stage.engine.run(inputs)
            except SplitnetError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 # one request's failure, translated; the node goes on
                outcome = EngineFailure(f"the engine failed: {type(error).__name__}: {error}", remedy="see the node's log")
        self._compute.report(self._ran, request, stage, outcome, started - ready_s, time.perf_counter() - started)

    def _ran(
        self, request: Request, stage: Stage, outcome: dict[str, np.ndarray] | SplitnetError | None, wait_s: float, compute_s: float
    ) -> None:
        stage.queued -= 1
        if outcome is None:
            return
        stage.requests += 1
        stage.wait_s += wait_s
        stage.compute_s += compute_s
        if isinstance(outcome, dict) and (missing := sorted(set(stage.routes) - set(outcome))):
            outcome = EngineFailure(f"the shard did not produce {missing[0]!r}", remedy="cut and deploy the model again")
        if isinstance(outcome, SplitnetError):
            stage.failures += 1
            self.fail(request, outcome.at(stage=stage.spec.name))
            return
        if not request.live:
            return
        for name in stage.inputs:
            request.free((stage.spec.name, name))
        self.deliver(request, outcome, stage.routes, stage)

    # ------------------------------------------------------------------------------------------------------ encode and send

    def deliver(
        self, request: Request, values: Mapping[str, np.ndarray], routes: Mapping[str, tuple[Route, ...]], stage: Stage | None
    ) -> None:
        """Each value goes to every stage that awaits it: on this node as it is, elsewhere over a link. `stage`: where they come
        from; None for the client's inputs."""
        try:
            for name, targets in routes.items():
                self._deliver(request, name, values[name], targets, stage)
        except SplitnetError as error:
            self.fail(request, error.at(stage=stage.spec.name if stage else ""))
        self._close_if_done(request)

    def _deliver(self, request: Request, name: str, array: np.ndarray, targets: tuple[Route, ...], stage: Stage | None) -> None:
        own = request.deployment.node.name
        takers = Counter(route.codec for route in targets if route.node != own)
        encoded = {codec: EncodedTensor(name, array, codec, self.pool, count) for codec, count in takers.items()}

        def sent(parcel: Parcel) -> None:
            if stage is not None:
                stage.encode_s += parcel.tensor.take_encode_s()
                stage.send_s += parcel.send_s
            request.free(parcel)
            request.unsent -= 1
            self._close_if_done(request)

        def failed(parcel: Parcel, error: SplitnetError) -> None:
            self.fail(request, error.at(stage=stage.spec.name if stage else ""))

        for route in targets:
            if not request.live:
                return
            if route.node == own:
                request.hold((route.stage, name), array.nbytes)
                self._arrive(request, route.stage, name, array)
            else:
                request.unsent += 1
                link = request.deployment.links[route.node]
                request.hold(link.send(request.key, route.stage, request.deadline_s, encoded[route.codec], sent, failed), array.nbytes)

    # ----------------------------------------------------------------------------------------------------------------- end

    def _close_if_done(self, request: Request) -> None:
        if request.live and request.answer is None and request.done:
            self.end(request)

    def fail(self, request: Request, error: SplitnetError) -> None:
        """Ends the request here and, through its ingress, everywhere."""
        if not request.live:
            return
        error.at(node=request.deployment.node.name, request=request.key.request)
        if request.answer is not None:
            self.ingress.refuse(request, error)
            self._tell_others(request, error.message)
        else:
            self._report(request.deployment, request.key, error)
        self.end(request)

    def cancel(self, request: Request, reason: str) -> None:
        """At the ingress: ends the request everywhere, and tells the client nothing."""
        if request.live:
            self.log.info("request cancelled", request=request.key.request, deployment=request.key.deployment, reason=reason)
            self._tell_others(request, reason)
            self.end(request)

    def dropped_by_ingress(self, key: RequestKey) -> None:
        request = self.requests.get(key)
        if request is not None:
            self.end(request)
        else:
            self.requests.forget(key)  # the cancellation has overtaken the tensors

    def failed_elsewhere(self, key: RequestKey, error: SplitnetError) -> None:
        request = self.requests.get(key)
        if request is not None:
            self.fail(request, error)

    def end(self, request: Request, service_s: float | None = None) -> None:
        """Frees everything that the request holds here. `service_s`: how long its answer took, at the ingress."""
        if not request.live:
            return
        request.end()
        self.requests.forget(request.key)
        for link in request.deployment.links.values():
            link.outbox.drop(request.key)
        if request.answer is not None:
            request.deployment.admission.leave(service_s)
            request.answer.client.remove(request.answer.client_id, complete=request.answer.received)
        self._ended.set()

    async def idle(self, timeout_s: float, deployment: Deployment | None = None) -> bool:
        """Waits until no request (of that deployment) is live; False when the time runs out first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.requests.count(deployment):
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def cancel_all(self, deployment: Deployment | None, error: Callable[[], SplitnetError]) -> int:
        """Fails what is still in flight; returns how many requests that were."""
        requests = [request for request in self.requests if deployment is None or request.deployment is deployment]
        for request in requests:
            self.fail(request, error())
        return len(requests)

    def _expired(self, request: Request) -> None:
        if request.answer is None:
            self.end(request)  # the ingress has noticed by itself
            return
        waiting = ", ".join(sorted(request.answer.awaited)) or "inputs"
        self.fail(
            request,
            DeadlineExceeded(
                f"the request's time ran out; still missing: {waiting}",
                remedy="give it more time, or see `splitnet status` for the slowest stage",
            ),
        )

    def _report(self, deployment: Deployment, key: RequestKey, error: SplitnetError) -> None:
        self.log.warning(
            "request failed",
            deployment=key.deployment,
            kind=type(error).__name__,
            error=error.message,
            stage=error.stage,
            request=key.request,
        )
        error.at(node=deployment.node.name)
        if (link := deployment.links.get(key.ingress)) is not None:
            link.send_failure(key, error)

    def _tell_others(self, request: Request, reason: str) -> None:
        for link in request.deployment.links.values():
            link.outbox.drop(request.key)
            link.send_cancel(request.key, reason)

    # --------------------------------------------------------------------------------------------------- nodes that go away

    def link_down(self, link: Link, error: SplitnetError, lost: list[RequestKey]) -> None:
        may_be_lost = set(lost)
        for request in self.requests:
            deployment = request.deployment
            if deployment.links.get(link.target.name) is not link:
                continue
            if deployment.is_ingress or (link.target != deployment.ingress and request.key in may_be_lost):
                self.fail(request, _gone(deployment, link.target, error))
            elif link.target == deployment.ingress:
                self.end(request)
            may_be_lost.discard(request.key)
        for key in may_be_lost:  # sent from here to the last byte, and perhaps never received
            known = self.deployments.get(key.deployment)
            if known is not None and not known.is_ingress and link.target != known.ingress:
                self._report(known, key, _gone(known, link.target, error))

    def refused(self, link: Link, key: RequestKey, error: SplitnetError) -> None:
        """The far side could not take what this node sent."""
        deployment = self.deployments.get(key.deployment)
        if deployment is None:
            return
        error.at(node=link.target.name)
        if deployment.is_ingress:
            self.failed_elsewhere(key, error)
        else:
            self._report(deployment, key, error)

    def sender_opened(self, sender: NodeRef) -> object:
        """A node has opened its Forward stream to this one. It has given up whatever it sent on an earlier one."""
        self._drop_requests_of(sender)
        self._senders[sender] = token = object()
        return token

    def sender_closed(self, sender: NodeRef, token: object) -> None:
        if self._senders.get(sender) is token:
            del self._senders[sender]
            self._drop_requests_of(sender)

    def _drop_requests_of(self, ingress: NodeRef) -> None:
        for request in self.requests:
            if request.answer is None and request.deployment.ingress == ingress:
                self.end(request)


def _check_header(array: np.ndarray, spec: TensorSpec | None) -> None:
    if spec is not None and (dtype_name(array.dtype) != spec.dtype or array.ndim != len(spec.shape)):
        raise ProtocolError(
            f"value {spec.name!r}: expected {spec.dtype} with {len(spec.shape)} dimensions, got {array.dtype} {array.shape}",
            remedy="cut and deploy the model again",
        )


def _gone(deployment: Deployment, node: NodeRef, error: SplitnetError) -> NodeUnavailable:
    stages = deployment.stages_on(node.name)
    return NodeUnavailable(
        f"the connection to {node.address} is gone: {error.message}",
        remedy=f"start the node {node.name!r} again and deploy the plan again, or make a plan without it",
        node=node.name,
        stage=stages,
    )
