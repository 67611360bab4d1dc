"""The best plan for a graph that was read: which method proves what, and what is left to search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from partitioner.cost import BUFFERED_REQUESTS, CodecFigures, Cost, Overhead
from partitioner.solvers.bound import Instance, bottleneck_bound, latency_bound
from partitioner.solvers.chain import worthwhile
from partitioner.solvers.constraints import Constraints
from partitioner.solvers.diagnose import why_no_plan
from partitioner.solvers.ideals import search
from partitioner.solvers.kinds import group
from partitioner.solvers.linear import alternatives, best_in_order
from partitioner.solvers.narrowing import narrowed
from partitioner.solvers.placement import Realised, Scale, Selected
from partitioner.solvers.problem import ChainProblem, Codecs, Floats, Objective, Overheads
from partitioner.solvers.reading import GraphCosts
from partitioner.solvers.refine import fewest_bytes, refine, thrift_note
from partitioner.solvers.route import Prices
from partitioner.solvers.tiers import two_tiers
from splitnet.cluster import Link
from splitnet.plan import Alternative

__all__ = ["Chosen", "Question", "choose_plan", "pipeline_depth"]

MAX_POSITIONS = 1000  #: cuts that are considered on a graph
_FEWER = 300  # where it is no chain, or devices are many
_REFINED = 400  # placements that local search weighs
_MAX_REFINED_OPERATORS = 400
_MAX_IN_FLIGHT = 16


@dataclass(frozen=True, eq=False)
class Question:
    """All that a plan is chosen by. `positions`: the cuts that are asked for, from 0 to n."""

    costs: GraphCosts
    links: Mapping[tuple[str, str], Link]
    limits: Floats
    arrays: tuple[Floats, Floats]
    codecs: Codecs
    figures: Mapping[str, CodecFigures]
    overheads: Mapping[str, Overhead]
    overhead_arrays: Overheads
    allowed: np.ndarray | None
    wishes: Constraints
    stages: range
    positions: tuple[int, ...] | None
    tolerance: float

    def problem(self, positions: tuple[int, ...]) -> ChainProblem:
        return self.costs.problem(self.limits, self.arrays, self.codecs, self.overhead_arrays, self.allowed, positions)

    def scale(self, goal: Objective) -> Scale:
        return Scale(
            realise=self.costs.realise, objective=goal, links=self.links, limits=dict(zip(self.costs.devices, self.limits, strict=True)),
            stages=self.stages, codecs=self.figures, overheads=self.overheads, producers=self.costs.producers,
            link_codecs={pair: tuple(names) for pair, names in self.wishes.link_codecs.items()}, budget=self.wishes.max_accuracy_loss,
            ingress=self.wishes.ingress, allowed=self.allowed,
        )  # fmt: skip

    def instance(self) -> Instance:
        """For the bounds; equal devices as one kind."""
        whole = self.problem((0, len(self.costs.operators)))
        grouped = group(replace(whole, seconds=self.costs.seconds, allowed=self.allowed))
        first = [members[0] for members in grouped.members]
        costs = self.costs
        answers = {v.source: 0.0 for v in costs.values if v.answer}
        for value in costs.values:
            if value.answer:
                answers[value.source] += value.bytes
        sources = [v for v, before in enumerate(costs.before) if not before]
        uses: dict[int, dict[int, float]] = {}
        for value in costs.values:
            for user in value.users:
                carried = uses.setdefault(user, {})
                carried[value.source] = carried.get(value.source, 0.0) + value.bytes
        return Instance(
            seconds=costs.seconds[first], uses=uses, latency=np.where(np.isfinite(grouped.problem.latency), grouped.problem.latency, np.inf),
            bandwidth=grouped.problem.bandwidth, codecs=grouped.problem.codecs, stage_s=self.overhead_arrays.stage_s[first],
            sizes=grouped.sizes, limits=self.limits[first], param_bytes=np.asarray(costs.param_bytes, dtype=np.float64),
            allowed=None if self.allowed is None else self.allowed[first], ring=sources[0] if len(sources) == 1 else -1, return_bytes=answers,
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """`bound_s` holds for every plan with one stage per node that the wishes about nodes and codecs allow, memory limits kept (those about the
    number and place of stages aside)."""

    goal: Objective
    selected: Selected
    bound_s: float
    busiest_bound_s: float
    alternatives: tuple[Alternative, ...]
    note: str = ""


def choose_plan(question: Question, goal: Objective) -> Chosen:
    """Raises NoPlan saying what is missing where."""
    costs, count = question.costs, len(question.costs.operators)
    scale = question.scale(goal)
    instance = question.instance()
    busiest = bottleneck_bound(instance)
    ordered = costs.is_chain and question.positions is None and question.wishes.max_accuracy_loss is None
    # The solver of chains proves more for latency than a bound for graphs would.
    bound = busiest if goal == "throughput" else 0.0 if ordered else latency_bound(instance)
    positions, lossy = _positions(question, goal)
    problem = question.problem(positions)
    exact = costs.is_chain and not lossy and question.positions is None
    best, answer = best_in_order(scale, problem, positions, exact=costs.is_chain, bound_s=bound)
    everything = range(1, len(costs.devices) + 1)
    if exact and question.stages == everything:
        bound = max(bound, answer.bound_s)
    elif exact:
        free = replace(question, stages=everything)
        _, whole = best_in_order(free.scale(goal), problem, positions, exact=True, bound_s=bound)
        bound = max(bound, whole.bound_s)
    if lossy and costs.is_chain:
        best, bound = _over_all_positions(question, goal, scale, best, bound, answer.prices)
    if not costs.is_chain and question.positions is None:
        best, bound = _beyond_the_order(question, goal, scale, best, bound)
    if best is None:
        raise scale.refused or why_no_plan(
            problem, [costs.names[i] for i in positions[:-1]], question.stages, question.wishes.max_accuracy_loss
        )
    proven = min(bound, best.cost.objective_s(goal))
    thrifty = fewest_bytes(scale, best, question.tolerance)
    note = thrift_note(best, thrifty, goal, question.tolerance)
    return Chosen(goal, thrifty, proven, busiest, alternatives(scale, question.problem((0, count)), (0, count)), note)


def _over_all_positions(
    question: Question, goal: Objective, scale: Scale, best: Selected | None, bound: float, prices: Prices | None
) -> tuple[Selected | None, float]:
    """For a chain of which some positions were left out: a bound for all of them, and a plan over those where a better one may be cut. A position
    whose own bound is not below the plan that is known is dropped without loss; of the others, if they are many, the most promising are kept."""
    count, everything = len(question.costs.operators), range(1, len(question.costs.devices) + 1)
    known = best.cost.objective_s(goal) if best else math.inf
    whole = question.problem(tuple(range(count + 1)))
    budget = question.wishes.max_accuracy_loss
    proven, excess, prices = worthwhile(whole, goal, known, prices, stages=everything, budget=budget, bound_s=bound)
    kept = np.flatnonzero(excess[1:-1] < 0) + 1
    kept = np.sort(kept[np.argsort(excess[kept], kind="stable")[:MAX_POSITIONS]])
    if best is not None:
        inner = [v for v in range(1, count) if best.placement.stage_of[v] != best.placement.stage_of[v - 1]]
        kept = np.union1d(kept, np.asarray(inner, dtype=np.int64))
    positions = (0, *map(int, kept), count)
    other, _ = best_in_order(scale, question.problem(positions), positions, exact=True, bound_s=proven, prices=prices)
    if other is not None and (best is None or scale.rank(other) < scale.rank(best)):
        best = other
    return best, max(bound, proven)


def _positions(question: Question, goal: Objective) -> tuple[tuple[int, ...], bool]:
    if question.positions is not None:
        return question.positions, False
    costs, count = question.costs, len(question.costs.operators)
    whole = question.problem((0, count))
    alone = [
        float(costs.seconds[d].sum() + whole.overheads.stage_s[d] + whole.overheads.request_s[d])
        for d in range(len(costs.devices)) if whole.possible[d, 0, 1] and (question.allowed is None or question.allowed[d].all())
    ]  # fmt: skip
    known = min(alone, default=math.inf) if 1 in question.stages else math.inf
    most = MAX_POSITIONS if costs.is_chain else _FEWER
    return narrowed(
        costs.cut_bytes,
        costs.seconds.mean(axis=0),
        range(1, count),
        most,
        known_s=known,
        bandwidth=question.arrays[0],
        codecs=question.codecs,
    )


def _beyond_the_order(
    question: Question, goal: Objective, scale: Scale, best: Selected | None, bound: float
) -> tuple[Selected | None, float]:
    """What no single order of the operators shows: a minimum cut for two devices, the search over ideals, local search."""
    costs = question.costs
    whole_problem = question.problem(tuple(range(len(costs.operators) + 1))) if len(costs.operators) <= MAX_POSITIONS else None
    ingress = costs.devices.index(question.wishes.ingress) if question.wishes.ingress else -1

    def better(one: Selected | None) -> None:
        nonlocal best
        if one is not None and (best is None or scale.rank(one) < scale.rank(best)):
            best = one

    if whole_problem is not None and len(costs.devices) == 2 and goal == "latency" and scale.budget is None:
        tiers = two_tiers(costs, whole_problem, ingress=ingress)
        for placement in tiers.placements:
            better(scale.weigh(placement))
        alone = [a.latency_s for a in alternatives(scale, question.problem((0, len(costs.operators))), (0, len(costs.operators))) if a.fits]
        if tiers.proven:
            bound = max(bound, min([tiers.bound_s, *alone]))
    if best is not None and len(costs.operators) <= _MAX_REFINED_OPERATORS:
        best = refine(scale, best, costs.before, len(costs.devices), _REFINED)
    reached = best.cost.objective_s(goal) if best else math.inf
    if whole_problem is not None and reached > bound * (1 + 1e-12) and scale.budget is None:
        free = question.stages == range(1, len(costs.devices) + 1)
        found = search(costs, whole_problem, goal, question.stages, reached, ingress=ingress)
        if found is not None:
            if found.placement is not None:
                better(scale.weigh(found.placement))
            if free:
                bound = max(bound, min(found.bound_s, best.cost.objective_s(goal) if best else math.inf))
    return best, bound


def pipeline_depth(realised: Realised, cost: Cost, limits: Mapping[str, float], taken: Mapping[str, float]) -> int:
    """How many requests may be under way: what keeps the bottleneck busy, at least `_MAX_IN_FLIGHT` for the sake of bursts, as far as the
    memory that is left can hold their inputs."""
    wanted = max(_MAX_IN_FLIGHT, math.ceil(cost.latency_s / cost.bottleneck_s) + 1 if cost.bottleneck_s > 0 else 0)
    home = {stage.name: stage.node for stage in realised.stages}
    received: dict[str, int] = {}
    for transfer in realised.transfers:
        if transfer.target:
            node = home[transfer.target]
            received[node] = received.get(node, 0) + transfer.bytes
    room = [
        BUFFERED_REQUESTS + (limits[node] - taken.get(node, 0.0) - cost.memory_bytes[node]) // size
        for node, size in received.items() if size and math.isfinite(limits[node])
    ]  # fmt: skip
    return int(max(1, min([wanted, 1024, *room])))
