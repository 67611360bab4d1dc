"""The other end of a heartbeat: answers beats, and tells when a node that used to beat has fallen silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from splitnet.errors import NodeUnavailable
from splitnet.heartbeat import Heartbeat, Silence, until_silent
from splitnet.plan import NodeRef
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Pulses"]

_MOST_TIMES = 10  # the caller's patience, times this, is the longest that may be learnt


class Pulses:
    """`process` tells this process from the one that was here before. `on_silent`: a node has not been heard for too long."""

    def __init__(self, process: str, on_silent: Callable[[NodeRef, NodeUnavailable], Awaitable[None]]) -> None:
        self._process = process
        self._on_silent = on_silent

    async def answer(self, beats: AsyncIterator[pb.Beat], reply: Callable[[pb.Beat], Awaitable[None]], sender: NodeRef) -> None:
        """`sender`: without a name it is a client, which nobody waits for. Raises BadInput for figures that cannot be."""
        silence: Silence | None = None
        watching: asyncio.Task[None] | None = None
        try:
            async for beat in beats:
                if silence is not None:
                    silence.heard(time.monotonic())
                    await reply(pb.Beat(number=beat.number))
                    continue
                heartbeat = Heartbeat(beat.period_s, beat.patience_s, _MOST_TIMES * beat.patience_s)
                silence = Silence(heartbeat)
                silence.begin(time.monotonic())
                if sender.name and heartbeat.period_s:
                    watching = asyncio.create_task(self._watch(sender, silence, heartbeat.period_s))
                await reply(pb.Beat(number=beat.number, process=self._process))
        finally:
            if watching is not None:
                watching.cancel()

    async def _watch(self, sender: NodeRef, silence: Silence, period_s: float) -> None:
        await until_silent(silence, period_s)
        silent_s = silence.silent_s(time.monotonic())
        await self._on_silent(sender, NodeUnavailable(f"nothing was heard from {sender.name!r} for {silent_s:.2f} s"))
