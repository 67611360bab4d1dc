"""A request's way through this node: receive -> decode -> run -> encode -> send.

All of it happens in the event loop, except what an engine does (in the compute thread) and what a codec does with large chunks (in a
small pool). A request belongs to its ingress (`nodes.dispatch`): that node alone answers, fails and cancels it; the others report to
it, and drop what they are told to drop.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

import numpy as np

from nodes.compute import ComputeThread
from nodes.deployment import Deployment, Route, Stage
from nodes.generation.orders import Orders, decode_orders, encode_orders
from nodes.ledger import Ledger
from nodes.noising import StageNoise
from nodes.outbox import EncodedTensor, Parcel
from nodes.requests import Holder, RemembersReleases, Request, RequestKey
from splitnet.codecs import Buffer
from splitnet.errors import EngineFailure, NodeUnavailable, NotFound, Overloaded, ProtocolError, SplitnetError
from splitnet.plan import CLIENT
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.tensors import TensorSpec

__all__ = ["Pipeline"]

_INLINE_BYTES = 1 << 16  # decoding less than this takes less time than handing it to another thread
_SPARE = 8


class Pipeline:
    """What a request does on this node; how it ends stands in `nodes.ledger`."""

    def __init__(self, ledger: Ledger, compute: ComputeThread, pool: Executor) -> None:
        self.pool = pool
        self._ledger = ledger
        ledger.forget_sessions = self.sessions_closed
        self._loop = ledger.loop
        self._max_tensor_bytes = ledger.config.max_tensor_bytes
        self._compute = compute

    # ------------------------------------------------------------------------------------------------------------- receive

    async def take(self, key: RequestKey, stage: str, chunk: pb.TensorChunk, payload: Buffer, timeout_s: float, steps: bytes = b"") -> None:
        """A chunk from another node; a tensor without a name is the only one that is awaited there. Raises NotFound or ProtocolError for what no ingress can be told about: the sender must be."""
        deployment = self._ledger.deployments.get(key.deployment)
        if deployment is None:
            raise NotFound(f"this node does not serve deployment {key.deployment!r}", remedy="deploy the plan again: `splitnet deploy`")
        if key.ingress != deployment.ingress.name:
            raise ProtocolError(
                f"the ingress of {key.deployment!r} is {deployment.ingress.name!r}, not {key.ingress!r}", remedy="deploy the plan again"
            )
        request = self._ledger.requests.get(key)
        if request is None:
            if self._ledger.requests.has_ended(key) or deployment.is_ingress:
                return  # late
            try:
                request = self._open(key, deployment, timeout_s)
            except SplitnetError as error:
                self._ledger.requests.forget(key)
                self._ledger.report(deployment, key, error)
                return
        try:
            if steps:
                request.orders = decode_orders(steps)
            if not chunk.name:
                chunk.name = _only_name(request, stage)
            array = await self.decode(request, stage, self._awaited(request, stage, chunk.name), chunk, payload)
            if array is not None:
                self._arrive(request, stage, chunk.name, array)
        except SplitnetError as error:
            self._ledger.fail(request, error.at(stage=stage))

    def _open(self, key: RequestKey, deployment: Deployment, timeout_s: float) -> Request:
        if deployment.draining:
            raise NodeUnavailable("the deployment is being unloaded", remedy="deploy the plan again")
        # The ingress keeps to max_in_flight; it may be ahead by what is already answered there and not yet put away here.
        if self._ledger.requests.count(deployment) >= 2 * deployment.admission.limit + _SPARE:
            raise Overloaded("more requests came from the ingress than max_in_flight allows", retry_after_s=0.1)
        return self._ledger.open(key, deployment, self._ledger.deadline(timeout_s))

    def _awaited(self, request: Request, stage: str, name: str) -> TensorSpec | None:
        """What a tensor must look like; None for a part of the answer, which the stage that made it has checked."""
        if stage == CLIENT and request.owner is not None:
            if name not in request.awaited:
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
        request: Holder,
        stage: str,
        spec: TensorSpec | None,
        chunk: pb.TensorChunk,
        payload: Buffer,
        check: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray | None:
        """Puts the chunk in its place; the tensor once it is whole. `check` sees it (its header, in effect) before it is filled.
        None also when the request has ended meanwhile."""
        started = time.perf_counter()
        timed = request.deployment.stages.get(stage)  # none for CLIENT; and they may be gone after a pause
        assembler, new = request.assembler(stage, chunk, self._max_tensor_bytes)
        if new and spec is not None and (chunk.dtype != spec.dtype or len(chunk.shape) != len(spec.shape)):
            raise ProtocolError(
                f"value {spec.name!r}: expected {spec.dtype} with {len(spec.shape)} dimensions, got {chunk.dtype} {tuple(chunk.shape)}",
                remedy="cut and deploy the model again",
            )
        if new and check is not None:
            check(assembler.array())
        if len(payload) == chunk.length or chunk.length < _INLINE_BYTES:  # as good as raw
            whole = assembler.add(chunk, payload)
        else:
            whole = await self._loop.run_in_executor(self.pool, assembler.add, chunk, payload)
        if timed is not None:
            timed.decode_s += time.perf_counter() - started
        if not (whole and request.live):
            return None
        request.assembled(stage, chunk.name)
        return assembler.array()

    # ----------------------------------------------------------------------------------------------------------------- run

    def _arrive(self, request: Request, stage: str, name: str, array: np.ndarray) -> None:
        """A whole value is there, for a stage of this node or for the answer."""
        if stage == CLIENT:
            assert request.owner is not None, "only the ingress is sent parts of the answer"
            request.owner.take_output(request, name, array)
            return
        here = request.deployment.stages[stage]
        waiting = request.inputs.setdefault(stage, {})
        waiting[name] = array
        if len(waiting) == len(here.inputs):
            del request.inputs[stage]
            request.ran.add(stage)
            request.running += 1
            here.queued += 1
            self._compute.submit(functools.partial(self._run, request, here, waiting, time.perf_counter()))

    def _run(self, request: Request, stage: Stage, inputs: Mapping[str, np.ndarray], ready_s: float) -> None:
        """In the compute thread."""
        started = time.perf_counter()
        outcome: dict[str, np.ndarray] | SplitnetError | None = None
        if request.live and self._loop.time() < request.deadline_s:  # else nobody waits for it any more
            try:
                if request.orders is None:
                    outcome = stage.engine.run(inputs)
                    if stage.noise is not None:  # here, before anything else can see it
                        outcome = stage.noise.protect(outcome)
                else:
                    outcome = stage.sessions.run(stage.engine, request.orders, inputs, next(iter(stage.routes)))
            except SplitnetError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 # one request's failure, translated; the node goes on
                outcome = EngineFailure(f"the engine failed: {type(error).__name__}: {error}", remedy="see the node's log")
        self._compute.report(self._ran, request, stage, outcome, started - ready_s, time.perf_counter() - started)

    def _ran(
        self, request: Request, stage: Stage, outcome: dict[str, np.ndarray] | SplitnetError | None, wait_s: float, compute_s: float
    ) -> None:
        stage.queued -= 1
        request.running -= 1
        if outcome is None:
            return
        stage.requests += 1
        stage.wait_s += wait_s
        stage.compute_s += compute_s
        if isinstance(outcome, dict) and (missing := sorted(set(stage.routes) - set(outcome))):
            outcome = EngineFailure(f"the shard did not produce {missing[0]!r}", remedy="cut and deploy the model again")
        if isinstance(outcome, SplitnetError):
            stage.failures += 1
            self._ledger.fail(request, outcome.at(stage=stage.spec.name))
            return
        if not request.live:
            return
        for name in stage.inputs:
            request.free((stage.spec.name, name))
        if request.orders is not None:
            request.orders = request.orders.timed(compute_s, wait_s)
        if stage.noise is not None:
            try:
                outcome = self._only_once(request, stage.noise, outcome)
            except SplitnetError as error:
                self._ledger.fail(request, error.at(stage=stage.spec.name))
                return
        self.deliver(request, outcome, stage.routes, stage)

    @staticmethod
    def _only_once(request: Request, noise: StageNoise, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What leaves: where it has left before (and was lost with a node), what left then. New noise on the same values would tell more of them."""
        owner: object = request.owner
        assert isinstance(owner, RemembersReleases), "the stage with the raw input is the ingress's, and no plan that generates has noise"
        return owner.only_once(noise, values)

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
            self._ledger.fail(request, error.at(stage=stage.spec.name if stage else ""))
        self._close_if_done(request)

    def _deliver(self, request: Request, name: str, array: np.ndarray, targets: tuple[Route, ...], stage: Stage | None) -> None:
        own = request.deployment.node.name
        links = request.deployment.links
        takers = Counter(route.coding(links[route.node].goodput) for route in targets if route.node != own)
        said = name if request.orders is None else ""  # a decoder stage sends and awaits only one
        encoded = {coding: EncodedTensor(said, array, coding, self.pool, count) for coding, count in takers.items()}

        def sent(parcel: Parcel) -> None:
            if stage is not None:
                stage.encode_s += parcel.tensor.take_encode_s()
                stage.send_s += parcel.send_s
            request.free(parcel)
            request.unsent -= 1
            self._close_if_done(request)

        def failed(parcel: Parcel, error: SplitnetError) -> None:
            self._ledger.fail(request, error.at(stage=stage.spec.name if stage else ""))

        for route in targets:
            if not request.live:
                return
            if route.node == own:
                request.hold((route.stage, name), array.nbytes)
                self._arrive(request, route.stage, name, array)
            else:
                request.unsent += 1
                link = links[route.node]
                tensor = encoded[route.coding(link.goodput)]
                steps = b"" if request.orders is None else encode_orders(request.orders.onward(answer=route.stage == CLIENT))
                request.hold(link.send(request.key, route.stage, request.deadline_s, tensor, sent, failed, steps), array.nbytes)

    def run_here(self, deployment: Deployment, orders: Orders, then: Callable[[np.ndarray | SplitnetError], None]) -> None:
        """A pass of a decoder model that is whole on this node, apart from any request. `then` hears its tokens in the event loop; NodeUnavailable where it has gone."""

        def job() -> None:
            stage = next(iter(deployment.stages.values()), None)
            outcome: np.ndarray | SplitnetError
            try:
                if stage is None:
                    raise NodeUnavailable(f"{deployment.name!r} was unloaded", remedy="deploy it again")
                outcome = stage.sessions.run(stage.engine, orders, {}, "tokens")["tokens"]
            except SplitnetError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 # translated, as in `_run`
                outcome = EngineFailure(f"the engine failed: {type(error).__name__}: {error}", remedy="see the node's log")
            self._compute.report(then, outcome)

        self._compute.submit(job)

    def close_sessions(self, deployment: Deployment, orders: Orders) -> None:
        """At the ingress: frees what all stages hold of these sessions."""
        steps = encode_orders(orders)
        for name in {stage.node for stage in deployment.plan.stages} - {deployment.node.name}:
            deployment.links[name].send_orders(deployment.name, deployment.ingress.name, steps)
        self.sessions_closed(deployment, orders)

    def sessions_closed(self, deployment: Deployment | None, orders: Orders | None = None) -> None:
        """Of this node's stages; `orders` None: all of them, because the ingress has forgotten them."""
        for stage in () if deployment is None else deployment.stages.values():
            if orders is None and len(stage.sessions):
                self._compute.submit(functools.partial(stage.sessions.close_all, stage.engine))
            elif orders is not None:
                self._compute.submit(functools.partial(stage.sessions.close, stage.engine, orders.closes))

    def _close_if_done(self, request: Request) -> None:
        if request.live and request.owner is None and request.done:
            self._ledger.end(request)


def _only_name(request: Request, stage: str) -> str:
    """Raises ProtocolError where several tensors are awaited."""
    here = request.deployment.stages.get(stage)
    names = tuple(request.deployment.outputs) if stage == CLIENT else tuple(here.inputs) if here is not None else ()
    if len(names) != 1:
        raise ProtocolError(f"a tensor without a name, of the {len(names)} that stage {stage!r} awaits", remedy="deploy the plan again")
    return names[0]
