"""What a deployment has for itself on a node besides memory: its threads, and how many requests at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nodes.deployment import Deployment
from splitnet.errors import AlreadyExists, InsufficientMemory
from splitnet.generations import parse_key
from splitnet.plan import Plan

__all__ = ["check_reserved", "reserved_sessions"]


def check_reserved(key: str, plan: Plan, here: Collection[Deployment], limit: int) -> None:
    """Before it is loaded. Generations of one name share what they have reserved: a request is in one of them. `limit`: requests at once of all deployments;
    0: as many as they like. Raises AlreadyExists where the threads, InsufficientMemory where the sessions are another's."""
    family = parse_key(key)[0]
    others = [d for d in here if d.family != family]
    alone = next((d for d in others if d.plan.exclusive), None)
    if alone is not None or (plan.exclusive and others):
        who = f"{alone.family!r} has" if alone is not None else f"{family!r} wants"
        there = ", ".join(sorted({repr(d.family) for d in others}))
        raise AlreadyExists(
            f"{who} the threads of this node exclusively; here are {there}, and {family!r} would be one more",
            remedy="unload the other, plan with other nodes, or deploy the exclusive one without --exclusive: then they share the threads",
        )
    used = reserved_sessions(others)
    if limit and used + plan.sessions > limit:
        raise InsufficientMemory(
            f"{family!r} reserves {plan.sessions} requests at once; of this node's limit of {limit}, {used} are reserved by "
            + (", ".join(sorted({repr(d.family) for d in others})) or "nobody"),
            remedy="deploy it with fewer (--sessions), unload another deployment, or start the node with a larger --sessions",
        )


def reserved_sessions(deployments: Iterable[Deployment]) -> int:
    """Of each name what its largest generation reserves."""
    most: dict[str, int] = {}
    for deployment in deployments:
        most[deployment.family] = max(most.get(deployment.family, 0), deployment.plan.sessions)
    return sum(most.values())
