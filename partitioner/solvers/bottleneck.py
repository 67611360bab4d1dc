"""The smallest bottleneck of a chain, exactly: is there a plan whose every node and link is busy for at most T? then a smaller T.

A device's time is decode + compute + encode, so what a stage may still do depends on the codec that it is fed in. For a fixed T one figure
is enough: `credit`, the seconds of operators before the stage (a constant of its place) less what it spends on decoding; of two ways to reach the same
state the one with more credit can do all that the other can. So the codec is decided on the way, and is no dimension of the state,
which is (devices chosen, last kind, first kind, error spent, position). A binary search over T is closed by asking for a plan that is
better than the best one found, by however little: that there is none is the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partitioner.solvers.choices import Level, Step, next_level, start
from partitioner.solvers.problem import Candidate, ChainProblem, Floats

__all__ = ["Bottleneck"]

_NEVER = -np.inf
_LESS = 1 - 1e-12
_ANY = 1e30  # seconds: no limit, and yet finite


@dataclass(frozen=True, eq=False)
class _Filled:
    level: Level
    credit: Floats  # (n, K last, F first, E spent, L+1): of a stage that starts at the position
    ended: Floats  # the best credit of a stage that may end there


class Bottleneck:
    """For a problem of kinds; `sizes` says how many devices each has. `spends` (C, L+1) is the error of a codec at a cut in whole units, of
    which there are `units`."""

    def __init__(
        self, problem: ChainProblem, sizes: tuple[int, ...], allowed: range, *, spends: np.ndarray, units: int = 0
    ) -> None:  # fmt: skip
        self.problem, self.sizes, self.allowed = problem, sizes, allowed
        self.kinds, self.length = len(problem.devices), problem.length
        self.firsts, self.anywhere = 1, True
        self.errors, self.spends = units + 1, spends
        self.prices = [
            [(int(u), None if not u and not each.any() else each == u) for u in np.unique(each) if u < self.errors] for each in spends
        ]
        self.last_end = problem.last_end
        self.free = [bool((self.last_end[k, :-1] == self.length).all()) for k in range(self.kinds)]
        steps: list[Step] = []
        level, most = start(sizes), min(max(allowed, default=0), sum(sizes), self.length)
        while len(steps) < most and (step := next_level(level, sizes)) is not None:
            steps.append(step)
            level = step.level
        self.steps = steps

    def solve(self, low: float, high: float, start_from: Candidate | None = None) -> tuple[Candidate | None, float]:
        """(the best plan of several stages below `high`, a bound that holds for every such plan). Without one: (None, the bound)."""
        best, found = high, start_from
        first = self.within(_ANY if not np.isfinite(high) else high * _LESS)
        if first is None:
            return found, high
        found, best = first, first.value_s
        while best > low and best > 0:
            middle = (low + best) / 2
            if best - low <= 0.02 * best:
                if (better := self.within(best * _LESS)) is None:
                    return found, best
                found, best = better, better.value_s
                middle = (low + best) / 2
                if best <= low:
                    break
            better = self.within(middle)
            if better is None:
                low = middle
            else:
                found, best = better, better.value_s
        return found, min(low, best) if best > 0 else 0.0

    def within(self, limit: float) -> Candidate | None:
        """A plan of several stages with no part above `limit`, or None where there is none."""
        problem = self.problem
        # Where the answer may go home from anywhere to anywhere, it does not matter where the first stage was.
        alone = np.diag(np.asarray(self.sizes) == 1)
        self.anywhere = bool(((problem.back_wire_s <= limit) | alone).all())
        self.firsts = 1 if self.anywhere else self.kinds
        levels: list[_Filled] = []
        level = start(self.sizes)
        for depth in range(1, len(self.steps) + 1):
            step = self.steps[depth - 1]
            credit = np.full((len(step.level.codes), self.kinds, self.firsts, self.errors, self.length + 1), _NEVER)
            for kind in range(self.kinds):
                if depth == 1:
                    opening = -problem.overheads.request_s[kind] - problem.back_take_s[kind]
                    credit[step.after[kind], kind, kind if self.firsts > 1 else 0, 0, 0] = opening
                elif step.after[kind].size:
                    credit[step.after[kind], kind] = self._enter(levels[-1].ended[step.before[kind]], kind, limit)
            level = step.level
            if not np.isfinite(credit).any():
                return None
            ended = np.stack([self._run(credit[:, k], k) for k in range(self.kinds)], axis=1)
            levels.append(_Filled(level, credit, ended))
            if depth in self.allowed and depth > 1 and (end := self._finished(levels[-1], limit)) is not None:
                return self._trace(levels, end, limit)
        return None

    def _spare(self, ended: Floats, kind: int, limit: float) -> Floats:
        """Seconds that a stage on `kind` that ends at each position has left for encoding."""
        problem = self.problem
        spare: Floats = limit * (1 + 1e-15) - problem.overheads.stage_s[kind] - (problem.prefix[kind] - ended)
        return spare

    def _crossing(self, last: int, kind: int, limit: float) -> list[tuple[int, np.ndarray]]:
        wire = self.problem.wire_s[:, last, kind]
        passable = wire <= limit
        return [(int(c), passable[c]) for c in np.flatnonzero(passable.any(axis=-1))]

    def _enter(self, ended: Floats, kind: int, limit: float) -> Floats:
        """(n, F, E, i): the most credit of a stage on `kind` that starts at i."""
        problem = self.problem
        credit = np.full((ended.shape[0], *ended.shape[2:]), _NEVER)
        for last in range(self.kinds):
            spare = self._spare(ended[:, last], last, limit)
            for c, passable in self._crossing(last, kind, limit):
                needed = np.where(passable, problem.send_s[c, last], np.inf)
                arriving = np.where(spare >= needed, problem.prefix[kind] - problem.take_s[c, kind], _NEVER)
                for units, spent in self.prices[c]:
                    at = arriving if spent is None else np.where(spent, arriving, _NEVER)[:, :, : self.errors - units]
                    np.maximum(credit[:, :, units:], at, out=credit[:, :, units:])
        credit[..., 0] = _NEVER
        credit[..., self.length] = _NEVER
        return credit

    def _run(self, credit: Floats, kind: int) -> Floats:
        """(n, F, E, i): the most credit over the possible starts of a stage that ends at i: each start j gives its credit to the ends in
        (j, last_end[j]]. In logarithmic time per position: two overlapping spans of a power of two each, pushed down."""
        ended = np.full(credit.shape, _NEVER)
        if self.free[kind]:
            ended[..., 1:] = np.maximum.accumulate(credit, axis=-1)[..., :-1]
            return ended
        starts = np.flatnonzero((self.last_end[kind] > np.arange(self.length + 1)) & np.isfinite(credit).any(axis=(0, 1, 2)))
        if not starts.size:
            return ended
        width = self.last_end[kind][starts] - starts
        power = np.log2(width + 0.5).astype(np.int64)
        turned = np.moveaxis(credit, -1, 0)[starts]  # (starts, n, F, E)
        spans = np.full((int(power.max()) + 1, self.length + 1, *credit.shape[:-1]), _NEVER)
        np.maximum.at(spans, (power, starts + 1), turned)
        np.maximum.at(spans, (power, starts + 1 + width - (1 << power)), turned)
        for p in range(len(spans) - 1, 0, -1):
            half = 1 << (p - 1)
            np.maximum(spans[p - 1], spans[p], out=spans[p - 1])
            np.maximum(spans[p - 1, half:], spans[p, : spans.shape[1] - half], out=spans[p - 1, half:])
        return np.moveaxis(spans[0], 0, -1)

    def _finished(self, filled: _Filled, limit: float) -> tuple[int, int, int, int] | None:
        """(row, last, first, spent) of a plan that holds, and has spent the least error."""
        problem = self.problem
        for spent in range(self.errors):
            for last in range(self.kinds):
                spare = self._spare(filled.ended[:, last, :, spent], last, limit)[..., self.length]  # (n, F)
                holds = spare >= problem.back_send_s[last]
                holds &= (np.zeros(1) if self.anywhere else problem.back_wire_s[last]) <= limit
                if holds.any():
                    row, first = np.argwhere(holds)[0]
                    return int(row), last, int(first), spent
        return None

    def _trace(self, levels: list[_Filled], end: tuple[int, int, int, int], limit: float) -> Candidate:
        problem, position = self.problem, self.length
        row, last, first, spent = end
        cuts, order, codecs = [position], [last], []
        for depth in range(len(levels) - 1, 0, -1):
            credit = levels[depth].credit[row, last, first, spent]
            reaches = np.where((self.last_end[last] >= position) & (np.arange(self.length + 1) < position), credit, _NEVER)
            j = int(reaches.argmax())
            code = levels[depth].level.codes[row] - levels[depth].level.radix[last]
            row = int(np.searchsorted(levels[depth - 1].level.codes, code))
            last, codec, spent = self._came(levels[depth - 1].ended[row, :, first], last, j, spent, limit)
            codecs.append(codec)
            cuts.append(j)
            order.append(last)
            position = j
        candidate = Candidate(limit, (0, *reversed(cuts)), tuple(reversed(order)), tuple(reversed(codecs)))
        return Candidate(problem.price(candidate)[1], candidate.cuts, candidate.order, candidate.codecs)

    def _came(self, ended: Floats, kind: int, j: int, spent: int, limit: float) -> tuple[int, int, int]:
        """(last kind, codec, spent before) of the best way to start a stage on `kind` at j; `ended` is (K, E, L+1)."""
        problem = self.problem
        best = (np.inf, 0, 0, 0)
        for last in range(self.kinds):
            for c, passable in self._crossing(last, kind, limit):
                left = spent - int(self.spends[c, j])
                if left >= 0 and passable[j] and self._spare(ended[last, left], last, limit)[j] >= problem.send_s[c, last, j]:
                    best = min(best, (float(problem.take_s[c, kind, j]), last, c, left))
        assert best[0] < np.inf, "a state that was reached came from somewhere"
        return best[1:]
