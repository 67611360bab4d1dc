"""Bringing a policy to the nodes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from splitnet import background
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster
from splitnet.errors import SplitnetError
from splitnet.plan import Plan
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Told", "push_policy"]

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Told:
    """`error`: why the node could not be told; empty where it has the policy. `calls_ended`: those that it no longer permits."""

    node: str
    error: str = ""
    calls_ended: int = 0


def push_policy(where: Cluster | Plan, policy: bytes, signature: bytes) -> list[Told]:
    """Tells every node at once. Blocking. A node that cannot be told stands in the list with its error."""

    async def tell(name: str, address: str) -> Told:
        try:
            async with open_channel(address, node=name) as channel:
                with translated(address):
                    request = pb.SetPolicyRequest(policy_json=policy, signature=signature)
                    reply = await stub(channel).SetPolicy(request, timeout=_TIMEOUT_S)
        except SplitnetError as error:
            return Told(name, error.message)
        return Told(name, calls_ended=reply.calls_ended)

    async def tell_all() -> list[Told]:
        return list(await asyncio.gather(*(tell(node.name, node.address) for node in where.nodes)))

    return background.run(tell_all())
