"""What a plan does with many requests, played event by event as the nodes work them off. Pure: standard library only.

- A node has one compute thread that runs stages first come, first served, each once all its inputs of a request are there
  (`nodes.compute`, `nodes.pipeline`). Codecs use the node's processor too: their work stands in the same line, or beside it where
  the node has a core to spare (`spare_core`).
- A value goes to every other node over the one stream per directed pair (`nodes.outbox`): requests take turns chunk by chunk. Transmission
  keeps the link busy, propagation does not. Within a node it takes no time. A tensor is encoded, then sent, then decoded;
  that these overlap within a tensor of several chunks is left out.
- The ingress admits `max_in_flight` requests and no more (`nodes.admission`). Whoever comes meanwhile waits outside, as
  `Client.stream` does, and is let in, in order, when an answer is complete.

The same costs as `partitioner.cost`, which has the closed forms: one request alone takes `Cost.latency_s`; many of them, where each
node runs one stage and each link serves one pair of stages, follow each other at max(bottleneck_s, latency_s / max_in_flight) exactly. What happens in
between, who waits for whom when stages share a node or a link, is what this is for.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from splitnet.cluster import Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, Plan, Transfer
from splitnet.wire import CHUNK_BYTES

__all__ = ["CodecCost", "Interval", "Passage", "Simulation", "simulate"]

Kind = Literal["compute", "encode", "decode", "transfer"]
_MAX_TURNS = 64  # per transfer: larger ones take larger turns, so that a huge tensor does not make a million events
_SHORTEST_S = 1e-12


@dataclass(frozen=True, slots=True)
class CodecCost:
    """`ratio`: encoded bytes per byte. Speeds are in bytes before encoding per second, on the stages' own processors."""

    ratio: float = 1.0
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Interval:
    """A resource at work for one request. `place` is a node, or a link as "a->b". `stage` is what computes or sends (CLIENT: the
    ingress sends an input), `target` what the value goes to. A transfer that others interrupt has several intervals."""

    kind: Kind
    place: str
    request: int
    stage: str
    target: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Passage:
    """One request's times: at the door, let in, answered."""

    arrived_s: float
    admitted_s: float
    done_s: float

    @property
    def latency_s(self) -> float:
        """From being let in to the answer."""
        return self.done_s - self.admitted_s


