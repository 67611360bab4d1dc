"""A chain under prices: what is the least that a way through it costs when every use of a device has a price?

Where the choices of devices are too many for a table, the limits on them (so many of each kind, so many stages, so much error) are taken out
of the problem and paid for instead (Lagrangian relaxation; for shortest paths with limited resources Handler and Zang 1980). For every price the
cheapest way less what the limits are worth is a bound for all plans, and the cheapest ways to the end guide the search for a plan (`labels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partitioner.solvers.problem import ChainProblem, Floats

__all__ = ["Prices", "Route", "Way", "route_for"]


@dataclass(frozen=True, eq=False)
class Prices:
    """Of one use of a kind (K,), of one stage of any kind (negative where at least so many are asked for), of a unit of error."""

    kind: Floats
    stage: float = 0.0
    unit: float = 0.0

    @property
    def use(self) -> Floats:
        return self.kind + self.stage


@dataclass(frozen=True, eq=False)
class Way:
    """The cheapest way under some prices: `value` with prices, `used` of each kind, `units` of error spent."""

    value: float
    used: np.ndarray
    units: int
    cuts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Route:
    """K kinds, positions 0 to L. A stage on k over [j, i) is possible where i <= ends[k, j] and, with `room`, `fill[k, i] <= room[k, j]`; it costs
    opening[k] (the first one: first[k]) + time[k, i] - time[k, j]; between two stages a hop of one of the ways to send is paid, after the last
    `closing` by last and first kind. A plan of one stage has no closing."""

    time: Floats  # (K, L+1)
    ends: np.ndarray  # (K, L+1): 0 where none starts
    opening: Floats  # (K,)
    first: Floats  # (K,)
    closing: Floats  # (K, F)
    hops: Floats  # (W, L+1, K, K): by way, position, from, to
    spends: np.ndarray  # (W, L+1): units of error
    room: Floats | None = None
    fill: Floats | None = None

    @property
    def kinds(self) -> int:
        return self.time.shape[0]

    @property
    def length(self) -> int:
        return self.time.shape[1] - 1

    @property
    def firsts(self) -> int:
        return self.closing.shape[1]

    def hop(self, prices: Prices) -> Floats:
        """(L+1, K, K): the cheapest way to send under these prices."""
        found: Floats = (self.hops + (prices.unit * self.spends)[:, :, None, None] if prices.unit else self.hops).min(axis=0)
        return found

    def ahead(self, prices: Prices) -> tuple[Floats, Floats]:
        """(F, K, L+1) each: the least that remains from the start of a stage, its own price paid; and from its end, plus `time` there."""
        hop, use, least = self.hop(prices), (prices.use + self.opening)[:, None], np.minimum.reduce
        starts = np.full((self.firsts, self.kinds, self.length + 1), np.inf)
        left = np.full(starts.shape, np.inf)
        left[:, :, self.length] = self.closing.T + self.time[:, self.length]
        ends, time, kinds = self.ends.T.tolist(), np.ascontiguousarray(self.time.T), range(self.kinds)
        for j in range(self.length - 1, -1, -1):
            starting = starts[:, :, j]
            for k, end in zip(kinds, ends[j], strict=True):
                if end > j:
                    starting[:, k] = least(self._open(left, k, j, end), axis=-1)
            starting -= time[j]
            if j:
                left[:, :, j] = least(hop[j] + (use.T + starting)[:, None], axis=-1) + time[j]
        return starts, left

    def _open(self, left: Floats, k: int, j: int, end: int) -> Floats:
        """(F, ends): what remains from each end of a stage that starts at j."""
        span = left[:, k, j + 1 : end + 1]
        if self.room is None or self.fill is None:
            return span
        return np.where(self.fill[k, j + 1 : end + 1] <= self.room[k, j], span, np.inf)

    def alone(self) -> Floats:
        """(K,): a plan of one stage, without prices."""
        able = self.ends[:, 0] >= self.length
        if self.room is not None and self.fill is not None:
            able &= self.fill[:, self.length] <= self.room[:, 0]
        return np.where(able, self.first + self.opening + self.time[:, self.length] - self.time[:, 0], np.inf)

    def cheapest(self, prices: Prices) -> Way:
        """The cheapest way; its value is inf where there is none."""
        return self.along(prices, *self.ahead(prices))

    def along(self, prices: Prices, starts: Floats, left: Floats) -> Way:
        hop, use = self.hop(prices), prices.use + self.opening
        single = self.alone() + prices.use
        begin = (use + self.first)[:, None] + starts[:, :, 0].T
        if self.firsts > 1:
            begin = np.where(np.eye(self.kinds, dtype=bool), begin, np.inf)
        used = np.zeros(self.kinds, dtype=np.int64)
        if single.min() <= begin.min():
            used[single.argmin()] = 1
            return Way(float(single.min()), used, 0, (0, self.length))
        kind, first = map(int, np.unravel_index(int(begin.argmin()), begin.shape))
        value, j, units, cuts = float(begin[kind, first]), 0, 0, [0]
        while True:
            used[kind] += 1
            j += 1 + int(self._open(left, kind, j, int(self.ends[kind, j]))[first].argmin())
            cuts.append(j)
            if j == self.length:
                return Way(value, used, units, tuple(cuts))
            onward = int((hop[j, kind] + use + starts[first, :, j]).argmin())
            way = int((self.hops[:, j, kind, onward] + prices.unit * self.spends[:, j]).argmin())
            units += int(self.spends[way, j])
            kind = onward

    def behind(self, prices: Prices) -> Floats:
        """(F, K, L+1): the least from the start until a stage on the kind has ended at each position."""
        hop, use = self.hop(prices), prices.use + self.opening
        ended = np.full((self.firsts, self.kinds, self.length + 1), np.inf)
        begin = use + self.first
        opened = np.where(np.eye(self.kinds, dtype=bool), begin, np.inf) if self.firsts > 1 else begin[None]
        for j in range(self.length):
            if j:
                opened = (ended[:, :, j, None] + hop[j]).min(axis=1) + use
            for k in range(self.kinds):
                end = int(self.ends[k, j])
                if end <= j or not np.isfinite(opened[:, k]).any():
                    continue
                span = slice(j + 1, end + 1)
                cost = opened[:, k, None] + (self.time[k, span] - self.time[k, j])
                if self.room is not None and self.fill is not None:
                    cost = np.where(self.fill[k, span] <= self.room[k, j], cost, np.inf)
                np.minimum(ended[:, k, span], cost, out=ended[:, k, span])
        return ended


def route_for(problem: ChainProblem, sizes: np.ndarray, spends: np.ndarray, limit: float | None = None) -> Route:
    """For latency, or with a `limit` for plans whose nodes and links are busy for at most that, when only uses cost. `sizes` (K,): devices of each
    kind; `spends` (C, L+1): units of error."""
    over, length = problem.overheads, problem.length
    alone = np.diag(sizes == 1)  # such a kind is not first and last of several stages
    back = problem.back_s if limit is None else np.where((problem.back_wire_s <= limit) | alone, 0.0, np.inf)
    closing = back if back.any() else np.zeros((len(problem.devices), 1))
    if limit is None:
        hops = np.ascontiguousarray(np.moveaxis(problem.travel_s, 3, 1))
        return Route(problem.prefix, problem.last_end, over.stage_s, over.request_s, closing, hops, spends)
    none = np.zeros(len(problem.devices))
    wire = np.moveaxis(problem.wire_s, 3, 1)
    # The receiver's cheapest codec counts at a stage's start, the sender's at its end.
    room = limit * (1 + 1e-12) - over.stage_s[:, None] + problem.prefix - problem.take_s.min(axis=0)
    room[:, 0] -= over.request_s
    fill = problem.prefix + problem.send_s.min(axis=0)
    reach = np.stack([np.searchsorted(problem.prefix[k], room[k], side="right") - 1 for k in range(len(none))])
    ends = np.minimum(problem.last_end, np.maximum(reach, 0))
    busy = bool((problem.send_s > 0).any())
    return Route(
        np.zeros(problem.prefix.shape), np.where(ends > np.arange(length + 1), ends, 0), none, none, closing,
        np.where(wire <= limit, 0.0, np.inf), spends, room if busy else None, fill if busy else None,
    )  # fmt: skip
