"""The best chain of stages for a decoder model, exactly: which nodes, in which order, cut where, in which format, sent how. Pure.

A pass over the chain adds up (latency), and the busiest node or link paces it (bottleneck). All that a plan is judged by is a function of the two that
falls when neither grows. So the plans that matter are those of least latency within a bottleneck: they are walked through from the quickest on, each with a smaller
bottleneck than the one before, until no smaller one can pay. Each is found by dynamic programming over (nodes used, node of the stage, codec that it
takes, where it begins); the order of nodes is free, and each takes at most one stage (the set of used nodes in the state, as Benoit and Robert, "Mapping pipeline
skeletons onto heterogeneous platforms", 2008, show to be needed).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from partitioner.solvers.problem import Floats

__all__ = ["Chain", "ChainPlan", "Costs", "Found", "best_chain", "price"]

_BELOW = 1 - 1e-9  #: the next bottleneck is smaller by at least so much
_MOST_STEPS = 300  # plans that are walked through
_FIRST, _LAST, _ALONE = -1, -1, -2  # in the place of a codec: nothing is taken, nothing is sent on; and the stage is the only one

_State = tuple[int, int, int]  # nodes used (bits), the stage's node, the codec that it takes


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds, of one kind: what adds up to a plan's latency, or what keeps nodes and links busy in one pass. N nodes, F formats, C codecs, L vertices."""

    vertices: Floats  # (N, F, L)
    stage: Floats  # (N,): of each stage, besides its vertices
    request: Floats  # (N,): of the first stage's node
    send: Floats  # (C, N): what crosses a cut, to be encoded
    take: Floats  # (C, N): and decoded
    wire: Floats  # (C, N, N): on its way, from row to column; inf where there is none
    back_send: Floats  # (N,): the tokens, from the last stage
    back_take: Floats  # (N,): to the first one's node
    back_wire: Floats  # (N, N)

    def ends(self, node: int, taken: int, sent: int) -> float:
        """What a stage does besides computing, by the codecs at its two ends; the answer that it takes as the first one included."""
        seconds = float(self.stage[node])
        if taken == _FIRST:
            seconds += float(self.request[node]) + (float(self.back_take[node]) if sent != _ALONE else 0.0)
        else:
            seconds += float(self.take[taken, node])
        if sent >= 0:
            seconds += float(self.send[sent, node])
        elif sent == _LAST:
            seconds += float(self.back_send[node])
        return seconds


@dataclass(frozen=True, eq=False)
class Chain:
    """Position p stands before vertex p; a stage is [j, i). `fits` (N, F, L+1, L+1): whether it may be on a node in a format. `counts`: how many stages there may be."""

    latency: Costs
    pace: Costs
    fits: np.ndarray
    firsts: frozenset[int]  # nodes that may have the first stage
    lasts: frozenset[int]
    counts: frozenset[int]

    @property
    def nodes(self) -> int:
        return self.latency.vertices.shape[0]

    @property
    def length(self) -> int:
        return self.latency.vertices.shape[2]

    @functools.cached_property
    def sums(self) -> tuple[Floats, Floats]:
        """(N, F, L+1, L+1): seconds of the vertices of [j, i), for latency and for pace."""
        return _spans(self.latency.vertices), _spans(self.pace.vertices)


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """Stage k is [cuts[k], cuts[k+1]) on node order[k] in formats[k], and sends in codecs[k] to the next."""

    latency_s: float
    bottleneck_s: float
    cuts: tuple[int, ...]
    order: tuple[int, ...]
    formats: tuple[int, ...]
    codecs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """`bound`: no plan has a smaller score; equal to `score` where that is proven to be the best."""

    plan: ChainPlan
    score: float
    bound: float


