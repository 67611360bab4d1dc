"""A search along a chain that is guided by prices: of the ways to each position those are kept that promise the least in all.

A label is a stage that begins: its kind, its place, what the plan used so far and cost so far. It is ranked by what it cost, what its devices are worth, and the
cheapest way to the end at the same prices (`route`). Limits are kept exactly; only the number of labels makes it a heuristic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from partitioner.solvers.problem import Candidate, ChainProblem, Floats
from partitioner.solvers.route import Prices, Route

__all__ = ["Limits", "plans_along"]


@dataclass(frozen=True, eq=False)
class Limits:
    """How many devices of each kind (K,), how many stages, how many units of error."""

    sizes: np.ndarray
    stages: range
    units: int = 0


def plans_along(
    problem: ChainProblem, route: Route, limits: Limits, prices: Prices, remaining: tuple[Floats, Floats], width: int, *,
    busy_s: float | None = None, below: float = np.inf,
) -> Iterator[Candidate]:  # fmt: skip
    """Plans of several stages, the most promising first, for latency; with `busy_s`, plans whose nodes and links are busy for at most that. `remaining` is
    `route.ahead(prices)`. `width`: labels kept for each position and kind. `below`: what a plan's latency has to stay below."""
    yield from _Search(problem, route, limits, prices, remaining, width, busy_s, below).run()


