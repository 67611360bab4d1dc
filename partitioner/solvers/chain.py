"""Operators in one order: which devices, in which order, cut where, sent how. Each device takes at most one interval.

Exact where the table over all choices of devices (kinds of equal devices counted, see `kinds`) stays within `MAX_FIGURES`; beyond, prices on
the devices give a bound and guide a search (`priced`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np

from partitioner.solvers.bottleneck import Bottleneck
from partitioner.solvers.kinds import Grouped, group, table_figures
from partitioner.solvers.labels import Limits
from partitioner.solvers.priced import Found, Priced
from partitioner.solvers.problem import Candidate, ChainProblem, Floats, Objective
from partitioner.solvers.route import Prices
from partitioner.solvers.sums import Hop, Sums

__all__ = ["MAX_FIGURES", "Answer", "candidates", "solve_chain", "worthwhile"]

MAX_FIGURES = 1 << 26  #: that a table may look at: seconds of time
_UNITS = 64  # steps of the error budget where the errors are no multiples of anything
_FEW = 30  # steps from prices that are good already
_TRIED = 64  # quickest plans that are priced to find one within a bottleneck


@dataclass(frozen=True)
class Answer:
    """`bound_s` holds for every plan of the chain problem; `exact`: the candidate reaches it."""

    candidate: Candidate | None
    bound_s: float
    exact: bool
    prices: Prices | None = None  # of the devices, where they gave the bound


def solve_chain(
    problem: ChainProblem, objective: Objective, *, stages: range | None = None, budget: float | None = None, bound_s: float = 0.0,
    prices: Prices | None = None,
) -> Answer:  # fmt: skip
    """The best plan. Among plans of equal bottleneck the one of least latency (where every cut has one codec to choose; else one that is
    quick), among those of equal latency one of fewest stages. `stages`: how many there may be (default: any number). `budget`: how
    much error the plan may add up to. `bound_s`: what is already known to be no plan's; with good `prices` nothing more is looked for where they are
    needed."""
    solver = _Chain(problem, stages or range(1, len(problem.devices) + 1), budget)
    return solver.least_latency(bound_s, prices) if objective == "latency" else solver.least_bottleneck(bound_s, prices)


def worthwhile(
    problem: ChainProblem, objective: Objective, known_s: float, prices: Prices | None, *, stages: range, budget: float | None, bound_s: float
) -> tuple[float, Floats, Prices]:  # fmt: skip
    """(a bound, for each position whether a plan below `known_s` may be cut there: what of it stays below 0, prices). Nothing that grows with the
    square of the positions is made. `prices`: good ones, of a smaller problem."""
    solver = _Chain(problem, stages, budget)
    priced = Priced(solver.problem, solver.limits, solver.spends)
    if not solver.measured:
        return bound_s, np.full(problem.length + 1, -np.inf), prices or Prices(np.zeros(len(solver.sizes)))
    if objective == "latency":
        bound, prices = priced.raised(known_s, prices)
        return max(bound_s, min(bound, known_s)), priced.by_position(prices) - known_s, prices
    bound, prices = priced.proven(max(bound_s, 1e-12), known_s, prices or priced.even(), None if prices is None else _FEW)
    return max(bound_s, bound), priced.by_position(prices, known_s), prices


def candidates(
    problem: ChainProblem, objective: Objective, *, stages: range | None = None, budget: float | None = None, limit_s: float = math.inf
) -> Iterator[Candidate]:
    """For latency: the best plan for each choice of devices, last and first kind, best first. For throughput: the quickest ones whose
    bottleneck is at most `limit_s`."""
    solver = _Chain(problem, stages or range(1, len(problem.devices) + 1), budget)
    yield from solver.quickest(limit_s if objective == "throughput" else math.inf)


class _Chain:
    def __init__(self, problem: ChainProblem, stages: range, budget: float | None) -> None:
        self.stages = stages
        self.grouped: Grouped = group(problem)
        self.problem = self.grouped.problem
        self.sizes = self.grouped.sizes
        self.spends, self.units, self.measured = _units(self.problem, budget)
        firsts = len(self.sizes) if problem.return_bytes else 1
        most = min(max(stages, default=0), len(problem.devices), problem.length)
        figures = table_figures(self.sizes, most, problem.length, firsts, self.units + 1)
        self.limits = Limits(np.asarray(self.sizes), range(min(stages, default=1), most + 1), self.units)
        self.priced = Priced(self.problem, self.limits, self.spends) if figures > MAX_FIGURES else None
        self.several = range(max(2, min(stages, default=2)), max(stages, default=0) + 1)

    def least_latency(self, bound_s: float, prices: Prices | None) -> Answer:
        if self.priced is not None:
            return self._estimated(self.priced.least_latency(bound_s, self._known(0), prices), 0, bound_s)
        table = self._sums(np.inf)
        best = self._with_single(table.best(), 0)
        exact = best is not None and self.measured
        return Answer(best, best.value_s if best is not None and exact else bound_s, exact)

    def least_bottleneck(self, bound_s: float, prices: Prices | None) -> Answer:
        if self.priced is not None:
            return self._estimated(self.priced.least_bottleneck(bound_s, self._known(1), prices), 1, bound_s)
        single = self._single(1)
        table = Bottleneck(self.problem, self.sizes, self.several, spends=self.spends, units=self.units)
        found, bound = table.solve(bound_s, single.value_s if single else math.inf)
        best = self.grouped.unfold(found) if found is not None else single
        if best is None:
            return Answer(None, math.inf, True)
        exact = self.measured
        if not self.units:
            for quick in islice(self._sums(best.value_s).candidates(), _TRIED):
                if self.problem.price(quick)[1] <= best.value_s:
                    best = self.grouped.unfold(Candidate(best.value_s, quick.cuts, quick.order, quick.codecs))
                    break
        return Answer(best, min(bound, best.value_s) if exact else bound_s, exact and bound >= best.value_s)

    def quickest(self, limit: float) -> Iterator[Candidate]:
        """Plans of least latency whose parts are at most `limit`, as far as a stage's own figures tell."""
        if self.priced is not None:
            yield from (self.grouped.unfold(c) for c in self.priced.quickest(limit))
            return
        yield from (self.grouped.unfold(c) for c in self._sums(limit).candidates())

    def _sums(self, limit: float) -> Sums:
        problem = self.problem
        compute = problem.stage_seconds.copy()
        back = problem.back_s
        travel, wire = problem.travel_s, problem.wire_s
        if np.isfinite(limit):
            load = compute + problem.take_s.min(axis=0)[:, :, None] + problem.send_s.min(axis=0)[:, None, :]
            load[:, 0, :] += problem.overheads.request_s[:, None]
            load[:, 0, :-1] += problem.back_take_s[:, None]
            load[:, 1:, -1] += problem.back_send_s[:, None]
            compute[load > limit] = np.inf
            travel = np.where(wire <= limit, travel, np.inf)
            back = np.where(problem.back_wire_s <= limit, back, np.inf)
        compute[:, 0, :] += problem.overheads.request_s[:, None]
        return Sums(compute, self._hops(travel), back, self.sizes, self.stages, units=self.units)

    def _hops(self, travel: Floats) -> list[Hop]:
        if not self.units and self.measured:
            usable = np.where((self.spends == 0)[:, None, None], travel, np.inf)
            codec = usable.argmin(axis=0)
            return [Hop(codec, np.take_along_axis(usable, codec[None], axis=0)[0], np.zeros(self.problem.length + 1, dtype=np.int64))]
        return [Hop(np.full(travel.shape[1:], c), travel[c], self.spends[c]) for c in range(len(travel))]

    def _known(self, figure: int) -> float:
        """What the best single device reaches."""
        single = self._single(figure)
        return single.value_s if single else math.inf

    def _estimated(self, found: Found, figure: int, bound_s: float) -> Answer:
        best = self._with_single(found.candidate, figure)
        bound = max(bound_s, found.bound_s) if self.measured else bound_s
        return Answer(best, bound, best is not None and bound >= best.value_s * (1 - 1e-12), found.prices)

    def _single(self, figure: int) -> Candidate | None:
        """The best single device; figure 0: by latency, 1: by bottleneck."""
        if 1 not in self.stages:
            return None
        found = []
        for kind in range(len(self.sizes)):
            alone = Candidate(math.inf, (0, self.problem.length), (kind,))
            if self.problem.last_end[kind, 0] == self.problem.length:
                found.append(Candidate(self.problem.price(alone)[figure], alone.cuts, alone.order))
        best = min(found, key=lambda c: c.value_s, default=None)
        return None if best is None else self.grouped.unfold(best)

    def _with_single(self, best: Candidate | None, figure: int) -> Candidate | None:
        single = self._single(figure)
        if best is None or (single is not None and single.value_s <= best.value_s):
            return single
        return self.grouped.unfold(best)


