"""What was played: each request's times, and what each resource did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Interval", "Kind", "Passage", "Simulation"]

Kind = Literal["accept", "compute", "encode", "decode", "transfer"]
_SHORTEST_S = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """A resource at work for one request. `place` is a node, or a link as "a->b". `stage` is what computes or sends (CLIENT: the
    ingress), `target` what the value goes to. What was interrupted has several intervals."""

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
        """Answers per second while the pipeline is full: the first `max_in_flight`, which fill it, and the last, which empty it, are left
        out, and whole windows counted, since the requests of a window may travel in a bunch. Where there are too few requests for
        that, over as many as there are. One request alone has the throughput of one after the other."""
        done = sorted(request.done_s for request in self.requests)
        window, last = self.max_in_flight, len(done) - 1
        if not last:
            return 1.0 / max(self.requests[0].latency_s, _SHORTEST_S)
        if last >= 3 * window:
            last -= window
            first = last - (last - window) // window * window
        else:
            first = min(window, len(done) // 4)
        return (last - first) / max(done[last] - done[first], _SHORTEST_S)

    def busy_s(self, start_s: float = 0.0, end_s: float = math.inf) -> dict[str, float]:
        """How long each node and each link was at work between two times."""
        total: dict[str, float] = {}
        for interval in self.intervals:
            seconds = max(0.0, min(interval.end_s, end_s) - max(interval.start_s, start_s))
            total[interval.place] = total.get(interval.place, 0.0) + seconds
        return total