def best_chain(chain: Chain, score: Callable[[float, float], float]) -> Found | None:
    """The plan of least `score(latency_s, bottleneck_s)`, which must not fall when one of the two grows; None where there is none."""
    best: ChainPlan | None = None
    least, bound, limit_s = math.inf, math.inf, math.inf
    floor_s = _least_bottleneck(chain)
    for _ in range(_MOST_STEPS):
        plan = _quickest(chain, limit_s)
        if plan is None:
            bound = least
            break
        if best is None or score(plan.latency_s, plan.bottleneck_s) < least:
            best, least = plan, score(plan.latency_s, plan.bottleneck_s)
        bound = score(plan.latency_s, floor_s)  # of all that follow: none is quicker
        if bound >= least:
            break
        limit_s = _BELOW * min(plan.bottleneck_s, _last_below(functools.partial(score, plan.latency_s), least, plan.bottleneck_s))
    return None if best is None else Found(best, least, min(bound, least))


def _last_below(score: Callable[[float], float], least: float, high: float) -> float:
    """About the largest bottleneck with which a plan that is no quicker could still score less: nothing above it needs to be looked at."""
    if score(high) < least:
        return high
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) < least else (low, middle)
    return high


def price(chain: Chain, cuts: tuple[int, ...], order: tuple[int, ...], formats: tuple[int, ...], codecs: tuple[int, ...]) -> ChainPlan:
    """The plan with its latency and its bottleneck; inf where it cannot be."""
    many = len(order) > 1
    latency_s = bottleneck_s = 0.0
    for k, node in enumerate(order):
        taken = codecs[k - 1] if k else _FIRST
        sent = codecs[k] if k + 1 < len(order) else _LAST if many else _ALONE
        j, i = cuts[k], cuts[k + 1]
        if not chain.fits[node, formats[k], j, i]:
            latency_s = math.inf
        latency_s += float(chain.sums[0][node, formats[k], j, i]) + chain.latency.ends(node, taken, sent)
        bottleneck_s = max(bottleneck_s, float(chain.sums[1][node, formats[k], j, i]) + chain.pace.ends(node, taken, sent))
        if k + 1 < len(order):
            latency_s += float(chain.latency.wire[sent, node, order[k + 1]])
            bottleneck_s = max(bottleneck_s, float(chain.pace.wire[sent, node, order[k + 1]]))
    if many:
        latency_s += float(chain.latency.back_wire[order[-1], order[0]])
        bottleneck_s = max(bottleneck_s, float(chain.pace.back_wire[order[-1], order[0]]))
    return ChainPlan(latency_s, bottleneck_s, cuts, order, formats, codecs)


def _spans(vertices: Floats) -> Floats:
    before = np.concatenate([np.zeros((*vertices.shape[:2], 1)), np.cumsum(vertices, axis=2)], axis=2)
    spans: Floats = np.maximum(before[:, :, None, :] - before[:, :, :, None], 0.0)
    return spans


def _least_bottleneck(chain: Chain) -> float:
    """A bound: each vertex is somewhere, and the stages share the work at best evenly."""
    least = chain.pace.vertices.min(axis=(0, 1))
    return max(float(least.max()), float(least.sum()) / max(chain.counts))


def _quickest(chain: Chain, limit_s: float) -> ChainPlan | None:
    """The plan of least latency within a bottleneck."""
    found = [plan for first in sorted(chain.firsts) if (plan := _Search(chain, first, limit_s).best()) is not None]
    return min(found, key=lambda one: (one.latency_s, one.bottleneck_s), default=None)


