"""The exact search for graphs that are not chains: every division into convex stages, one per device.

A plan is a growing chain of ideals (downsets: sets of operators that hold whatever their members use; Tarnawski and others 2020): each stage is
the difference of two. What a state needs to remember of its past is the ideal, which devices are used, where the tensors are
that are still needed, and when these stages ended (latency) or how busy they are (throughput). Of two ways to the same ideal, devices and
homes the one that is no worse in any of these figures is enough. Best-first by a lower bound: stopped early, the least bound
of what is left holds for every plan of this kind.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np

from partitioner.cost import BUFFERED_REQUESTS
from partitioner.solvers.kinds import group
from partitioner.solvers.placement import Placement
from partitioner.solvers.problem import ChainProblem, Objective
from partitioner.solvers.reading import GraphCosts

__all__ = ["MAX_IDEALS", "Found", "count_ideals", "search"]

MAX_IDEALS = 20_000
_EFFORT = 40_000  # states that are made, some 20 microseconds each
_LESS = 1 - 1e-12


@dataclass(frozen=True)
class Found:
    """`placement` is better than the plan that was known, or None. `bound_s` holds for every plan with one convex stage per device; where the
    search came to its end it is the objective of the best one."""

    placement: Placement | None
    bound_s: float
    finished: bool


@dataclass(frozen=True, slots=True)
class _State:
    ideal: int  # its number
    stages: tuple[tuple[int, int], ...]  # (device, members as bits), in order
    figure: tuple[float, ...]  # of each stage: its end, or its device's load
    worst: float  # of links, for throughput
    codecs: tuple[tuple[tuple[int, int], str], ...]


def count_ideals(costs: GraphCosts, most: int = MAX_IDEALS) -> list[int] | None:
    """All ideals as bits, smallest first; None where there are more than `most`."""
    needs = [sum(1 << u for u in before) for before in costs.before]
    seen, layer = {0}, [0]
    found = [0]
    while layer:
        wider: set[int] = set()
        for ideal in layer:
            for v, need in enumerate(needs):
                if not ideal >> v & 1 and need & ~ideal == 0:
                    wider.add(ideal | 1 << v)
        layer = sorted(wider - seen)
        seen.update(layer)
        found += layer
        if len(found) > most:
            return None
    return found


def search(
    costs: GraphCosts,
    problem: ChainProblem,
    objective: Objective,
    stages: range,
    known_s: float,
    *,
    ingress: int = -1,
    effort: int = _EFFORT,
) -> Found | None:
    """Looks for a plan below `known_s`; None where the graph has too many ideals. `problem` holds one operator per vertex; its order does not
    matter."""
    ideals = count_ideals(costs)
    return None if ideals is None else _Search(costs, problem, objective, stages, known_s, ingress, ideals).run(effort)


class _Search:
    def __init__(
        self, costs: GraphCosts, problem: ChainProblem, objective: Objective, stages: range, known_s: float, ingress: int, ideals: list[int]
    ) -> None:
        self.costs, self.problem, self.objective, self.stages = costs, problem, objective, stages
        self.known, self.ingress, self.ideals = known_s, ingress, ideals
        self.count, self.devices = len(costs.operators), len(problem.devices)
        self.number = {ideal: k for k, ideal in enumerate(ideals)}
        self.full = (1 << self.count) - 1
        self.bits = np.array([[ideal >> v & 1 for v in range(self.count)] for ideal in ideals], dtype=np.int8)
        self.seconds = self.bits @ costs.seconds.T  # (N, M)
        self.params = self.bits @ np.asarray(costs.param_bytes, dtype=np.float64)
        barred = np.zeros((self.count, self.devices)) if problem.allowed is None else (~problem.allowed).T.astype(np.float64)
        self.barred = self.bits @ barred
        self.kind_of = {device: k for k, members in enumerate(group(problem).members) for device in members}
        self.live = [v for v in costs.values if v.users and v.bytes]
        self.user_bits = [sum(1 << u for u in v.users) for v in self.live]
        self.tail = self._tails()
        self.rest: dict[frozenset[int], np.ndarray] = {}
        self.fronts: dict[object, list[tuple[float, ...]]] = {}
        self.supersets: dict[int, np.ndarray] = {}

    def _tails(self) -> list[float]:
        """The least seconds from the start of each operator to the end of the model."""
        quickest = self.costs.seconds.min(axis=0)
        tail = [0.0] * self.count
        for v in range(self.count - 1, -1, -1):
            tail[v] += float(quickest[v])
            for u in self.costs.before[v]:
                tail[u] = max(tail[u], tail[v])
        return tail

    def run(self, effort: int) -> Found:
        tick = itertools.count()
        heap: list[tuple[float, int, _State]] = [(0.0, next(tick), _State(0, (), (), 0.0, ()))]
        best: _State | None = None
        made = 0
        while heap:
            bound, _, state = heap[0]
            if bound >= self.known * _LESS:
                break
            if made > effort:
                return Found(self._placement(best), bound, False)
            heapq.heappop(heap)
            for wider, bound in self._wider(state):
                made += 1
                if bound >= self.known * _LESS:
                    continue
                if self.ideals[wider.ideal] == self.full:
                    if len(wider.stages) in self.stages:
                        best, self.known = wider, bound
                elif len(wider.stages) < max(self.stages) and self._is_new(wider):
                    heapq.heappush(heap, (max(bound, 0.0), next(tick), wider))
        return Found(self._placement(best), self.known, True)

    def _placement(self, state: _State | None) -> Placement | None:
        if state is None:
            return None
        stage_of = [0] * self.count
        for k, (_, members) in enumerate(state.stages):
            for v in range(self.count):
                if members >> v & 1:
                    stage_of[v] = k
        return Placement(tuple(device for device, _ in state.stages), tuple(stage_of), state.codecs)

    def _wider(self, state: _State) -> list[tuple[_State, float]]:
        """Every stage that may come next, with the bound of what it leads to."""
        here = state.ideal
        if here not in self.supersets:
            self.supersets[here] = np.flatnonzero((self.bits >= self.bits[here]).all(axis=1) & (np.arange(len(self.ideals)) != here))
        above = self.supersets[here]
        used = {device for device, _ in state.stages}
        found: list[tuple[_State, float]] = []
        kinds: set[int] = set()
        for device in range(self.devices):
            if device in used or self.kind_of[device] in kinds or (not state.stages and self.ingress not in (-1, device)):
                continue
            kinds.add(self.kind_of[device])
            seconds = self.seconds[above, device] - self.seconds[here, device]
            good = (seconds < self.known) & (self.params[above] - self.params[here] <= self.problem.limits[device])
            good &= self.barred[above, device] == self.barred[here, device]
            for k in np.flatnonzero(good):
                found += self._with(state, int(above[k]), device, float(seconds[k]), used)
        return found

    def _with(self, state: _State, target: int, device: int, seconds: float, used: set[int]) -> list[tuple[_State, float]]:
        problem, p = self.problem, len(state.stages)
        members = self.ideals[target] & ~self.ideals[state.ideal]
        incoming = [0] * p
        tensors = [0] * p
        for value, users in zip(self.live, self.user_bits, strict=True):
            if users & members and not members >> value.source & 1:
                home = next(k for k, (_, inside) in enumerate(state.stages) if inside >> value.source & 1)
                incoming[home] += value.bytes
                tensors[home] += 1
        activation = max(a for v, a in enumerate(self.costs.activation_bytes) if members >> v & 1)
        need = self.params[target] - self.params[state.ideal] + activation + BUFFERED_REQUESTS * sum(incoming)
        if need > problem.limits[device]:
            return []
        stages = (*state.stages, (device, members))
        took = seconds + float(problem.overheads.stage_s[device])
        opening = float(problem.overheads.request_s[device]) if not p else 0.0
        if self.objective == "latency":
            begin, chosen = opening, state.codecs
            for k in range(p):
                if incoming[k]:
                    each = [self._parts(c, state.stages[k][0], device, incoming[k], tensors[k]) for c in range(len(problem.codecs.names))]
                    c = min(range(len(each)), key=lambda c: sum(each[c]))
                    begin = max(begin, state.figure[k] + sum(each[c]))
                    chosen = (*chosen, ((k, p), problem.codecs.names[c]))
            if not math.isfinite(begin):
                return []
            made = [_State(target, stages, (*state.figure, begin + took), 0.0, chosen)]
        else:
            made = []
            ways = [range(len(problem.codecs.names)) if size else range(1) for size in incoming]
            for choice in itertools.product(*ways):
                loads, load, worst, chosen = list(state.figure), took + opening, state.worst, state.codecs
                for k, c in enumerate(choice):
                    if incoming[k]:
                        send, _, wire, take = self._parts(c, state.stages[k][0], device, incoming[k], tensors[k])
                        loads[k], load, worst = loads[k] + send, load + take, max(worst, wire)
                        chosen = (*chosen, ((k, p), problem.codecs.names[c]))
                if math.isfinite(worst):
                    made.append(_State(target, stages, (*loads, load), worst, chosen))
        return [(new, bound) for new in made if (bound := self._bound(new, used | {device})) < self.known]

    def _parts(self, c: int, a: int, b: int, size: int, tensors: int) -> tuple[float, float, float, float]:
        """(encode, latency, wire, decode) in seconds; inf where it cannot be."""
        problem = self.problem
        if not problem.codecs.permitted[c, a, b] or not math.isfinite(problem.latency[a, b]):
            return math.inf, math.inf, math.inf, math.inf
        message = problem.overheads.message_s
        return (
            float(size / problem.codecs.encode[c, a] + message[a] * tensors), float(problem.latency[a, b]),
            float(size / problem.codecs.ratio[c] / problem.bandwidth[a, b]), float(size / problem.codecs.decode[c, b] + message[b] * tensors),
        )  # fmt: skip

    def _bound(self, state: _State, used: set[int]) -> float:
        """A lower bound of whatever grows from here; for a whole plan its objective."""
        whole = self.ideals[state.ideal] == self.full
        if self.objective == "latency":
            bound = max(state.figure)
            if whole:
                for home, answer in self._answers(state):
                    bound = max(bound, state.figure[home] + sum(answer))
                return bound
            for value, users in zip(self.live, self.user_bits, strict=True):
                if self.ideals[state.ideal] >> value.source & 1 and users & ~self.ideals[state.ideal]:
                    home = next(k for k, (_, inside) in enumerate(state.stages) if inside >> value.source & 1)
                    ahead = max(self.tail[u] for u in value.users if not self.ideals[state.ideal] >> u & 1)
                    bound = max(bound, state.figure[home] + ahead)
            return bound
        loads, worst = list(state.figure), state.worst
        if whole:
            for home, (send, _, wire, take) in self._answers(state):
                loads[home] += send
                loads[0] += take
                worst = max(worst, wire)
            return max(*loads, worst)
        return max(*loads, worst, self._rest(state.ideal, used))

    def _answers(self, state: _State) -> list[tuple[int, tuple[float, float, float, float]]]:
        found = []
        for home, (device, inside) in enumerate(state.stages[1:], 1):
            answers = [v.bytes for v in self.costs.values if v.answer and v.bytes and inside >> v.source & 1]
            if answers:
                problem, first, size = self.problem, state.stages[0][0], sum(answers)
                message = problem.overheads.message_s * len(answers)
                found.append((home, (
                    float(size / problem.codecs.encode[0, device] + message[device]), float(problem.latency[device, first]),
                    float(size / problem.codecs.ratio[0] / problem.bandwidth[device, first]) if math.isfinite(problem.latency[device, first]) else math.inf,
                    float(size / problem.codecs.decode[0, first] + message[first]),
                )))  # fmt: skip
        return found

    def _rest(self, ideal: int, used: set[int]) -> float:
        """Seconds that the busiest of the unused devices needs for what is left (by the duality of `bound.bottleneck_bound`)."""
        key = frozenset(used)
        if key not in self.rest:
            free = [d for d in range(self.devices) if d not in used]
            if not free:
                self.rest[key] = np.full(len(self.ideals), np.inf)
            else:
                seconds = self.costs.seconds[free]
                weights = 1.0 / np.maximum(seconds.sum(axis=1), 1e-30)
                least = (weights[:, None] * seconds).min(axis=0) / weights.sum()
                outside = 1 - self.bits
                self.rest[key] = np.maximum(outside @ least, (outside * seconds.min(axis=0)).max(axis=1))
        return float(self.rest[key][ideal])

    def _is_new(self, state: _State) -> bool:
        ideal = self.ideals[state.ideal]
        homes = tuple(
            (k, next(s[0] for s in state.stages if s[1] >> value.source & 1))
            for k, (value, users) in enumerate(zip(self.live, self.user_bits, strict=True))
            if ideal >> value.source & 1 and users & ~ideal
        )
        answers = tuple(
            next((s[0] for s in state.stages if s[1] >> v.source & 1), -1)
            for v in self.costs.values
            if v.answer and v.bytes and ideal >> v.source & 1
        )
        key = (state.ideal, frozenset(d for d, _ in state.stages), homes, answers, state.stages[0][0])
        needed = {device for _, device in homes} | set(answers)
        if self.objective == "throughput" and self.problem.return_bytes:
            needed.add(state.stages[0][0])  # it will take the answer
        open_ = sorted((s[0], f) for s, f in zip(state.stages, state.figure, strict=True) if s[0] in needed)
        closed = [f for s, f in zip(state.stages, state.figure, strict=True) if s[0] not in needed]
        figures = (*(f for _, f in open_), max(state.worst, *closed, 0.0))
        front = self.fronts.setdefault(key, [])
        if any(all(a <= b for a, b in zip(other, figures, strict=True)) for other in front):
            return False
        front[:] = [other for other in front if not all(b <= a for a, b in zip(other, figures, strict=True))]
        front.append(figures)
        return True
