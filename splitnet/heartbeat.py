"""Heartbeats: how a side notices within half a second that the other is gone, although no connection says so.

A killed process closes its connections; a frozen one, a pulled plug and a link that lets nothing through do not. So both sides say "I am here"
all the time (`Heartbeat` in the protocol), on a connection of its own: behind megabytes of tensors on a slow link a word would come
too late. Beats are sent without waiting for answers; a long round trip therefore delays the news and raises no alarm.

How long a silence is believed to be one follows the link: at least `patience_s`, and a few times what beats have lately been late
(as accrual failure detectors do: Hayashibara et al., "The phi accrual failure detector", 2004). What this side itself was late, because
its processor was busy or it was stopped, is not counted: the other's beats lie there unread.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio

from splitnet.channel import stub, translated
from splitnet.errors import BadInput, NodeUnavailable, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["Heartbeat", "Silence", "pulse", "until_silent"]

_LATE_TIMES = 2.0  # of the worst lateness lately: as late again
_FADE_S = 30.0  # a lateness this long ago counts 1/e
_TICK_LATE_S = 0.02  # a timer that fires this much late says that this side was held up
_FIRST_BEAT_S = 3.0  # until then connecting may take; afterwards the patience holds


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`period_s`: how often both sides say that they are there; 0: never. `patience_s`: after how long a silence the other side is
    taken for gone, on a steady link; on one that is not, up to `most_s`. Raises BadInput."""

    period_s: float = 0.15
    patience_s: float = 0.45
    most_s: float = 4.0

    def __post_init__(self) -> None:
        figures = (self.period_s, self.patience_s, self.most_s)
        if not all(math.isfinite(figure) and 0 <= figure <= 3600 for figure in figures):
            raise BadInput(f"heartbeat: expected seconds from 0 to 3600, got {figures}")
        if self.period_s and not 2 * self.period_s <= self.patience_s <= self.most_s:
            raise BadInput(
                f"heartbeat: a patience of {self.patience_s:g} s does not fit a beat every {self.period_s:g} s",
                remedy=f"give a patience of at least two beats, and at most {self.most_s:g} s",
            )