class _Search:
    """The quickest plan that begins on a given node, within a bottleneck."""

    def __init__(self, chain: Chain, first: int, limit_s: float) -> None:
        self.chain, self.first, self.limit_s = chain, first, limit_s
        self.known: dict[tuple[int, int, int], tuple[Floats, np.ndarray]] = {}
        self.begun: dict[_State, Floats] = {}  # (L+1,): what has passed when the state's stage begins at each position
        self.came: dict[_State, np.ndarray] = {}  # (3, L+1): node and codec of the stage before, and where it began

    def stage(self, node: int, taken: int, sent: int) -> tuple[Floats, np.ndarray]:
        """(latency, format) of stage [j, i) there, with what it does at its ends: (L+1, L+1) each. Formats that keep the node busy for longer than the limit are none."""
        key = (node, taken, sent)
        if key not in self.known:
            chain = self.chain
            busy = chain.sums[1][node] + chain.pace.ends(node, taken, sent)
            seconds = np.where(chain.fits[node] & (busy <= self.limit_s), chain.sums[0][node], np.inf)  # (F, L+1, L+1)
            form = seconds.argmin(axis=0)
            least = np.take_along_axis(seconds, form[None], axis=0)[0] + chain.latency.ends(node, taken, sent)
            self.known[key] = least, form
        return self.known[key]

    def best(self) -> ChainPlan | None:
        chain, first, length = self.chain, self.first, self.chain.length
        least, end = math.inf, None
        if 1 in chain.counts and first in chain.lasts:
            least = float(self.stage(first, _FIRST, _ALONE)[0][0, length])
        start = np.full(length + 1, np.inf)
        start[0] = 0.0
        level: list[_State] = [(1 << first, first, _FIRST)]
        self.begun[level[0]] = start
        for count in range(2, max(chain.counts) + 1):
            level = self._next(level)
            for state in level if count in chain.counts else ():
                _, node, taken = state
                if node in chain.lasts and chain.pace.back_wire[node, first] <= self.limit_s:
                    seconds = self.begun[state] + self.stage(node, taken, _LAST)[0][:, length]
                    total = float(seconds.min()) + float(chain.latency.back_wire[node, first])
                    if total < least:
                        least, end = total, state
        if not math.isfinite(least):
            return None
        return self._alone() if end is None else self._traced(end)

    def _next(self, level: list[_State]) -> list[_State]:
        chain, length = self.chain, self.chain.length
        found: dict[_State, None] = {}
        for state in level:
            used, node, taken = state
            for sent in range(chain.latency.send.shape[0]):
                through = self.begun[state][:, None] + self.stage(node, taken, sent)[0]
                start = through.argmin(axis=0)
                ended = through[start, np.arange(length + 1)]
                ended[-1] = np.inf  # something is left for the next
                if not np.isfinite(ended).any():
                    continue
                came = np.stack([np.full(length + 1, node), np.full(length + 1, taken), start])
                for target in range(chain.nodes):
                    if used >> target & 1 or not chain.pace.wire[sent, node, target] <= self.limit_s:
                        continue
                    key = (used | 1 << target, target, sent)
                    there = ended + chain.latency.wire[sent, node, target]
                    held = self.begun.get(key)
                    if held is None:
                        self.begun[key], self.came[key] = there, came
                    else:
                        better = there < held
                        self.begun[key], self.came[key] = np.where(better, there, held), np.where(better, came, self.came[key])
                    found[key] = None
        return [state for state in found if np.isfinite(self.begun[state]).any()]

    def _alone(self) -> ChainPlan:
        form = int(self.stage(self.first, _FIRST, _ALONE)[1][0, self.chain.length])
        return price(self.chain, (0, self.chain.length), (self.first,), (form,), ())

    def _traced(self, end: _State) -> ChainPlan:
        stop, sent, state = self.chain.length, _LAST, end
        start = int((self.begun[state] + self.stage(state[1], state[2], _LAST)[0][:, stop]).argmin())
        cuts, order, formats, codecs = [stop], list[int](), list[int](), list[int]()
        while True:
            used, node, taken = state
            cuts.append(start)
            order.append(node)
            formats.append(int(self.stage(node, taken, sent)[1][start, stop]))
            if taken == _FIRST:
                break
            codecs.append(taken)
            before = tuple(int(value) for value in self.came[state][:, start])
            state, sent, stop, start = (used & ~(1 << node), before[0], before[1]), taken, start, before[2]
        return price(self.chain, tuple(reversed(cuts)), tuple(reversed(order)), tuple(reversed(formats)), tuple(reversed(codecs)))
