"""The clock, a node's processor, and a link: each does one thing at a time, and writes down what it did."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from partitioner.simulation.records import Interval, Kind
from splitnet.cluster import Link
from splitnet.wire import CHUNK_BYTES

__all__ = ["Clock", "Job", "LinkQueue", "Processor"]

_MAX_TURNS = 64  # per transfer: larger ones take larger turns, so that a huge tensor does not make a million events


class Clock:
    """Runs actions in the order of their times; those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


@dataclass(slots=True)
class Job:
    """So many seconds of a processor; `then` is called at its end."""

    kind: Kind
    request: int
    stage: str
    target: str
    left_s: float
    then: Callable[[], None]


class Processor:
    """Stages run one after another, in the order in which they became ready. All other work goes before them, and interrupts."""

    def __init__(self, node: str, clock: Clock, log: list[Interval]) -> None:
        self._node, self._clock, self._log = node, clock, log
        self._stages: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._current: Job | None = None
        self._since = 0.0
        self._turn = 0  # an end that was planned for an earlier turn is void

    def submit(self, job: Job) -> None:
        (self._stages if job.kind == "compute" else self._others).append(job)
        if self._current is not None and self._current.kind == "compute" and job.kind != "compute":
            interrupted = self._current
            interrupted.left_s -= self._clock.now - self._since
            self._leave()
            self._stages.appendleft(interrupted)
        if self._current is None:
            self._next()

    def _next(self) -> None:
        job = self._current = (self._others or self._stages).popleft()
        self._since = self._clock.now
        self._turn += 1
        turn = self._turn
        self._clock.at(self._since + max(job.left_s, 0.0), lambda: self._end(turn))

    def _leave(self) -> None:
        job = self._current
        assert job is not None
        self._log.append(Interval(job.kind, self._node, job.request, job.stage, job.target, self._since, self._clock.now))
        self._current = None
        self._turn += 1

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        job = self._current
        assert job is not None
        self._leave()
        job.then()
        if self._current is None and (self._others or self._stages):
            self._next()


@dataclass(slots=True)
class _Parcel:
    stage: str
    target: str
    left_bytes: float
    turn_bytes: float
    then: Callable[[], None]
    interval: int = -1  # of the turn before, in the log


class LinkQueue:
    """One stream. A request's parcels are sent in order, those of different requests in turn, chunk by chunk."""

    def __init__(self, name: str, link: Link, clock: Clock, log: list[Interval]) -> None:
        self._name, self._link, self._clock, self._log = name, link, clock, log
        self._parcels: dict[int, deque[_Parcel]] = {}
        self._turns: deque[int] = deque()
        self._busy = False

    def send(self, request: int, stage: str, target: str, size_bytes: float, then: Callable[[], None]) -> None:
        """`then` is called when the last byte has arrived."""
        parcel = _Parcel(stage, target, size_bytes, max(CHUNK_BYTES, size_bytes / _MAX_TURNS), then)
        if request in self._parcels:
            self._parcels[request].append(parcel)
        else:
            self._parcels[request] = deque((parcel,))
            self._turns.append(request)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = True
        request = self._turns.popleft()
        parcel = self._parcels[request][0]
        size = min(parcel.left_bytes, parcel.turn_bytes)
        parcel.left_bytes -= size
        start = self._clock.now
        end = start + size / self._link.bandwidth_bytes_per_s
        before = self._log[parcel.interval] if parcel.interval >= 0 else None
        if before is not None and before.end_s == start:  # nobody came between
            self._log[parcel.interval] = Interval("transfer", self._name, request, parcel.stage, parcel.target, before.start_s, end)
        else:
            parcel.interval = len(self._log)
            self._log.append(Interval("transfer", self._name, request, parcel.stage, parcel.target, start, end))
        self._clock.at(end, lambda: self._end(request, parcel))

    def _end(self, request: int, parcel: _Parcel) -> None:
        self._busy = False
        waiting = self._parcels[request]
        if parcel.left_bytes <= 0:
            waiting.popleft()
            self._clock.at(self._clock.now + self._link.latency_s, parcel.then)
        if waiting:
            self._turns.append(request)
        else:
            del self._parcels[request]
        if self._turns:
            self._next()