class Silence:
    """What one side has heard of the other. Pure: the caller reads the clock. It outlives connections: what was learnt stays."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._heard_s = math.inf  # anything
        self._beat_s = math.inf  # a beat
        self._worst_s = 0.0
        self._worst_at_s = 0.0
        self.heard_once = False  #: on this connection
        self.round_trip_s = math.inf  #: the shortest seen on this connection

    def begin(self, now_s: float, grace_s: float = 0.0) -> None:
        """A new connection; `grace_s`: what it may take beyond the patience until the first beat."""
        self._heard_s = self._beat_s = now_s + grace_s
        self.heard_once = False
        self.round_trip_s = math.inf

    def heard(self, now_s: float) -> None:
        self._learn(now_s - self._beat_s - self._heartbeat.period_s, now_s)
        self._heard_s = self._beat_s = now_s
        self.heard_once = True

    def alive(self, now_s: float) -> None:
        """Something else came from the other side: it is there, whatever keeps its beats. Nothing is learnt from it about them."""
        self._heard_s = max(self._heard_s, now_s)

    def held_up(self, by_s: float) -> None:
        """This side could not listen for so long."""
        self._heard_s += by_s
        self._beat_s += by_s

    def false_alarm(self, now_s: float) -> None:
        """The other was there all the time: twice the patience from now on."""
        self._learn(2 * self.limit_s(now_s) / _LATE_TIMES, now_s)

    def limit_s(self, now_s: float) -> float:
        """How long a silence is not taken for the end yet."""
        learnt_s = self._heartbeat.period_s + _LATE_TIMES * self._faded_s(now_s)
        return min(max(self._heartbeat.patience_s, learnt_s), self._heartbeat.most_s)

    def left_s(self, now_s: float) -> float:
        """How much longer the silence may be; not positive once the other is to be taken for gone."""
        return self.limit_s(now_s) - (now_s - self._heard_s)

    def silent_s(self, now_s: float) -> float:
        return now_s - self._heard_s

    def _learn(self, late_s: float, now_s: float) -> None:
        if late_s > self._faded_s(now_s):
            self._worst_s, self._worst_at_s = late_s, now_s

    def _faded_s(self, now_s: float) -> float:
        return self._worst_s * math.exp(min(self._worst_at_s - now_s, 0.0) / _FADE_S)


async def pulse(
    channel: grpc.aio.Channel,
    address: str,
    heartbeat: Heartbeat,
    silence: Silence,
    metadata: Sequence[tuple[str, str]] = (),
    on_process: Callable[[str], None] | None = None,
) -> None:
    """Beats, and listens, until the other side is silent: raises NodeUnavailable then, or when the connection breaks. `on_process` hears
    which process it is. Returns where there is nothing to listen to: a node of an earlier version, or a period of 0. `channel`: to `address`,
    for nothing else; it is closed in the end."""
    silence.begin(time.monotonic(), _FIRST_BEAT_S)
    try:
        if not heartbeat.period_s:
            return
        call = stub(channel).Heartbeat(metadata=tuple(metadata))
        sent: deque[tuple[int, float]] = deque(maxlen=256)
        listener = asyncio.create_task(_listen(call, address, silence, sent, on_process))
        tasks = (listener, asyncio.create_task(_beat(call, address, heartbeat, sent)))
        try:
            await until_silent(silence, heartbeat.period_s, tasks)
            if any(task.done() for task in tasks):
                await asyncio.wait((listener,), timeout=heartbeat.period_s)  # it knows the reason
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    except SplitnetError as error:
        if silence.heard_once or isinstance(error, NodeUnavailable):
            raise
        return  # it does not know the call, as far as can be told: gRPC may lose the reason when a message is just being written
    finally:
        await channel.close()
    raise NodeUnavailable(
        f"nothing was heard from {address} for {silence.silent_s(time.monotonic()):.2f} s",
        remedy="see whether the machine runs and the network between carries both ways",
    )


async def _beat(
    call: grpc.aio.StreamStreamCall[pb.Beat, pb.Beat], address: str, heartbeat: Heartbeat, sent: deque[tuple[int, float]]
) -> None:
    number = 0
    beat = pb.Beat(period_s=heartbeat.period_s, patience_s=heartbeat.patience_s)
    while True:
        number += 1
        beat.number = number
        sent.append((number, time.monotonic()))
        with translated(address):
            await call.write(beat)
        beat = pb.Beat()
        await asyncio.sleep(heartbeat.period_s)


async def _listen(
    call: grpc.aio.StreamStreamCall[pb.Beat, pb.Beat],
    address: str,
    silence: Silence,
    sent: deque[tuple[int, float]],
    on_process: Callable[[str], None] | None,
) -> None:
    while True:
        with translated(address):
            beat = await call.read()
        if not isinstance(beat, pb.Beat):
            raise NodeUnavailable(f"{address} ended the heartbeat")
        now_s = time.monotonic()
        silence.heard(now_s)
        while sent and sent[0][0] < beat.number:
            sent.popleft()
        if sent and sent[0][0] == beat.number:
            silence.round_trip_s = min(silence.round_trip_s, now_s - sent.popleft()[1])
        if beat.process and on_process is not None:
            on_process(beat.process)


async def until_silent(silence: Silence, period_s: float, tasks: Collection[asyncio.Task[None]] = ()) -> None:
    """Returns once there has been silence for too long, or once one of the tasks has ended."""
    while (left_s := silence.left_s(time.monotonic())) > 0:
        wait_s = min(left_s, period_s)
        started_s = time.monotonic()
        if not tasks:
            await asyncio.sleep(wait_s)
        elif (await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED))[0]:
            return
        late_s = time.monotonic() - started_s - wait_s
        if late_s > _TICK_LATE_S:
            silence.held_up(late_s)
