"""Plans with somebody to take over: who follows when nodes are lost. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from splitnet.errors import BadPlan, NoPlan
from splitnet.plan import Plan, StageSpec

__all__ = ["followers", "plan_without", "with_standbys"]


def plan_without(plan: Plan, gone: Collection[str], alive: Collection[str]) -> Plan:
    """The same plan with each stage of a node in `gone` at the first of its replicas that is in `alive`. Everything else stays where it is. A
    node that was replaced stands last among the replicas, to be taken in again when it comes back. Raises NoPlan naming what nobody holds."""
    stages = []
    for stage in plan.stages:
        if stage.node not in gone:
            stages.append(stage)
            continue
        heir = next((replica for replica in stage.replicas if replica in alive and replica not in gone), None)
        if heir is None:
            others = f"its replicas {', '.join(stage.replicas)} are gone, too" if stage.replicas else "no other node holds it"
            raise NoPlan(
                f"stage {stage.name!r} was on node {stage.node!r}, which is lost; {others}",
                remedy=f"start node {stage.node!r} again, or give the stage a replica: `splitnet plan --replicas 1`",
                node=stage.node,
                stage=stage.name,
            )
        rest = tuple(replica for replica in stage.replicas if replica != heir)
        stages.append(dataclasses.replace(stage, node=heir, replicas=(*rest, stage.node)))
    return dataclasses.replace(plan, stages=tuple(stages))


def followers(plan: Plan) -> tuple[str, ...]:
    """The nodes to which clients go when the ingress is lost, in this order."""
    return plan.stages[0].replicas


def with_standbys(
    plan: Plan, room_bytes: Mapping[str, float], needs_bytes: Mapping[str, int], replicas: int = 1, without: Collection[str] = ()
) -> Plan:
    """The plan with so many replicas of every stage, each on the node with the most room left that does not serve the stage itself.
    `room_bytes`: per node, what the plan leaves free (math.inf where there is no limit); it may name nodes that the plan lists and does not use.
    `needs_bytes`: per stage; stages in `without` get none. Raises BadPlan where it makes no sense, NoPlan where the memory does not suffice, saying how much is missing."""
    if replicas < 0 or replicas >= len(plan.nodes):
        raise BadPlan(
            f"{replicas} replicas of every stage need {replicas + 1} nodes, the plan lists {len(plan.nodes)}",
            remedy="ask for fewer replicas, or add nodes to the cluster",
        )
    room = {node.name: room_bytes.get(node.name, 0) for node in plan.nodes}
    chosen: dict[str, tuple[str, ...]] = {}
    for stage in sorted(plan.stages, key=lambda stage: -needs_bytes[stage.name]):  # the largest has the fewest places
        chosen[stage.name] = _places(stage, room, needs_bytes[stage.name], 0 if stage.name in without else replicas)
    return dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, replicas=chosen[s.name]) for s in plan.stages))


def _places(stage: StageSpec, room: dict[str, float], need_bytes: int, replicas: int) -> tuple[str, ...]:
    found: list[str] = []
    for _ in range(replicas):
        best = max((node for node in room if node != stage.node and node not in found), key=lambda node: room[node])
        if room[best] < need_bytes:
            raise NoPlan(
                f"no node has room for a replica of stage {stage.name!r}: it needs {need_bytes} bytes, "
                f"and {best!r}, which has the most, has {max(int(room[best]), 0)}: {need_bytes - int(room[best])} bytes are missing",
                remedy="ask for fewer replicas, raise a node's memory limit, or add a node to the cluster",
                stage=stage.name,
            )
        room[best] -= need_bytes
        found.append(best)
    return tuple(found)
