"""Deploying: ship a plan's shards to its nodes, verify, activate; and take a deployment off again.

The blocking faces are for scripts; they must not be called from a running event loop's thread that waits for nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from splitnet import background
from splitnet.batching import Batching
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, NodeUnavailable, NotFound, ServiceError, SplitnetError
from splitnet.node_status import NodeStatus, status_of
from splitnet.plan import NodeRef, Plan
from splitnet.preflight import check_nodes, open_shards
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import Shard
from splitnet.shipping import shard_blobs, ship

__all__ = [
    "Deployed", "Progress", "default_name", "deploy", "deploy_async", "status", "status_async", "undeploy", "undeploy_async",
]  # fmt: skip

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_ACTIVATE_S = 600.0  # a small box reads gigabytes of weights
_UNLOAD_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a deployment stands. `held_bytes` of `total_bytes` are on their nodes, over all nodes; `node` is the one that moved."""

    phase: str  # "ship", "activate"
    node: str
    held_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Deployed:
    """`sent_bytes` per node: what crossed the network (0 where the node had it all). `load_s` per node: reading the shards there."""

    name: str
    ingress: str  # the address for splitnet.Client
    sent_bytes: Mapping[str, int]
    load_s: Mapping[str, float]


def default_name(model: str) -> str:
    """A deployment's name made of a plan's `model`: "hf:sentence-transformers/all-MiniLM-L6-v2" gives "all-minilm-l6-v2"."""
    last = model.rstrip("/").rpartition("/")[2].removeprefix("hf:").removeprefix("py:").removesuffix(".pt2")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:63] or "model"


async def deploy_async(
    plan: Plan,
    shards: Mapping[str, Shard | str | Path] | str | Path,
    *,
    name: str = "",
    batching: Batching | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    concurrency: int = 8,
) -> Deployed:
    """Ships each stage's shard to its node (only what is missing there, `concurrency` nodes at a time), then activates all nodes, the
    ingress last. `batching`: how requests are joined and divided, in place of what the plan says. `shards` maps stage names to shards or their paths, or is a directory that holds one folder (or .zip) per stage.
    Nothing is shipped before everything has been checked: BadPlan where plan and shards do not belong together, NodeUnavailable naming every node that does not answer, AlreadyExists where the name is taken by another
    plan, InsufficientMemory where a node has too little.

    When a node fails to activate, or this is cancelled, what was activated is unloaded again: there is no half deployment. Shipped
    blobs stay, so that the next attempt is cheap. Deploying the same plan again is harmless."""
    name = _checked_name(name or default_name(plan.model))
    opened = await asyncio.to_thread(open_shards, plan, shards)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in opened.items()})
    plan = plan if batching is None else dataclasses.replace(plan, batching=batching)
    nodes = [node for node in plan.nodes if any(stage.node == node.name for stage in plan.stages)]
    before = {node.name: status for node, status in zip(nodes, await status_of(nodes), strict=True)}
    check_nodes(plan, name, opened, before)
    installer = _Installer(plan, name, opened, nodes, on_progress)
    sent = await installer.ship_all(concurrency)
    load_s = await installer.activate_all(already={n for n, status in before.items() if status.deployment(name) is not None})
    return Deployed(name, plan.ingress.address, sent, load_s)


async def undeploy_async(where: Plan | Cluster, name: str = "", *, drain_s: float = 5.0, delete_blobs: bool = False) -> list[str]:
    """Takes a deployment off every node that holds it, the ingress first; requests in flight have `drain_s` to finish. Returns those
    nodes' names. Raises NotFound where no node has it, NodeUnavailable (after the others are done) naming nodes that do not answer."""
    if not name and isinstance(where, Plan):
        name = default_name(where.model)
    statuses = await status_of(where)
    holders = [status for status in statuses if status.deployment(name) is not None]
    silent = [status for status in statuses if status.error]
    outcomes: dict[str, object] = {}
    for ingress in (True, False):
        batch = [s for s in holders if (d := s.deployment(name)) is not None and d.ingress is ingress]
        done = await asyncio.gather(*(_unload(s.address, name, drain_s, delete_blobs) for s in batch), return_exceptions=True)
        outcomes |= dict(zip((s.name for s in batch), done, strict=True))
    _raise_first(outcomes)
    if silent:
        raise NodeUnavailable(
            f"deployment {name!r} may still be on " + "; ".join(f"node {s.name!r}: {s.error}" for s in silent),
            remedy="unload it again when these nodes are back; a node that restarted holds no deployment",
        )
    if not holders:
        there = sorted({d.name for status in statuses for d in status.deployments})
        raise NotFound(f"no node has a deployment {name!r}; there are: {', '.join(there) or 'none'}", remedy="see `splitnet status`")
    return [status.name for status in holders]


