"""A request's way through the plan, as `nodes.pipeline` goes it: admit, deliver, run, encode, send, decode, join, answer."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from partitioner.cost import NO_OVERHEAD, RAW, CodecFigures, Machine, Overhead
from partitioner.simulation.records import Interval, Passage, Simulation
from partitioner.simulation.resources import Clock, Cores, Job, LinkQueue, Processor
from splitnet.cluster import Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, Plan, Transfer

__all__ = ["simulate"]


def simulate(
    plan: Plan,
    links: Mapping[tuple[str, str], Link],
    *,
    requests: int = 1,
    max_in_flight: int | None = None,
    arrivals: Sequence[float] | None = None,
    seconds: Mapping[str, float] | None = None,
    codecs: Mapping[str, CodecFigures] = RAW,
    overheads: Mapping[str, Overhead] | None = None,
    machines: Sequence[Machine] = (),
    spare_core: bool = False,
) -> Simulation:
    """Plays `requests` equal requests through the plan.

    links: by (source, target), as in the cluster. max_in_flight: the plan's unless given. arrivals: seconds at which the requests come,
    not falling (default: all at 0, so that the pipeline is kept full). seconds: stage -> compute time (default: what the plan says).
    codecs, overheads, machines: as in `partitioner.cost.evaluate`. The work of one request is that of the plan's batch.

    Raises BadInput for figures that cannot be, NoPlan where a transfer has no link to go over.
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
    return _Player(plan, links, limit, given, codecs, overheads or {}, machines, spare_core).play(times)


@dataclass(frozen=True, slots=True)
class _Route:
    """A transfer with its costs worked out. `link` is None within a node."""

    source: str
    target: str
    link: LinkQueue | None
    encode_s: float
    decode_s: float
    sent_bytes: float


@dataclass(slots=True)
class _Open:
    """A request that is under way."""

    admitted_s: float
    missing: dict[str, int]  # transfers that each stage, and the client, still waits for
    left: int  # stages that have not run


class _Player:
    def __init__(
        self, plan: Plan, links: Mapping[tuple[str, str], Link], limit: int, seconds: Mapping[str, float], codecs: Mapping[str, CodecFigures],
        overheads: Mapping[str, Overhead], machines: Sequence[Machine], spare_core: bool,
    ) -> None:  # fmt: skip
        self.clock = Clock()
        self.log: list[Interval] = []
        self.limit = limit
        self.overheads = overheads
        self.home = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
        self.seconds = {stage.name: seconds[stage.name] + self._overhead(stage.name).stage_s for stage in plan.stages}
        shared = [(Cores(machine.cores), machine.threads) for machine in machines]
        self.cores = {node: (cores, threads[node]) for cores, threads in shared for node in threads}
        nodes = list(dict.fromkeys(self.home.values()))
        self.compute = {node: Processor(node, self.clock, self.log, *self.cores.get(node, ())) for node in nodes}
        self.codec = {node: Processor(node, self.clock, self.log) for node in nodes} if spare_core else self.compute
        self.links: dict[tuple[str, str], LinkQueue] = {}
        self.routes: dict[str, list[_Route]] = {name: [] for name in self.home}
        self.awaited = dict.fromkeys(self.home, 0)
        for transfer in plan.transfers:
            self.routes[transfer.source].append(self._route(transfer, links, codecs))
            self.awaited[transfer.target] += 1
        self.starters = [stage.name for stage in plan.stages if not self.awaited[stage.name]]  # a graph without inputs has such
        self.stages = len(plan.stages)
        self.waiting: deque[int] = deque()
        self.open: dict[int, _Open] = {}
        self.arrived: list[float] = []
        self.passages: dict[int, Passage] = {}

    def _overhead(self, stage: str) -> Overhead:
        return self.overheads.get(self.home[stage], NO_OVERHEAD)

    def _route(self, transfer: Transfer, links: Mapping[tuple[str, str], Link], codecs: Mapping[str, CodecFigures]) -> _Route:
        a, b = self.home[transfer.source], self.home[transfer.target]
        if a == b or not transfer.bytes:
            return _Route(transfer.source, transfer.target, None, 0.0, 0.0, 0.0)
        link, codec = links.get((a, b)), codecs.get(transfer.codec)
        if link is None:
            raise NoPlan(
                f"stage {transfer.source or 'the client'!r} on node {a!r} must send {transfer.bytes} bytes to node {b!r}, but there is no link {a!r} -> {b!r}",
                remedy="add the link to the cluster",
            )
        if codec is None:
            raise BadInput(f"there are no figures for the codec {transfer.codec!r}; there are for {', '.join(codecs)}")
        if (a, b) not in self.links:
            self.links[a, b] = LinkQueue(f"{a}->{b}", link, self.clock, self.log)
        encode_s = codec.encode_s(transfer.bytes, a) + self._overhead(transfer.source).message_s * len(transfer.tensors)
        decode_s = codec.decode_s(transfer.bytes, b) + self._overhead(transfer.target).message_s * len(transfer.tensors)
        sent = codec.sent_bytes(transfer.bytes, transfer.tensors)  # a tensor is called like its operator, but where one has several
        return _Route(transfer.source, transfer.target, self.links[a, b], encode_s, decode_s, sent)

    def play(self, times: Sequence[float]) -> Simulation:
        self.arrived = list(times)
        for request, time_s in enumerate(times):
            self.clock.at(time_s, partial(self._arrive, request))
        self.clock.run()
        passages = tuple(self.passages[request] for request in range(len(times)))
        done = (interval for interval in self.log if interval.end_s > interval.start_s)
        return Simulation(passages, tuple(sorted(done, key=lambda interval: (interval.start_s, interval.end_s))), self.limit)

    def _arrive(self, request: int) -> None:
        self.waiting.append(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.open) < self.limit:
            request = self.waiting.popleft()
            self.open[request] = _Open(self.clock.now, dict(self.awaited), self.stages)
            accept_s = self._overhead(CLIENT).request_s
            if accept_s:
                self.codec[self.home[CLIENT]].submit(Job("accept", request, CLIENT, "", accept_s, partial(self._accepted, request)))
            else:
                self._accepted(request)

    def _accepted(self, request: int) -> None:
        for name in self.starters:
            self._start(request, name)
        self._deliver(request, CLIENT)

    def _start(self, request: int, stage: str) -> None:
        self.compute[self.home[stage]].submit(
            Job("compute", request, stage, "", self.seconds[stage], partial(self._computed, request, stage))
        )

    def _computed(self, request: int, stage: str) -> None:
        self.open[request].left -= 1
        self._deliver(request, stage)
        self._end_if_done(request)

    def _deliver(self, request: int, source: str) -> None:
        """To each target in the plan's order."""
        for route in self.routes[source]:
            if route.link is None:
                self._received(request, route)
            elif route.encode_s:
                job = Job("encode", request, source, route.target, route.encode_s, partial(self._send, request, route))
                self.codec[self.home[source]].submit(job)
            else:
                self._send(request, route)

    def _send(self, request: int, route: _Route) -> None:
        assert route.link is not None
        route.link.send(request, route.source, route.target, route.sent_bytes, partial(self._sent, request, route))

    def _sent(self, request: int, route: _Route) -> None:
        if route.decode_s:
            job = Job("decode", request, route.source, route.target, route.decode_s, partial(self._received, request, route))
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