class _Search:
    def __init__(
        self, problem: ChainProblem, route: Route, limits: Limits, prices: Prices, remaining: tuple[Floats, Floats], width: int,
        busy_s: float | None, below: float,
    ) -> None:  # fmt: skip
        self.problem, self.route, self.limits, self.prices, self.width, self.busy_s = problem, route, limits, prices, width, busy_s
        self.starts, self.left = remaining
        kinds, length = route.kinds, route.length
        self.worth = prices.kind @ limits.sizes + prices.unit * limits.units
        self.worth += prices.stage * (max(limits.stages) if prices.stage > 0 else min(limits.stages))
        self.below = below
        # `hop` has the cheapest way; where error is limited or a stage's own time is, each way is tried.
        self.ways = range(len(route.hops)) if limits.units or busy_s is not None else (-1,)
        self.best_way = (route.hops + (prices.unit * route.spends)[:, :, None, None]).argmin(axis=0)  # (L+1, K, K)
        most = (length + 1) * kinds * width + kinds
        self.kind = np.zeros(most, dtype=np.int16)
        self.home = np.zeros(most, dtype=np.int16)  # the first stage's kind
        self.place = np.zeros(most, dtype=np.int32)
        self.used = np.zeros((most, kinds), dtype=np.int16)
        self.cost = np.zeros(most)
        self.spent = np.zeros(most, dtype=np.int32)
        self.taken = np.zeros(most)  # what the stage pays for decoding
        self.parent = np.full(most, -1, dtype=np.int64)
        self.way = np.zeros(most, dtype=np.int16)
        self.count = 0
        self.radix = np.concatenate([[1], np.cumprod(np.asarray(limits.sizes[:-1], dtype=np.float64) + 1)])
        reaching = np.full(length + 1, length)
        for k in range(kinds):
            for j in np.flatnonzero(route.ends[k] > np.arange(length + 1)):
                reaching[route.ends[k, j]] = min(reaching[route.ends[k, j]], j)
        self.earliest = np.minimum.accumulate(reaching[::-1])[::-1]  # the first start of a stage that may end here or later

    def run(self) -> Iterator[Candidate]:
        route, length = self.route, self.route.length
        for k in range(route.kinds):
            if route.ends[k, 0] > 0:
                row = self.count
                self.kind[row] = self.home[row] = k
                self.used[row, k] = 1
                self.cost[row] = route.first[k] + route.opening[k]
                if self.busy_s is not None:
                    self.taken[row] = self.problem.overheads.request_s[k] + self.problem.back_take_s[k]
                self.count += 1
        begins = np.zeros(length + 2, dtype=np.int64)
        begins[1] = self.count
        for i in range(1, length):
            self._cross(i, slice(int(begins[min(self.earliest[i], i)]), self.count))
            begins[i + 1] = self.count
        yield from self._finish(slice(int(begins[self.earliest[length]]), self.count))

    def _ended(self, i: int, rows: slice) -> tuple[np.ndarray, Floats, Floats]:
        """(labels whose stage may end at i, what they cost by then, what time the stage's device has left)."""
        route, problem = self.route, self.problem
        at = np.flatnonzero(route.ends[self.kind[rows], self.place[rows]] >= i) + rows.start
        kind, place = self.kind[at], self.place[at]
        cost = self.cost[at] + route.time[kind, i] - route.time[kind, place]
        if self.busy_s is None:
            return at, cost, np.zeros(len(at))
        load = problem.prefix[kind, i] - problem.prefix[kind, place] + problem.overheads.stage_s[kind] + self.taken[at]
        spare = self.busy_s * (1 + 1e-15) - load
        able = spare >= 0
        return at[able], cost[able], spare[able]

    def _key(self, rows: np.ndarray) -> Floats:
        key: Floats = (self.used[rows] @ self.radix) * (self.limits.units + 1.0) + self.spent[rows]
        full: Floats = (key * self.route.kinds + self.kind[rows]) * self.route.kinds + (self.home[rows] if self.route.firsts > 1 else 0)
        return full

    def _first(self, rows: np.ndarray) -> np.ndarray | int:
        return self.home[rows] if self.route.firsts > 1 else 0

    def _cross(self, i: int, rows: slice) -> None:
        at, cost, spare = self._ended(i, rows)
        if not at.size:
            return
        owed = self.used[at] @ self.prices.use + self.prices.unit * self.spent[at]
        onward = self.left[self._first(at), self.kind[at], i] - self.route.time[self.kind[at], i]
        hope = cost + owed + onward
        keep = np.flatnonzero(hope - self.worth < self.below)
        most = 6 * self.width * self.route.kinds
        if keep.size > most:
            keep = keep[np.argpartition(hope[keep], most)[:most]]
        # Of labels that used the same, the cheapest; for a bottleneck the one with most time to spare.
        order = keep[np.lexsort((-spare[keep], hope[keep]))] if self.busy_s is None else keep[np.argsort(-spare[keep], kind="stable")]
        _, unique = np.unique(self._key(at[order]), return_index=True)
        order = order[unique]
        at, cost, spare, owed = at[order], cost[order], spare[order], owed[order]
        for k in range(self.route.kinds):
            if self.route.ends[k, i] > i:
                self._enter(i, k, at, cost, spare, owed)

    def _enter(self, i: int, k: int, at: np.ndarray, cost: Floats, spare: Floats, owed: Floats) -> None:
        route, problem = self.route, self.problem
        found: list[tuple[np.ndarray, Floats, Floats, np.ndarray, Floats]] = []
        free = self.used[at, k] < self.limits.sizes[k]
        for way in self.ways:
            chosen = self.best_way[i, self.kind[at], k] if way < 0 else np.full(len(at), way)
            hop = route.hops[chosen, i, self.kind[at], k]
            spends = route.spends[chosen, i]
            able = free & np.isfinite(hop) & (self.spent[at] + spends <= self.limits.units)
            taken = np.zeros(len(at))
            if self.busy_s is not None:
                able &= spare >= problem.send_s[way, self.kind[at], i]
                taken = np.full(len(at), problem.take_s[way, k, i])
            hope = cost + hop + route.opening[k] + owed + self.prices.use[k] + self.prices.unit * spends
            hope = hope + self.starts[self._first(at), k, i]
            able &= hope - self.worth < self.below
            rows = np.flatnonzero(able)
            found.append((rows, hope[rows], (cost + hop)[rows] + route.opening[k], chosen[rows], taken[rows]))
        rows, hope, paid, chosen, taken = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if not rows.size:
            return
        order = np.lexsort((taken, hope))
        if len(self.ways) > 1 and not self.limits.units:  # one way each: the one that takes least time here
            _, unique = np.unique(rows[order], return_index=True)
            order = order[np.sort(unique)]
        order = order[: self.width]
        new = slice(self.count, self.count + len(order))
        rows = rows[order]
        self.kind[new], self.home[new], self.place[new] = k, self.home[at[rows]], i
        self.used[new] = self.used[at[rows]]
        self.used[new, k] += 1
        self.cost[new], self.taken[new], self.way[new] = paid[order], taken[order], chosen[order]
        self.spent[new] = self.spent[at[rows]] + route.spends[chosen[order], i]
        self.parent[new] = at[rows]
        self.count = new.stop

    def _finish(self, rows: slice) -> Iterator[Candidate]:
        problem, route = self.problem, self.route
        at, cost, spare = self._ended(route.length, rows)
        several = self.parent[at] >= 0
        at, cost, spare = at[several], cost[several], spare[several]
        cost = cost + route.closing[self.kind[at], self._first(at)]
        if self.busy_s is not None:
            cost = np.where(spare >= problem.back_send_s[self.kind[at]], cost, np.inf)
        stages = self.used[at].sum(axis=1)
        able = np.isfinite(cost) & (stages >= min(self.limits.stages)) & (stages <= max(self.limits.stages))
        for row in np.flatnonzero(able)[np.lexsort((stages[able], cost[able]))]:
            yield self._trace(int(at[row]), float(cost[row]))

    def _trace(self, row: int, value: float) -> Candidate:
        cuts, order, ways = [self.route.length], [int(self.kind[row])], []
        while self.parent[row] >= 0:
            cuts.append(int(self.place[row]))
            ways.append(int(self.way[row]))
            row = int(self.parent[row])
            order.append(int(self.kind[row]))
        return Candidate(value, (0, *reversed(cuts)), tuple(reversed(order)), tuple(reversed(ways)))
