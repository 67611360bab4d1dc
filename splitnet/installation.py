"""How one generation of a plan comes onto its nodes, and goes again: the calls that deploying, updating and going back are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from splitnet.channel import open_channel, stub, translated
from splitnet.errors import NotFound, ServiceError, SplitnetError
from splitnet.generations import FIRST
from splitnet.peers import Carried, Carrier
from splitnet.plan import NodeRef, Plan
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security.credentials import shard_signatures
from splitnet.shard import Shard
from splitnet.shipping import shard_blobs

__all__ = ["Installation", "OnProgress", "Progress", "all_done", "raise_first", "switch_node", "unload_node", "used_nodes"]

_T = TypeVar("_T")
_ACTIVATE_S = 600.0  # a small box reads gigabytes of weights
_UNLOAD_S = 30.0
_SWITCH_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a deployment stands. `held_bytes` of `total_bytes` are on their nodes, over all nodes; `node` is the one that moved."""

    phase: str  # "ship", "activate", "switch", "drain"
    node: str
    held_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


def used_nodes(plan: Plan) -> list[NodeRef]:
    """Those that have a stage, or hold one ready."""
    return list(plan.used_nodes)


class Installation:
    """One generation on its way: the shards of each node, and how far shipping is."""

    def __init__(
        self,
        plan: Plan,
        name: str,
        shards: Mapping[str, Shard | str],
        on_progress: OnProgress | None = None,
        *,
        generation: int = FIRST,
        wait: bool = False,
    ) -> None:
        """`shards`: by stage; of one that the node has already its sha256 is enough. `wait`: it is loaded beside the others, and takes no
        requests before `switch_node`."""
        self._plan = plan
        self._name = name
        self._generation = generation
        self._wait = wait
        self._nodes = nodes = used_nodes(plan)
        self._on_progress = on_progress
        self._shards = {node.name: {s.name: shards[s.name] for s in plan.held_at(node.name)} for node in nodes}
        self._blobs = {
            node: shard_blobs({s: one for s, one in own.items() if isinstance(one, Shard)}) for node, own in self._shards.items()
        }
        self._total_bytes = sum(blob.size_bytes for blobs in self._blobs.values() for blob in blobs)
        self._held_bytes = 0

    async def ship_all(self, concurrency: int) -> dict[str, Carried]:
        """What a node of the plan holds, or has been sent, the others take from it."""
        slots, carrier = asyncio.Semaphore(max(1, concurrency)), Carrier(self._plan.nodes)
        await carrier.ask(self._blobs)

        async def one(node: NodeRef) -> Carried:
            def moved(more_bytes: int) -> None:
                self._held_bytes += more_bytes
                self.report("ship", node)

            async with slots, open_channel(node.address) as channel:
                return await carrier.bring(node, channel, self._blobs[node.name], moved)

        return await all_done({node.name: one(node) for node in self._nodes})

    async def activate_all(self, already: Collection[str] = ()) -> dict[str, float]:
        """The ingress comes last: whoever reaches it finds the others ready. `already`: addresses of the nodes that have this very generation;
        when this raises, it is taken off the others again."""
        ingress = self._plan.ingress.name
        try:
            load_s = await all_done({n.name: self._activate(n) for n in reversed(self._nodes) if n.name != ingress})
            return load_s | await all_done({ingress: self._activate(self._plan.ingress)})
        except BaseException:
            await asyncio.shield(self._take_back([n for n in self._nodes if n.address not in already]))
            raise

    async def _activate(self, node: NodeRef) -> float:
        self.report("activate", node)
        shards = {stage: shard.sha256 if isinstance(shard, Shard) else shard for stage, shard in self._shards[node.name].items()}
        request = pb.ActivateRequest(
            deployment=self._name,
            plan_json=self._plan.to_json().encode(),
            node=node.name,
            shards=shards,
            signatures=shard_signatures(node.address, shards),
            generation=self._generation,
            wait=self._wait,
        )
        async with open_channel(node.address) as channel:
            with translated(node.address):
                reply = await stub(channel).Activate(request, timeout=_ACTIVATE_S)
        return float(reply.load_s)

    async def _take_back(self, nodes: Sequence[NodeRef]) -> None:
        """Best effort: the error that led here is the one to tell. A node that cannot be reached now asks the others after its restart."""
        await asyncio.gather(*(unload_node(n.address, self._name, generation=self._generation) for n in nodes), return_exceptions=True)

    def report(self, phase: str, node: NodeRef) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(phase, node.name, self._held_bytes, self._total_bytes))


async def unload_node(address: str, name: str, drain_s: float = 0.0, *, generation: int = 0, delete_blobs: bool = False) -> int:
    """How many requests were cancelled. NotFound is as good as done. `generation` 0: all of that name."""
    async with open_channel(address) as channel:
        try:
            with translated(address):
                request = pb.UnloadRequest(deployment=name, drain_s=drain_s, delete_blobs=delete_blobs, generation=generation)
                return (await stub(channel).Unload(request, timeout=_UNLOAD_S + drain_s)).cancelled
        except NotFound:
            return 0


async def switch_node(address: str, name: str, generation: int, share: float, ingress: str, *, keep: bool, term: int = 0) -> None:
    """See `Families.switch` of the nodes."""
    request = pb.SwitchRequest(deployment=name, generation=generation, share=share, ingress_address=ingress, keep=keep, term=term)
    async with open_channel(address) as channel:
        with translated(address):
            await stub(channel).Switch(request, timeout=_SWITCH_S)


async def all_done(work: Mapping[str, Coroutine[Any, Any, _T]]) -> dict[str, _T]:
    """Runs the nodes' work at once, all of it to its end, then raises the first error, with its node and a word on the others'."""
    outcomes = await asyncio.gather(*work.values(), return_exceptions=True)
    results = dict(zip(work, outcomes, strict=True))
    raise_first(results)
    return {node: result for node, result in results.items() if not isinstance(result, BaseException)}


def raise_first(outcomes: Mapping[str, object]) -> None:
    errors = {node: outcome for node, outcome in outcomes.items() if isinstance(outcome, BaseException)}
    for error in errors.values():
        if not isinstance(error, SplitnetError):
            raise error
    if errors:
        (node, first), *others = errors.items()
        assert isinstance(first, SplitnetError)
        if others:
            first.message += "; also " + "; ".join(f"node {n!r}: {e.message if isinstance(e, ServiceError) else e}" for n, e in others)
        raise first.at(node=node)
