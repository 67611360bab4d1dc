"""The clock, a node's processor, a link, and the cores that several of them may share: each works, and writes down what it did."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from partitioner.simulation.records import Interval, Kind
from splitnet.cluster import Link
from splitnet.wire import CHUNK_BYTES

__all__ = ["TRANSPORT_BYTES", "Clock", "Cores", "Job", "LinkQueue", "Processor"]

TRANSPORT_BYTES = 4 << 20  #: about what a socket and the stream's flow control take before a sender waits (Linux: tcp_wmem's default limit)
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


class Cores:
    """A machine's cores, shared evenly by those who work when these want more than there are."""

    def __init__(self, count: float) -> None:
        self._count = count
        self._working: dict[_Worker, None] = {}

    def enter(self, worker: _Worker) -> None:
        self._working[worker] = None
        self._retune()

    def leave(self, worker: _Worker) -> None:
        del self._working[worker]
        self._retune()

    def _retune(self) -> None:
        wanted = sum(worker.threads for worker in self._working)
        for worker in self._working:
            worker.set_pace(min(1.0, self._count / wanted))


class _Worker:
    """Does one piece of work at a time, at the pace that the cores leave it."""

    def __init__(self, clock: Clock, cores: Cores | None, threads: int) -> None:
        self.threads = threads
        self._clock, self._cores = clock, cores
        self._pace = 1.0
        self._left_s = self._since = 0.0
        self._turn = 0  # an end that was planned for an earlier turn is void
        self._then: Callable[[], None] = lambda: None

    def begin(self, work_s: float, then: Callable[[], None]) -> None:
        self._left_s, self._since, self._then = work_s, self._clock.now, then
        if self._cores is None:
            self._plan()
        else:
            self._pace = 0.0
            self._cores.enter(self)  # sets the pace

    def stop(self) -> float:
        """Ends the work early; returns what is left of it."""
        self._settle()
        self._end()
        return self._left_s

    def set_pace(self, pace: float) -> None:
        if pace != self._pace:
            self._settle()
            self._pace = pace
            self._plan()

    def _settle(self) -> None:
        self._left_s = max(0.0, self._left_s - (self._clock.now - self._since) * self._pace)
        self._since = self._clock.now

    def _plan(self) -> None:
        self._turn += 1
        turn = self._turn
        self._clock.at(self._since + self._left_s / self._pace, lambda: self._finish(turn))

    def _finish(self, turn: int) -> None:
        if turn == self._turn:
            self._end()
            self._then()

    def _end(self) -> None:
        self._turn += 1
        if self._cores is not None:
            self._cores.leave(self)


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

    def __init__(self, node: str, clock: Clock, log: list[Interval], cores: Cores | None = None, threads: int = 1) -> None:
        self._node, self._clock, self._log = node, clock, log
        self._worker = _Worker(clock, cores, threads)
        self._stages: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._current: Job | None = None
        self._since = 0.0

    def submit(self, job: Job) -> None:
        (self._stages if job.kind == "compute" else self._others).append(job)
        if self._current is not None and self._current.kind == "compute" and job.kind != "compute":
            interrupted = self._current
            interrupted.left_s = self._worker.stop()
            self._leave()
            self._stages.appendleft(interrupted)
        if self._current is None:
            self._next()

    def _next(self) -> None:
        self._current = (self._others or self._stages).popleft()
        self._since = self._clock.now
        self._worker.begin(self._current.left_s, self._end)

    def _leave(self) -> Job:
        job = self._current
        assert job is not None
        self._log.append(Interval(job.kind, self._node, job.request, job.stage, job.target, self._since, self._clock.now))
        self._current = None
        return job

    def _end(self) -> None:
        self._leave().then()
        if self._current is None and (self._others or self._stages):
            self._next()


@dataclass(slots=True)
class _Parcel:
    request: int
    stage: str
    target: str
    unsent_bytes: float  # not yet in the transport
    left_bytes: float  # not yet at the far side
    turn_bytes: float
    then: Callable[[], None]
    interval: int = -1  # of the chunk before, in the log


class LinkQueue:
    """One stream. The transport takes chunks until it holds `TRANSPORT_BYTES`, and sends them in that order. What waits before it
    takes turns: a request's parcels in order, those of different requests chunk by chunk."""

    def __init__(self, name: str, link: Link, clock: Clock, log: list[Interval]) -> None:
        self._name, self._link, self._clock, self._log = name, link, clock, log
        self._worker = _Worker(clock, None, 1)
        self._parcels: dict[int, deque[_Parcel]] = {}
        self._turns: deque[int] = deque()
        self._transport: deque[tuple[_Parcel, float]] = deque()
        self._held_bytes = 0.0
        self._busy = False

    def send(self, request: int, stage: str, target: str, size_bytes: float, then: Callable[[], None]) -> None:
        """`then` is called when the last byte has arrived."""
        parcel = _Parcel(request, stage, target, size_bytes, size_bytes, max(CHUNK_BYTES, size_bytes / _MAX_TURNS), then)
        if request in self._parcels:
            self._parcels[request].append(parcel)
        else:
            self._parcels[request] = deque((parcel,))
            self._turns.append(request)
        self._fill()

    def _fill(self) -> None:
        while self._turns and (not self._transport or self._held_bytes < TRANSPORT_BYTES):
            request = self._turns.popleft()
            waiting = self._parcels[request]
            parcel = waiting[0]
            size = min(parcel.unsent_bytes, parcel.turn_bytes)
            parcel.unsent_bytes -= size
            self._held_bytes += size
            self._transport.append((parcel, size))
            if parcel.unsent_bytes <= 0:
                waiting.popleft()
            if waiting:
                self._turns.append(request)
            else:
                del self._parcels[request]
        if not self._busy and self._transport:
            self._next()

    def _next(self) -> None:
        self._busy = True
        parcel, size = self._transport[0]
        start = self._clock.now
        self._worker.begin(size / self._link.bandwidth_bytes_per_s, lambda: self._end(parcel, size, start))

    def _end(self, parcel: _Parcel, size: float, start: float) -> None:
        self._busy = False
        self._transport.popleft()
        self._held_bytes -= size
        parcel.left_bytes -= size
        self._write_down(parcel, start)
        if parcel.left_bytes <= 0:
            self._clock.at(self._clock.now + self._link.latency_s, parcel.then)
        self._fill()

    def _write_down(self, parcel: _Parcel, start: float) -> None:
        before = self._log[parcel.interval] if parcel.interval >= 0 else None
        joins = before is not None and before.end_s == start  # nobody came between
        since = before.start_s if joins and before is not None else start
        done = Interval("transfer", self._name, parcel.request, parcel.stage, parcel.target, since, self._clock.now)
        if joins:
            self._log[parcel.interval] = done
        else:
            parcel.interval = len(self._log)
            self._log.append(done)
