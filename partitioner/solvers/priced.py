"""Chains with more choices of devices than a table holds: prices for a bound, labels for a plan (see `route`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np

from partitioner.solvers.labels import Limits, plans_along
from partitioner.solvers.problem import Candidate, ChainProblem, Floats
from partitioner.solvers.route import Prices, Route, Way, route_for

__all__ = ["Found", "Priced"]

_ASCENT = 60  # subgradient steps for latency
_PROOF = 80  # and for one proof that a bottleneck cannot be
_FAR = 0.05  # where it is not worth going on
_AIM = 0.01  # by how much such a proof should succeed
_NEAR = 2e-3  # bottlenecks that differ by less are not told apart
_WIDTH = 192  # labels kept per position
_TRIED = 64


@dataclass(frozen=True)
class Found:
    """`bound_s` holds for all plans within the limits."""

    candidate: Candidate | None
    bound_s: float
    prices: Prices


class Priced:
    """`problem` is of kinds; the limits say how many of each."""

    def __init__(self, problem: ChainProblem, limits: Limits, spends: np.ndarray) -> None:
        self.problem, self.limits, self.spends = problem, limits, spends
        self.width = max(4, _WIDTH // len(problem.devices))

    def least_latency(self, bound_s: float, known_s: float = math.inf, prices: Prices | None = None) -> Found:
        """With `prices` that are known to be good, the bound that is known is not looked for again."""
        route = route_for(self.problem, self.limits.sizes, self.spends)
        if prices is not None:
            return Found(self._quickest(route, prices, known_s, self.width), min(bound_s, known_s), prices)
        prices, bound = self.ascend(route, known_s, None, _ASCENT // 3)
        found = self._quickest(route, prices, known_s, max(4, self.width // 4))
        known = min(known_s, found.value_s if found else math.inf)
        prices, better = self.ascend(route, known, prices, _ASCENT)
        found = self._quickest(route, prices, known, self.width) or found
        known = min(known, found.value_s if found else math.inf)
        return Found(found, min(max(bound_s, bound, better), known), prices)

    def raised(self, known_s: float, prices: Prices | None) -> tuple[float, Prices]:
        """(a bound for latency, the prices that prove it); a few steps where prices are given."""
        route = route_for(self.problem, self.limits.sizes, self.spends)
        prices, bound = self.ascend(route, known_s, prices, _ASCENT if prices is None else _ASCENT // 5)
        return bound, prices

    def _quickest(self, route: Route, prices: Prices, known_s: float, width: int) -> Candidate | None:
        remaining = route.ahead(prices)
        return next(plans_along(self.problem, route, self.limits, prices, remaining, width, below=known_s), None)

    def quickest(self, busy_s: float) -> list[Candidate]:
        """The most promising plans whose nodes and links are busy for at most that."""
        if math.isfinite(busy_s):
            _, prices = self._impossible(busy_s, self.even())
            route = route_for(self.problem, self.limits.sizes, self.spends, busy_s)
            plans = plans_along(self.problem, route, self.limits, prices, route.ahead(prices), self.width, busy_s=busy_s)
        else:
            route = route_for(self.problem, self.limits.sizes, self.spends)
            prices, _ = self.ascend(route, math.inf, None, _ASCENT)
            plans = plans_along(self.problem, route, self.limits, prices, route.ahead(prices), self.width)
        return list(islice(plans, _TRIED))

    def least_bottleneck(self, bound_s: float, known_s: float = math.inf, prices: Prices | None = None) -> Found:
        """A proof for ever larger bottlenecks that they cannot be, then a plan for ever larger ones until one is found. With `prices` that are
        known to be good, the bound that is known is not looked for again."""
        low = max(bound_s, 1e-12)
        if prices is None:
            low, prices = self.proven(low, known_s, self.even())
        best: Candidate | None = None
        failed, limit, step = low, low * (1 + _NEAR), 1.02
        while limit < known_s or not math.isfinite(limit):
            if (best := self._within(limit, prices)) is not None or not math.isfinite(limit):
                break
            failed, limit, step = limit, limit * step if step < 1e6 else math.inf, step**1.5
        if best is None and math.isfinite(known_s) and known_s > failed * (1 + _NEAR):
            best = self._within(known_s, prices)
        while best is not None and best.value_s > failed * (1 + _NEAR):
            middle = math.sqrt(failed * best.value_s) if math.isfinite(best.value_s) else failed * 2
            if (better := self._within(middle, prices)) is None:
                failed = middle
            else:
                best = better
        return Found(best, min(low, best.value_s if best else known_s), prices)

    def proven(self, low: float, known_s: float, prices: Prices, steps: int | None = None) -> tuple[float, Prices]:
        """(the largest bottleneck that is proven to be no plan's, the prices that prove it)."""
        step = 1.1
        while low * step < known_s:
            proven, prices = self._impossible(low * step, prices, steps)
            if not proven:
                break
            low, step = low * step, step * step
        high = min(low * step, known_s)
        while high > low * (1 + _NEAR):
            middle = math.sqrt(low * high)
            proven, prices = self._impossible(middle, prices, steps)
            low, high = (middle, high) if proven else (low, middle)
        return low, prices

    def _within(self, limit: float, prices: Prices) -> Candidate | None:
        route = route_for(self.problem, self.limits.sizes, self.spends, limit)
        plans = plans_along(self.problem, route, self.limits, prices, route.ahead(prices), self.width, busy_s=limit)
        priced = (Candidate(self.problem.price(c)[1], c.cuts, c.order, c.codecs) for c in islice(plans, 8))
        return min(priced, key=lambda c: c.value_s, default=None)

    def even(self) -> Prices:
        """Each device is worth its speed."""
        each = 1.0 / np.maximum(self.problem.prefix[:, -1], 1e-30)
        return Prices(each / (each @ self.limits.sizes))

    def _impossible(self, limit: float, prices: Prices, steps: int | None = None) -> tuple[bool, Prices]:
        """Whether prices were found under which the cheapest way costs more than all devices are worth; the best prices."""
        route = route_for(self.problem, self.limits.sizes, self.spends, limit)
        best, kept, scale, since = -math.inf, prices, 1.0, 0
        for step in range(steps or _PROOF):
            way = route.cheapest(prices)
            if not math.isfinite(way.value):
                return True, prices
            gain = self._worth(way, prices)
            if gain > 1e-9:
                return True, prices
            if gain > best + 1e-6:
                best, kept, since = gain, prices, 0
            elif (since := since + 1) >= 4:
                scale, since, prices = scale / 2, 0, kept
                way = route.cheapest(prices)
            slope = (way.used - self.limits.sizes) / self.limits.sizes
            if scale < 1e-2 or (step > _PROOF // 5 and best < -_FAR) or (not (slope > 0).any() and self._keeps(way)):
                break
            # All devices together are worth 1; a step of Polyak's length towards a proof.
            length = scale * max(_AIM - gain, _AIM / 5) / max(float(slope @ slope), 1e-9)
            worth = np.maximum(prices.kind * self.limits.sizes + length * slope, 0.0)
            extra = self._towards(way, prices, 0.1 * length / self.limits.sizes.sum())
            prices = Prices(worth / worth.sum() / self.limits.sizes, *extra) if worth.sum() > 0 else self.even()
        return False, kept

    def _keeps(self, way: Way) -> bool:
        return min(self.limits.stages) <= way.used.sum() <= max(self.limits.stages) and way.units <= self.limits.units

    def _towards(self, way: Way, prices: Prices, step: float) -> tuple[float, float]:
        """The prices of a stage and of a unit of error, a step on."""
        count, stages = int(way.used.sum()), self.limits.stages
        stage = prices.stage
        if min(stages) <= 1 and max(stages) >= self.limits.sizes.sum():
            stage = 0.0
        elif count > max(stages):
            stage += step
        elif count < min(stages):
            stage -= step
        elif (stage > 0 and count < max(stages)) or (stage < 0 and count > min(stages)):
            stage = max(0.0, stage - step) if stage > 0 else min(0.0, stage + step)
        unit = max(0.0, prices.unit + step * (way.units - self.limits.units)) if self.limits.units or way.units else 0.0
        return stage, unit

    def _worth(self, way: Way, prices: Prices) -> float:
        """The bound that a cheapest way proves."""
        limits = self.limits
        stage = prices.stage * (max(limits.stages) if prices.stage > 0 else min(limits.stages))
        return float(way.value - prices.kind @ limits.sizes - stage - prices.unit * limits.units)

    def ascend(self, route: Route, known_s: float, prices: Prices | None, steps: int) -> tuple[Prices, float]:
        """(the best prices for latency, the bound that they prove): subgradient steps of Polyak's length."""
        prices = prices or Prices(np.zeros(route.kinds))
        best, kept, scale, since = -math.inf, prices, 1.0, 0
        for _ in range(steps):
            way = route.cheapest(prices)
            if not math.isfinite(way.value):
                return kept, max(best, 0.0)
            bound = self._worth(way, prices)
            if bound > best * (1 + 1e-5) or best <= 0:
                best, kept, since = bound, prices, 0
            elif (since := since + 1) >= 4:
                scale, since, prices = scale / 2, 0, kept
                way = route.cheapest(prices)
            if best >= known_s or scale < 1e-3:
                break
            slope = (way.used - self.limits.sizes).astype(np.float64)
            slope = np.where((prices.kind <= 0) & (slope < 0), 0.0, slope)
            over = np.array([max(0, way.used.sum() - max(self.limits.stages)), max(0, way.units - self.limits.units)], dtype=np.float64)
            norm = float(slope @ slope + over @ over)
            if norm <= 0 and self._keeps(way):
                break
            aim = known_s if math.isfinite(known_s) else best * 1.05
            length = scale * max(aim - bound, 1e-6 * abs(aim)) / max(norm, 1.0)
            prices = Prices(np.maximum(prices.kind + length * slope, 0.0), *self._towards(way, prices, length))
        return kept, max(best, 0.0)

    def by_position(self, prices: Prices, busy_s: float | None = None) -> Floats:
        """(L+1,): for latency, below what no plan with a cut at the position can be. With `busy_s`: above 0 where no such plan is so quick."""
        route = route_for(self.problem, self.limits.sizes, self.spends, busy_s)
        starts, _ = route.ahead(prices)
        behind, hop, use = route.behind(prices), route.hop(prices), prices.use + route.opening
        onward = use[:, None] + starts  # (F, K, L+1)
        least: Floats = np.full(route.length + 1, np.inf)
        for k in range(route.kinds):
            least = np.minimum(least, (behind[:, k, None] + hop[:, k].T + onward).min(axis=(0, 1)))
        return least + self._worth(Way(0.0, np.zeros(route.kinds, dtype=np.int64), 0, ()), prices)
