"""Deploying: ship a plan's shards to its nodes, verify, activate; and take a deployment off again.

The blocking faces are for scripts; they must not be called from a running event loop's thread that waits for nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from splitnet import background
from splitnet.batching import Batching
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, NodeUnavailable, NotFound
from splitnet.generations import FIRST
from splitnet.installation import Installation, Progress, raise_first, unload_node, used_nodes
from splitnet.node_status import NodeStatus, status_of
from splitnet.plan import NodeRef, Plan
from splitnet.preflight import check_nodes, open_shards
from splitnet.shard import Shard
from splitnet.survey import take_survey

__all__ = [
    "Deployed", "Progress", "checked_name", "default_name", "deploy", "deploy_async", "status", "status_async", "undeploy", "undeploy_async",
]  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Deployed:
    """`sent_bytes` per node: what was sent from here (0 where the node had it all). `load_s` per node: reading the shards there. `taken_bytes` per node: what it took from
    other nodes that had it; `not_taken`: why it could not, where it was sent from here instead."""

    name: str
    ingress: str  # the address for splitnet.Client
    sent_bytes: Mapping[str, int]
    load_s: Mapping[str, float]
    taken_bytes: Mapping[str, int] = field(default_factory=dict)
    not_taken: tuple[str, ...] = ()


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
    name = checked_name(name or default_name(plan.model))
    opened = await asyncio.to_thread(open_shards, plan, shards)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in opened.items()})
    plan = plan if batching is None else dataclasses.replace(plan, batching=batching)
    nodes = used_nodes(plan)
    before = {node.name: status for node, status in zip(nodes, await status_of(nodes), strict=True)}
    check_nodes(plan, name, opened, before)
    served = {node.address: held for node in nodes if (held := before[node.name].deployment(name)) is not None}
    generation = max((held.generation for held in served.values()), default=FIRST)  # where a node of several lost it, it is the same again
    installation = Installation(plan, name, opened, on_progress, generation=generation)
    sent = await installation.ship_all(concurrency)
    load_s = await installation.activate_all(already=served)
    return Deployed(
        name,
        plan.ingress.address,
        {node: carried.sent_bytes for node, carried in sent.items()},
        load_s,
        {node: carried.taken_bytes for node, carried in sent.items()},
        tuple(f"node {node!r}: {failure}" for node, carried in sent.items() for failure in carried.failures),
    )


async def undeploy_async(where: Plan | Cluster, name: str = "", *, drain_s: float = 5.0, delete_blobs: bool = False) -> list[str]:
    """Takes a deployment, all its generations, off every node that holds one, the ingress first; requests in flight have `drain_s` to finish. Returns those
    nodes' names. Raises NotFound where no node has it, NodeUnavailable (after the others are done) naming nodes that do not answer."""
    if not name and isinstance(where, Plan):
        name = default_name(where.model)
    survey = await take_survey(name, [NodeRef(node.name, node.address) for node in where.nodes])
    statuses = list(survey.statuses.values())
    holders = [status for status in statuses if status.generations(name)]
    silent = [status for status in statuses if status.error]
    outcomes: dict[str, object] = {}
    for ingress in (True, False):
        batch = [s for s in holders if any(d.ingress for d in s.generations(name)) is ingress]
        work = (unload_node(s.address, name, drain_s, delete_blobs=delete_blobs) for s in batch)
        done = await asyncio.gather(*work, return_exceptions=True)
        outcomes |= dict(zip((s.name for s in batch), done, strict=True))
    raise_first(outcomes)
    if silent:
        raise NodeUnavailable(
            f"deployment {name!r} may still be on " + "; ".join(f"node {s.name!r}: {s.error}" for s in silent),
            remedy="unload it again when these nodes are back; a node that is started again while the others answer does not bring it back",
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


def checked_name(name: str) -> str:
    """Raises BadInput for what cannot be a deployment's name."""
    if not _NAME.match(name):
        raise BadInput(f"deployment name {name!r}: expected 1 to 63 letters, digits, '.', '_' or '-'", remedy="choose another --name")
    return name
