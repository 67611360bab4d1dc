"""The requests on this node, and every way in which one ends: answered, failed, cancelled, out of time, or lost with a node. What becomes of
the clients' calls that a request carried is their ingress's business (`nodes.dispatch`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from nodes.admission import Buffers
from nodes.calls import Calls
from nodes.config import NodeConfig
from nodes.deployment import Deployment
from nodes.events import Events
from nodes.family import Families
from nodes.link import Link
from nodes.logs import Log
from nodes.requests import Owner, Request, RequestKey, Requests
from splitnet.errors import NodeUnavailable, NotFound, SplitnetError, UserError
from splitnet.plan import NodeRef

__all__ = ["Ledger", "Recovers", "node_gone"]


class Recovers(Protocol):
    """Who mends deployments that are entered here: see `nodes.recovery`."""

    def link_down(self, link: Link, error: SplitnetError) -> None: ...
    def link_up(self, link: Link) -> None: ...
    def reported(self, deployment: Deployment, error: SplitnetError) -> None: ...
    def switched(self, family: str) -> None: ...
    def node_stops(self, deployment: Deployment, node: str) -> bool: ...
    def hopeful(self, deployment: Deployment) -> bool: ...
    def replayed(self, deployment: Deployment, calls: int) -> None: ...


class Ledger:
    """Whoever ends a request does it here, once: what it holds on this node is freed at that moment, and the other nodes are told
    (by the ingress) or the ingress is (by the others). To be used in the event loop."""

    recovery: Recovers  #: set by it
    forget_sessions: Callable[
        [Deployment], None
    ]  #: set by the pipeline: the ingress of a decoder model knows none of its sessions any more

    def __init__(self, config: NodeConfig, log: Log) -> None:
        self.config = config
        self.log = log
        self.loop = asyncio.get_running_loop()
        self.deployments: dict[str, Deployment] = {}  # by their keys
        self.families = Families(self.deployments)
        self.requests = Requests()
        self.buffers = Buffers(config.buffer_bytes)
        self.calls = Calls(log, self.buffers, self._one_less)
        self.events = Events(log)
        self.draining = False
        self._ended = asyncio.Event()
        self._senders: dict[NodeRef, object] = {}

    def deadline(self, timeout_s: float) -> float:
        """By the event loop's clock. `timeout_s`: 0 for the node's limit."""
        limit_s = self.config.request_s
        return self.loop.time() + (min(timeout_s, limit_s) if timeout_s > 0 else limit_s)

    def open(self, key: RequestKey, deployment: Deployment, deadline_s: float, owner: Owner | None = None) -> Request:
        """A new request; it ends at its deadline at the latest, or (at its ingress) with the last call that it carries."""
        request = Request(key, deployment, deadline_s, self.buffers)
        self.requests.add(request)
        if owner is None:
            request.timer = self.loop.call_at(deadline_s, self.end, request)  # the ingress notices by itself
        else:
            request.owner, request.awaited = owner, set(deployment.outputs)
        return request

    def end(self, request: Request, error: SplitnetError | None = None) -> None:
        """Frees everything that the request holds here; its owner hears of it."""
        if not request.live:
            return
        request.end()
        self.requests.forget(request.key)
        for link in request.deployment.links.values():
            link.outbox.drop(request.key)
        if request.owner is not None:
            request.owner.ended(request, error)
        self._one_less(request.deployment)

    def _one_less(self, deployment: Deployment) -> None:
        self._ended.set()
        if deployment.stopping:
            self.release_if_empty(deployment)

    def in_flight(self, deployment: Deployment | None = None) -> int:
        """Of one deployment, or of all: what clients wait for at their ingress, elsewhere what is under way."""
        if deployment is not None and deployment.heir is not None:  # whose calls these are now
            return self.requests.count(deployment)
        return self.calls.count(deployment) + sum(
            request.owner is None and deployment in (None, request.deployment) for request in self.requests
        )

    # ------------------------------------------------------------------------------------------------------ for one request

    def fail(self, request: Request, error: SplitnetError) -> None:
        """Ends the request here and, through its ingress, everywhere."""
        if not request.live:
            return
        error.at(node=request.deployment.node.name)
        if request.owner is None:
            self.report(request.deployment, request.key, error)
        else:
            self._tell_others(request, error.message)
        self.end(request, error)

    def cancel(self, request: Request, reason: str) -> None:
        """At the ingress: ends the request everywhere."""
        if request.live:
            self._tell_others(request, reason)
            self.end(request)

    def report(self, deployment: Deployment, key: RequestKey, error: SplitnetError) -> None:
        """Tells the ingress that a request has failed here."""
        error.at(node=deployment.node.name, request=key.request)
        self._log_failure(key, error)
        if (link := deployment.links.get(key.ingress)) is not None:
            link.send_failure(key, error)

    def dropped_by_ingress(self, key: RequestKey) -> None:
        request = self.requests.get(key)
        if request is not None:
            self.end(request)
        else:
            self.requests.forget(key)  # the cancellation has overtaken the tensors

    def failed_elsewhere(self, key: RequestKey, error: SplitnetError) -> None:
        request = self.requests.get(key)
        if request is not None:
            if request.owner is not None and isinstance(error, NodeUnavailable):
                self.recovery.reported(request.deployment, error)
            self.fail(request, error)

    def _tell_others(self, request: Request, reason: str) -> None:
        for link in request.deployment.links.values():
            link.outbox.drop(request.key)
            link.send_cancel(request.key, reason)

    def _log_failure(self, key: RequestKey, error: SplitnetError) -> None:
        tell = self.log.info if isinstance(error, UserError) else self.log.warning
        tell("request failed", **key._asdict(), kind=type(error).__name__, error=error.message, at=error.node, stage=error.stage)

    # -------------------------------------------------------------------------------------------------------- for all of them

    async def idle(self, timeout_s: float, deployment: Deployment | None = None) -> bool:
        """Waits until nothing (of that deployment) is in flight; False when the time runs out first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.in_flight(deployment):
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def fail_all(self, deployment: Deployment | None, error: Callable[[], SplitnetError]) -> int:
        """Fails what is in flight (of that deployment); returns how many requests that were."""
        calls = [call for call in self.calls if deployment in (None, call.deployment)]
        for call in sorted(
            calls, key=lambda call: len(call.requests)
        ):  # those that wait first: or they would set out only to be turned back
            self.calls.fail(call, error())
        requests = [request for request in self.requests if deployment in (None, request.deployment)]
        for request in requests:
            self.fail(request, error())
        return len(calls) + len(requests)

    # -------------------------------------------------------------------------------------------------------- nodes that stop

    async def leave(self, timeout_s: float) -> bool:
        """Tells each ingress, which then admits nothing new, and waits until it has said that nothing is in flight any more: only the
        ingress knows what is still to come here, and its requests need this node's links until they are answered. An ingress that
        cannot be reached has nothing in flight. False when the time runs out first."""
        elsewhere = [deployment for deployment in self.deployments.values() if not deployment.is_ingress]
        for deployment in elsewhere:
            deployment.released.clear()
            own, ingress = deployment.node.name, deployment.ingress.name
            if (link := deployment.links.get(ingress)) is not None:
                link.send_stopping(deployment.name, ingress, NodeUnavailable(f"node {own!r} is stopping", node=own))
            else:
                deployment.released.set()
        try:
            async with asyncio.timeout(timeout_s):
                for deployment in elsewhere:
                    await deployment.released.wait()
        except TimeoutError:
            return False
        return True

    def node_stops(self, deployment: str, node: str) -> None:
        """At the ingress: that node finishes what was admitted, and then goes."""
        known = self.deployments.get(deployment)
        if known is not None and known.is_ingress and node in known.links:
            self.log.info("node stops", node=node, deployment=deployment, in_flight=self.in_flight(known))
            known.stopping.add(node)
            if known.plan.stages_at(node) and not self.recovery.node_stops(known, node):
                known.closing.add(node)
            self.release_if_empty(known)

    def released(self, deployment: str) -> None:
        if (known := self.deployments.get(deployment)) is not None:
            known.released.set()

    def release_if_empty(self, deployment: Deployment) -> None:
        """Lets nodes go that have said that they stop."""
        if not self.in_flight(deployment):
            for node in deployment.stopping:
                deployment.links[node].send_released(deployment.name, deployment.ingress.name)

    # --------------------------------------------------------------------------------------------------- nodes that go away

    def link_up(self, link: Link) -> None:
        """Connected, for the first time or again."""
        self.recovery.link_up(link)

    def link_down(self, link: Link, error: SplitnetError, lost: list[RequestKey]) -> None:
        """The ingress fails everything that needs the node: it cannot know how far each request was. Another node reports what it may
        have lost on the way."""
        for deployment in self.deployments.values():
            if deployment.links.get(link.target.name) is link:
                deployment.stopping.discard(link.target.name)
                deployment.closing.discard(link.target.name)
                if link.target == deployment.ingress:
                    deployment.released.set()
        self.recovery.link_down(link, error)
        may_be_lost = set(lost)
        for request in self.requests:
            deployment = request.deployment
            if deployment.links.get(link.target.name) is not link:
                continue
            if deployment.is_ingress and not deployment.plan.stages_at(link.target.name):
                continue  # it only held something ready
            if deployment.is_ingress or (link.target != deployment.ingress and request.key in may_be_lost):
                self.fail(request, node_gone(deployment, link.target, error))
            elif link.target == deployment.ingress:
                self.end(request)
            may_be_lost.discard(request.key)
        for key in may_be_lost:  # sent from here to the last byte, and perhaps never received
            known = self.deployments.get(key.deployment)
            if known is not None and not known.is_ingress and link.target != known.ingress:
                self.report(known, key, node_gone(known, link.target, error))

    def refused(self, link: Link, key: RequestKey, error: SplitnetError) -> None:
        """The far side could not take what this node sent."""
        deployment = self.deployments.get(key.deployment)
        if deployment is None:
            return
        error.at(node=link.target.name)
        if isinstance(error, NotFound):  # it was started anew
            error = NodeUnavailable(error.message, remedy=error.remedy, node=error.node)
        if deployment.is_ingress:
            self.failed_elsewhere(key, error)
        else:
            self.report(deployment, key, error)

    def sender_opened(self, sender: NodeRef) -> object:
        """A node has opened its Forward stream to this one. It has given up whatever it sent on an earlier one."""
        self._drop_requests_of(sender)
        self._senders[sender] = token = object()
        return token

    def sender_closed(self, sender: NodeRef, token: object) -> None:
        """Its stream has ended; `token` says which, since a newer one may have taken its place."""
        if self._senders.get(sender) is token:
            del self._senders[sender]
            self._drop_requests_of(sender)
            for deployment in self.deployments.values():
                if deployment.ingress == sender:
                    deployment.released.set()

    def _drop_requests_of(self, ingress: NodeRef) -> None:
        for request in self.requests:
            if request.owner is None and request.deployment.ingress == ingress:
                self.end(request)
        for deployment in self.deployments.values():
            if deployment.ingress == ingress and not deployment.is_ingress:
                self.forget_sessions(deployment)


def node_gone(deployment: Deployment, node: NodeRef, error: SplitnetError) -> NodeUnavailable:
    return NodeUnavailable(
        f"the connection to {node.address} is gone: {error.message}",
        remedy=f"start the node {node.name!r} again and deploy the plan again, or make a plan without it",
        node=node.name,
        stage=deployment.stages_on(node.name),
    )
