"""A node that was started again serves what it served before: from its own disk, nobody has to come.

What it finds is its own memory, and may be old: others may have gone on without it. So it asks the nodes of the plan first. Where they follow a newer
switch, it only remembers where the requests go, and is given its stages by whoever takes them now; where they are there and hold nothing of the
deployment any more, it was taken off meanwhile. Nodes that do not answer say nothing: after a power cut all of them begin so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from nodes.deployment import Deployment
from nodes.family import Family
from nodes.installer import Installer
from nodes.ledger import Ledger
from nodes.records import FamilyRecord, GenerationRecord, Records
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import ServiceError, SplitnetError
from splitnet.plan import NodeRef
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Keeper", "Restorer"]

_ASK_S = 2.0
_AGAIN_S = 10.0  # after a record could not be written
_RESTORING = "restoring"


class Keeper:
    """Keeps the records true. What a deployment is, is written down soon after it has changed; `settled` waits for it."""

    def __init__(self, ledger: Ledger, records: Records) -> None:
        self._ledger = ledger
        self._records = records
        self._changed: set[str] = set()
        self._wake, self._settled = asyncio.Event(), asyncio.Event()
        self._settled.set()
        self._complaint = ""
        ledger.families.on_change = self._note
        self._task = asyncio.create_task(self._keep(), name="records of deployments")

    async def settled(self) -> None:
        """All is written down, or could not be: then the events say so, and it is tried again and again."""
        await self._settled.wait()

    async def close(self) -> None:
        """What has changed until now is still written."""
        self._ledger.families.on_change = None
        if not self._complaint and not self._task.done():
            await self._settled.wait()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _note(self, name: str) -> None:
        self._changed.add(name)
        self._settled.clear()
        self._wake.set()

    async def _keep(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            restoring = self._ledger.families.restoring
            for name in sorted(self._changed - set(restoring)):
                self._changed.discard(name)
                family = self._ledger.families.get(name)
                try:
                    await asyncio.to_thread(self._records.write, name, None if family is None else record_of(family))
                    self._complaint = ""
                except SplitnetError as error:
                    self._changed.add(name)
                    self._complain(name, error)
            if not self._wake.is_set():
                self._settled.set()
            if self._changed and self._complaint:
                asyncio.get_running_loop().call_later(_AGAIN_S, self._wake.set)

    def _complain(self, name: str, error: SplitnetError) -> None:
        if error.message != self._complaint:
            self._ledger.events.add("unwritten", deployment=name, text=f"after a restart it would not be served again: {error.message}")
        self._complaint = error.message


class Restorer:
    """`check`: as for `Installer.activate`. `restored`: hears of each generation that is there again."""

    def __init__(
        self,
        ledger: Ledger,
        installer: Installer,
        records: Records,
        check: Callable[[Mapping[str, str]], None],
        restored: Callable[[Deployment], None],
    ) -> None:
        self._ledger = ledger
        self._installer = installer
        self._records = records
        self._check = check
        self._restored = restored

    async def look(self) -> None:
        """Before the node listens: who asks it hears what it is about to restore. Raises StorageFailure."""
        found, faults = await asyncio.to_thread(self._records.read)
        for fault in faults:
            self._ledger.events.add("unrestored", text=f"a record is damaged, and was set aside: {fault}")
        self._ledger.families.restoring = {record.name: record for record in found}

    async def run(self) -> None:
        """One deployment after another; what fails is told in the events, and does not keep the others."""
        families = self._ledger.families
        for name, record in list(families.restoring.items()):
            try:
                await self._restore(record)
            finally:
                families.restoring.pop(name, None)
                families.note(name)

    async def _restore(self, record: FamilyRecord) -> None:
        others = _others(record)
        heard = [reply for reply in await asyncio.gather(*(self._describe(node, record.name) for node in others)) if reply is not None]
        said = [status for reply in heard for status in reply.deployments if status.name == record.name]
        newer = max((s for s in said if s.term > record.term and s.state != _RESTORING), key=lambda s: s.term, default=None)
        if newer is not None:
            self._follow(record, [s for s in said if s.term == newer.term])
            return
        if heard and not said and len(heard) == len(others):
            text = f"{', '.join(sorted(reply.name for reply in heard))} hold nothing of it any more: it was taken off meanwhile"
            self._ledger.events.add("unrestored", deployment=record.name, text=text)
            return
        loaded = []
        for number, generation in sorted(record.held.items(), key=lambda one: one[0] != record.active):
            if (deployment := await self._load(record.name, number, generation)) is not None:
                loaded.append(deployment)
        self._ledger.families.restore(record)
        for deployment in loaded:
            self._restored(deployment)
        if loaded:
            numbers = ", ".join(str(deployment.generation) for deployment in loaded)
            self._ledger.events.add("restored", deployment=record.name, text=f"from this node's disk: generation {numbers}")

    def _follow(self, record: FamilyRecord, newest: list[pb.DeploymentStatus]) -> None:
        """The others have gone on: whoever takes the requests now gives this node its stages."""
        active = next((s for s in newest if s.state in ("active", "moved")), newest[0])
        where = active.moved_to or active.ingress_address
        pointer = FamilyRecord(record.name, active=active.generation, address=where, entered_here=record.entered_here, term=active.term)
        self._ledger.families.restore(pointer)
        text = f"generation {active.generation} took its place meanwhile; requests go to {where}"
        self._ledger.events.add("unrestored", deployment=record.name, text=text)

    async def _load(self, name: str, number: int, generation: GenerationRecord) -> Deployment | None:
        try:
            deployment, _ = await self._installer.activate(
                name,
                generation.plan.to_json().encode(),
                generation.node,
                generation.shards,
                generation=number,
                wait=True,
                check=self._check,
            )
        except SplitnetError as error:
            self._ledger.events.add("unrestored", deployment=name, text=f"generation {number}: {error.message}")
            return None
        return deployment

    async def _describe(self, node: NodeRef, name: str) -> pb.DescribeReply | None:
        """None where it does not answer."""
        try:
            async with open_channel(node.address, node=node.name) as channel:
                with translated(node.address):
                    return await stub(channel).Describe(pb.DescribeRequest(deployment=name), timeout=_ASK_S)
        except ServiceError as error:
            self._ledger.log.info("a node says nothing yet", about=node.name, error=error.message)
            return None


def _others(record: FamilyRecord) -> list[NodeRef]:
    """The other nodes of all its plans."""
    named = {n.address: n for one in record.held.values() for n in one.plan.used_nodes if n.name != one.node}
    return list(named.values())


def record_of(family: Family) -> FamilyRecord:
    """What is to be written down of it."""
    held = {
        number: GenerationRecord(d.node.name, d.plan, {stage.spec.name: stage.shard for stage in d.held.values()})
        for number, d in family.generations.items()
        if not d.draining
    }
    return FamilyRecord(
        family.name, family.active, family.canary, family.share, family.kept, family.address, family.entered_here, family.term, held
    )
