"""Where a deployment's requests go when its ingress is lost: the plan names who follows, and one of them takes over by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio

from splitnet import channel
from splitnet.errors import ServiceError
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["find_ingress"]

_ASK_S = 0.5  # of a node that may be gone
_PAUSE_S = 0.05
_MOST = 16  # addresses to ask


async def find_ingress(addresses: Sequence[str], name: str, connect: Callable[[str], grpc.aio.Channel]) -> str:
    """The address of whoever takes the requests for deployment `name` now: asks all of `addresses`, and those to which they point, again
    and again until one says so. Takes as long as it takes: to be limited by the caller."""
    asked = list(dict.fromkeys(addresses))
    channels: dict[str, grpc.aio.Channel] = {}
    try:
        while True:
            for address in asked[:_MOST]:
                if address not in channels:
                    channels[address] = connect(address)
            answers = [asyncio.create_task(_ask(address, opened, name)) for address, opened in channels.items()]
            try:
                for answer in asyncio.as_completed(answers):
                    here, elsewhere = await answer
                    if here:
                        return here
                    if elsewhere and elsewhere not in asked:
                        asked.append(elsewhere)
            finally:
                for task in answers:
                    task.cancel()
                await asyncio.gather(*answers, return_exceptions=True)
            await asyncio.sleep(_PAUSE_S)
    finally:
        await asyncio.gather(*(opened.close() for opened in channels.values()))


async def _ask(address: str, opened: grpc.aio.Channel, name: str) -> tuple[str, str]:
    """The address, if the node takes the requests; and the one to which it points."""
    try:
        with channel.translated(address):
            reply = await channel.stub(opened).Describe(pb.DescribeRequest(deployment=name), timeout=_ASK_S)
    except ServiceError:
        return "", ""
    for status in reply.deployments:
        if status.name == name and status.state in ("", "active", "moved"):
            return (address, "") if status.ingress and not status.moved_to and not reply.draining else ("", status.moved_to)
    return "", ""
