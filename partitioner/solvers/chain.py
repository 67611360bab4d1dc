"""The exact solver for operators in one order: which devices, in which order, cut where.

Each device takes at most one interval. Dynamic programming over (set of used devices, last device, first device, position), for latency
with sums and for throughput with maxima (Benoit, Robert, Thierry 2008-2009 prove both NP-hard in the number of devices; this is
exponential only in that). M devices and L operators take about M^2 2^(M-2) L^2 vectorised steps: 100 x 8 about 0.1 s.
The first device is part of the state because the answer returns to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from partitioner.solvers.problem import Candidate, ChainProblem, Floats, Objective
from splitnet.errors import BadInput

__all__ = ["MAX_FIGURES", "MinMax", "MinSum", "candidates", "is_solvable", "solve_chain"]

MAX_FIGURES = 1 << 26  #: of the table: half a GiB of float64


def solve_chain(problem: ChainProblem, objective: Objective, *, stages: range | None = None) -> Candidate | None:
    """The best plan, or None where there is none. Among plans of equal bottleneck the one of least latency, among those of equal
    latency one of fewest stages. `stages`: how many there may be (default: any number)."""
    return next(candidates(problem, objective, stages=stages), None)


def candidates(problem: ChainProblem, objective: Objective, *, stages: range | None = None) -> Iterator[Candidate]:
    """The best plan for each (set of devices, last device, first device), best first. The first is optimal.

    For throughput those of the smallest bottleneck come first, by latency, then the others by bottleneck. Raises BadInput where
    there are too many devices for an exact answer.
    """
    allowed = stages or range(1, len(problem.devices) + 1)
    compute = problem.stage_seconds()
    travel = problem.link_seconds(problem.cut_bytes, "latency")
    back = problem.link_seconds(np.asarray(problem.return_bytes), "latency")
    if objective == "latency":
        yield from MinSum(compute, travel, back, allowed).candidates()
        return
    busy = problem.link_seconds(problem.cut_bytes, "throughput")
    busy_back = problem.link_seconds(np.asarray(problem.return_bytes), "throughput")
    table = MinMax(compute, busy, busy_back, allowed)
    narrowest = table.best_candidate()
    if narrowest is None:
        return
    best = narrowest.value_s
    quickest = MinSum(
        np.where(compute <= best, compute, np.inf),
        np.where(busy <= best, travel, np.inf),
        np.where(busy_back <= best, back, np.inf),
        allowed,
    )
    yield from (Candidate(best, c.cuts, c.order) for c in quickest.candidates())
    yield from (c for c in table.candidates() if c.value_s > best)


def is_solvable(devices: int, operators: int, most_stages: int) -> bool:
    """Whether the table of so many devices, operators and stages stays within `MAX_FIGURES`."""
    sets = sum(math.comb(devices, k) * k * k for k in range(1, min(most_stages, devices) + 1))
    return sets * (operators + 1) <= MAX_FIGURES


class _Table:
    """best[mask][last, first, i]: the least cost of running operators [0, i) on exactly the devices of `mask`, where `last` runs the last
    interval and `first` the first (indices into the sorted members of the mask).

    `compute` is (M, L+1, L+1), the cost of an interval on a device, `travel` (M, M, L+1) of a cut between two devices, `back` (M, M) of the
    answer's return; inf where it cannot be. `join` makes one cost of two.
    """

    join: np.ufunc

    def __init__(self, compute: Floats, travel: Floats, back: Floats, allowed: range) -> None:
        self.compute, self.travel, self.back, self.allowed = compute, travel, back, allowed
        self.devices = compute.shape[0]
        self.length = compute.shape[1] - 1
        self.most = min(max(allowed, default=0), self.devices, self.length)
        if not is_solvable(self.devices, self.length, self.most):
            raise BadInput(
                f"{self.devices} nodes with up to {self.most} stages over {self.length} operators are too many for an exact plan",
                remedy="allow fewer stages (max_stages), or leave out some nodes",
            )
        self.best: dict[int, Floats] = {}
        for mask, members in self._sets():
            self.best[mask] = self._extend(mask, members)

    def _sets(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        for size in range(1, self.most + 1):
            for members in combinations(range(self.devices), size):
                yield sum(1 << d for d in members), members

    def _extend(self, mask: int, members: tuple[int, ...]) -> Floats:
        size = len(members)
        table = np.full((size, size, self.length + 1), np.inf)
        if size == 1:
            table[0, 0] = self.compute[members[0], 0]
            return table
        for last, device in enumerate(members):
            entry = self._entry(mask, members, device)
            for k, first in enumerate(f for f in range(size) if f != last):
                rows = np.flatnonzero(np.isfinite(entry[k]))
                if rows.size:
                    table[last, first] = self.join(entry[k, rows, None], self.compute[device, rows]).min(axis=0)
        return table

    def _entry(self, mask: int, members: tuple[int, ...], device: int) -> Floats:
        """(first, j): the least cost until what crosses position j has reached `device`, the others having run [0, j)."""
        others = [d for d in members if d != device]
        cost: Floats = self.join(self.best[mask ^ (1 << device)], self.travel[others, device][:, None, :]).min(axis=0)
        return cost

    def candidates(self) -> Iterator[Candidate]:
        """The best for each set of devices, last and first device; best first, of equals those of fewer stages."""
        return (self._trace(*end) for end in self._ends())

    def best_candidate(self) -> Candidate | None:
        return next(self.candidates(), None)

    def _ends(self) -> list[tuple[float, int, int, int]]:
        found = []
        for mask, members in self._sets():
            if len(members) not in self.allowed:
                continue
            back = self.back[np.ix_(members, members)] if len(members) > 1 else np.zeros((1, 1))
            total = self.join(self.best[mask][:, :, self.length], back)
            for last, first in zip(*np.nonzero(np.isfinite(total)), strict=True):
                found.append((float(total[last, first]), len(members), mask, int(last), int(first)))
        return [(value, mask, last, first) for value, _, mask, last, first in sorted(found)]

    def _trace(self, value: float, mask: int, last: int, first: int) -> Candidate:
        """Walks back from the end, choosing again what the table chose."""
        cuts, order, end = [self.length], [], self.length
        while True:
            members = [d for d in range(self.devices) if mask >> d & 1]
            device = members[last]
            order.append(device)
            if len(members) == 1:
                cuts.append(0)
                return Candidate(value, tuple(reversed(cuts)), tuple(reversed(order)))
            first_device = members[first]
            others = [d for d in members if d != device]
            first = others.index(first_device)
            reached = self.join(self.best[mask ^ (1 << device)][:, first], self.travel[others, device])  # (e, j)
            end = int(np.argmin(self.join(reached.min(axis=0), self.compute[device, :, end])))
            last = int(np.argmin(reached[:, end]))
            cuts.append(end)
            mask ^= 1 << device


class MinSum(_Table):
    """The cost of a plan is the sum of its parts."""

    join = np.add


class MinMax(_Table):
    """The cost of a plan is its largest part."""

    join = np.maximum
