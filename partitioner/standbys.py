"""Standbys for a plan's stages, with their memory counted: who may hold one, and what is left there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from splitnet.cluster import Cluster
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import NodeRef, Plan, StageSpec
from splitnet.stage_memory import stage_memory_bytes
from splitnet.standby import with_standbys

__all__ = ["add_standbys"]


def add_standbys(
    plan: Plan,
    cluster: Cluster,
    replicas: int = 1,
    nodes: Sequence[str] = (),
    taken_bytes: Mapping[str, float] | None = None,
    private_to: str = "",
) -> Plan:
    """The plan with `replicas` of every stage, on `nodes` only where some are given, within the cluster's memory limits; `taken_bytes` are of
    others. Stages of the node `private_to` have none: what they see is for no other node. What a node must hold is in the prediction's memory. Raises NoPlan where the memory does not suffice, BadInput for a node that the cluster
    does not have."""
    known = {node.name: node for node in cluster.nodes}
    if unknown := [name for name in nodes if name not in known]:
        raise BadInput(f"there is no node {unknown[0]!r}; the cluster has {', '.join(known)}", remedy="name one of these")
    if nodes and replicas > len(set(nodes)):
        raise BadInput(f"{replicas} replicas cannot be on {len(set(nodes))} nodes", remedy="give more nodes, or ask for fewer replicas")
    needs = {stage.name: _need_bytes(plan, stage) for stage in plan.stages}
    used = {name: sum(needs[stage.name] for stage in plan.stages_at(name)) for name in known}
    limits = {name: float(node.memory_bytes or math.inf) - (taken_bytes or {}).get(name, 0.0) for name, node in known.items()}
    room = {name: limits[name] - used[name] if not nodes or name in nodes else -math.inf for name in known}
    present = {node.name for node in plan.nodes}
    wide = dataclasses.replace(plan, nodes=(*plan.nodes, *(NodeRef(n.name, n.address) for n in cluster.nodes if n.name not in present)))
    kept = {stage.name for stage in plan.stages_at(private_to)} if private_to else set()
    if replicas and nodes and any(len({*nodes} - {stage.node}) < replicas for stage in plan.stages if stage.name not in kept):
        raise NoPlan(
            f"a stage that is on one of {', '.join(nodes)} finds no other of them for its replica",
            remedy="give one node more (--standby NODE)",
        )
    found = with_standbys(wide, room, needs, replicas, kept)
    names = {node.name for node in found.used_nodes} | present
    memory = {name: used[name] + sum(needs[stage.name] for stage in found.standbys_at(name)) for name in names if name in known}
    prediction = found.prediction and dataclasses.replace(
        found.prediction,
        memory_bytes={**found.prediction.memory_bytes, **{n: size for n, size in memory.items() if found.standbys_at(n)}},
        note="; ".join(filter(None, (found.prediction.note, _alone(kept, private_to) if replicas else ""))),
    )
    return dataclasses.replace(found, nodes=tuple(node for node in found.nodes if node.name in names), prediction=prediction)


def _need_bytes(plan: Plan, stage: StageSpec) -> int:
    received_bytes = sum(transfer.bytes for transfer in plan.transfers if transfer.target == stage.name)
    cache_bytes = plan.generation.cache_bytes(stage.name) if plan.generation is not None else 0
    return stage_memory_bytes(stage.param_bytes, stage.activation_bytes, received_bytes) + cache_bytes


def _alone(kept: Collection[str], private_to: str) -> str:
    return f"no standby for {', '.join(sorted(kept))}: what is private to {private_to!r} is for no other node" if kept else ""
