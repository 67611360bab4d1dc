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

from nodes.calls import Call
from nodes.deployment import Deployment
from nodes.events import Events
from nodes.installer import Installer
from nodes.ledger import Ledger, node_gone
from nodes.link import Link
from nodes.mending import Mender
from splitnet.errors import AlreadyExists, Moved, NodeUnavailable, ServiceError, SplitnetError
from splitnet.plan import NodeRef, Plan
from splitnet.standby import plan_without

__all__ = ["Recovery"]

_LOAD_S = 600.0  # a node that comes back reads its shards again
_AGAIN_S = 1.0  # after a node that came back could not be reached
_SETTLE_S = 0.1  # after something was reported lost between two other nodes, before it is sent again
_SILENT_S = 1.0  # a node that says nothing, though its connection stands, may be back
_TWICE_S = 10.0  # a node that others report lost twice within that time is lost, though this one reaches it


@dataclass(eq=False)
class _Trouble:
    """Of one deployment. `lost`: nodes that serve a stage, and why they are missing."""

    since_s: float
    lost: dict[str, SplitnetError] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)  # of the lost: those that cannot be reached, as a second look showed
    unable: set[str] = field(default_factory=set)  # to take over, as was tried
    settle: bool = False  # others have reported a loss
    hopeless: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Recovery:
    """`advance`: sends what waits for a deployment. `rejoin`: puts a whole call in its line."""

    def __init__(self, ledger: Ledger, installer: Installer, advance: Callable[[Deployment], None], rejoin: Callable[[Call], None]) -> None:
        self.events: Events = ledger.events
        self._ledger = ledger
        self._installer = installer
        self._mender = Mender(ledger, installer)
        self._advance = advance
        self._rejoin = rejoin
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
        self._forget_gone()
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
            if (trouble := self._troubles.get(deployment)) is not None:
                trouble.unable.discard(node)
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

    def switched(self, family: str) -> None:
        """Another generation takes the requests now: what waits for one that is not whole goes there."""
        for deployment, trouble in list(self._troubles.items()):
            if deployment.family == family and deployment.newest is deployment:
                self._pass_on(deployment)
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
            if deployment.family == family and deployment.newest is deployment:
                lost += sorted(trouble.lost)
                if hopeless and self._hope_s(deployment, trouble) <= 0:
                    self._fail(deployment, trouble, hopeless)
                trouble.changed.set()
        return lost

    def hopeful(self, deployment: Deployment) -> bool:
        """Whether what was lost should wait to be sent again."""
        deployment = deployment.newest
        trouble = self._troubles.get(deployment)
        return not deployment.draining and (trouble is None or not trouble.hopeless)

    def replayed(self, deployment: Deployment, calls: int) -> None:
        self.events.add("replayed", deployment=deployment.family, text=f"{calls} requests are sent again")

    def restored(self, deployment: Deployment) -> None:
        """It is here again from this node's disk: the others may lack it, and are given it as soon as they are there."""
        self._absent[deployment] = {name for name in deployment.links if deployment.plan.held_at(name)}
        for link in deployment.links.values():
            if link.connected:
                self.link_up(link)

    async def close(self) -> None:
        tasks = [*self._tasks, *(trouble.task for trouble in self._troubles.values() if trouble.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------------------------- judging

    def _forget_gone(self) -> None:
        here = set(self._ledger.deployments.values())
        self._absent = {d: nodes for d, nodes in self._absent.items() if d in here}
        self._ancestors = {d: numbers for d, numbers in self._ancestors.items() if d in here}

    def _of(self, link: Link) -> list[Deployment]:
        """Those that are entered here and need the link."""
        return [
            d
            for d in self._ledger.deployments.values()
            if d.is_ingress and d.heir is None and not d.draining and d.links.get(link.target.name) is link
        ]

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
            and d.is_next
        ]

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
        if set(trouble.lost) - trouble.tried or trouble.settle or self._plan(deployment, trouble.tried | trouble.unable) is not None:
            return _LOAD_S
        silent = any(link.fell_silent for name, link in deployment.links.items() if name in trouble.lost)
        patience_s = trouble.since_s + max(self._ledger.config.recovery_s, silent * _SILENT_S) - now_s
        return max(patience_s, self._watched_until_s.get(deployment.family, now_s) - now_s)

    def _plan(self, deployment: Deployment, gone: Collection[str]) -> Plan | None:
        """Without those nodes; None where nobody takes their place."""
        if (family := self._ledger.families.get(deployment.family)) is None or family.active != deployment.generation:
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
            while deployment.newest is deployment and self._ledger.deployments.get(deployment.name) is deployment:
                trouble.changed.clear()
                if gone := trouble.tried & set(trouble.lost):
                    trouble.unable |= await self._replace(deployment, gone, trouble.unable)
                    if deployment.newest is not deployment:
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
            self._resume(deployment)

    def _resume(self, deployment: Deployment) -> None:
        """It is whole, or has an heir, or nothing helps."""
        newest, generator = deployment.newest, deployment.generator
        if generator is not None:
            deployment.generator, newest.generator = None, generator
            generator.resume(newest)
        self._advance(newest)

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
        for call in self._ledger.calls:
            if call.deployment is deployment:
                error = node_gone(deployment, deployment.links[node].target, first)
                error.message = reason or error.message
                self._ledger.calls.fail(call, error)

    async def _replace(self, deployment: Deployment, gone: Collection[str], unable: Collection[str] = ()) -> set[str]:
        """The next generation, without those nodes, takes over. Leaves no heir where nobody can. Returns those that could not."""
        without = {*gone, *unable}
        generation = max(d.generation for d in self._ledger.deployments.values() if d.family == deployment.family)
        while (plan := self._plan(deployment, without)) is not None and deployment.heir is None:
            generation += 1
            alive = [n for n in plan.used_nodes if n.name not in without and (n == deployment.node or deployment.links[n.name].connected)]
            try:
                failed = await self._mender.activate(deployment, plan, generation, alive)
            except AlreadyExists:  # some node knows more generations than this one
                continue
            except SplitnetError as error:
                self._log.warning("this node could not take over", error=error.message)
                failed = {deployment.node.name}
            serving = {name for name in failed if plan.stages_at(name)}
            if not serving:
                self._hand_over(deployment, generation, without, [node for node in alive if node.name not in failed])
                break
            without |= serving
        return without - set(gone)

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
        self._absent[heir] = held - {node.name for node in alive}
        self._absent.pop(deployment, None)
        places = ", ".join(f"{s.name} at {s.node}" for s in heir.plan.stages if s.node != deployment.plan.stage(s.name).node)
        self.events.add("replaced", node=", ".join(sorted(gone)), deployment=heir.name, text=f"{places}; {moved} requests wait")
        self._spawn(self._mender.retire(deployment, heir, alive))
        for link in heir.links.values():  # it may have come back, or gone, while the others were asked
            if link.connected and link.target.name in self._absent[heir]:
                self._spawn(self._take_in(heir, link.target))
            elif not link.connected and heir.plan.stages_at(link.target.name):
                self.link_down(link, NodeUnavailable(f"no connection to {link.target.address}"))

    def _pass_on(self, deployment: Deployment) -> None:
        """Its calls go to the active generation, where that is another one: here, or at another ingress, to which clients are sent."""
        family = self._ledger.families.get(deployment.family)
        if family is None or family.active == deployment.generation:
            return
        heir = family.generations.get(family.active)
        here = heir is not None and heir.is_ingress
        for call in self._ledger.calls:
            if call.deployment is not deployment or call.requests:
                continue
            if here and heir is not None:
                self._ledger.calls.move(call, heir)
                if call.received:
                    self._rejoin(call)
            elif family.ingress_address:
                where = family.ingress_address
                self._ledger.calls.fail(call, Moved("another plan takes its place", address=where, remedy=f"connect to {where}"))

    async def _succeed(self, deployment: Deployment) -> None:
        """This node becomes the ingress. Should the old one be there all the same, both serve until it hears of it; no request is in both."""
        try:
            await self._replace(deployment, {deployment.ingress.name})
        finally:
            self._succeeding.discard(deployment)

    async def _relieve(self, deployment: Deployment, node: str) -> None:
        """Before a node goes that has said so."""
        await self._replace(deployment, {node})
        self._ledger.release_if_empty(deployment)

    async def _take_in(self, deployment: Deployment, node: NodeRef) -> None:
        """A node is there again: it gets its stages, from its own disk and by their hashes. Tried again until it is gone, or not wanted."""
        try:
            await self._mender.give(node, deployment, self._ancestors.get(deployment, ()))
        except ServiceError as error:
            self._log.info("a node that came back could not be reached", about=node.name, error=error.message)
            await asyncio.sleep(_AGAIN_S)
            link = deployment.links.get(node.name)
            if deployment.newest is deployment and not deployment.draining and link is not None and link.connected:
                await self._take_in(deployment, node)
            return
        except SplitnetError as error:  # it has lost its shards, say: only a new deployment helps
            self._log.warning("a node that came back cannot serve", about=node.name, error=error.message)
            trouble = self._troubles.get(deployment)
            if trouble is not None and node.name in trouble.lost:
                trouble.lost[node.name] = error
                trouble.tried.add(node.name)
                trouble.changed.set()
            return
        trouble = self._troubles.get(deployment)
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
