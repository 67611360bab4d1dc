"""What befell this node lately, for people: kept in memory, the newest only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nodes.logs import Log

__all__ = ["Event", "Events"]

_KEPT = 256


@dataclass(frozen=True, slots=True)
class Event:
    """`time_s`: since the epoch. `kind`: lost, back, replaced, replayed, unrecoverable, restored. `node`: whom it is about."""

    time_s: float
    kind: str
    node: str
    deployment: str
    text: str


class Events:
    def __init__(self, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._log = log
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=_KEPT)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    def add(self, kind: str, *, node: str = "", deployment: str = "", text: str = "") -> None:
        self._events.append(Event(self._clock(), kind, node, deployment, text[:500]))
        self._log.info("event", kind=kind, about=node, deployment=deployment, text=text)
