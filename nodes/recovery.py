"""What becomes of a deployment that has lost a node, at its ingress: its calls wait, somebody takes the node's place or the node comes back,
and what was under way is sent again.

The ways out, in this order: the connection comes back (a moment's break); a standby that the plan names takes over; the node comes back and is
given its stages again; whoever watches the deployment (`splitnet watch`) brings another plan. While one of them may still happen, calls wait, up to
their deadlines; otherwise they fail at once, with what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any

from nodes.deployment import Deployment
from nodes.events import Events
from nodes.installer import Installer
from nodes.ledger import Ledger
from nodes.link import Link
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import AlreadyExists, NodeUnavailable, ServiceError, SplitnetError
from splitnet.installation import switch_node, unload_node
from splitnet.plan import NodeRef, Plan
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.standby import followers, plan_without

__all__ = ["Recovery"]

_WARM_S = 2.0  # a standby has everything loaded; one that takes longer is as good as lost
_LOAD_S = 600.0  # a node that comes back reads its shards again
_SETTLE_S = 0.1  # after something was reported lost between two other nodes, before it is sent again
_BOTH_S = 10.0  # an ingress that was lost to this node, and not to its clients, goes on for so long
_TWICE_S = 10.0  # a node that others report lost twice within that time is lost, though this one reaches it


@dataclass(eq=False)
class _Trouble:
    """Of one deployment. `lost`: nodes that serve a stage, and why they are missing."""

    since_s: float
    lost: dict[str, SplitnetError] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)  # of the lost: those that cannot be reached, as a second look showed
    settle: bool = False  # others have reported a loss
    hopeless: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Recovery:
    """`advance`: sends what waits for a deployment."""

    def __init__(self, ledger: Ledger, installer: Installer, advance: Callable[[Deployment], None]) -> None:
        self.events: Events = ledger.events
        self._ledger = ledger
        self._installer = installer
        self._advance = advance
        self._log = ledger.log
        self._troubles: dict[Deployment, _Trouble] = {}
        self._absent: dict[Deployment, set[str]] = {}  # nodes that may not hold it any more
        self._reports: dict[tuple[str, str], float] = {}  # when others last reported a node of a family lost
        self._ancestors: dict[Deployment, list[int]] = {}  # generations that were replaced, which a lost node may still hold
        self._watched_until_s: dict[str, float] = {}  # by family
        self._succeeding: set[Deployment] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        ledger.recovery = self

    # --------------------------------------------------------------------------------------------------------- what happened

    def link_down(self, link: Link, error: SplitnetError) -> None:
        """Before the requests that it lost are failed."""
        node, was_up = link.target.name, link.was_up
        if link.fell_silent or not was_up:
            for deployment in self._orphaned(link):
                self._succeeding.add(deployment)
                self._spawn(self._succeed(deployment))
        for deployment in self._of(link):
            self._absent.setdefault(deployment, set()).add(node)
            trouble = self._troubles.get(deployment)
            if was_up:
                self.events.add("lost", node=node, deployment=deployment.name, text=error.message)
            if not deployment.plan.stages_at(node):
                continue  # it held something ready, no more
            if trouble is None or node not in trouble.lost:
                trouble = self._begin(deployment)
                trouble.hopeless = False
            trouble.lost[node] = error
            if link.fell_silent or not was_up:
                trouble.tried.add(node)
            self._judge(deployment, trouble)
            trouble.changed.set()

    def link_up(self, link: Link) -> None:
        node = link.target.name
        for deployment in self._of(link):
            if node in self._absent.get(deployment, ()):
                self._spawn(self._take_in(deployment, link.target))

    def reported(self, deployment: Deployment, error: SplitnetError) -> None:
        """Another node has lost what it sent, or does not hold the deployment any more. `error.node`: who is missing there."""
        if deployment.heir is not None or deployment.draining:
            return
        node, now_s = error.node, self._ledger.loop.time()
        known = node in deployment.links and bool(deployment.plan.stages_at(node))
        before_s = self._reports.get((deployment.family, node))
        trouble = self._begin(deployment)
        if known:
            self._absent.setdefault(deployment, set()).add(node)
            if node not in trouble.lost:
                trouble.lost[node] = error
                self._reports[deployment.family, node] = now_s
                if before_s is not None and now_s - before_s < _TWICE_S:
                    trouble.tried.add(node)
        trouble.settle = True
        self._judge(deployment, trouble)
        trouble.changed.set()

    def node_stops(self, deployment: Deployment, node: str) -> bool:
        """Whether somebody takes over before it goes; what is under way there is finished there."""
        if self._plan(deployment, {node}) is None:
            return False
        self._spawn(self._relieve(deployment, node))
        return True

    def watched(self, family: str, lease_s: float, hopeless: str) -> list[str]:
        """Somebody looks after it and would bring another plan, or has found why there is none. Returns the nodes that it lacks."""
        self._watched_until_s[family] = self._ledger.loop.time() + (0.0 if hopeless else lease_s)
        lost = []
        for deployment, trouble in list(self._troubles.items()):
            if deployment.family == family and self._is_current(deployment):
                lost += sorted(trouble.lost)
                if hopeless and self._hope_s(deployment, trouble) <= 0:
                    self._fail(deployment, trouble, hopeless)
                trouble.changed.set()
        return lost

    def hopeful(self, deployment: Deployment) -> bool:
        """Whether what was lost should wait to be sent again."""
        deployment = _newest(deployment)
        trouble = self._troubles.get(deployment)
        return not deployment.draining and (trouble is None or not trouble.hopeless)

    def replayed(self, deployment: Deployment, calls: int) -> None:
        self.events.add("replayed", deployment=deployment.family, text=f"{calls} requests are sent again")

    async def close(self) -> None:
        tasks = [*self._tasks, *(trouble.task for trouble in self._troubles.values() if trouble.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------------------------- judging

    def _of(self, link: Link) -> list[Deployment]:
        """Those that are entered here and need the link."""
        return [
            d
            for d in self._ledger.deployments.values()
            if d.is_ingress and d.heir is None and not d.draining and d.links.get(link.target.name) is link
        ]

    @staticmethod
    def _is_current(deployment: Deployment) -> bool:
        """It has no heir."""
        return deployment.heir is None

    def _orphaned(self, link: Link) -> list[Deployment]:
        """Those whose ingress the link leads to, and where it is for this node to follow it."""
        return [
            d
            for d in self._ledger.deployments.values()
            if d.ingress == link.target
            and d.heir is None
            and not d.draining
            and d not in self._succeeding
            and d.links.get(link.target.name) is link
            and self._is_next(d)
        ]

    def _is_next(self, deployment: Deployment) -> bool:
        """Among those that follow the ingress: the others before it are gone, too."""
        order = followers(deployment.plan)
        if deployment.node.name not in order:
            return False
        before = order[: order.index(deployment.node.name)]
        return not any(link.connected for name, link in deployment.links.items() if name in before)

    def _begin(self, deployment: Deployment) -> _Trouble:
        trouble = self._troubles.get(deployment)
        if trouble is None:
            trouble = self._troubles[deployment] = _Trouble(self._ledger.loop.time())
            trouble.task = asyncio.create_task(self._recover(deployment, trouble), name=f"recovery of {deployment.name}")
        return trouble

    def _judge(self, deployment: Deployment, trouble: _Trouble) -> None:
        """Whether calls wait, or go on and fail."""
        left_s = self._hope_s(deployment, trouble)
        if left_s <= 0 and not trouble.hopeless:
            missing = "; ".join(error.message for error in trouble.lost.values())
            self.events.add("unrecoverable", node=", ".join(trouble.lost), deployment=deployment.name, text=missing)
        trouble.hopeless = left_s <= 0
        deployment.paused = not trouble.hopeless

    def _hope_s(self, deployment: Deployment, trouble: _Trouble) -> float:
        """For how long there is hope as things are; not positive: none."""
        now_s = self._ledger.loop.time()
        if set(trouble.lost) - trouble.tried or trouble.settle or self._plan(deployment, trouble.tried) is not None:
            return _LOAD_S
        patience_s = trouble.since_s + self._ledger.config.recovery_s - now_s
        return max(patience_s, self._watched_until_s.get(deployment.family, now_s) - now_s)

    def _plan(self, deployment: Deployment, gone: Collection[str]) -> Plan | None:
        """Without those nodes; None where nobody takes their place."""
        family = self._ledger.families.get(deployment.family)
        if family is None or family.active != deployment.generation:
            return None
        alive = {deployment.node.name, *(name for name, link in deployment.links.items() if link.connected)} - set(gone)
        try:
            return plan_without(deployment.plan, gone, alive)
        except SplitnetError:
            return None

    # --------------------------------------------------------------------------------------------------------------- mending

    async def _recover(self, deployment: Deployment, trouble: _Trouble) -> None:
        """Until the deployment is whole, has an heir, or is gone."""
        try:
            while self._is_current(deployment) and self._ledger.deployments.get(deployment.name) is deployment:
                trouble.changed.clear()
                if gone := trouble.tried & set(trouble.lost):
                    await self._replace(deployment, gone)
                    if not self._is_current(deployment):
                        return
                if trouble.settle:
                    await asyncio.sleep(_SETTLE_S)
                    trouble.settle = False
                    for node in set(trouble.lost) - trouble.tried:
                        if deployment.links[node].connected:
                            await self._take_in(deployment, deployment.links[node].target)
                if not trouble.lost:
                    return
                self._judge(deployment, trouble)
                if trouble.hopeless:
                    self._fail(deployment, trouble)
                await self._something(trouble, self._hope_s(deployment, trouble))
        finally:
            del self._troubles[deployment]
            deployment.paused = False
            self._advance(_newest(deployment))

    async def _something(self, trouble: _Trouble, hope_s: float) -> None:
        """Happens, or hope has ended."""
        try:
            async with asyncio.timeout(hope_s if hope_s > 0 else None):
                await trouble.changed.wait()
        except TimeoutError:
            pass

    def _fail(self, deployment: Deployment, trouble: _Trouble, reason: str = "") -> None:
        """All of its calls, by what is missing."""
        trouble.hopeless, deployment.paused = True, False
        node, first = next(iter(trouble.lost.items()))
        where = deployment.links[node].target
        remedy = f"start the node {node!r} again and deploy the plan again, or make a plan without it"

        def error() -> SplitnetError:
            missing = reason or f"the connection to {where.address} is gone: {first.message}"
            return NodeUnavailable(missing, remedy=remedy, node=node, stage=deployment.stages_on(node))

        for call in self._ledger.calls:
            if call.deployment is deployment:
                self._ledger.calls.fail(call, error())

    async def _replace(self, deployment: Deployment, gone: Collection[str]) -> None:
        """The next generation, without those nodes, takes over. Leaves no heir where nobody can."""
        without = set(gone)
        generation = max(d.generation for d in self._ledger.deployments.values() if d.family == deployment.family)
        while (plan := self._plan(deployment, without)) is not None and deployment.heir is None:
            generation += 1
            alive = [n for n in plan.used_nodes if n.name not in without and (n == deployment.node or deployment.links[n.name].connected)]
            try:
                failed = await self._activate(deployment, plan, generation, alive)
            except AlreadyExists:  # some node knows more generations than this one
                continue
            if not failed:
                self._hand_over(deployment, generation, set(gone) | without, alive)
                return
            without |= failed

    async def _activate(self, deployment: Deployment, plan: Plan, generation: int, nodes: list[NodeRef]) -> set[str]:
        """Loads the generation at those nodes, its ingress last; returns those that serve a stage of it and failed to."""
        others = [node for node in nodes if node != deployment.node]
        outcomes = await asyncio.gather(
            *(self._activate_at(node, deployment.family, plan, generation, _WARM_S) for node in others), return_exceptions=True
        )
        failed = set()
        for node, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                if not isinstance(outcome, SplitnetError) or isinstance(outcome, AlreadyExists):
                    raise outcome
                self._log.warning("a node could not take over", about=node.name, error=outcome.message)
                if plan.stages_at(node.name):
                    failed.add(node.name)
        if not failed:
            await self._installer.activate(
                deployment.family, plan.to_json().encode(), deployment.node.name, {}, generation=generation, wait=True
            )
        return failed

    async def _activate_at(self, node: NodeRef, family: str, plan: Plan, generation: int, timeout_s: float) -> None:
        request = pb.ActivateRequest(
            deployment=family, plan_json=plan.to_json().encode(), node=node.name, generation=generation, wait=generation > 1
        )
        async with open_channel(node.address, node=node.name) as channel:
            with translated(node.address):
                await stub(channel).Activate(request, timeout=timeout_s)

    def _hand_over(self, deployment: Deployment, generation: int, gone: Collection[str], alive: list[NodeRef]) -> None:
        """The calls of the old generation become the new one's; what is under way is finished, or lost and sent again."""
        heir = next(d for d in self._ledger.deployments.values() if d.family == deployment.family and d.generation == generation)
        heir.line, heir.admission = deployment.line, deployment.admission
        deployment.heir = heir
        moved = 0
        for call in self._ledger.calls:
            if call.deployment is deployment:
                call.deployment, moved = heir, moved + 1
        family = self._ledger.families.get(deployment.family)
        assert family is not None, "it holds both"
        kept = family.kept
        self._installer.switch(deployment.family, generation, 1.0, "", keep=False)
        family.kept = kept  # what an update may go back to is another matter
        self._ancestors[heir] = [*self._ancestors.pop(deployment, []), deployment.generation]
        held = {node.name for node in heir.plan.used_nodes}
        self._absent[heir] = (set(gone) | self._absent.pop(deployment, set())) & held
        places = ", ".join(f"{s.name} at {s.node}" for s in heir.plan.stages if s.node != deployment.plan.stage(s.name).node)
        self.events.add("replaced", node=", ".join(sorted(gone)), deployment=heir.name, text=f"{places}; {moved} requests wait")
        self._spawn(self._retire(deployment, heir, alive))
        for link in heir.links.values():  # it may have come back, or gone, while the others were asked
            if link.connected and link.target.name in self._absent[heir]:
                self._spawn(self._take_in(heir, link.target))
            elif not link.connected and heir.plan.stages_at(link.target.name):
                self.link_down(link, NodeUnavailable(f"no connection to {link.target.address}"))

    async def _retire(self, old: Deployment, heir: Deployment, nodes: list[NodeRef]) -> None:
        """Of no consequence for the calls: status says the truth everywhere, and memory is given back."""
        if heir.ingress != old.ingress:
            await asyncio.sleep(_BOTH_S)
        await self._installer.unload(old.family, self._ledger.config.drain_s, delete_blobs=False, generation=old.generation)
        address = heir.ingress.address
        for node in nodes:
            if node != heir.node:
                try:
                    await switch_node(node.address, heir.family, heir.generation, 1.0, address, keep=False)
                    await unload_node(node.address, old.family, generation=old.generation)
                except SplitnetError as error:
                    self._log.info("an old generation may still be there", about=node.name, error=error.message)

    async def _succeed(self, deployment: Deployment) -> None:
        """This node becomes the ingress. Should the old one be there all the same, both serve until it hears of it; no request is in both."""
        try:
            await self._replace(deployment, {deployment.ingress.name})
        finally:
            self._succeeding.discard(deployment)

    async def _relieve(self, deployment: Deployment, node: str) -> None:
        """Before a node goes that has said so."""
        await self._replace(deployment, {node})

    async def _take_in(self, deployment: Deployment, node: NodeRef) -> None:
        """A node is there again: it gets its stages, from its own disk and by their hashes."""
        trouble = self._troubles.get(deployment)
        try:
            await self._activate_at(node, deployment.family, deployment.plan, deployment.generation, _LOAD_S)
            if deployment.generation > 1:
                await switch_node(node.address, deployment.family, deployment.generation, 1.0, deployment.ingress.address, keep=False)
            for generation in self._ancestors.get(deployment, []):
                await unload_node(node.address, deployment.family, self._ledger.config.drain_s, generation=generation)
        except ServiceError as error:
            self._log.info("a node that came back could not be reached", about=node.name, error=error.message)
            return
        except SplitnetError as error:  # it has lost its shards, say: only a new deployment helps
            self._log.warning("a node that came back cannot serve", about=node.name, error=error.message)
            if trouble is not None and node.name in trouble.lost:
                trouble.lost[node.name] = error
                trouble.tried.add(node.name)
                trouble.changed.set()
            return
        self._absent.get(deployment, set()).discard(node.name)
        self.events.add("back", node=node.name, deployment=deployment.name, text="its stages are loaded")
        if trouble is not None and trouble.lost.pop(node.name, None) is not None:
            trouble.tried.discard(node.name)
            trouble.changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("recovery failed", error=f"{type(error).__name__}: {error}")


def _newest(deployment: Deployment) -> Deployment:
    while deployment.heir is not None:
        deployment = deployment.heir
    return deployment
