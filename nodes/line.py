"""The line at the ingress: which of the waiting requests, or which rows of them, go into the pipeline next.

Between clients it is fair queueing (Demers, Keshav, Shenker, "Analysis and simulation of a fair queueing algorithm", 1989): each client's rows
are counted, and the one that has had least is next, so that many requests of one client hold up nobody else. Whoever comes begins with
what those in line have had on average: neither owed for its absence, nor let past everybody. Higher priorities go first; what waits
rises by one priority per `AGEING_S` since it came, or since its client was last served at that priority.

The clock is the caller's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from splitnet.batching import Batching

__all__ = ["AGEING_S", "Line", "Part", "Waiting"]

AGEING_S = 1.0
_KEPT = 64  # clients that have left the line and are remembered, at least


class Waiting(Protocol):
    """What the line needs to know of a request."""

    @property
    def client(self) -> Hashable: ...
    @property
    def priority(self) -> int: ...
    @property
    def rows(self) -> int:
        """At least 1."""
        ...

    @property
    def kind(self) -> Hashable:
        """Those of one kind may be joined; None: with nobody."""
        ...


T = TypeVar("T", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Rows `first` to `first + rows` of a request."""

    call: T
    first: int
    rows: int

    @property
    def whole(self) -> bool:
        return self.rows == self.call.rows


@dataclass(slots=True)
class _Entry(Generic[T]):
    call: T
    came_s: float
    taken: int = 0  # rows

    def piece(self, batching: Batching) -> int:
        left = self.call.rows - self.taken
        return min(left, batching.microbatch) if batching.microbatch and self.call.kind is not None else left


@dataclass(slots=True)
class _Flow(Generic[T]):
    """One client's requests of one priority, in the order in which they came."""

    client: Hashable
    priority: int
    entries: deque[_Entry[T]]
    served_s: float = float("-inf")

    def level(self, now_s: float) -> int:
        waited_s = now_s - max(self.entries[0].came_s, self.served_s)
        return self.priority + int(max(waited_s, 0.0) / AGEING_S)


class Line(Generic[T]):
    """Not bounded here: admission bounds it. Times of one line never go backwards."""

    def __init__(self, batching: Batching) -> None:
        self._batching = batching
        self._flows: dict[tuple[Hashable, int], _Flow[T]] = {}
        self._alone: deque[Part[T]] = deque()
        self._clients: Counter[Hashable] = Counter()  # requests in line
        self._shares: dict[Hashable, float] = {}  # rows that a client has had
        self._average = 0.0  # of the shares of those in line

    def __len__(self) -> int:
        """Requests of which something waits; what is to go alone counts by the piece."""
        return len(self._alone) + sum(len(flow.entries) for flow in self._flows.values())

    def add(self, call: T, now_s: float) -> None:
        key = (call.client, call.priority)
        if key not in self._flows:
            self._flows[key] = _Flow(call.client, call.priority, deque())
        self._flows[key].entries.append(_Entry(call, now_s))
        if not self._clients[call.client]:
            self._shares[call.client] = max(self._shares.get(call.client, 0.0), self._average)
        self._clients[call.client] += 1

    def put_back(self, part: Part[T]) -> None:
        """It was taken, and is to be sent again: next, and by itself."""
        self._alone.append(part)

    def remove(self, call: T) -> None:
        """Whatever of it still waits."""
        self._alone = deque(part for part in self._alone if part.call is not call)
        flow = self._flows.get((call.client, call.priority))
        if flow is not None:
            kept = deque(entry for entry in flow.entries if entry.call is not call)
            left, flow.entries = len(flow.entries) - len(kept), kept
            self._tidy(flow, left)

    def wait_s(self, now_s: float) -> float | None:
        """How long until something is to be sent: 0 for now; None while nobody waits."""
        if self._alone:
            return 0.0
        return min((self._delay_s(flow, now_s) for flow in self._flows.values()), default=None)

    def take(self, now_s: float) -> list[Part[T]]:
        """What goes next as one batch, where `wait_s` is 0: at least one part."""
        if self._alone:
            return [self._alone.popleft()]
        first = self._best((flow for flow in self._flows.values() if self._delay_s(flow, now_s) <= 0), now_s)
        assert first is not None, "nobody is to be sent yet"
        kind, parts = first.entries[0].call.kind, [self._serve(first, now_s)]
        room = self._batching.max_batch - parts[0].rows
        while kind is not None and room > 0:
            fits = (f for f in self._flows.values() if f.entries[0].call.kind == kind and f.entries[0].piece(self._batching) <= room)
            flow = self._best(fits, now_s)
            if flow is None:
                break
            parts.append(self._serve(flow, now_s))
            room -= parts[-1].rows
        return parts

    def _best(self, flows: Iterator[_Flow[T]], now_s: float) -> _Flow[T] | None:
        return min(
            flows, key=lambda flow: (-flow.level(now_s), self._shares[flow.client], flow.served_s, flow.entries[0].came_s), default=None
        )

    def _serve(self, flow: _Flow[T], now_s: float) -> Part[T]:
        entry = flow.entries[0]
        part = Part(entry.call, entry.taken, entry.piece(self._batching))
        entry.taken += part.rows
        flow.served_s = now_s
        self._shares[flow.client] += part.rows
        self._average += part.rows / len(self._clients)
        if entry.taken == entry.call.rows:
            flow.entries.popleft()
            self._tidy(flow, 1)
        return part

    def _tidy(self, flow: _Flow[T], left: int) -> None:
        """So many of its requests have left the line."""
        self._clients[flow.client] -= left
        if not flow.entries:
            del self._flows[flow.client, flow.priority]
        if not self._clients[flow.client]:
            del self._clients[flow.client]
        if not self._clients:
            self._shares.clear()  # nobody has waited for anybody
            self._average = 0.0
        elif len(self._shares) > _KEPT + 2 * len(self._clients):
            self._shares = {c: share for c, share in self._shares.items() if c in self._clients or share > self._average}

    def _delay_s(self, flow: _Flow[T], now_s: float) -> float:
        """How long the first of a flow still waits for company."""
        entry, batching = flow.entries[0], self._batching
        left_s = entry.came_s + batching.max_delay_s - now_s
        if left_s <= 0 or entry.call.kind is None or entry.taken or self._rows_of(entry.call.kind) >= batching.max_batch:
            return 0.0
        return left_s

    def _rows_of(self, kind: Hashable) -> int:
        return sum(entry.call.rows for flow in self._flows.values() for entry in flow.entries if entry.call.kind == kind)