def _units(problem: ChainProblem, budget: float | None) -> tuple[np.ndarray, int, bool]:
    """(what each codec spends at each cut in whole units, how many units there are, whether that is exact). Where the errors have a common
    measure that divides the budget into few units, it is; else they are rounded up, so that no plan exceeds the budget."""
    error = np.where(problem.cut_bytes > 0, problem.codecs.error, 0.0)
    if budget is None or not error.any():
        return np.zeros(error.shape, dtype=np.int64), 0, True
    within = error[(error > 0) & (error <= budget)]
    if not within.size:
        return np.where(error > 0, 1, 0).astype(np.int64), 0, True
    fractions = [Fraction(e).limit_denominator(10**9) for e in np.unique(within)]
    unit = Fraction(math.gcd(*(f.numerator * (_lcm(fractions) // f.denominator) for f in fractions)), _lcm(fractions))
    units = int(Fraction(budget).limit_denominator(10**9) / unit)
    exact = units <= _UNITS
    step = float(unit) if exact else budget / _UNITS
    units = units if exact else _UNITS
    spends = np.where(error > budget * (1 + 1e-12), units + 1, np.ceil(error / step - 1e-6)).astype(np.int64)
    return spends, units, exact


def _lcm(fractions: list[Fraction]) -> int:
    return math.lcm(*(f.denominator for f in fractions))