@dataclass(frozen=True)
class Simulation:
    """`requests` are in the order of arrival; `intervals` in the order in which they began."""

    requests: tuple[Passage, ...]
    intervals: tuple[Interval, ...]
    max_in_flight: int

    @property
    def end_s(self) -> float:
        """When the last answer is complete."""
        return max(request.done_s for request in self.requests)

    @property
    def throughput_per_s(self) -> float:
        """Answers per second once the pipeline is full: the first ones are left out, as `splitnet bench` does. Over whole windows of
        `max_in_flight` where there are enough, since a window's requests may travel in a bunch. One request alone has the throughput
        of one after the other."""
        done = sorted(request.done_s for request in self.requests)
        if len(done) == 1:
            return 1.0 / max(self.requests[0].latency_s, _SHORTEST_S)
        counted = len(done) - 1 - min(self.max_in_flight, len(done) // 4)
        counted -= counted % self.max_in_flight if counted >= self.max_in_flight else 0
        return counted / max(done[-1] - done[-1 - counted], _SHORTEST_S)

    def busy_s(self) -> dict[str, float]:
        """How long each node and each link was at work."""
        total: dict[str, float] = {}
        for interval in self.intervals:
            total[interval.place] = total.get(interval.place, 0.0) + interval.seconds
        return total


def simulate(
    plan: Plan,
    links: Mapping[tuple[str, str], Link],
    *,
    requests: int = 1,
    max_in_flight: int | None = None,
    arrivals: Sequence[float] | None = None,
    seconds: Mapping[str, float] | None = None,
    codecs: Mapping[str, CodecCost] | None = None,
    spare_core: bool = False,
) -> Simulation:
    """Plays `requests` equal requests through the plan.

    links: by (source, target), as in the cluster. max_in_flight: the plan's unless given. arrivals: seconds at which the requests come,
    not falling (default: all at 0, so that the pipeline is kept full). seconds: stage -> compute time (default: what the plan says).
    codecs: name -> cost; a codec that is not listed changes no bytes and takes no time. The work of one request is that of the
    plan's batch. Raises BadInput for figures that cannot be, NoPlan where a transfer has no link to go over.
    """
    limit = plan.max_in_flight if max_in_flight is None else max_in_flight
    times = [0.0] * requests if arrivals is None else list(arrivals)
    if requests < 1 or limit < 1:
        raise BadInput(f"requests and max_in_flight must be at least 1, got {requests} and {limit}")
    if len(times) != requests or any(not (math.isfinite(t) and t >= 0) for t in times) or any(b < a for a, b in itertools.pairwise(times)):
        raise BadInput(f"arrivals must be {requests} figures that are not negative and do not fall")
    given = {stage.name: stage.seconds for stage in plan.stages} | dict(seconds or {})
    for name, figure in given.items():
        if not (math.isfinite(figure) and figure >= 0):
            raise BadInput(f"stage {name!r} has {figure} seconds")
    return _Player(plan, links, limit, given, codecs or {}, spare_core).play(times)


@dataclass(frozen=True, slots=True)
class _Route:
    """A transfer with its costs worked out. `link` is None within a node."""

    source: str
    target: str
    link: _LinkQueue | None
    encode_s: float
    decode_s: float
    encoded_bytes: float


@dataclass(slots=True)
class _Open:
    """A request that is under way."""

    admitted_s: float
    missing: dict[str, int]  # transfers that each stage, and the client, still waits for
    left: int  # stages that have not run


class _Clock:
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
class _Job:
    kind: Kind
    request: int
    stage: str
    target: str
    seconds: float
    then: Callable[[], None]


class _Processor:
    """Works jobs off one after another, in the order in which they came."""

    def __init__(self, node: str, clock: _Clock, log: list[Interval]) -> None:
        self._node, self._clock, self._log = node, clock, log
        self._line: deque[_Job] = deque()
        self._busy = False

    def submit(self, job: _Job) -> None:
        self._line.append(job)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        job = self._line.popleft()
        self._busy = True
        start = self._clock.now
        self._log.append(Interval(job.kind, self._node, job.request, job.stage, job.target, start, start + job.seconds))
        self._clock.at(start + job.seconds, lambda: self._end(job))

    def _end(self, job: _Job) -> None:
        self._busy = False
        if self._line:
            self._next()
        job.then()


@dataclass(slots=True)
class _Parcel:
    stage: str
    target: str
    left_bytes: float
    turn_bytes: float
    then: Callable[[], None]
    interval: int = field(default=-1)  # of the turn before, in the log


class _LinkQueue:
    """One stream. A request's parcels are sent in order, those of different requests in turn, chunk by chunk."""

    def __init__(self, name: str, link: Link, clock: _Clock, log: list[Interval]) -> None:
        self._name, self._link, self._clock, self._log = name, link, clock, log
        self._parcels: dict[int, deque[_Parcel]] = {}
        self._turns: deque[int] = deque()
        self._busy = False

    def send(self, request: int, stage: str, target: str, size_bytes: float, then: Callable[[], None]) -> None:
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
        start = self._clock.now
        end = start + size / self._link.bandwidth_bytes_per_s
        parcel.left_bytes -= size
        before = self._log[parcel.interval] if parcel.interval >= 0 else None
        if before is not None and before.end_s == start:
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


class _Player:
    def __init__(
        self, plan: Plan, links: Mapping[tuple[str, str], Link], limit: int, seconds: Mapping[str, float], codecs: Mapping[str, CodecCost],
        spare_core: bool,
    ) -> None:  # fmt: skip
        self.clock = _Clock()
        self.log: list[Interval] = []
        self.limit = limit
        self.seconds = seconds
        self.home = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
        nodes = set(self.home.values())
        self.compute = {node: _Processor(node, self.clock, self.log) for node in nodes}
        self.codec = {node: _Processor(node, self.clock, self.log) for node in nodes} if spare_core else self.compute
        self.links: dict[tuple[str, str], _LinkQueue] = {}
        self.routes: dict[str, list[_Route]] = {name: [] for name in self.home}
        self.awaited = dict.fromkeys(self.home, 0)
        for transfer in plan.transfers:
            self.routes[transfer.source].append(self._route(transfer, links, codecs.get(transfer.codec, CodecCost())))
            self.awaited[transfer.target] += 1
        self.starters = [stage.name for stage in plan.stages if not self.awaited[stage.name]]  # a graph without inputs has such
        self.stages = len(plan.stages)
        self.waiting: deque[int] = deque()
        self.open: dict[int, _Open] = {}
        self.arrived: list[float] = []
        self.passages: dict[int, Passage] = {}

    def _route(self, transfer: Transfer, links: Mapping[tuple[str, str], Link], cost: CodecCost) -> _Route:
        a, b = self.home[transfer.source], self.home[transfer.target]
        if a == b or not transfer.bytes:
            return _Route(transfer.source, transfer.target, None, 0.0, 0.0, 0.0)
        link = links.get((a, b))
        if link is None:
            raise NoPlan(
                f"stage {transfer.source or 'the client'!r} on node {a!r} must send {transfer.bytes} bytes to node {b!r}, but there is no link {a!r} -> {b!r}",
                remedy="add the link to the cluster",
            )
        queue = self.links.setdefault((a, b), _LinkQueue(f"{a}->{b}", link, self.clock, self.log))
        encode_s, decode_s = transfer.bytes / cost.encode_bytes_per_s, transfer.bytes / cost.decode_bytes_per_s
        return _Route(transfer.source, transfer.target, queue, encode_s, decode_s, transfer.bytes * cost.ratio)

    def play(self, times: Sequence[float]) -> Simulation:
        self.arrived = list(times)
        for request, time_s in enumerate(times):
            self.clock.at(time_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        self.clock.run()
        passages = tuple(self.passages[request] for request in range(len(times)))
        intervals = sorted(self.log, key=lambda interval: (interval.start_s, interval.end_s))
        return Simulation(passages, tuple(i for i in intervals if i.end_s > i.start_s), self.limit)

    def _arrive(self, request: int) -> None:
        self.waiting.append(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.open) < self.limit:
            request = self.waiting.popleft()
            self.open[request] = _Open(self.clock.now, dict(self.awaited), self.stages)
            for name in self.starters:
                self._start(request, name)
            self._deliver(request, CLIENT)

    def _start(self, request: int, stage: str) -> None:
        node = self.home[stage]
        self.compute[node].submit(_Job("compute", request, stage, "", self.seconds[stage], lambda: self._computed(request, stage)))

    def _computed(self, request: int, stage: str) -> None:
        self.open[request].left -= 1
        self._deliver(request, stage)
        self._end_if_done(request)

    def _deliver(self, request: int, source: str) -> None:
        """Encode and send, to each target in the plan's order."""
        for route in self.routes[source]:
            if route.link is None:
                self._received(request, route)
            elif route.encode_s:
                job = _Job("encode", request, source, route.target, route.encode_s, lambda route=route: self._send(request, route))  # type: ignore[misc]
                self.codec[self.home[source]].submit(job)
            else:
                self._send(request, route)

    def _send(self, request: int, route: _Route) -> None:
        assert route.link is not None
        route.link.send(request, route.source, route.target, route.encoded_bytes, lambda: self._arrived(request, route))

    def _arrived(self, request: int, route: _Route) -> None:
        if route.decode_s:
            job = _Job("decode", request, route.source, route.target, route.decode_s, lambda: self._received(request, route))
            self.codec[self.home[route.target]].submit(job)
        else:
            self._received(request, route)

    def _received(self, request: int, route: _Route) -> None:
        missing = self.open[request].missing
        missing[route.target] -= 1
        if route.target == CLIENT:
            self._end_if_done(request)
        elif not missing[route.target]:
            self._start(request, route.target)

    def _end_if_done(self, request: int) -> None:
        state = self.open.get(request)
        if state is not None and not state.left and not state.missing[CLIENT]:
            del self.open[request]
            self.passages[request] = Passage(self.arrived[request], state.admitted_s, self.clock.now)
            self._admit()
