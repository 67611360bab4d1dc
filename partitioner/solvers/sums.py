"""The least sum: latency of a chain, exactly.

Dynamic programming over (devices chosen, last kind, first kind, error spent, position), level by level of the number of devices chosen
(Benoit, Robert, Thierry 2008-2009 prove the problem NP-hard in the number of devices; this is exponential only in that). M different
devices and L operators take about M^2 2^(M-2) L^2 vectorised steps. The first kind is part of the state only where an answer
returns to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partitioner.solvers.choices import Level, next_level, start
from partitioner.solvers.problem import Candidate, Floats

__all__ = ["Hop", "Sums"]


@dataclass(frozen=True, eq=False)
class Hop:
    """One way to cross a cut: `travel` (K, K, L+1) seconds from kind to kind, and the error that it spends (L+1,), in whole units."""

    codec: Floats  # (K, K, L+1): which codec this is; several may be one hop where error does not count
    travel: Floats
    spends: np.ndarray


@dataclass(frozen=True, eq=False)
class _Filled:
    level: Level
    cost: Floats  # (n, K last, F first, E spent, L+1)


class Sums:
    """`compute` is (K, L+1, L+1), the cost of a stage on a kind; `back` (K, K) of the answer's way; inf where it cannot be. `opening` (K,) is
    what the first stage of several pays besides, `closing` (K,) the last. `units`: how much error may be spent in all."""

    def __init__(
        self, compute: Floats, hops: Sequence[Hop], back: Floats, sizes: tuple[int, ...], allowed: range,
        *, units: int = 0,
    ) -> None:  # fmt: skip
        self.compute, self.hops, self.back, self.sizes, self.allowed = compute, hops, back, sizes, allowed
        self.kinds, self.length = compute.shape[0], compute.shape[1] - 1
        self.firsts = self.kinds if back.any() else 1
        self.errors = units + 1
        self.levels: list[_Filled] = []
        most = min(max(allowed, default=0), sum(sizes), self.length)
        level = start(sizes)
        for depth in range(1, most + 1):
            step = next_level(level, sizes)
            if step is None:
                break
            shape = (len(step.level.codes), self.kinds, self.firsts, self.errors, self.length + 1)
            cost = np.full(shape, np.inf)
            for kind in range(self.kinds):
                if depth == 1:
                    cost[step.after[kind], kind, kind if self.firsts > 1 else 0, 0] = compute[kind, 0]
                elif step.after[kind].size:
                    cost[step.after[kind], kind] = self._run(self._entry(self.levels[-1].cost[step.before[kind]], kind), kind)
            level = step.level
            self.levels.append(_Filled(level, cost))
            if not np.isfinite(cost).any():
                break

    def _entry(self, before: Floats, kind: int) -> Floats:
        """(n, F, E, j): the least cost until what crosses j has reached a device of this kind."""
        entry = np.full((before.shape[0], *before.shape[2:]), np.inf)
        for hop in self.hops:
            for last in range(self.kinds):
                travel = hop.travel[last, kind]
                if not np.isfinite(travel).any():
                    continue
                arrived = before[:, last] + travel
                for units in np.unique(hop.spends[np.isfinite(travel)]):
                    if units < self.errors:
                        at = np.where(hop.spends == units, arrived, np.inf)[:, :, : self.errors - units]
                        np.minimum(entry[:, :, units:], at, out=entry[:, :, units:])
        return entry

    def _run(self, entry: Floats, kind: int) -> Floats:
        """(n, F, E, i): the least cost when the stage on `kind` ends before i."""
        out = np.full(entry.shape, np.inf)
        useful = np.flatnonzero(np.isfinite(entry).any(axis=(0, 1, 2)) & np.isfinite(self.compute[kind]).any(axis=1))
        for j in useful:
            np.minimum(out[..., j + 1 :], entry[..., j : j + 1] + self.compute[kind, j, j + 1 :], out=out[..., j + 1 :])
        return out

    def best(self) -> Candidate | None:
        return next(self.candidates(), None)

    def candidates(self) -> Iterator[Candidate]:
        """The best for each choice of devices, last and first kind; best first, of equals those of fewer stages."""
        ends = []
        for depth, filled in enumerate(self.levels, 1):
            if depth not in self.allowed:
                continue
            total = filled.cost[..., self.length].copy()  # (n, K, F, E)
            if depth > 1:
                total += (self.back if self.firsts == self.kinds else np.zeros((self.kinds, 1)))[None, :, :, None]
            cheapest = total.argmin(axis=3)
            value = np.take_along_axis(total, cheapest[..., None], axis=3)[..., 0]
            for row, last, first in zip(*np.nonzero(np.isfinite(value)), strict=True):
                ends.append((float(value[row, last, first]), depth, int(row), int(last), int(first), int(cheapest[row, last, first])))
        return (self._trace(*end) for end in sorted(ends))

    def _trace(self, value: float, depth: int, row: int, last: int, first: int, spent: int) -> Candidate:
        """Walks back from the end, choosing again what the table chose."""
        cuts, order, codecs, end = [self.length], [last], [], self.length
        for level in range(depth - 2, -1, -1):
            filled = self.levels[level]
            code = self.levels[level + 1].level.codes[row] - filled.level.radix[last]
            row = int(np.searchsorted(filled.level.codes, code))
            best = (np.inf, 0, 0, 0, 0)
            for k, hop in enumerate(self.hops):
                for kind in range(self.kinds):
                    left = spent - hop.spends
                    cost = np.where(left >= 0, filled.cost[row, kind, first, np.maximum(left, 0), np.arange(self.length + 1)], np.inf)
                    reached = (cost + hop.travel[kind, last]) + self.compute[last, :, end]
                    j = int(reached.argmin())
                    if reached[j] < best[0]:
                        best = (float(reached[j]), k, kind, j, int(left[j]))
            _, k, kind, j, spent = best
            codecs.append(int(self.hops[k].codec[kind, last, j]))
            cuts.append(j)
            order.append(kind)
            last, end = kind, j
        return Candidate(value, (0, *reversed(cuts)), tuple(reversed(order)), tuple(reversed(codecs)))
