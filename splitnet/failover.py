"""Where a deployment's requests go when its ingress is lost: the plan names who follows, and one of them takes over by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio

from splitnet import channel
from splitnet.deployment import Deployment
from splitnet.errors import ServiceError
from splitnet.exchange import Exchange
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["find_ingress", "goes_on"]

_ASK_S = 0.5  # of a node that may be gone
_PAUSE_S = 0.05
_MOST = 16  # addresses to ask
_SILENT_S = 1.0  # an ingress that says nothing may be back


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


async def goes_on(exchange: Exchange, deployment: Deployment, address: str, connect: Callable[[str], grpc.aio.Channel]) -> bool:
    """Whether a request that was under way can be asked again: elsewhere, or of an ingress that fell silent and is back soon (a false alarm on a busy box). Not where the
    ingress itself has said that it cannot, or is gone and nobody follows it."""
    if exchange.broken is None or deployment.followers or not exchange.fell_silent:
        return exchange.broken is not None and bool(deployment.followers)
    try:
        async with asyncio.timeout(_SILENT_S):
            await find_ingress((address,), deployment.name, connect)
    except TimeoutError:
        return False
    return True


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