async def status_async(where: Cluster | Plan, *, timeout_s: float = 10.0) -> list[NodeStatus]:
    """Every node's status, in the cluster's (plan's) order; one that does not answer stands there with its `error`."""
    return await status_of(where, timeout_s=timeout_s)


def deploy(
    plan: Plan,
    shards: Mapping[str, Shard | str | Path] | str | Path,
    *,
    name: str = "",
    batching: Batching | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    concurrency: int = 8,
) -> Deployed:
    """As `deploy_async`, blocking."""
    return background.run(deploy_async(plan, shards, name=name, batching=batching, on_progress=on_progress, concurrency=concurrency))


def undeploy(where: Plan | Cluster, name: str = "", *, drain_s: float = 5.0, delete_blobs: bool = False) -> list[str]:
    """As `undeploy_async`, blocking."""
    return background.run(undeploy_async(where, name, drain_s=drain_s, delete_blobs=delete_blobs))


def status(where: Cluster | Plan, *, timeout_s: float = 10.0) -> list[NodeStatus]:
    """As `status_async`, blocking."""
    return background.run(status_async(where, timeout_s=timeout_s))


class _Installer:
    """One deployment on its way: the shards of each node, and how far shipping is."""

    def __init__(
        self, plan: Plan, name: str, shards: Mapping[str, Shard], nodes: Sequence[NodeRef], on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._plan = plan
        self._name = name
        self._nodes = nodes
        self._on_progress = on_progress
        self._shards = {node.name: {s.name: shards[s.name] for s in plan.stages if s.node == node.name} for node in nodes}
        self._blobs = {node: shard_blobs(own) for node, own in self._shards.items()}
        self._total_bytes = sum(blob.size_bytes for blobs in self._blobs.values() for blob in blobs)
        self._held_bytes = 0

    async def ship_all(self, concurrency: int) -> dict[str, int]:
        slots = asyncio.Semaphore(max(1, concurrency))

        async def one(node: NodeRef) -> int:
            async with slots, open_channel(node.address) as channel:
                return await self._ship_node(node, channel)

        return await _all({node.name: one(node) for node in self._nodes})

    async def _ship_node(self, node: NodeRef, channel: grpc.aio.Channel) -> int:
        def moved(more_bytes: int) -> None:
            self._held_bytes += more_bytes
            self._report("ship", node)

        return sum([await ship(channel, node.address, blob, moved) for blob in self._blobs[node.name]])

    async def activate_all(self, already: set[str]) -> dict[str, float]:
        """The ingress comes last: whoever reaches it finds the others ready. `already`: nodes that serve this very plan."""
        ingress = self._plan.ingress.name
        try:
            load_s = await _all({n.name: self._activate(n) for n in reversed(self._nodes) if n.name != ingress})
            return load_s | await _all({ingress: self._activate(self._plan.ingress)})
        except BaseException:
            await asyncio.shield(self._take_back([n for n in self._nodes if n.name not in already]))
            raise

    async def _activate(self, node: NodeRef) -> float:
        self._report("activate", node)
        request = pb.ActivateRequest(
            deployment=self._name,
            plan_json=self._plan.to_json().encode(),
            node=node.name,
            shards={stage: shard.sha256 for stage, shard in self._shards[node.name].items()},
        )
        async with open_channel(node.address) as channel:
            with translated(node.address):
                reply = await stub(channel).Activate(request, timeout=_ACTIVATE_S)
        return float(reply.load_s)

    async def _take_back(self, nodes: Sequence[NodeRef]) -> None:
        """Best effort: the error that led here is the one to tell. A node that cannot be reached now holds nothing after its restart."""
        await asyncio.gather(*(_unload(node.address, self._name, 0.0, delete_blobs=False) for node in nodes), return_exceptions=True)

    def _report(self, phase: str, node: NodeRef) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(phase, node.name, self._held_bytes, self._total_bytes))


async def _unload(address: str, name: str, drain_s: float, delete_blobs: bool) -> None:
    """NotFound is as good as done."""
    async with open_channel(address) as channel:
        try:
            with translated(address):
                request = pb.UnloadRequest(deployment=name, drain_s=drain_s, delete_blobs=delete_blobs)
                await stub(channel).Unload(request, timeout=_UNLOAD_S + drain_s)
        except NotFound:
            return


async def _all(work: Mapping[str, Coroutine[Any, Any, _T]]) -> dict[str, _T]:
    """Runs the nodes' work at once, all of it to its end, then raises the first error, with its node and a word on the others'."""
    outcomes = await asyncio.gather(*work.values(), return_exceptions=True)
    results = dict(zip(work, outcomes, strict=True))
    _raise_first(results)
    return {node: result for node, result in results.items() if not isinstance(result, BaseException)}


def _raise_first(outcomes: Mapping[str, object]) -> None:
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


def _checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise BadInput(f"deployment name {name!r}: expected 1 to 63 letters, digits, '.', '_' or '-'", remedy="choose another --name")
    return name
