"""What an ingress asks of other nodes to mend a deployment: to load the next generation, to take in who came back, to let the old one go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

from nodes.deployment import Deployment
from nodes.installer import Installer
from nodes.ledger import Ledger
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import AlreadyExists, NotFound, SplitnetError
from splitnet.generations import FIRST
from splitnet.installation import switch_node, unload_node
from splitnet.plan import NodeRef, Plan
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Mender"]

_WARM_S = 2.0  # a standby has everything loaded; one that takes longer is as good as lost
_LOAD_S = 600.0  # a node that comes back reads its shards again
_BOTH_S = 10.0  # an ingress that was lost to this node, and not to its clients, goes on for so long


class Mender:
    def __init__(self, ledger: Ledger, installer: Installer) -> None:
        self._ledger = ledger
        self._installer = installer
        self._log = ledger.log

    async def activate(self, deployment: Deployment, plan: Plan, generation: int, nodes: list[NodeRef]) -> set[str]:
        """Loads the generation at those nodes, its ingress last, unless one fails that is to serve a stage. Returns those that failed."""
        others = [node for node in nodes if node != deployment.node]
        outcomes = await asyncio.gather(
            *(self._activate_at(node, deployment.family, plan, generation, _WARM_S, wait=True) for node in others), return_exceptions=True
        )
        failed = set()
        for node, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                if not isinstance(outcome, SplitnetError) or isinstance(outcome, AlreadyExists):
                    raise outcome
                self._log.warning("a node could not take over", about=node.name, error=outcome.message)
                failed.add(node.name)
        if not any(plan.stages_at(name) for name in failed):
            await self._installer.activate(
                deployment.family, plan.to_json().encode(), deployment.node.name, {}, generation=generation, wait=True
            )
        return failed

    async def _activate_at(self, node: NodeRef, family: str, plan: Plan, generation: int, timeout_s: float, *, wait: bool) -> None:
        request = pb.ActivateRequest(
            deployment=family,
            plan_json=plan.to_json().encode(),
            node=node.name,
            shards={stage.name: stage.shard for stage in plan.held_at(node.name)},
            generation=generation,
            wait=wait,
        )
        async with open_channel(node.address, node=node.name) as channel:
            with translated(node.address):
                await stub(channel).Activate(request, timeout=timeout_s)

    async def give(self, node: NodeRef, deployment: Deployment, ancestors: Collection[int]) -> None:
        """A node that is there again gets its stages, from its own disk, and hears which generation is the active one; generations that the
        deployment replaced leave it."""
        family = self._ledger.families.get(deployment.family)
        first = deployment.generation == FIRST and (family is None or family.term <= 1)  # nobody has switched yet
        await self._activate_at(node, deployment.family, deployment.plan, deployment.generation, _LOAD_S, wait=not first)
        family = self._ledger.families.get(deployment.family)
        if not first and family is not None and family.active:
            address, keep = family.ingress_address, family.kept == deployment.generation
            await switch_node(node.address, deployment.family, family.active, 1.0, address, keep=keep, term=family.term)
        for generation in ancestors:
            await unload_node(node.address, deployment.family, self._ledger.config.drain_s, generation=generation)

    async def retire(self, old: Deployment, heir: Deployment, nodes: list[NodeRef]) -> None:
        """Of no consequence for the calls: status says the truth everywhere, and memory is given back."""
        others = [node for node in nodes if node != heir.node]
        address, family = heir.ingress.address, self._ledger.families.get(heir.family)
        term = 0 if family is None else family.term
        told = (switch_node(node.address, heir.family, heir.generation, 1.0, address, keep=False, term=term) for node in others)
        for outcome in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, SplitnetError):
                raise outcome
        if heir.ingress != old.ingress:
            await asyncio.sleep(_BOTH_S)
        with contextlib.suppress(NotFound):  # unloaded meanwhile
            await self._installer.unload(old.family, self._ledger.config.drain_s, delete_blobs=False, generation=old.generation)
        for node in others:
            try:
                await unload_node(node.address, old.family, generation=old.generation)
            except SplitnetError as error:
                self._log.info("an old generation may still be there", about=node.name, error=error.message)
